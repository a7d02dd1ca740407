package ioq

import (
	"slices"

	"github.com/shadowbell/shadowbell/hostmed/internal/broken"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Weighted round robin with urgent priority class, for a driver that asks for it (CC.AMS). NVMe Base 2.0c 3.4.4. Urgent SQs come first, always. The
// others share by class: in each cycle so many commands of a class are fetched as it has credits, which are its weight, and no more than a burst from one
// SQ at a time. A class without commands takes no part. The admin queue is not among them: it is the session's.
//
// What is weighed is what one worker has of one controller: SQs of several workers do not compete.

// The classes, as QPRIO counts them.
const (
	urgent = iota
	high
	medium
	low
	classCount
)

// arbiter is a controller's SQs on one worker.
type arbiter struct {
	ctl    *Controller
	sqs    [classCount][]*sq
	next   [classCount]int    // whose turn it is in a class
	credit [classCount]uint32 // what is left of this cycle
	by     nvme.Arbitration   // what the credits are by

	turns struct { // the same of what limits hold back, see weighted.go
		next   [classCount]int
		credit [classCount]uint32
		by     nvme.Arbitration
	}
}

// SetArbitration says by CC.AMS and feature 01h how SQs share. weighted counts for CQs that are created later.
func (c *Controller) SetArbitration(weighted bool, v nvme.Arbitration) {
	c.weighted = weighted
	c.arbitration.Store(uint32(v))
}

// arbiterFor returns what arbitrates for c on w; nil: nothing.
func (c *Controller) arbiterFor(w *Worker) *arbiter {
	if !c.weighted {
		return nil
	}
	for _, g := range c.groups {
		if g.w == w && g.arbiter != nil {
			return g.arbiter
		}
	}
	return &arbiter{ctl: c}
}

func (a *arbiter) add(s *sq) { a.sqs[s.prio] = append(a.sqs[s.prio], s) }

func (a *arbiter) drop(s *sq) {
	a.sqs[s.prio] = slices.DeleteFunc(a.sqs[s.prio], func(x *sq) bool { return x == s })
}

// turn fetches a batch.
func (a *arbiter) turn(w *Worker) int {
	v := nvme.Arbitration(a.ctl.arbitration.Load())
	burst := uint32(batchMax)
	if ab := v.AB(); ab < 4 { // 16 and more are no limit here
		burst = 1 << ab
	}
	if v != a.by {
		a.by, a.credit = v, [classCount]uint32{}
	}
	work, fresh := uint32(0), false
	for work < batchMax {
		n := a.serve(w, urgent, min(burst, batchMax-work))
		for class := high; class <= low && n == 0; class++ {
			if a.credit[class] > 0 {
				n = a.serve(w, class, min(burst, a.credit[class], batchMax-work))
				a.credit[class] -= n
			}
		}
		work += n
		if n > 0 {
			fresh = false
			continue
		}
		if fresh { // nobody has anything
			break
		}
		fresh = true
		a.credit = [...]uint32{0, v.HPW().Count(), v.MPW().Count(), v.LPW().Count()}
	}
	if work > 0 {
		w.flushBatch()
		w.postAll()
		if w.extra {
			w.endExtra()
		}
	}
	return int(work)
}

// serve fetches at most that many commands from the next SQ of class that has some and may.
func (a *arbiter) serve(w *Worker, class int, most uint32) uint32 {
	list := a.sqs[class]
	for i := range list {
		at := a.next[class] + i
		if at %= len(list); a.ready(w, list[at]) {
			s := list[at]
			n, err := s.cons.Pending(s.tail.Load())
			if err != nil {
				w.badDoorbell(s.g, s.qid, BadSQTail, err)
				continue
			}
			if n = min(n, s.g.room(), most); n == 0 {
				continue
			}
			a.next[class] = at + 1
			w.fetchFrom(s, n)
			return n
		}
	}
	return 0
}

// ready says whether s has commands that may be fetched, as far as its CQ has room for them.
func (a *arbiter) ready(w *Worker, s *sq) bool {
	g := s.g
	if g.state != Polling || s.state != Polling || s.full || s.tail.Load() == s.cons.Head() {
		return false
	}
	w.current = g
	if g.room() == 0 && w.makeRoom(g) == 0 { // R9
		g.blocked = g.state != Failed
		return false
	}
	return true
}

// fetchFrom is what poll does with n commands of an SQ.
func (w *Worker) fetchFrom(s *sq, n uint32) {
	g := s.g
	w.current = g
	g.blocked, g.worked = false, true
	if w.cost.left--; w.cost.left == 0 {
		w.sample(g)
	}
	w.fetch(s, n)
	if w.cost.on {
		w.cost.charge(&g.stats.Costs.Translate, int(n))
	}
	if broken.On(broken.Sentinel) {
		s.tail.Ask(never)
	} else {
		s.tail.Behind(s.cons.Head())
	}
}
