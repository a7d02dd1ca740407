package sandbox

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// allThreadsCapsetNone empties the effective, permitted and inheritable sets of every thread; capset(2), header version 3.
func allThreadsCapsetNone() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if _, _, no := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&none[0])), 0); no != 0 {
		return no
	}
	return nil
}

// landlockQuery asks landlock_create_ruleset(2) for a number: the ABI version or the bits of fixed errata.
func landlockQuery(flags uintptr) (int, error) {
	n, _, no := syscall.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, flags)
	if no != 0 {
		return 0, no
	}
	return int(n), nil
}

// landlockCreate makes a ruleset. A kernel that knows fewer fields takes the longer structure as long as the rest is zero.
func landlockCreate(attr *unix.LandlockRulesetAttr) (fd int, err error) {
	n, _, no := syscall.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr), 0)
	if no != 0 {
		return -1, no
	}
	return int(n), nil
}
