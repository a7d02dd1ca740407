package nvmetest

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

type sq struct {
	qid  uint16
	ring *ring.SQConsumer
	tail *dbbuf.Poller
	cq   *cq
	dead bool // its doorbell was wrong
}

type cq struct {
	qid    uint16
	ring   *ring.CQProducer
	head   *dbbuf.Poller
	vector uint16
	ien    bool
	fresh  bool // something was posted since the last interrupt
}

// work is the device's goroutine: it executes what doorbells announce, and sleeps when it may.
func (d *Device) work() {
	defer close(d.stopped)
	for {
		for d.pass() {
		}
		var poll <-chan time.Time
		if d.cfg.Mapped {
			poll = time.After(20 * time.Microsecond)
		}
		select {
		case <-d.kick:
		case <-poll:
		case <-d.quit:
			return
		}
	}
}

// pass drains every queue, then arms them; true: there may be more.
func (d *Device) pass() (again bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.sqs {
		if !d.left(s) {
			d.drain(s)
		}
	}
	for _, c := range d.cqs {
		if c.fresh {
			d.interrupt(c)
		}
	}
	for _, s := range d.sqs {
		if s.dead || d.left(s) {
			continue
		}
		if s.cq.ring.Free() == 0 {
			again = again || !s.cq.head.Arm(s.cq.ring.Head())
			continue
		}
		again = again || !s.tail.Arm(s.ring.Head())
	}
	return again
}

// left says whether s is left to Step.
func (d *Device) left(s *sq) bool { return d.cfg.Manual && s.qid != 0 }

// Step executes what is in the I/O queues of a Manual device, which polls: the driver is told not to ring.
func (d *Device) Step() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.sqs {
		if d.left(s) {
			d.drain(s)
			s.cq.fresh = false
			s.tail.BehindNow(s.ring.Head())
			s.cq.head.BehindNow(s.cq.ring.Head())
		}
	}
}

// drain executes the commands of one queue, as long as each has room for its completion (R9).
func (d *Device) drain(s *sq) {
	for !s.dead {
		n, err := s.ring.Pending(s.tail.Load())
		if err != nil {
			s.dead = true
			return
		}
		if err := s.cq.ring.Consumed(s.cq.head.Load() &^ dbbuf.QuietBit); err != nil {
			s.dead = true
			return
		}
		if n = min(n, s.cq.ring.Free()); n == 0 {
			return
		}
		for range n {
			var cmd nvme.Command
			s.ring.Fetch(&cmd)
			d.dispatch(s, &cmd)
			if d.sqs[s.qid] != s {
				return // it has deleted itself
			}
		}
	}
}

func (d *Device) dispatch(s *sq, cmd *nvme.Command) {
	v := Verdict{}
	if d.cfg.Command != nil {
		v = d.cfg.Command(s.qid, cmd)
	}
	switch v.Action {
	case Fail:
		d.complete(s, cmd, v.Status, 0)
	case Drop:
	case Hold:
		d.held = append(d.held, held{s, *cmd})
	default:
		d.finish(s, cmd)
	}
}

// finish executes a command and posts its completion, unless it is one that waits.
func (d *Device) finish(s *sq, cmd *nvme.Command) {
	if s.qid == 0 && cmd.Opcode == nvme.AdminAsyncEventRequest {
		if len(d.aers) >= 4 {
			d.complete(s, cmd, nvme.StatusAERLimit, 0)
			return
		}
		d.aers = append(d.aers, cmd.CID)
		return
	}
	status, result := nvme.StatusSuccess, uint32(0)
	if s.qid == 0 {
		status, result = d.admin(cmd)
	} else {
		status = d.io(cmd)
	}
	d.complete(s, cmd, status, result)
}

func (d *Device) complete(s *sq, cmd *nvme.Command, status nvme.Status, result uint32) {
	d.post(s, ring.MakeEntry(uint64(result), s.ring.Head(), s.qid, cmd.CID, status))
}

func (d *Device) post(s *sq, e ring.Entry) {
	if d.cfg.Post != nil {
		d.cfg.Post(s.qid, &e)
	}
	if s.cq.ring.Free() == 0 {
		return // only after completions that no command asked for
	}
	s.cq.ring.Post([]ring.Entry{e})
	s.cq.fresh = true
}

// interrupt signals a CQ, unless its driver polls.
func (d *Device) interrupt(c *cq) {
	c.fresh = false
	if !c.ien || d.quiet && c.qid != 0 && c.head.Quiet() {
		return
	}
	if int(c.vector) < len(d.vectors) && d.vectors[c.vector] >= 0 {
		d.Interrupts.Add(1)
		one := [8]byte{1}
		_, _ = unix.Write(d.vectors[c.vector], one[:])
	}
}

// openAdmin makes queue 0 from AQA, ASQ and ACQ.
func (d *Device) openAdmin() bool {
	return d.openCQ(0, d.aqa.ACQS().Count(), d.acq, 0, true) && d.openSQ(0, 0, d.aqa.ASQS().Count(), d.asq)
}

// clearDoorbell makes a doorbell begin at 0 with its queue, whatever was written to it while there was none.
func (d *Device) clearDoorbell(off uint32) {
	i := (off - nvme.DoorbellBase) / 4
	if int(i) < len(d.mmio) {
		d.mmio[i].Store(0)
	}
	if d.page != nil {
		if w, err := d.page.Word32(uint64(i) * 4); err == nil {
			w.Store(0)
		}
	}
}

// poller returns the device's side of the doorbell of queue qid. Queue 0 is never in the shared pages (R16).
func (d *Device) poller(qid uint16, head bool, size uint32) *dbbuf.Poller {
	dstrd := d.cfg.CAP.DSTRD()
	if qid != 0 && d.shadow != nil {
		sqWord, cqWord, err := dbbuf.Slots(d.shadow, qid, dstrd)
		sqEI, cqEI, err2 := dbbuf.Slots(d.ei, qid, dstrd)
		if err == nil && err2 == nil {
			if head {
				return dbbuf.NewPoller(cqWord, cqEI, size)
			}
			return dbbuf.NewPoller(sqWord, sqEI, size)
		}
	}
	off := nvme.SQTailDoorbell(qid, dstrd)
	if head {
		off = nvme.CQHeadDoorbell(qid, dstrd)
	}
	i := (off - nvme.DoorbellBase) / 4
	if d.page != nil {
		if w, err := d.page.Word32(uint64(i) * 4); err == nil {
			return dbbuf.NewPoller(w, nil, size)
		}
	}
	if int(i) >= len(d.mmio) {
		i = uint32(len(d.mmio) - 1)
	}
	return dbbuf.NewPoller(&d.mmio[i], nil, size)
}

func (d *Device) openCQ(qid uint16, size uint32, iova uint64, vector uint16, ien bool) bool {
	mem, err := d.view(iova, uint64(size)*ring.CQESize)
	if err != nil {
		return false
	}
	r, err := ring.NewCQProducer(mem, size)
	if err != nil {
		return false
	}
	d.clearDoorbell(nvme.CQHeadDoorbell(qid, d.cfg.CAP.DSTRD()))
	d.cqs[qid] = &cq{qid: qid, ring: r, head: d.poller(qid, true, size), vector: vector, ien: ien}
	return true
}

func (d *Device) openSQ(qid, cqid uint16, size uint32, iova uint64) bool {
	mem, err := d.view(iova, uint64(size)*ring.SQESize)
	if err != nil {
		return false
	}
	r, err := ring.NewSQConsumer(mem, size)
	if err != nil || d.cqs[cqid] == nil {
		return false
	}
	d.clearDoorbell(nvme.SQTailDoorbell(qid, d.cfg.CAP.DSTRD()))
	d.sqs[qid] = &sq{qid: qid, ring: r, tail: d.poller(qid, false, size), cq: d.cqs[cqid]}
	return true
}
