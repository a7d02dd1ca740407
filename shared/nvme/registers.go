package nvme

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Byte offsets of the controller's registers in BAR0. NVMe Base 2.0c 3.1.3.
const (
	RegCAP     = 0x00 // 8 bytes
	RegVS      = 0x08
	RegINTMS   = 0x0C
	RegINTMC   = 0x10
	RegCC      = 0x14
	RegCSTS    = 0x1C
	RegNSSR    = 0x20
	RegAQA     = 0x24
	RegASQ     = 0x28 // 8 bytes
	RegACQ     = 0x30 // 8 bytes
	RegCMBLOC  = 0x38
	RegCMBSZ   = 0x3C
	RegBPINFO  = 0x40
	RegBPRSEL  = 0x44
	RegBPMBL   = 0x48 // 8 bytes
	RegCMBMSC  = 0x50 // 8 bytes
	RegCMBSTS  = 0x58
	RegCMBEBS  = 0x5C
	RegCMBSWTP = 0x60
	RegNSSD    = 0x64
	RegCRTO    = 0x68
	RegPMRCAP  = 0xE00

	// DoorbellBase is where the doorbells begin.
	DoorbellBase = 0x1000
)

// NSSRReset is the value ("NVMe") that, written to NSSR, resets the subsystem.
const NSSRReset = 0x4E564D65

var registerNames = map[uint32]string{
	RegCAP: "CAP", RegCAP + 4: "CAP+4", RegVS: "VS", RegINTMS: "INTMS", RegINTMC: "INTMC", RegCC: "CC", RegCSTS: "CSTS",
	RegNSSR: "NSSR", RegAQA: "AQA", RegASQ: "ASQ", RegASQ + 4: "ASQ+4", RegACQ: "ACQ", RegACQ + 4: "ACQ+4",
	RegCMBLOC: "CMBLOC", RegCMBSZ: "CMBSZ", RegBPINFO: "BPINFO", RegBPRSEL: "BPRSEL", RegBPMBL: "BPMBL", RegBPMBL + 4: "BPMBL+4",
	RegCMBMSC: "CMBMSC", RegCMBMSC + 4: "CMBMSC+4", RegCMBSTS: "CMBSTS", RegCMBEBS: "CMBEBS", RegCMBSWTP: "CMBSWTP",
	RegNSSD: "NSSD", RegCRTO: "CRTO", RegPMRCAP: "PMRCAP",
}

// RegisterName returns the name of the register at byte offset off below
// DoorbellBase, or "reg+0xNN".
func RegisterName(off uint32) string {
	if n, ok := registerNames[off]; ok {
		return n
	}
	return fmt.Sprintf("reg+%#x", off)
}

// SQTailDoorbell returns the offset in BAR0 of the tail doorbell of submission queue qid;
// dstrd is CAP.DSTRD. NVMe Base 2.0c 3.1.3.
func SQTailDoorbell(qid uint16, dstrd uint8) uint32 {
	return DoorbellBase + doorbellIndex(qid, 0, dstrd)
}

// CQHeadDoorbell returns the offset in BAR0 of the head doorbell of completion queue qid.
func CQHeadDoorbell(qid uint16, dstrd uint8) uint32 {
	return DoorbellBase + doorbellIndex(qid, 1, dstrd)
}

// DoorbellStride returns the bytes between two doorbells, 4 << DSTRD.
func DoorbellStride(dstrd uint8) uint32 { return 4 << (dstrd & 0xF) }

func doorbellIndex(qid uint16, cq uint32, dstrd uint8) uint32 {
	return (2*uint32(qid) + cq) * DoorbellStride(dstrd)
}

// ParseDoorbell is the inverse of SQTailDoorbell and CQHeadDoorbell: the queue, and whether its CQ
// head, of a doorbell at offset off of BAR0. ok is false for an offset between doorbells or below them.
func ParseDoorbell(off uint32, dstrd uint8) (qid uint16, cq, ok bool) {
	stride := DoorbellStride(dstrd)
	if off < DoorbellBase || (off-DoorbellBase)%stride != 0 {
		return 0, false, false
	}
	n := (off - DoorbellBase) / stride
	if n/2 > 0xFFFF {
		return 0, false, false
	}
	return uint16(n / 2), n&1 != 0, true
}

// CAP is Controller Capabilities. NVMe Base 2.0c 3.1.3.1.
type CAP uint64

func (c CAP) bits(shift, width uint) uint64 { return uint64(c) >> shift & (1<<width - 1) }

func (c CAP) with(shift, width uint, v uint64) CAP {
	mask := uint64(1<<width-1) << shift
	return CAP(uint64(c)&^mask | v<<shift&mask)
}

// MQES is the most entries that an I/O queue may have.
func (c CAP) MQES() ZeroBased16 { return ZeroBased16(c.bits(0, 16)) }

// CQR says that queues must be physically contiguous.
func (c CAP) CQR() bool { return c.bits(16, 1) != 0 }

// AMS is the arbitration mechanisms beside round robin: bit 0 weighted, bit 1 vendor specific.
func (c CAP) AMS() uint8 { return uint8(c.bits(17, 2)) }

// TO is the longest wait for CSTS.RDY in units of 500 ms.
func (c CAP) TO() uint8 { return uint8(c.bits(24, 8)) }

// Timeout is TO as a duration. A controller that says 0 gets one unit.
func (c CAP) Timeout() time.Duration {
	return time.Duration(max(c.TO(), 1)) * 500 * time.Millisecond
}

// DSTRD is the doorbell stride: 4 << DSTRD bytes.
func (c CAP) DSTRD() uint8 { return uint8(c.bits(32, 4)) }

// NSSRS says that NSSR works.
func (c CAP) NSSRS() bool { return c.bits(36, 1) != 0 }

// CSS is the command sets: bit 0 NVM, bit 6 those of CNS 1Ch, bit 7 none.
func (c CAP) CSS() uint8 { return uint8(c.bits(37, 8)) }

// BPS says that there are boot partitions.
func (c CAP) BPS() bool { return c.bits(45, 1) != 0 }

// CPS is the controller power scope.
func (c CAP) CPS() uint8 { return uint8(c.bits(46, 2)) }

// MPSMIN is the smallest memory page: 2^(12+MPSMIN) bytes.
func (c CAP) MPSMIN() uint8 { return uint8(c.bits(48, 4)) }

// MPSMAX is the largest memory page: 2^(12+MPSMAX) bytes.
func (c CAP) MPSMAX() uint8 { return uint8(c.bits(52, 4)) }

// PMRS says that there is a persistent memory region.
func (c CAP) PMRS() bool { return c.bits(56, 1) != 0 }

// CMBS says that there is a controller memory buffer.
func (c CAP) CMBS() bool { return c.bits(57, 1) != 0 }

// NSSS says that a subsystem shutdown is possible.
func (c CAP) NSSS() bool { return c.bits(58, 1) != 0 }

// CRMS is the ready modes: bit 0 with media, bit 1 independent of media.
func (c CAP) CRMS() uint8 { return uint8(c.bits(59, 2)) }

// Bits of CAP.AMS, CAP.CSS and CAP.CRMS.
const (
	CAPAMSWeighted = 1 << 0
	CAPCSSNVM      = 1 << 0
	CAPCSSIOCS     = 1 << 6
	CAPCSSNone     = 1 << 7
	CAPCRMSMedia   = 1 << 0
	CAPCRMSIndep   = 1 << 1
)

// The With methods return c with one field changed; a value too large for its field is cut.

func (c CAP) WithMQES(v ZeroBased16) CAP { return c.with(0, 16, uint64(v)) }
func (c CAP) WithCQR(on bool) CAP        { return c.with(16, 1, b2u(on)) }
func (c CAP) WithAMS(v uint8) CAP        { return c.with(17, 2, uint64(v)) }
func (c CAP) WithTO(v uint8) CAP         { return c.with(24, 8, uint64(v)) }
func (c CAP) WithDSTRD(v uint8) CAP      { return c.with(32, 4, uint64(v)) }
func (c CAP) WithNSSRS(on bool) CAP      { return c.with(36, 1, b2u(on)) }
func (c CAP) WithCSS(v uint8) CAP        { return c.with(37, 8, uint64(v)) }
func (c CAP) WithMPSMIN(v uint8) CAP     { return c.with(48, 4, uint64(v)) }
func (c CAP) WithMPSMAX(v uint8) CAP     { return c.with(52, 4, uint64(v)) }
func (c CAP) WithCRMS(v uint8) CAP       { return c.with(59, 2, uint64(v)) }

func (c CAP) String() string {
	var l fieldList
	l.value("MQES", uint64(c.MQES().Count()))
	l.flag("CQR", c.CQR())
	l.nonzero("AMS", uint64(c.AMS()))
	l.value("TO", uint64(c.TO()))
	l.value("DSTRD", uint64(c.DSTRD()))
	l.flag("NSSRS", c.NSSRS())
	l.hex("CSS", uint64(c.CSS()))
	l.flag("BPS", c.BPS())
	l.nonzero("CPS", uint64(c.CPS()))
	l.value("MPSMIN", uint64(c.MPSMIN()))
	l.value("MPSMAX", uint64(c.MPSMAX()))
	l.flag("PMRS", c.PMRS())
	l.flag("CMBS", c.CMBS())
	l.flag("NSSS", c.NSSS())
	l.nonzero("CRMS", uint64(c.CRMS()))
	return l.format("CAP", uint64(c))
}

// CC is Controller Configuration. NVMe Base 2.0c 3.1.3.5.
type CC uint32

func (c CC) bits(shift, width uint) uint8 { return uint8(uint32(c) >> shift & (1<<width - 1)) }

func (c CC) with(shift, width uint, v uint8) CC {
	mask := uint32(1<<width-1) << shift
	return CC(uint32(c)&^mask | uint32(v)<<shift&mask)
}

// EN is the enable bit.
func (c CC) EN() bool { return c&1 != 0 }

// CSS is the command set selected: 0 NVM, 6 those of the profile, 7 admin only.
func (c CC) CSS() uint8 { return c.bits(4, 3) }

// MPS is the memory page size: 2^(12+MPS) bytes.
func (c CC) MPS() uint8 { return c.bits(7, 4) }

// PageSize is MPS in bytes.
func (c CC) PageSize() uint32 { return 1 << (12 + c.MPS()) }

// AMS is the arbitration mechanism selected.
func (c CC) AMS() uint8 { return c.bits(11, 3) }

// SHN is the shutdown notification: 0 none, 1 normal, 2 abrupt.
func (c CC) SHN() uint8 { return c.bits(14, 2) }

// IOSQES is the size of an I/O SQE: 2^IOSQES bytes.
func (c CC) IOSQES() uint8 { return c.bits(16, 4) }

// IOCQES is the size of an I/O CQE: 2^IOCQES bytes.
func (c CC) IOCQES() uint8 { return c.bits(20, 4) }

// CRIME chooses ready independent of media.
func (c CC) CRIME() bool { return c.bits(24, 1) != 0 }

// Values of CC.AMS, CC.SHN and CC.CSS.
const (
	AMSRoundRobin = 0
	AMSWeighted   = 1 // weighted round robin with urgent priority class
	SHNNone       = 0
	SHNNormal     = 1
	SHNAbrupt     = 2
	CSSNVM        = 0
	CSSIOCS       = 6
	CSSAdmin      = 7
)

// The With methods return c with one field changed; a value too large for its field is cut.

func (c CC) WithEN(on bool) CC     { return c.with(0, 1, uint8(b2u(on))) }
func (c CC) WithCSS(v uint8) CC    { return c.with(4, 3, v) }
func (c CC) WithMPS(v uint8) CC    { return c.with(7, 4, v) }
func (c CC) WithAMS(v uint8) CC    { return c.with(11, 3, v) }
func (c CC) WithSHN(v uint8) CC    { return c.with(14, 2, v) }
func (c CC) WithIOSQES(v uint8) CC { return c.with(16, 4, v) }
func (c CC) WithIOCQES(v uint8) CC { return c.with(20, 4, v) }
func (c CC) WithCRIME(on bool) CC  { return c.with(24, 1, uint8(b2u(on))) }

func (c CC) String() string {
	var l fieldList
	l.flag("EN", c.EN())
	l.nonzero("CSS", uint64(c.CSS()))
	l.nonzero("MPS", uint64(c.MPS()))
	l.nonzero("AMS", uint64(c.AMS()))
	l.nonzero("SHN", uint64(c.SHN()))
	l.nonzero("IOSQES", uint64(c.IOSQES()))
	l.nonzero("IOCQES", uint64(c.IOCQES()))
	l.flag("CRIME", c.CRIME())
	return l.format("CC", uint64(c))
}

// CSTS is Controller Status. NVMe Base 2.0c 3.1.3.6.
type CSTS uint32

// Values of CSTS.SHST.
const (
	SHSTNormal   = 0 // no shutdown asked for
	SHSTOccurs   = 1
	SHSTComplete = 2
)

// RDY says that the controller takes commands.
func (c CSTS) RDY() bool { return c&1 != 0 }

// CFS says that the controller has failed.
func (c CSTS) CFS() bool { return c&2 != 0 }

// SHST is the state of the shutdown.
func (c CSTS) SHST() uint8 { return uint8(c>>2) & 3 }

// NSSRO says that the subsystem was reset while power stayed on.
func (c CSTS) NSSRO() bool { return c&(1<<4) != 0 }

// PP says that command processing is paused.
func (c CSTS) PP() bool { return c&(1<<5) != 0 }

// ST says that the shutdown is one of the subsystem.
func (c CSTS) ST() bool { return c&(1<<6) != 0 }

// The With methods return c with one field changed.

func (c CSTS) WithRDY(on bool) CSTS    { return c&^1 | CSTS(b2u(on)) }
func (c CSTS) WithCFS(on bool) CSTS    { return c&^2 | CSTS(b2u(on))<<1 }
func (c CSTS) WithSHST(v uint8) CSTS   { return c&^(3<<2) | CSTS(v&3)<<2 }
func (c CSTS) WithNSSRO(on bool) CSTS  { return c&^(1<<4) | CSTS(b2u(on))<<4 }
func (c CSTS) WithPaused(on bool) CSTS { return c&^(1<<5) | CSTS(b2u(on))<<5 }

func (c CSTS) String() string {
	var l fieldList
	l.flag("RDY", c.RDY())
	l.flag("CFS", c.CFS())
	l.nonzero("SHST", uint64(c.SHST()))
	l.flag("NSSRO", c.NSSRO())
	l.flag("PP", c.PP())
	l.flag("ST", c.ST())
	return l.format("CSTS", uint64(c))
}

// AQA is Admin Queue Attributes. NVMe Base 2.0c 3.1.3.8.
type AQA uint32

// ASQS is the number of entries of the admin SQ, 1 to 4096.
func (a AQA) ASQS() ZeroBased16 { return ZeroBased16(a & 0xFFF) }

// ACQS is the number of entries of the admin CQ, 1 to 4096.
func (a AQA) ACQS() ZeroBased16 { return ZeroBased16(a >> 16 & 0xFFF) }

// The With methods return a with one field changed; sizes above 4096 do not fit and are cut.

func (a AQA) WithASQS(v ZeroBased16) AQA { return a&^0xFFF | AQA(v&0xFFF) }
func (a AQA) WithACQS(v ZeroBased16) AQA { return a&^(0xFFF<<16) | AQA(v&0xFFF)<<16 }

func (a AQA) String() string {
	var l fieldList
	l.value("ASQS", uint64(a.ASQS().Count()))
	l.value("ACQS", uint64(a.ACQS().Count()))
	return l.format("AQA", uint64(a))
}

// Version is VS, and VER of Identify Controller. NVMe Base 2.0c 3.1.3.2.
type Version uint32

// MakeVersion returns version major.minor.tertiary.
func MakeVersion(major uint16, minor, tertiary uint8) Version {
	return Version(uint32(major)<<16 | uint32(minor)<<8 | uint32(tertiary))
}

// The parts of the number.

func (v Version) Major() uint16   { return uint16(v >> 16) }
func (v Version) Minor() uint8    { return uint8(v >> 8) }
func (v Version) Tertiary() uint8 { return uint8(v) }

// String prints "1.4", or "1.2.1" when there is a tertiary number.
func (v Version) String() string {
	s := strconv.Itoa(int(v.Major())) + "." + strconv.Itoa(int(v.Minor()))
	if v.Tertiary() != 0 {
		s += "." + strconv.Itoa(int(v.Tertiary()))
	}
	return s
}

func b2u(on bool) uint64 {
	if on {
		return 1
	}
	return 0
}

// fieldList collects what a register holds, for its String.
type fieldList struct{ parts []string }

func (l *fieldList) flag(name string, on bool) {
	if on {
		l.parts = append(l.parts, name)
	}
}

func (l *fieldList) value(name string, v uint64) {
	l.parts = append(l.parts, name+"="+strconv.FormatUint(v, 10))
}

func (l *fieldList) hex(name string, v uint64) {
	l.parts = append(l.parts, name+"=0x"+strconv.FormatUint(v, 16))
}

func (l *fieldList) nonzero(name string, v uint64) {
	if v != 0 {
		l.value(name, v)
	}
}

func (l *fieldList) format(name string, v uint64) string {
	s := name + "=0x" + strconv.FormatUint(v, 16)
	if len(l.parts) == 0 {
		return s
	}
	return s + " (" + strings.Join(l.parts, ", ") + ")"
}
