package shm

import (
	"sync/atomic"
	"unsafe"
)

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

func wordBytes(w []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), len(w)*8)
}

// The caller has checked bounds and alignment.
func word32(b []byte, off uint64) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&b[off]))
}

func word64(b []byte, off uint64) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&b[off]))
}

// Base returns the address of the first byte, for packages that keep typed
// pointers into a region they have checked.
func (r *Region) Base() unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(r.mem)) }

// Overlaps reports whether r and s share host memory.
func (r *Region) Overlaps(s *Region) bool {
	a, b := uintptr(r.Base()), uintptr(s.Base())
	return a < b+uintptr(len(s.mem)) && b < a+uintptr(len(r.mem))
}
