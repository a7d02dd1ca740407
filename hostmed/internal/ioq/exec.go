package ioq

import (
	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// request is one fetched command on its way. Requests are reused; a worker has as many as were
// ever in flight at once.
type request struct {
	backend.Request // Owner is the index in Worker.reqs

	cmd  nvme.Command // the only copy: the SQE is never looked at again (R31)
	sq   *sq
	ns   *namespace
	vec  []backend.Seg // backing array of Vec, kept
	step step          // what is to be done when the backend has done with it
	then step          // and when it has flushed
	held bool          // waits: for the namespace's gate, for scratch memory, for its other half, for its turn
	paid bool          // may go, as far as limits are concerned

	leaving bool // moves data to or from memory that the client has taken back

	pair *pairOf // nil: it is no half of anything

	reserving *reserving // nil: it is no reservation command that waits

	// Of commands of several steps, see steps.go.
	buf   *shm.Region   // the medium's data
	guest []backend.Seg // Compare: what it is compared with
	pos   uint64        // bytes that are done
	end   uint64        // bytes in all; of a Copy, of the present range
	list  *ranges       // Dataset Management and Copy: what there is to do; kept
	from  uint64        // Copy: where on the medium the present range is
	to    uint64        // and where it goes to

	// Of commands that wait for their turn, see limits.go.
	lane  *lane // nil: it does not
	next  *request
	since int64
}

// take returns a request for a command of s.
func (w *Worker) take(s *sq) *request {
	var r *request
	if n := len(w.free) - 1; n >= 0 {
		r = w.free[n]
		w.free = w.free[:n]
	} else {
		r = &request{vec: make([]backend.Seg, 0, 2)}
		r.Owner, r.Cmd = uint64(len(w.reqs)), &r.cmd
		w.reqs = append(w.reqs, r)
	}
	r.sq = s
	s.inflight++
	s.g.inflight++
	return r
}

// give takes r back. It is the only place where the counts of take go down (R33).
func (w *Worker) give(r *request) {
	s := r.sq
	s.inflight--
	s.g.inflight--
	if r.pair != nil {
		w.leavePair(r)
	}
	if r.buf != nil {
		w.giveScratch(r)
	}
	if cap(r.vec) > keepVec {
		r.vec = make([]backend.Seg, 0, 2) // of a long SGL
	}
	r.sq, r.ns, r.reserving, r.paid, r.leaving = nil, nil, nil, false, false
	w.free = append(w.free, r)
}

// start decodes r's command and puts it in the batch, or completes it at once.
func (w *Worker) start(r *request) {
	c := &r.cmd
	ctl := r.sq.g.ctl
	r.step = oneStep
	if c.Flags != 0 {
		if st := w.flags(r); st == waits {
			return
		} else if st != nvme.StatusSuccess {
			w.complete(r, st)
			return
		}
	}
	if r.ns = ctl.namespace(c.NSID); r.ns == nil {
		var st nvme.Status
		if r.ns, st = ctl.look(c.NSID); r.ns == nil {
			w.complete(r, st.WithDNR())
			return
		}
	}
	gate := r.ns.of.Gate()
	if gate != nil && !w.passes(r, gate) {
		return
	}
	if p := r.ns.limits.Load(); p != nil && !r.paid && !w.pays(r, r.ns, p) {
		return
	}
	r.FUA, r.Dealloc, r.Keep = false, false, false
	var st nvme.Status
	switch c.Opcode {
	case nvme.IORead:
		r.Op = backend.OpRead
		st = w.data(r, true)
	case nvme.IOWrite:
		r.Op = backend.OpWrite
		r.FUA = c.FUA()
		st = w.data(r, false)
	case nvme.IOFlush:
		r.Op, r.Off, r.Len, r.Vec = backend.OpFlush, 0, 0, nil
	case nvme.IOWriteZeroes:
		r.Op, r.Vec = backend.OpWriteZeroes, nil
		r.FUA, r.Dealloc = c.FUA(), c.DEAC()
		st = r.blocks(c.SLBA(), uint64(c.NLB().Count()))
	default:
		r.Vec = nil
		if st = w.startSteps(r); st == waits {
			return
		}
	}
	if st == nvme.StatusSuccess && r.Op != backend.OpRead && r.ns.info.ReadOnly && r.writes() {
		st = nvme.StatusNamespaceWriteProtected.WithDNR()
	}
	if gate != nil && len(gate.Bad) > 0 && st == nvme.StatusSuccess {
		st = r.meets(gate)
	}
	if r.ns.dulbe.Load() && st == nvme.StatusSuccess {
		st = r.heedDULBE()
	}
	if st != nvme.StatusSuccess || r.step == noStep {
		w.complete(r, st)
		return
	}
	if c.FUA() && r.Op == backend.OpRead {
		r.fromMedia()
	}
	w.enqueue(r)
}

// writes says whether r's first operation changes the medium.
func (r *request) writes() bool {
	switch r.Op {
	case backend.OpRead, backend.OpFlush:
		return false
	case backend.OpCommand:
		return class(r) != subsys.Reads
	}
	return true
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

// enqueue puts r in the batch for its backend.
func (w *Worker) enqueue(r *request) {
	if (r.Op == backend.OpWrite || r.Op == backend.OpWriteZeroes) && r.sq.g.ctl.through.Load() {
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
	if w.extra {
		w.submitExtra(m, batch)
		return
	}
	n := m.q.Submit(batch, w.finished[:])
	m.vain, m.next = 0, 0
	w.inflight += len(batch) - n
	w.finish(w.finished[:n])
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
		if r.step == notBegun {
			w.begin(r)
			w.wakeStarved() // r may have failed before it took what it waited for
		} else {
			w.enqueue(r)
		}
	}
}

// reap takes what asynchronous backends have finished.
func (w *Worker) reap() int {
	work := 0
	for _, m := range w.queues {
		if m == nil || m.q.Inflight() == 0 || w.now < m.next {
			continue
		}
		if w.cost.wanted && w.trace == nil {
			work += w.reapSampled(m)
			continue
		}
		n := m.q.Reap(w.finished[:])
		if n == 0 {
			continue
		}
		w.cost.came()
		m.vain, m.next = 0, 0
		w.inflight -= n
		w.finish(w.finished[:n])
		work += n
	}
	w.flushBatch()
	return work
}

// finish takes requests that their backend has done with.
func (w *Worker) finish(done []*backend.Request) {
	if w.trace != nil {
		w.finishTraced(done)
		return
	}
	for _, b := range done {
		if r := w.reqs[b.Owner]; r.step == oneStep {
			w.stage(r, r.Status)
		} else {
			w.finishStep(r)
		}
	}
}

// finishStep takes a request of several steps when its backend has done with one.
func (w *Worker) finishStep(r *request) {
	w.current = r.sq.g
	st := r.Status
	if st == nvme.StatusSuccess && r.sq.g.state != Failed { // nobody waits for what is left of it then
		if st = w.next(r); st == waits {
			w.again = append(w.again, r)
			return
		}
	}
	if r.pair != nil {
		w.fusedDone(r, st)
		return
	}
	w.complete(r, st)
}
