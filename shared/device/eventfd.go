package device

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// EventFDs is Interrupts for implementations that have most vectors: it makes n eventfds, and give tells the device of them. It closes them
// if that fails. For n = 0 give is not called.
func EventFDs(n, most int, give func(fds []int) error) (fds []int, err error) {
	if n > most {
		return nil, fmt.Errorf("%d interrupt vectors wanted, the device has %d", n, most)
	}
	defer func() {
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
			fds = nil
		}
	}()
	for i := range n {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return fds, fmt.Errorf("eventfd for interrupt vector %d: %w", i, err)
		}
		fds = append(fds, fd)
	}
	if n == 0 {
		return nil, nil
	}
	if err := give(fds); err != nil {
		return fds, fmt.Errorf("%d interrupt vectors: %w", n, err)
	}
	return fds, nil
}

// Duplicates returns a descriptor of its own for each of fds, as a device has it that got them over a socket.
func Duplicates(fds []int) (own []int, err error) {
	for _, fd := range fds {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			for _, fd := range own {
				unix.Close(fd)
			}
			return nil, fmt.Errorf("another descriptor for eventfd %d: %w", fd, err)
		}
		own = append(own, dup)
	}
	return own, nil
}
