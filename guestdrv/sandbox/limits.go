package sandbox

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Bound is one resource limit of the box; setrlimit(2).
type Bound struct {
	Name  string // RLIMIT_…
	Limit string // in words
	Why   string

	which int
	of    func(*limits) (max uint64, applies bool)
}

func always(max uint64) func(*limits) (uint64, bool) {
	return func(*limits) (uint64, bool) { return max, true }
}

// Bounds are all limits that Enter sets, sorted by name. Others bound nothing that is left to do: RLIMIT_AS would count the address space that the
// runtime reserves and never uses, RLIMIT_CPU would end a driver that polls, and priorities need calls that are not let through.
func Bounds() []Bound {
	return []Bound{
		{"RLIMIT_CORE", "0", "a core file would hold the disk's data", unix.RLIMIT_CORE, always(0)},
		{"RLIMIT_DATA", "1 GiB more than at Enter, or Policy.Memory", "private memory; the machine's is not the program's to use up. Not in binaries linked with cgo: the race detector's shadow is counted, too",
			unix.RLIMIT_DATA, func(l *limits) (uint64, bool) { return l.data, l.data != 0 }},
		{"RLIMIT_FSIZE", "Policy.FileSize", "an open file cannot be made to fill its file system", unix.RLIMIT_FSIZE, func(l *limits) (uint64, bool) { return l.fileSize, l.fileSize != 0 }},
		{"RLIMIT_MEMLOCK", "0", "nothing more is pinned: mlock is not let through, but other ways to pin memory look here, too", unix.RLIMIT_MEMLOCK, always(0)},
		{"RLIMIT_MSGQUEUE", "0", "no kernel memory for POSIX message queues; mq_open is not let through", unix.RLIMIT_MSGQUEUE, always(0)},
		{"RLIMIT_NOFILE", "no number free but for a server's connections", "no call that is let through makes an fd, but for accept4 and what the peer sends over a socket", unix.RLIMIT_NOFILE, func(l *limits) (uint64, bool) { return uint64(l.maxFD), true }},
		{"RLIMIT_NPROC", "4096, or Policy.Threads", "threads. Only in a user namespace of its own (Linux 5.14), since it would count the user's other processes otherwise, and never for the machine's root",
			unix.RLIMIT_NPROC, func(l *limits) (uint64, bool) { return l.threads, l.threads != 0 }},
		{"RLIMIT_SIGPENDING", "64", "kernel memory for signals that are sent and not taken", unix.RLIMIT_SIGPENDING, always(64)},
	}
}

const (
	// stdioFDs is the default of Policy.MaxFD. It is not the number of open fds, because each that is closed would leave a number for one that the
	// peer sends; not 0, because poll(2) takes no more fds than the limit. The Go runtime sees to it at start that 0, 1 and 2 are open.
	stdioFDs       = 3
	defaultMemory  = 1 << 30
	defaultThreads = 4096
)

// limits is what a policy comes to in this process.
type limits struct {
	maxFD, free  int
	fileSize     uint64
	memory, data uint64 // more, and all in all
	threads      uint64
}

// limits must be called while /proc is there, when all fds are open that will be.
func (p *Policy) limits(cgo bool) (*limits, error) {
	l := &limits{free: newFDs(p.Uses), fileSize: p.FileSize}
	var err error
	if l.maxFD, err = fdLimit(l.free, cmp.Or(p.MaxFD, stdioFDs)); err != nil {
		return nil, err
	}
	if status, err := os.ReadFile("/proc/self/status"); err == nil && !cgo {
		if now, ok := vmData(status); ok {
			l.memory = cmp.Or(p.Memory, defaultMemory)
			l.data = now + l.memory
		}
	}
	if origin.fresh["user"] != "" && unix.Getuid() != 0 && kernelAtLeast(5, 14) {
		l.threads = uint64(cmp.Or(p.Threads, defaultThreads))
	}
	return l, nil
}

// vmData finds what RLIMIT_DATA counts, in bytes; proc_pid_status(5).
func vmData(status []byte) (uint64, bool) {
	for line := range bytes.Lines(status) {
		if value, ok := bytes.CutPrefix(line, []byte("VmData:")); ok {
			kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(string(value)), " kB"), 10, 53)
			return kb << 10, err == nil
		}
	}
	return 0, false
}

func kernelAtLeast(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	return releaseAtLeast(unix.ByteSliceToString(u.Release[:]), major, minor)
}

func releaseAtLeast(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a > major || a == major && b >= minor
}

// set sets all limits, and makes the process one that is neither dumped, also not by a program that takes core dumps, nor traced by others of its user.
// The detail says what holds.
func (l *limits) set() (detail string, err error) {
	for _, b := range Bounds() {
		if max, applies := b.of(l); applies {
			if err := setLimit(b.which, max); err != nil {
				return "", fmt.Errorf("%s: %w", b.Name, err)
			}
		}
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return "", fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	if d, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || d != 0 {
		return "", fmt.Errorf("PR_GET_DUMPABLE is %d after it was set to 0 (%v)", d, err)
	}
	switch fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0); {
	case err == nil && fd >= l.maxFD:
		return "", fmt.Errorf("fd %d could be made in spite of RLIMIT_NOFILE %d", fd, l.maxFD)
	case err == nil:
		_ = unix.Close(fd)
		detail = fmt.Sprintf("new fds below %d only", l.maxFD)
		if l.free > 0 {
			detail = fmt.Sprintf("%d new fds", l.free)
		}
	case errors.Is(err, unix.EMFILE):
		detail = "no new fd"
	default:
		return "", fmt.Errorf("try to make an fd: %w", err)
	}
	detail += ", no core file"
	if l.fileSize != 0 {
		detail += fmt.Sprintf(", files up to %d bytes", l.fileSize)
	}
	if l.memory != 0 {
		detail += fmt.Sprintf(", %d MiB more memory", l.memory>>20)
	}
	if l.threads != 0 {
		detail += fmt.Sprintf(", %d threads", l.threads)
	}
	return detail, nil
}

// setLimit lowers a limit, never raises it, and reads it back.
func setLimit(which int, max uint64) error {
	want := unix.Rlimit{Cur: max, Max: max}
	var old, now unix.Rlimit
	if err := unix.Prlimit(0, which, nil, &old); err == nil && old.Max < want.Max {
		want = unix.Rlimit{Cur: old.Max, Max: old.Max}
	}
	if err := unix.Prlimit(0, which, &want, nil); err != nil {
		return err
	}
	if err := unix.Prlimit(0, which, nil, &now); err != nil || now != want {
		return fmt.Errorf("it is %d after it was set to %d (%v)", now.Cur, want.Cur, err)
	}
	return nil
}
