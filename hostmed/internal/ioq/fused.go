package ioq

import (
	"fmt"
	"slices"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Fused Compare and Write, NVMe Base 2.0c 3.4.2:
//
//  1. The first is held back until its SQ's next command is fetched, however long that takes. It blocks nothing: like all that is held back
//     it has not begun, and ends with its queue. Any other next command ends it.
//  2. If there are limits, the first waits in its lane for both.
//  3. Both are held back until the namespace is exclusively theirs: nothing else of it is in flight, on any
//     worker, for any controller. A worker asks for one pair at a time.
//  4. The comparison runs, with scratch memory that is kept for it, then the write. Then the namespace is free.

// pairOf is a Compare and a Write that are one.
type pairOf struct {
	first, second *request // nil: over
	queued        bool     // in Worker.pairs, or the one that is asked for
	done          func()   // gives the namespace back; nil: it is not held
}

// flags deals with flags that are not all zero: success if r is no half of a pair.
func (w *Worker) flags(r *request) nvme.Status {
	fuse := r.cmd.FUSE()
	switch {
	case r.cmd.PSDT() > nvme.PSDTSGLMPTR, fuse > nvme.FuseSecond, fuse == nvme.FuseFirst && r.cmd.Opcode != nvme.IOCompare:
		return nvme.StatusInvalidField.WithDNR()
	case fuse == nvme.FuseNormal:
		return nvme.StatusSuccess
	case r.pair != nil: // it waited, and goes on waiting
		w.hold(r)
		w.queuePair(r.pair)
		return waits
	case fuse == nvme.FuseFirst:
		w.hold(r)
		r.sq.first = r
		return waits
	}
	return nvme.StatusAbortMissingFused
}

// second takes r, which came after a first half.
func (w *Worker) second(r *request) {
	first := w.unhold(func(x *request) bool { return x == r.sq.first })
	a, b := &first.cmd, &r.cmd
	switch {
	case b.FUSE() != nvme.FuseSecond:
		w.complete(first, nvme.StatusAbortMissingFused)
		w.start(r)
	case b.Opcode != nvme.IOWrite, b.PSDT() > nvme.PSDTSGLMPTR, a.NSID != b.NSID, a.SLBA() != b.SLBA(), a.NLB() != b.NLB():
		w.complete(first, nvme.StatusInvalidField.WithDNR())
		w.complete(r, nvme.StatusInvalidField.WithDNR())
	default:
		p := &pairOf{first: first, second: r}
		r.step = oneStep // what it was of an earlier command would count
		first.pair, r.pair = p, p
		w.hold(r)
		if n := r.sq.g.ctl.namespace(a.NSID); n != nil {
			if path := n.limits.Load(); path != nil && !w.pays(first, n, path) {
				return
			}
		}
		w.hold(first)
		w.queuePair(p)
	}
}

// queuePair puts p in line for its namespace.
func (w *Worker) queuePair(p *pairOf) {
	if p.queued || p.done != nil || p.first != nil && p.first.lane != nil {
		return
	}
	p.queued = true
	w.pairs = append(w.pairs, p)
	w.nextPair()
}

// nextPair asks for the namespace of the next pair.
func (w *Worker) nextPair() {
	for !w.pairing && len(w.pairs) > 0 {
		p := w.pairs[0]
		w.pairs = slices.Delete(w.pairs, 0, 1)
		if p.first == nil || p.second == nil {
			p.queued = false
			continue
		}
		w.pairing = true
		of := (*subsys.Namespace)(nil)
		if n := p.first.sq.g.ctl.namespace(p.first.cmd.NSID); n != nil {
			of = n.of
			of.BeginExclusive(func(done func()) { w.post(func() { w.beginPair(p, of, done) }) })
		} else {
			w.post(func() { w.beginPair(p, nil, func() {}) })
		}
	}
}

// beginPair is called when of is held for p; nil: there was no such namespace.
func (w *Worker) beginPair(p *pairOf, of *subsys.Namespace, done func()) {
	p.queued, p.done = false, done
	f, s := p.first, p.second
	if f == nil || s == nil || !f.held || !f.sq.g.begins() {
		w.endPair(p) // if it is only paused, retryHeld brings it back
		return
	}
	n := f.sq.g.ctl.namespace(f.cmd.NSID)
	if n != nil && n.of != of {
		w.endPair(p)
		w.queuePair(p)
		return
	}
	w.current = f.sq.g
	w.unhold(func(x *request) bool { return x == f })
	w.fusedDone(f, w.beginCompare(f, n))
	w.flushBatch()
	w.postAll()
}

// beginCompare begins the first half: waits if it has.
func (w *Worker) beginCompare(r *request, n *namespace) nvme.Status {
	if n == nil {
		if _, st := r.sq.g.ctl.look(r.cmd.NSID); !st.OK() {
			return st.WithDNR()
		}
		return nvme.StatusInvalidField.WithDNR() // attached this moment, and not held
	}
	r.ns = n
	r.FUA, r.Dealloc, r.Vec = false, false, nil
	for _, class := range [...]subsys.Class{subsys.Reads, subsys.Writes} {
		if gate := n.of.Gate(); gate != nil {
			if verdict, st := gate.CheckHolder(class, r.sq.g.ctl.host()); verdict == subsys.Refuse {
				return st
			}
		}
	}
	if w.pairScratch == nil {
		w.pairScratch = shm.NewHeap(scratchSize)
	}
	r.buf = w.pairScratch
	st := w.guarded(r, func() nvme.Status { return w.comparison(r) })
	if gate := n.of.Gate(); gate != nil && st == nvme.StatusSuccess {
		st = r.meets(gate)
	}
	if n.dulbe.Load() && st == nvme.StatusSuccess {
		st = r.heedDULBE()
	}
	if st != nvme.StatusSuccess {
		return st
	}
	if r.cmd.FUA() {
		r.fromMedia()
	}
	w.again = append(w.again, r)
	return waits
}

// beginWrite begins the second half: waits if it has.
func (w *Worker) beginWrite(r *request, n *namespace) nvme.Status {
	r.ns = n
	r.Op, r.FUA, r.Dealloc, r.Vec = backend.OpWrite, r.cmd.FUA(), false, nil
	st := w.guarded(r, func() nvme.Status { return w.data(r, false) })
	if st == nvme.StatusSuccess && n.info.ReadOnly {
		st = nvme.StatusNamespaceWriteProtected.WithDNR()
	}
	if st != nvme.StatusSuccess {
		return st
	}
	r.step = marked // or not: next looks
	w.again = append(w.again, r)
	return waits
}

// fusedDone takes one half that has ended with st.
func (w *Worker) fusedDone(r *request, st nvme.Status) {
	p := r.pair
	switch {
	case st == waits:
	case r == p.second:
		w.complete(r, st)
	default:
		n := r.ns
		r.buf = nil
		if w.complete(r, st); p.second == nil {
			return // its queue is being deleted
		}
		s := w.unhold(func(x *request) bool { return x == p.second })
		switch {
		case st != nvme.StatusSuccess:
			w.complete(s, nvme.StatusAbortFailedFused)
		case s.sq.g.state == Failed:
			w.give(s)
		default:
			if st := w.beginWrite(s, n); st != waits {
				w.complete(s, st)
			}
		}
	}
}

// leavePair is called when r is given back. With the second of them the pair is over.
func (w *Worker) leavePair(r *request) {
	p := r.pair
	r.pair = nil
	if p.first == r {
		p.first = nil
		if r.buf == w.pairScratch {
			r.buf = nil
		}
	} else {
		p.second = nil
	}
	if p.first == nil && p.second == nil && p.done != nil {
		w.endPair(p)
	}
}

// endPair gives the namespace back and asks for the next.
func (w *Worker) endPair(p *pairOf) {
	p.done()
	p.done = nil
	w.pairing = false
	w.nextPair()
}

// guarded runs f, which touches guest memory: if that has gone, r's group fails, and what r holds is given back in order.
func (w *Worker) guarded(r *request, f func() nvme.Status) (st nvme.Status) {
	if err := shm.Guard(func() { st = f() }); err != nil {
		if g := r.sq.g; g.state != Failed {
			w.failGroup(g)
			g.ctl.cfg.OnError(QueueError{QID: g.qid, Kind: MemoryFault, Err: fmt.Errorf("%s: %w", nvme.IOOpcodeName(r.cmd.Opcode), err)})
		}
		return nvme.StatusDataTransferError
	}
	return st
}
