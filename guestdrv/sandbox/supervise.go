package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What the first process does while the second works:
//
//  1. forward signals; stop and go on together with it (supervise)
//  2. wait, and find out of what it died (waitFor)
//  3. end in the same way (endLike)
//
// The second process is number 1 of a PID namespace if it could have one. Number 1 takes signals by other rules, pid_namespaces(7): those that it
// does not catch never reach it but for SIGKILL and SIGSTOP from outside, also those that it sends itself. The Go runtime catches all that end a
// process, and then fails to die of them.

// forwarded are passed on as they are.
var forwarded = []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2}

// stopping are those that stop a process, from a terminal or a shell. Number 1 cannot be stopped by them.
var stopping = []os.Signal{unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU}

func forwardedSignals() chan os.Signal {
	c := make(chan os.Signal, 16)
	for _, list := range [][]os.Signal{forwarded, stopping} {
		for _, s := range list {
			// A signal that was ignored at start (nohup) must stay ignored across exec.
			if !signal.Ignored(s) {
				signal.Notify(c, s)
			}
		}
	}
	return c
}

func supervise(cmd *exec.Cmd, sigs <-chan os.Signal) syscall.WaitStatus {
	go func() {
		for s := range sigs {
			// A signal fails only when the child has ended, and then the wait returns.
			switch s {
			case unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU:
				goOn := make(chan os.Signal, 1)
				signal.Notify(goOn, unix.SIGCONT)
				_ = cmd.Process.Signal(unix.SIGSTOP)
				_ = unix.Kill(unix.Getpid(), unix.SIGSTOP) // may return before it takes effect
				<-goOn
				signal.Stop(goOn)
				_ = cmd.Process.Signal(unix.SIGCONT)
			default:
				if !alreadyDelivered(s) {
					_ = cmd.Process.Signal(s)
				}
			}
		}
	}()
	return waitFor(cmd)
}

// waitFor waits for the end of the child and says how it ended.
func waitFor(cmd *exec.Cmd) syscall.WaitStatus {
	// Not yet reaped, it can be looked at.
	for errors.Is(unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
	}
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	// A Wait that fails without a status leaves the zero status of a child that was never waited for; there is none such after Start.
	_ = cmd.Wait()
	ws, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if cmd.SysProcAttr.Cloneflags&unix.CLONE_NEWPID != 0 && ws.Exited() && ws.ExitStatus() == runtimeExit {
		if sig := wantedToDieOf(string(status)); sig != 0 {
			return syscall.WaitStatus(sig)
		}
	}
	return ws
}

// runtimeExit is with what the Go runtime exits when it has sent itself a signal and lived (dieFromSignal).
const runtimeExit = 2

// wantedToDieOf finds the signal that a dead process wanted to die of: the runtime catches all of these, unless they were ignored at start, and takes
// its handler away from one only to die of it. status is /proc/PID/status of the zombie; proc_pid_status(5).
func wantedToDieOf(status string) syscall.Signal {
	masks := map[string]uint64{}
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		if key == "SigIgn" || key == "SigCgt" {
			v, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			if err != nil {
				return 0
			}
			masks[key] = v
		}
	}
	if len(masks) != 2 || masks["SigCgt"] == 0 {
		return 0
	}
	for _, sig := range []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGPIPE, unix.SIGABRT} {
		if (masks["SigIgn"]|masks["SigCgt"])>>(sig-1)&1 == 0 {
			return sig
		}
	}
	return 0
}

// alreadyDelivered says whether s is likely to be a key on the terminal, which the kernel has sent to the whole foreground process group
// and thereby to the child: a second SIGINT is often taken as "at once".
func alreadyDelivered(s os.Signal) bool {
	if s != unix.SIGINT && s != unix.SIGQUIT {
		return false
	}
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	fg, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err == nil && fg == unix.Getpgrp()
}

// endLike ends this process as the child ended.
func endLike(name string, ws syscall.WaitStatus) {
	if !ws.Signaled() {
		os.Exit(ws.ExitStatus())
	}
	sig := ws.Signal()
	switch sig {
	case unix.SIGSYS:
		fmt.Fprintf(os.Stderr, "%s: killed by its sandbox for a system call that it must not make (the kernel log names it: type=1326 ... syscall=N)\n", name)
	case unix.SIGPIPE:
		// "guestdrv read | head": nothing to tell, and the Go runtime would not die of it here.
	case unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGKILL:
		signal.Reset(sig)
		_ = unix.Kill(unix.Getpid(), sig)
		time.Sleep(time.Second) // the signal ends the process in here
	default:
		fmt.Fprintf(os.Stderr, "%s: killed by signal %d (%s)\n", name, int(sig), strings.TrimSpace(sig.String()))
	}
	os.Exit(128 + int(sig)) // as a shell shows a signal
}
