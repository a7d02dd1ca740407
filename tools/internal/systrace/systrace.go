// Package systrace shows which system calls a program makes after it has shut its seccomp filter, to tests. It runs the program under ptrace(2),
// unchanged, with all its threads and children; it knows nothing of rules.
//
// The process that calls Run must have no other children: every child that ends is taken for one of the program's.
package systrace

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The way of a thread that is traced:
//
//	1. it is seen for the first time: by the start of the program, or by the SIGSTOP that a new thread begins with
//	2. entry: a call of seccomp is remembered; the calls of a process that is shut are shown
//	3. exit: seccomp worked, the process is shut
//	4. any other stop: a signal, which is handed on, or an event, which is not of interest

// Call is a system call as it is entered.
type Call struct {
	Nr   uint64
	Args [6]uint64
}

// Result says how the program ended.
type Result struct {
	Status syscall.WaitStatus
	Shut   int // processes that shut a filter
}

type thread struct {
	process  int
	shutting bool // it is in a call of seccomp(SECCOMP_SET_MODE_FILTER)
}

type tracer struct {
	threads map[int]*thread
	shut    map[int]bool // by process
	show    func(Call)
}

// Run starts cmd and calls show for each system call of each process that has shut its filter. It returns when all have ended. signals are handed
// on to the program.
func Run(cmd *exec.Cmd, signals <-chan os.Signal, show func(Call)) (Result, error) {
	// ptrace answers to one thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Ptrace = true
	if err := cmd.Start(); err != nil {
		return Result{}, err
	}
	main := cmd.Process.Pid
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // fails once it has ended
		}
	}()
	t := tracer{threads: map[int]*thread{}, shut: map[int]bool{}, show: show}
	var r Result
	for first := true; ; first = false {
		var ws syscall.WaitStatus
		tid, err := syscall.Wait4(-1, &ws, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			r.Shut = len(t.shut)
			return r, nil
		case err != nil:
			return r, fmt.Errorf("wait for traced threads: %w", err)
		}
		if first {
			const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_EXITKILL
			if err := unix.PtraceSetOptions(tid, options); err != nil {
				return r, fmt.Errorf("ptrace options: %w", err)
			}
			t.threads[tid] = &thread{process: tid}
			ws = 0x7f // the SIGTRAP of exec is not for the program
		}
		switch {
		case ws.Exited() || ws.Signaled():
			delete(t.threads, tid)
			if tid == main {
				r.Status = ws
			}
			continue
		}
		sig, err := t.stopped(tid, ws)
		if err == nil {
			err = unix.PtraceSyscall(tid, sig)
		}
		// A thread may be killed at any time, with its process.
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return r, fmt.Errorf("traced thread %d: %w", tid, err)
		}
	}
}

// stopped looks at a stop and says which signal the thread goes on with.
func (t *tracer) stopped(tid int, ws syscall.WaitStatus) (sig int, err error) {
	th := t.threads[tid]
	if th == nil {
		p, err := processOf(tid)
		if err != nil {
			return 0, err
		}
		t.threads[tid] = &thread{process: p}
		return 0, nil
	}
	switch s := ws.StopSignal(); {
	case s == unix.SIGTRAP|0x80:
		return 0, t.call(tid, th)
	case s == unix.SIGTRAP, s == 0: // an event, or the start
		return 0, nil
	default:
		return int(s), nil
	}
}

func (t *tracer) call(tid int, th *thread) error {
	c, entry, worked, err := syscallInfo(tid)
	switch {
	case err != nil:
		return err
	case !entry:
		if th.shutting && worked {
			t.shut[th.process] = true
		}
		th.shutting = false
	case t.shut[th.process]:
		t.show(c)
	case c.Nr == unix.SYS_SECCOMP && c.Args[0] == unix.SECCOMP_SET_MODE_FILTER:
		th.shutting = true
	}
	return nil
}

func processOf(tid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if errors.Is(err, os.ErrNotExist) {
		return 0, unix.ESRCH
	}
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), "\nTgid:")
	var p int
	if _, err := fmt.Sscan(rest, &p); err != nil {
		return 0, fmt.Errorf("/proc/%d/status has no Tgid: %w", tid, err)
	}
	return p, nil
}
