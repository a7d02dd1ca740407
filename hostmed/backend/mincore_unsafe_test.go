package backend

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func mincore(b, vec []byte) bool {
	_, _, e := unix.Syscall(unix.SYS_MINCORE, address(b), uintptr(len(b)), uintptr(unsafe.Pointer(&vec[0])))
	return e == 0
}

// dirtyPages returns how many pages of fd's file are in the page cache and not on the disk.
func dirtyPages(fd int) (uint64, error) {
	var span [2]uint64 // all of it
	var stat struct{ cached, dirty, writeback, evicted, recentlyEvicted uint64 }
	_, _, e := unix.Syscall6(unix.SYS_CACHESTAT, uintptr(fd), uintptr(unsafe.Pointer(&span)), uintptr(unsafe.Pointer(&stat)), 0, 0, 0)
	if e != 0 {
		return 0, e
	}
	return stat.dirty + stat.writeback, nil
}
