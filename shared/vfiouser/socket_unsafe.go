package vfiouser

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// oobSize is the control buffer for MaxFDsTaken descriptors, rounded up to the
// alignment of control messages.
const oobSize = (unix.SizeofCmsghdr + 4*MaxFDsTaken + 7) &^ 7

// recvmsg is one non-blocking recvmsg. The raw system call: it returns at once,
// and a worker that polls must not lose its P over it.
func recvmsg(fd int, p, oob []byte) (n, oobn, flags int, errno unix.Errno) {
	iov := unix.Iovec{Base: unsafe.SliceData(p), Len: uint64(len(p))}
	hdr := unix.Msghdr{Iov: &iov, Iovlen: 1, Control: unsafe.SliceData(oob), Controllen: uint64(len(oob))}
	r, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&hdr)), unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	runtime.KeepAlive(&iov)
	if errno != 0 {
		return 0, 0, 0, errno
	}
	return int(r), int(hdr.Controllen), int(hdr.Flags), 0
}

// sendmsg is one non-blocking sendmsg of a followed by b.
func sendmsg(fd int, a, b, oob []byte) (n int, errno unix.Errno) {
	iov := [2]unix.Iovec{
		{Base: unsafe.SliceData(a), Len: uint64(len(a))},
		{Base: unsafe.SliceData(b), Len: uint64(len(b))},
	}
	hdr := unix.Msghdr{Iov: &iov[0], Iovlen: 2}
	if len(oob) != 0 {
		hdr.Control, hdr.Controllen = unsafe.SliceData(oob), uint64(len(oob))
	}
	r, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&hdr)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	runtime.KeepAlive(&iov)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}
