package events

import (
	"unsafe"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// words is mem, which is aligned for them, as words.
func words(mem *shm.Region) []uint64 {
	return unsafe.Slice((*uint64)(mem.Base()), mem.Len()/8)
}
