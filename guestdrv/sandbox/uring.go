package sandbox

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// uringRegisterProbe is IORING_REGISTER_PROBE; io_uring_register(2).
const uringRegisterProbe = 8

// checkRing demands that the ring is restricted and enabled. Then, and only then, it refuses every kind of registration that it was not opened for with
// EACCES, before it looks at the arguments: a ring that lists what it can do, or finds fault with the arguments of that, is not restricted.
// Which operations it takes cannot be asked without submitting them; package shared/uring, which restricts rings, tests that.
func checkRing(fd int) error {
	_, _, no := syscall.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(fd), uringRegisterProbe, 0, 0, 0, 0)
	switch no {
	case syscall.EACCES:
		return nil
	case syscall.EEXIST:
		// A ring that one thread alone may enter (IORING_SETUP_SINGLE_ISSUER) answers to that thread only, which asks what is asked here itself
		// (uring.Ring.Restricted).
		return nil
	case 0, syscall.EINVAL, syscall.EFAULT:
		return &fault{fmt.Sprintf("the io_uring with fd %d is not restricted", fd), nil, "io_uring does not pass through seccomp: register restrictions and enable the ring before Enter"}
	}
	return fmt.Errorf("fd %d as an io_uring: %w", fd, no)
}
