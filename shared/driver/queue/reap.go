package queue

import (
	"fmt"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Completion is the end of one command.
type Completion struct {
	Tag     uint64 // as given to Take
	Started int64  // the Stamp before Take, ns
	Status  nvme.Status
	Result  uint32 // CQE dword 0
	Slot    uint16 // free again
	Opcode  uint8
}

// Reap takes completions that have been posted, at most len(out) of them, and returns how
// many. It does not wait and costs one load when there are none.
func (q *Queue) Reap(out []Completion) (int, error) {
	n := 0
	for n < len(out) {
		e, ok := q.cq.Next()
		if !ok {
			break
		}
		cid := e.CID()
		i := cid & q.slotMask
		if int(i) >= len(q.slots) || !q.slots[i].busy || q.slots[i].cid != cid {
			return n, q.Fail(fmt.Errorf("%w: queue %d completed command identifier %#x, which is not outstanding", ErrProtocol, q.qid, cid))
		}
		if e.SQID() != q.qid {
			return n, q.Fail(fmt.Errorf("%w: a completion in CQ %d names SQ %d", ErrProtocol, q.qid, e.SQID()))
		}
		if err := q.sq.Released(e.SQHead()); err != nil {
			return n, q.Fail(fmt.Errorf("%w: queue %d: %w", ErrProtocol, q.qid, err))
		}
		s, c := &q.slots[i], &out[n]
		c.Tag, c.Started, c.Status, c.Result, c.Slot, c.Opcode = s.tag, s.started, e.Status(), e.Result(), i, s.opcode
		q.release(i)
		n++
	}
	if n == 0 {
		return 0, q.lookIdle()
	}
	if q.trace != nil {
		q.traceReap(out[:n])
	}
	q.unpublished += uint32(n)
	q.idle = 0
	// With nothing left in flight no Publish may follow for long, and a device with a short
	// CQ must not be left waiting for room.
	if q.unpublished >= q.lazy && len(q.free) == len(q.slots) {
		return n, q.publishHead()
	}
	return n, nil
}

// lookIdle is what an empty Reap costs beyond its load: now and then a look at the clock, so
// that a caller who only polls meets his deadlines too.
func (q *Queue) lookIdle() error {
	if q.idle++; q.idle < 4096 {
		return nil
	}
	q.idle = 0
	return q.Check()
}

// Check reports the failure of the queue, and tells Late of commands past their deadline, or fails the queue if there is no Late.
func (q *Queue) Check() error {
	if p := q.failed.Load(); p != nil {
		return *p
	}
	q.Stamp()
	if q.timeout == 0 {
		return nil
	}
	for i := range q.slots {
		s := &q.slots[i]
		if !s.busy {
			continue
		}
		if q.slow != nil && q.clock-s.started > slowAfter && q.clock-q.told > slowAfter {
			q.told = q.clock
			q.slow()
		}
		if q.clock-s.started <= q.timeout {
			continue
		}
		if q.late == nil {
			return q.Fail(q.tooLate(s))
		}
		if q.clock-s.started > q.timeout+int64(s.late)*q.grace && q.late(Late{QID: q.qid, CID: s.cid, Err: q.tooLate(s)}, s.late > 0) {
			s.late = max(s.late, s.late+1)
		}
	}
	return nil
}

func (q *Queue) tooLate(s *slot) error {
	return fmt.Errorf("queue %d, command identifier %#x: %w after %.1f s", q.qid, s.cid, ErrTimeout, float64(q.clock-s.started)/1e9)
}
