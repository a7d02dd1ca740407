package guestdrv

import (
	"context"
	"errors"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/driver/admin"
	"github.com/shadowbell/shadowbell/shared/driver/dma"
	"github.com/shadowbell/shadowbell/shared/driver/lane"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// pageSize is CC.MPS: what PRPs are made of.
const pageSize = prp.PageSize

// noVector is the vector of a queue without an interrupt.
const noVector = -1

// ioQueue is one I/O queue pair and its memory: what QueuePair and the plain API's lanes have in common. It belongs to whoever
// owns its queue.
type ioQueue struct {
	c      *Controller
	q      *queue.Queue
	head   *dbbuf.Publisher
	qid    uint16
	vector int
	prio   Priority
	size   uint32 // entries of each ring
	rings  dma.Block

	// lists is memory for PRP lists by slot, taken when a slot first needs it; listSize bytes each.
	lists      []prp.ListPage
	listSize   uint64
	listBlocks []dma.Block
}

// newIOQueue creates queue pair qid for depth commands at least, or as many as the controller allows, with an interrupt unless
// vector is noVector. cfg says how the queue waits: its EventFD, Timeout and Quiet. epoch is that in which the controller was last seen live: a
// reset that has begun since may go over any of the commands.
func (c *Controller) newIOQueue(ctx context.Context, epoch uint64, qid uint16, depth uint32, vector int, prio Priority, cfg queue.Config) (*ioQueue, error) {
	size := min(max(depth+1, minEntries), queue.MaxSize, c.adm.Capabilities().MQES().Count())
	sqBytes, cqBytes := roundUp(uint64(size)*ring.SQESize), roundUp(uint64(size)*ring.CQESize)
	rings, err := c.pool.Take(sqBytes + cqBytes)
	if err != nil {
		return nil, fmt.Errorf("rings of queue %d: %w", qid, err)
	}
	q := &ioQueue{c: c, qid: qid, vector: vector, prio: prio, size: size, rings: rings, lists: make([]prp.ListPage, size-1), listSize: listSize(c.maxTransfer)}
	cfg.Generation = uint16(epoch)
	known, err := q.create(ctx, sqBytes, cqBytes, cfg)
	if err != nil {
		// A controller that was reset has forgotten the queue, whatever became of the commands.
		if known || errors.Is(err, ErrReset) || epoch != c.epoch() && c.adm.ForgetPair(ctx, qid) == nil {
			c.pool.Give(rings)
		}
		if epoch != c.epoch() {
			err = fmt.Errorf("%w: %w", errStale, err)
		}
		return nil, err
	}
	return q, nil
}

// create tells the controller. known is false if the controller may use the memory despite the error.
func (q *ioQueue) create(ctx context.Context, sqBytes, cqBytes uint64, cfg queue.Config) (known bool, err error) {
	c := q.c
	clear(c.pool.Bytes(q.rings))
	sq, cq, err := splitRings(c.pool, q.rings, sqBytes, cqBytes)
	if err != nil {
		return true, err
	}
	tail, head, err := c.adm.Publishers(q.qid)
	if err != nil {
		return true, err
	}
	q.head = head
	cfg.Events, cfg.Key = c.opts.Events, events.NewKey(c.number, q.qid)
	cfg.QID, cfg.Size, cfg.SQ, cfg.CQ, cfg.Tail, cfg.Head = q.qid, q.size, sq, cq, tail, head
	if q.q, err = queue.New(cfg); err != nil {
		return true, err
	}
	return c.adm.CreatePair(ctx, q.pair())
}

// pair is what the controller is told.
func (q *ioQueue) pair() admin.Pair {
	return admin.Pair{
		QID: q.qid, Size: q.size,
		SQIOVA: q.c.pool.IOVA(q.rings.Off), CQIOVA: q.c.pool.IOVA(q.rings.Off + roundUp(uint64(q.size)*ring.SQESize)),
		Vector: uint16(max(q.vector, 0)), Interrupts: q.vector != noVector, Priority: q.prio.qprio(),
	}
}

// again creates the queue of a paused lane once more after a reset.
func (q *ioQueue) again(ctx context.Context, l *lane.Lane) error {
	clear(q.c.pool.Bytes(q.rings))
	tail, head, err := q.c.adm.Publishers(q.qid)
	if err != nil {
		return err
	}
	if err := l.Renew(tail, head); err != nil {
		return err
	}
	_, err = q.c.adm.CreatePair(ctx, q.pair())
	return err
}

func splitRings(pool *dma.Pool, rings dma.Block, sqBytes, cqBytes uint64) (sq, cq *shm.Region, err error) {
	region, err := pool.Region(rings)
	if err != nil {
		return nil, nil, err
	}
	if sq, err = region.View(0, sqBytes); err != nil {
		return nil, nil, err
	}
	cq, err = region.View(sqBytes, cqBytes)
	return sq, cq, err
}

func roundUp(n uint64) uint64 { return (n + pageSize - 1) &^ (pageSize - 1) }

// listSize returns the bytes of PRP list that a transfer can need: a power of two, so that no list crosses a page. 0: none.
func listSize(maxTransfer uint32) uint64 {
	if maxTransfer <= pageSize {
		return 0
	}
	n := uint64(64)
	for n < prp.ListBytes(maxTransfer, pageSize) {
		n *= 2
	}
	return n
}

// point sets the data pointer of a command in a slot to length bytes at iova. It allocates nothing but, once for some slots together,
// the memory for their PRP lists.
func (q *ioQueue) point(slot uint16, cmd *nvme.Command, iova uint64, length uint32) error {
	if q.c.opts.SGL {
		cmd.SetSGL(nvme.MakeSGL(nvme.SGLDataBlock, iova, length))
		return nil
	}
	// Two pages are the most that need no list.
	if iova&(pageSize-1)+uint64(length) <= 2*pageSize {
		return prp.Build(cmd, iova, length, pageSize, prp.ListPage{})
	}
	if q.lists[slot].Mem == nil {
		if err := q.addLists(slot); err != nil {
			return err
		}
	}
	return prp.Build(cmd, iova, length, pageSize, q.lists[slot])
}

// addLists takes a page, or as many as one list needs, for the lists of slot and its neighbours.
func (q *ioQueue) addLists(slot uint16) error {
	size := max(q.listSize, pageSize)
	block, err := q.c.pool.Take(size)
	if err != nil {
		return fmt.Errorf("PRP lists of queue %d: %w", q.qid, err)
	}
	region, err := q.c.pool.Region(block)
	if err != nil {
		return err
	}
	q.listBlocks = append(q.listBlocks, block)
	n := int(size / q.listSize)
	first := int(slot) / n * n
	for i := range min(n, len(q.lists)-first) {
		off := uint64(i) * q.listSize
		mem, err := region.View(off, q.listSize)
		if err != nil {
			return err
		}
		q.lists[first+i] = prp.ListPage{Mem: mem, IOVA: q.c.pool.IOVA(block.Off + off)}
	}
	return nil
}

// addAllLists is for a queue whose commands must not fail because others have taken all memory.
func (q *ioQueue) addAllLists() error {
	if q.listSize == 0 || q.c.opts.SGL {
		return nil
	}
	for slot := range q.lists {
		if q.lists[slot].Mem == nil {
			if err := q.addLists(uint16(slot)); err != nil {
				return err
			}
		}
	}
	return nil
}

// give returns the memory of a queue that the controller does not know any more.
func (q *ioQueue) give() {
	for _, b := range q.listBlocks {
		q.c.pool.Give(b)
	}
	q.c.pool.Give(q.rings)
	q.listBlocks = nil
}
