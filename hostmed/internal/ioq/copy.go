package ioq

import (
	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Copy, NVM Command Set 1.0c 3.2.2. Its source ranges are copied one after the other, each in pieces of the scratch memory; a range that
// overlaps where it goes to is copied from the end that does not destroy it. DW0 of a Copy that fails is the first range that was not
// copied.

func (w *Worker) copy(r *request) nvme.Status {
	c, info := &r.cmd, &r.ns.info
	r.Op = backend.OpRead
	n := int(c.CopyRanges().Count())
	r.ranges(n)
	switch {
	case info.ReadOnly:
		return nvme.StatusNamespaceWriteProtected.WithDNR()
	case c.CopyFormat() != 0:
		return nvme.StatusInvalidField.WithDNR()
	case n > ctrl.MaxCopyRanges:
		return nvme.StatusCommandSizeLimit.WithDNR()
	}
	if !w.takeScratch(r) {
		return waits
	}
	r.Len = uint64(n) * nvme.CopyRangeSize
	if st := w.translate(r, false); st != nvme.StatusSuccess {
		return st
	}
	if !copyOut(w.copyFrom[:n], r.Vec) {
		return nvme.StatusDataTransferError.WithDNR()
	}
	perRange, most := ctrl.CopyLimits(info)
	all := uint32(0) // at most 128 * 65536
	for i := range w.copyFrom[:n] {
		s := &w.copyFrom[i]
		blocks := s.NLB.Count()
		if blocks > uint32(perRange) {
			return nvme.StatusCommandSizeLimit.WithDNR()
		}
		if st := r.blocks(s.SLBA, uint64(blocks)); st != nvme.StatusSuccess {
			return st
		}
		r.list.list[i] = nvme.DSMRange{SLBA: s.SLBA, Length: blocks}
		all += blocks
	}
	if all > most {
		return nvme.StatusCommandSizeLimit.WithDNR()
	}
	if st := r.blocks(c.SLBA(), uint64(all)); st != nvme.StatusSuccess {
		return st
	}
	r.to = r.Off
	r.step = copying
	if st := r.nextSource(); st != waits {
		return st
	}
	return nvme.StatusSuccess
}

// nextSource begins with the next source range and returns waits, or ends.
func (r *request) nextSource() nvme.Status {
	d := r.list
	if d.next == d.n {
		return nvme.StatusSuccess
	}
	x := &d.list[d.next]
	d.next++
	if gate := r.ns.of.Gate(); gate != nil && gate.Marked(x.SLBA, uint64(x.Length)) {
		return nvme.StatusUnrecoveredRead
	}
	if r.ns.dulbe.Load() {
		if st := r.ns.allocated(x.SLBA, uint64(x.Length)); st != nvme.StatusSuccess {
			return st
		}
	}
	shift := r.ns.info.LBAShift
	r.from, r.pos, r.end = x.SLBA<<shift, 0, uint64(x.Length)<<shift
	r.readPiece()
	return waits
}

// copied goes on after a piece was read or written.
func (r *request) copied() nvme.Status {
	if r.Op == backend.OpRead {
		r.Op, r.FUA = backend.OpWrite, r.cmd.FUA()
		r.Off = r.to + (r.Off - r.from)
		return waits
	}
	r.unmark()
	r.pos += r.Len
	if r.pos < r.end {
		r.readPiece()
		return waits
	}
	r.to += r.end
	return r.nextSource()
}

// readPiece makes r read the next piece of the present range.
func (r *request) readPiece() {
	r.Op, r.FUA = backend.OpRead, false
	r.Len = min(r.end-r.pos, scratchSize)
	at := r.pos
	if r.from < r.to && r.to-r.from < r.end {
		at = r.end - r.pos - r.Len
	}
	r.Off = r.from + at
	r.setScratch()
}

// notCopied is DW0 of a Copy that failed.
func (r *request) notCopied() uint64 {
	if r.step != copying {
		return 0
	}
	return uint64(r.list.next - 1)
}
