package suite

import (
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Creation and deletion of I/O queues, and how rings behave. NVMe Base 2.0c 3.3, 5.4 to 5.7.

var queueCases = []Case{
	{
		ID: "queue.cq.id", Ref: "NVMe Base 2.0c 5.4.1",
		Text: "Create I/O CQ with id 0, an id beyond what was granted or one in use is Invalid Queue Identifier",
		run: func(c *ctl) {
			c.q()
			for _, qid := range []uint32{0, 1, c.granted().cqs + 1, 0xFFFF} {
				if qid <= 0xFFFF {
					c.refusedCQ(func(cmd *nvme.Command) { setQID(cmd, qid) }, nvme.StatusInvalidQueueID)
				}
			}
		},
	},
	{
		ID: "queue.cq.size-0", Ref: "NVMe Base 2.0c 5.4.1",
		Text: "Create I/O CQ of one entry is Invalid Queue Size",
		run: func(c *ctl) {
			c.refusedCQ(func(cmd *nvme.Command) { setQSize(cmd, 0) }, nvme.StatusInvalidQueueSize)
		},
	},
	{
		ID: "queue.cq.size-beyond-mqes", Ref: "NVMe Base 2.0c 5.4.1", needs: needMQES,
		Text: "Create I/O CQ of more entries than CAP.MQES is Invalid Queue Size",
		run: func(c *ctl) {
			c.refusedCQ(func(cmd *nvme.Command) { setQSize(cmd, uint32(c.facts.cap.MQES())+1) }, nvme.StatusInvalidQueueSize)
			c.refusedCQ(func(cmd *nvme.Command) { setQSize(cmd, 0xFFFF) }, nvme.StatusInvalidQueueSize)
		},
	},
	{
		ID: "queue.cq.not-contiguous", Ref: "NVMe Base 2.0c 5.4.1", needs: needCQR,
		Text: "with CAP.CQR, Create I/O CQ with PC=0 is Invalid Field in Command",
		run: func(c *ctl) {
			c.refusedCQ(func(cmd *nvme.Command) { cmd.CDW11 &^= 1 }, nvme.StatusInvalidField)
		},
	},
	{
		ID: "queue.cq.unaligned", Ref: "NVMe Base 2.0c 5.4.1",
		Text: "Create I/O CQ whose PRP1 is not page aligned is PRP Offset Invalid",
		run: func(c *ctl) {
			c.refusedCQ(func(cmd *nvme.Command) { cmd.PRP1 += 64 }, nvme.StatusPRPOffsetInvalid, nvme.StatusInvalidField)
		},
	},
	{
		ID: "queue.cq.vector", Ref: "NVMe Base 2.0c 5.4.1",
		Text: "Create I/O CQ with an interrupt vector that does not exist is Invalid Interrupt Vector",
		run: func(c *ctl) {
			c.refusedCQ(func(cmd *nvme.Command) { cmd.CDW11 |= 0xFFFF<<16 | 2 }, nvme.StatusInvalidVector)
		},
	},
	{
		ID: "queue.sq.id", Ref: "NVMe Base 2.0c 5.5.1",
		Text: "Create I/O SQ with id 0, an id beyond what was granted or one in use is Invalid Queue Identifier",
		run: func(c *ctl) {
			c.q()
			for _, qid := range []uint32{0, 1, c.granted().sqs + 1, 0xFFFF} {
				if qid <= 0xFFFF {
					c.refusedSQ(func(cmd *nvme.Command) { setQID(cmd, qid) }, nvme.StatusInvalidQueueID)
				}
			}
		},
	},
	{
		ID: "queue.sq.size-0", Ref: "NVMe Base 2.0c 5.5.1",
		Text: "Create I/O SQ of one entry is Invalid Queue Size",
		run: func(c *ctl) {
			c.refusedSQ(func(cmd *nvme.Command) { setQSize(cmd, 0) }, nvme.StatusInvalidQueueSize)
		},
	},
	{
		ID: "queue.sq.size-beyond-mqes", Ref: "NVMe Base 2.0c 5.5.1", needs: needMQES,
		Text: "Create I/O SQ of more entries than CAP.MQES is Invalid Queue Size",
		run: func(c *ctl) {
			c.refusedSQ(func(cmd *nvme.Command) { setQSize(cmd, uint32(c.facts.cap.MQES())+1) }, nvme.StatusInvalidQueueSize)
		},
	},
	{
		ID: "queue.sq.not-contiguous", Ref: "NVMe Base 2.0c 5.5.1", needs: needCQR,
		Text: "with CAP.CQR, Create I/O SQ with PC=0 is Invalid Field in Command",
		run: func(c *ctl) {
			c.refusedSQ(func(cmd *nvme.Command) { cmd.CDW11 &^= 1 }, nvme.StatusInvalidField)
		},
	},
	{
		ID: "queue.sq.unaligned", Ref: "NVMe Base 2.0c 5.5.1",
		Text: "Create I/O SQ whose PRP1 is not page aligned is PRP Offset Invalid",
		run: func(c *ctl) {
			c.refusedSQ(func(cmd *nvme.Command) { cmd.PRP1 += 64 }, nvme.StatusPRPOffsetInvalid, nvme.StatusInvalidField)
		},
	},
	{
		ID: "queue.sq.cq-0", Ref: "NVMe Base 2.0c 5.5.1",
		Text: "an I/O SQ cannot complete to the admin CQ: Invalid Queue Identifier or Completion Queue Invalid",
		run: func(c *ctl) {
			c.refusedSQ(func(cmd *nvme.Command) { cmd.CDW11 &= 0xFFFF }, nvme.StatusInvalidQueueID, nvme.StatusInvalidCQ)
		},
	},
	{
		ID: "queue.sq.cq-absent", Ref: "NVMe Base 2.0c 5.5.1", needs: needQueues,
		Text: "Create I/O SQ on a CQ that was not created is Completion Queue Invalid",
		run: func(c *ctl) {
			c.refusedSQ(func(cmd *nvme.Command) { cmd.CDW11 = cmd.CDW11&0xFFFF | 2<<16 }, nvme.StatusInvalidCQ)
		},
	},
	{
		ID: "queue.sq.cq-beyond", Ref: "NVMe Base 2.0c 5.5.1",
		Text: "Create I/O SQ on a CQ id beyond what was granted is Invalid Queue Identifier or Completion Queue Invalid",
		run: func(c *ctl) {
			c.refusedSQ(func(cmd *nvme.Command) { cmd.CDW11 |= 0xFFFF << 16 }, nvme.StatusInvalidQueueID, nvme.StatusInvalidCQ)
		},
	},
	{
		ID: "queue.unmapped", Ref: "NVMe Base 2.0c 5.4.1, 5.5.1", needs: join(needIOVA, needNS),
		Text: "queues in memory that the controller cannot reach are refused, or fail alone",
		run: func(c *ctl) {
			c.granted()
			cmd := c.newCQ(1, 8).createCQ(0, false)
			cmd.PRP1 = nowhere
			if cpl := c.adm.exec(cmd); cpl.Status().OK() {
				c.ok(c.deleteCQ(1))
			}
			s := c.newSQ(1, 8, c.makeCQ(1, 8))
			cmd = s.createSQ()
			cmd.PRP1 = nowhere
			if cpl := c.adm.exec(cmd); cpl.Status().OK() {
				c.ringSQ(1, 1)
				c.ok(c.deleteSQ(1))
			}
			c.alive()
			c.ok(c.deleteCQ(1))
			c.makePair(1, 8).ok(c.tick())
		},
	},
	{
		ID: "queue.delete.absent", Ref: "NVMe Base 2.0c 5.6, 5.7",
		Text: "to delete a queue that is not there, or queue 0, is Invalid Queue Identifier",
		run: func(c *ctl) {
			c.granted()
			for _, qid := range []uint16{0, 1, 0xFFFE} {
				c.refused(c.deleteSQ(qid), nvme.StatusInvalidQueueID)
				c.refused(c.deleteCQ(qid), nvme.StatusInvalidQueueID)
			}
			c.alive()
		},
	},
	{
		ID: "queue.delete.order", Ref: "NVMe Base 2.0c 5.6",
		Text: "a CQ that has SQs cannot be deleted: Invalid Queue Deletion",
		run: func(c *ctl) {
			c.q()
			c.refused(c.deleteCQ(1), nvme.StatusInvalidQueueDeletion)
			c.ok(c.deleteSQ(1))
			c.ok(c.deleteCQ(1))
		},
	},
	{
		ID: "queue.delete.busy", Ref: "NVMe Base 2.0c 5.7", needs: needNS,
		Text: "after Delete I/O SQ has completed, no completion of that queue is posted",
		run: func(c *ctl) {
			q := c.q()
			for range 60 {
				q.push(c.tick())
			}
			q.ring()
			c.ok(c.deleteSQ(1))
			q.cq.reap()
			c.never("a completion came after the queue was deleted", q.cq.cons.Ready)
			for cid, cpl := range q.done {
				st := cpl.Status().Code()
				c.check(st == nvme.StatusSuccess || st == nvme.StatusAbortSQDeleted, "CID %#x: status %s", cid, status(st))
			}
		},
	},
	{
		ID: "queue.reuse", Ref: "NVMe Base 2.0c 3.3.1, 5.4, 5.5", needs: needNS,
		Text: "a queue id that is used again begins empty, with phase 1",
		run: func(c *ctl) {
			for range 5 {
				q := c.makePair(1, 8)
				c.never("a completion came before the first doorbell", q.cq.cons.Ready)
				for range 11 {
					q.ok(c.tick())
				}
				c.ok(c.deleteSQ(1))
				c.ok(c.deleteCQ(1))
			}
		},
	},
	{
		ID: "queue.ids-differ", Ref: "NVMe Base 2.0c 3.3.1", needs: join(needQueues, needNS),
		Text: "an SQ's id need not be that of its CQ",
		run: func(c *ctl) {
			a, b := c.makeCQ(2, 8), c.makeCQ(1, 8)
			s1, s2 := c.makeSQ(1, 8, a), c.makeSQ(2, 8, b)
			for range 9 {
				s1.ok(c.tick())
				s2.ok(c.tick())
			}
		},
	},
	{
		ID: "queue.shared-cq", Ref: "NVMe Base 2.0c 3.3.1, 3.3.3.2", needs: join(needQueues, needNS),
		Text: "several SQs on one CQ: every command completes once, to its own SQ id",
		run: func(c *ctl) {
			cq := c.makeCQ(1, 8) // smaller than what is outstanding
			var sqs []*sq
			for qid := range min(c.granted().sqs, 4) {
				sqs = append(sqs, c.makeSQ(uint16(qid+1), 32, cq))
			}
			for range 10 {
				for _, s := range sqs {
					for range 3 {
						s.push(c.tick())
					}
					s.ring()
				}
				for _, s := range sqs {
					c.settled(s)
				}
			}
		},
	},
	{
		ID: "queue.many", Ref: "NVMe Base 2.0c 5.27.1.5", needs: needNS,
		Text: "as many queue pairs as were granted can be created, used and deleted in any order",
		run: func(c *ctl) {
			var all []*sq
			n := min(c.granted().sqs, c.granted().cqs, wantQueues)
			for qid := n; qid >= 1; qid-- {
				all = append(all, c.makePair(uint16(qid), 4))
			}
			for _, s := range all {
				s.submit(c.tick())
			}
			for _, s := range all {
				c.settled(s)
			}
			for i := range all {
				c.ok(c.deleteSQ(all[(i+2)%len(all)].qid))
			}
			for _, s := range all {
				c.ok(c.deleteCQ(s.qid))
			}
			c.makePair(1, 4).ok(c.tick())
		},
	},
	{
		ID: "queue.priority", Ref: "NVMe Base 2.0c 5.5.1, 3.4.4", needs: needNS,
		Text: "QPRIO means nothing under round robin arbitration: all four values work",
		run: func(c *ctl) {
			c.granted()
			q := c.makeCQ(1, 8)
			for prio := range uint32(4) {
				s := c.newSQ(1, 8, q)
				cmd := s.createSQ()
				cmd.CDW11 |= prio << 1
				c.ok(cmd)
				s.ok(c.tick())
				c.ok(c.deleteSQ(1))
			}
		},
	},
	{
		ID: "queue.priority.weighted", Ref: "NVMe Base 2.0c 3.4.4, 5.27.1.1", setup: setup{disabled: true},
		needs: join(needNS, bitNeed("CAP.AMS has no weighted round robin", func(f *facts) bool { return f.cap.AMS()&nvme.CAPAMSWeighted != 0 })),
		Text:  "with weighted round robin SQs of all classes are served in the end, and the weights can be changed meanwhile",
		run: func(c *ctl) {
			c.enable(setup{ams: nvme.AMSWeighted})
			cq := c.makeCQ(1, 16)
			var sqs []*sq
			for qid := range min(c.granted().sqs, 4) {
				s := c.newSQ(uint16(qid+1), 32, cq)
				cmd := s.createSQ()
				cmd.CDW11 = cmd.CDW11&^6 | qid%4<<1
				c.ok(cmd)
				sqs = append(sqs, s)
			}
			for round := range uint32(8) {
				c.ok(setFeatureCmd(nvme.FeatureArbitration, 0, round|round<<8|(7-round)<<16|0xff<<24))
				for _, s := range sqs {
					for range 20 {
						s.push(c.tick())
					}
					s.ring()
				}
				for _, s := range sqs {
					c.settled(s)
				}
			}
		},
	},
	{
		ID: "queue.size.smallest", Ref: "NVMe Base 2.0c 3.3.1", needs: needNS,
		Text: "queues of two entries hold one command at a time, and wrap at each second",
		run:  func(c *ctl) { c.laps(2, 2, 41) },
	},
	{
		ID: "queue.size.odd", Ref: "NVMe Base 2.0c 3.3.1", needs: needNS,
		Text: "queues whose size is no power of two wrap where they should",
		run:  func(c *ctl) { c.laps(3, 7, 200) },
	},
	{
		ID: "queue.size.uneven", Ref: "NVMe Base 2.0c 3.3.1.2.1", needs: needNS,
		Text: "a CQ that is smaller than its SQ, and one that is larger, lose nothing",
		run: func(c *ctl) {
			c.laps(33, 4, 300)
			c.laps(4, 33, 300)
		},
	},
	{
		ID: "queue.size.largest", Ref: "NVMe Base 2.0c 3.1.3.1", needs: needNS,
		Text: "queues of CAP.MQES entries work, filled to the last",
		run: func(c *ctl) {
			n := min(c.facts.cap.MQES().Count(), chunkSize/64)
			q := c.makePair(1, n)
			for range n - 1 {
				q.push(c.tick())
			}
			q.ring()
			c.settled(q)
			for range 3 { // over the end
				q.ok(c.tick())
			}
		},
	},
	{
		ID: "queue.cq.full", Ref: "NVMe Base 2.0c 3.3.1.2.1", needs: needNS,
		Text: "a full CQ is not written over, and what waits for room comes when the head moves",
		run: func(c *ctl) {
			cq := c.makeCQ(1, 4)
			q := c.makeSQ(1, 32, cq)
			cq.hold = true
			for range 20 {
				q.push(c.tick())
			}
			q.ring()
			c.wait(whole, "CQ 1 to be full", func() bool { cq.reap(); return cq.got >= 3 })
			c.never("a fourth completion came into a CQ of 4 entries whose head had not moved", func() bool { cq.reap(); return cq.got > 3 })
			cq.hold = false
			c.must(cq.head.Publish(cq.cons.Head()))
			c.settled(q)
		},
	},
	{
		ID: "queue.cq.head-late", Ref: "NVMe Base 2.0c 3.3.1.2.1", needs: needNS,
		Text: "a CQ head that moves by one entry at a time lets one completion come each time",
		run: func(c *ctl) {
			cq := c.makeCQ(1, 3)
			q := c.makeSQ(1, 32, cq)
			cq.hold = true
			for range 20 {
				q.push(c.tick())
			}
			q.ring()
			for n := 2; n < 20; n++ {
				c.wait(whole, "CQ 1 to be full", func() bool { cq.reap(); return cq.got >= n })
				c.must(cq.head.Publish((cq.head.Published() + 1) % cq.size))
			}
			cq.hold = false
			c.settled(q)
		},
	},
	{
		ID: "queue.phase", Ref: "NVMe Base 2.0c 3.3.3.2.2", needs: needNS,
		Text: "the phase tag of an entry is 1 in the first lap and inverts with each",
		run: func(c *ctl) {
			q := c.makePair(1, 5)
			for i := range 23 {
				q.ok(c.tick())
				phase := q.cq.mem.read(uint64(i%5)*16+14, 1)[0] & 1
				c.check(phase == byte(1-i/5%2), "entry %d in lap %d has phase %d", i%5, i/5+1, phase)
			}
		},
	},
	{
		ID: "queue.sqhd", Ref: "NVMe Base 2.0c 3.3.3.2", needs: needNS,
		Text: "SQHD says how far the SQ was fetched: the last completion says the tail",
		run: func(c *ctl) {
			q := c.makePair(1, 16)
			tail := uint16(0)
			for n := range uint16(12) {
				var last uint16
				for range n + 1 {
					last = q.push(c.tick())
				}
				q.ring()
				tail = (tail + n + 1) % 16
				c.wait(whole, "SQ 1", func() bool { q.cq.reap(); return len(q.out) == 0 })
				heads := map[uint16]bool{}
				for _, cpl := range q.done {
					heads[cpl.SQHead] = true
				}
				c.check(heads[tail], "no completion of the %d up to CID %#x says SQHD=%d", n+1, last, tail)
				clear(q.done)
			}
		},
	},
	{
		ID: "queue.cid", Ref: "NVMe Base 2.0c 3.3.3.1", needs: needNS,
		Text: "a completion has the identifier of its command, whatever it is",
		run: func(c *ctl) {
			q := c.q()
			for _, cid := range []uint16{0, 1, 0x7FFF, 0x8000, 0xFFFE, 0x1234} {
				q.next = cid
				q.ok(c.tick())
			}
		},
	},
	{
		ID: "queue.one-doorbell", Ref: "NVMe Base 2.0c 3.3.1.2.1", needs: needNS,
		Text: "one doorbell for many commands, over the end of the ring, starts them all",
		run: func(c *ctl) {
			q := c.makePair(1, 32)
			for range 7 {
				for range 31 {
					q.push(c.tick())
				}
				q.ring()
				c.settled(q)
			}
		},
	},
	{
		ID: "queue.same-doorbell", Ref: "NVMe Base 2.0c 3.3.1.2.1", needs: needNS,
		Text: "a doorbell that is written with the value it has starts nothing",
		run: func(c *ctl) {
			q := c.q()
			q.ok(c.tick())
			c.ringSQ(1, q.prod.Tail())
			c.ringCQ(1, q.cq.cons.Head())
			c.never("a completion came that nobody asked for", q.cq.cons.Ready)
			q.ok(c.tick())
		},
	},
}

func setQID(cmd *nvme.Command, qid uint32)     { cmd.CDW10 = cmd.CDW10&^0xFFFF | qid }
func setQSize(cmd *nvme.Command, sizeZ uint32) { cmd.CDW10 = cmd.CDW10&0xFFFF | sizeZ<<16 }

// refusedCQ checks that Create I/O CQ fails for what edit does to a good command.
func (c *ctl) refusedCQ(edit func(*nvme.Command), statuses ...nvme.Status) {
	c.granted()
	cmd := c.newCQ(1, 8).createCQ(0, false)
	edit(&cmd)
	c.refused(cmd, statuses...)
}

// refusedSQ is the same for Create I/O SQ, on CQ 1.
func (c *ctl) refusedSQ(edit func(*nvme.Command), statuses ...nvme.Status) {
	if c.io == nil {
		c.io = &sq{cq: c.makeCQ(1, 8)}
	}
	s := c.newSQ(1, 8, &cq{c: c, qid: 1, sqs: map[uint16]*sq{}})
	cmd := s.createSQ()
	edit(&cmd)
	c.refused(cmd, statuses...)
}

// tick returns a cheap I/O command: it reads one block, which nobody looks at.
func (c *ctl) tick() nvme.Command {
	if c.scratch == nil {
		c.scratch = c.data(c.facts.lba)
	}
	return c.read(0, 1, c.scratch)
}

// settled waits until everything that was submitted to s has completed, successfully, and forgets it.
func (c *ctl) settled(s *sq) {
	c.wait(whole, s.String()+" to complete all its commands", func() bool { s.cq.reap(); return len(s.out) == 0 })
	for cid, cpl := range s.done {
		c.check(cpl.Status().OK(), "CID %#x of %v: status %s", cid, s, status(cpl.Status().Code()))
	}
	clear(s.done)
}

// laps runs commands through queue pair 1 of the given sizes, as many at a time as the SQ holds.
func (c *ctl) laps(sqSize, cqSize uint32, commands int) {
	q := c.makeSQ(1, sqSize, c.makeCQ(1, cqSize))
	for range commands {
		q.push(c.tick()) // waits while the SQ is full
		if q.prod.Free() == 0 {
			q.ring()
		}
	}
	q.ring()
	c.settled(q)
	c.check(q.cq.got == commands, "%d completions of %d commands", q.cq.got, commands)
	c.ok(c.deleteSQ(1))
	c.ok(c.deleteCQ(1))
}
