package backend

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

func segAddress(s *Seg) uintptr { return uintptr(unsafe.Pointer(s.Base)) }

// segBytes returns the guest memory of s, for a copy to or from it and nothing else.
func segBytes(s *Seg) []byte { return unsafe.Slice(s.Base, s.Len) }

// skipSeg returns s without its first n bytes.
func skipSeg(s Seg, n uint64) Seg {
	return Seg{Base: (*byte)(unsafe.Add(unsafe.Pointer(s.Base), n)), Len: s.Len - n}
}

// The next two do not tell the scheduler: they are for files in memory, where they do not wait.

func preadv(fd int, vec []Seg, off uint64) (int, unix.Errno) {
	if len(vec) == 1 {
		n, _, e := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(vec[0].Base)), uintptr(vec[0].Len), uintptr(off), 0, 0)
		return int(n), e
	}
	n, _, e := unix.RawSyscall6(unix.SYS_PREADV, uintptr(fd), uintptr(unsafe.Pointer(&vec[0])), uintptr(len(vec)), uintptr(off), 0, 0)
	return int(n), e
}

func pwritev(fd int, vec []Seg, off uint64) (int, unix.Errno) {
	if len(vec) == 1 {
		n, _, e := unix.RawSyscall6(unix.SYS_PWRITE64, uintptr(fd), uintptr(unsafe.Pointer(vec[0].Base)), uintptr(vec[0].Len), uintptr(off), 0, 0)
		return int(n), e
	}
	n, _, e := unix.RawSyscall6(unix.SYS_PWRITEV, uintptr(fd), uintptr(unsafe.Pointer(&vec[0])), uintptr(len(vec)), uintptr(off), 0, 0)
	return int(n), e
}
