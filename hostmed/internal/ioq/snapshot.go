package ioq

import (
	"slices"
	"sync/atomic"
	"time"

	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// What a snapshot and a kick by hand ask of workers. Both are asked for by somebody who only looks, so neither waits for a worker
// that hangs in a medium.

// Locate is where in the files that are handed over [iova, iova+n) is; its Size is 0 if it is in none.
type Locate func(iova, n uint64) inspect.Memory

// DoorbellPages is where the doorbells of I/O queues are; both are 0 while they are in registers.
type DoorbellPages struct{ Shadow, EventIndex uint64 }

// Snapshot appends the I/O queues to s.Queues, by id, and to s.Busy the workers that do not answer within patience, or have not answered the last
// snapshot yet. What such a worker says later is dropped.
func (c *Controller) Snapshot(s *inspect.Controller, pages DoorbellPages, at Locate, patience time.Duration) {
	got, busy := ask(c, patience, func(w *Worker, gs []*group) (queues []inspect.Queue) {
		for _, g := range gs {
			for _, q := range g.sqs {
				queues = append(queues, w.inspect(q))
			}
		}
		return queues
	})
	for _, queues := range got {
		s.Queues = append(s.Queues, queues...)
	}
	s.Busy = append(s.Busy, busy...)
	slices.SortFunc(s.Queues, func(a, b inspect.Queue) int { return int(a.QID) - int(b.QID) })
	slices.Sort(s.Busy)
	for i := range s.Queues {
		if q := &s.Queues[i]; q.QID != 0 {
			c.place(q, pages, at)
		}
	}
}

// place fills in what the session knows of a queue: where it is in memory, what its registers hold, and its vector.
func (c *Controller) place(q *inspect.Queue, pages DoorbellPages, at Locate) {
	q.SQMemory = at(q.SQMemory.IOVA, uint64(q.Size)*ring.SQESize)
	q.CQMemory = at(q.CQMemory.IOVA, uint64(q.CQSize)*ring.CQESize)
	c.PlaceBells(q, pages, at)
	c.VectorState(q)
}

// PlaceBells fills in where q's doorbells are, and what its registers hold.
func (c *Controller) PlaceBells(q *inspect.Queue, pages DoorbellPages, at Locate) {
	stride := nvme.DoorbellStride(c.cfg.DSTRD)
	for _, x := range [...]struct {
		b   *inspect.Bell
		off uint64
	}{{&q.SQ, 2 * uint64(q.QID) * uint64(stride)}, {&q.CQ, (2*uint64(q.CQID) + 1) * uint64(stride)}} {
		if r, err := c.bells.Word32(x.off); err == nil {
			x.b.Register = r.Load()
		}
		if pages != (DoorbellPages{}) {
			x.b.Slot, x.b.EventSlot = at(pages.Shadow+x.off, 4), at(pages.EventIndex+x.off, 4)
		}
	}
}

// VectorState fills in what has become of the interrupts of q.Vector.
func (c *Controller) VectorState(q *inspect.Queue) {
	if q.Vector < 0 || q.Vector >= len(c.vectors) {
		return
	}
	v := &c.vectors[q.Vector]
	q.VectorFD, q.VectorMasked, q.VectorLatch = v.given >= 0, v.masked != 0, v.pending.Load()
}

// AdminRung fills in which doorbell messages came for queue 0.
func (c *Controller) AdminRung(q *inspect.Queue) {
	q.Kicks, q.CQKicks = c.adminKicks[0].Load(), c.adminKicks[1].Load()
	q.SQ.Rung, q.CQ.Rung = c.adminRung[0].Load(), c.adminRung[1].Load()
}

// Coalesced reports whether interrupts may come late.
func (c *Controller) Coalesced() bool {
	_, delay := c.coalescing.get()
	return delay > 0
}

// StatsWithin is Stats that waits for patience at the most. What the workers that it returns have done is missing.
func (c *Controller) StatsWithin(patience time.Duration) (s Stats, busy []int) {
	s = c.past
	s.SQDoorbells, s.CQDoorbells = c.rung[0].Load(), c.rung[1].Load()
	got, busy := ask(c, patience, func(_ *Worker, gs []*group) (s Stats) {
		for _, g := range gs {
			s.add(g.stats)
		}
		return s
	})
	for _, x := range got {
		s.add(x)
	}
	s.Busy = c.busy.get()
	return s, busy
}

// ask runs f on the thread of each worker that has groups, with those, and returns what it says there; and the workers that have not answered within
// patience, or have yet to answer what they were asked before. Nobody hears what they say later.
func ask[T any](c *Controller, patience time.Duration, f func(*Worker, []*group) T) (got []T, busy []int) {
	type survey struct {
		w    *Worker
		got  chan T
		late atomic.Bool // nobody waits any more
	}
	var asked []*survey
	for i, w := range c.cfg.Workers {
		gs := c.groupsOf(w) // which they are is the session's to say
		if len(gs) == 0 {
			continue
		}
		owed := &c.owed[i]
		if owed.Swap(true) {
			busy = append(busy, w.id)
			continue
		}
		v := &survey{w: w, got: make(chan T, 1)}
		asked = append(asked, v)
		w.post(func() {
			var answer T
			defer func() { // also if memory faults
				owed.Store(false) // first: who has the answer may ask again
				v.got <- answer
			}()
			if !v.late.Load() { // otherwise the groups may be gone
				answer = f(w, gs)
			}
		})
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for _, v := range asked {
		select {
		case x := <-v.got:
			got = append(got, x)
		case <-timer.C:
			timer.Reset(0) // for the others
			select {
			case x := <-v.got:
				got = append(got, x)
			default:
				v.late.Store(true)
				busy = append(busy, v.w.id)
			}
		}
	}
	return got, busy
}

// mono returns a reading of the worker's clock as CLOCK_MONOTONIC; 0 stays 0.
func mono(at int64) int64 {
	if at == 0 {
		return 0
	}
	return startedAt + at
}

// inspect returns what w knows of s.
func (w *Worker) inspect(s *sq) inspect.Queue {
	g := s.g
	q := inspect.Queue{
		QID: s.qid, CQID: g.qid, Size: s.cons.Size(), CQSize: g.prod.Size(), Worker: w.id, State: s.shows().String(),
		SQ:     inspect.Bell{Private: s.cons.Head(), Asked: s.tail.Put(), Rung: s.rung.Load(), Born: s.born},
		CQ:     inspect.Bell{Private: g.prod.Head(), Asked: g.head.Put(), Rung: g.rung.Load(), Born: g.born},
		CQTail: g.prod.Tail(), Inflight: s.inflight, Staged: uint32(len(g.staged)), Held: s.waiting, Room: g.room(),
		Blocked: g.blocked && g.state != Failed, Full: s.full, Unseen: g.unseen,
		ArmedAt: mono(g.armedAt), ArmIndex: s.tail.Index, ArmSaw: s.tail.Saw,
		Kicks: s.kicks.Load(), CQKicks: g.kicks.Load(), Armed: g.sleeps, ArmLost: s.tail.Lost, Spurious: s.spurious,
		Commands: s.fetched, Completions: g.posted, LastFetch: mono(s.fetchedAt), LastPost: mono(g.postedAt), LastLook: mono(w.now),
		Interrupts: g.stats.Interrupts, Unraised: g.unraised, Vector: -1, ResumedAt: mono(g.resumedAt), Fresh: s.fresh || g.fresh,
		SQMemory: inspect.Memory{IOVA: s.iova}, CQMemory: inspect.Memory{IOVA: g.iova},
	}
	if g.armedAt != 0 {
		q.KicksAsleep = q.Kicks - s.kicksWas + q.CQKicks - g.kicksWas
	}
	if g.ien {
		q.Vector = int(g.index)
	}
	for _, r := range w.held {
		if r.sq == s {
			q.Held++
		}
	}
	if g.state == Failed || g.state == Absent { // its doorbells may be anybody's
		return q
	}
	w.current = g
	if event, shared := s.tail.Asked(); shared {
		q.SQ.Page, q.SQ.Event = s.tail.Peek(), event
	}
	if event, shared := g.head.Asked(); shared {
		q.CQ.Page, q.CQ.Event = g.head.Peek(), event
	}
	return q
}

// shows is the state of s, which is its group's unless it is in one of its own.
func (s *sq) shows() State {
	if s.state != Polling {
		return s.state
	}
	return s.g.state
}

// maxKicking is how many kicks of a controller may wait for their workers.
const maxKicking = 16

// Kick makes the worker of I/O queue qid look at it as a doorbell would (R27), and returns what it found. The error says that there is no such queue, or
// that the worker does not answer within patience: then it looks when it does. Any goroutine may call it.
func (c *Controller) Kick(qid uint16, patience time.Duration) (k inspect.Kick, err error) {
	var s *sq
	if int(qid) < len(c.sqs) {
		s = c.sqs[qid].Load()
	}
	if s == nil {
		return k, inspect.ErrNoQueue
	}
	if c.kicking.Add(1) > maxKicking {
		c.kicking.Add(-1)
		return k, inspect.ErrBusy
	}
	w := s.g.w
	got := make(chan inspect.Kick, 1)
	w.post(func() {
		defer c.kicking.Add(-1)
		if c.sqs[qid].Load() == s { // and it was not deleted meanwhile
			got <- w.probe(s)
		} else {
			close(got)
		}
	})
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case k, ok := <-got:
		if !ok {
			return k, inspect.ErrNoQueue
		}
		return k, nil
	case <-timer.C:
		return k, inspect.ErrBusy
	}
}

// probe is the worker's part of Kick.
func (w *Worker) probe(s *sq) inspect.Kick {
	g := s.g
	k := inspect.Kick{QID: s.qid, State: s.shows().String()}
	if g.state != Armed && g.state != Polling {
		return k
	}
	w.current = g
	k.Woken, k.Awake = g.state == Armed, g.state == Polling
	if tail, size := s.tail.Peek(), s.cons.Size(); tail < size {
		k.Found = (tail + size - s.cons.Head()) % size
	}
	w.wake(g)
	return k
}
