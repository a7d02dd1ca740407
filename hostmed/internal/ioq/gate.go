package ioq

import (
	"slices"

	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Commands that a namespace's gate holds back, for which there is no scratch memory, or whose fused other half has yet to come, wait on their worker, and so
// do, in lanes of their own (limits.go), those that limits hold back. They are fetched, so each has its place in the CQ, but
// nothing of them has begun: no memory is translated, and so DMA_UNMAP need not wait for them. They are counted in
// group.held beside group.inflight.

// passes asks r's gate, which is there. If it returns false r is held back or complete.
func (w *Worker) passes(r *request, gate *subsys.Gate) bool {
	verdict, st := gate.Check(class(r), r.sq.g.ctl.host())
	switch verdict {
	case subsys.Wait:
		w.hold(r)
	case subsys.Refuse:
		w.complete(r, st)
	default:
		return true
	}
	return false
}

// hold keeps r back.
func (w *Worker) hold(r *request) {
	r.held = true
	r.sq.g.held++
	w.held = append(w.held, r)
}

func (c *Controller) host() subsys.Host {
	if c.cfg.Self == nil {
		return subsys.Host{}
	}
	return c.cfg.Self.Host()
}

// begins reports whether commands of g that were held back may begin: not while it is paused.
func (g *group) begins() bool { return g.state != Draining && g.state != Parked }

// unhold takes the oldest command that waits and that f chooses out of w.held; nil: there is none.
func (w *Worker) unhold(f func(*request) bool) *request {
	i := slices.IndexFunc(w.held, f)
	if i < 0 {
		return nil
	}
	r := w.held[i]
	w.held = slices.Delete(w.held, i, i+1)
	r.held = false
	r.sq.g.held--
	if r.sq.first == r {
		r.sq.first = nil
	}
	return r
}

// retryHeld begins all commands that wait from the start: their namespace may be gone, or its gate still closed. Those of a
// controller that is paused, or of a CQ that is parked, wait for it to be resumed.
func (w *Worker) retryHeld() {
	if len(w.stalled) > 0 {
		w.newTurns()
	}
	for range len(w.held) { // what is held back again goes to the end
		r := w.unhold(func(r *request) bool { return r.sq.g.begins() })
		if r == nil {
			break
		}
		w.begin(r)
	}
	w.flushBatch()
	w.postAll()
}

// dropHeld ends the commands of s that wait, since it is being deleted.
func (w *Worker) dropHeld(s *sq) {
	of := func(r *request) bool { return r.sq == s }
	for r := w.unhold(of); r != nil; r = w.unhold(of) {
		w.complete(r, nvme.StatusAbortSQDeleted)
	}
	for r := w.unlane(s, of); r != nil; r = w.unlane(s, of) {
		w.complete(r, nvme.StatusAbortSQDeleted)
	}
}

// forgetHeld ends g's commands that wait without a word.
func (w *Worker) forgetHeld(g *group) {
	of := func(r *request) bool { return r.sq.g == g }
	for r := w.unhold(of); r != nil; r = w.unhold(of) {
		w.give(r)
	}
	for _, s := range g.sqs {
		for r := w.unlane(s, of); r != nil; r = w.unlane(s, of) {
			w.give(r)
		}
	}
}
