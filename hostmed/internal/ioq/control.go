package ioq

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/broken"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/gmem"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Config is the data path of one controller.
type Config struct {
	Workers    []*Worker
	Home       *Worker // has the client's socket, and watches queue 0 in Mmap mode
	Memory     *gmem.Memory
	Namespaces []ctrl.Namespace   // at first; see SetNamespaces
	Self       *subsys.Controller // whose Host reservations are about; nil: nobody's
	Mode       ctrl.DoorbellMode
	DSTRD      uint8
	MaxQueues  uint16 // I/O queue pairs
	Vectors    uint16
	MDTSBytes  uint32
	Trace      uint16        // the controller's number in event records
	PageSize   func() uint32 // CC.MPS in bytes; called with a queue's creation

	// HeapDoorbells keeps the registers of Mmap mode on the heap, for a client in this process.
	HeapDoorbells bool

	// OnAdmin, OnError and OnPin are called on a worker's thread and must not block: queue 0's doorbell
	// has moved; a queue has failed; PinOverdue(rung) is to be called after a while. OnPin also on the session's.
	OnAdmin func()
	OnError func(QueueError)
	OnPin   func(rung uint32, after time.Duration)
	// InterruptMask returns INTMS; any thread may call it. [Nothing is masked]
	InterruptMask func() uint32

	// OnStopped and OnReleased are called on a worker's thread, and must not block: what Stop or Unmapped did not wait for has ended. [Nobody is told]
	OnStopped, OnReleased func()
}

// Controller is the data path of one controller. Except Doorbell, its methods belong to the session's goroutine; they
// implement ctrl.DataPath.
type Controller struct {
	cfg    Config
	mode   ctrl.DoorbellMode
	mem    *gmem.Memory
	mdts   uint64
	ns     atomic.Pointer[[]*namespace] // by NSID - 1; nil: not attached
	dulbe  map[uint32]bool              // by NSID; a namespace that comes later heeds it too
	groups []*group
	past   Stats // of groups that are gone

	// bar is the file that holds the doorbell registers at their offset in BAR0, or, unless they are mapped,
	// nil; bells are the registers: what MMIO wrote, or what the client stores.
	bar       *shm.Region
	bells     *shm.Region
	admin     [2]*atomic.Uint32 // queue 0's
	adminSeen atomic.Uint64     // what they held when they were last looked at: the tail, and the head in the upper half
	shadow    *shm.Region       // the doorbell page and its event indices; nil: none
	ei        *shm.Region
	shared    atomic.Bool // shadow != nil
	away      bool        // the pages were taken off, and may come back
	parked    bool        // some queue may be parked
	held      bool        // nothing is fetched: no bus master, or not in D0
	stopping  atomic.Bool // Stop is under way

	sqs     []atomic.Pointer[sq] // by queue id, for doorbell messages
	cqs     []atomic.Pointer[group]
	vectors []Vector
	pin     pin

	busy     busyClock
	failures failures

	rung       [2]atomic.Uint64 // doorbell messages for I/O queues: SQ tails, CQ heads
	adminKicks [2]atomic.Uint64 // and for queue 0
	adminRung  [2]atomic.Uint32 // and the last of those
	owed       []atomic.Bool    // by worker: it has not answered the last snapshot yet
	kicking    atomic.Int32     // kicks by hand that wait for a worker

	quiet       atomic.Bool   // FeatureQuiet
	through     atomic.Bool   // the write cache is off
	weighted    bool          // CC.AMS; the session's
	arbitration atomic.Uint32 // feature 01h, where weighted
	coalescing  coalescing
}

var _ ctrl.DataPath = (*Controller)(nil)

// NewController returns a data path without queues.
func NewController(c Config) (*Controller, error) {
	c.MaxQueues = ctrl.LimitQueues(c.MaxQueues, c.Mode, c.DSTRD)
	d := &Controller{
		cfg: c, mode: c.Mode, mem: c.Memory, mdts: uint64(c.MDTSBytes),
		dulbe: map[uint32]bool{}, sqs: make([]atomic.Pointer[sq], c.MaxQueues+1), cqs: make([]atomic.Pointer[group], c.MaxQueues+1),
	}
	d.ns.Store(d.table(c.Namespaces))
	d.owed = make([]atomic.Bool, len(c.Workers))
	d.vectors = make([]Vector, c.Vectors)
	for i := range d.vectors {
		d.vectors[i].init()
	}
	d.pin.fd.Store(-1)
	size := doorbellBytes(c.MaxQueues, c.DSTRD)
	if c.Mode == ctrl.Mmap {
		var err error
		size = (size + shm.PageSize - 1) &^ (shm.PageSize - 1)
		if c.HeapDoorbells {
			d.bar = shm.NewHeap(int(nvme.DoorbellBase + size))
		} else if d.bar, err = shm.NewMemfd("nvme-doorbells", nvme.DoorbellBase+size); err != nil {
			return nil, err
		}
		if d.bells, err = d.bar.View(nvme.DoorbellBase, size); err != nil {
			return nil, errors.Join(err, d.bar.Close())
		}
	} else {
		d.bells = shm.NewWords(int(size))
	}
	var err error
	if d.admin[0], d.admin[1], err = dbbuf.Slots(d.bells, 0, c.DSTRD); err != nil {
		return nil, err
	}
	if c.Mode == ctrl.Mmap {
		c.Home.Call(func() { c.Home.watched = append(c.Home.watched, d); c.Home.nap = firstNap })
	}
	return d, nil
}

// doorbellBytes is the size of the doorbell registers of queues 0 to n.
func doorbellBytes(n uint16, dstrd uint8) uint64 {
	return 2 * (uint64(n) + 1) * (4 << (dstrd & 0xf))
}

// Close ends the data path: Stop, however long that takes, and gives everything back. Interrupt eventfds are closed.
func (c *Controller) Close() error {
	c.Stop(math.MaxInt64)
	if c.mode == ctrl.Mmap {
		c.cfg.Home.Call(func() {
			w := c.cfg.Home
			for i, x := range w.watched {
				if x == c {
					w.watched = append(w.watched[:i], w.watched[i+1:]...)
					break
				}
			}
		})
	}
	c.SetVectors(0, nil, len(c.vectors))
	c.SetPin(-1)
	if c.bar != nil {
		return c.bar.Close()
	}
	return nil
}

// Doorbells is, in Mmap mode, the memory that has the doorbell registers at their offset in BAR0; otherwise nil. It is a memfd, unless
// Config.HeapDoorbells is set.
func (c *Controller) Doorbells() *shm.Region { return c.bar }

// words returns the doorbells of queue qid and their event indices where they are now.
func (c *Controller) words(shadow, ei *shm.Region, qid uint16) (sq, cq, sqEI, cqEI *atomic.Uint32, err error) {
	if shadow == nil {
		sq, cq, err = dbbuf.Slots(c.bells, qid, c.cfg.DSTRD)
		return
	}
	if sq, cq, err = dbbuf.Slots(shadow, qid, c.cfg.DSTRD); err == nil {
		sqEI, cqEI, err = dbbuf.Slots(ei, qid, c.cfg.DSTRD)
	}
	if err == nil && broken.On(broken.Register) {
		sq, _, err = dbbuf.Slots(c.bells, qid, c.cfg.DSTRD)
	}
	return
}

// CreateCQ makes an I/O completion queue and gives it to a worker.
func (c *Controller) CreateCQ(p ctrl.CQParams) error {
	prod, err := ring.NewCQProducer(p.Mem, p.Size)
	if err != nil {
		return err
	}
	w := c.cfg.Workers[int(p.QID-1)%len(c.cfg.Workers)]
	g := &group{ctl: c, w: w, qid: p.QID, prod: prod, iova: p.IOVA, mem: p.Mem, fresh: c.away, ien: p.IEN, index: p.Vector, vector: &c.vectors[p.Vector], state: Armed}
	g.budget.Most = w.budget.Most
	g.onKick = func() {
		g.kicked.Store(false)
		w.rung(g)
	}
	_, head, _, headEI, err := c.words(c.shadow, c.ei, p.QID)
	if err != nil {
		return err
	}
	g.head = dbbuf.NewPoller(head, headEI, p.Size)
	w.Call(func() {
		if err = w.openMedia(*c.ns.Load(), c.mem); err != nil {
			return
		}
		w.current = g
		zero(head, headEI)
		g.born = head.Load()
		g.arbiter = c.arbiterFor(w)
		c.groups = append(c.groups, g) // the session waits for this
		c.cqs[p.QID].Store(g)
	})
	c.awaitMemory()
	return err
}

// zero clears the slots of a new queue, whatever an older one left in them (R22).
func zero(words ...*atomic.Uint32) {
	if broken.On(broken.StaleSlots) {
		return
	}
	for _, x := range words {
		if x != nil {
			x.Store(0)
		}
	}
}

// CreateSQ makes an I/O submission queue that feeds an existing CQ.
func (c *Controller) CreateSQ(p ctrl.SQParams) error {
	cons, err := ring.NewSQConsumer(p.Mem, p.Size)
	if err != nil {
		return err
	}
	g := c.cqs[p.CQID].Load()
	if g == nil {
		return fmt.Errorf("SQ %d names CQ %d, which does not exist", p.QID, p.CQID)
	}
	tail, _, tailEI, _, err := c.words(c.shadow, c.ei, p.QID)
	if err != nil {
		return err
	}
	s := &sq{g: g, qid: p.QID, prio: p.Prio & 3, iova: p.IOVA, mem: p.Mem, fresh: c.away, cons: cons, tail: dbbuf.NewPoller(tail, tailEI, p.Size), state: Polling, pageSize: c.cfg.PageSize()}
	s.maxPages = int(prp.Pages(uint64(s.pageSize-1), c.cfg.MDTSBytes, s.pageSize))
	g.w.Call(func() {
		w := g.w
		w.current = g
		zero(tail, tailEI)
		s.born = tail.Load()
		g.sqs = append(g.sqs, s)
		if g.arbiter != nil {
			g.arbiter.add(s)
		}
		c.sqs[p.QID].Store(s)
		if g.state == Armed || g.state == Polling {
			w.resume(g)
		}
	})
	return nil
}

// DeleteSQ takes no more commands from the queue, and removes it if those taken are completed. Otherwise later, which any goroutine may call, returns when
// they are, and then DeleteSQ is to be called once more.
func (c *Controller) DeleteSQ(qid uint16) (later func()) {
	s := c.sqs[qid].Load()
	if s == nil {
		return nil
	}
	w := s.g.w
	of := func(r *request) bool { return r.sq == s }
	empty := func() bool { return s.inflight == 0 }
	var gone bool
	w.Call(func() {
		s.state = Draining
		w.dropHeld(s)
		if w.giveUp(false, of); !empty() {
			return
		}
		gone = true
		s.g.sqs = slices.DeleteFunc(s.g.sqs, func(x *sq) bool { return x == s })
		if s.g.arbiter != nil {
			s.g.arbiter.drop(s)
		}
		c.sqs[qid].Store(nil)
		closeMemory(&s.mem)
	})
	if gone {
		return nil
	}
	return func() { w.outlast(of, empty) }
}

// DeleteCQ removes a CQ that no SQ feeds.
func (c *Controller) DeleteCQ(qid uint16) {
	g := c.cqs[qid].Load()
	if g == nil {
		return
	}
	g.w.Call(func() { g.w.remove(g) })
	c.forget(func(x *group) bool { return x == g })
}

// remove takes g off every list of its worker.
func (w *Worker) remove(g *group) {
	w.forgetHeld(g)
	g.state = Absent
	drop := func(list []*group) []*group {
		keep := list[:0]
		for _, x := range list {
			if x != g {
				keep = append(keep, x)
			}
		}
		clear(list[len(keep):])
		return keep
	}
	w.active, w.mapped, w.dozing = drop(w.active), drop(w.mapped), drop(w.dozing)
	g.listed, g.inMapped, g.dozing = false, false, false
	if w.current == g {
		w.current = nil
	}
	g.ctl.cqs[g.qid].Store(nil)
	closeMemory(&g.mem)
	for _, s := range g.sqs {
		if g.arbiter != nil {
			g.arbiter.drop(s)
		}
		g.ctl.sqs[s.qid].Store(nil)
		closeMemory(&s.mem)
	}
}

func (c *Controller) forget(which func(*group) bool) {
	keep := c.groups[:0]
	for _, g := range c.groups {
		if which(g) {
			c.past.add(g.stats)
		} else {
			keep = append(keep, g)
		}
	}
	clear(c.groups[len(keep):])
	c.groups = keep
}

// each runs f for each group on its worker's thread.
func (c *Controller) each(f func(*Worker, *group)) {
	for _, w := range c.involved() {
		w.Call(func() {
			for _, g := range c.groups {
				if g.w == w {
					w.current = g
					f(w, g)
				}
			}
		})
	}
}

// Hold stops all fetching, and returns when nothing that was fetched is in flight; without on it lets go. It is for a
// function that is not bus master, or not in D0.
func (c *Controller) Hold(on bool) {
	if on == c.held {
		return
	}
	if c.held = on; on {
		c.pause()
	} else {
		c.resume()
	}
}

// pause stops fetching and waits, for a while, until nothing that was fetched is in flight, but for what a namespace's gate holds back. No worker
// touches this controller's guest memory until resume; what a medium does that does not end in time it goes on with, and nobody is told before resume.
func (c *Controller) pause() {
	c.each(func(_ *Worker, g *group) {
		if g.state == Polling || g.state == Armed {
			g.state = Draining
		}
	})
	end := time.Now().Add(holdPatience)
	for _, w := range c.involved() {
		w.outlastFor(time.Until(end), func(r *request) bool { return r.sq.g.ctl == c }, idle(c.groupsOf(w)), nil)
	}
	c.each(func(_ *Worker, g *group) {
		if g.state == Draining {
			g.mute = true
		}
	})
}

// holdPatience is how long a client waits for the answer to what holds a controller while commands do not end.
const holdPatience = 100 * time.Millisecond

func (c *Controller) groupsOf(w *Worker) (gs []*group) {
	for _, g := range c.groups {
		if g.w == w {
			gs = append(gs, g)
		}
	}
	return gs
}

// idle returns what says whether nothing that was fetched into gs, which are of one worker, is in flight, but for what is held back.
func idle(gs []*group) func() bool {
	return func() bool {
		return !slices.ContainsFunc(gs, func(g *group) bool { return g.inflight > g.held })
	}
}

func (c *Controller) resume() {
	c.each(func(w *Worker, g *group) {
		g.mute = false
		if g.state == Draining {
			w.resume(g)
			if len(g.staged) > 0 {
				w.postGroup(g)
			}
			w.retryHeld()
		}
	})
}

// Stop ends every queue, drops the doorbell pages and clears the doorbell registers, so that the next enable begins from zero (R21). When it
// returns nothing is fetched, and no queue nor doorbell page touched, any more. If it returns true, which it does within patience or not at all, no command
// moves data any more either. Otherwise media have not ended some: OnStopped is called when they have, and then Stop is to be called once more.
func (c *Controller) Stop(patience time.Duration) bool {
	c.stopping.Store(true)
	c.each(func(w *Worker, g *group) {
		w.forgetHeld(g)
		w.failGroup(g)
		closeMemory(&g.mem)
		for _, s := range g.sqs {
			closeMemory(&s.mem)
		}
	})
	if !broken.On(broken.KeepPages) {
		_ = c.moveDoorbells(nil, nil, false) // the registers have room for all queues
		c.shadow, c.ei = nil, nil
	}
	c.away, c.parked = false, false
	ended, end := true, time.Now().Add(patience)
	for _, w := range c.involved() {
		of := func(r *request) bool { return r.sq.g.ctl == c }
		ended = w.outlastFor(max(time.Until(end), 0), of, idle(c.groupsOf(w)), c.cfg.OnStopped) && ended
	}
	if ended {
		c.stopped()
	}
	return ended
}

// stopped is the end of Stop.
func (c *Controller) stopped() {
	c.each(func(w *Worker, g *group) { w.remove(g) })
	c.forget(func(*group) bool { return true })
	c.stopping.Store(false)
	c.quiet.Store(false)
	c.coalescing.set(0, 0)
	c.through.Store(false)
	c.SetArbitration(false, 0)
	for i := range c.vectors {
		v := &c.vectors[i]
		v.pending.Store(false)
		v.direct.Store(false)
		v.held.reset()
	}
	for off := uint64(0); off < c.bells.Len(); off += 4 {
		if x, err := c.bells.Word32(off); err == nil {
			x.Store(0)
		}
	}
}

// SetQuiet turns FeatureQuiet on or off.
func (c *Controller) SetQuiet(on bool) { c.quiet.Store(on) }

// SetWriteCache is feature 06h. Without the cache each write is durable before it completes.
func (c *Controller) SetWriteCache(on bool) { c.through.Store(!on) }

// SetCoalescing and SetVectorConfig are features 08h and 09h.
func (c *Controller) SetCoalescing(thresholdZ, time100us uint8) {
	c.coalescing.set(thresholdZ, time100us)
}

func (c *Controller) SetVectorConfig(vector uint16, disabled bool) {
	if int(vector) < len(c.vectors) {
		c.vectors[vector].direct.Store(disabled)
	}
}

// AdminDoorbells returns queue 0's doorbell registers.
func (c *Controller) AdminDoorbells() (sqTail, cqHead *atomic.Uint32) { return c.admin[0], c.admin[1] }

// ZeroAdminDoorbells sets them to 0. A driver that resets the controller rings the same values again, and the worker need not have looked in
// between: what was seen is 0 too.
func (c *Controller) ZeroAdminDoorbells() {
	c.admin[0].Store(0)
	c.admin[1].Store(0)
	c.AdminTaken(0, 0)
}

// AdminTaken is what the session has taken, which the home worker compares mapped doorbells with. A tail that has come round to where the
// worker last saw it, past commands that the session ran without being told, is new.
func (c *Controller) AdminTaken(sqTail, cqHead uint32) {
	c.adminSeen.Store(bothBells(sqTail, cqHead))
}

func bothBells(sqTail, cqHead uint32) uint64 { return uint64(cqHead)<<32 | uint64(sqTail) }

// Stats returns what the controller has done so far.
func (c *Controller) Stats() Stats {
	s := c.past
	s.SQDoorbells, s.CQDoorbells = c.rung[0].Load(), c.rung[1].Load()
	c.each(func(_ *Worker, g *group) { s.add(g.stats) })
	s.Busy = c.busy.get()
	return s
}

// String describes every queue, for logs.
func (c *Controller) String() string {
	var b strings.Builder
	c.each(func(w *Worker, g *group) {
		fmt.Fprintf(&b, "CQ %d: %v, head %d of %d, tail %d, %d in flight, %d staged, blocked %v, listed %v; worker %d: %d with backends",
			g.qid, g.state, g.headDoorbell(), g.prod.Head(), g.prod.Tail(), g.inflight, len(g.staged), g.blocked, g.listed, w.id, w.inflight)
		for _, m := range w.queues {
			fmt.Fprintf(&b, " (%d)", m.q.Inflight())
		}
		for _, s := range g.sqs {
			fmt.Fprintf(&b, "; SQ %d: %v, tail %d, head %d, %d in flight, armed %d, lost %d", s.qid, s.state, s.tail.Load(), s.cons.Head(), s.inflight, s.tail.Armed, s.tail.Lost)
			if s.waiting > 0 {
				fmt.Fprintf(&b, ", %d held by limits", s.waiting)
			}
			if asked, shared := s.tail.Asked(); shared {
				fmt.Fprintf(&b, ", event index %d", asked)
			}
		}
		b.WriteByte('\n')
	})
	return b.String()
}
