package sandbox

import "golang.org/x/sys/unix"

func archAttacks() []attack {
	return []attack{
		{"open, old", "read a file", call(unix.SYS_OPEN)},
		{"creat", "leave a file", call(unix.SYS_CREAT)},
		{"access", "is there a file", call(unix.SYS_ACCESS)},
		{"utimes", "hide a change", call(unix.SYS_UTIMES)},
		{"fork", "a process that outlives this one", call(unix.SYS_FORK)},
		{"vfork", "the same", call(unix.SYS_VFORK)},
		{"clone3", "flags that a filter cannot see", call(unix.SYS_CLONE3)},
		{"dup2", "a number of choice", call(unix.SYS_DUP2, 0, 9)},
		{"pipe", "a new fd", call(unix.SYS_PIPE)},
		{"eventfd", "a new fd", call(unix.SYS_EVENTFD)},
		{"epoll_create", "a new fd", call(unix.SYS_EPOLL_CREATE, 1)},
		{"inotify_init", "a new fd", call(unix.SYS_INOTIFY_INIT)},
		{"arch_prctl", "the thread's registers", call(unix.SYS_ARCH_PRCTL, 0x1001)},
		{"modify_ldt", "segments; holes in the past", call(unix.SYS_MODIFY_LDT)},
		{"iopl", "the machine's ports", call(unix.SYS_IOPL, 3)},
		{"ioperm", "the machine's ports", call(unix.SYS_IOPERM, 0x80, 1, 1)},
		{"alarm", "a signal", call(unix.SYS_ALARM, 100)},
		{"time", "not needed", call(unix.SYS_TIME)},
		{"x32 getpid", "a call by its other number", call(unix.SYS_GETPID | 1<<30)},
		{"x32 read", "a call by its other number", call(unix.SYS_READ | 1<<30)},
	}
}
