package main

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// userIO is struct nvme_user_io of linux/nvme_ioctl.h.
type userIO struct {
	opcode, flags        uint8
	control              uint16
	nblocks              uint16 // zero-based
	_                    uint16
	metadata, addr, slba uint64
	dsmgmt, reftag       uint32
	apptag, appmask      uint16
	_                    uint32
}

const (
	ioctlSubmitIO = 0x40304e42
	controlFUA    = 1 << 14
	blockSize     = 512
)

// writeFUA is one Write with FUA and nothing else: of RWF_DSYNC Linux makes a flush besides.
func writeFUA(fd int, p []byte, off int64) error {
	io := userIO{
		opcode: nvme.IOWrite, control: controlFUA, nblocks: uint16(len(p)/blockSize - 1),
		addr: uint64(uintptr(unsafe.Pointer(&p[0]))), slba: uint64(off / blockSize),
	}
	status, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlSubmitIO, uintptr(unsafe.Pointer(&io)))
	runtime.KeepAlive(p)
	switch {
	case errno != 0:
		return errno
	case status != 0:
		return fmt.Errorf("status %#x", status)
	}
	return nil
}
