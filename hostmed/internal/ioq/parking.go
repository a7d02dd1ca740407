package ioq

import (
	"slices"

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
// only if it uses the memory that goes (R35).

// fewRanges is how many ranges of an unmap are compared with the memory of each command in flight. For more
// of them all commands are waited for.
const fewRanges = 16

// lost reports whether [iova, iova+n) is in any of gone.
func lost(gone []gmem.Range, iova, n uint64) bool {
	return slices.ContainsFunc(gone, func(r gmem.Range) bool { return r.IOVA < iova+n && iova < r.IOVA+r.Size })
}

// Unmapped is called after gone was taken out of the table, and before it is released. When it returns no queue and no
// command touches it any more, nor an older table.
func (c *Controller) Unmapped(gone []gmem.Range) {
	for _, w := range c.involved() {
		var wait, parked bool
		// Between two rounds nothing is half translated: what is translated after this is so by the new table.
		w.Call(func() { wait, parked = w.letGo(c, gone) })
		c.parked = c.parked || parked
		if !wait {
			continue
		}
		w.outlast(func(r *request) bool {
			return r.sq.g.ctl == c && (r.sq.g.parking || len(gone) > fewRanges || r.touches(gone))
		},
			func() bool { return !w.uses(c, gone) })
		if parked {
			w.Call(func() { w.parkDrained(c) })
		}
	}
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

// letGo begins to park the queues that lie in gone. wait says that something in flight still uses it.
func (w *Worker) letGo(c *Controller, gone []gmem.Range) (wait, parked bool) {
	for _, g := range c.groups {
		if g.w != w || g.state == Failed {
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
			parked = true
		}
	}
	if w.uses(c, gone) {
		return true, parked
	}
	w.parkDrained(c)
	return false, parked
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

// uses reports whether a completion has yet to be posted to a CQ in gone, or a command in flight moves data there.
func (w *Worker) uses(c *Controller, gone []gmem.Range) bool {
	inflight := false
	for _, g := range c.groups {
		if g.w != w {
			continue
		}
		begun := g.inflight > g.held // what a gate holds back has not
		inflight = inflight || begun
		if g.parking && (begun || len(g.staged) > 0) {
			return true
		}
	}
	if !inflight {
		return false
	}
	if len(gone) > fewRanges {
		return true
	}
	for _, r := range w.reqs {
		if r.sq != nil && !r.held && r.sq.g.ctl == c && r.touches(gone) {
			return true
		}
	}
	return false
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
	g.state = Draining
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
