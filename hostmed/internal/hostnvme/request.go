package hostnvme

import (
	"encoding/binary"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Op is what a Request asks for.
type Op uint8

// The operations. They are those of package backend, in its order.
const (
	Read Op = iota
	Write
	Flush
	WriteZeroes
	Discard
	Command // Cmd, as backend.Opcodes says
)

// Request is one operation on a Slice. It belongs to its Queue: Take gives it, Free takes it back.
type Request struct {
	Op      Op
	FUA     bool
	Dealloc bool
	Off     uint64 // bytes from the slice's first block on
	Len     uint64
	Vec     []Seg
	Cmd     *nvme.Command // for Command; otherwise nil or what hints are taken from
	Owner   any           // the caller's: a pointer, so that nothing is allocated

	Status nvme.Status
	DW0    uint32

	// The last of the device's commands that the request became. RealQID 0: none as yet.
	RealQID, RealCID uint16

	q     *Queue
	at    position // in Vec, of what no device command has yet
	left  uint64   // bytes that no device command has yet
	begun bool     // there was a device command
	out   int      // device commands that are under way
	waits bool     // it is in its queue's line
	next  *Request // in the line, among the ready or the free ones
}

// Slice is the part of a device's namespace that requests are about.
type Slice struct {
	NSID     uint32
	Is       *Space // which namespace that was; nil: any
	First    uint64 // LBA
	Blocks   uint64
	Shift    uint8 // log2 of the LBA size in bytes
	ReadOnly bool

	MaxTransfer uint64 // bytes of data of one command
	Boundary    uint64 // bytes; a command does not cross a multiple (NOIOB); 0: there is none
	Atomic      uint64 // bytes, a power of two: longer requests are cut at multiples, from the slice's first byte, and nowhere else; 0: a block
	Zeroes      bool   // the device has Write Zeroes
	MaxZeroes   uint64 // bytes of one
	Dealloc     bool   // its Write Zeroes heeds DEAC
	Discard     bool   // it has Dataset Management
	MaxDiscard  uint64 // bytes of one range
}

// maxBlocks is how many blocks NLB can say.
const maxBlocks = 1 << 16

// check refuses what is not in the slice: what the guest may reach depends on it, whatever was checked before.
func (s *Slice) check(r *Request) nvme.Status {
	if r.Op == Flush {
		return nvme.StatusSuccess
	}
	size := s.Blocks << s.Shift
	switch {
	case r.Op > Command:
		return nvme.StatusInvalidOpcode.WithDNR()
	case r.Off > size || r.Len > size-r.Off:
		return nvme.StatusLBAOutOfRange.WithDNR()
	case (r.Off|r.Len)&(1<<s.Shift-1) != 0:
		return nvme.StatusInvalidField.WithDNR()
	case s.ReadOnly && r.writes():
		return nvme.StatusNamespaceWriteProtected.WithDNR()
	case r.Op == Command:
		return r.checkCommand()
	}
	return nvme.StatusSuccess
}

// checkCommand refuses what build does not know, or has no blocks to be about.
func (r *Request) checkCommand() nvme.Status {
	switch r.Cmd.Opcode {
	case nvme.IODSM, nvme.IOCopy:
		return nvme.StatusSuccess
	case nvme.IOCompare, nvme.IOVerify, nvme.IOWriteUncorrectable:
		if r.Len == 0 {
			return nvme.StatusInvalidField.WithDNR()
		}
		return nvme.StatusSuccess
	}
	return nvme.StatusInvalidOpcode.WithDNR()
}

func (r *Request) writes() bool {
	switch r.Op {
	case Read, Flush:
		return false
	case Command:
		return r.Cmd.Opcode != nvme.IOCompare && r.Cmd.Opcode != nvme.IOVerify
	}
	return true
}

// has says whether the n blocks from lba on are in the slice.
func (s *Slice) has(lba, n uint64) bool { return lba <= s.Blocks && n <= s.Blocks-lba }

// piece is how much of r its next command can be about, if one may have at most most bytes.
func (s *Slice) piece(r *Request, most uint64) uint64 {
	n := min(r.left, most, maxBlocks<<s.Shift)
	if s.Boundary != 0 {
		at := s.First<<s.Shift + r.Off + r.Len - r.left
		n = min(n, s.Boundary-at%s.Boundary)
	}
	if n < r.left {
		if w := s.whole(r, n); w > 0 {
			return w
		}
		return min(s.unit(r), r.left) // NOIOB is within it, which it may cross
	}
	return n
}

// whole is how many of the next n bytes of r, which are not all, one command may have so that no atomic unit is cut; 0 if that is less than the first.
func (s *Slice) whole(r *Request, n uint64) uint64 {
	if s.Atomic == 0 {
		return n
	}
	at := r.Off + r.Len - r.left
	return max((at+n)&^(s.Atomic-1), at) - at
}

// unit is how many bytes of r there are to the end of the atomic unit that it is at.
func (s *Slice) unit(r *Request) uint64 {
	if s.Atomic == 0 {
		return 1 << s.Shift
	}
	return s.Atomic - (r.Off+r.Len-r.left)&(s.Atomic-1)
}

// blocks sets the blocks of cmd to the next n bytes of r.
func (s *Slice) blocks(cmd *nvme.Command, r *Request, n uint64) {
	cmd.SetSLBA(s.First + (r.Off+r.Len-r.left)>>s.Shift)
	cmd.CDW12 |= uint32(n>>s.Shift-1) & 0xFFFF
}

// Bits of a guest's command that a device's may have too: they ask for nothing that another guest would notice.
const (
	keptCDW12 = nvme.RWForceUnit | nvme.RWLimitedRetry
	keptCDW13 = 0xFF // DSM: access frequency and latency
)

// hints takes over what the guest's command says beside what it does.
func hints(cmd *nvme.Command, r *Request) {
	if c := r.Cmd; c != nil && c.Opcode == cmd.Opcode {
		cmd.CDW12 = c.CDW12 & keptCDW12
		cmd.CDW13 = c.CDW13 & keptCDW13
	}
	if r.FUA {
		cmd.CDW12 |= nvme.RWForceUnit
	}
}

// discard makes cmd a Dataset Management that deallocates the next n bytes of r. Its range is in l.
func (s *Slice) discard(cmd *nvme.Command, r *Request, n uint64, l list) {
	cmd.Opcode, cmd.CDW11 = nvme.IODSM, nvme.DSMDeallocate
	putRange(l.mem, nvme.DSMRange{Length: uint32(n >> s.Shift), SLBA: s.First + (r.Off+r.Len-r.left)>>s.Shift})
	cmd.PRP1 = l.iova
}

func putRange(b []byte, x nvme.DSMRange) {
	binary.LittleEndian.PutUint32(b, x.Attributes)
	binary.LittleEndian.PutUint32(b[4:], x.Length)
	binary.LittleEndian.PutUint64(b[8:], x.SLBA)
}

// ranges makes cmd the Dataset Management that r is. The ranges in r's memory, which is not the guest's, are checked and counted from the
// device's first block.
func (s *Slice) ranges(cmd *nvme.Command, r *Request, l list) nvme.Status {
	n := int(r.Cmd.DSMRanges().Count())
	if len(r.Vec) != 1 || r.Vec[0].Len < uint64(n)*nvme.DSMRangeSize || len(l.mem) < n*nvme.DSMRangeSize {
		return nvme.StatusInternalError.WithDNR()
	}
	from := segBytes(&r.Vec[0], 0, uint64(n)*nvme.DSMRangeSize)
	for i := range n {
		b := from[i*nvme.DSMRangeSize:]
		x := nvme.DSMRange{Attributes: binary.LittleEndian.Uint32(b), Length: binary.LittleEndian.Uint32(b[4:]), SLBA: binary.LittleEndian.Uint64(b[8:])}
		if !s.has(x.SLBA, uint64(x.Length)) {
			return nvme.StatusLBAOutOfRange.WithDNR()
		}
		x.SLBA += s.First
		putRange(l.mem[i*nvme.DSMRangeSize:], x)
	}
	cmd.CDW10 = uint32(n - 1)
	cmd.CDW11 = r.Cmd.CDW11 & (nvme.DSMIntegralRead | nvme.DSMIntegralWrite | nvme.DSMDeallocate)
	cmd.PRP1 = l.iova
	return nvme.StatusSuccess
}

// copy makes cmd the Copy that r is, as ranges does.
func (s *Slice) copy(cmd *nvme.Command, r *Request, l list) nvme.Status {
	n := int(r.Cmd.CopyRanges().Count())
	if len(r.Vec) != 1 || r.Vec[0].Len < uint64(n)*nvme.CopyRangeSize || len(l.mem) < n*nvme.CopyRangeSize {
		return nvme.StatusInternalError.WithDNR()
	}
	const slba, nlb = 8, 16 // in a range
	from := segBytes(&r.Vec[0], 0, uint64(n)*nvme.CopyRangeSize)
	all := uint64(0)
	for i := range n {
		b, to := from[i*nvme.CopyRangeSize:][:nvme.CopyRangeSize], l.mem[i*nvme.CopyRangeSize:][:nvme.CopyRangeSize]
		first, z := binary.LittleEndian.Uint64(b[slba:]), binary.LittleEndian.Uint16(b[nlb:])
		blocks := uint64(nvme.ZeroBased16(z).Count())
		if !s.has(first, blocks) {
			return nvme.StatusLBAOutOfRange.WithDNR()
		}
		all += blocks
		clear(to)
		binary.LittleEndian.PutUint64(to[slba:], s.First+first)
		binary.LittleEndian.PutUint16(to[nlb:], z)
	}
	if !s.has(r.Off>>s.Shift, all) {
		return nvme.StatusLBAOutOfRange.WithDNR()
	}
	cmd.SetSLBA(s.First + r.Off>>s.Shift)
	hints(cmd, r)
	cmd.CDW12 |= uint32(n - 1)
	cmd.CDW13 = 0
	cmd.PRP1 = l.iova
	return nvme.StatusSuccess
}
