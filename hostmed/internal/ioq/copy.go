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
	r.Op = backend.OpRead
	r.ranges(int(r.cmd.CopyRanges().Count()))
	if !w.takeScratch(r) {
		return waits
	}
	n, all, st := w.copyRanges(r, &w.copyFrom)
	if st != nvme.StatusSuccess {
		return st
	}
	for i := range n {
		s := &w.copyFrom[i]
		r.list.list[i] = nvme.DSMRange{SLBA: s.SLBA, Length: s.NLB.Count()}
	}
	w.owes(r, uint64(all)<<r.ns.info.LBAShift)
	r.to, r.Vec = r.Off, nil
	r.step = copying
	if st := r.nextSource(); st != waits {
		return st
	}
	return nvme.StatusSuccess
}

// copyRanges copies the n source ranges of a Copy into list and checks them. Afterwards r's range is where they go to.
func (w *Worker) copyRanges(r *request, list *copySources) (n int, all uint32, st nvme.Status) {
	c, info := &r.cmd, &r.ns.info
	n = int(c.CopyRanges().Count())
	switch {
	case info.ReadOnly:
		return n, 0, nvme.StatusNamespaceWriteProtected.WithDNR()
	case c.CopyFormat() != 0:
		return n, 0, nvme.StatusInvalidField.WithDNR()
	case n > ctrl.MaxCopyRanges:
		return n, 0, nvme.StatusCommandSizeLimit.WithDNR()
	}
	r.Len = uint64(n) * nvme.CopyRangeSize
	if st := w.translate(r, false); st != nvme.StatusSuccess {
		return n, 0, st
	}
	if !copyOut(list[:n], r.Vec) {
		return n, 0, nvme.StatusDataTransferError.WithDNR()
	}
	perRange, most := ctrl.CopyLimits(info)
	for i := range list[:n] { // all is at most 128 * 65536
		blocks := list[i].NLB.Count()
		if blocks > uint32(perRange) {
			return n, 0, nvme.StatusCommandSizeLimit.WithDNR()
		}
		if st := r.blocks(list[i].SLBA, uint64(blocks)); st != nvme.StatusSuccess {
			return n, 0, st
		}
		all += blocks
	}
	if all > most {
		return n, 0, nvme.StatusCommandSizeLimit.WithDNR()
	}
	return n, all, r.blocks(c.SLBA(), uint64(all))
}

// nextSource begins with the next source range and returns waits, or ends.
func (r *request) nextSource() nvme.Status {
	d := r.list
	if d.next == d.n {
		return nvme.StatusSuccess
	}
	x := &d.list[d.next]
	d.next++
	if st := r.readable(x.SLBA, uint64(x.Length)); st != nvme.StatusSuccess {
		return st
	}
	shift := r.ns.info.LBAShift
	r.from, r.pos, r.end = x.SLBA<<shift, 0, uint64(x.Length)<<shift
	r.readPiece()
	return waits
}

// readable says whether n blocks from first, a source of a Copy, can be read.
func (r *request) readable(first, n uint64) nvme.Status {
	if gate := r.ns.of.Gate(); gate != nil && gate.Marked(first, n) {
		return nvme.StatusUnrecoveredRead
	}
	if r.ns.dulbe.Load() {
		return r.ns.allocated(first, n)
	}
	return nvme.StatusSuccess
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
func (r *request) notCopied() uint64 { return uint64(r.list.next - 1) }
