package uring

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The sizes that the kernel expects.
const (
	_ = uint(unsafe.Sizeof(params{}) - 120)
	_ = uint(120 - unsafe.Sizeof(params{}))
	_ = uint(unsafe.Sizeof(SQE{}) - 64)
	_ = uint(64 - unsafe.Sizeof(SQE{}))
	_ = uint(unsafe.Sizeof(CQE{}) - 16)
	_ = uint(16 - unsafe.Sizeof(CQE{}))
	_ = uint(unsafe.Sizeof(WideCQE{}) - 32)
	_ = uint(32 - unsafe.Sizeof(WideCQE{}))
	_ = uint(unsafe.Sizeof(rsrcRegister{}) - 32)
	_ = uint(32 - unsafe.Sizeof(rsrcRegister{}))
	_ = uint(unsafe.Sizeof(filesUpdate{}) - 16)
	_ = uint(16 - unsafe.Sizeof(filesUpdate{}))
	_ = uint(unsafe.Sizeof(rsrcUpdate2{}) - 32)
	_ = uint(32 - unsafe.Sizeof(rsrcUpdate2{}))
	_ = uint(unsafe.Sizeof(restriction{}) - 16)
	_ = uint(16 - unsafe.Sizeof(restriction{}))
	_ = uint(unsafe.Sizeof(getEventsArg{}) - 24)
	_ = uint(24 - unsafe.Sizeof(getEventsArg{}))
	_ = uint(unsafe.Sizeof(probe{}) - 16 - 8*probeOps)
	_ = uint(16 + 8*probeOps - unsafe.Sizeof(probe{}))
)

// The kernel gets these addresses as numbers, which escape analysis does not see: a buffer on a
// goroutine's stack would be left behind when the stack moves. Storing the pointer, if only in code
// that never runs, forces whatever a caller passes onto the heap.
var escape struct {
	on  bool
	p   *byte
	vec []unix.Iovec
}

func addressOf(p *byte) uint64 {
	if escape.on {
		escape.p = p
	}
	return uint64(uintptr(unsafe.Pointer(p)))
}

func addressOfVec(v []unix.Iovec) uint64 {
	if escape.on {
		escape.vec = v
	}
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(v))))
}

func iovec(b []byte) unix.Iovec {
	if len(b) == 0 {
		return unix.Iovec{}
	}
	return unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
}

func setup(entries uint32, p *params) (int, unix.Errno) {
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(p)), 0)
	return int(fd), errno
}

// enterNow does not tell the scheduler: it is for calls that do not wait.
func enterNow(fd int, toSubmit, flags uint32) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(fd), uintptr(toSubmit), 0, uintptr(flags), 0, 0)
	return int(n), errno
}

func enterWait(fd int, toSubmit, minComplete, flags uint32) (int, unix.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(fd), uintptr(toSubmit), uintptr(minComplete), uintptr(flags), 0, 0)
	return int(n), errno
}

// enterTimed is enterWait that ends with ETIME after ts, or without waiting at all if minComplete is 0.
func enterTimed(fd int, toSubmit, minComplete, flags uint32, ts *timespec) (int, unix.Errno) {
	arg := getEventsArg{ts: uint64(uintptr(unsafe.Pointer(ts)))}
	n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(fd), uintptr(toSubmit), uintptr(minComplete),
		uintptr(flags|enterExtArg), uintptr(unsafe.Pointer(&arg)), unsafe.Sizeof(arg))
	return int(n), errno
}

func register(fd int, op uint32, arg unsafe.Pointer, n int) unix.Errno {
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(fd), uintptr(op), uintptr(arg), uintptr(n), 0, 0)
	return errno
}

func registerIovecs(fd int, op uint32, v []unix.Iovec) unix.Errno {
	return register(fd, op, unsafe.Pointer(unsafe.SliceData(v)), len(v))
}

func registerInts(fd int, op uint32, v []int32) unix.Errno {
	return register(fd, op, unsafe.Pointer(unsafe.SliceData(v)), len(v))
}

func registerNothing(fd int, op uint32) unix.Errno { return register(fd, op, nil, 0) }

func registerSparse(fd int, op uint32, n int) unix.Errno {
	a := rsrcRegister{nr: uint32(n), flags: rsrcRegisterSparse}
	return register(fd, op, unsafe.Pointer(&a), int(unsafe.Sizeof(a)))
}

func updateIovecs(fd int, at int, v []unix.Iovec) unix.Errno {
	a := rsrcUpdate2{offset: uint32(at), data: addressOfVec(v), nr: uint32(len(v))}
	return register(fd, regBuffersUpdate, unsafe.Pointer(&a), int(unsafe.Sizeof(a)))
}

func updateFiles(fd int, at int, v []int32) unix.Errno {
	a := filesUpdate{offset: uint32(at), fds: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(v))))}
	return register(fd, regFilesUpdate, unsafe.Pointer(&a), len(v))
}

func registerRestrictions(fd int, v []restriction) unix.Errno {
	return register(fd, regRestrictions, unsafe.Pointer(unsafe.SliceData(v)), len(v))
}

func registerPersonality(fd int) (int, unix.Errno) {
	id, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(fd), regPersonality, 0, 0, 0, 0)
	return int(id), errno
}

func registerProbe(fd int, p *probe) unix.Errno {
	return register(fd, regProbe, unsafe.Pointer(p), probeOps)
}

// attach finds the ring's words in the mapped memory. Offsets come from the kernel.
func (r *Ring) attach(p *params) {
	word := func(off uint32) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&r.rings[off])) }
	r.sqHead, r.sqTail, r.sqFlags = word(p.sqOff.head), word(p.sqOff.tail), word(p.sqOff.flags)
	r.cqHead, r.cqTail = word(p.cqOff.head), word(p.cqOff.tail)
	r.sqMask, r.sqEntries = word(p.sqOff.ringMask).Load(), p.sqEntries
	r.cqMask, r.cqEntries = word(p.cqOff.ringMask).Load(), p.cqEntries

	if r.cqe32 {
		r.wide = unsafe.Slice((*WideCQE)(unsafe.Pointer(&r.rings[p.cqOff.cqes])), p.cqEntries)
	} else {
		r.cqes = unsafe.Slice((*CQE)(unsafe.Pointer(&r.rings[p.cqOff.cqes])), p.cqEntries)
	}
	// Entry i of the indirection array is slot i for ever.
	array := unsafe.Slice((*uint32)(unsafe.Pointer(&r.rings[p.sqOff.array])), p.sqEntries)
	for i := range array {
		array[i] = uint32(i)
	}
}

func (r *Ring) slot(i uint32) *SQE {
	return (*SQE)(unsafe.Pointer(&r.entries[uint64(i)<<r.sqShift]))
}

// Command returns the room for the argument of PrepCommand in an entry that GetSQE returned: 16 bytes,
// 80 on a ring with SQE128.
func (r *Ring) Command(s *SQE) []byte {
	return unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(s), 48)), 1<<r.sqShift-48)
}
