package ioq

import (
	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Commands that take several operations of the backend: Compare, Verify, Dataset Management, Copy. Compare, Verify and Copy move the
// medium's data through scratch memory of the worker, in pieces. There is little of it, so that a guest cannot
// make hostmed large or its commands endless: a command that finds none is held back before anything of it has begun.

const (
	scratchSize  = 256 << 10
	scratchCount = 8
)

// step is what a request does next when the backend has done with it.
type step uint8

const (
	oneStep  step = iota // it is complete
	noStep               // it is complete and the backend is not asked
	notBegun             // it is begun, from the start: it waited
	comparing
	verifying
	deallocating
	copying
	marked   // blocks that are written are not marked any more
	flushing // before a read
	native   // the medium does the command, see native.go
)

// waits, in place of a status, says that the request is not to be completed yet. No status has this value.
const waits = nvme.Status(0xffff)

// ranges are those of a Dataset Management or Copy command.
type ranges struct {
	list [nvme.DSMMaxRanges]nvme.DSMRange
	next int
	n    int

	// What a medium that does the command gets, and may change:
	handed  [nvme.DSMMaxRanges]nvme.DSMRange
	sources *copySources // kept
}

// startSteps is start for opcodes that are rarely seen.
func (w *Worker) startSteps(r *request) nvme.Status {
	if r.ns.native.Has(r.cmd.Opcode) {
		if st := w.native(r); st != tooLarge {
			return st
		}
	}
	switch r.cmd.Opcode {
	case nvme.IOCompare:
		return w.compare(r)
	case nvme.IOVerify:
		return w.verify(r)
	case nvme.IODSM:
		return w.dsm(r)
	case nvme.IOCopy:
		return w.copy(r)
	case nvme.IOWriteUncorrectable:
		return r.mark()
	case nvme.IOReservationRegister, nvme.IOReservationAcquire, nvme.IOReservationRelease:
		if st := w.reserve(r); st != waits {
			w.complete(r, st)
		}
		return waits
	case nvme.IOReservationReport:
		w.complete(r, w.report(r))
		return waits
	}
	return nvme.StatusInvalidOpcode.WithDNR()
}

// next decides what r does after a step that succeeded: waits if there is another, which r then describes.
func (w *Worker) next(r *request) nvme.Status {
	switch r.step {
	case comparing:
		if st := w.compared(r); st != nvme.StatusSuccess {
			return st
		}
		return r.piece(r.Len)
	case verifying:
		return r.piece(r.Len)
	case deallocating:
		r.unmark()
		if r.nextRange() {
			return waits
		}
	case marked:
		r.unmark()
	case flushing:
		r.Op, r.step = backend.OpRead, r.then
		return waits
	case copying:
		return r.copied()
	case native:
		r.nativeDone()
	}
	return nvme.StatusSuccess
}

// fromMedia makes a read begin with a flush: with FUA it is of what is on the medium, where what is in a cache has to be before. NVM
// Command Set 1.0c 3.2.4.
func (r *request) fromMedia() {
	if r.ns.info.VolatileCache && r.cmd.Opcode != nvme.IOCopy { // whose FUA is about what it writes
		r.Op, r.step, r.then = backend.OpFlush, flushing, r.step
	}
}

// piece goes on after n bytes to the next piece that fits into the scratch memory.
func (r *request) piece(n uint64) nvme.Status {
	r.pos += n
	r.Off += n
	if r.Len = r.pieceAt(r.Off); r.Len == 0 {
		return nvme.StatusSuccess
	}
	r.setScratch()
	return waits
}

// pieceAt is how much of what r has left, from byte off of the medium on, goes into the scratch memory: what the medium writes as a whole is
// read as a whole.
func (r *request) pieceAt(off uint64) uint64 {
	left := r.end - r.pos
	if left <= scratchSize {
		return left
	}
	unit := uint64(max(r.ns.info.AtomicWrite, 1)) << r.ns.info.LBAShift
	return (off+scratchSize)&^(unit-1) - off
}

// setScratch makes the first r.Len bytes of the scratch memory what the backend reads to or writes from.
func (r *request) setScratch() {
	if b, err := r.buf.Bytes(0, r.Len); err == nil { // it is as long as that
		r.vec = append(r.vec[:0], backend.Seg{Base: &b[0], Len: r.Len})
		r.Vec = r.vec
	}
}

// compare reads the medium into scratch memory, for compared to look at.
func (w *Worker) compare(r *request) nvme.Status {
	r.Op = backend.OpRead // for what start looks at
	if !w.takeScratch(r) {
		return waits
	}
	return w.comparison(r)
}

// comparison is compare with scratch memory.
func (w *Worker) comparison(r *request) nvme.Status {
	r.Op = backend.OpRead
	if st := w.data(r, false); st != nvme.StatusSuccess {
		return st
	}
	r.guest = append(r.guest[:0], r.Vec...)
	r.step = comparing
	return r.firstPiece()
}

// firstPiece cuts the range that r has into pieces.
func (r *request) firstPiece() nvme.Status {
	r.pos, r.end = 0, r.Len
	r.Len = r.pieceAt(r.Off)
	r.setScratch()
	return nvme.StatusSuccess
}

// compared compares a piece with guest memory, which may have gone.
func (w *Worker) compared(r *request) nvme.Status {
	return w.guarded(r, func() nvme.Status {
		if !equalAt(r.guest, r.pos, r.Vec[0]) {
			return nvme.StatusCompareFailure
		}
		return nvme.StatusSuccess
	})
}

// verify reads the medium, and nobody looks at what it reads.
func (w *Worker) verify(r *request) nvme.Status {
	r.Op = backend.OpRead
	if !w.takeScratch(r) {
		return waits
	}
	if st := r.blocks(r.cmd.SLBA(), uint64(r.cmd.NLB().Count())); st != nvme.StatusSuccess {
		return st
	}
	if r.Len > ctrl.MaxVerify {
		return nvme.StatusInvalidField.WithDNR()
	}
	r.step = verifying
	return r.firstPiece()
}

// dsm copies the ranges of a Dataset Management command and begins with the first. Only
// the Deallocate attribute asks for anything.
func (w *Worker) dsm(r *request) nvme.Status {
	r.Op = backend.OpDiscard
	if r.cmd.CDW11&nvme.DSMDeallocate == 0 {
		r.step = noStep
		return nvme.StatusSuccess
	}
	if _, st := w.dsmRanges(r, int(r.cmd.DSMRanges().Count())); st != nvme.StatusSuccess {
		return st
	}
	r.step = deallocating
	if !r.nextRange() {
		r.step = noStep
	}
	return nvme.StatusSuccess
}

// dsmRanges copies the n ranges of a Dataset Management command and checks them.
func (w *Worker) dsmRanges(r *request, n int) (*ranges, nvme.Status) {
	r.Len = uint64(n) * nvme.DSMRangeSize
	if st := w.translate(r, false); st != nvme.StatusSuccess {
		return nil, st
	}
	d := r.ranges(n)
	if !copyOut(d.list[:n], r.Vec) {
		return nil, nvme.StatusDataTransferError.WithDNR()
	}
	r.Vec = nil
	for i := range d.list[:n] {
		if st := r.blocks(d.list[i].SLBA, uint64(d.list[i].Length)); st != nvme.StatusSuccess && d.list[i].Length > 0 {
			return nil, st
		}
	}
	return d, nvme.StatusSuccess
}

// ranges returns memory for n ranges.
func (r *request) ranges(n int) *ranges {
	if r.list == nil {
		r.list = new(ranges)
	}
	r.list.next, r.list.n = 0, n
	return r.list
}

// nextRange sets r to the next range to be deallocated; false if there is none.
func (r *request) nextRange() bool {
	for d := r.list; d.next < d.n; {
		x := &d.list[d.next]
		d.next++
		if x.Length > 0 {
			return r.blocks(x.SLBA, uint64(x.Length)) == nvme.StatusSuccess
		}
	}
	return false
}

// takeScratch gives r scratch memory, or holds it back until there is some.
func (w *Worker) takeScratch(r *request) bool {
	switch n := len(w.scratch); {
	case n > 0:
		r.buf = w.scratch[n-1]
		w.scratch = w.scratch[:n-1]
	case w.scratches < scratchCount:
		r.buf = shm.NewHeap(scratchSize)
		w.scratches++
	default:
		r.step = notBegun
		w.hold(r)
		return false
	}
	return true
}

// giveScratch takes r's scratch memory and lets one begin that waits for it.
func (w *Worker) giveScratch(r *request) {
	w.scratch = append(w.scratch, r.buf)
	r.buf = nil
	if cap(r.guest) > keepVec {
		r.guest = nil
	}
	w.wakeStarved()
}

// wakeStarved lets a request begin that waits for scratch memory, if there is some. It need not take it: see flushBatch.
func (w *Worker) wakeStarved() {
	if len(w.held) == 0 || len(w.scratch) == 0 {
		return
	}
	if next := w.unhold(func(x *request) bool { return x.step == notBegun && x.sq.g.begins() }); next != nil {
		w.again = append(w.again, next)
	}
}

// begin starts a request that waited, if it is still wanted.
func (w *Worker) begin(r *request) {
	if r.sq.g.state == Failed {
		w.give(r)
		return
	}
	if r.reserving != nil {
		w.goesOn(r)
		return
	}
	w.current, w.pending = r.sq.g, r
	w.start(r)
	w.pending = nil
}
