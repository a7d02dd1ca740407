package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A kernel that gives all namespaces but for processes: the others are there, and the report says what was refused.
func TestPIDNamespaceRefused(t *testing.T) {
	for name, who := range users() {
		t.Run(name, func(t *testing.T) {
			arg := "pid:"
			if who != nil {
				arg = "pid:nobody"
			}
			r := reportOf(t, run(t, nil, "refused", arg, ownUserNS))
			demand(t, r, Seccomp, Landlock, MountNS, NetworkNS, IPCNS, NoNewPrivs, Capabilities, Limits)
			if s := r.String(); !strings.Contains(s, "pid ns: NOT in force: the kernel refused a PID namespace: no space left on device (raise sysctl user.max_user_namespaces") {
				t.Errorf("report:\n%s", s)
			}
			c := start(t, nil, "refused", arg+":require", ownUserNS)
			if ws := c.wait(t); ws.ExitStatus() != 3 || !strings.Contains(c.err.String(), "the kernel refused a PID namespace") {
				t.Errorf("RequireNamespaces: exit %d\n%s", ws.ExitStatus(), c.err.String())
			}
		})
	}
}

// The zombie's masks say of what a Go program wanted to die.
func TestWantedToDieOf(t *testing.T) {
	const caught = "Name:\tx\nSigIgn:\t%016x\nSigCgt:\t%016x\n"
	all := uint64(1<<31 - 1)
	without := func(s syscall.Signal) uint64 { return all &^ (1 << (s - 1)) }
	for _, c := range []struct {
		status string
		want   syscall.Signal
	}{
		{fmt.Sprintf(caught, 0, all), 0},
		{fmt.Sprintf(caught, 0, without(unix.SIGTERM)), unix.SIGTERM},
		{fmt.Sprintf(caught, 0, without(unix.SIGPIPE)), unix.SIGPIPE},
		{fmt.Sprintf(caught, 1<<(unix.SIGHUP-1), without(unix.SIGHUP)), 0}, // nohup
		{fmt.Sprintf(caught, 0, 0), 0},                                     // the masks are gone
		{"SigIgn:\tx\nSigCgt:\t0\n", 0},
		{"SigCgt:\t0000000000000001\n", 0},
		{"", 0},
	} {
		if got := wantedToDieOf(c.status); got != c.want {
			t.Errorf("%q: %v, want %v", c.status, got, c.want)
		}
	}
}

// ^Z: number 1 of a PID namespace cannot be stopped by it, so the first process stops it.
func TestStopAndContinue(t *testing.T) {
	for name, who := range users() {
		t.Run(name, func(t *testing.T) {
			c, pid, out := ready(t, who, "tick", "")
			defer func() { _ = c.Process.Kill(); c.wait(t) }()
			stopped := func(pid int) bool {
				b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
				return err == nil && strings.Contains(string(b), ") T ")
			}
			until := func(want bool) {
				t.Helper()
				for end := time.Now().Add(patience); stopped(c.Process.Pid) != want || stopped(pid) != want; time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatalf("stopped: first process %v, second %v; want %v", stopped(c.Process.Pid), stopped(pid), want)
					}
				}
			}
			for _, sig := range []syscall.Signal{unix.SIGTSTP, unix.SIGTTIN, unix.SIGTSTP} {
				_ = c.Process.Signal(sig)
				until(true)
				_ = c.Process.Signal(unix.SIGCONT)
				until(false)
			}
			if _, err := out.Read(make([]byte, 1)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAtEndRunsOutside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	c := start(t, nil, "atend", path)
	if ws := c.wait(t); ws.ExitStatus() != 7 {
		t.Errorf("%v: %s", ws, c.err.String())
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
}

// Who started it may have died before the kernel was asked to tell.
func TestOrphanEnds(t *testing.T) {
	c := start(t, nil, "report", "", func(c *exec.Cmd) { c.Env = append(c.Env, markerEnv+"=first=1") })
	if ws := c.wait(t); ws.ExitStatus() != 1 || c.out.Len() != 0 || !strings.Contains(c.err.String(), "the process 1 that started this one is gone") {
		t.Errorf("%v: %s%s", ws, c.out.String(), c.err.String())
	}
	c = start(t, nil, "report", "", func(c *exec.Cmd) { c.Env = append(c.Env, fmt.Sprintf("%s=first=%d", markerEnv, os.Getpid())) })
	if ws := c.wait(t); ws != 0 {
		t.Errorf("%v: %s", ws, c.err.String())
	}
}
