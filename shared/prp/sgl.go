package prp

import (
	"encoding/binary"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// MaxDescriptors is how many descriptors of one SGL WalkSGL reads at most, in all its segments. Linux
// uses up to 256, SPDK 250. The specification has no limit for PCIe, a device that works for others has to.
const MaxDescriptors = 1024

// BitBucket is the IOVA of an extent whose data goes nowhere. No data block has it: one would run over
// the end of the address space.
const BitBucket = ^uint64(0)

// perRead is how many descriptors are read from the peer at a time.
const perRead = chunk * EntrySize / nvme.SGLDescriptorSize

// WalkSGL is Walk for a command whose data pointer is the descriptor sgl1. toHost says that the data goes to
// the host, where bit buckets take some of it, as extents at BitBucket; on the way to the medium they count for nothing.
//
//	SGL Descriptor Type Invalid        a type or subtype that PCIe does not have
//	Invalid SGL Segment Descriptor     a segment that is empty, not a multiple of 16 long or not qword
//	                                   aligned; a last segment that goes on; another that does not
//	Invalid Number of SGL Descriptors  a segment in the middle of one, or more than MaxDescriptors
//	Data SGL Length Invalid            less or more data than length bytes, or around the end of the address space
//	Data Transfer Error                a segment that mem cannot read
func (w *Walker) WalkSGL(sgl1 nvme.SGLDescriptor, length uint32, toHost bool, mem Reader, out []Extent) ([]Extent, nvme.Status) {
	c := sglCollector{out: out, base: len(out), rest: length, toHost: toHost}
	var status nvme.Status
	switch sgl1.Type() {
	case nvme.SGLSegment, nvme.SGLLastSegment:
		status = w.segments(&c, sgl1, mem)
	default:
		status = c.data(&sgl1)
	}
	switch {
	case status != nvme.StatusSuccess:
		return out, status
	case c.rest > 0:
		return out, nvme.StatusSGLDataLengthInvalid
	}
	return c.out, nvme.StatusSuccess
}

// segments follows the chain of segments that d begins. Each has a descriptor at least, so
// MaxDescriptors bounds the loop.
func (w *Walker) segments(c *sglCollector, d nvme.SGLDescriptor, mem Reader) nvme.Status {
	for left := uint32(MaxDescriptors); ; {
		last := d.Type() == nvme.SGLLastSegment
		n := d.Length / nvme.SGLDescriptorSize
		switch {
		case d.Subtype() != nvme.SGLSubtypeAddress:
			return nvme.StatusSGLTypeInvalid
		case n == 0, d.Length%nvme.SGLDescriptorSize != 0, d.Address&7 != 0, d.Address+uint64(d.Length) < d.Address:
			return nvme.StatusSGLSegmentInvalid
		case n > left:
			return nvme.StatusSGLCountInvalid
		}
		left -= n
		next, goesOn, status := w.segment(c, d.Address, n, mem)
		switch {
		case status != nvme.StatusSuccess:
			return status
		case goesOn == last:
			return nvme.StatusSGLSegmentInvalid
		case last:
			return nvme.StatusSuccess
		}
		d = next
	}
}

// segment takes the n descriptors at iova. If the last of them is of another segment, it returns that.
func (w *Walker) segment(c *sglCollector, iova uint64, n uint32, mem Reader) (next nvme.SGLDescriptor, goesOn bool, status nvme.Status) {
	for n > 0 {
		k := min(n, perRead)
		raw := w.buf[:k*nvme.SGLDescriptorSize]
		if !mem.ReadIOVA(iova, raw) {
			return next, false, nvme.StatusDataTransferError
		}
		iova += uint64(len(raw))
		n -= k
		for ; len(raw) > 0; raw = raw[nvme.SGLDescriptorSize:] {
			d := nvme.SGLDescriptor{Address: binary.LittleEndian.Uint64(raw), Length: binary.LittleEndian.Uint32(raw[8:]), ID: raw[15]}
			switch d.Type() {
			case nvme.SGLSegment, nvme.SGLLastSegment:
				if n > 0 || len(raw) > nvme.SGLDescriptorSize {
					return next, false, nvme.StatusSGLCountInvalid
				}
				return d, true, nvme.StatusSuccess
			}
			if status = c.data(&d); status != nvme.StatusSuccess {
				return next, false, status
			}
		}
	}
	return next, false, nvme.StatusSuccess
}

// sglCollector gathers data blocks into extents.
type sglCollector struct {
	out    []Extent
	base   int    // of the extents of this command in out
	rest   uint32 // bytes still to be placed
	toHost bool
}

// data adds a data block or a bit bucket.
func (c *sglCollector) data(d *nvme.SGLDescriptor) nvme.Status {
	bucket := d.Type() == nvme.SGLBitBucket
	iova := d.Address
	switch {
	case !bucket && d.Type() != nvme.SGLDataBlock, d.Subtype() != nvme.SGLSubtypeAddress:
		return nvme.StatusSGLTypeInvalid
	case d.Length == 0, bucket && !c.toHost:
		return nvme.StatusSuccess
	case d.Length > c.rest:
		return nvme.StatusSGLDataLengthInvalid
	case bucket:
		iova = BitBucket
	case iova+uint64(d.Length) < iova:
		return nvme.StatusSGLDataLengthInvalid
	}
	c.rest -= d.Length
	if n := len(c.out); n > c.base {
		last := &c.out[n-1]
		touches := last.IOVA != BitBucket && last.IOVA+uint64(last.Len) == iova
		if bucket && last.IOVA == BitBucket || !bucket && touches {
			last.Len += d.Length
			return nvme.StatusSuccess
		}
	}
	c.out = append(c.out, Extent{iova, d.Length})
	return nvme.StatusSuccess
}

// BuildSGL makes extents the data of cmd: by one descriptor in the command, or by a last segment in list, which
// then belongs to the command until it completes. An extent at BitBucket is a bit bucket. It does not allocate.
func BuildSGL(cmd *nvme.Command, extents []Extent, list ListPage) error {
	total := uint64(0)
	for _, e := range extents {
		total += uint64(e.Len)
		if e.IOVA != BitBucket && e.IOVA+uint64(e.Len) < e.IOVA {
			return ErrRange
		}
	}
	if total > 1<<32-1 {
		return ErrRange
	}
	switch len(extents) {
	case 0:
		cmd.SetSGL(nvme.MakeSGL(nvme.SGLDataBlock, 0, 0))
		return nil
	case 1:
		cmd.SetSGL(descriptor(extents[0]))
		return nil
	}
	switch {
	case list.Mem == nil, uint64(len(extents)) > list.Mem.Len()/nvme.SGLDescriptorSize, len(extents) > MaxDescriptors:
		return ErrList
	case list.IOVA%8 != 0:
		return ErrAlign
	}
	for i, e := range extents {
		d := descriptor(e)
		if err := list.Mem.Write(uint64(i)*nvme.SGLDescriptorSize, d.Bytes()[:]); err != nil {
			return ErrList
		}
	}
	cmd.SetSGL(nvme.MakeSGL(nvme.SGLLastSegment, list.IOVA, uint32(len(extents))*nvme.SGLDescriptorSize))
	return nil
}

func descriptor(e Extent) nvme.SGLDescriptor {
	if e.IOVA == BitBucket {
		return nvme.MakeSGL(nvme.SGLBitBucket, 0, e.Len)
	}
	return nvme.MakeSGL(nvme.SGLDataBlock, e.IOVA, e.Len)
}
