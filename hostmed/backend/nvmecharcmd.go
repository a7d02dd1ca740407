package backend

import (
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// What goes to the device. Of the guest's command only named fields get there: never its NSID, its data pointer, a fused bit, protection
// information, a directive, or a block that is not of the slice.

// check refuses what is not of the slice, whoever asks.
func (b *nvmeChar) check(r *Request) nvme.Status {
	if b.other.Load() {
		return nvme.StatusNamespaceNotReady.WithDNR()
	}
	if r.Op != OpCommand {
		return b.info.check(r)
	}
	if r.Cmd == nil || !b.info.Native.Has(r.Cmd.Opcode) {
		return nvme.StatusInvalidOpcode.WithDNR()
	}
	switch r.Cmd.Opcode {
	case nvme.IODSM:
		if len(r.Vec) != 1 || r.Vec[0].Len < uint64(r.Cmd.DSMRanges().Count())*nvme.DSMRangeSize {
			return nvme.StatusInvalidField.WithDNR()
		}
		for _, x := range rangesOf(&r.Vec[0])[:r.Cmd.DSMRanges().Count()] {
			if !b.has(x.SLBA, uint64(x.Length)) {
				return nvme.StatusLBAOutOfRange.WithDNR()
			}
		}
		return nvme.StatusSuccess
	case nvme.IOCopy:
		if len(r.Vec) != 1 || r.Vec[0].Len < uint64(r.Cmd.CopyRanges().Count())*nvme.CopyRangeSize {
			return nvme.StatusInvalidField.WithDNR()
		}
		to := uint64(0)
		for _, x := range sourcesOf(&r.Vec[0])[:r.Cmd.CopyRanges().Count()] {
			if !b.has(x.SLBA, uint64(x.NLB.Count())) {
				return nvme.StatusLBAOutOfRange.WithDNR()
			}
			to += uint64(x.NLB.Count())
		}
		if !b.has(r.Cmd.SLBA(), to) {
			return nvme.StatusLBAOutOfRange.WithDNR()
		}
		return nvme.StatusSuccess
	}
	if size := b.info.Size(); r.Off > size || r.Len > size-r.Off {
		return nvme.StatusLBAOutOfRange.WithDNR()
	}
	if blocks := r.Len >> b.info.LBAShift; (r.Off|r.Len)&(b.info.LBASize()-1) != 0 || blocks == 0 || blocks > maxNLB {
		return nvme.StatusInvalidField.WithDNR()
	}
	return nvme.StatusSuccess
}

// has says whether the n blocks from lba on are of the slice.
func (b *nvmeChar) has(lba, n uint64) bool { return lba <= b.info.Blocks && n <= b.info.Blocks-lba }

// lba is the device's block at byte off of the slice.
func (b *nvmeChar) lba(off uint64) uint64 { return b.first + off>>b.info.LBAShift }

func (b *nvmeChar) nothingToDo(r *Request) bool {
	switch r.Op {
	case OpFlush:
		return b.info.ReadOnly || !b.info.VolatileCache
	case OpDiscard:
		return r.Len == 0 || !b.info.Discard // it is a hint
	case OpCommand:
		return false
	}
	return r.Len == 0
}

// shiftList makes a list of blocks, which is the request's own, the device's. It was checked.
func (b *nvmeChar) shiftList(r *Request) {
	if r.Op != OpCommand {
		return
	}
	switch r.Cmd.Opcode {
	case nvme.IODSM:
		list := rangesOf(&r.Vec[0])[:r.Cmd.DSMRanges().Count()]
		for i := range list {
			list[i].SLBA += b.first
		}
	case nvme.IOCopy:
		list := sourcesOf(&r.Vec[0])[:r.Cmd.CopyRanges().Count()]
		for i := range list {
			// What else a range has is about protection information.
			list[i] = nvme.CopyRange{SLBA: list[i].SLBA + b.first, NLB: list[i].NLB}
		}
	}
}

// Bits of CDW12 and CDW13 that go to the device as the guest gave them.
const (
	cdw12Retry = nvme.RWLimitedRetry
	cdw12Hints = nvme.RWLimitedRetry | nvme.RWForceUnit
	cdw13Hints = 0xff // DSM of Read and Write
)

// hints returns CDW12 and CDW13 of the guest's command that r is, if that is of opcode op.
func hints(r *Request, op uint8) (cdw12, cdw13 uint32) {
	if r.Cmd == nil || r.Cmd.Opcode != op {
		return 0, 0
	}
	return r.Cmd.CDW12, r.Cmd.CDW13
}

// command fills in c, except for its data: n bytes of r from at on.
func (b *nvmeChar) command(c *passthru, r *Request, at, n uint64) {
	c.NSID = b.nsid
	switch r.Op {
	case OpFlush:
		c.Opcode = nvme.IOFlush
		return
	case OpDiscard:
		c.Opcode, c.CDW10, c.CDW11 = nvme.IODSM, 0, nvme.DSMDeallocate
		return
	}
	lba := b.lba(r.Off + at)
	c.CDW10, c.CDW11 = uint32(lba), uint32(lba>>32)
	c.CDW12 = uint32(n>>b.info.LBAShift - 1)
	if r.FUA {
		c.CDW12 |= nvme.RWForceUnit
	}
	switch r.Op {
	case OpRead:
		c.Opcode = nvme.IORead
		cdw12, cdw13 := hints(r, nvme.IORead)
		c.CDW12 |= cdw12 & cdw12Hints
		c.CDW13 = cdw13 & cdw13Hints
	case OpWrite:
		c.Opcode = nvme.IOWrite
		cdw12, cdw13 := hints(r, nvme.IOWrite)
		c.CDW12 |= cdw12 & cdw12Retry
		c.CDW13 = cdw13 & cdw13Hints
	case OpWriteZeroes:
		c.Opcode = nvme.IOWrite
		if b.dev.zeroes {
			c.Opcode = nvme.IOWriteZeroes
			if r.Dealloc {
				c.CDW12 |= nvme.RWDeallocate
			}
		}
	case OpCommand:
		b.native(c, r)
	}
}

// native is command for those that are the guest's.
func (b *nvmeChar) native(c *passthru, r *Request) {
	c.Opcode = r.Cmd.Opcode
	switch c.Opcode {
	case nvme.IODSM:
		c.CDW10 = uint32(r.Cmd.DSMRanges())
		c.CDW11 = r.Cmd.CDW11 & (nvme.DSMIntegralRead | nvme.DSMIntegralWrite | nvme.DSMDeallocate)
		c.CDW12 = 0
	case nvme.IOCopy:
		lba := r.Cmd.SLBA() + b.first
		c.CDW10, c.CDW11 = uint32(lba), uint32(lba>>32)
		c.CDW12 = c.CDW12&nvme.RWForceUnit | uint32(r.Cmd.CopyRanges()) | r.Cmd.CDW12&cdw12Hints
	case nvme.IOCompare, nvme.IOVerify:
		c.CDW12 |= r.Cmd.CDW12 & cdw12Hints
	}
}

const maxNLB = 1 << 16 // blocks of one command

// pieces says whether r may be cut into several commands.
func (b *nvmeChar) pieces(r *Request) bool {
	return r.Op != OpFlush && (r.Op != OpCommand || r.Cmd.Opcode == nvme.IOCompare)
}

// movesData says whether r has memory of the guest's.
func (b *nvmeChar) movesData(r *Request) bool {
	return r.Op == OpRead || r.Op == OpWrite || r.Op == OpCommand && len(r.Vec) > 0 && r.Cmd.Opcode != nvme.IODSM && r.Cmd.Opcode != nvme.IOCopy
}

// piece returns how many bytes of r from at on the device takes in one command, so that no unit is cut that it writes as a whole. copied says that the
// data of such a unit is in more pieces than the device takes.
func (b *nvmeChar) piece(r *Request, at uint64) (n uint64, copied bool) {
	left := r.Len - at
	data := false
	switch {
	case !b.pieces(r):
		return r.Len, false
	case r.Op == OpDiscard:
		return min(left, b.dev.maxDiscard), false
	case r.Op == OpWriteZeroes && b.dev.zeroes:
		n = min(left, b.dev.maxZeroes)
	case r.Op == OpWriteZeroes:
		n = min(left, b.dev.maxData, zeroChunk)
	default:
		data = true
		n = min(left, b.dev.maxData)
		if n>>12 >= uint64(b.dev.maxPages) || len(r.Vec) > 1 {
			n = max(min(n, pagesOf(r.Vec, at, n, b.dev.maxPages))&^(b.info.LBASize()-1), b.info.LBASize())
		}
	}
	if n == left {
		return n, false
	}
	if whole := b.info.whole(r.Off+at, n); whole > 0 {
		return whole, false
	}
	return min(b.info.unitAt(r.Off+at), left), data
}

// pagesOf returns how many of the n bytes of vec from at on lie in no more than pages pages, or that many pieces: what the host has together
// in memory it need not have so for the device.
func pagesOf(vec []Seg, at, n uint64, pages uint32) (got uint64) {
	left := uint64(pages)
	next := uintptr(0) // where the last piece ended
	for i := range vec {
		if at >= vec[i].Len {
			at -= vec[i].Len
			continue
		}
		from := segAddress(&vec[i]) + uintptr(at)
		length := min(vec[i].Len-at, n-got)
		at = 0
		for length > 0 {
			step := min(length, uint64(shm.PageSize)-uint64(from)&(shm.PageSize-1))
			if from != next || from&(shm.PageSize-1) == 0 {
				if left == 0 {
					return got
				}
				left--
			}
			got, length, from = got+step, length-step, from+uintptr(step)
			next = from
		}
		if got == n {
			break
		}
	}
	return got
}

// charStatus is what the guest is told of an error of the kernel's. The device has not answered.
func charStatus(r *Request, e unix.Errno) nvme.Status {
	switch e {
	case unix.ENODEV, unix.ENXIO, unix.ESHUTDOWN: // removed
		return nvme.StatusNamespaceNotReady.WithDNR()
	case unix.EIO, unix.ETIMEDOUT, unix.EREMOTEIO: // its controller does not answer, or is about to go
		return nvme.StatusInternalError
	}
	return statusOf(r.Op, e)
}
