package vfiopci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// Numbers and layouts of linux/vfio.h and linux/iommufd.h, which x/sys/unix does not have. Structures are byte slices in the machine's
// order: all of them begin with their own size.

// Both headers make their requests by _IO(';', n).
const (
	vfio    = ';'<<8 + 100
	iommufd = ';'<<8 + 0x80
)

// linux/vfio.h
const (
	vfioGetAPIVersion     = vfio + 0
	vfioCheckExtension    = vfio + 1
	vfioSetIOMMU          = vfio + 2
	vfioGroupGetStatus    = vfio + 3
	vfioGroupSetContainer = vfio + 4
	vfioGroupGetDeviceFD  = vfio + 6
	vfioDeviceGetInfo     = vfio + 7
	vfioDeviceGetRegion   = vfio + 8
	vfioDeviceGetIRQ      = vfio + 9
	vfioDeviceSetIRQs     = vfio + 10
	vfioDeviceReset       = vfio + 11
	vfioIOMMUGetInfo      = vfio + 12
	vfioIOMMUMapDMA       = vfio + 13
	vfioIOMMUUnmapDMA     = vfio + 14
	vfioDeviceBindIOMMUFD = vfio + 18
	vfioDeviceAttachPT    = vfio + 19

	apiVersion = 0

	type1v2  = 3 // VFIO_TYPE1v2_IOMMU
	noIOMMU  = 8 // VFIO_NOIOMMU_IOMMU
	viable   = 1 << 0
	canReset = 1 << 0 // VFIO_DEVICE_FLAGS_RESET
	isPCI    = 1 << 1 // VFIO_DEVICE_FLAGS_PCI

	regionBAR0   = 0
	regionConfig = 7

	regionRead  = 1 << 0
	regionWrite = 1 << 1
	regionMmap  = 1 << 2
	regionCaps  = 1 << 3
	capSparse   = 1 // VFIO_REGION_INFO_CAP_SPARSE_MMAP

	irqMSI   = 1
	irqMSIX  = 2
	irqError = 3
	irqReq   = 4

	irqEventFD    = 1 << 0 // VFIO_IRQ_INFO_EVENTFD
	setEventFD    = 1 << 2 // VFIO_IRQ_SET_DATA_EVENTFD
	setTrigger    = 1 << 5 // VFIO_IRQ_SET_ACTION_TRIGGER
	iommuCaps     = 1 << 1 // VFIO_IOMMU_INFO_CAPS
	capIOVARanges = 1      // VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE
	dmaRead       = 1 << 0
	dmaWrite      = 1 << 1
)

// linux/iommufd.h
const (
	iommuIOASAlloc = iommufd + 1
	iommuIOASMap   = iommufd + 5
	iommuIOASUnmap = iommufd + 6

	ioasWrite = 1 << 1 // and not IOMMU_IOAS_MAP_FIXED_IOVA: the kernel chooses
	ioasRead  = 1 << 2
)

// maxInfo bounds an answer with capabilities.
const maxInfo = 64 << 10

var native = binary.NativeEndian

// words are a structure of 32-bit words, the first of which is its size.
func words(w ...uint32) []byte {
	b := make([]byte, 4+4*len(w))
	native.PutUint32(b, uint32(len(b)))
	for i, v := range w {
		native.PutUint32(b[4+4*i:], v)
	}
	return b
}

// with64 appends 64-bit words to a structure.
func with64(b []byte, w ...uint64) []byte {
	for _, v := range w {
		b = native.AppendUint64(b, v)
	}
	native.PutUint32(b, uint32(len(b)))
	return b
}

// info makes an INFO request: b is the structure without capabilities. If the answer has more, it is asked for again with room for that.
func info(k kernel, fd int, request uintptr, b []byte) ([]byte, error) {
	if _, err := k.ioctl(fd, request, b); err != nil {
		return nil, err
	}
	n := native.Uint32(b)
	if int(n) <= len(b) {
		return b, nil
	}
	if n > maxInfo {
		return nil, fmt.Errorf("an answer of %d bytes", n)
	}
	more := make([]byte, n)
	copy(more, b)
	_, err := k.ioctl(fd, request, more)
	return more, err
}

// capability returns what the first capability with an id has behind its header; nil: it is not there. next is the offset of the first.
func capability(b []byte, next uint32, id uint16) []byte {
	const header = 8
	for range len(b) / header {
		if next == 0 || uint64(next)+header > uint64(len(b)) {
			return nil
		}
		c := b[next:]
		if native.Uint16(c) == id {
			return c[header:]
		}
		next = native.Uint32(c[4:])
	}
	return nil
}

// span is part of a region, or of the space of IOVAs.
type span struct{ begin, end uint64 } // end: one behind the last; 0 stands for 2^64

// spans decodes a count, a reserved word, and as many pairs of 64-bit words.
func spans(c []byte, pair func(a, b uint64) span) ([]span, error) {
	if len(c) < 8 || uint64(len(c)) < 8+16*uint64(native.Uint32(c)) {
		return nil, errors.New("a capability that is cut off")
	}
	out := make([]span, 0, native.Uint32(c))
	for b := c[8 : 8+16*native.Uint32(c)]; len(b) > 0; b = b[16:] {
		out = append(out, pair(native.Uint64(b), native.Uint64(b[8:])))
	}
	return out, nil
}

// region is what VFIO_DEVICE_GET_REGION_INFO says.
type region struct {
	flags   uint32
	size    uint64
	offset  int64  // in the device's file
	mapable []span // parts that can be mapped
}

func regionInfo(k kernel, fd int, index uint32) (region, error) {
	b, err := info(k, fd, vfioDeviceGetRegion, with64(words(0, index, 0), 0, 0))
	if err != nil {
		return region{}, fmt.Errorf("region %d: %w", index, err)
	}
	r := region{flags: native.Uint32(b[4:]), size: native.Uint64(b[16:]), offset: int64(native.Uint64(b[24:]))}
	if r.flags&regionMmap == 0 {
		return r, nil
	}
	r.mapable = []span{{0, r.size}}
	if r.flags&regionCaps != 0 {
		if c := capability(b, native.Uint32(b[12:]), capSparse); c != nil {
			r.mapable, err = spans(c, func(off, size uint64) span { return span{off, off + size} })
		}
	}
	for _, s := range r.mapable {
		if s.begin%shm.PageSize != 0 || s.end < s.begin || s.end > r.size {
			return r, fmt.Errorf("region %d of %#x bytes can be mapped from %#x to %#x", index, r.size, s.begin, s.end)
		}
	}
	return r, err
}

// irqCount returns how many interrupts an index has that an eventfd can be given for.
func irqCount(k kernel, fd int, index uint32) int {
	b, err := info(k, fd, vfioDeviceGetIRQ, words(0, index, 0))
	if err != nil || native.Uint32(b[4:])&irqEventFD == 0 {
		return 0
	}
	return int(min(native.Uint32(b[12:]), 1<<16))
}

func setIRQs(k kernel, fd int, index uint32, eventFDs []int) error {
	b := words(setEventFD|setTrigger, index, 0, uint32(len(eventFDs)))
	for _, e := range eventFDs {
		b = native.AppendUint32(b, uint32(int32(e)))
	}
	native.PutUint32(b, uint32(len(b)))
	left, err := k.ioctl(fd, vfioDeviceSetIRQs, b)
	if err == nil && left > 0 {
		err = fmt.Errorf("the machine has no more than %d interrupt vectors for it", left)
	}
	return err
}

// iovaRanges returns where VFIO_IOMMU_MAP_DMA may put memory; nil: the kernel does not say.
func iovaRanges(k kernel, container int) ([]span, error) {
	b, err := info(k, container, vfioIOMMUGetInfo, with64(words(0), 0, 0))
	if errors.Is(err, syscall.ENOTTY) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(b) < 24 || native.Uint32(b[4:])&iommuCaps == 0 {
		return nil, nil
	}
	c := capability(b, native.Uint32(b[16:]), capIOVARanges)
	if c == nil {
		return nil, nil
	}
	return spans(c, func(first, last uint64) span { return span{first, last + 1} })
}
