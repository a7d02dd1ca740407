package physical

import "unsafe"

// addressOf returns where b is in this process.
func addressOf(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }
