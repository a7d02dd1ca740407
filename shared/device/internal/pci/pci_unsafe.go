package pci

import (
	"sync/atomic"
	"unsafe"
)

// plain32 and plain64 are the words as ordinary variables.
func plain32(w *atomic.Uint32) *uint32 { return (*uint32)(unsafe.Pointer(w)) }
func plain64(w *atomic.Uint64) *uint64 { return (*uint64)(unsafe.Pointer(w)) }
