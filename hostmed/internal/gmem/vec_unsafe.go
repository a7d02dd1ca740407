package gmem

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// appendVec appends the first n bytes of b, joined with the last element if they touch in
// host memory.
func appendVec(vec []unix.Iovec, b []byte, n uint64) []unix.Iovec {
	base := unsafe.SliceData(b)
	if k := len(vec) - 1; k >= 0 && unsafe.Add(unsafe.Pointer(vec[k].Base), vec[k].Len) == unsafe.Pointer(base) {
		vec[k].Len += n
		return vec
	}
	return append(vec, unix.Iovec{Base: base, Len: n})
}
