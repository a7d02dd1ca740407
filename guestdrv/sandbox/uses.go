package sandbox

import (
	"fmt"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/seccomp"
)

// Use is one way in which a program reaches the world from inside the box, on top of what every program there may do. The constructors below
// give a Use for each; Policy.Uses puts those together that a program needs.
type Use struct {
	Name   string
	What   string // when a program has it
	Rules  []Rule
	FDs    []int // what the rules are for; Enter demands that they are open. Without any the rules do not count
	NewFDs int   // so many fds more may be open at a time than at Enter
	Rings  []int // io_uring instances; Enter refuses one that is not restricted, since what goes through a ring does not go through seccomp
}

// AnyFD stands for the fds of a Use where its table is looked at and not used: Enter refuses it.
const AnyFD = -1

// on is a rule for a call whose argument number at is one of fds; the other arguments are as rest says.
func on(at int, fds []int, rest args) seccomp.SyscallRule {
	var or seccomp.Or
	for _, fd := range fds {
		a := rest
		a[at] = is(uintptr(fd))
		if fd == AnyFD {
			a[at] = anything{}
		}
		or = append(or, a)
	}
	return or
}

// VFIO requests, include/uapi/linux/vfio.h: _IO(';', 100 + n).
const (
	vfioDeviceReset     = 0x3b6f
	acceptFlags         = unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	uringEnterGetEvents = 1 << 0
	uringEnterSQWakeup  = 1 << 1
	uringEnterSQWait    = 1 << 2
	uringEnterExtArg    = 1 << 3
)

// VFIOUser is for a device behind a unix socket: messages go over this socket and no other.
func VFIOUser(socket int) Use {
	fds := []int{socket}
	return Use{Name: "vfio-user", What: "DEVICE is vfio-user:PATH", FDs: fds, Rules: []Rule{
		{Name: "recvmsg", Nr: unix.SYS_RECVMSG, Args: on(0, fds, args{}), Limit: "the device's socket", Why: "replies and interrupts; an fd that comes with a message finds no number free, unless another use has some"},
		{Name: "sendmsg", Nr: unix.SYS_SENDMSG, Args: on(0, fds, args{}), Limit: "the device's socket", Why: "requests, and the doorbells that are messages"},
	}}
}

// VFIODevice is for a device behind VFIO: its file takes a reset and no other ioctl; regions are mapped before, or read and written at an offset.
func VFIODevice(device int) Use {
	fds := []int{device}
	return Use{Name: "vfio", What: "DEVICE is vfio:FUNCTION", FDs: fds, Rules: []Rule{
		{Name: "ioctl", Nr: unix.SYS_IOCTL, Args: on(0, fds, args{1: is(vfioDeviceReset)}), Limit: "VFIO_DEVICE_RESET on the device",
			Why: "function reset after a controller that does not come back; interrupts, regions and migration are not touched any more"},
		{Name: "pwrite64", Nr: unix.SYS_PWRITE64, Args: on(0, fds, args{}), Limit: "the device", Why: "bus mastering is switched off at Close by its config space"},
	}}
}

// FileWrites is for files that are written to at an offset: a PCI function's config and reset in sysfs, or a file that is being copied to.
func FileWrites(fds ...int) Use {
	return Use{Name: "file writes", What: "DEVICE is sysfs:FUNCTION; or a file is written to at an offset", FDs: fds, Rules: []Rule{
		{Name: "pwrite64", Nr: unix.SYS_PWRITE64, Args: on(0, fds, args{}), Limit: "the given files", Why: "a PCI function's config and reset in sysfs: bus mastering off, function reset; a file that is copied to"},
	}}
}

// Listener is for a server on a socket that listens already. At most conns connections are open at a time; accept4 then fails with EMFILE, which
// a server has to take as "later". Connections are read, written and closed; package net asks for more on some. Who closes others of the program's
// descriptors makes room for as many more. The socket's file cannot be removed from inside: Options.AtEnd can.
func Listener(listener, conns int) Use {
	fds := []int{listener}
	return Use{Name: "server", What: "guestdrv serve --nbd", FDs: fds, NewFDs: conns, Rules: []Rule{
		{Name: "accept4", Nr: unix.SYS_ACCEPT4, Args: on(0, fds, args{3: is(acceptFlags)}), Limit: "the listening socket; close-on-exec and non-blocking",
			Why: "clients; how many there can be at a time is bounded by RLIMIT_NOFILE"},
	}}
}

// Ublk is for a server of a ublk block device: io_uring instances that were restricted before (IORING_REGISTER_RESTRICTIONS, io_uring_register(2)), and
// the sync at its end. Enter asks each ring whether it is restricted. One that belongs to a single thread (IORING_SETUP_SINGLE_ISSUER) answers to that thread only, which must have asked: uring.Ring.Restricted.
func Ublk(rings ...int) Use {
	return Use{Name: "ublk", What: "guestdrv serve --ublk", FDs: rings, Rings: rings, Rules: []Rule{
		{Name: "io_uring_enter", Nr: unix.SYS_IO_URING_ENTER,
			Args:  on(0, rings, args{3: seccomp.BitsAllowlist(uringEnterGetEvents | uringEnterSQWakeup | uringEnterSQWait | uringEnterExtArg)}),
			Limit: "the given rings, by fd and not by a registered index; GETEVENTS, SQ_WAKEUP, SQ_WAIT, EXT_ARG",
			Why:   "submits and waits; the ring itself takes nothing but the commands that it was restricted to"},
		{Name: "sync", Nr: unix.SYS_SYNC, Why: "what was written to a file system on the block device is on the disk before the device goes; it has no arguments and tells nothing"},
	}}
}

// Uses is every Use there is, with AnyFD, for tables and tests.
func Uses() []Use {
	return []Use{VFIOUser(AnyFD), VFIODevice(AnyFD), FileWrites(AnyFD), Listener(AnyFD, 1), Ublk(AnyFD)}
}

// checkUses says what is wrong with a policy's uses, before anything is changed.
func checkUses(uses []Use) error {
	for _, u := range uses {
		for _, fd := range u.FDs {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); fd < 0 || err != nil {
				return fmt.Errorf("sandbox: %s: fd %d is not open (%v)", u.Name, fd, err)
			}
		}
		for _, ring := range u.Rings {
			if err := checkRing(ring); err != nil {
				return fmt.Errorf("sandbox: %s: %w", u.Name, err)
			}
		}
	}
	return nil
}

// newFDs is how many fds the uses need.
func newFDs(uses []Use) (n int) {
	for _, u := range uses {
		n += u.NewFDs
	}
	return n
}

// fdLimit is the limit under which n numbers are free, but never below least.
func fdLimit(n, least int) (int, error) {
	const most = 1 << 20 // the kernel's own default for the most that can be (fs.nr_open)
	limit := least
	for fd := 0; n > 0; fd++ {
		if fd == most {
			return 0, fmt.Errorf("there are not %d free fd numbers below %d", n, most)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			n--
			limit = max(limit, fd+1)
		}
	}
	return limit, nil
}
