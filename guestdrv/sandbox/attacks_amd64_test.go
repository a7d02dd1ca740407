package sandbox

import "golang.org/x/sys/unix"

func archAttacks() map[string]func() error {
	return map[string]func() error{
		"open, old":    call(unix.SYS_OPEN),
		"fork":         call(unix.SYS_FORK),
		"vfork":        call(unix.SYS_VFORK),
		"clone3":       call(unix.SYS_CLONE3),
		"arch_prctl":   call(unix.SYS_ARCH_PRCTL, 0x1001),
		"modify_ldt":   call(unix.SYS_MODIFY_LDT),
		"iopl":         call(unix.SYS_IOPL, 3),
		"x32 getpid":   call(unix.SYS_GETPID | 1<<30),
		"time by x32":  call(unix.SYS_READ | 1<<30),
		"sendto":       call(unix.SYS_SENDTO, uintptr(heldPair[0])),
		"access":       call(unix.SYS_ACCESS),
		"utimes":       call(unix.SYS_UTIMES),
		"epoll_create": call(unix.SYS_EPOLL_CREATE, 1),
	}
}
