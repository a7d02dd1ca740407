package dma

import "unsafe"

// distance returns how many bytes mem lies behind base. It wraps around when mem lies before it.
func distance(base, mem []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))) - uintptr(unsafe.Pointer(unsafe.SliceData(base))))
}
