package nbd

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// writev writes what v points at, as far as the socket takes it.
func writev(fd uintptr, v []unix.Iovec) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&v[0])), uintptr(len(v)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// advance returns what is left of v after n bytes.
func advance(v []unix.Iovec, n int) []unix.Iovec {
	for len(v) > 0 && uint64(n) >= uint64(v[0].Len) {
		n -= int(v[0].Len)
		v = v[1:]
	}
	if n > 0 {
		v[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(v[0].Base), n))
		v[0].SetLen(int(v[0].Len) - n)
	}
	return v
}
