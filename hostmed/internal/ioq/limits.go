package ioq

import (
	"container/heap"
	"math"
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Limits of namespaces and controllers. A command is asked for its price after the gate and before anything of it has begun. One that may
// not go yet is held back as others are (gate.go), but in a lane:
//
//  1. There is a lane for each SQ, namespace and class (reads, writes, others, and what both reads and writes) of which something waits. So what waits blocks
//     neither other namespaces in the same SQ, nor reads those that only the limit of writes holds back.
//  2. In a lane commands go in the order in which they were fetched. The first has paid, and its ticket says when it may go; the others
//     have not: so each lane has one place in the line, however much waits in it, and lanes of all workers have equal parts.
//  3. The worker has its lanes in a heap by that time, and sleeps until the first.
//  4. A queue of which everything that may come has to wait as well is neither polled nor armed until the next turn, if that is near: the
//     driver does not ring for what cannot go. That is no sleep in the sense of R12, since the clock ends it, not the driver.
//
// A queue of which fullLane commands wait is not fetched from until half of them have gone, which bounds what a guest can make hostmed remember.

// fullLane is as many commands as drivers usually have in a queue.
const fullLane = 1024

// longestUnseen is how near, in ns, the next turn of such a queue is. What no limit holds back after all, such as a Flush where only bytes are
// limited, may have to wait that long.
const longestUnseen = int64(4 * time.Millisecond)

// lane is commands that wait for their turn.
type lane struct {
	sq     *sq
	ns     *namespace
	class  qos.Class
	ticket qos.Ticket // of first
	at     int64      // when first may go, as far as is known
	seq    uint64     // of the time when that was asked
	index  int        // in Worker.lanes; stalled: in Worker.stalled; behind: in neither

	first, last *request
}

// both is the class of lanes for what is twoSided.
const both = qos.Classes

// stalled is a lane's index while its controller is paused or its CQ parked.
const stalled = -1

// Now reads the clock that limits are set by.
func Now() int64 { return nanotime() }

// turns are lanes by the time of their turn.
type turns []*lane

func (t turns) Len() int { return len(t) }
func (t turns) Less(i, j int) bool {
	return t[i].at < t[j].at || t[i].at == t[j].at && t[i].seq < t[j].seq
}
func (t turns) Swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].index, t[j].index = i, j
}
func (t *turns) Push(x any) {
	l := x.(*lane)
	l.index = len(*t)
	*t = append(*t, l)
}
func (t *turns) Pop() any {
	n := len(*t) - 1
	l := (*t)[n]
	(*t)[n] = nil
	*t = (*t)[:n]
	return l
}

// price is what a command costs: of which class it is, and how many bytes it moves. What is no command to the medium is free, and what will fail
// because of its size moves nothing: others may share the limit.
func (r *request) price(n *namespace) (class qos.Class, bytes uint64, free bool) {
	c, info, most := &r.cmd, &n.info, r.sq.g.ctl.mdts
	blocks := uint64(c.NLB().Count())
	if c.SLBA() >= info.Blocks || blocks > info.Blocks-c.SLBA() {
		blocks = 0
	}
	switch c.Opcode {
	case nvme.IORead, nvme.IOCompare:
		class, bytes = qos.Read, blocks<<info.LBAShift
	case nvme.IOWrite:
		class, bytes = qos.Write, blocks<<info.LBAShift
	case nvme.IOVerify:
		class, bytes, most = qos.Read, blocks<<info.LBAShift, ctrl.MaxVerify
	case nvme.IOWriteZeroes:
		class, bytes, most = qos.Write, blocks<<info.LBAShift, math.MaxUint64
	case nvme.IODSM, nvme.IOWriteUncorrectable:
		class = qos.Write
	case nvme.IOCopy: // the rest comes later, see owes; by this it waits for what others owe
		class, bytes = qos.Write, 1<<info.LBAShift
	case nvme.IOReservationRegister, nvme.IOReservationReport, nvme.IOReservationAcquire, nvme.IOReservationRelease:
		free = true
	default:
		if n.native.Has(c.Opcode) && c.Opcode >= firstVendor {
			switch c.Opcode & 3 { // which way the data goes
			case 1:
				class, bytes = qos.Write, uint64(c.CDW10)*4
			case 2:
				class, bytes = qos.Read, uint64(c.CDW10)*4
			}
		}
	}
	if bytes > most {
		bytes = 0
	}
	return class, bytes, free
}

// twoSided says that limits of reads and of writes hold r back.
func (r *request) twoSided() bool { return r.pair != nil || r.cmd.Opcode == nvme.IOCopy }

// charge pays for r, and for its other half, or takes t.
func (r *request) charge(t *qos.Ticket, p *qos.Path, n *namespace, now int64) bool {
	class, bytes, free := r.price(n)
	if free {
		return true
	}
	may := p.Charge(t, class, bytes, now)
	if r.cmd.Opcode == nvme.IOCopy {
		may = p.ChargeBytes(t, qos.Read, bytes, now) && may
	}
	if pair := r.pair; pair != nil && pair.second != nil { // which goes first when their queue goes
		class, bytes, _ = pair.second.price(n)
		may = p.Charge(t, class, bytes, now) && may
	}
	return may
}

// pays reports whether r may go; otherwise it waits in a lane.
func (w *Worker) pays(r *request, n *namespace, p *qos.Path) bool {
	class, _, free := r.price(n)
	if free {
		return true
	}
	if r.twoSided() {
		class = both
	}
	s := r.sq
	l := s.lane(n, class)
	if l == nil && s.g.arbiter != nil && s.g.arbiter.holder(n, class) != nil {
		l = w.newLane(s, n, class)
	}
	if l == nil {
		t := &w.ticket
		t.Reset()
		if r.paid = r.charge(t, p, n, w.clock()); r.paid {
			return true
		}
		w.now = nanotime() // it was read a while ago perhaps
		now := w.clock()
		at := t.Turn(now)
		if r.paid = at <= now; r.paid {
			return true
		}
		l = w.newLane(s, n, class)
		l.ticket = *t
		w.queueLane(l, at)
	}
	r.lane, r.next, r.since = l, nil, w.clock()
	if l.first == nil {
		l.first = r
	} else {
		l.last.next = r
	}
	l.last = r
	r.held = true
	s.g.held++
	if s.waiting++; s.waiting >= fullLane {
		s.full = true
	}
	return false
}

// clock is the time that limits go by.
func (w *Worker) clock() int64 {
	if w.limitClock != nil {
		return w.limitClock()
	}
	return w.now
}

// lane returns the one of s for n and class; nil: nothing of that waits.
func (s *sq) lane(n *namespace, class qos.Class) *lane {
	for _, l := range s.lanes {
		if l.ns == n && l.class == class {
			return l
		}
	}
	return nil
}

// newLane makes a lane that has no turn yet.
func (w *Worker) newLane(s *sq, n *namespace, class qos.Class) *lane {
	l := &lane{}
	if n := len(w.freeLanes) - 1; n >= 0 {
		l = w.freeLanes[n]
		w.freeLanes = w.freeLanes[:n]
	}
	l.sq, l.ns, l.class, l.index = s, n, class, behind
	s.lanes = append(s.lanes, l)
	return l
}

// queueLane puts l, which has paid, among those that have a turn.
func (w *Worker) queueLane(l *lane, at int64) {
	w.seq++
	l.at, l.seq = at, w.seq
	heap.Push(&w.lanes, l)
}

// nextPays is called when the first command of was, which had the turn, has gone.
func (w *Worker) nextPays(was *lane, now int64) {
	l := was.next()
	if l != was {
		w.unqueueLane(was)
		if l == nil {
			return
		}
		w.queueLane(l, now)
	}
	l.ticket.Reset()
	l.at = now
	if p := l.ns.limits.Load(); p != nil && !l.first.charge(&l.ticket, p, l.ns, now) {
		l.at = l.ticket.Turn(now)
	}
	w.seq++
	l.seq = w.seq
	if l.index != stalled {
		heap.Fix(&w.lanes, l.index)
	}
}

// unqueueLane takes the turn from l.
func (w *Worker) unqueueLane(l *lane) {
	switch l.index {
	case behind:
	case stalled:
		w.stalled = slices.DeleteFunc(w.stalled, func(x *lane) bool { return x == l })
	default:
		heap.Remove(&w.lanes, l.index)
	}
	l.index = behind
	l.ticket.Reset()
}

// endLane forgets l, in which nothing waits any more.
func (w *Worker) endLane(l *lane) {
	w.unqueueLane(l)
	s := l.sq
	s.lanes = slices.DeleteFunc(s.lanes, func(x *lane) bool { return x == l })
	l.sq, l.ns, l.first, l.last = nil, nil, nil, nil
	w.freeLanes = append(w.freeLanes, l)
}

// leave takes r, whose turn it is or which is given up, out of its lane. before is the one before it; nil: it is the first.
func (w *Worker) leave(r, before *request, now int64) {
	l, s := r.lane, r.sq
	if before == nil {
		l.first = r.next
	} else {
		before.next = r.next
	}
	if l.last == r {
		l.last = before
	}
	r.lane, r.next, r.held = nil, nil, false
	s.g.held--
	d := max(now-r.since, 0)
	s.g.stats.Throttled++
	s.g.stats.ThrottledFor += time.Duration(d)
	l.ns.of.Limiter().CountHeld(d)
	if s.waiting--; s.full && s.waiting <= fullLane/2 {
		s.full = false
		s.g.kick() // not here, where a fault would lose r
	}
	s.g.show()
	if before == nil && l.index != behind {
		w.nextPays(l, now)
	}
	if l.first == nil {
		w.endLane(l)
	}
}

// turnsAtOnce is how many commands begin between two looks at what else there is to do.
const turnsAtOnce = 4 * batchMax

// takeTurns begins commands whose turn has come, and returns how many.
func (w *Worker) takeTurns() (n int) {
	now := w.clock()
	for n < turnsAtOnce && len(w.lanes) > 0 && w.lanes[0].at <= now {
		l := w.lanes[0]
		if at := l.ticket.Turn(now); at > now {
			l.at = at
			heap.Fix(&w.lanes, 0)
			l.sq.g.show()
			continue
		}
		if !l.sq.g.begins() {
			heap.Pop(&w.lanes)
			l.index = stalled
			w.stalled = append(w.stalled, l)
			continue
		}
		r := l.first
		w.leave(r, nil, now)
		r.paid = true
		n++
		w.begin(r)
	}
	if n > 0 {
		w.flushBatch()
		w.postAll()
	}
	return n
}

// nextTurn is how long it is until somebody's turn, in ns; -1: nobody waits.
func (w *Worker) nextTurn() int64 {
	if len(w.lanes) == 0 {
		return -1
	}
	return max(w.lanes[0].at-w.clock(), 0)
}

// newTurns asks all who wait again, since limits have changed or controllers go on.
func (w *Worker) newTurns() {
	now := w.clock()
	for _, l := range w.stalled {
		l.index = len(w.lanes)
		w.lanes = append(w.lanes, l)
	}
	clear(w.stalled)
	w.stalled = w.stalled[:0]
	for _, l := range w.lanes {
		l.at = l.ticket.Turn(now)
		l.sq.g.show() // the turn may be far now
	}
	heap.Init(&w.lanes)
}

// unlane takes the first command that waits in a lane of s and that f chooses out of it; nil: there is none. It has not gone, and what was paid
// for it is given back.
func (w *Worker) unlane(s *sq, f func(*request) bool) *request {
	for _, l := range s.lanes {
		for r, before := l.first, (*request)(nil); r != nil; r, before = r.next, r {
			if f(r) {
				if before == nil {
					l.ticket.Refund()
				}
				w.leave(r, before, w.clock())
				return r
			}
		}
	}
	return nil
}

// leaveLanes puts those of c's commands that wait in lanes and whose namespace is no longer what it was back among what is held, to be begun
// from the start.
func (w *Worker) leaveLanes(c *Controller) {
	any := false
	for _, g := range c.groups {
		if g.w != w {
			continue
		}
		for _, s := range g.sqs {
			for gone := func(r *request) bool { return c.namespace(r.cmd.NSID) != r.lane.ns }; ; {
				r := w.unlane(s, gone)
				if r == nil {
					break
				}
				w.hold(r)
				any = true
			}
		}
	}
	if any {
		w.retryHeld()
	}
}

// show has what came into g's queues looked at, if it is unseen.
func (g *group) show() {
	if g.unseen {
		g.kick()
	}
}

// hides reports whether g, which is polled, may be left unseen until the next turn of each of its queues.
func (w *Worker) hides(g *group) bool {
	if g.blocked || len(g.sqs) == 0 {
		return false
	}
	now := w.clock()
	for _, s := range g.sqs {
		if !slices.ContainsFunc(s.lanes, func(l *lane) bool {
			if l.index == behind {
				l = s.g.arbiter.holder(l.ns, l.class)
			}
			return l != nil && l.hides(now)
		}) {
			return false
		}
	}
	return true
}

// hides reports whether l's turn is near, and everything else that its queue may bring has to wait for what l waits for.
func (l *lane) hides(now int64) bool {
	if l.index == stalled || l.at-now > longestUnseen {
		return false
	}
	c := l.sq.g.ctl
	if c.cfg.Self != nil && l.ticket.Waits(c.cfg.Self.Limiter(), now) {
		return true
	}
	others := slices.ContainsFunc(*c.ns.Load(), func(n *namespace) bool { return n != nil && n != l.ns })
	return !others && l.ticket.Waits(l.ns.of.Limiter(), now)
}

// SetLimits makes the limits of what is attached, and of c, count as they are now.
func (c *Controller) SetLimits() {
	for _, n := range *c.ns.Load() {
		if n != nil {
			n.limits.Store(c.path(n))
		}
	}
	for _, w := range c.involved() {
		w.Call(w.newTurns)
	}
}

func (c *Controller) path(n *namespace) *qos.Path {
	if c.cfg.Self == nil {
		return qos.NewPath(n.of.Limiter())
	}
	return qos.NewPath(n.of.Limiter(), c.cfg.Self.Limiter())
}

// owes charges the n bytes that a Copy reads and writes, which are known only when it has begun.
func (w *Worker) owes(r *request, n uint64) {
	if p := r.ns.limits.Load(); p != nil {
		p.Owe(qos.Read, n, w.clock())
		p.Owe(qos.Write, n, w.clock())
	}
}
