package ioq

import (
	"slices"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Abort, NVMe Base 2.0c 5.1. What waits can be aborted: commands that were not fetched, because their CQ has no room, their queue or their
// controller is paused, or nobody has come to it yet; and commands that are held back. What a backend has begun cannot, unless it keeps it back
// for just that.

// toAbort is a command in an SQ that will be aborted when it is fetched.
type toAbort struct {
	index uint32 // in the ring
	cid   uint16
}

// Abort reports whether the command will be completed with Command Abort Requested.
func (c *Controller) Abort(sqid, cid uint16) (aborted bool) {
	s := c.sqs[sqid].Load()
	if s == nil {
		return false
	}
	w := s.g.w
	w.Call(func() { aborted = w.abort(s, cid) })
	return aborted
}

func (w *Worker) abort(s *sq, cid uint16) bool {
	if !s.g.begins() || s.g.state == Failed {
		return false
	}
	w.current = s.g
	r := w.unhold(func(r *request) bool { return r.sq == s && r.cmd.CID == cid && !r.running() })
	if r == nil {
		r = w.unlane(s, func(r *request) bool { return r.cmd.CID == cid })
	}
	if r != nil {
		w.abortHeld(r)
		w.flushBatch()
		w.postAll()
		return true
	}
	if w.giveUp(true, func(r *request) bool { return r.sq == s && r.cmd.CID == cid }) > 0 {
		return true
	}
	if s.state != Polling {
		return false
	}
	n, err := s.cons.Pending(s.tail.Load())
	if err != nil {
		return false // poll will say so
	}
	if n > 0 && s.g.state == Armed && !s.g.blocked && !s.full && !s.g.unseen {
		w.missing(s, n)
	}
	for i := range n {
		if is, index := s.cons.Waiting(i); is == cid {
			if x := (toAbort{index, cid}); !slices.Contains(s.aborts, x) {
				s.aborts = append(s.aborts, x)
			}
			return true
		}
	}
	return false
}

// missing deals with commands in a queue that sleeps: their doorbell was not rung, or was lost on its way. The host gave up waiting, so
// some time has passed. The queue is polled again, and the log has what the page says, which tells whose mistake it was: at an event index
// that is the queue's head the driver had to ring.
func (w *Worker) missing(s *sq, n uint32) {
	asked, shared := s.tail.Asked()
	w.log.Warn("a doorbell has not come yet", "sqid", s.qid, "tail", s.tail.Load(), "head", s.cons.Head(), "commands", n,
		"shadow", shared, "event_index", asked, "armed", s.tail.Armed, "lost", s.tail.Lost)
	w.resume(s.g)
}

// running reports whether r is half of a pair that is being executed.
func (r *request) running() bool { return r.pair != nil && r.pair.done != nil }

// abortHeld completes r, and its other half.
func (w *Worker) abortHeld(r *request) {
	if p := r.pair; p != nil {
		other, st := p.first, nvme.StatusAbortMissingFused
		if r == p.first {
			other, st = p.second, nvme.StatusAbortFailedFused
		}
		of := func(x *request) bool { return x == other }
		if w.unhold(of) == nil {
			w.unlane(other.sq, of)
		}
		defer w.complete(other, st)
	}
	w.complete(r, nvme.StatusAbortRequested)
}

// startOdd is start for a command of a queue in which one is to be aborted, or waits for its other half.
func (w *Worker) startOdd(r *request) {
	s := r.sq
	r.step = oneStep                           // what it was of an earlier command would count
	index := s.cons.Head() + s.cons.Size() - 1 // of what was fetched last
	if index >= s.cons.Size() {
		index -= s.cons.Size()
	}
	abort := false
	s.aborts = slices.DeleteFunc(s.aborts, func(x toAbort) bool {
		abort = abort || x == toAbort{index, r.cmd.CID}
		return x.index == index
	})
	switch {
	case abort:
		if first := s.first; first != nil {
			w.unhold(func(x *request) bool { return x == first })
			w.complete(first, nvme.StatusAbortMissingFused)
		}
		w.complete(r, nvme.StatusAbortRequested)
	case s.first != nil:
		w.second(r)
	default:
		w.start(r)
	}
}
