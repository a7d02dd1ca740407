// Package lane lets any number of goroutines use one queue pair and wait for their commands on it. The admin queue and
// the I/O queues of the plain API are lanes.
//
// The flow:
//
//	Start   a goroutine's commands into the queue, one Publish for all     lane.go
//	reap    by whoever holds the lock; each completion goes to its Sink
//	Wait    poll for everybody, then sleep                                 wait.go
//	listen  one goroutine for each lane sleeps on the interrupt            listen.go
//	Rescue, Late  deadlines; the controller's watchdog calls them          check.go
//	Pause, Lose, Renew, Resume  the controller is reset                    reset.go
//
// No wake-up is lost: whenever the lock is free and commands are outstanding, either a goroutine polls, or the interrupt is on
// and the CQ was looked at after it was turned on (rule R12: the sleep transition always arms).
//
// What the commands mean and what memory they use is for the callers.
package lane

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/driver/tally"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/spin"
)

// Sink gets the end of one command: Complete, or Lost when the device has not ended it as it should and can no longer touch its
// memory. Both are called under the lane's lock: they are quick and call nothing of the lane. String names the command in errors; it is
// called under the lock too.
type Sink interface {
	String() string
	Complete(status nvme.Status, result uint32)
	Lost(err error)
}

// Source gives commands to Start, which calls Next under the lane's lock, once for each slot. Next fills in cmd, which is all zero,
// and says who gets its end; a nil Sink says that there are no more.
type Source interface {
	Next(slot uint16, cmd *nvme.Command) (Sink, error)
}

// Waiting is how Wait waits.
type Waiting uint8

const (
	Adaptive Waiting = iota // poll for as long as that has paid off lately, then sleep
	Sleep                   // sleep at once
	Poll                    // one goroutine polls until it has what it waits for
)

// Config says what a Lane is made of.
type Config struct {
	Queue   *queue.Queue     // without a timeout of its own
	Head    *dbbuf.Publisher // the queue's CQ head, for its quiet bit
	QID     uint16
	EventFD int  // the interrupt, non-blocking; the lane closes it. -1: there is none, the lane polls
	Quiet   bool // the device honours dbbuf.QuietBit
	Timeout time.Duration
	Waiting Waiting

	// Failed is told, once and not under the lock, why the lane failed by itself. A command past its deadline is no such failure.
	Failed func(error)
}

// Lane is one shared queue pair.
type Lane struct {
	cfg   Config
	tally *tally.Tally // of commands with a deadline; it is added to under mu

	// mu guards what follows. The only lock taken under it is the DMA pool's.
	mu       sync.Mutex
	q        *queue.Queue
	head     *dbbuf.Publisher
	mode     mode
	owners   []owner // by slot
	forever  int     // how many of them have no deadline
	again    []owner // commands that Resume sends once more
	budget   spin.Budget
	polling  bool // some goroutine polls in Wait
	room     fifo // who waits for a slot
	cmd      nvme.Command
	batch    [32]queue.Completion
	err      error // why the lane failed
	commands uint64
	executed uint64 // of them, those with a deadline that were not aborted
	wakeups  uint64
	rescued  uint64
	naps     uint64

	failed chan struct{} // closed once err is set

	file *os.File // the interrupt; nil: none
	conn syscall.RawConn
	work chan struct{} // for a lane without an interrupt: there are commands
	done chan struct{} // the listening goroutine has ended
}

// owner is whose command is in a slot.
type owner struct {
	sink    Sink // nil: the slot is free
	started int64
	forever bool // no deadline
	late    bool // Late has told of it
	second  bool // it was sent once more after a reset
}

// Waiter is a goroutine that waits for its commands. It belongs to one goroutine and one lane at a time, and can be used again.
// Its Sinks call Signal.
type Waiter struct {
	ready  atomic.Bool
	asleep bool          // guarded by Lane.mu
	wake   chan struct{} // cap 1
	next   *Waiter       // in Lane.room
	queued bool
}

// NewWaiter returns a Waiter.
func NewWaiter() *Waiter { return &Waiter{wake: make(chan struct{}, 1)} }

// Signal ends the Wait under way, or the next one. It is for Sinks, under the lane's lock.
func (w *Waiter) Signal() {
	w.ready.Store(true)
	if w.asleep {
		w.asleep = false
		w.wake <- struct{}{}
	}
}

// New returns a lane over an empty queue that is known to the device, and starts its goroutine.
func New(cfg Config) (*Lane, error) {
	l := &Lane{
		cfg: cfg, tally: tally.New(cfg.QID == 0), q: cfg.Queue, head: cfg.Head, owners: make([]owner, cfg.Queue.Free()),
		failed: make(chan struct{}), work: make(chan struct{}, 1), done: make(chan struct{}),
	}
	if cfg.EventFD < 0 {
		go l.pollLoop()
		return l, nil
	}
	l.file = os.NewFile(uintptr(cfg.EventFD), fmt.Sprintf("interrupt of queue %d", cfg.QID))
	if l.file == nil {
		return nil, fmt.Errorf("queue %d: %d is no file descriptor", cfg.QID, cfg.EventFD)
	}
	var err error
	if l.conn, err = l.file.SyscallConn(); err != nil {
		l.file.Close()
		return nil, fmt.Errorf("queue %d: its interrupt: %w", cfg.QID, err)
	}
	go l.listen()
	return l, nil
}

// ErrClosed says that the lane was closed.
var ErrClosed = errors.New("queue is closed")

// Start puts commands from src into the queue until src has no more or there is no free slot, and publishes them together. It returns
// how many. If there was no slot for even one, or the lane is paused, and w is not nil, w is signalled when it is worth another try. An
// error of src ends the batch, and is returned after what came before it was published.
func (l *Lane) Start(src Source, w *Waiter) (int, error) {
	return l.start(src, w, false, false)
}

// StartPrivate is Start for who sets the controller up, while others wait.
func (l *Lane) StartPrivate(src Source, w *Waiter) (int, error) {
	return l.start(src, w, false, true)
}

// StartForever is StartPrivate for commands that have no deadline.
func (l *Lane) StartForever(src Source) (int, error) {
	return l.start(src, nil, true, true)
}

func (l *Lane) start(src Source, w *Waiter, forever, private bool) (n int, err error) {
	l.mu.Lock()
	defer l.unlock()
	if w != nil {
		l.room.remove(w)
	}
	defer l.offer()
	if l.err != nil {
		return 0, l.err
	}
	if !l.open(private) {
		if w != nil {
			l.room.push(w)
		}
		return 0, nil
	}
	if l.q.Free() == 0 {
		l.reap()
	}
	now := l.q.Stamp()
	for {
		slot, ok := l.q.Take(0)
		if !ok {
			break
		}
		l.cmd = nvme.Command{}
		sink, nextErr := src.Next(slot, &l.cmd)
		if sink == nil || nextErr != nil {
			l.q.Cancel(slot)
			err = nextErr
			break
		}
		l.owners[slot] = owner{sink: sink, started: now, forever: forever}
		l.q.Push(slot, &l.cmd)
		n++
	}
	if forever {
		l.forever += n
	}
	if n == 0 {
		if w != nil && err == nil && l.q.Free() == 0 {
			l.room.push(w)
		}
		return 0, err
	}
	if pubErr := l.publish(); pubErr != nil {
		return n, pubErr
	}
	return n, err
}

func (l *Lane) publish() error {
	if err := l.q.Publish(); err != nil {
		l.fail(err)
		return err
	}
	select {
	case l.work <- struct{}{}:
	default:
	}
	return nil
}

// unlock gives the lock back. A failure that came up under it is reported afterwards.
func (l *Lane) unlock() {
	err := l.err
	report := l.cfg.Failed
	if err != nil {
		l.cfg.Failed = nil
	}
	l.mu.Unlock()
	if err != nil && report != nil {
		report(err)
	}
}

// reap hands out all completions there are. Each frees a slot that only Start fills again, so it ends whatever the device posts.
func (l *Lane) reap() int {
	if l.err != nil || l.mode == paused {
		return 0
	}
	total := 0
	for {
		n, err := l.q.Reap(l.batch[:])
		if n > 0 {
			l.count(l.batch[:n])
		}
		for i := range l.batch[:n] {
			c := &l.batch[i]
			o := l.owners[c.Slot]
			l.owners[c.Slot] = owner{}
			l.end(o, c)
			l.offer()
		}
		total += n
		if err != nil {
			l.fail(err)
		}
		if n < len(l.batch) || err != nil {
			l.commands += uint64(total)
			return total
		}
	}
}

// count tallies commands that have ended. One without a deadline says nothing of how long commands take.
func (l *Lane) count(batch []queue.Completion) {
	now := l.q.Stamp()
	for i := range batch {
		if c := &batch[i]; !l.owners[c.Slot].forever {
			l.tally.Ended(c.Opcode, now-c.Started, 1)
			if !c.Status.OK() {
				l.tally.Failed(c.Opcode)
			}
		}
	}
}

// offer tells one of those who wait for a slot that there is one. Whoever is told either takes it, by Start, or leaves; both offer
// again, so no free slot is forgotten.
func (l *Lane) offer() {
	if l.mode == running && l.room.first != nil && l.q.Free() > 0 {
		l.room.pop().Signal()
	}
}

// Leave is for who was told, by Start, to wait for a slot, and does not need one any more.
func (l *Lane) Leave(w *Waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.room.remove(w)
	l.offer()
}

// Fail ends the lane for its users: whoever waits gets err now, whoever comes later too. Commands that are outstanding stay so,
// since the device may still write their memory; see Drop.
func (l *Lane) Fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cfg.Failed = nil // who calls knows
	l.fail(err)
}

func (l *Lane) fail(err error) {
	if l.err != nil {
		return
	}
	l.err = err
	_ = l.q.Fail(err)
	close(l.failed)
}

// Err returns why the lane failed, or nil.
func (l *Lane) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// With runs f under the lane's lock: Sinks do not run meanwhile.
func (l *Lane) With(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
}

// Failed is closed when the lane has failed.
func (l *Lane) Failed() <-chan struct{} { return l.failed }

// Close fails the lane and ends its goroutine. The commands that are outstanding stay, see Drop.
func (l *Lane) Close() {
	l.Fail(ErrClosed)
	if l.file != nil {
		l.file.Close()
	}
	<-l.done
}

// Stats is what a lane has counted.
type Stats struct {
	Commands   uint64 // completed
	Executed   uint64 // of them, those with a deadline that were not aborted
	MMIOWrites uint64 // doorbells rung
	Wakeups    uint64 // interrupts that woke the lane's goroutine
	Rescued    uint64 // completions that Rescue found before an interrupt came
	Naps       uint64 // looks of the goroutine that stands in for an interrupt
}

// Stats returns the counts so far.
func (l *Lane) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{Commands: l.commands, Executed: l.executed, MMIOWrites: l.q.Rings(), Wakeups: l.wakeups, Rescued: l.rescued, Naps: l.naps}
}

// Tally returns the counts of commands by kind.
func (l *Lane) Tally() *tally.Tally { return l.tally }

// fifo is the queue of those who wait for a slot.
type fifo struct{ first, last *Waiter }

func (f *fifo) push(w *Waiter) {
	if w.queued {
		return
	}
	w.queued, w.next = true, nil
	if f.last == nil {
		f.first = w
	} else {
		f.last.next = w
	}
	f.last = w
}

func (f *fifo) pop() *Waiter {
	w := f.first
	if w == nil {
		return nil
	}
	f.first = w.next
	if f.first == nil {
		f.last = nil
	}
	w.queued, w.next = false, nil
	return w
}

func (f *fifo) remove(w *Waiter) {
	if !w.queued {
		return
	}
	for p, prev := f.first, (*Waiter)(nil); p != nil; prev, p = p, p.next {
		if p != w {
			continue
		}
		if prev == nil {
			f.first = p.next
		} else {
			prev.next = p.next
		}
		if f.last == p {
			f.last = prev
		}
		break
	}
	w.queued, w.next = false, nil
}
