package systrace

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// info is struct ptrace_syscall_info; ptrace(2).
type info struct {
	op    uint8
	_     [3]byte
	arch  uint32
	ip    uint64
	sp    uint64
	words [8]uint64 // entry: number and arguments; exit: the result and, in the low byte, whether it is an error
}

// syscallInfo asks about the stop that the thread is in (Linux 5.3). worked is for the exit of a call.
func syscallInfo(tid int) (c Call, entry, worked bool, err error) {
	var i info
	if _, _, no := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(i), uintptr(unsafe.Pointer(&i)), 0, 0); no != 0 {
		return c, false, false, no
	}
	switch i.op {
	case unix.PTRACE_SYSCALL_INFO_ENTRY:
		c.Nr = i.words[0]
		copy(c.Args[:], i.words[1:7])
		return c, true, false, nil
	case unix.PTRACE_SYSCALL_INFO_EXIT:
		return c, false, i.words[1]&0xff == 0, nil
	}
	return c, false, false, nil
}
