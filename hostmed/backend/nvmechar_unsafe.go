package backend

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// The numbers of include/uapi/linux/nvme_ioctl.h.
const (
	nvmeIoctlID     = 0x4e40     // _IO('N', 0x40)
	nvmeIoctlAdmin  = 0xc0484e41 // _IOWR('N', 0x41, struct nvme_passthru_cmd)
	nvmeIoctlIO     = 0xc0484e43 // _IOWR('N', 0x43, struct nvme_passthru_cmd)
	nvmeURingIO     = 0xc0484e80 // _IOWR('N', 0x80, struct nvme_uring_cmd)
	nvmeURingIOVec  = 0xc0484e81 // _IOWR('N', 0x81, struct nvme_uring_cmd)
	passthruSize    = 72
	passthruAligned = 80 // room for it in an entry of 128 bytes
)

// passthru is struct nvme_passthru_cmd, and struct nvme_uring_cmd, which has no result.
type passthru struct {
	Opcode, Flags                uint8
	_                            uint16
	NSID, CDW2, CDW3             uint32
	Metadata, Addr               uint64
	MetadataLen, DataLen         uint32 // DataLen: bytes, of nvmeURingIOVec how many pieces
	CDW10, CDW11, CDW12, CDW13   uint32
	CDW14, CDW15, TimeoutMS, DW0 uint32
}

var (
	_ [passthruSize]byte = [unsafe.Sizeof(passthru{})]byte{}
	_ [nvme.DSMRangeSize]byte
)

// passthruIn is the passthru in the room that a ring's entry has for it.
func passthruIn(room []byte) *passthru {
	_ = room[passthruAligned-1]
	return (*passthru)(unsafe.Pointer(unsafe.SliceData(room)))
}

// addressOfPieces is for an entry of a ring: vec must not be on a stack, and must stay.
func addressOfPieces(vec []Seg) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(vec)))) }

// ioctlPassthru runs c, with data as its data, and returns the result of the system call: minus an errno, or the NVMe status.
func ioctlPassthru(fd int, request uintptr, c *passthru, data []byte) (nvme.Status, error) {
	c.Addr, c.DataLen = uint64(address(data)), uint32(len(data))
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(c)))
		runtime.KeepAlive(data)
		switch errno {
		case 0:
			return nvme.Status(n) & statusField, nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// rangesOf is a list of Dataset Management, of as many as v has room for.
func rangesOf(v *Seg) []nvme.DSMRange {
	return unsafe.Slice((*nvme.DSMRange)(unsafe.Pointer(v.Base)), v.Len/nvme.DSMRangeSize)
}

// sourcesOf is the list of a Copy.
func sourcesOf(v *Seg) []nvme.CopyRange {
	return unsafe.Slice((*nvme.CopyRange)(unsafe.Pointer(v.Base)), v.Len/nvme.CopyRangeSize)
}
