package backend

import (
	"unsafe"
)

// memoryAt is what the kernel does with an address from an entry of a ring.
func memoryAt(addr, n uint64) []byte {
	if n == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&addr))), n)
}

func piecesAt(addr, n uint64) []Seg {
	return unsafe.Slice((*Seg)(*(*unsafe.Pointer)(unsafe.Pointer(&addr))), n)
}

// room is where a fake ring's entries have their commands.
func room() []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(new([10]uint64))), passthruAligned)
}
