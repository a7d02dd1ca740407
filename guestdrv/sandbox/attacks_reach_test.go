package sandbox

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// attack is something that a program would try that was taken over.
type attack struct {
	name string
	why  string // what would be won
	do   func() error
}

// call makes a system call by number. Pointers are left 0: the filter decides before the kernel looks at them.
func call(nr uintptr, a ...uintptr) func() error {
	return func() error {
		var v [6]uintptr
		copy(v[:], a)
		r, _, no := syscall.RawSyscall6(nr, v[0], v[1], v[2], v[3], v[4], v[5])
		if no != 0 {
			return no
		}
		if r == 0 && (nr == unix.SYS_CLONE || nr == unix.SYS_CLONE3) {
			os.Exit(98) // the new process
		}
		return nil
	}
}

func fdErr(_ int, err error) error { return err }

func mapErr(_ []byte, err error) error { return err }

const neg1 = ^uintptr(0)

// attacks is what a program that was taken over would try, group by group.
func attacks() []attack {
	var all []attack
	for _, group := range [][]attack{
		fileAttacks(), descriptorAttacks(), newFDAttacks(), socketAttacks(), processAttacks(), threadAttacks(), memoryAttacks(), privilegeAttacks(), kernelAttacks(), machineAttacks(), archAttacks(),
	} {
		all = append(all, group...)
	}
	return all
}

func fileAttacks() []attack {
	held := uintptr(heldFile)
	return []attack{
		{"open", "read a file", func() error { return fdErr(unix.Open("/etc/passwd", unix.O_RDONLY, 0)) }},
		{"open create", "leave a file", func() error { return fdErr(unix.Open("/x", unix.O_CREAT|unix.O_WRONLY, 0o600)) }},
		{"openat2", "the same, from a descriptor", call(unix.SYS_OPENAT2, uintptr(heldPair[0]))},
		{"open_by_handle_at", "a file by its handle, past all directories", call(unix.SYS_OPEN_BY_HANDLE_AT, held)},
		{"name_to_handle_at", "the handle", call(unix.SYS_NAME_TO_HANDLE_AT, held)},
		{"stat", "is there a file", func() error { return unix.Stat("/", &unix.Stat_t{}) }},
		{"statx", "is there a file", call(unix.SYS_STATX, held)},
		{"faccessat", "may it be read", call(unix.SYS_FACCESSAT, held)},
		{"readlink", "where /proc points to", func() error { return fdErr(unix.Readlink("/proc/self/exe", make([]byte, 10))) }},
		{"getcwd", "where the program is", call(unix.SYS_GETCWD)},
		{"getdents64", "list a directory", call(unix.SYS_GETDENTS64, held)},
		{"mkdirat", "leave a directory", func() error { return unix.Mkdir("/x", 0o700) }},
		{"mknodat", "a device node: the disk itself", func() error { return unix.Mknodat(unix.AT_FDCWD, "/x", unix.S_IFBLK|0o600, 0x800) }},
		{"symlinkat", "lead another program astray", func() error { return unix.Symlinkat("/etc/passwd", unix.AT_FDCWD, "/x") }},
		{"linkat", "keep a file", func() error { return unix.Linkat(unix.AT_FDCWD, "/x", unix.AT_FDCWD, "/y", 0) }},
		{"renameat2", "replace a file", func() error { return unix.Renameat2(unix.AT_FDCWD, "/x", unix.AT_FDCWD, "/y", 0) }},
		{"unlinkat", "remove a file", func() error { return unix.Unlinkat(unix.AT_FDCWD, "/x", 0) }},
		{"truncate", "empty a file", call(unix.SYS_TRUNCATE)},
		{"fchmodat", "make a file executable", call(unix.SYS_FCHMODAT, held)},
		{"fchownat", "give a file away", call(unix.SYS_FCHOWNAT, held)},
		{"setxattr", "capabilities on a file", call(unix.SYS_SETXATTR)},
		{"utimensat", "hide a change", call(unix.SYS_UTIMENSAT, held)},
		{"statfs", "what file systems there are", call(unix.SYS_STATFS)},
		{"chdir", "find the old root", func() error { return unix.Chdir("/") }},
		{"fchdir", "the same, by a directory that was left open", call(unix.SYS_FCHDIR, held)},
		{"chroot", "out of a chroot", func() error { return unix.Chroot("/") }},
		{"mount", "get /proc, or the disk", func() error { return unix.Mount("none", "/", "tmpfs", 0, "") }},
		{"umount2", "uncover what is below", func() error { return unix.Unmount("/", unix.MNT_DETACH) }},
		{"move_mount", "the same, the new way", call(unix.SYS_MOVE_MOUNT, held)},
		{"mount_setattr", "make a mount writable", call(unix.SYS_MOUNT_SETATTR, held)},
		{"pivot_root", "back to the old root", func() error { return unix.PivotRoot("/", "/") }},
		{"swapon", "read a disk as swap", call(unix.SYS_SWAPON)},
		{"quotactl", "the file system of a device", call(unix.SYS_QUOTACTL)},
		{"acct", "write to a file as the kernel", call(unix.SYS_ACCT)},
		{"sync", "stall the machine's disks", call(unix.SYS_SYNC)},
	}
}

// On descriptors that the program has.
func descriptorAttacks() []attack {
	held, socket := uintptr(heldFile), uintptr(heldPair[0])
	return []attack{
		{"ftruncate", "shrink DMA memory under the peer", call(unix.SYS_FTRUNCATE, held)},
		{"fallocate", "fill memory, or cut holes", call(unix.SYS_FALLOCATE, held, 0, 0, 1<<40)},
		{"fchmod", "a set-user-id file", call(unix.SYS_FCHMOD, held, 0o4755)},
		{"fchown", "give the file away", call(unix.SYS_FCHOWN, held, 0, 0)},
		{"fsetxattr", "capabilities on the file", call(unix.SYS_FSETXATTR, held)},
		{"flock", "hold a lock that others want", call(unix.SYS_FLOCK, held, unix.LOCK_EX)},
		{"fcntl lock", "the same", call(unix.SYS_FCNTL, held, unix.F_SETLK)},
		{"fcntl lease", "be signalled when others open it", call(unix.SYS_FCNTL, held, unix.F_SETLEASE, unix.F_WRLCK)},
		{"fcntl seals", "what the peer relies on", call(unix.SYS_FCNTL, held, unix.F_ADD_SEALS, unix.F_SEAL_WRITE)},
		{"fcntl owner", "signals to another process", call(unix.SYS_FCNTL, 0, unix.F_SETOWN, uintptr(hostPID))},
		{"fcntl pipe size", "kernel memory", call(unix.SYS_FCNTL, 0, unix.F_SETPIPE_SZ, 1<<30)},
		{"pwrite64", "a file that is not for it", call(unix.SYS_PWRITE64, held, 0, 0)},
		{"copy_file_range", "from file to file", call(unix.SYS_COPY_FILE_RANGE, held)},
		{"sendfile", "a file into a socket", call(unix.SYS_SENDFILE, socket, held)},
		{"splice", "page cache into pipes: holes in the past", call(unix.SYS_SPLICE, held)},
		{"tee", "the same", call(unix.SYS_TEE, held)},
		{"vmsplice", "the same", call(unix.SYS_VMSPLICE, held)},
		{"ioctl TIOCSTI", "type into the user's shell", call(unix.SYS_IOCTL, 0, unix.TIOCSTI)},
		{"ioctl TIOCLINUX", "paste into the console", call(unix.SYS_IOCTL, 0, 0x541c)},
		{"ioctl TCSETS", "the terminal's settings", call(unix.SYS_IOCTL, 0, unix.TCSETS)},
		{"ioctl FIONBIO", "a flag of the user's terminal", call(unix.SYS_IOCTL, 0, 0x5421)},
		{"ioctl FIOASYNC", "signals", call(unix.SYS_IOCTL, 0, 0x5452)},
		{"ioctl FICLONE", "a file's content into another", call(unix.SYS_IOCTL, held, unix.FICLONE)},
		{"ioctl NVMe admin", "commands past the driver", call(unix.SYS_IOCTL, held, 0xc0484e41)},
		{"ioctl VFIO map", "all memory to the device", call(unix.SYS_IOCTL, held, 0x3b71)},
		{"ioctl VFIO reset", "on what is no VFIO device", call(unix.SYS_IOCTL, held, vfioDeviceReset)},
		{"sendmsg", "an fd to whom it is not for", call(unix.SYS_SENDMSG, socket)},
		{"sendmmsg", "the same, many", call(unix.SYS_SENDMMSG, socket)},
		{"recvmsg", "an fd from whom there should be none", call(unix.SYS_RECVMSG, uintptr(heldPair[1]))},
		{"recvmmsg", "the same, many", call(unix.SYS_RECVMMSG, socket)},
		{"sendto", "to an address of choice", call(unix.SYS_SENDTO, socket)},
		{"shutdown", "end another's connection", call(unix.SYS_SHUTDOWN, socket)},
		{"setsockopt", "filters and credentials", call(unix.SYS_SETSOCKOPT, socket)},
		{"getsockopt", "who the peer is, and a pidfd of it", call(unix.SYS_GETSOCKOPT, socket)},
		{"epoll_pwait2", "not needed", call(unix.SYS_EPOLL_PWAIT2, held)},
	}
}

// A new descriptor is a new way into the kernel, or a place for one that the peer sends.
func newFDAttacks() []attack {
	held := uintptr(heldFile)
	return []attack{
		{"memfd_create", "a file to execute", func() error { return fdErr(unix.MemfdCreate("x", 0)) }},
		{"memfd_secret", "memory that nobody sees", call(unix.SYS_MEMFD_SECRET)},
		{"pipe2", "a buffer in the kernel", func() error { return unix.Pipe2(make([]int, 2), 0) }},
		{"eventfd2", "a new fd", call(unix.SYS_EVENTFD2)},
		{"epoll_create1", "a new fd", call(unix.SYS_EPOLL_CREATE1)},
		{"timerfd_create", "a new fd", call(unix.SYS_TIMERFD_CREATE)},
		{"signalfd4", "a new fd", call(unix.SYS_SIGNALFD4, neg1)},
		{"inotify_init1", "watch the users' files", call(unix.SYS_INOTIFY_INIT1)},
		{"fanotify_init", "watch and hold all files", call(unix.SYS_FANOTIFY_INIT)},
		{"userfaultfd", "stop the kernel where it copies: the tool of many exploits", call(unix.SYS_USERFAULTFD)},
		{"perf_event_open", "watch the machine; holes in the past", call(unix.SYS_PERF_EVENT_OPEN)},
		{"bpf", "code in the kernel", call(unix.SYS_BPF)},
		{"io_uring_setup", "calls that seccomp does not see", call(unix.SYS_IO_URING_SETUP, 8)},
		{"io_uring_register", "more of a ring than was given", call(unix.SYS_IO_URING_REGISTER, held)},
		{"io_uring_enter", "a ring that is not for it", call(unix.SYS_IO_URING_ENTER, held)},
		{"pidfd_open", "a hold on a process", call(unix.SYS_PIDFD_OPEN, uintptr(hostPID))},
		{"pidfd_getfd", "another process's descriptors", call(unix.SYS_PIDFD_GETFD, held)},
		{"dup", "a number more", call(unix.SYS_DUP, 0)},
		{"dup3", "a number of choice: past the limit", call(unix.SYS_DUP3, 0, 9)},
		{"fcntl dup", "a number more", call(unix.SYS_FCNTL, 0, unix.F_DUPFD)},
		{"fsopen", "a file system", call(unix.SYS_FSOPEN)},
		{"fsmount", "a file system", call(unix.SYS_FSMOUNT, held)},
		{"open_tree", "a copy of the mounts", call(unix.SYS_OPEN_TREE)},
		{"landlock_create_ruleset", "a new fd", call(unix.SYS_LANDLOCK_CREATE_RULESET)},
		{"mq_open", "kernel memory; other processes", call(unix.SYS_MQ_OPEN)},
		{"close stdin", "room below the limit for an fd that the peer sends", call(unix.SYS_CLOSE, 0)},
		{"close stdout, upper half", "the same, hidden from a comparison of 32 bits", call(unix.SYS_CLOSE, 1|1<<32)},
		{"close_range", "the CLOEXEC of descriptors", call(unix.SYS_CLOSE_RANGE, 1000, 1000, 4)},
	}
}

func socketAttacks() []attack {
	socket := uintptr(heldPair[0])
	all := []attack{
		{"socketpair", "a new fd", call(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_STREAM)},
		{"connect", "another server, an abstract socket", call(unix.SYS_CONNECT, socket)},
		{"bind", "be a server", call(unix.SYS_BIND, socket)},
		{"listen", "be a server", call(unix.SYS_LISTEN, uintptr(heldListener), 1)},
		{"accept4", "a client of a socket that is not for it", call(unix.SYS_ACCEPT4, uintptr(heldListener), 0, 0, acceptFlags)},
		{"accept", "the same, the old way", call(unix.SYS_ACCEPT, uintptr(heldListener))},
		{"getpeername", "who is there", call(unix.SYS_GETPEERNAME, socket)},
	}
	for name, family := range map[string]uintptr{
		"unix": unix.AF_UNIX, "IPv4": unix.AF_INET, "IPv6": unix.AF_INET6, "netlink": unix.AF_NETLINK, "packet": unix.AF_PACKET, "vsock": unix.AF_VSOCK, "crypto": unix.AF_ALG,
		"XDP": unix.AF_XDP, "PF_KEY": unix.AF_KEY, "CAN": unix.AF_CAN, "TIPC": unix.AF_TIPC, "Bluetooth": unix.AF_BLUETOOTH, "RDS": unix.AF_RDS, "SMC": unix.AF_SMC, "QRTR": unix.AF_QIPCRTR,
	} {
		all = append(all, attack{"socket " + name, "the host, the network, or the family's code", call(unix.SYS_SOCKET, family, unix.SOCK_STREAM)})
	}
	return all
}

func processAttacks() []attack {
	host, held := uintptr(hostPID), uintptr(heldFile)
	return []attack{
		{"ptrace attach", "the first process, which is not locked up", func() error { return unix.PtraceAttach(hostPID) }},
		{"ptrace traceme", "calls past the filter, on kernels of old", call(unix.SYS_PTRACE, unix.PTRACE_TRACEME)},
		{"process_vm_readv", "another process's memory", call(unix.SYS_PROCESS_VM_READV, host)},
		{"process_vm_writev", "another process's memory", call(unix.SYS_PROCESS_VM_WRITEV, host)},
		{"process_madvise", "another process's memory", call(unix.SYS_PROCESS_MADVISE, held)},
		{"process_mrelease", "another process's memory", call(unix.SYS_PROCESS_MRELEASE, held)},
		{"kcmp", "the addresses of kernel objects, in order", call(unix.SYS_KCMP, host)},
		{"kill parent", "end it", call(unix.SYS_KILL, host, 0)},
		{"kill all", "end everything", call(unix.SYS_KILL, neg1, 0)},
		{"kill group", "the user's other programs", call(unix.SYS_KILL, 0, 0)},
		{"tgkill parent", "end it", call(unix.SYS_TGKILL, host, host, 0)},
		{"tkill", "any thread", call(unix.SYS_TKILL, host, 0)},
		{"rt_sigqueueinfo", "a signal with a forged sender", call(unix.SYS_RT_SIGQUEUEINFO, host)},
		{"rt_tgsigqueueinfo", "the same", call(unix.SYS_RT_TGSIGQUEUEINFO, host, host)},
		{"pidfd_send_signal", "a signal by descriptor", call(unix.SYS_PIDFD_SEND_SIGNAL, held)},
		{"execve", "another program", func() error { return unix.Exec("/proc/self/exe", nil, nil) }},
		{"execveat", "a file from memory", call(unix.SYS_EXECVEAT, held, 0, 0, 0, unix.AT_EMPTY_PATH)},
		{"wait4", "no child is its", call(unix.SYS_WAIT4, neg1)},
		{"waitid", "no child is its", call(unix.SYS_WAITID, 0)},
		{"setpgid", "out of the terminal's reach", call(unix.SYS_SETPGID)},
		{"setsid", "a session of its own", call(unix.SYS_SETSID)},
		{"prlimit64", "the limits, or another's", call(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE)},
		{"setpriority", "before others", call(unix.SYS_SETPRIORITY, 0, 0, neg1)},
		{"ioprio_set", "before others", call(unix.SYS_IOPRIO_SET)},
		{"sched_setscheduler", "all of a CPU", call(unix.SYS_SCHED_SETSCHEDULER, 0, unix.SCHED_FIFO)},
		{"sched_setattr", "all of a CPU", call(unix.SYS_SCHED_SETATTR)},
		{"affinity of other", "another's CPU", call(unix.SYS_SCHED_SETAFFINITY, host)},
		{"migrate_pages", "another's memory", call(unix.SYS_MIGRATE_PAGES, host)},
		{"move_pages", "where memory is", call(unix.SYS_MOVE_PAGES, host)},
	}
}

// clone, and what can be told the kernel of a thread.
func threadAttacks() []attack {
	return []attack{
		{"clone process", "a process that outlives this one", call(unix.SYS_CLONE, uintptr(unix.SIGCHLD))},
		{"clone vfork", "the same", call(unix.SYS_CLONE, uintptr(unix.CLONE_VFORK|unix.SIGCHLD))},
		{"clone new user ns", "all capabilities in it, and the kernel code behind them", call(unix.SYS_CLONE, uintptr(unix.CLONE_NEWUSER|unix.SIGCHLD))},
		{"clone new pid ns", "a namespace", call(unix.SYS_CLONE, uintptr(unix.CLONE_NEWPID|unix.SIGCHLD))},
		{"clone untraced", "out of a debugger's sight", call(unix.SYS_CLONE, uintptr(threadFlags|unix.CLONE_UNTRACED))},
		{"clone thread with fds of its own", "a second table of descriptors", call(unix.SYS_CLONE, uintptr(threadFlags&^unix.CLONE_FILES))},
		{"unshare", "capabilities in a user namespace", call(unix.SYS_UNSHARE, unix.CLONE_NEWUSER)},
		{"unshare files", "a second table of descriptors", call(unix.SYS_UNSHARE, unix.CLONE_FILES)},
		{"setns", "back to the host's namespaces", call(unix.SYS_SETNS, uintptr(heldFile))},
		{"personality", "no address randomization", call(unix.SYS_PERSONALITY, 0x0040000)},
		{"setitimer", "signals at times of choice", call(unix.SYS_SETITIMER)},
		{"timer_create", "kernel memory", call(unix.SYS_TIMER_CREATE)},
		{"rt_sigtimedwait", "not needed", call(unix.SYS_RT_SIGTIMEDWAIT)},
		{"futex requeue", "holes in the past", call(unix.SYS_FUTEX, 0, 3)},
		{"futex lock pi", "holes in the past", call(unix.SYS_FUTEX, 0, 6)},
		{"futex requeue pi", "holes in the past", call(unix.SYS_FUTEX, 0, 12|futexPrivate)},
		{"futex_waitv", "not needed", call(449)},
		{"membarrier", "interrupts to all CPUs", call(unix.SYS_MEMBARRIER, 1)},
		{"get_robust_list", "another's memory", call(unix.SYS_GET_ROBUST_LIST, uintptr(hostPID))},
		{"no such call", "what a later kernel makes of the number", call(100000)},
	}
}
