package uring

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const childEnv = "SHADOWBELL_URING_TEST_CHILD"

// child runs in a process of its own, whose limits it may ruin, and prints the error it got.
func child(what string) int {
	runtime.LockOSThread()
	var err error
	switch what {
	case "EPERM":
		forbid(unix.EPERM)
		_, err = New(Config{})
	case "ENOSYS":
		forbid(unix.ENOSYS)
		_, err = New(Config{})
	case "MEMLOCK":
		err = tooMuchMemory()
	}
	fmt.Println(err)
	return 0
}

// forbid makes io_uring_setup fail with errno, as a container's seccomp profile does.
func forbid(errno unix.Errno) {
	const (
		retErrno = 0x00050000
		retAllow = 0x7fff0000
	)
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 0, Jf: 1, K: unix.SYS_IO_URING_SETUP},
		{Code: unix.BPF_RET | unix.BPF_K, K: retErrno | uint32(errno)},
		{Code: unix.BPF_RET | unix.BPF_K, K: retAllow},
	}
	p := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	if _, _, e := unix.Syscall(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&p))); e != 0 {
		panic(e)
	}
}

func tooMuchMemory() error {
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 64 << 10, Max: 64 << 10}); err != nil {
		panic(err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // none
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		panic(err)
	}
	r, err := New(Config{})
	if err != nil {
		panic(err)
	}
	defer r.Close()
	return r.RegisterBuffers([][]byte{make([]byte, 1<<20)})
}

func TestRealRefusalsNameTheRemedy(t *testing.T) {
	for what, want := range map[string]string{
		"EPERM":   "allow io_uring_setup, io_uring_enter and io_uring_register",
		"ENOSYS":  "seccomp profile",
		"MEMLOCK": "raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=) or give CAP_IPC_LOCK; it is 64 KiB",
	} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+what)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v: %q does not say %q", what, err, out, want)
		}
	}
}
