// Package ioq is the data path of hostmed: the workers that poll submission queues, run
// I/O commands against backends, and post completions.
//
// A Worker is a goroutine locked to its thread, pinned to a core where the operator says so. It
// owns whole CQs: one CQ and every SQ that feeds it are one group, touched by no other thread, so a
// queue has no lock (one writer for each ring index). It polls the groups on its active
// list; a group that has been empty for longer than polling pays is armed and leaves the list, and
// comes back by a kick: a doorbell message on a client's socket, which is in the
// epoll set of the worker that is the client's home. An idle group costs nothing.
//
//	Absent -> Polling <-> Armed        CreateCQ; Arm said yes, or a turn is near (limits.go); a kick
//	Polling, Armed -> Draining -> Absent   DeleteSQ, DeleteCQ, Stop
//	Polling, Armed -> Parked -> Polling    its memory is unmapped, and mapped again (parking.go)
//	any -> Failed                      a doorbell that cannot be (R30), guest memory gone (R36)
//
// The control side (sessions, admin commands) reaches a worker by Call, which runs a function
// on the worker's thread between two rounds. It never touches what a worker owns.
//
// Files in the order of a command's way: worker.go (the loop), group.go (fetch), exec.go (decode, translate,
// submit), gate.go and limits.go (what waits), complete.go (post, interrupt), control.go (what the admin side asks for). cost.go and events.go tell what
// becomes of commands.
package ioq

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/prp"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/spin"
)

const (
	// batchMax is how many commands are fetched from one SQ at a time. Fewer than a
	// queue usually holds, so that driver and device work on different batches at the same
	// time: measured on bare rings, 16 of 32 is four times as fast as 32 of 32.
	batchMax = 16
	// roundsPerTick is how many polling rounds pass between two looks at the clock.
	roundsPerTick = 64
	// socketPeriod is how long a busy worker leaves its sockets alone.
	socketPeriod = int64(30 * time.Microsecond)
)

// Source is a descriptor in a worker's epoll set.
type Source interface {
	// Ready is called on the worker's thread with the epoll events. It must not block.
	Ready(events uint32)
}

// Worker is one thread of the data path.
type Worker struct {
	id  int
	log hclog.Logger

	// From other threads: mail under mu, then posted, then a byte to wakeFD if sleeping.
	mu       sync.Mutex
	mail     []func()
	posted   atomic.Bool
	sleeping atomic.Bool
	wakeFD   int
	done     chan struct{}
	tid      int // of the thread; it does not change

	// The rest is the worker's own.
	ep      int
	sources map[int32]Source
	events  [64]unix.EpollEvent
	waits   []*wait
	stop    bool

	now     int64 // ns since start, as last read
	sockets int64 // when the sockets were last looked at
	worked  bool  // since then
	rounds  uint32
	noSpin  bool
	budget  spin.Budget // of waiting with nothing on the active list

	active []*group   // polled
	due    []deferred // interrupts held back by coalescing
	dozing []*group   // armed, with commands in flight

	// Doorbells that cannot wake the worker, because they are in a mapped page:
	mapped  []*group      // idle groups
	watched []*Controller // their queue 0
	nap     int64         // ns between two looks

	queues    []*media // open backend queues
	inflight  int      // requests with asynchronous backends
	reqs      []*request
	free      []*request
	scratch   []*shm.Region // free, see steps.go
	scratches int           // that there are
	sink      *shm.Region   // for bit buckets
	walker    prp.Walker
	extents   []prp.Extent
	batch     []*backend.Request // being collected for one backend
	batchOf   *media
	again     []*request // have another step to be submitted
	held      []*request // wait, see gate.go, oldest first
	lanes     turns      // have what waits for its turn, see limits.go
	stalled   []*lane    // and are paused
	freeLanes []*lane
	seq       uint64     // of lanes' turns
	ticket    qos.Ticket // of the command that is being started
	finished  [2 * batchMax]*backend.Request
	touched   []*group // have staged completions
	current   *group   // whose memory is being touched
	pending   *request // fetched, not yet handed on

	limitClock func() int64 // in place of now, for tests; nil: now

	pairs       []*pairOf   // wait for their namespace, see fused.go
	pairing     bool        // the namespace of one is asked for or held
	pairScratch *shm.Region // for its Compare

	extra    bool    // a sample is being taken, or somebody listens
	trace    *tracer // nil: nobody listens, see events.go
	cost     sampler
	copyFrom copySources // of the Copy that is being decoded
}

// wait is a condition that someone on the control side waits for.
type wait struct {
	met  func() bool
	done chan struct{} // closed when it is
	then func()        // called in addition; nil: nothing is
}

var (
	epoch     = time.Now()
	startedAt = inspect.Now() // epoch by CLOCK_MONOTONIC
)

func nanotime() int64 { return int64(time.Since(epoch)) }

// WorkerConfig says how a worker runs.
type WorkerConfig struct {
	ID     int
	CPU    int           // core to be pinned to; -1: none
	NoSpin bool          // never poll for longer than there is work: for measurements
	Poll   time.Duration // longest poll of an empty queue; 0: spin.Max
	Logger hclog.Logger
}

// StartWorker starts a worker. Stop ends it.
func StartWorker(c WorkerConfig) (*Worker, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(ep)
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	w := &Worker{
		id: c.ID, log: c.Logger, wakeFD: wake, ep: ep, noSpin: c.NoSpin, budget: spin.Budget{Most: c.Poll},
		sources: map[int32]Source{}, done: make(chan struct{}),
		batch: make([]*backend.Request, 0, batchMax), extents: make([]prp.Extent, 0, 16),
	}
	w.cost.init()
	if err := w.Add(wake, (*wakeSource)(w)); err != nil {
		unix.Close(wake)
		unix.Close(ep)
		return nil, err
	}
	started := make(chan error)
	go w.run(c.CPU, started)
	if err := <-started; err != nil {
		return nil, err
	}
	return w, nil
}

// Stop ends the worker, whose groups and sources are gone by then.
func (w *Worker) Stop() {
	w.Call(func() { w.stop = true })
	<-w.done
}

// Call runs f on the worker's thread between two rounds and returns when it has run. A fault on
// guest memory in f ends f and fails the group that f named by touch.
func (w *Worker) Call(f func()) {
	ran := make(chan struct{})
	w.post(func() {
		defer close(ran)
		f()
	})
	<-ran
}

// until returns when met, which is asked on the worker's thread after each round, says so.
func (w *Worker) until(met func() bool) {
	x := &wait{met: met, done: make(chan struct{})}
	w.post(func() { w.waits = append(w.waits, x) })
	<-x.done
}

// within is until that waits for most at the most. If it is false then is called, on the worker's thread, when met says so after all.
func (w *Worker) within(most time.Duration, met func() bool, then func()) (ok bool) {
	x := &wait{met: met, done: make(chan struct{})}
	w.Call(func() {
		if ok = met(); !ok {
			w.waits = append(w.waits, x)
		}
	})
	if ok {
		return true
	}
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-x.done:
		return true
	case <-timer.C:
	}
	w.Call(func() {
		select {
		case <-x.done:
			ok = true
		default:
			x.then = then
		}
	})
	return ok
}

// post puts f in the mail and wakes the worker; pairs with sleep, which says that it sleeps and then
// looks at posted.
func (w *Worker) post(f func()) {
	w.mu.Lock()
	w.mail = append(w.mail, f)
	w.mu.Unlock()
	w.posted.Swap(true) // not Store, see package dbbuf
	if w.sleeping.Load() {
		writeEventFD(w.wakeFD)
	}
}

// Post runs f on the worker's thread, some time soon.
func (w *Worker) Post(f func()) { w.post(f) }

func (w *Worker) runMail() {
	w.posted.Store(false)
	w.mu.Lock()
	mail := w.mail
	w.mail = nil
	w.mu.Unlock()
	for i, f := range mail {
		if err := shm.Guard(f); err != nil {
			w.fault(err)
		}
		mail[i] = nil
	}
}

// Add, Modify and Remove keep the epoll set. They are called on the worker's thread, or before
// anybody else knows of the worker.
func (w *Worker) Add(fd int, s Source) error { return w.add(fd, unix.EPOLLIN, s) }

func (w *Worker) add(fd int, events uint32, s Source) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(fd)}
	if err := unix.EpollCtl(w.ep, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("epoll add: %w", err)
	}
	w.sources[int32(fd)] = s
	return nil
}

// AddEdge is Add for an eventfd that is not to be read: Ready is called for each write.
func (w *Worker) AddEdge(fd int, s Source) error {
	const edge = unix.EPOLLET & (1<<32 - 1)
	return w.add(fd, unix.EPOLLIN|edge, s)
}

// Modify turns the reading of fd on or off. A hang-up is reported only while it is on.
func (w *Worker) Modify(fd int, on bool) {
	ev := unix.EpollEvent{Fd: int32(fd)}
	if on {
		ev.Events = unix.EPOLLIN
		_ = unix.EpollCtl(w.ep, unix.EPOLL_CTL_ADD, fd, &ev)
		return
	}
	_ = unix.EpollCtl(w.ep, unix.EPOLL_CTL_DEL, fd, &ev)
}

// Remove forgets fd.
func (w *Worker) Remove(fd int) {
	if _, ok := w.sources[int32(fd)]; ok {
		delete(w.sources, int32(fd))
		_ = unix.EpollCtl(w.ep, unix.EPOLL_CTL_DEL, fd, nil)
	}
}

func (w *Worker) run(cpu int, started chan<- error) {
	runtime.LockOSThread() // never unlocked: the thread dies with the goroutine, and its affinity with it
	w.tid = unix.Gettid()
	defer close(w.done)
	defer func() {
		unix.Close(w.wakeFD)
		unix.Close(w.ep)
	}()
	if cpu >= 0 {
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			started <- fmt.Errorf("pinning a worker to CPU %d: %w (is it online and in this process's CPU set?)", cpu, err)
			return
		}
	}
	close(started)
	for !w.stop {
		// A fault unwinds to here, is charged to the group whose memory it was, and the loop goes on (R36).
		if err := shm.Guard(w.loop); err != nil {
			w.fault(err)
		}
	}
	w.closeMedia()
}

func (w *Worker) loop() {
	for !w.stop {
		if w.posted.Load() {
			w.runMail()
			continue
		}
		work := 0
		for _, g := range w.active {
			work += w.poll(g)
		}
		if w.inflight > 0 {
			work += w.reap()
		}
		if len(w.touched) > 0 {
			w.postAll()
		}
		if w.extra {
			w.endExtra()
		}
		if len(w.waits) > 0 {
			w.checkWaits()
		}
		w.worked = w.worked || work > 0
		if w.rounds++; w.rounds%roundsPerTick == 0 || len(w.active) == 0 {
			w.tick(work)
		}
	}
}

// tick is what need not be done in each round: the clock, timers, sockets, and the end of
// polling.
func (w *Worker) tick(work int) {
	w.now = nanotime()
	for i := 0; i < len(w.active); {
		if g := w.active[i]; w.rest(g) {
			g.listed = false
			w.active[i] = w.active[len(w.active)-1]
			w.active[len(w.active)-1] = nil
			w.active = w.active[:len(w.active)-1]
		} else {
			i++
		}
	}
	if len(w.due) > 0 {
		w.fireDue()
	}
	if len(w.dozing) > 0 {
		w.countDozing()
	}
	if w.inflight > 0 {
		w.countVain()
	}
	if len(w.lanes) > 0 {
		work += w.takeTurns()
	}
	if len(w.active) > 0 {
		if w.now-w.sockets >= socketPeriod {
			w.look(0)
			if !w.worked {
				schedYield()
			}
			w.worked = false
			if len(w.mapped)+len(w.watched) > 0 {
				w.lookMapped()
			}
		}
		return
	}
	if work == 0 {
		w.idle()
	}
}

// idle waits with nothing to poll: for a while by looking at the descriptors
// again and again, then asleep. While a polled backend queue has something in flight nobody would wake it.
func (w *Worker) idle() {
	poll := int64(-1)
	if w.inflight > 0 {
		if poll = w.nextLook(); poll == 0 {
			if w.now-w.sockets >= socketPeriod {
				w.look(0)
				schedYield()
				if len(w.mapped)+len(w.watched) > 0 {
					w.lookMapped()
				}
			}
			return
		}
	}
	begin, turn := w.now, w.nextTurn()
	if !w.noSpin && poll < 0 {
		limit := int64(w.budget.Limit())
		if turn >= 0 { // what the clock will end polling cannot
			limit = min(limit, turn)
		}
		for limit > 0 {
			if w.look(0) > 0 || w.posted.Load() || w.inflight > 0 && w.reap() > 0 {
				w.budget.Earned(time.Duration(w.now - begin))
				return
			}
			schedYield()
			if w.now = nanotime(); w.now-begin > limit {
				w.budget.Failed()
				break
			}
		}
	}
	timeout := int64(-1)
	mapped := len(w.mapped)+len(w.watched) > 0
	if mapped {
		timeout = w.nap
	}
	for _, d := range w.due {
		if left := max(d.at-w.now, 0); timeout < 0 || left < timeout {
			timeout = left
		}
	}
	for _, t := range [...]int64{w.nextTurn(), poll} {
		if t >= 0 && (timeout < 0 || t < timeout) {
			timeout = t
		}
	}
	w.sleeping.Swap(true)
	if w.posted.Load() { // pairs with post
		timeout = 0
	}
	w.look(timeout)
	w.sleeping.Store(false)
	if mapped {
		w.lookMapped()
	}
}

// look handles what is readable, waiting for it for timeout ns; -1 waits for ever.
func (w *Worker) look(timeout int64) int {
	asleep := timeout != 0 && w.trace != nil
	if asleep {
		w.traceSleep(timeout)
	}
	n, err := epollWait(w.ep, w.events[:], timeout)
	if asleep {
		w.traceWoke(n)
	}
	w.now = nanotime()
	w.sockets = w.now
	if err != nil {
		if !errors.Is(err, unix.EINTR) {
			w.log.Error("epoll_wait", "error", err)
		}
		return 0
	}
	for i := range n {
		if s := w.sources[w.events[i].Fd]; s != nil {
			s.Ready(w.events[i].Events)
		}
	}
	return n
}

func (w *Worker) checkWaits() {
	keep := w.waits[:0]
	for _, x := range w.waits {
		if x.met() {
			close(x.done)
			if x.then != nil {
				x.then()
			}
		} else {
			keep = append(keep, x)
		}
	}
	clear(w.waits[len(keep):])
	w.waits = keep
}

// wakeSource is the eventfd by which other threads wake the worker.
type wakeSource Worker

func (s *wakeSource) Ready(uint32) {
	var buf [8]byte
	_, _ = unix.Read(s.wakeFD, buf[:])
}
