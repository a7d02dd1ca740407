package hostnvme

import "unsafe"

func blockOf(b []byte) block {
	return block{uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))), uint64(len(b))}
}

func segAddress(s *Seg) uint64 { return uint64(uintptr(unsafe.Pointer(s.Base))) }

// segBytes returns the n bytes of s from off on, for a copy to or from guest memory and nothing else.
func segBytes(s *Seg, off, n uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(s.Base), off)), n)
}
