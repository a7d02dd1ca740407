package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The flow:
//
//  1. Reexec reads its own namespaces and starts /proc/self/exe again in new ones, trying what attempts lists.
//  2. The first process forwards signals and waits (supervise), then ends as the second did (endLike). It never returns.
//  3. The second process finds markerEnv, compares its namespaces with the first one's (adopt), and returns to main.
//  4. Where every attempt was refused the first process itself returns to main, and Enter reports the refusal.

// markerEnv carries the first process's namespaces to the second. It grants nothing: a forged value fails the comparison or, at worst,
// makes Enter try to empty a mount namespace that it has no right to.
const markerEnv = "SHADOWBELL_SANDBOX_FROM"

// Options steer Reexec.
type Options struct {
	Name     string // of the program in messages; "" means the base name of os.Args[0]
	Disable  bool   // stay in this process and namespaces; Enter reports them as switched off
	KeepUser bool   // make no user namespace: root keeps its capabilities on the host until Enter, for devices whose set-up wants them
}

// origin is what Reexec found out, for Enter.
var origin struct {
	called bool
	fresh  nsSet // the new namespaces this process is in, verified to differ from the first process's; nil: none
	why    error // why there are none
}

// Reexec starts the program again in new namespaces and returns in that second process only. stdio and other inherited fds, arguments,
// environment, working directory and process group stay; SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 sent to the first process
// reach the second; the first exits with the second's status or dies of its signal, and takes the second with it if it is killed.
//
// Where the kernel refuses, Reexec returns in the first process and Enter reports why. Call it before anything else in main.
func Reexec(o Options) {
	origin.called = true
	if v, ok := os.LookupEnv(markerEnv); ok {
		_ = os.Unsetenv(markerEnv)
		adopt(v)
		return
	}
	if o.Disable {
		origin.why = errors.New("switched off by option")
		return
	}
	if o.Name == "" {
		o.Name = filepath.Base(os.Args[0])
	}
	mine, err := readNamespaces()
	if err != nil {
		origin.why = err
		return
	}

	// The child's death signal comes with the end of the thread that started it, so this thread must live as long as the process.
	runtime.LockOSThread()
	sigs := forwardedSignals()
	refused := errors.New("not asked for: KeepUser is set and the user is not root")
	for _, a := range attempts(o.KeepUser) {
		cmd := command(mine, a)
		if err := cmd.Start(); err != nil {
			refused = &fault{"the kernel refused " + a.what, rootCause(err), userNSRemedy(err)}
			continue
		}
		endLike(o.Name, supervise(cmd, sigs))
	}
	signal.Stop(sigs)
	runtime.UnlockOSThread()
	origin.why = refused
}

// adopt runs in the second process.
func adopt(first string) {
	// The kernel names a process after the file that was executed, "exe". Only ps looks at it, so a failure is of no account.
	_ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)

	was := parseNSSet(first)
	now, err := readNamespaces()
	if err != nil {
		origin.why = err
		return
	}
	for k, id := range now {
		if old, ok := was[k]; ok && old != id {
			if origin.fresh == nil {
				origin.fresh = nsSet{}
			}
			origin.fresh[k] = id
		}
	}
	if origin.fresh == nil {
		origin.why = &fault{"this process is in the same namespaces as its parent", nil, "unset " + markerEnv}
	}
}

func command(mine nsSet, a attempt) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = os.Args
	cmd.Env = append(os.Environ(), markerEnv+"="+mine.String())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &a.attr
	return cmd
}

// rootCause strips "fork/exec /proc/self/exe", which tells the user nothing.
func rootCause(err error) error {
	var no syscall.Errno
	if errors.As(err, &no) {
		return no
	}
	return err
}

func forwardedSignals() chan os.Signal {
	c := make(chan os.Signal, 16)
	for _, s := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2} {
		// A signal that was ignored at start (nohup) must stay ignored across exec.
		if !signal.Ignored(s) {
			signal.Notify(c, s)
		}
	}
	return c
}

func supervise(cmd *exec.Cmd, sigs <-chan os.Signal) syscall.WaitStatus {
	go func() {
		for s := range sigs {
			if !alreadyDelivered(s) {
				_ = cmd.Process.Signal(s) // fails only when the child has ended, and then Wait returns
			}
		}
	}()
	// A Wait that fails without a status leaves the zero status of a child that was never waited for; there is none such after Start.
	_ = cmd.Wait()
	ws, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ws
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
