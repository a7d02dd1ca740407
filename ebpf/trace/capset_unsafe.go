package trace

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// capsetAll leaves every thread the capabilities of keep; capset(2), header version 3.
func capsetAll(keep uint64) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	sets := [2]unix.CapUserData{
		{Effective: uint32(keep), Permitted: uint32(keep)},
		{Effective: uint32(keep >> 32), Permitted: uint32(keep >> 32)},
	}
	if _, _, no := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&sets[0])), 0); no != 0 {
		return no
	}
	return nil
}
