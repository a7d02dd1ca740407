package ctrl

import (
	"errors"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// Create and Delete I/O Submission and Completion Queue, and Abort. NVMe Base 2.0c 5.1, 5.4 to 5.7.

// queueTable is which I/O queues there are; index 0 is never used.
type queueTable struct {
	cq []cqState
	sq []sqState
}

type cqState struct {
	exists bool
	sqs    int // SQs that complete to it
}

type sqState struct {
	exists   bool
	deleting bool // when commands of it have ended
	cqid     uint16
}

func newQueueTable(maxQueues uint16) queueTable {
	return queueTable{cq: make([]cqState, maxQueues+1), sq: make([]sqState, maxQueues+1)}
}

// any reports whether there is any I/O queue; an SQ is never without its CQ.
func (t *queueTable) any() bool {
	for _, q := range t.cq {
		if q.exists {
			return true
		}
	}
	return false
}

func (t *queueTable) hasCQ(qid uint16) bool { return int(qid) < len(t.cq) && t.cq[qid].exists }
func (t *queueTable) hasSQ(qid uint16) bool { return int(qid) < len(t.sq) && t.sq[qid].exists }

// checkNewQueue checks what both kinds of queue have in common. granted is how many of the kind the host may have.
func (c *Controller) checkNewQueue(cmd *nvme.Command, exists bool, granted nvme.ZeroBased16) (result, bool) {
	qid, size := cmd.QID(), cmd.QSize()
	switch {
	case qid == 0 || uint32(qid) > granted.Count():
		return fail(nvme.StatusInvalidQueueID, dword(10, 0), "queue id is 0 or more than was granted"), false
	case exists:
		return fail(nvme.StatusInvalidQueueID, dword(10, 0), "queue exists"), false
	case size == 0 || size > c.regs.cap.MQES():
		return fail(nvme.StatusInvalidQueueSize, dword(10, 16), "queue size is 1 or more than CAP.MQES"), false
	case c.regs.cc.IOSQES() != 6 || c.regs.cc.IOCQES() != 4:
		return fail(nvme.StatusInvalidQueueSize, nowhere, "CC.IOSQES is not 6 (64 bytes) or CC.IOCQES not 4 (16 bytes)"), false
	case !cmd.QContiguous():
		return fail(nvme.StatusInvalidField, dword(11, 0), "PC is 0 and CAP.CQR is 1"), false
	case cmd.PRP1%uint64(c.pageSize) != 0:
		return fail(nvme.StatusPRPOffsetInvalid, inPRP1, "queue is not page aligned"), false
	}
	return result{}, true
}

func (c *Controller) createCQ(cmd *nvme.Command) result {
	qid := cmd.QID()
	if r, ok := c.checkNewQueue(cmd, c.queues.hasCQ(qid), c.queueCounts().CQs()); !ok {
		return r
	}
	if cmd.CQVector() >= c.cfg.Vectors {
		return fail(nvme.StatusInvalidVector, dword(11, 16), "no such interrupt vector")
	}
	size := cmd.QSize().Count()
	mem, err := c.mem.View(cmd.PRP1, uint64(size)*ring.CQESize)
	if err != nil {
		return failErr(nvme.StatusInvalidField, inPRP1, "queue memory", err)
	}
	if err := c.dp.CreateCQ(CQParams{QID: qid, Size: size, IOVA: cmd.PRP1, Mem: mem, Vector: cmd.CQVector(), IEN: cmd.CQInterrupts()}); err != nil {
		return failErr(nvme.StatusInternalError, nowhere, "creating the CQ", errors.Join(err, mem.Close()))
	}
	c.queues.cq[qid] = cqState{exists: true}
	return result{}
}

func (c *Controller) createSQ(cmd *nvme.Command) result {
	qid, cqid := cmd.QID(), cmd.SQCQID()
	if r, ok := c.checkNewQueue(cmd, c.queues.hasSQ(qid), c.queueCounts().SQs()); !ok {
		return r
	}
	switch {
	case cqid == 0 || uint32(cqid) > c.queueCounts().CQs().Count():
		return fail(nvme.StatusInvalidQueueID, dword(11, 16), "CQ id is 0 or more than was granted")
	case !c.queues.hasCQ(cqid):
		return fail(nvme.StatusInvalidCQ, dword(11, 16), "no such CQ")
	}
	size := cmd.QSize().Count()
	mem, err := c.mem.View(cmd.PRP1, uint64(size)*ring.SQESize)
	if err != nil {
		return failErr(nvme.StatusInvalidField, inPRP1, "queue memory", err)
	}
	if err := c.dp.CreateSQ(SQParams{QID: qid, CQID: cqid, Size: size, IOVA: cmd.PRP1, Mem: mem, Prio: cmd.SQPriority()}); err != nil {
		return failErr(nvme.StatusInternalError, nowhere, "creating the SQ", errors.Join(err, mem.Close()))
	}
	c.queues.sq[qid] = sqState{exists: true, cqid: cqid}
	c.queues.cq[cqid].sqs++
	return result{}
}

func (c *Controller) deleteSQ(cmd *nvme.Command) result {
	qid := cmd.QID()
	if !c.queues.hasSQ(qid) {
		return fail(nvme.StatusInvalidQueueID, dword(10, 0), "no such SQ")
	}
	if c.queues.sq[qid].deleting {
		return fail(nvme.StatusInvalidQueueID, dword(10, 0), "the SQ is being deleted")
	}
	later := c.dp.DeleteSQ(qid)
	if later == nil {
		c.queues.drop(qid)
		return result{}
	}
	// Commands that a medium does not end must not keep the session from its messages.
	c.queues.sq[qid].deleting = true
	epoch := c.async.epoch
	return c.background(cmd, func() error { later(); return nil }, func(error) result {
		if epoch == c.async.epoch { // otherwise all queues went
			c.dp.DeleteSQ(qid)
			c.queues.drop(qid)
		}
		return result{}
	})
}

// drop forgets SQ qid.
func (t *queueTable) drop(qid uint16) {
	t.cq[t.sq[qid].cqid].sqs--
	t.sq[qid] = sqState{}
}

func (c *Controller) deleteCQ(cmd *nvme.Command) result {
	qid := cmd.QID()
	switch {
	case !c.queues.hasCQ(qid):
		return fail(nvme.StatusInvalidQueueID, dword(10, 0), "no such CQ")
	case c.queues.cq[qid].sqs > 0:
		return fail(nvme.StatusInvalidQueueDeletion, dword(10, 0), "the CQ has SQs")
	}
	c.dp.DeleteCQ(qid)
	c.queues.cq[qid] = cqState{}
	return result{}
}

// abortLimit is how many Aborts may be outstanding (ACL + 1). They never are: each is
// complete before the next command is fetched, so Abort Command Limit Exceeded does not occur.
const abortLimit = 4

// abort ends a command if it can: one that waits in the data path, or an Asynchronous Event
// Request. DW0 bit 0 says that it could not.
func (c *Controller) abort(cmd *nvme.Command) result {
	const notAborted = 1
	sqid, cid := cmd.AbortSQID(), cmd.AbortCID()
	var done bool
	switch {
	case sqid == 0:
		done = c.abortEventRequest(cid)
	case c.queues.hasSQ(sqid):
		done = c.dp.Abort(sqid, cid)
	default:
		return fail(nvme.StatusInvalidField, dword(10, 0), "no such SQ")
	}
	if !done {
		return result{dw0: notAborted}
	}
	return result{}
}
