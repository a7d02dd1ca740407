package nvme

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// IdentifyNamespace is the Identify Namespace structure of the NVM command set, 4096
// bytes. NVM Command Set 1.0c 4.1.5.1, figure 97.
type IdentifyNamespace struct {
	NSZE     uint64 // logical blocks
	NCAP     uint64 // logical blocks
	NUSE     uint64 // logical blocks
	NSFEAT   uint8
	NLBAF    ZeroBased8
	FLBAS    uint8 // index of the format in bits 3:0 (and 6:5), metadata at the end of data in bit 4
	MC       uint8
	DPC      uint8
	DPS      uint8
	NMIC     uint8
	RESCAP   uint8
	FPI      uint8
	DLFEAT   uint8
	NAWUN    ZeroBased16
	NAWUPF   ZeroBased16
	NACWU    ZeroBased16
	NABSN    ZeroBased16
	NABO     uint16
	NABSPF   ZeroBased16
	NOIOB    uint16 // logical blocks; 0: none said
	NVMCAP   Uint128
	NPWG     ZeroBased16 // with NSFEATOptPerf
	NPWA     ZeroBased16 // with NSFEATOptPerf
	NPDG     ZeroBased16 // with NSFEATOptPerf
	NPDA     ZeroBased16 // with NSFEATOptPerf
	NOWS     ZeroBased16 // with NSFEATOptPerf
	MSSRL    uint16
	MCL      uint32
	MSRC     ZeroBased8
	_        [11]byte
	ANAGRPID uint32
	_        [3]byte
	NSATTR   uint8
	NVMSETID uint16
	ENDGID   uint16
	NGUID    [16]byte // big-endian
	EUI64    [8]byte  // big-endian
	LBAF     [64]LBAFormat

	VendorSpecific [3712]byte
}

// Bits of IdentifyNamespace.NSFEAT.
const (
	NSFEATThin         = 1 << 0
	NSFEATAtomics      = 1 << 1 // NAWUN, NAWUPF and NACWU hold
	NSFEATDeallocError = 1 << 2
	NSFEATUIDReuse     = 1 << 3
	NSFEATOptPerf      = 1 << 4 // NPWG, NPWA, NPDG, NPDA and NOWS hold
)

// Values and bits of IdentifyNamespace.DLFEAT.
const (
	DLFEATReadUnknown = 0 // what a deallocated block reads as: not said
	DLFEATReadZeroes  = 1
	DLFEATReadOnes    = 2
	DLFEATReadMask    = 7
	DLFEATWZDealloc   = 1 << 3 // Write Zeroes with DEAC deallocates
	DLFEATGuard       = 1 << 4
)

// Bits of IdentifyNamespace.NSATTR and NMIC.
const (
	NSATTRWriteProtected = 1 << 0
	NMICShared           = 1 << 0
)

// LBAFormat says how a namespace is cut into logical blocks, 4 bytes. NVM Command Set 1.0c figure 98.
type LBAFormat struct {
	MS    uint16 // metadata bytes per logical block
	LBADS uint8  // 2^LBADS bytes of data; 0: format not available
	RP    uint8  // relative performance in bits 1:0, 0 best
}

func (f LBAFormat) String() string {
	return fmt.Sprintf("lbads=%d ms=%d rp=%d", f.LBADS, f.MS, f.RP&3)
}

// FormatIndex is the index into LBAF of the format in use, 0 to 63.
func (n *IdentifyNamespace) FormatIndex() uint8 {
	i := n.FLBAS & 0xF
	if n.NLBAF > 15 {
		i |= n.FLBAS >> 5 & 3 << 4
	}
	return i
}

// Format returns the format in use.
func (n *IdentifyNamespace) Format() LBAFormat { return n.LBAF[n.FormatIndex()] }

// BlockSize returns the bytes of data of a logical block; ok is false when the format in use is not
// one of the at least 512 and at most 2^31 bytes that this project handles.
func (n *IdentifyNamespace) BlockSize() (size uint32, ok bool) {
	f := n.Format()
	if f.LBADS < 9 || f.LBADS > 31 {
		return 0, false
	}
	return 1 << f.LBADS, true
}

// IdentifyIndependentNamespace is Identify CNS 08h, 4096 bytes. NVMe Base 2.0c 5.17.2.8.
type IdentifyIndependentNamespace struct {
	NSFEAT   uint8
	NMIC     uint8
	RESCAP   uint8
	FPI      uint8
	ANAGRPID uint32
	NSATTR   uint8
	_        uint8
	NVMSETID uint16
	ENDGID   uint16
	NSTAT    uint8
	_        [4081]byte
}

// NSTATReady is the bit of NSTAT that says the namespace takes I/O.
const NSTATReady = 1 << 0

// NamespaceList is a list of up to 1024 namespace ids in rising order, ended by 0 when shorter:
// Identify CNS 02h, and the Changed Namespace List log. NVMe Base 2.0c 5.17.2.2.
type NamespaceList struct {
	ID [1024]uint32
}

// Len returns how many ids there are before the first 0.
func (l *NamespaceList) Len() int {
	for i, id := range l.ID {
		if id == 0 {
			return i
		}
	}
	return len(l.ID)
}

// NamespaceDescriptors is what Identify CNS 03h says a namespace is called. NVMe Base 2.0c 5.17.2.3.
type NamespaceDescriptors struct {
	EUI64    [8]byte
	NGUID    [16]byte
	UUID     [16]byte
	CSI      CSI
	HasEUI64 bool
	HasNGUID bool
	HasUUID  bool
	HasCSI   bool
}

// Namespace identifier types (NIDT).
const (
	NIDTEUI64 = 1
	NIDTNGUID = 2
	NIDTUUID  = 3
	NIDTCSI   = 4
)

const nidHeader = 4

// Encode fills b with the descriptors that d has, the rest with zeroes.
func (d *NamespaceDescriptors) Encode(b *[IdentifySize]byte) {
	clear(b[:])
	n := 0
	put := func(has bool, nidt uint8, id []byte) {
		if !has {
			return
		}
		b[n], b[n+1] = nidt, uint8(len(id))
		n += nidHeader + copy(b[n+nidHeader:], id)
	}
	put(d.HasEUI64, NIDTEUI64, d.EUI64[:])
	put(d.HasNGUID, NIDTNGUID, d.NGUID[:])
	put(d.HasUUID, NIDTUUID, d.UUID[:])
	put(d.HasCSI, NIDTCSI, []byte{uint8(d.CSI)})
}

// Decode reads the descriptors in b, up to the first with no length or one that runs over the end.
// A type that it does not know, or of another length than the specification gives it, is skipped.
func (d *NamespaceDescriptors) Decode(b *[IdentifySize]byte) {
	*d = NamespaceDescriptors{}
	for rest := b[:]; len(rest) > nidHeader; {
		nidt, nidl := rest[0], int(rest[1])
		if nidl == 0 || nidHeader+nidl > len(rest) {
			return
		}
		id := rest[nidHeader : nidHeader+nidl]
		rest = rest[nidHeader+nidl:]
		switch {
		case nidt == NIDTEUI64 && nidl == len(d.EUI64):
			d.HasEUI64 = true
			copy(d.EUI64[:], id)
		case nidt == NIDTNGUID && nidl == len(d.NGUID):
			d.HasNGUID = true
			copy(d.NGUID[:], id)
		case nidt == NIDTUUID && nidl == len(d.UUID):
			d.HasUUID = true
			copy(d.UUID[:], id)
		case nidt == NIDTCSI && nidl == 1:
			d.HasCSI = true
			d.CSI = CSI(id[0])
		}
	}
}

// FormatUUID prints a UUID as 8-4-4-4-12 hexadecimal digits.
func FormatUUID(u [16]byte) string {
	return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x",
		binary.BigEndian.Uint32(u[:]), binary.BigEndian.Uint16(u[4:]), binary.BigEndian.Uint16(u[6:]), binary.BigEndian.Uint16(u[8:]), u[10:])
}

// ParseUUID reads what FormatUUID prints, in either case. The UUID of zeroes is none.
func ParseUUID(s string) (u [16]byte, ok bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	copy(u[:], b)
	return u, err == nil && len(b) == len(u) && strings.EqualFold(FormatUUID(u), s) && u != [16]byte{}
}
