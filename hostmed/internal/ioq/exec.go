package ioq

import (
	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// request is one fetched command on its way. Requests are reused; a worker has as many as were
// ever in flight at once.
type request struct {
	backend.Request // Owner is the index in Worker.reqs

	cmd   nvme.Command // the only copy: the SQE is never looked at again (R31)
	sq    *sq
	ns    *namespace
	guest []backend.Seg // Compare: what the medium's data is compared with
	buf   *shm.Region   // Compare: the medium's data
	vec   []backend.Seg // backing array of Vec, kept
	dsm   *dsmRanges    // Dataset Management: what is left to do
	kept  *dsmRanges    // memory for dsm
	held  bool          // waits for the namespace's gate
}

type dsmRanges struct {
	list [nvme.DSMMaxRanges]nvme.DSMRange
	next int
	n    int
}

// take returns a request for a command of s.
func (w *Worker) take(s *sq) *request {
	var r *request
	if n := len(w.free) - 1; n >= 0 {
		r = w.free[n]
		w.free = w.free[:n]
	} else {
		r = &request{vec: make([]backend.Seg, 0, 2)}
		r.Owner = uint64(len(w.reqs))
		w.reqs = append(w.reqs, r)
	}
	r.sq = s
	s.inflight++
	s.g.inflight++
	return r
}

// give takes r back. It is the only place where the counts of take go down (R33).
func (w *Worker) give(r *request) {
	r.sq.inflight--
	r.sq.g.inflight--
	if r.buf != nil {
		w.scratch = append(w.scratch, r.buf)
		r.buf = nil
	}
	r.dsm = nil
	if cap(r.vec) > keepVec {
		r.vec = make([]backend.Seg, 0, 2) // of a long SGL
	}
	r.sq, r.ns = nil, nil
	w.free = append(w.free, r)
}

// start decodes r's command and puts it in the batch, or completes it at once.
func (w *Worker) start(r *request) {
	c := &r.cmd
	ctl := r.sq.g.ctl
	if c.Flags != 0 && !r.flags() {
		w.complete(r, nvme.StatusInvalidField.WithDNR())
		return
	}
	if r.ns = ctl.namespace(c.NSID); r.ns == nil {
		w.complete(r, nvme.StatusInvalidNamespace.WithDNR())
		return
	}
	if gate := r.ns.of.Gate(); gate != nil && !w.passes(r, gate) {
		return
	}
	r.FUA, r.Dealloc, r.Vec = false, false, nil
	var st nvme.Status
	switch c.Opcode {
	case nvme.IORead:
		r.Op = backend.OpRead
		st = w.data(r, true)
	case nvme.IOWrite:
		r.Op = backend.OpWrite
		r.FUA = c.FUA()
		st = w.data(r, false)
	case nvme.IOCompare:
		r.Op = backend.OpRead
		st = w.compare(r)
	case nvme.IOFlush:
		r.Op, r.Off, r.Len = backend.OpFlush, 0, 0
	case nvme.IOWriteZeroes:
		r.Op = backend.OpWriteZeroes
		r.FUA, r.Dealloc = c.FUA(), c.DEAC()
		st = r.blocks(c.SLBA(), uint64(c.NLB().Count()))
	case nvme.IODSM:
		if st = w.dsm(r); st == nvme.StatusSuccess && r.dsm == nil {
			w.complete(r, st) // a hint that asks for nothing
			return
		}
	default:
		st = nvme.StatusInvalidOpcode.WithDNR()
	}
	if st == nvme.StatusSuccess && r.Op != backend.OpRead && r.Op != backend.OpFlush && r.ns.info.ReadOnly {
		st = nvme.StatusNamespaceWriteProtected.WithDNR()
	}
	if st != nvme.StatusSuccess {
		w.complete(r, st)
		return
	}
	w.enqueue(r)
}

// flags says whether the command's flags, which are not all zero, can be: fused operations are not offered.
func (r *request) flags() bool {
	return r.cmd.FUSE() == nvme.FuseNormal && r.cmd.PSDT() <= nvme.PSDTSGLMPTR
}

// blocks sets the byte range of n LBAs from slba, if the namespace has them.
func (r *request) blocks(slba, n uint64) nvme.Status {
	info := &r.ns.info
	if slba >= info.Blocks || n > info.Blocks-slba {
		return nvme.StatusLBAOutOfRange.WithDNR()
	}
	r.Off = slba << info.LBAShift
	r.Len = n << info.LBAShift
	return nvme.StatusSuccess
}

// compare reads the medium into memory of our own; afterCompare looks at it.
func (w *Worker) compare(r *request) nvme.Status {
	if st := w.data(r, false); st != nvme.StatusSuccess {
		return st
	}
	if n := len(w.scratch) - 1; n >= 0 {
		r.buf = w.scratch[n]
		w.scratch = w.scratch[:n]
	} else {
		r.buf = shm.NewHeap(int(r.sq.g.ctl.mdts))
	}
	mine, err := r.buf.Bytes(0, r.Len)
	if err != nil {
		return nvme.StatusInternalError // another controller's MDTS was smaller: cannot be, it is one constant
	}
	r.guest = append(r.guest[:0], r.Vec...)
	r.vec = append(r.vec[:0], backend.Seg{Base: &mine[0], Len: r.Len})
	r.Vec = r.vec
	return nvme.StatusSuccess
}

// dsm copies the ranges of a Dataset Management command and begins with the first. Only
// the Deallocate attribute asks for anything.
func (w *Worker) dsm(r *request) nvme.Status {
	r.Op = backend.OpDiscard
	if r.cmd.CDW11&nvme.DSMDeallocate == 0 {
		return nvme.StatusSuccess
	}
	n := int(r.cmd.DSMRanges().Count())
	r.Len = uint64(n) * nvme.DSMRangeSize
	if st := w.translate(r, false); st != nvme.StatusSuccess {
		return st
	}
	if r.kept == nil {
		r.kept = new(dsmRanges)
	}
	d := r.kept
	d.next, d.n = 0, n
	if !copyRanges(d.list[:n], r.Vec) {
		return nvme.StatusDataTransferError.WithDNR()
	}
	for i := range d.list[:n] {
		if st := r.blocks(d.list[i].SLBA, uint64(d.list[i].Length)); st != nvme.StatusSuccess && d.list[i].Length > 0 {
			return st
		}
	}
	r.Vec = nil
	if r.dsm = d; !r.nextRange() {
		r.dsm = nil
	}
	return nvme.StatusSuccess
}

// nextRange sets r to the next range to be deallocated; false if there is none.
func (r *request) nextRange() bool {
	for d := r.dsm; d.next < d.n; {
		x := &d.list[d.next]
		d.next++
		if x.Length > 0 {
			return r.blocks(x.SLBA, uint64(x.Length)) == nvme.StatusSuccess
		}
	}
	return false
}

// enqueue puts r in the batch for its backend.
func (w *Worker) enqueue(r *request) {
	if r.sq.g.ctl.through.Load() && (r.Op == backend.OpWrite || r.Op == backend.OpWriteZeroes) {
		r.FUA = true
	}
	m := w.media(r.ns)
	if w.batchOf != m && len(w.batch) > 0 {
		w.submit()
	}
	w.batchOf = m
	w.batch = append(w.batch, &r.Request)
	if len(w.batch) == batchMax {
		w.submit()
	}
}

// submit hands the batch to its backend.
func (w *Worker) submit() {
	m := w.batchOf
	batch := w.batch
	w.batch = w.batch[:0]
	w.inflight -= m.q.Inflight()
	n := m.q.Submit(batch, w.finished[:])
	w.inflight += m.q.Inflight()
	for _, b := range w.finished[:n] {
		w.finish(w.reqs[b.Owner])
	}
}

// flushBatch submits what has been collected, and then what commands of several steps have left to do.
func (w *Worker) flushBatch() {
	for {
		if len(w.batch) > 0 {
			w.submit()
		}
		n := len(w.again) - 1
		if n < 0 {
			return
		}
		r := w.again[n]
		w.again = w.again[:n]
		w.enqueue(r)
	}
}

// reap takes what asynchronous backends have finished.
func (w *Worker) reap() int {
	work := 0
	for _, m := range w.queues {
		if m == nil || m.q.Inflight() == 0 {
			continue
		}
		w.inflight -= m.q.Inflight()
		n := m.q.Reap(w.finished[:])
		w.inflight += m.q.Inflight()
		for _, b := range w.finished[:n] {
			w.finish(w.reqs[b.Owner])
		}
		work += n
	}
	w.flushBatch()
	return work
}

// finish takes a request that its backend has done with.
func (w *Worker) finish(r *request) {
	w.current = r.sq.g
	st := r.Status
	if st == nvme.StatusSuccess {
		switch {
		case r.buf != nil:
			w.pending = r
			if !equal(r.guest, r.Vec[0]) {
				st = nvme.StatusCompareFailure
			}
			w.pending = nil
		case r.dsm != nil && r.nextRange():
			w.again = append(w.again, r)
			return
		}
	}
	w.complete(r, st)
}
