package vfiouser

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPeerByPIDFD(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = errors.Join(unix.Close(pair[0]), unix.Close(pair[1])) }()
	want := int32(os.Getpid())
	if cred, err := peerOf(pair[0]); err != nil || cred.Pid != want {
		t.Errorf("%+v, %v; want process %d", cred, err, want)
	}
	if fd, err := unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
		_ = unix.Close(fd)
	} else {
		want = 0 // a kernel before 6.5
	}
	if pid := peerByPIDFD(pair[0]); pid != want {
		t.Errorf("process %d, want %d", pid, want)
	}
}

func TestPIDOf(t *testing.T) {
	for info, want := range map[string]int32{
		"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t2\nPid:\t4711\nNSpid:\t4711\n": 4711,
		"Pid:\t0\n": 0, "Pid:\t-1\n": 0, "Pid:\tx\n": 0, "NSpid:\t7\n": 0, "": 0,
	} {
		if got := pidOf(info); got != want {
			t.Errorf("%q: %d, want %d", info, got, want)
		}
	}
}
