// Package queue is one queue pair as the driver sees it: slots and command
// identifiers, the way of a command into the SQ and of its completion out of the
// CQ, waiting, and deadlines. The admin queue and the I/O queues are the same
// here. What commands mean, and where memory and doorbells come from, is for the caller.
//
// The flow, in the order of this package's files:
//
//	Take   a slot and its command identifier           queue.go
//	Push   the command into the SQ, unseen as yet
//	Publish  the new tail, once for each batch
//	Reap   completions by phase, check, free slots     reap.go
//	Wait   poll, then sleep on the interrupt           wait.go
//
// The device is not trusted: a completion with an unknown identifier, a wrong SQ or an
// impossible SQ head fails the queue (never the process), and every wait has an end.
//
// A Queue belongs to one goroutine at a time; only Fail may be called from any.
package queue

import (
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/spin"
)

var (
	// ErrTimeout is a command that was not completed within its deadline.
	ErrTimeout = errors.New("command timed out")
	// ErrProtocol is a completion that no conforming device posts.
	ErrProtocol = errors.New("device broke the protocol")
	// ErrReset is a command that was outstanding when its controller was reset.
	ErrReset = errors.New("the controller was reset under the command")
)

// Config says what a Queue is made of.
type Config struct {
	QID     uint16
	Size    uint32      // entries of the SQ and of the CQ, 2 to 4096
	SQ, CQ  *shm.Region // zeroed; 64 and 16 bytes for each entry
	Tail    *dbbuf.Publisher
	Head    *dbbuf.Publisher
	EventFD int           // readable on interrupt, non-blocking; -1: none, poll only
	Quiet   bool          // the device honours dbbuf.QuietBit
	NoSpin  bool          // Wait sleeps at once
	Timeout time.Duration // of each command; 0: none

	// Generation is where command identifiers begin: a queue that takes the place of another begins elsewhere, so that a
	// completion which was meant for that one matches nothing.
	Generation uint16

	// Late is told of a command past its deadline, and again, as an old one, each time that Grace has passed and it is still outstanding. It
	// is called by who waits or reaps, and returns at once; false says that it could not listen and is to be told anew. nil: the first
	// such command fails the queue.
	Late  func(l Late, old bool) bool
	Grace time.Duration
	// Events, if not nil, is told of each command, and of sleep, under Key.
	Events *events.Shared
	Key    events.Key

	// Slow is told, by the same goroutine and once a second, that a command has been outstanding for longer than that; nil: nobody is.
	Slow func()
}

// Late is a command that is past its deadline, as an error.
type Late struct {
	QID, CID uint16
	Err      error // wraps ErrTimeout and says which command, for how long
}

func (l *Late) Error() string { return l.Err.Error() }

// Unwrap returns l.Err.
func (l *Late) Unwrap() error { return l.Err }

// slowAfter is when a command that is not late yet is worth a look at the device.
const slowAfter = int64(time.Second)

// MaxSize is the deepest queue, in entries: 12 bits of a command identifier name the
// slot, the rest are its generation.
const MaxSize = 4096

// Queue is one queue pair.
type Queue struct {
	sq   *ring.SQProducer
	cq   *ring.CQConsumer
	tail *dbbuf.Publisher
	head *dbbuf.Publisher

	sqMem, cqMem *shm.Region
	rung         uint64 // by the Publishers before Renew

	slots    []slot
	free     []uint16 // stack of free slots
	slotMask uint16
	genUnit  uint16 // what a generation adds to a command identifier
	qid      uint16

	unpublished uint32 // CQ entries reaped since the head was published
	lazy        uint32 // how many of them make a publication due
	size        uint32

	clock   int64 // ns since start, as last read
	timeout int64 // ns
	grace   int64 // ns
	late    func(Late, bool) bool
	slow    func()
	told    int64 // ns, when slow was told
	idle    uint32

	budget  spin.Budget
	noSpin  bool
	quiet   bool
	eventFD int
	poll    pollState

	failed atomic.Pointer[error]
	trace  *tracer // nil: nobody is told

	// Wakeups counts sleeps on the interrupt that ended.
	Wakeups uint64
	looks   looks
}

type slot struct {
	tag     uint64
	started int64
	cid     uint16
	busy    bool
	late    uint8 // how often Late was told, at the most 255
	opcode  uint8
}

var start = time.Now()

// New returns an empty queue.
func New(c Config) (*Queue, error) {
	if c.Size > MaxSize {
		return nil, fmt.Errorf("queue %d of %d entries: at most %d", c.QID, c.Size, MaxSize)
	}
	sq, err := ring.NewSQProducer(c.SQ, c.Size)
	if err != nil {
		return nil, fmt.Errorf("queue %d: %w", c.QID, err)
	}
	cq, err := ring.NewCQConsumer(c.CQ, c.Size)
	if err != nil {
		return nil, fmt.Errorf("queue %d: %w", c.QID, err)
	}
	// One entry of each ring stays empty, so there is one slot fewer (R9).
	n := c.Size - 1
	slotBits := bits.Len32(n)
	q := &Queue{
		sq: sq, cq: cq, tail: c.Tail, head: c.Head, sqMem: c.SQ, cqMem: c.CQ,
		slots: make([]slot, n), free: make([]uint16, n),
		slotMask: 1<<slotBits - 1, genUnit: 1 << slotBits, qid: c.QID,
		size: c.Size, lazy: max(c.Size/4, 1),
		trace: newTracer(&c), timeout: int64(c.Timeout), grace: int64(c.Grace), late: c.Late, slow: c.Slow, noSpin: c.NoSpin, quiet: c.Quiet, eventFD: c.EventFD,
	}
	for i := range q.free {
		// The stack's top is the lowest slot: a shallow load stays in few cache lines.
		s := uint16(len(q.free) - 1 - i)
		q.free[i] = s
		q.slots[s].cid = s + c.Generation*q.genUnit
	}
	q.Stamp()
	return q, nil
}

// Renew begins anew over the same rings, which the caller has zeroed, and with other doorbells: the controller was reset. No command
// is outstanding, and what the queue failed of is over. Command identifiers go on where they were, so what the controller owed before matches
// nothing now.
func (q *Queue) Renew(tail, head *dbbuf.Publisher) error {
	sq, err := ring.NewSQProducer(q.sqMem, q.size)
	if err != nil {
		return fmt.Errorf("queue %d: %w", q.qid, err)
	}
	cq, err := ring.NewCQConsumer(q.cqMem, q.size)
	if err != nil {
		return fmt.Errorf("queue %d: %w", q.qid, err)
	}
	q.rung = q.Rings()
	q.sq, q.cq, q.tail, q.head = sq, cq, tail, head
	q.unpublished, q.idle = 0, 0
	if q.trace != nil {
		q.trace.pushed = q.trace.pushed[:0]
	}
	q.failed.Store(nil)
	return nil
}

// CID returns the command identifier of a slot that is taken.
func (q *Queue) CID(slot uint16) uint16 { return q.slots[slot].cid }

// Stamp reads the clock. Commands taken after it are timed from it, so the caller stamps
// once before each batch. It returns ns since an arbitrary start.
func (q *Queue) Stamp() int64 {
	q.clock = int64(time.Since(start))
	return q.clock
}

// Size returns the number of entries of each ring.
func (q *Queue) Size() uint32 { return q.size }

// Free returns how many commands can be taken.
func (q *Queue) Free() int { return len(q.free) }

// Outstanding returns how many commands have been taken and not reaped.
func (q *Queue) Outstanding() int { return len(q.slots) - len(q.free) }

// Take takes a slot for a command; tag comes back with its completion. It returns the slot's
// number, from 0 to Size-2, or false when all are taken.
func (q *Queue) Take(tag uint64) (uint16, bool) {
	n := len(q.free) - 1
	if n < 0 {
		return 0, false
	}
	i := q.free[n]
	q.free = q.free[:n]
	s := &q.slots[i]
	s.tag, s.started, s.busy, s.late = tag, q.clock, true, 0
	return i, true
}

// Push writes the command of a slot that Take gave into the SQ and sets its identifier. The
// device sees it after Publish.
func (q *Queue) Push(slot uint16, cmd *nvme.Command) {
	s := &q.slots[slot]
	cmd.CID, s.opcode = s.cid, cmd.Opcode
	if q.trace != nil {
		q.trace.push(cmd)
	}
	q.sq.Push(cmd)
}

// Cancel gives back a slot that was taken and not pushed.
func (q *Queue) Cancel(slot uint16) { q.release(slot) }

func (q *Queue) release(i uint16) {
	s := &q.slots[i]
	s.busy = false
	// The next generation: an old completion of this slot does not match any more. FFFFh, which is
	// reserved (NVMe Base 2.0c 3.3.3.1), cannot come up: no slot has the highest number.
	s.cid += q.genUnit
	q.free = append(q.free, i)
}

// Publish makes what was pushed visible to the device. The CQ head goes with the tail when it
// is due: both lie in one cache line.
func (q *Queue) Publish() error {
	if p := q.failed.Load(); p != nil {
		return *p
	}
	if q.unpublished >= q.lazy || q.unpublished+uint32(q.Outstanding()) >= q.size-1 {
		if err := q.publishHead(); err != nil {
			return err
		}
	}
	var err error
	if q.trace == nil {
		err = q.tail.Publish(q.sq.Tail())
	} else {
		err = q.publishTraced()
	}
	if err != nil {
		return q.Fail(fmt.Errorf("queue %d: ringing the SQ doorbell: %w", q.qid, err))
	}
	return nil
}

func (q *Queue) publishHead() error {
	q.unpublished = 0
	if err := q.head.Publish(q.cq.Head()); err != nil {
		return q.Fail(fmt.Errorf("queue %d: ringing the CQ doorbell: %w", q.qid, err))
	}
	return nil
}

// Fail makes the queue return err until Renew; who sleeps on it sees that after a nap. The first error
// stays, and is returned.
func (q *Queue) Fail(err error) error {
	q.failed.CompareAndSwap(nil, &err)
	return *q.failed.Load()
}

// Err returns why the queue failed, or nil.
func (q *Queue) Err() error {
	if p := q.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// Drop takes back every outstanding command of a failed queue, whose device can no longer
// write memory, and calls f with each tag.
func (q *Queue) Drop(f func(tag uint64)) {
	for i := range q.slots {
		if s := &q.slots[i]; s.busy {
			f(s.tag)
			q.release(uint16(i))
		}
	}
}

// Rings returns the MMIO doorbell writes of the queue so far.
func (q *Queue) Rings() uint64 { return q.rung + q.tail.Rings + q.head.Rings }
