package nvme

// Command is a submission queue entry, 64 bytes. NVMe Base 2.0c 3.3.3.1.
type Command struct {
	Opcode uint8
	Flags  uint8 // FUSE in bits 1:0, PSDT in bits 7:6
	CID    uint16
	NSID   uint32
	CDW2   uint32
	CDW3   uint32
	MPTR   uint64
	PRP1   uint64
	PRP2   uint64
	CDW10  uint32
	CDW11  uint32
	CDW12  uint32
	CDW13  uint32
	CDW14  uint32
	CDW15  uint32
}

// Sizes in bytes. CC.IOSQES and CC.IOCQES hold the powers of two.
const (
	CommandSize    = 64
	CompletionSize = 16
	DSMRangeSize   = 16
)

// NSIDAll addresses every namespace of the controller.
const NSIDAll = 0xFFFFFFFF

// Values of Command.FUSE.
const (
	FuseNormal = 0
	FuseFirst  = 1
	FuseSecond = 2
)

// Values of Command.PSDT.
const (
	PSDTPRP     = 0 // PRPs
	PSDTSGL     = 1 // SGL, MPTR is an address
	PSDTSGLMPTR = 2 // SGL, MPTR is the address of an SGL segment

	psdtShift = 6
)

// FUSE returns the fused-operation field, 0 to 3.
func (c *Command) FUSE() uint8 { return c.Flags & 3 }

// PSDT returns what the data pointer holds, 0 to 3.
func (c *Command) PSDT() uint8 { return c.Flags >> psdtShift }

// Bits of CDW12 of Read, Write, Compare, Write Zeroes and Verify. NVM Command Set 1.0c 3.2.
const (
	RWDeallocate    = 1 << 25 // DEAC, Write Zeroes only
	RWForceUnit     = 1 << 30 // FUA
	RWLimitedRetry  = 1 << 31 // LR
	rwPRInfoShift   = 26
	rwPRInfoMask    = 0xF
	rwStorageTag    = 1 << 24 // STC
	rwDirectiveMask = 0xF
)

// SLBA returns the first logical block, CDW11:CDW10.
func (c *Command) SLBA() uint64 { return uint64(c.CDW11)<<32 | uint64(c.CDW10) }

// SetSLBA sets the first logical block.
func (c *Command) SetSLBA(lba uint64) { c.CDW10, c.CDW11 = uint32(lba), uint32(lba>>32) }

// NLB returns the number of logical blocks, CDW12 bits 15:0.
func (c *Command) NLB() ZeroBased16 { return ZeroBased16(c.CDW12) }

// SetNLB sets the number of logical blocks and keeps the rest of CDW12.
func (c *Command) SetNLB(z ZeroBased16) { c.CDW12 = c.CDW12&^0xFFFF | uint32(z) }

// FUA says that the data must be on the media before the command completes.
func (c *Command) FUA() bool { return c.CDW12&RWForceUnit != 0 }

// LimitedRetry says that the controller should not try hard.
func (c *Command) LimitedRetry() bool { return c.CDW12&RWLimitedRetry != 0 }

// DEAC says that Write Zeroes may deallocate.
func (c *Command) DEAC() bool { return c.CDW12&RWDeallocate != 0 }

// PRInfo returns the protection information field, CDW12 bits 29:26: PRACT in bit 3, PRCHK in bits 2:0.
func (c *Command) PRInfo() uint8 { return uint8(c.CDW12>>rwPRInfoShift) & rwPRInfoMask }

// StorageTagCheck says that the storage tag is to be checked (STC).
func (c *Command) StorageTagCheck() bool { return c.CDW12&rwStorageTag != 0 }

// DirectiveType returns DTYPE, CDW12 bits 23:20, of a Write.
func (c *Command) DirectiveType() uint8 { return uint8(c.CDW12>>20) & rwDirectiveMask }

// SetRW makes c a Read, Write, Compare, Write Zeroes or Verify of blocks logical blocks
// from lba; it clears everything but the data pointer. CID and flags in CDW12 are the caller's to add.
func (c *Command) SetRW(opcode uint8, nsid uint32, lba uint64, blocks ZeroBased16) {
	*c = Command{
		Opcode: opcode, NSID: nsid, PRP1: c.PRP1, PRP2: c.PRP2,
		CDW10: uint32(lba), CDW11: uint32(lba >> 32), CDW12: uint32(blocks),
	}
}

// Bits of CDW11 of Dataset Management. NVM Command Set 1.0c 3.2.3.
const (
	DSMIntegralRead  = 1 << 0 // IDR
	DSMIntegralWrite = 1 << 1 // IDW
	DSMDeallocate    = 1 << 2 // AD
)

// DSMRanges returns the number of DSMRange entries that the command carries.
func (c *Command) DSMRanges() ZeroBased8 { return ZeroBased8(c.CDW10) }

// DSMRange is one range of a Dataset Management command, 16 bytes. NVM Command Set 1.0c 3.2.3.
type DSMRange struct {
	Attributes uint32 // context attributes: hints
	Length     uint32 // in logical blocks, NOT zero-based; 0 is an empty range
	SLBA       uint64
}

// DSMMaxRanges is the most ranges that one Dataset Management command carries.
const DSMMaxRanges = 256

// CopyRanges returns the number of source ranges of a Copy, CDW12 bits 7:0. NVM Command Set 1.0c 3.2.2.
func (c *Command) CopyRanges() ZeroBased8 { return ZeroBased8(c.CDW12) }

// CopyFormat returns the format of the source ranges of a Copy, CDW12 bits 11:8. CopyRange is format 0.
func (c *Command) CopyFormat() uint8 { return uint8(c.CDW12>>8) & 0xF }

// CopyRange is one source range of a Copy, format 0, 32 bytes. NVM Command Set 1.0c figure 35.
type CopyRange struct {
	_      [8]byte
	SLBA   uint64
	NLB    ZeroBased16
	_      [6]byte
	EILBRT uint32
	ELBAT  uint16
	ELBATM uint16
}

// CopyRangeSize is the size of a CopyRange in bytes.
const CopyRangeSize = 32

// SetCopy makes c a Copy of n ranges, which are the data, to the blocks from lba on; it clears everything but the data pointer.
func (c *Command) SetCopy(nsid uint32, lba uint64, n ZeroBased8) {
	*c = Command{
		Opcode: IOCopy, Flags: c.Flags, NSID: nsid, PRP1: c.PRP1, PRP2: c.PRP2,
		CDW10: uint32(lba), CDW11: uint32(lba >> 32), CDW12: uint32(n),
	}
}

// QID returns the queue that Create or Delete I/O SQ or CQ names, CDW10 bits 15:0. NVMe Base 2.0c 5.4.
func (c *Command) QID() uint16 { return uint16(c.CDW10) }

// QSize returns the number of entries of the queue to create, CDW10 bits 31:16.
func (c *Command) QSize() ZeroBased16 { return ZeroBased16(c.CDW10 >> 16) }

// QContiguous returns PC: the queue is physically contiguous at PRP1.
func (c *Command) QContiguous() bool { return c.CDW11&1 != 0 }

// CQInterrupts returns IEN of Create I/O CQ.
func (c *Command) CQInterrupts() bool { return c.CDW11&2 != 0 }

// CQVector returns IV, the interrupt vector of Create I/O CQ.
func (c *Command) CQVector() uint16 { return uint16(c.CDW11 >> 16) }

// SQPriority returns QPRIO of Create I/O SQ: 0 urgent to 3 low.
func (c *Command) SQPriority() uint8 { return uint8(c.CDW11>>1) & 3 }

// SQCQID returns the completion queue of Create I/O SQ.
func (c *Command) SQCQID() uint16 { return uint16(c.CDW11 >> 16) }

// SetCreateCQ makes c a Create I/O CQ of a contiguous queue at iova.
func (c *Command) SetCreateCQ(qid uint16, size ZeroBased16, iova uint64, vector uint16, interrupts bool) {
	*c = Command{
		Opcode: AdminCreateCQ, PRP1: iova,
		CDW10: uint32(qid) | uint32(size)<<16,
		CDW11: 1 | bit32(interrupts, 1) | uint32(vector)<<16,
	}
}

// SetCreateSQ makes c a Create I/O SQ of a contiguous queue at iova.
func (c *Command) SetCreateSQ(qid uint16, size ZeroBased16, iova uint64, cqid uint16, priority uint8) {
	*c = Command{
		Opcode: AdminCreateSQ, PRP1: iova,
		CDW10: uint32(qid) | uint32(size)<<16,
		CDW11: 1 | uint32(priority&3)<<1 | uint32(cqid)<<16,
	}
}

// AbortSQID returns the queue of the command to abort. NVMe Base 2.0c 5.1.
func (c *Command) AbortSQID() uint16 { return uint16(c.CDW10) }

// AbortCID returns the identifier of the command to abort.
func (c *Command) AbortCID() uint16 { return uint16(c.CDW10 >> 16) }

// SetAbort makes c an Abort of command cid of queue sqid.
func (c *Command) SetAbort(sqid, cid uint16) {
	*c = Command{Opcode: AdminAbort, CDW10: uint32(sqid) | uint32(cid)<<16}
}

// CNS returns which data structure Identify asks for. NVMe Base 2.0c 5.17.1.
func (c *Command) CNS() CNS { return CNS(c.CDW10) }

// IdentifyCNTID returns the controller id of Identify, CDW10 bits 31:16.
func (c *Command) IdentifyCNTID() uint16 { return uint16(c.CDW10 >> 16) }

// IdentifyCSI returns the command set identifier of Identify, CDW11 bits 31:24.
func (c *Command) IdentifyCSI() CSI { return CSI(c.CDW11 >> 24) }

// SetIdentify makes c an Identify; the 4096-byte buffer is the caller's to add.
func (c *Command) SetIdentify(cns CNS, nsid uint32, csi CSI) {
	*c = Command{Opcode: AdminIdentify, NSID: nsid, PRP1: c.PRP1, PRP2: c.PRP2, CDW10: uint32(cns), CDW11: uint32(csi) << 24}
}

// FID returns the feature that Get or Set Features names. NVMe Base 2.0c 5.15, 5.27.
func (c *Command) FID() FeatureID { return FeatureID(c.CDW10) }

// FeatureSave returns SV of Set Features: keep the value across resets.
func (c *Command) FeatureSave() bool { return c.CDW10>>31 != 0 }

// FeatureSelect returns SEL of Get Features.
func (c *Command) FeatureSelect() FeatureSelect { return FeatureSelect(c.CDW10>>8) & 7 }

// SetSetFeatures makes c a Set Features of value (CDW11).
func (c *Command) SetSetFeatures(fid FeatureID, nsid, value uint32) {
	*c = Command{Opcode: AdminSetFeatures, NSID: nsid, PRP1: c.PRP1, PRP2: c.PRP2, CDW10: uint32(fid), CDW11: value}
}

// SetGetFeatures makes c a Get Features.
func (c *Command) SetGetFeatures(fid FeatureID, nsid uint32, sel FeatureSelect) {
	*c = Command{Opcode: AdminGetFeatures, NSID: nsid, PRP1: c.PRP1, PRP2: c.PRP2, CDW10: uint32(fid) | uint32(sel&7)<<8}
}

// LID returns the log page that Get Log Page names. NVMe Base 2.0c 5.16.
func (c *Command) LID() LogPage { return LogPage(c.CDW10) }

// LogSpecific returns LSP, CDW10 bits 14:8.
func (c *Command) LogSpecific() uint8 { return uint8(c.CDW10>>8) & 0x7F }

// LogRetainEvent returns RAE: reading the page does not clear its asynchronous event.
func (c *Command) LogRetainEvent() bool { return c.CDW10&(1<<15) != 0 }

// LogBytes returns how many bytes of the page are asked for: 4 to 2^34.
func (c *Command) LogBytes() uint64 {
	numdZ := uint64(c.CDW10>>16) | uint64(uint16(c.CDW11))<<16
	return (numdZ + 1) * 4
}

// LogOffset returns LPO; in bytes unless LogOffsetIndex.
func (c *Command) LogOffset() uint64 { return uint64(c.CDW13)<<32 | uint64(c.CDW12) }

// LogOffsetIndex returns OT: LogOffset counts entries and not bytes.
func (c *Command) LogOffsetIndex() bool { return c.CDW14&(1<<23) != 0 }

// LogCSI returns the command set identifier of Get Log Page, CDW14 bits 31:24.
func (c *Command) LogCSI() CSI { return CSI(c.CDW14 >> 24) }

// SetGetLogPage makes c a Get Log Page of n bytes, a multiple of 4, from byte offset off.
// The result is an error if n cannot be expressed.
func (c *Command) SetGetLogPage(lid LogPage, nsid uint32, off, n uint64, retainEvent bool) error {
	if n == 0 || n&3 != 0 || n > 1<<34 || off&3 != 0 {
		return &RangeError{What: "log page transfer", Value: n}
	}
	numdZ := uint32(n/4 - 1)
	*c = Command{
		Opcode: AdminGetLogPage, NSID: nsid, PRP1: c.PRP1, PRP2: c.PRP2,
		CDW10: uint32(lid) | bit32(retainEvent, 15) | numdZ<<16, CDW11: numdZ >> 16,
		CDW12: uint32(off), CDW13: uint32(off >> 32),
	}
	return nil
}

// SetDoorbellBuffers makes c a Doorbell Buffer Config, or its forerunner if opcode is
// AdminDoorbellMemory2014: one page of shadow doorbells, one of event indices. NVMe Base 2.0c 5.8.
func (c *Command) SetDoorbellBuffers(opcode uint8, shadowIOVA, eventIdxIOVA uint64) {
	*c = Command{Opcode: opcode, PRP1: shadowIOVA, PRP2: eventIdxIOVA}
}

func bit32(on bool, n uint) uint32 {
	if on {
		return 1 << n
	}
	return 0
}
