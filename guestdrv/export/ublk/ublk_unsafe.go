package ublk

import "unsafe"

// addressOf returns where b is in this process. What is given to the kernel by it must be kept reachable by the caller.
func addressOf(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }
