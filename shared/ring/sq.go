package ring

import (
	"fmt"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// SQProducer is the driver's half of a submission queue.
type SQProducer struct {
	entries []nvme.Command // shared
	size    uint32
	tail    uint32 // next entry to write
	head    uint32 // as the device last reported it (CQE.SQHD)
}

// NewSQProducer returns the driver's half of the empty SQ of size entries at the start of mem.
func NewSQProducer(mem *shm.Region, size uint32) (*SQProducer, error) {
	if err := checkSize(mem, size, SQESize); err != nil {
		return nil, fmt.Errorf("SQ: %w", err)
	}
	return &SQProducer{entries: commands(mem, size), size: size}, nil
}

// Free returns how many commands can be pushed.
func (q *SQProducer) Free() uint32 { return q.size - 1 - distance(q.head, q.tail, q.size) }

// Tail returns the index of the next entry to be written: what the doorbell is to say.
func (q *SQProducer) Tail() uint32 { return q.tail }

// Push copies cmd into the ring. The caller has seen Free() > 0, and the device sees
// nothing of it before the tail is published (R6).
func (q *SQProducer) Push(cmd *nvme.Command) {
	q.entries[q.tail] = *cmd
	if q.tail++; q.tail == q.size {
		q.tail = 0
	}
}

// Released takes the head from a completion. The device consumes in order, so a head outside
// [head, tail] is ErrDoorbell, and changes nothing.
func (q *SQProducer) Released(sqhd uint16) error {
	h := uint32(sqhd)
	if h >= q.size || distance(q.head, h, q.size) > distance(q.head, q.tail, q.size) {
		return fmt.Errorf("SQ head %d with head %d, tail %d, size %d: %w", h, q.head, q.tail, q.size, ErrDoorbell)
	}
	q.head = h
	return nil
}

// SQConsumer is the device's half of a submission queue.
type SQConsumer struct {
	entries []nvme.Command // shared
	size    uint32
	head    uint32 // next entry to fetch
	seen    uint32 // last tail that was accepted
}

// NewSQConsumer returns the device's half of the empty SQ of size entries at the start of mem.
func NewSQConsumer(mem *shm.Region, size uint32) (*SQConsumer, error) {
	if err := checkSize(mem, size, SQESize); err != nil {
		return nil, fmt.Errorf("SQ: %w", err)
	}
	return &SQConsumer{entries: commands(mem, size), size: size}, nil
}

// Detach lets go of the ring's memory; nothing may be fetched until Attach gives it the same entries again, wherever
// they are by then. Head and tail stay.
func (q *SQConsumer) Detach() { q.entries = nil }

// Attach puts the ring on the memory that holds its entries now.
func (q *SQConsumer) Attach(mem *shm.Region) error {
	if err := checkSize(mem, q.size, SQESize); err != nil {
		return fmt.Errorf("SQ: %w", err)
	}
	q.entries = commands(mem, q.size)
	return nil
}

// Size returns the number of entries, and Head the index of the next to be fetched.
func (q *SQConsumer) Size() uint32 { return q.size }
func (q *SQConsumer) Head() uint32 { return q.head }

// Pending returns how many entries wait between the head and tail, a value that was read
// once from a doorbell. A tail outside the ring, or behind one seen before, is
// ErrDoorbell (R30).
func (q *SQConsumer) Pending(tail uint32) (uint32, error) {
	if tail >= q.size {
		return 0, fmt.Errorf("SQ tail %d in a ring of %d: %w", tail, q.size, ErrDoorbell)
	}
	n := distance(q.head, tail, q.size)
	if tail != q.seen {
		if n < distance(q.head, q.seen, q.size) {
			return 0, fmt.Errorf("SQ tail went back from %d to %d, head %d: %w", q.seen, tail, q.head, ErrDoorbell)
		}
		q.seen = tail
	}
	return n, nil
}

// Prefetch says that the next n entries are about to be fetched. It reads none of them, and the caller has seen Pending >= n.
func (q *SQConsumer) Prefetch(n uint32) {
	prefetch(&q.entries[q.head], min(n, q.size-q.head)) // what lies behind the wrap comes once a lap
}

// Fetch copies the next entry once (R31) and moves the head. The caller has seen Pending > 0 by an
// atomic load of the tail (R4).
func (q *SQConsumer) Fetch(cmd *nvme.Command) {
	*cmd = q.entries[q.head]
	if q.head++; q.head == q.size {
		q.head = 0
	}
}

// Waiting returns the identifier of the n-th entry from the head on and its place in the ring, without fetching it: what Fetch copies later
// may be another. The caller has seen Pending > n.
func (q *SQConsumer) Waiting(n uint32) (cid uint16, index uint32) {
	if index = q.head + n; index >= q.size {
		index -= q.size
	}
	return q.entries[index].CID, index
}
