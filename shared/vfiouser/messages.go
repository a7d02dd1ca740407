package vfiouser

import "encoding/binary"

// Sizes in bytes of the fixed part of each payload.
const (
	DMAMapSize       = 32
	DMAUnmapSize     = 24
	DeviceInfoSize   = 16
	RegionInfoSize   = 32
	IRQInfoSize      = 16
	SetIRQsSize      = 20
	RegionAccessSize = 16
)

var le = binary.LittleEndian

// Flags of a DMA_MAP. The last two are libvfio-user's; they restrict how a
// server may reach memory that came with a file descriptor.
const (
	DMARead   uint32 = 1 << 0
	DMAWrite  uint32 = 1 << 1
	DMAMmap   uint32 = 1 << 2
	DMAFileIO uint32 = 1 << 3

	dmaMapFlags = DMARead | DMAWrite | DMAMmap | DMAFileIO
)

// DMAMap is the request of DMA_MAP; vfio-user 0.9.1 "VFIO_USER_DMA_MAP".
type DMAMap struct {
	Flags  uint32
	Offset uint64 // into the file; a multiple of the page size
	IOVA   uint64
	Size   uint64 // bytes
}

// Append appends the 32-byte request to b.
func (m *DMAMap) Append(b []byte) []byte {
	b = le.AppendUint32(b, DMAMapSize)
	b = le.AppendUint32(b, m.Flags)
	b = le.AppendUint64(b, m.Offset)
	b = le.AppendUint64(b, m.IOVA)
	return le.AppendUint64(b, m.Size)
}

// ParseDMAMap reads a request; false if it is too short.
func ParseDMAMap(p []byte) (m DMAMap, ok bool) {
	if len(p) < DMAMapSize || le.Uint32(p) < DMAMapSize {
		return DMAMap{}, false
	}
	return DMAMap{Flags: le.Uint32(p[4:]), Offset: le.Uint64(p[8:]), IOVA: le.Uint64(p[16:]), Size: le.Uint64(p[24:])}, true
}

// Flags of a DMA_UNMAP, as in linux/vfio.h.
const (
	UnmapDirtyBitmap uint32 = 1 << 0
	UnmapAll         uint32 = 1 << 1
)

// DMAUnmap is the request of DMA_UNMAP, and what its reply echoes; vfio-user
// 0.9.1 "VFIO_USER_DMA_UNMAP".
type DMAUnmap struct {
	Flags uint32
	IOVA  uint64
	Size  uint64 // bytes; IOVA+Size may be 2^64
}

// Append appends the 24-byte request to b.
func (m *DMAUnmap) Append(b []byte) []byte {
	b = le.AppendUint32(b, DMAUnmapSize)
	b = le.AppendUint32(b, m.Flags)
	b = le.AppendUint64(b, m.IOVA)
	return le.AppendUint64(b, m.Size)
}

// ParseDMAUnmap reads a request; false if it is too short.
func ParseDMAUnmap(p []byte) (m DMAUnmap, ok bool) {
	if len(p) < DMAUnmapSize || le.Uint32(p) < DMAUnmapSize {
		return DMAUnmap{}, false
	}
	return DMAUnmap{Flags: le.Uint32(p[4:]), IOVA: le.Uint64(p[8:]), Size: le.Uint64(p[16:])}, true
}

// Flags of DeviceInfo.
const (
	DeviceReset uint32 = 1 << 0
	DevicePCI   uint32 = 1 << 1
)

// What a vfio PCI device has, by index; linux/vfio.h.
const (
	RegionBAR0   uint32 = 0 // BAR n is region n
	RegionROM    uint32 = 6
	RegionConfig uint32 = 7
	RegionVGA    uint32 = 8
	NumRegions   uint32 = 9

	IRQINTx uint32 = 0
	IRQMSI  uint32 = 1
	IRQMSIX uint32 = 2
	IRQErr  uint32 = 3
	IRQReq  uint32 = 4
	NumIRQs uint32 = 5
)

// DeviceInfo describes the device; vfio-user 0.9.1 "VFIO_USER_DEVICE_GET_INFO".
type DeviceInfo struct {
	Flags      uint32
	NumRegions uint32
	NumIRQs    uint32
}

// Append appends the 16-byte payload, request or reply, to b.
func (m *DeviceInfo) Append(b []byte) []byte {
	b = le.AppendUint32(b, DeviceInfoSize)
	b = le.AppendUint32(b, m.Flags)
	b = le.AppendUint32(b, m.NumRegions)
	return le.AppendUint32(b, m.NumIRQs)
}

// AppendReply appends the payload for a client with room for argsz bytes: with cap_offset, which is 0, for one
// that takes struct vfio_device_info as it has been since Linux 5.11 (Cloud Hypervisor waits for it).
func (m *DeviceInfo) AppendReply(b []byte, argsz uint32) []byte {
	const withCaps = DeviceInfoSize + 4
	at := len(b)
	b = m.Append(b)
	if argsz >= withCaps {
		b = le.AppendUint32(b, 0)
		le.PutUint32(b[at:], withCaps)
	}
	return b
}

// ParseDeviceInfo reads a payload; false if it, or the argsz in it, is too short.
func ParseDeviceInfo(p []byte) (m DeviceInfo, ok bool) {
	if len(p) < DeviceInfoSize || le.Uint32(p) < DeviceInfoSize {
		return DeviceInfo{}, false
	}
	return DeviceInfo{Flags: le.Uint32(p[4:]), NumRegions: le.Uint32(p[8:]), NumIRQs: le.Uint32(p[12:])}, true
}

// Flags of RegionInfo. RegionCaps is the codec's own: devices do not set it.
const (
	RegionRead  uint32 = 1 << 0
	RegionWrite uint32 = 1 << 1
	RegionMmap  uint32 = 1 << 2
	RegionCaps  uint32 = 1 << 3
)

const (
	capHeaderSize    = 8
	capSparseMmap    = 1 // VFIO_REGION_INFO_CAP_SPARSE_MMAP
	capSparseVersion = 1
	capSparseSize    = capHeaderSize + 8 // and 16 for each area
	mmapAreaSize     = 16

	// maxAreas bounds a sparse mmap capability, in both directions.
	maxAreas = 64
	// maxRegionCaps bounds a walk along a capability list.
	maxRegionCaps = 16
)

// MmapArea is a part of a region that the client may map.
type MmapArea struct {
	Offset uint64 // from the region's start, bytes; page aligned
	Size   uint64 // bytes
}

// RegionInfo describes a region; vfio-user 0.9.1
// "VFIO_USER_DEVICE_GET_REGION_INFO".
type RegionInfo struct {
	Index  uint32
	Flags  uint32
	Size   uint64 // bytes; 0: the region does not exist
	Offset uint64 // of the region's start in FD

	// Areas are the parts that may be mapped; none, with RegionMmap set, means all of
	// it. One file descriptor serves all of them, as QEMU wants it: area a is mapped at
	// Offset+a.Offset.
	Areas []MmapArea

	// FD counts only when RegionMmap is set. From a device it is borrowed; from a
	// client's RegionInfo it belongs to the caller, and is -1 if the server sent none.
	FD int
}

// replySize is the argsz of a full reply.
func (m *RegionInfo) replySize() uint32 {
	if len(m.Areas) == 0 {
		return RegionInfoSize
	}
	return RegionInfoSize + capSparseSize + mmapAreaSize*uint32(len(m.Areas))
}

func (m *RegionInfo) appendFixed(b []byte, argsz, flags, capOffset uint32) []byte {
	b = le.AppendUint32(b, argsz)
	b = le.AppendUint32(b, flags)
	b = le.AppendUint32(b, m.Index)
	b = le.AppendUint32(b, capOffset)
	b = le.AppendUint64(b, m.Size)
	return le.AppendUint64(b, m.Offset)
}

// AppendRequest appends the 32-byte request for region m.Index to b; argsz is the
// longest reply payload that the caller takes.
func (m *RegionInfo) AppendRequest(b []byte, argsz uint32) []byte {
	r := RegionInfo{Index: m.Index}
	return r.appendFixed(b, argsz, 0, 0)
}

// AppendReply appends the reply to a request with this argsz. If it all fits, caps are
// there and full is true; otherwise only the fixed 32 bytes, with the argsz that is
// needed and without the CAPS flag, since QEMU takes a CAPS flag without
// capabilities for an error.
func (m *RegionInfo) AppendReply(b []byte, argsz uint32) (out []byte, full bool) {
	need := m.replySize()
	flags := m.Flags &^ RegionCaps
	if need == RegionInfoSize || argsz < need {
		return m.appendFixed(b, need, flags, 0), argsz >= need
	}
	b = m.appendFixed(b, need, flags|RegionCaps, RegionInfoSize)
	b = le.AppendUint16(b, capSparseMmap)
	b = le.AppendUint16(b, capSparseVersion)
	b = le.AppendUint32(b, 0) // next
	b = le.AppendUint32(b, uint32(len(m.Areas)))
	b = le.AppendUint32(b, 0)
	for _, a := range m.Areas {
		b = le.AppendUint64(b, a.Offset)
		b = le.AppendUint64(b, a.Size)
	}
	return b, true
}

// ParseRegionInfo reads a reply, or a request, of which only Index counts, and
// returns its argsz too. It is false if p is too short, or if its capabilities do
// not lie in it, loop, or name areas outside the region. A reply whose argsz is
// above len(p) is not full: its capabilities are not looked at. FD is set to -1.
func ParseRegionInfo(p []byte) (m RegionInfo, argsz uint32, ok bool) {
	if len(p) < RegionInfoSize {
		return RegionInfo{FD: -1}, 0, false
	}
	argsz = le.Uint32(p)
	m = RegionInfo{Index: le.Uint32(p[8:]), Flags: le.Uint32(p[4:]), Size: le.Uint64(p[16:]), Offset: le.Uint64(p[24:]), FD: -1}
	if argsz < RegionInfoSize {
		return m, argsz, false
	}
	if m.Flags&RegionCaps == 0 {
		return m, argsz, true
	}
	if uint64(argsz) > uint64(len(p)) {
		return m, argsz, true
	}
	sparse, ok := findSparse(p, le.Uint32(p[12:]))
	if !ok || sparse == nil {
		return m, argsz, ok
	}
	if m.Areas, ok = parseAreas(sparse, m.Size); len(m.Areas) == 0 {
		m.Flags &^= RegionMmap // a list of nothing is not "all of it"
	}
	return m, argsz, ok
}

// findSparse walks the capability list from offset off, relative to p, and returns p
// from its sparse mmap capability on, or nil.
func findSparse(p []byte, off uint32) ([]byte, bool) {
	for range maxRegionCaps {
		if off < RegionInfoSize || uint64(off)+capHeaderSize > uint64(len(p)) {
			return nil, false
		}
		c := p[off:]
		if le.Uint16(c) == capSparseMmap {
			return c, true
		}
		if off = le.Uint32(c[4:]); off == 0 {
			return nil, true
		}
	}
	return nil, false
}

func parseAreas(c []byte, regionSize uint64) ([]MmapArea, bool) {
	if len(c) < capSparseSize {
		return nil, false
	}
	n := le.Uint32(c[8:])
	if c = c[capSparseSize:]; n > maxAreas || int(n)*mmapAreaSize > len(c) {
		return nil, false
	}
	areas := make([]MmapArea, 0, n)
	for ; n > 0; n-- {
		a := MmapArea{Offset: le.Uint64(c), Size: le.Uint64(c[8:])}
		c = c[mmapAreaSize:]
		if a.Offset > regionSize || a.Size > regionSize-a.Offset {
			return nil, false
		}
		if a.Size != 0 {
			areas = append(areas, a)
		}
	}
	return areas, true
}

// Flags of IRQInfo.
const (
	IRQEventFD    uint32 = 1 << 0
	IRQMaskable   uint32 = 1 << 1
	IRQAutomasked uint32 = 1 << 2
	IRQNoResize   uint32 = 1 << 3
)

// IRQInfo describes one interrupt type; vfio-user 0.9.1
// "VFIO_USER_DEVICE_GET_IRQ_INFO".
type IRQInfo struct {
	Index uint32
	Flags uint32
	Count uint32 // vectors; 0: the device has no such interrupt
}

// Append appends the 16-byte payload, request or reply, to b.
func (m *IRQInfo) Append(b []byte) []byte {
	b = le.AppendUint32(b, IRQInfoSize)
	b = le.AppendUint32(b, m.Flags)
	b = le.AppendUint32(b, m.Index)
	return le.AppendUint32(b, m.Count)
}

// ParseIRQInfo reads a payload; false if it, or the argsz in it, is too short.
func ParseIRQInfo(p []byte) (m IRQInfo, ok bool) {
	if len(p) < IRQInfoSize || le.Uint32(p) < IRQInfoSize {
		return IRQInfo{}, false
	}
	return IRQInfo{Flags: le.Uint32(p[4:]), Index: le.Uint32(p[8:]), Count: le.Uint32(p[12:])}, true
}

// Flags of SetIRQs: one of the first three and one of the last three.
const (
	IRQSetDataNone    uint32 = 1 << 0
	IRQSetDataBool    uint32 = 1 << 1
	IRQSetDataEventFD uint32 = 1 << 2
	IRQSetMask        uint32 = 1 << 3
	IRQSetUnmask      uint32 = 1 << 4
	IRQSetTrigger     uint32 = 1 << 5

	irqSetDataMask   = IRQSetDataNone | IRQSetDataBool | IRQSetDataEventFD
	irqSetActionMask = IRQSetMask | IRQSetUnmask | IRQSetTrigger
)

// SetIRQs is the request of DEVICE_SET_IRQS; vfio-user 0.9.1
// "VFIO_USER_DEVICE_SET_IRQS".
type SetIRQs struct {
	Flags uint32
	Index uint32
	Start uint32 // first vector
	Count uint32 // vectors
	Bools []byte // with IRQSetDataBool: Count bytes, not zero = act on this vector
}

// DisableAll reports whether the request takes down every vector of the index:
// no data, no vectors.
func (m *SetIRQs) DisableAll() bool {
	return m.Flags == IRQSetDataNone|IRQSetTrigger && m.Start == 0 && m.Count == 0
}

// Append appends the request to b. As in QEMU, argsz does not count eventfds.
func (m *SetIRQs) Append(b []byte) []byte {
	b = le.AppendUint32(b, SetIRQsSize+uint32(len(m.Bools)))
	b = le.AppendUint32(b, m.Flags)
	b = le.AppendUint32(b, m.Index)
	b = le.AppendUint32(b, m.Start)
	b = le.AppendUint32(b, m.Count)
	return append(b, m.Bools...)
}

// ParseSetIRQs reads a request; false if it is too short, for its booleans too.
// Bools shares p's memory.
func ParseSetIRQs(p []byte) (m SetIRQs, ok bool) {
	if len(p) < SetIRQsSize || le.Uint32(p) < SetIRQsSize {
		return SetIRQs{}, false
	}
	m = SetIRQs{Flags: le.Uint32(p[4:]), Index: le.Uint32(p[8:]), Start: le.Uint32(p[12:]), Count: le.Uint32(p[16:])}
	if m.Flags&IRQSetDataBool != 0 {
		if uint64(m.Count) > uint64(len(p)-SetIRQsSize) {
			return SetIRQs{}, false
		}
		m.Bools = p[SetIRQsSize : SetIRQsSize+int(m.Count) : SetIRQsSize+int(m.Count)]
	}
	return m, true
}

// AppendRegionAccess appends the 16 bytes that REGION_READ and REGION_WRITE, and
// their replies, begin with; vfio-user 0.9.1 "Read and Write Operations".
func AppendRegionAccess(b []byte, off uint64, region, count uint32) []byte {
	b = le.AppendUint64(b, off)
	b = le.AppendUint32(b, region)
	return le.AppendUint32(b, count)
}

// ParseRegionAccess reads a REGION_READ or REGION_WRITE, request or reply. If ok,
// data is empty or holds exactly count bytes; it shares payload's memory. A write
// whose data is empty and whose count is not 0 is for the caller to refuse. The reply
// to a write is the first RegionAccessSize bytes of its payload.
func ParseRegionAccess(payload []byte) (off uint64, region uint32, count uint32, data []byte, ok bool) {
	if len(payload) < RegionAccessSize {
		return 0, 0, 0, nil, false
	}
	off, region, count = le.Uint64(payload), le.Uint32(payload[8:]), le.Uint32(payload[12:])
	data = payload[RegionAccessSize:]
	return off, region, count, data, len(data) == 0 || uint64(len(data)) == uint64(count)
}
