package sandbox

import (
	"cmp"
	"slices"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/seccomp"
)

// Rule lets one system call through, or answers it with an error that does not end the process.
type Rule struct {
	Name  string              // as in syscalls(2)
	Nr    uintptr             // its number on this architecture
	Args  seccomp.SyscallRule // what the arguments must be; nil: anything
	Limit string              // Args in words
	Errno unix.Errno          // not 0: refuse it with this instead, for callers that have another way
	Why   string              // who needs it, and why the arguments are as they are
}

// Arguments are compared as 64 bits even where the kernel looks at 32: a caller that sets the upper half is not one of ours.
type (
	args     = seccomp.PerArg
	anything = seccomp.AnyValue
	is       = seccomp.EqualTo
)

func oneOf(at int, values ...uintptr) seccomp.SyscallRule {
	var or seccomp.Or
	for _, v := range values {
		var a args
		a[at] = is(v)
		or = append(or, a)
	}
	return or
}

// threadFlags are what clone must have; the optional ones are set by some architectures and by libc. Everything else must be clear,
// also the exit signal in the low byte.
const (
	threadFlags         = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD
	optionalThreadFlags = unix.CLONE_SETTLS | unix.CLONE_PARENT_SETTID | unix.CLONE_CHILD_CLEARTID | unix.CLONE_DETACHED
)

const anonFlags = unix.MAP_PRIVATE | unix.MAP_FIXED | unix.MAP_NORESERVE | unix.MAP_STACK | unix.MAP_DROPPABLE

// futex(2) operations; x/sys does not have them.
const (
	futexWait    = 0
	futexWake    = 1
	futexPrivate = 0x80
)

// baseRules is what the Go runtime and driving queues need, sorted by name. pid is the process's own. A system call that makes an fd, looks
// up a path or reaches another process does not belong here.
func baseRules(pid int) []Rule {
	self := is(uintptr(pid))
	return []Rule{
		{Name: "clock_gettime", Nr: unix.SYS_CLOCK_GETTIME, Why: "runtime: time where the vDSO has no usable clock"},
		{Name: "clone", Nr: unix.SYS_CLONE, Args: args{seccomp.MaskedEqual(^uintptr(optionalThreadFlags), threadFlags)},
			Limit: "the flags of a thread, and no others", Why: "runtime: threads of this process; a process or a namespace never"},
		// The kernel looks at 32 bits only.
		{Name: "close", Nr: unix.SYS_CLOSE, Args: seccomp.And{args{seccomp.GreaterThanOrEqual(stdioFDs)}, args{seccomp.LessThanOrEqual(1<<31 - 1)}},
			Limit: "not stdin, stdout, stderr", Why: "files, sockets; a number below RLIMIT_NOFILE that is closed has room for an fd that the peer sends"},
		{Name: "epoll_ctl", Nr: unix.SYS_EPOLL_CTL, Why: "runtime: network poller"},
		{Name: "epoll_pwait", Nr: unix.SYS_EPOLL_PWAIT, Why: "runtime: network poller"},
		{Name: "exit", Nr: unix.SYS_EXIT, Why: "runtime: end of a locked thread"},
		{Name: "exit_group", Nr: unix.SYS_EXIT_GROUP, Why: "os.Exit"},
		{Name: "fcntl", Nr: unix.SYS_FCNTL, Args: oneOf(1, unix.F_GETFL, unix.F_SETFL),
			Limit: "F_GETFL, F_SETFL", Why: "os.NewFile, nonblocking mode; F_DUPFD would make an fd, F_SETOWN send signals"},
		{Name: "futex", Nr: unix.SYS_FUTEX, Args: oneOf(1, futexWait, futexWake, futexWait|futexPrivate, futexWake|futexPrivate),
			Limit: "WAIT and WAKE, private or not", Why: "runtime: private; shared pages: not private; requeue and priority inheritance have a history of holes"},
		{Name: "getpid", Nr: unix.SYS_GETPID, Why: "runtime: first argument of tgkill"},
		{Name: "getrandom", Nr: unix.SYS_GETRANDOM, Why: "runtime, crypto/rand: where the vDSO cannot"},
		{Name: "getrusage", Nr: unix.SYS_GETRUSAGE, Why: "CPU seconds in reports"},
		{Name: "gettid", Nr: unix.SYS_GETTID, Why: "runtime: start of a thread"},
		{Name: "ioctl", Nr: unix.SYS_IOCTL, Args: oneOf(1, unix.TCGETS, unix.TIOCGWINSZ),
			Limit: "TCGETS, TIOCGWINSZ", Why: "progress bar: is it a terminal, how wide; TIOCSTI would type into the user's shell"},
		{Name: "kill", Nr: unix.SYS_KILL, Args: args{self}, Limit: "this process", Why: "runtime: a crash raises a signal; own process only"},
		{Name: "madvise", Nr: unix.SYS_MADVISE,
			Args:  oneOf(2, unix.MADV_DONTNEED, unix.MADV_FREE, unix.MADV_HUGEPAGE, unix.MADV_NOHUGEPAGE, unix.MADV_COLLAPSE),
			Limit: "DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE, COLLAPSE", Why: "runtime: heap; MADV_REMOVE would cut holes into DMA memory"},
		{Name: "mmap", Nr: unix.SYS_MMAP,
			Args:  args{anything{}, anything{}, seccomp.BitsAllowlist(unix.PROT_READ | unix.PROT_WRITE), seccomp.MaskedEqual(^uintptr(anonFlags), unix.MAP_ANONYMOUS)},
			Limit: "anonymous and private; PROT_READ, PROT_WRITE", Why: "runtime: heap and stacks; anonymous, private, never executable"},
		{Name: "munmap", Nr: unix.SYS_MUNMAP, Why: "runtime: heap; DMA memory"},
		{Name: "nanosleep", Nr: unix.SYS_NANOSLEEP, Why: "runtime: usleep of the monitor thread"},
		{Name: "ppoll", Nr: unix.SYS_PPOLL, Why: "waiting for an event fd or a socket with a deadline"},
		{Name: "prctl", Nr: unix.SYS_PRCTL,
			Args:  seccomp.Or{args{is(unix.PR_SET_VMA), is(unix.PR_SET_VMA_ANON_NAME)}, args{is(unix.PR_GET_NO_NEW_PRIVS)}, args{is(unix.PR_GET_SECCOMP)}},
			Limit: "PR_SET_VMA for names, PR_GET_NO_NEW_PRIVS, PR_GET_SECCOMP", Why: "runtime: names its memory; Enter: looks whether the box is shut"},
		{Name: "pread64", Nr: unix.SYS_PREAD64, Why: "runtime: the cgroup's CPU limit; statistics by an fd opened before"},
		{Name: "preadv2", Nr: unix.SYS_PREADV2, Args: args{anything{}, anything{}, anything{}, anything{}, anything{}, is(unix.RWF_NOWAIT)}, Limit: "RWF_NOWAIT", Why: "interrupts: reads an event fd without waiting, whatever flags the device has set on it"},
		{Name: "read", Nr: unix.SYS_READ, Why: "sockets, event fds, files, stdin"},
		{Name: "restart_syscall", Nr: unix.SYS_RESTART_SYSCALL, Why: "kernel: goes on with a sleep after SIGCONT"},
		{Name: "rt_sigaction", Nr: unix.SYS_RT_SIGACTION, Why: "signal.Notify; runtime: dying of a signal"},
		{Name: "rt_sigprocmask", Nr: unix.SYS_RT_SIGPROCMASK, Why: "runtime: start of a thread"},
		{Name: "rt_sigreturn", Nr: unix.SYS_RT_SIGRETURN, Why: "runtime: end of every signal handler"},
		{Name: "sched_getaffinity", Nr: unix.SYS_SCHED_GETAFFINITY, Why: "runtime: follows the number of CPUs; pinning"},
		{Name: "sched_setaffinity", Nr: unix.SYS_SCHED_SETAFFINITY, Args: args{is(0)}, Limit: "the calling thread", Why: "pinning; the calling thread only"},
		{Name: "sched_yield", Nr: unix.SYS_SCHED_YIELD, Why: "runtime: spinning"},
		{Name: "sigaltstack", Nr: unix.SYS_SIGALTSTACK, Why: "runtime: start and end of a thread"},
		{Name: "tgkill", Nr: unix.SYS_TGKILL, Args: args{self}, Limit: "this process", Why: "runtime: preemption; own threads only"},
		{Name: "write", Nr: unix.SYS_WRITE, Why: "sockets, event fds, files, stdout, stderr"},
		{Name: "writev", Nr: unix.SYS_WRITEV, Why: "sockets, files"},
	}
}

// libcRules is what a binary that is linked with cgo or the race detector needs on top, sorted by name. Seen with glibc 2.41 and Go 1.26.
func libcRules() []Rule {
	return []Rule{
		{Name: "clone3", Nr: unix.SYS_CLONE3, Errno: unix.ENOSYS, Why: "libc: threads; its flags are in memory, which a filter cannot see, and without it libc uses clone"},
		{Name: "mprotect", Nr: unix.SYS_MPROTECT, Args: args{anything{}, anything{}, seccomp.BitsAllowlist(unix.PROT_READ | unix.PROT_WRITE)},
			Limit: "PROT_READ, PROT_WRITE", Why: "libc: thread stacks are opened step by step; never executable"},
		{Name: "openat", Nr: unix.SYS_OPENAT, Errno: unix.EPERM, Why: "libc: a new thread's memory pool reads the number of processors, and does without"},
		{Name: "rseq", Nr: unix.SYS_RSEQ, Why: "libc: start of a thread"},
		{Name: "set_robust_list", Nr: unix.SYS_SET_ROBUST_LIST, Why: "libc: start of a thread"},
	}
}

// mapRules lets the fds in p.MapFDs be mapped, and no other.
func mapRules(fds []int) []Rule {
	if len(fds) == 0 {
		return nil
	}
	return []Rule{{Name: "mmap", Nr: unix.SYS_MMAP,
		Args:  on(4, fds, args{2: seccomp.BitsAllowlist(unix.PROT_READ | unix.PROT_WRITE), 3: is(unix.MAP_SHARED)}),
		Limit: "Policy.MapFDs; shared; PROT_READ, PROT_WRITE",
		Why:   "DMA memory of an fd that was open before"}}
}

// Table is a set of rules that are in force together.
type Table struct {
	Name  string
	What  string // when they are in force
	Rules []Rule
}

// Tables are all rules there are, with AnyFD where a rule is for certain fds, for documents and tests. kill and tgkill are shown for process 1,
// which a program is in its PID namespace.
func Tables() []Table {
	list := []Table{
		{"always", "in force in every box", baseRules(1)},
		{"libc", "on top of that in a binary that is linked with cgo or the race detector", libcRules()},
		{"mapping", "Policy.MapFDs: files that may be mapped later", mapRules([]int{AnyFD})},
	}
	for _, u := range Uses() {
		list = append(list, Table{u.Name, u.What, u.Rules})
	}
	return list
}

func sortedRules(lists ...[]Rule) []Rule {
	all := slices.Concat(lists...)
	slices.SortStableFunc(all, func(a, b Rule) int { return cmp.Compare(a.Name, b.Name) })
	return all
}
