package sandbox

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The flow of Enter, each step only possible before the next:
//
//  1. compile the filter, so that a bad policy changes nothing
//  2. warm: what the runtime and the library would otherwise open later
//  3. empty the file system, if it is ours alone; look at the network
//  4. no_new_privs, capabilities, Landlock, limits
//  5. seccomp
//  6. read back what holds on every thread, and report

// Policy says how the box is shut. The zero value is the one for production.
type Policy struct {
	Action            Action // on a system call that is not let through
	Uses              []Use  // what the program does beside computing and using open files
	Extra             []Rule // more calls to let through; each with a reason
	MapFDs            []int  // fds that may be mapped later: MAP_SHARED, readable and writable, never executable
	MaxFD             int    // new fds may take numbers below this, and poll(2) as many fds; 0: 3, which stdio has taken
	FileSize          uint64 // bytes that a file may reach; 0: as it was. A write past it raises SIGXFSZ
	Memory            uint64 // bytes of private memory on top of what there is at Enter; 0: 1 GiB. The runtime ends the process without
	Threads           int    // threads; 0: 4096. The runtime ends the process without. Only for an ordinary user in a user namespace
	RequireNamespaces bool   // fail if the mount, network, IPC or PID namespace is not new, or the root cannot be emptied
	RequireLandlock   bool   // fail if Landlock is not in force
}

var entered atomic.Bool

// Enter shuts the box around the whole process, all threads, for good. Call it when every fd is open and before the first byte from the
// device is acted on; no other goroutine may open or close fds during it. With an error the box is half shut and the program must end: the
// error says what failed and what to do.
func Enter(p Policy) (*Report, error) {
	if !entered.CompareAndSwap(false, true) {
		return nil, errors.New("sandbox: Enter was called before")
	}
	cgo := linkedWithCgo()
	if err := checkUses(p.Uses); err != nil {
		return nil, err
	}
	f, err := p.compile(unix.Getpid(), cgo)
	if err != nil {
		return nil, err
	}
	if p.RequireNamespaces {
		if err := namespacesMissing(); err != nil {
			return nil, fmt.Errorf("sandbox: namespaces: %w", err)
		}
	}
	if err := warm(); err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}

	limits, err := p.limits(cgo)
	if err != nil {
		return nil, fmt.Errorf("sandbox: %s: %w", Limits, err)
	}
	probe, probeErr := openThreadProbe()
	if probeErr == nil {
		defer probe.close()
	}
	before, _ := probe.first()

	r := &Report{}
	files := fileSystem()
	network, ipc, pids := newNamespace("net"), newNamespace("ipc"), pidNamespace()
	if err := files.err; err != nil && p.RequireNamespaces {
		return nil, fmt.Errorf("sandbox: %s: %w", MountNS, err)
	}
	if network == nil {
		network = files.net
	}
	if network != nil && p.RequireNamespaces {
		return nil, fmt.Errorf("sandbox: %s: %w", NetworkNS, network)
	}

	if err := setNoNewPrivs(cgo); err != nil {
		return nil, fmt.Errorf("sandbox: no_new_privs: %w", err)
	}
	// Landlock comes after the last call that signals threads, and forbids looking at files.
	capErr := dropCapabilities(cgo)
	landlock, landlockErr := enterLandlock(cgo)
	if landlockErr != nil && p.RequireLandlock {
		return nil, fmt.Errorf("sandbox: %s: %w", Landlock, landlockErr)
	}
	bounds, err := limits.set()
	if err != nil {
		return nil, fmt.Errorf("sandbox: %s: %w", Limits, err)
	}
	if err := f.install(); err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}

	after, err := verifyThreads(probe, probeErr, before)
	if err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	r.holds(Seccomp, "%d system calls, %s, %s", f.calls, f.action, after.where)
	report(r, Landlock, landlockErr, landlock)
	report(r, MountNS, files.err, files.how)
	report(r, NetworkNS, network, "empty")
	report(r, IPCNS, ipc, "new")
	report(r, PIDNS, pids, "new, this process is alone in it")
	r.holds(NoNewPrivs, "set, %s", after.where)
	if capErr == nil {
		capErr = after.capErr
	}
	report(r, Capabilities, capErr, after.caps)
	r.holds(Limits, "%s", bounds)
	return r, nil
}

func report(r *Report, m Mechanism, err error, detail string) {
	if err != nil {
		r.misses(m, err)
		return
	}
	r.holds(m, "%s", detail)
}

// warm does now what would need an open later.
func warm() error {
	// The first pollable fd starts the runtime's poller: epoll_create1, eventfd2.
	pr, pw, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start the network poller: %w", err)
	}
	_, _ = pr.Close(), pw.Close()
	// The first use of local time reads /etc/localtime.
	_, _ = time.Now().Zone()
	_, _ = rand.Read(make([]byte, 1)) // never fails
	return nil
}

// newNamespace says why the namespace is not new; nil: it is.
func newNamespace(kind string) error {
	switch {
	case origin.fresh[kind] != "":
		return nil
	case origin.why != nil:
		return origin.why
	case !origin.called:
		return &fault{"Reexec was not called", nil, "call sandbox.Reexec at the start of main"}
	}
	return fmt.Errorf("the %s namespace is the parent's", kind)
}

func namespacesMissing() error {
	for _, k := range []string{"mnt", "net", "ipc"} {
		if err := newNamespace(k); err != nil {
			return err
		}
	}
	return pidNamespace()
}

// pidNamespace is newNamespace for processes: this one must be the first in it, and then there are no others but those it has started itself.
func pidNamespace() error {
	if err := newNamespace("pid"); err != nil {
		if origin.pids != nil {
			return origin.pids
		}
		return err
	}
	if pid := unix.Getpid(); pid != 1 {
		return &fault{fmt.Sprintf("this process is number %d of the PID namespace", pid), nil, "call Reexec in the first process of the program"}
	}
	return nil
}

type fileSystemState struct {
	how string
	err error // why the root is not empty
	net error // why the network is not known to be empty
}

// fileSystem empties the root if the mount namespace was made for this process: in any other it would empty the host's. The network is
// looked at here because /proc goes with the root.
func fileSystem() (s fileSystemState) {
	s.net = checkNetEmpty()
	if s.err = newNamespace("mnt"); s.err != nil {
		return s
	}
	held, err := openDirectories()
	if err != nil {
		s.err = err
		return s
	}
	if s.how, s.err = emptyRoot(unix.PivotRoot); s.err != nil {
		if errors.Is(s.err, unix.EPERM) || errors.Is(s.err, unix.EACCES) {
			s.err = &fault{"the root was not emptied", s.err, userNSRemedy(s.err)}
		}
		return s
	}
	if s.err = checkRootEmpty(); s.err == nil && len(held) > 0 {
		s.err = &fault{fmt.Sprintf("fd %d is a directory of the old root", held[0]), nil, "close it before Enter"}
	}
	return s
}

// openDirectories lists open fds that are directories: through them the old root could be reached.
func openDirectories() ([]int, error) {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, &fault{"open fds cannot be listed", err, "mount /proc"}
	}
	var dirs []int
	for _, e := range fds {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			return nil, fmt.Errorf("open fds: %w", err)
		}
		var st unix.Stat_t
		// The one that ReadDir itself used is closed by now.
		if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			dirs = append(dirs, fd)
		}
	}
	return dirs, nil
}

// verified is what all threads have in common.
type verified struct {
	where  string // "on all 7 threads"
	caps   string
	capErr error
}

// first reads the state before the box is shut, to know how many filters were there already.
func (p *threadProbe) first() (threadStatus, error) {
	if p == nil {
		return threadStatus{filters: -1}, errors.New("no probe")
	}
	all, err := p.read()
	if err != nil {
		return threadStatus{filters: -1}, err
	}
	return all[0], nil
}

// verifyThreads reads back what the kernel says. Without /proc it can ask for the calling thread only, and says so.
func verifyThreads(probe *threadProbe, probeErr error, before threadStatus) (verified, error) {
	if probeErr != nil {
		nnp, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
		if err != nil || nnp != 1 {
			return verified{}, fmt.Errorf("no_new_privs is %d after it was set (%v)", nnp, err)
		}
		mode, err := unix.PrctlRetInt(unix.PR_GET_SECCOMP, 0, 0, 0, 0)
		if err != nil || mode != unix.SECCOMP_MODE_FILTER {
			return verified{}, fmt.Errorf("seccomp mode is %d after the filter was installed (%v)", mode, err)
		}
		return verified{where: "verified on one thread", capErr: fmt.Errorf("not verified: %w", probeErr)}, nil
	}
	all, err := probe.read()
	if err != nil {
		return verified{}, err
	}
	v := verified{where: fmt.Sprintf("on all %d threads", len(all)), caps: "none"}
	for _, st := range all {
		switch {
		case st.noNewPrivs != 1:
			return v, fmt.Errorf("no_new_privs is %d on a thread after it was set", st.noNewPrivs)
		case st.seccomp != unix.SECCOMP_MODE_FILTER:
			return v, fmt.Errorf("seccomp mode is %d on a thread after the filter was installed", st.seccomp)
		case before.filters >= 0 && st.filters != before.filters+1:
			return v, fmt.Errorf("a thread has %d seccomp filters, not %d", st.filters, before.filters+1)
		}
	}
	if i := slices.IndexFunc(all, func(st threadStatus) bool { return st.caps != 0 }); i >= 0 {
		v.capErr = fmt.Errorf("a thread still has %#x", all[i].caps)
	} else if all[0].bounding != 0 {
		v.caps = "none (the bounding set is not empty, no_new_privs keeps it out of reach)"
	}
	return v, nil
}
