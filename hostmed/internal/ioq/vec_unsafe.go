package ioq

import (
	"bytes"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/gmem"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func bytesOf(s backend.Seg) []byte { return unsafe.Slice(s.Base, s.Len) }

// touches reports whether r, which is in flight, moves data to or from memory of gone.
func (r *request) touches(gone []gmem.Range) bool {
	for _, vec := range [...][]backend.Seg{r.Vec, r.guest} { // guest may be an older command's: then this waits for nothing worse
		for _, s := range vec {
			for i := range gone {
				if m := gone[i].Mem; m != nil && uintptr(unsafe.Pointer(s.Base)) < uintptr(m.Base())+uintptr(m.Len()) &&
					uintptr(m.Base()) < uintptr(unsafe.Pointer(s.Base))+uintptr(s.Len) {
					return true
				}
			}
		}
	}
	return false
}

// equalAt reports whether the guest's memory from its byte pos on holds the same bytes as mine.
func equalAt(guest []backend.Seg, pos uint64, mine backend.Seg) bool {
	m := bytesOf(mine)
	for _, s := range guest {
		if pos >= s.Len {
			pos -= s.Len
			continue
		}
		g := bytesOf(s)[pos:]
		pos = 0
		n := min(len(g), len(m))
		if !bytes.Equal(g[:n], m[:n]) {
			return false
		}
		if m = m[n:]; len(m) == 0 {
			return true
		}
	}
	return len(m) == 0
}

// copyOut copies guest memory into dst, once (R31). T has no pointers.
func copyOut[T nvme.DSMRange | nvme.CopyRange](dst []T, guest []backend.Seg) bool {
	raw := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(dst))), len(dst)*int(unsafe.Sizeof(dst[0])))
	for _, s := range guest {
		raw = raw[copy(raw, bytesOf(s)):]
	}
	return len(raw) == 0
}

// segOf is the memory of list, which is on the heap.
func segOf[T nvme.DSMRange | nvme.CopyRange](list []T) backend.Seg {
	p := unsafe.SliceData(list)
	return backend.Seg{Base: (*byte)(unsafe.Pointer(p)), Len: uint64(len(list)) * uint64(unsafe.Sizeof(*p))}
}

// epollWait waits for timeout ns, or for ever if that is negative. A look that does not wait goes past the
// scheduler.
func epollWait(ep int, events []unix.EpollEvent, timeout int64) (int, error) {
	p := uintptr(unsafe.Pointer(unsafe.SliceData(events)))
	if timeout == 0 {
		n, _, e := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(ep), p, uintptr(len(events)), 0, 0, 0)
		if e != 0 {
			return 0, e
		}
		return int(n), nil
	}
	var ts *unix.Timespec
	if timeout > 0 {
		t := unix.NsecToTimespec(timeout)
		ts = &t
	}
	n, _, e := unix.Syscall6(unix.SYS_EPOLL_PWAIT2, uintptr(ep), p, uintptr(len(events)), uintptr(unsafe.Pointer(ts)), 0, 0)
	if e == unix.ENOSYS { // before Linux 5.11
		ms := -1
		if timeout > 0 {
			ms = int((timeout + 999_999) / 1_000_000)
		}
		n, _, e = unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(ep), p, uintptr(len(events)), uintptr(ms), 0, 0)
	}
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// schedYield lets whoever else wants this core run first: a thread that polls in vain must not keep a client from what the poll is
// waiting for, such as the thread of QEMU that passes our interrupt on, where there are fewer cores than threads.
func schedYield() { _, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// writeEventFD adds 1 to an eventfd that the peer may hold too, and may have filled: then it is
// readable anyway, and a write could block (R34).
func writeEventFD(fd int) {
	p := unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT}
	n, _, e := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&unix.Timespec{})), 0, 0, 0)
	if e != 0 || n == 0 || p.Revents&unix.POLLOUT == 0 {
		return
	}
	one := uint64(1)
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one)), 8)
}
