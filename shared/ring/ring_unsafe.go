package ring

import (
	"unsafe"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// The callers have checked mem's size and alignment.

func commands(mem *shm.Region, size uint32) []nvme.Command {
	return unsafe.Slice((*nvme.Command)(mem.Base()), size)
}

func entries(mem *shm.Region, size uint32) []Entry {
	return unsafe.Slice((*Entry)(mem.Base()), size)
}
