package ioq

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/broken"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/spin"
)

// State is where a queue is in its life; package ioq's comment draws the way.
type State uint8

// The states of a queue.
const (
	Absent State = iota
	Polling
	Armed
	Draining
	Parked
	Failed
)

func (s State) String() string {
	return [...]string{"absent", "polling", "armed", "draining", "parked", "failed"}[s]
}

// group is one CQ and the SQs that feed it. It belongs to its worker.
type group struct {
	ctl  *Controller
	w    *Worker
	qid  uint16 // of the CQ
	iova uint64
	mem  *shm.Region // nil: parked
	prod *ring.CQProducer
	head *dbbuf.Poller
	sqs  []*sq

	arbiter *arbiter // nil: round robin

	state    State
	parking  bool        // to be Parked when nothing is in flight
	mute     bool        // Draining, and nothing is posted before that is over
	fresh    bool        // created while the doorbell pages were away
	listed   bool        // on the worker's active list
	inMapped bool        // on the worker's mapped list
	kicked   atomic.Bool // by another thread, which has put onKick in the mail
	onKick   func()
	unseen   bool         // Armed without being so: until somebody's turn, see limits.go
	blocked  bool         // an SQ has commands for which the CQ has no room
	inflight uint32       // fetched, not yet completed
	held     uint32       // of those, held back, see gate.go
	staged   []ring.Entry // completions to be posted in this round

	worked    bool  // since the last tick
	dozing    bool  // on the worker's list of those
	busyAt    int64 // up to when the controller's busy time is counted
	idleSince int64 // ns; 0: not idle
	limit     int64 // ns that polling may go on without work
	budget    spin.Budget

	stats Stats

	// For snapshots (snapshot.go), in CLOCK_MONOTONIC less startedAt:
	kicks     atomic.Uint64 // doorbell messages of the CQ head; the home worker's
	rung      atomic.Uint32 // value of the last of them
	kicksWas  uint64        // kicks when it was last armed
	born      uint32        // what the head's doorbell held at first
	sleeps    uint64
	armedAt   int64
	resumedAt int64
	postedAt  int64
	posted    uint64 // completions
	unraised  uint32 // of those, without an interrupt

	ien    bool
	index  uint16 // of the vector
	vector *Vector
}

// sq is one submission queue.
type sq struct {
	g        *group
	qid      uint16
	prio     uint8 // QPRIO
	iova     uint64
	mem      *shm.Region // nil: parked
	fresh    bool        // created while the doorbell pages were away
	cons     *ring.SQConsumer
	tail     *dbbuf.Poller
	state    State // Polling, Draining, Parked or Failed; whether it is armed is the group's
	inflight uint32
	pageSize uint32    // CC.MPS in bytes
	maxPages int       // of a command's data
	lanes    []*lane   // of what waits for its turn, see limits.go
	waiting  uint32    // in them
	full     bool      // nothing is fetched until fewer wait
	first    *request  // of a fused pair, held back until the second comes
	aborts   []toAbort // of commands that are not fetched yet

	// As in group:
	kicks     atomic.Uint64
	rung      atomic.Uint32
	kicksWas  uint64
	born      uint32
	rang      atomic.Bool // a doorbell message has come that rung has not seen
	spurious  uint64
	fetched   uint64
	fetchedAt int64
}

// poll fetches and starts what is in the group's SQs and returns how many commands.
func (w *Worker) poll(g *group) int {
	if g.state != Polling {
		return 0
	}
	if broken.On(broken.SleepAnyway) && g.idleSince != 0 {
		if w.current = g; g.moved() {
			w.arm(g)
			return 0
		}
	}
	if g.arbiter != nil {
		return g.arbiter.turn(w)
	}
	w.current = g
	work := 0
	for _, s := range g.sqs {
		tail := s.tail.Load()
		if tail == s.cons.Head() || s.state != Polling || s.full {
			continue
		}
		n, err := s.cons.Pending(tail)
		if err != nil {
			w.badDoorbell(g, s.qid, BadSQTail, err)
			return work
		}
		// A command is fetched only when its completion has room (R9).
		room := g.room()
		if room < n {
			if room = w.makeRoom(g); room == 0 {
				g.blocked = true
				continue
			}
			if g.state == Failed {
				return work
			}
		}
		n = min(n, room, batchMax)
		g.blocked = false
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
		work += int(n)
	}
	if work > 0 {
		g.worked = true
		w.flushBatch()
		w.postAll()
		if w.extra {
			w.endExtra()
		}
	}
	return work
}

// makeRoom looks at the CQ head, which nobody needs to know before the CQ is full, and returns the room.
func (w *Worker) makeRoom(g *group) uint32 {
	if err := g.prod.Consumed(g.headDoorbell()); err != nil {
		w.badDoorbell(g, g.qid, BadCQHead, err)
		return 0
	}
	if !g.ctl.pin.on.Load() { // which wants a ring for each head
		g.head.Behind(g.prod.Head())
	}
	return g.room()
}

// room returns how many more commands may be fetched: CQ entries that are neither posted nor
// promised.
func (g *group) room() uint32 {
	if broken.On(broken.Overcommit) {
		return g.prod.Size()
	}
	return g.prod.Free() - g.inflight - uint32(len(g.staged))
}

func (g *group) headDoorbell() uint32 {
	h := g.head.Load()
	if g.ctl.quiet.Load() {
		h &^= dbbuf.QuietBit
	}
	return h
}

// fetch takes n commands out of s.
func (w *Worker) fetch(s *sq, n uint32) {
	s.fetched += uint64(n)
	s.fetchedAt = w.now
	if w.trace != nil {
		w.fetchTraced(s, n)
		return
	}
	if n > 1 {
		s.cons.Prefetch(n)
	}
	for range n {
		r := w.take(s)
		w.pending = r
		s.cons.Fetch(&r.cmd)
		if s.first != nil || len(s.aborts) > 0 {
			w.startOdd(r)
		} else {
			w.start(r)
		}
	}
	w.pending = nil
}

// rest decides whether g, which is on the active list, leaves it. It is called once each tick.
func (w *Worker) rest(g *group) bool {
	if g.state != Polling {
		return true
	}
	w.countBusy(g)
	if len(w.lanes) > 0 && w.hides(g) {
		g.worked, g.idleSince, g.unseen = false, 0, true
		w.leaveList(g)
		return true
	}
	if g.worked {
		g.worked = false
		if g.idleSince != 0 {
			g.budget.Earned(time.Duration(w.now - g.idleSince))
			g.idleSince = 0
		}
		if !w.noSpin {
			return false
		}
	}
	if g.idleSince == 0 {
		g.idleSince = w.now
		g.limit = int64(g.budget.Limit())
		if w.noSpin {
			g.limit = -1
		}
	}
	if w.now-g.idleSince <= g.limit {
		return false
	}
	if g.limit > 0 {
		g.budget.Failed()
	}
	g.idleSince = 0
	return w.arm(g)
}

// arm asks for a doorbell from each of g's queues, and reports whether none of them had
// moved meanwhile: only then may g be left alone (R2, R3). A queue whose race is lost goes on
// being polled, which is the kick that R3 asks for.
func (w *Worker) arm(g *group) bool {
	w.current = g
	g.kicksWas = g.kicks.Load()
	ok := true
	for _, s := range g.sqs {
		s.kicksWas = s.kicks.Load()
		if s.asks() && !s.arm() {
			ok = false
		}
	}
	// Only a CQ that blocks is armed, at the head as it stands: an event index at the tail would mean
	// never (R8).
	if g.blocked {
		if err := g.prod.Consumed(g.headDoorbell()); err != nil {
			w.badDoorbell(g, g.qid, BadCQHead, err)
			return true
		}
		if broken.On(broken.CQAtTail) {
			g.head.Arm(g.prod.Tail())
		} else if g.room() > 0 || !g.head.Arm(g.prod.Head()) {
			ok = false
		}
	}
	if w.trace != nil {
		w.traceArm(g, ok)
	}
	if !ok && !broken.On(broken.SleepAnyway) {
		w.behind(g)
		return false
	}
	if g.ctl.mode == ctrl.Mmap && !g.inMapped {
		g.inMapped = true
		w.mapped = append(w.mapped, g)
		w.nap = firstNap
	}
	g.sleeps++
	g.armedAt = w.now
	w.leaveList(g)
	return true
}

// asks says whether s, whose group is to sleep, asks for its doorbell: not for room in the CQ, nor for a limit, with commands in it.
func (s *sq) asks() bool {
	return s.state == Polling && !((s.g.blocked || s.full) && s.tail.Load() != s.cons.Head())
}

// arm is Arm of s.
func (s *sq) arm() bool {
	switch {
	case broken.On(broken.NoArm), broken.On(broken.ArmDrained) && s.fetched == 0:
		return true
	case broken.On(broken.WrongIndex):
		s.tail.Arm((s.cons.Head() + 1) % s.cons.Size())
		return true
	}
	return s.tail.Arm(s.cons.Head())
}

// never is what R14 forbids.
const never = 1<<32 - 1

// leaveList is the end of polling.
func (w *Worker) leaveList(g *group) {
	if g.inflight > 0 && !g.dozing {
		g.dozing = true
		w.dozing = append(w.dozing, g)
	}
	g.state = Armed
}

// behind tells the drivers of g's queues not to ring.
func (w *Worker) behind(g *group) {
	for _, s := range g.sqs {
		if broken.On(broken.Sentinel) {
			s.tail.Ask(never)
		} else {
			s.tail.BehindNow(s.cons.Head())
		}
	}
	if !g.ctl.pin.on.Load() { // which wants a ring for each head
		g.head.BehindNow(g.prod.Head())
	}
}

// rung is wake for doorbell messages. One that finds nothing new is spurious: the driver need not have sent it.
func (w *Worker) rung(g *group) {
	live := g.state == Armed || g.state == Polling // otherwise its doorbells may be gone
	if live {
		w.current = g
	}
	for _, s := range g.sqs {
		if s.rang.Load() && s.rang.Swap(false) && live && s.tail.Peek() == s.cons.Head() {
			s.spurious++
		}
	}
	w.wake(g)
}

// wake puts g on the active list.
func (w *Worker) wake(g *group) {
	if g.state == Armed {
		w.resume(g)
	}
}

// resume makes g polled, whatever it was, and so probes all its queues (R27).
func (w *Worker) resume(g *group) {
	w.current = g
	if g.state != Armed && g.state != Polling {
		g.resumedAt = nanotime()
		if broken.On(broken.NoProbe) {
			g.state = Armed
			return
		}
	}
	if w.trace != nil && g.state == Armed {
		w.traceWake(g)
	}
	g.state, g.unseen = Polling, false
	g.idleSince = 0
	if !g.dozing {
		g.busyAt = w.now
	}
	w.behind(g)
	if !g.listed {
		g.listed = true
		w.active = append(w.active, g)
	}
}

// kick is wake for other threads. A kick is sticky: it is forgotten before g is probed (R10).
func (g *group) kick() {
	if g.kicked.CompareAndSwap(false, true) {
		g.w.post(g.onKick)
	}
}

// A mapped doorbell page has no event index: the driver never rings, so an idle queue has
// to be looked at. The looks become rarer from firstNap to lastNap, which bounds both what
// idling costs and what the first command waits.
const (
	firstNap = int64(50 * time.Microsecond)
	lastNap  = int64(5 * time.Millisecond)
)

func (w *Worker) lookMapped() {
	w.nap = min(w.nap+w.nap/16+1, lastNap)
	keep := w.mapped[:0]
	for _, g := range w.mapped {
		w.current = g
		if g.state == Armed && !g.moved() {
			keep = append(keep, g)
			continue
		}
		g.inMapped = false
		w.wake(g)
	}
	clear(w.mapped[len(keep):])
	w.mapped = keep
	w.lookAdmin()
}

// lookAdmin looks at the mapped doorbells of queue 0, whose commands the session runs. Once the session is told of values it is not told again:
// it may have no use for them yet. If it takes others meanwhile, it says so after this (AdminTaken).
func (w *Worker) lookAdmin() {
	for _, c := range w.watched {
		if now := bothBells(c.admin[0].Load(), c.admin[1].Load()); now != c.adminSeen.Load() {
			c.adminSeen.Store(now)
			w.nap = firstNap
			c.cfg.OnAdmin()
		}
	}
}

// moved reports whether a doorbell of g says something new.
func (g *group) moved() bool {
	for _, s := range g.sqs {
		if s.state == Polling && s.tail.Load() != s.cons.Head() && !g.blocked && !s.full {
			return true
		}
	}
	return g.blocked && g.headDoorbell() != g.prod.Head()
}

// badDoorbell stops a group whose driver wrote what cannot be (R30).
func (w *Worker) badDoorbell(g *group, qid uint16, kind ErrorKind, err error) {
	w.failGroup(g)
	g.ctl.cfg.OnError(QueueError{QID: qid, Kind: kind, Err: fmt.Errorf("queue %d: %w", qid, err)})
}

// badHead stops g, whose driver wrote a CQ head that is not in the ring.
func (w *Worker) badHead(g *group, head uint32) {
	if g.state == Polling || g.state == Armed {
		w.badDoorbell(g, g.qid, BadCQHead, fmt.Errorf("CQ head %d in a ring of %d: %w", head, g.prod.Size(), ring.ErrDoorbell))
	}
}

// failGroup stops g. What is in flight completes into nothing.
func (w *Worker) failGroup(g *group) {
	g.state = Failed
	g.staged = g.staged[:0]
	for _, s := range g.sqs {
		s.state = Failed
	}
}

// fault charges a fault on guest memory to the group that was being worked on (R36).
func (w *Worker) fault(err error) {
	g := w.current
	if g == nil {
		w.log.Error("memory fault outside of any queue", "error", err)
		return
	}
	w.current = nil
	w.endSample()
	if r := w.pending; r != nil {
		w.pending = nil
		w.give(r)
	}
	keep := w.batch[:0]
	for _, b := range w.batch {
		if r := w.reqs[b.Owner]; r.sq.g == g {
			w.give(r)
		} else {
			keep = append(keep, b)
		}
	}
	w.batch = keep
	w.failGroup(g)
	w.post(w.retryHeld) // which may have been what faulted, and goes on with what others have begun
	g.ctl.cfg.OnError(QueueError{QID: g.qid, Kind: MemoryFault, Err: err})
}
