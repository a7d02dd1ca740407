package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The flow:
//
//  1. Reexec reads its own namespaces and starts /proc/self/exe again in new ones, trying what attempts lists.
//  2. The first process forwards signals and waits (supervise, in supervise.go), then ends as the second did. It never returns.
//  3. The second process finds markerEnv, compares its namespaces with the first one's (adopt), and returns to main.
//  4. Where every attempt was refused the first process itself returns to main, and Enter reports the refusal.

// markerEnv carries the first process's namespaces to the second. It grants nothing: a forged value fails the comparison or, at worst,
// makes Enter try to empty a mount namespace that it has no right to.
const markerEnv = "SHADOWBELL_SANDBOX_FROM"

// noPIDsKey stands before the error with which the kernel refused a PID namespace but not the others.
const noPIDsKey = "nopid"

// firstKey stands before the first process's number in /proc.
const firstKey = "first"

// Options steer Reexec.
type Options struct {
	Name     string // of the program in messages; "" means the base name of os.Args[0]
	Disable  bool   // stay in this process and namespaces; Enter reports them as switched off
	KeepUser bool   // make no user namespace: root keeps its capabilities on the host until Enter, for devices whose set-up wants them
	// AtEnd runs in the first process after the second has ended, for what cannot be done from inside, such as removing a socket's file. Nobody runs
	// it where there is no second process: with Disable, or where the kernel refuses all namespaces.
	AtEnd func()
}

// origin is what Reexec found out, for Enter.
var origin struct {
	called bool
	fresh  nsSet // the new namespaces this process is in, verified to differ from the first process's; nil: none
	why    error // why there are none
	pids   error // why there is no PID namespace although there are others
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
	self, err := os.Readlink("/proc/self")
	if err != nil {
		origin.why = err
		return
	}

	// The child's death signal comes with the end of the thread that started it, so this thread must live as long as the process.
	runtime.LockOSThread()
	sigs := forwardedSignals()
	var noPIDs syscall.Errno
	refused := errors.New("not asked for: KeepUser is set and the user is not root")
	for _, a := range attempts(o.KeepUser) {
		marker := fmt.Sprintf("%s %s=%s", mine, firstKey, self)
		if a.attr.Cloneflags&unix.CLONE_NEWPID == 0 && noPIDs != 0 {
			marker += fmt.Sprintf(" %s=%d", noPIDsKey, noPIDs)
		}
		cmd := command(marker, a)
		if err := cmd.Start(); err != nil {
			noPIDs = 0
			_ = errors.As(err, &noPIDs)
			refused = &fault{"the kernel refused " + a.what, rootCause(err), userNSRemedy(err)}
			continue
		}
		ws := supervise(cmd, sigs)
		if o.AtEnd != nil {
			o.AtEnd()
		}
		endLike(o.Name, ws)
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
	// A first process that dies before the second has asked for its death signal leaves it alone: number 1 of a PID namespace has no parent to look for
	// but in /proc, which is the first one's.
	if pid := was[firstKey]; pid != "" && pid != parentInProc() {
		fmt.Fprintf(os.Stderr, "%s: the process %s that started this one is gone\n", filepath.Base(os.Args[0]), pid)
		os.Exit(1)
	}
	if n, err := strconv.ParseUint(was[noPIDsKey], 10, 12); err == nil {
		origin.pids = &fault{"the kernel refused a PID namespace", unix.Errno(n), userNSRemedy(unix.Errno(n))}
	}
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

// parentInProc is this process's parent as /proc has it.
func parentInProc() string {
	b, _ := os.ReadFile("/proc/self/status")
	_, rest, _ := strings.Cut(string(b), "\nPPid:")
	pid, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(pid)
}

func command(marker string, a attempt) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = os.Args
	cmd.Env = append(os.Environ(), markerEnv+"="+marker)
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
