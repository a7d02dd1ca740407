package sandbox

import "golang.org/x/sys/unix"

func memoryAttacks() []attack {
	rw, rx := unix.PROT_READ|unix.PROT_WRITE, unix.PROT_READ|unix.PROT_EXEC
	file, shared := uintptr(heldFile), uintptr(unix.MAP_SHARED)
	return []attack{
		{"mmap exec", "code of one's own", func() error { return mapErr(unix.Mmap(-1, 0, 4096, rx, unix.MAP_ANON|unix.MAP_PRIVATE)) }},
		{"mmap file", "a file that is not for it", func() error { return mapErr(unix.Mmap(heldFile, 0, 4096, rw, unix.MAP_SHARED)) }},
		{"mmap file, upper half", "the same, hidden from a comparison of 32 bits", call(unix.SYS_MMAP, 0, 4096, unix.PROT_READ, shared, file|1<<32)},
		{"mmap allowed exec", "code from the peer's memory", func() error { return mapErr(unix.Mmap(heldMap, 0, 4096, rx, unix.MAP_SHARED)) }},
		{"mmap allowed private", "not what the rule is for", func() error { return mapErr(unix.Mmap(heldMap, 0, 4096, rw, unix.MAP_PRIVATE)) }},
		{"mmap allowed fixed", "over other memory", call(unix.SYS_MMAP, 0, 4096, uintptr(rw), shared|unix.MAP_FIXED, uintptr(heldMap))},
		{"mmap shared anonymous", "memory that RLIMIT_DATA does not count", call(unix.SYS_MMAP, 0, 4096, uintptr(rw), shared|unix.MAP_ANON, neg1)},
		{"mmap locked", "pinned memory", call(unix.SYS_MMAP, 0, 4096, uintptr(rw), uintptr(unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_LOCKED), neg1)},
		{"mmap grows down", "a stack's rules", call(unix.SYS_MMAP, 0, 4096, uintptr(rw), uintptr(unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_GROWSDOWN), neg1)},
		{"mmap huge", "the machine's huge pages", call(unix.SYS_MMAP, 0, 2<<20, uintptr(rw), uintptr(unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_HUGETLB), neg1)},
		{"mprotect exec", "code from data", func() error { return unix.Mprotect(heldAnon, rx) }},
		{"mprotect write", "constants from before", func() error { return unix.Mprotect(heldAnon, rw) }},
		{"pkey_mprotect", "code from data", call(unix.SYS_PKEY_MPROTECT, 0, 4096, uintptr(rx))},
		{"pkey_alloc", "protection keys", call(unix.SYS_PKEY_ALLOC)},
		{"mremap", "code where other code is", call(unix.SYS_MREMAP, 0, 0, 4096)},
		{"remap_file_pages", "holes in the past", call(unix.SYS_REMAP_FILE_PAGES)},
		{"mseal", "not needed", call(462)},
		{"map_shadow_stack", "forged returns", call(453)},
		{"madvise remove", "holes in DMA memory", func() error { return unix.Madvise(heldAnon, unix.MADV_REMOVE) }},
		{"madvise poison", "a broken page of the machine", func() error { return unix.Madvise(heldAnon, unix.MADV_HWPOISON) }},
		{"madvise mergeable", "what others have in memory, by time", func() error { return unix.Madvise(heldAnon, unix.MADV_MERGEABLE) }},
		{"madvise wipe on fork", "not needed", func() error { return unix.Madvise(heldAnon, unix.MADV_WIPEONFORK) }},
		{"mlock", "pinned memory", call(unix.SYS_MLOCK)},
		{"mlockall", "pinned memory", call(unix.SYS_MLOCKALL, 1)},
		{"mincore", "what others have in the page cache", call(unix.SYS_MINCORE)},
		{"cachestat", "the same", call(451)},
		{"mbind", "one node's memory", call(unix.SYS_MBIND)},
		{"set_mempolicy", "one node's memory", call(unix.SYS_SET_MEMPOLICY)},
		{"shmget", "kernel memory that stays", call(unix.SYS_SHMGET, 0, 4096, 0o1777)},
		{"shmat", "another's memory", call(unix.SYS_SHMAT)},
		{"semget", "kernel memory that stays", call(unix.SYS_SEMGET, 0, 1)},
		{"msgget", "kernel memory that stays; the spray of many exploits", call(unix.SYS_MSGGET)},
		{"msgsnd", "the same", call(unix.SYS_MSGSND)},
	}
}

func privilegeAttacks() []attack {
	return []attack{
		{"setuid", "root", call(unix.SYS_SETUID, 0)},
		{"setgid", "root's group", call(unix.SYS_SETGID, 0)},
		{"setresuid", "root", call(unix.SYS_SETRESUID, 0, 0, 0)},
		{"setfsuid", "root's files", call(unix.SYS_SETFSUID, 0)},
		{"setgroups", "a group", call(unix.SYS_SETGROUPS)},
		{"capset", "a capability", call(unix.SYS_CAPSET)},
		{"seccomp", "another filter, or a listener", call(unix.SYS_SECCOMP, 1)},
		{"prctl seccomp", "another mode", call(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, 0)},
		{"prctl new privs", "privileges by exec", call(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 0)},
		{"prctl ambient", "a capability across exec", call(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE)},
		{"prctl keep caps", "capabilities across setuid", call(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1)},
		{"prctl securebits", "root's powers", call(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS)},
		{"prctl dumpable", "be traced by others, and dumped", call(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1)},
		{"prctl dumpable, upper half", "the same, hidden from a comparison of 32 bits", call(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE|1<<32, 1)},
		{"prctl ptracer", "be traced by others", call(unix.SYS_PRCTL, unix.PR_SET_PTRACER, neg1)},
		{"prctl death signal", "outlive the first process", call(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, 0)},
		{"prctl subreaper", "adopt processes", call(unix.SYS_PRCTL, unix.PR_SET_CHILD_SUBREAPER, 1)},
		{"prctl mm", "lie about where things are", call(unix.SYS_PRCTL, unix.PR_SET_MM)},
		{"prctl name", "look like another program", call(unix.SYS_PRCTL, unix.PR_SET_NAME)},
		{"prctl speculation", "no guard against Spectre", call(unix.SYS_PRCTL, unix.PR_SET_SPECULATION_CTRL)},
		{"landlock_restrict_self", "not needed", call(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(heldFile))},
		{"add_key", "kernel memory; the user's keyring", call(unix.SYS_ADD_KEY)},
		{"request_key", "run a program as root, outside", call(unix.SYS_REQUEST_KEY)},
		{"keyctl", "the user's keys", call(unix.SYS_KEYCTL, unix.KEYCTL_GET_KEYRING_ID)},
		{"keyctl join", "a session's keys", call(unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING)},
	}
}

// The kernel's settings and code.
func kernelAttacks() []attack {
	held := uintptr(heldFile)
	return []attack{
		{"init_module", "code in the kernel", call(unix.SYS_INIT_MODULE)},
		{"finit_module", "code in the kernel", call(unix.SYS_FINIT_MODULE, held)},
		{"delete_module", "a module less", call(unix.SYS_DELETE_MODULE)},
		{"kexec_load", "another kernel", call(unix.SYS_KEXEC_LOAD)},
		{"reboot", "the machine's end", call(unix.SYS_REBOOT)},
		{"syslog", "kernel addresses", call(unix.SYS_SYSLOG, 3)},
		{"settimeofday", "the clock", call(unix.SYS_SETTIMEOFDAY)},
		{"clock_settime", "the clock", call(unix.SYS_CLOCK_SETTIME)},
		{"adjtimex", "the clock", call(unix.SYS_ADJTIMEX)},
		{"clock_adjtime", "the clock", call(unix.SYS_CLOCK_ADJTIME)},
		{"sethostname", "the name", call(unix.SYS_SETHOSTNAME)},
		{"setdomainname", "the name", call(unix.SYS_SETDOMAINNAME)},
		{"vhangup", "the user's terminal", call(unix.SYS_VHANGUP)},
		{"swapoff", "the machine's memory", call(unix.SYS_SWAPOFF)},
	}
}

// What tells of the machine and is of no use to a driver.
func machineAttacks() []attack {
	return []attack{
		{"uname", "which exploit to take", call(unix.SYS_UNAME)},
		{"sysinfo", "what the machine does", call(unix.SYS_SYSINFO)},
		{"getppid", "whose child it is", call(unix.SYS_GETPPID)},
		{"getuid", "who it is", call(unix.SYS_GETUID)},
		{"getsid", "other processes", call(unix.SYS_GETSID, uintptr(hostPID))},
		{"sched_getparam", "other processes", call(unix.SYS_SCHED_GETPARAM, uintptr(hostPID))},
		{"clock_nanosleep", "not needed", call(unix.SYS_CLOCK_NANOSLEEP)},
	}
}
