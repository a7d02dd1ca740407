package ring

import (
	"fmt"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Entry is a CQE as the two 64-bit words in which it crosses: Lo is dwords 0 and 1, Hi dwords 2 and
// 3. The phase tag is in Hi, so Hi is stored last and loaded first (R5).
type Entry struct {
	Lo, Hi uint64
}

const phaseBit = 1 << 48 // dword 3 bit 16, NVMe Base 2.0c 3.3.3.2

// MakeEntry builds a CQE without its phase tag, which belongs to the place where it is posted.
func MakeEntry(result uint64, sqHead uint32, sqid, cid uint16, status nvme.Status) Entry {
	return Entry{
		Lo: result,
		Hi: uint64(uint16(sqHead)) | uint64(sqid)<<16 | uint64(cid)<<32 | uint64(status)<<49,
	}
}

func (e Entry) Result() uint32      { return uint32(e.Lo) }
func (e Entry) SQHead() uint16      { return uint16(e.Hi) }
func (e Entry) SQID() uint16        { return uint16(e.Hi >> 16) }
func (e Entry) CID() uint16         { return uint16(e.Hi >> 32) }
func (e Entry) Status() nvme.Status { return nvme.Status(e.Hi >> 49) }

// CQProducer is the device's half of a completion queue.
type CQProducer struct {
	entries []Entry // shared; never read back (R31)
	size    uint32
	tail    uint32
	head    uint32 // as the driver last published it
	phase   uint64 // phaseBit or 0: what this lap's entries carry
}

// NewCQProducer returns the device's half of the empty CQ of size entries at the start of mem.
func NewCQProducer(mem *shm.Region, size uint32) (*CQProducer, error) {
	if err := checkSize(mem, size, CQESize); err != nil {
		return nil, fmt.Errorf("CQ: %w", err)
	}
	return &CQProducer{entries: entries(mem, size), size: size, phase: phaseBit}, nil
}

// Detach lets go of the ring's memory; nothing may be posted until Attach gives it the same entries again, wherever
// they are by then. Head, tail and phase stay.
func (q *CQProducer) Detach() { q.entries = nil }

// Attach puts the ring on the memory that holds its entries now.
func (q *CQProducer) Attach(mem *shm.Region) error {
	if err := checkSize(mem, q.size, CQESize); err != nil {
		return fmt.Errorf("CQ: %w", err)
	}
	q.entries = entries(mem, q.size)
	return nil
}

// Free returns how many entries can be posted before the driver publishes a new head.
func (q *CQProducer) Free() uint32 { return q.size - 1 - distance(q.head, q.tail, q.size) }

// Size, Head and Tail return the ring's numbers in entries and indices.
func (q *CQProducer) Size() uint32 { return q.size }
func (q *CQProducer) Head() uint32 { return q.head }
func (q *CQProducer) Tail() uint32 { return q.tail }

// Consumed takes the driver's head, a value that was read once from a doorbell. One outside
// the ring, or past the tail, is ErrDoorbell (R30) and changes nothing.
func (q *CQProducer) Consumed(head uint32) error {
	if head == q.head {
		return nil
	}
	if head >= q.size || distance(q.head, head, q.size) > distance(q.head, q.tail, q.size) {
		return fmt.Errorf("CQ head %d with head %d, tail %d, size %d: %w", head, q.head, q.tail, q.size, ErrDoorbell)
	}
	q.head = head
	return nil
}

// Post posts es in order. The caller has reserved the room: len(es) <= Free().
//
// The entries are written from the last to the first. The driver looks at the first of
// them, so it meets the batch when it is complete, and the two sides do
// not fight for each cache line (four entries share one).
func (q *CQProducer) Post(es []Entry) {
	n := uint32(len(es))
	if room := q.size - q.tail; n >= room {
		// The part behind the wrap belongs to the next lap and is written first.
		store(q.entries[:n-room], es[room:], q.phase^phaseBit)
		store(q.entries[q.tail:], es[:room], q.phase)
		q.tail = n - room
		q.phase ^= phaseBit
		return
	}
	store(q.entries[q.tail:q.tail+n], es, q.phase)
	q.tail += n
}

// CQConsumer is the driver's half of a completion queue.
type CQConsumer struct {
	entries []Entry // shared
	size    uint32
	head    uint32
	phase   uint64
}

// NewCQConsumer returns the driver's half of the CQ of size entries at the start of mem, which
// must be zeroed.
func NewCQConsumer(mem *shm.Region, size uint32) (*CQConsumer, error) {
	if err := checkSize(mem, size, CQESize); err != nil {
		return nil, fmt.Errorf("CQ: %w", err)
	}
	return &CQConsumer{entries: entries(mem, size), size: size, phase: phaseBit}, nil
}

// Head returns the index of the next entry: what the doorbell is to say.
func (q *CQConsumer) Head() uint32 { return q.head }

// Ready reports whether the next entry has been posted.
func (q *CQConsumer) Ready() bool {
	return atomic.LoadUint64(&q.entries[q.head].Hi)&phaseBit == q.phase
}

// Next takes the next entry, if it has been posted.
func (q *CQConsumer) Next() (Entry, bool) {
	p := &q.entries[q.head]
	hi := atomic.LoadUint64(&p.Hi) // before Lo: pairs with store's order (R5)
	if hi&phaseBit != q.phase {
		return Entry{}, false
	}
	e := Entry{Lo: p.Lo, Hi: hi &^ phaseBit}
	if q.head++; q.head == q.size {
		q.head = 0
		q.phase ^= phaseBit
	}
	return e, true
}
