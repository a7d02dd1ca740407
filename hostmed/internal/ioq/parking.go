package ioq

import (
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/gmem"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Memory that the client takes from under the queues, and gives back.
//
//	Polling, Armed -> Draining -> Parked   the CQ's memory is being unmapped; what is in flight is completed first
//	Parked -> Polling                      all of it is mapped again: every queue is probed (R27)
//
// An SQ is parked by itself; its CQ's other SQs go on. A parked queue keeps heads, tails and phase, and its doorbells are
// taken as ever, so that nothing is lost, but its memory is not touched.
//
// Behind a vIOMMU a guest maps and unmaps for each of its I/Os, so an unmap disturbs as little as it can: one
// look by each worker that has queues of this controller, between two rounds. A command that is in flight is waited for
// only if it uses the memory that goes (R35), and not for ever: a medium that hangs would keep the client from all else.

// fewRanges is how many ranges of an unmap are compared with the memory of each command in flight. For more
// of them all commands are waited for.
const fewRanges = 16

// lost reports whether [iova, iova+n) is in any of gone.
func lost(gone []gmem.Range, iova, n uint64) bool {
	return slices.ContainsFunc(gone, func(r gmem.Range) bool { return r.IOVA < iova+n && iova < r.IOVA+r.Size })
}

// Unmapped is called after gone was taken out of the table, and before it is released. When it returns no queue touches it any more, nor an older
// table. If it returns true, which it does within patience or not at all, no command does either. Otherwise media still move data there that they were
// given before, and gone may not be released yet: OnReleased is called when Released may have become true.
func (c *Controller) Unmapped(gone []gmem.Range, patience time.Duration) bool {
	over, end := true, time.Now().Add(patience)
	for _, w := range c.involved() {
		var left *leaving
		var parked bool
		// Between two rounds nothing is half translated: what is translated after this is so by the new table.
		w.Call(func() { left, parked = w.letGo(c, gone) })
		c.parked = c.parked || parked
		if left == nil {
			continue
		}
		over = w.outlastFor(max(time.Until(end), 0), left.has, left.over, c.cfg.OnReleased) && over
		if parked {
			w.Call(func() { w.parkDrained(c) })
		}
	}
	return over
}

// Released reports whether no command moves data to or from memory any more that Unmapped was told of.
func (c *Controller) Released() (released bool) {
	released = true
	for _, w := range c.cfg.Workers {
		w.Call(func() {
			released = released && !slices.ContainsFunc(w.reqs, func(r *request) bool { return r.leaving && r.sq.g.ctl == c })
		})
	}
	return released
}

// leaving is what was in flight when memory was unmapped, and needs it: commands that move data there, and the CQs whose completions are to be posted there.
type leaving struct {
	reqs []*request
	cqs  []*group
}

func (l *leaving) has(r *request) bool { return r.leaving || slices.Contains(l.cqs, r.sq.g) }

func (l *leaving) over() bool {
	l.reqs = slices.DeleteFunc(l.reqs, func(r *request) bool { return !r.leaving })
	return len(l.reqs) == 0 && !slices.ContainsFunc(l.cqs, func(g *group) bool { return g.inflight > g.held || len(g.staged) > 0 })
}

// involved returns the workers that have queues of c.
func (c *Controller) involved() (ws []*Worker) {
	for _, g := range c.groups {
		if !slices.Contains(ws, g.w) {
			ws = append(ws, g.w)
		}
	}
	return ws
}

// letGo begins to park the queues that lie in gone. left is what in flight still uses it; nil: nothing does.
func (w *Worker) letGo(c *Controller, gone []gmem.Range) (left *leaving, parked bool) {
	l := &leaving{}
	inflight := false
	for _, g := range c.groups {
		if g.w != w {
			continue
		}
		inflight = inflight || g.inflight > g.held // what a gate holds back has not begun
		if g.state == Failed {
			continue
		}
		for _, s := range g.sqs {
			if s.state == Polling && lost(gone, s.iova, uint64(s.cons.Size())*ring.SQESize) {
				w.parkSQ(s)
				parked = true
			}
		}
		if g.state != Parked && lost(gone, g.iova, uint64(g.prod.Size())*ring.CQESize) {
			g.state, g.parking = Draining, true
			l.cqs = append(l.cqs, g)
			parked = true
		}
	}
	if inflight {
		for _, r := range w.reqs {
			if r.sq != nil && !r.held && r.sq.g.ctl == c && (len(gone) > fewRanges || r.touches(gone)) {
				r.leaving = true
				l.reqs = append(l.reqs, r)
			}
		}
	}
	if !l.over() {
		return l, parked
	}
	w.parkDrained(c)
	return nil, parked
}

func (w *Worker) parkSQ(s *sq) {
	s.state = Parked
	s.cons.Detach()
	closeMemory(&s.mem)
}

// parkDrained parks the CQs that waited for what was in flight.
func (w *Worker) parkDrained(c *Controller) {
	for _, g := range c.groups {
		if g.w == w && g.parking {
			g.parking = false
			if g.state == Draining { // and has not failed meanwhile
				g.state = Parked
				g.prod.Detach()
				closeMemory(&g.mem)
			}
		}
	}
}

func closeMemory(m **shm.Region) {
	if *m != nil {
		_ = (*m).Close() // munmap of what was mapped cannot fail
		*m = nil
	}
}

// Mapped is called when the client has mapped something: queues whose memory is all there again go on.
func (c *Controller) Mapped() {
	if !c.parked {
		return
	}
	table, still := c.mem.Table(), false
	// Which queues are parked changes only while this goroutine waits, but for a failure.
	for _, g := range c.groups {
		if g.mem == nil {
			if mem, err := table.View(g.iova, uint64(g.prod.Size())*ring.CQESize); err != nil {
				still = true
			} else {
				g.w.Call(func() { g.w.unparkCQ(g, mem) })
			}
		}
		for _, s := range g.sqs {
			if s.mem != nil {
				continue
			}
			if mem, err := table.View(s.iova, uint64(s.cons.Size())*ring.SQESize); err != nil {
				still = true
			} else {
				g.w.Call(func() { g.w.unparkSQ(s, mem) })
			}
		}
	}
	c.parked = still
}

func (w *Worker) unparkCQ(g *group, mem *shm.Region) {
	g.mem = mem
	if g.state != Parked || g.prod.Attach(mem) != nil { // the size is what it was: it fits
		return
	}
	g.state, g.mute = Draining, g.ctl.held
	if len(g.staged) > 0 {
		w.postGroup(g)
	}
	if !g.ctl.held {
		w.resume(g)
		w.retryHeld()
	}
}

func (w *Worker) unparkSQ(s *sq, mem *shm.Region) {
	s.mem = mem
	if s.state != Parked || s.cons.Attach(mem) != nil {
		return
	}
	s.state = Polling
	if s.g.state == Armed || s.g.state == Polling {
		w.resume(s.g)
	}
}
