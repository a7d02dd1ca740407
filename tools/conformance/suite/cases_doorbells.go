package suite

import (
	"math/rand/v2"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Doorbell registers with values that cannot be, and doorbells in shared memory. PCIe Transport 1.0c 3.1.2, NVMe Base 2.0c 5.8, B.5.

var doorbellCases = []Case{
	{
		ID: "doorbell.sq.beyond", Ref: "PCIe Transport 1.0c 3.1.2, shadowbell R30", needs: join(needQueues, needNS),
		Text: "an SQ tail outside its queue harms that queue only, which can be deleted and created again",
		run:  func(c *ctl) { c.harmsOne(func(q *sq) { c.ringSQ(1, q.size) }) },
	},
	{
		ID: "doorbell.sq.huge", Ref: "PCIe Transport 1.0c 3.1.2, shadowbell R30", needs: join(needQueues, needNS),
		Text: "an SQ tail of all ones harms that queue only",
		run:  func(c *ctl) { c.harmsOne(func(*sq) { c.ringSQ(1, 0xFFFF) }) },
	},
	{
		ID: "doorbell.cq.beyond", Ref: "PCIe Transport 1.0c 3.1.2, shadowbell R30", needs: join(needQueues, needNS),
		Text: "a CQ head outside its queue harms that queue only",
		run:  func(c *ctl) { c.harmsOne(func(q *sq) { c.ringCQ(1, q.cq.size) }) },
	},
	{
		ID: "doorbell.cq.ahead", Ref: "PCIe Transport 1.0c 3.1.2, shadowbell R30", needs: join(needQueues, needNS),
		Text: "a CQ head beyond what was completed harms that queue only",
		run:  func(c *ctl) { c.harmsOne(func(*sq) { c.ringCQ(1, 5) }) },
	},
	{
		ID: "doorbell.absent", Ref: "PCIe Transport 1.0c 3.1.2", needs: needNS,
		Text: "doorbells of queues that do not exist do nothing to those that do",
		run: func(c *ctl) {
			q := c.q()
			for qid := uint16(2); qid < 8; qid++ {
				c.ringSQ(qid, 3)
				c.ringCQ(qid, 3)
			}
			q.ok(c.tick())
			c.alive()
			if c.granted().sqs >= 2 {
				other := c.makePair(2, 8)
				c.never("a completion came before the first doorbell", other.cq.cons.Ready)
				other.ok(c.tick())
			}
		},
	},
	{
		ID: "doorbell.admin.beyond", Ref: "PCIe Transport 1.0c 3.1.2, shadowbell R30",
		Text: "an admin SQ tail outside the queue does no lasting harm: a reset mends it",
		run: func(c *ctl) {
			c.ringSQ(0, adminDepth+5)
			c.until(quietFor, func() bool { return false })
			c.disable()
			c.enable(setup{})
			c.alive()
		},
	},
	{
		ID: "doorbell.deleted", Ref: "PCIe Transport 1.0c 3.1.2", needs: needNS,
		Text: "the doorbells of a deleted queue do not count when the id is used again",
		run: func(c *ctl) {
			c.makePair(1, 8).ok(c.tick())
			c.ok(c.deleteSQ(1))
			c.ok(c.deleteCQ(1))
			c.ringSQ(1, 4)
			c.ringCQ(1, 4)
			q := c.makePair(1, 8)
			c.never("a completion came before the first doorbell", q.cq.cons.Ready)
			for range 9 {
				q.ok(c.tick())
			}
		},
	},
	{
		ID: "doorbell.shadow.unaligned", Ref: "NVMe Base 2.0c 5.8", needs: needShadow,
		Text: "Doorbell Buffer Config with a page that is not page aligned fails",
		run: func(c *ctl) {
			for _, off := range []uint64{4, 64, 2048} {
				p := c.newPages()
				a, b := p.command(nvme.AdminDoorbellBufferConfig), p.command(nvme.AdminDoorbellBufferConfig)
				a.PRP1 += off
				b.PRP2 += off
				c.refused(a, nvme.StatusInvalidField, nvme.StatusPRPOffsetInvalid)
				c.refused(b, nvme.StatusInvalidField, nvme.StatusPRPOffsetInvalid)
			}
			c.q().ok(nvme.Command{Opcode: nvme.IOFlush, NSID: c.facts.nsid})
		},
	},
	{
		ID: "doorbell.shadow.same-page", Ref: "NVMe Base 2.0c 5.8, shadowbell R24", needs: needShadow,
		Text: "one page for both shadow doorbells and event indices does the controller no lasting harm",
		run: func(c *ctl) {
			p := c.newPages()
			p.ei = p.shadow
			c.adm.exec(p.command(nvme.AdminDoorbellBufferConfig))
			c.alive()
			c.disable()
			c.enable(setup{})
			c.alive()
		},
	},
	{
		ID: "doorbell.shadow.io", Ref: "NVMe Base 2.0c 5.8, B.5", needs: join(needShadow, needNS),
		Text: "with shadow doorbells commands complete, though the registers are written only when the event index says so",
		run: func(c *ctl) {
			c.sharePages(nvme.AdminDoorbellBufferConfig)
			q := c.makePair(1, 32)
			for range 300 {
				for range 1 + rand.IntN(20) {
					q.push(c.tick())
				}
				q.ring()
				c.settled(q)
			}
			c.alive()
		},
	},
	{
		ID: "doorbell.shadow.no-lost-wake-up", Ref: "NVMe Base 2.0c B.5, shadowbell R1 R2 R3", needs: join(needShadow, needNS),
		Text: "a command that comes just when the controller stops polling is not lost",
		run: func(c *ctl) {
			c.sharePages(nvme.AdminDoorbellBufferConfig)
			q := c.makePair(1, 8)
			for range 500 {
				q.ok(c.tick())
				spinFor(time.Duration(rand.IntN(500)) * time.Microsecond)
			}
		},
	},
	{
		ID: "doorbell.shadow.cq-full", Ref: "NVMe Base 2.0c B.5, shadowbell R8", needs: join(needShadow, needNS),
		Text: "commands that wait for room in the CQ go on when the shadow head moves",
		run: func(c *ctl) {
			c.sharePages(nvme.AdminDoorbellBufferConfig)
			cq := c.makeCQ(1, 4)
			q := c.makeSQ(1, 32, cq)
			for range 100 {
				for range 20 {
					q.push(c.tick())
				}
				q.ring()
				for len(q.out) > 0 {
					n := len(q.out)
					c.wait(whole, "CQ 1 to go on after the shadow head moved", func() bool { cq.reap(); return len(q.out) < n })
					spinFor(time.Duration(rand.IntN(200)) * time.Microsecond)
				}
				c.settled(q)
			}
		},
	},
	{
		ID: "doorbell.shadow.stale-register", Ref: "NVMe Base 2.0c B.5, shadowbell R17", needs: join(needShadow, needNS),
		Text: "with shadow doorbells a register write says when to look, not where the tail is",
		run: func(c *ctl) {
			c.sharePages(nvme.AdminDoorbellBufferConfig)
			q := c.makePair(1, 16)
			for range 40 {
				q.ok(c.tick())
			}
			for v := range uint32(16) {
				c.ringSQ(1, v)
			}
			c.never("commands were run again", q.cq.cons.Ready)
			q.ok(c.tick())
		},
	},
	{
		ID: "doorbell.shadow.live", Ref: "NVMe Base 2.0c 5.8, shadowbell R23", needs: join(needShadow, needNS),
		Text: "a queue that is there already goes over to the shadow doorbells, with its work outstanding",
		run: func(c *ctl) {
			q := c.makePair(1, 64)
			for range 20 {
				for range 40 {
					q.push(c.tick())
				}
				q.ring()
				c.movePages(q)
				c.settled(q)
				q.ok(c.tick())
			}
		},
	},
	{
		ID: "doorbell.shadow.later-queue", Ref: "NVMe Base 2.0c 5.8", needs: join(needShadow, needNS, needQueues),
		Text: "queues that are created, deleted and created again after Doorbell Buffer Config use the pages",
		run: func(c *ctl) {
			c.sharePages(nvme.AdminDoorbellBufferConfig)
			for i := range 6 {
				qid := uint16(1 + i%2)
				q := c.makePair(qid, 8)
				for range 11 {
					q.ok(c.tick())
				}
				c.ok(c.deleteSQ(qid))
				c.ok(c.deleteCQ(qid))
			}
		},
	},
	{
		ID: "doorbell.shadow.admin", Ref: "NVMe Base 2.0c 5.8, shadowbell R16", needs: needShadow,
		Text: "the admin queue goes on by its registers",
		run: func(c *ctl) {
			c.sharePages(nvme.AdminDoorbellBufferConfig)
			for range 2 * adminDepth {
				c.alive()
			}
		},
	},
	{
		ID: "doorbell.shadow.reset", Ref: "NVMe Base 2.0c 5.8, 3.7.2, shadowbell R21", needs: join(needShadow, needNS),
		Text: "a reset ends the use of the pages: they are not written any more, nor looked at",
		run: func(c *ctl) {
			p := c.sharePages(nvme.AdminDoorbellBufferConfig)
			c.makePair(1, 8).ok(c.tick())
			c.disable()
			p.shadow.fill(guardByte)
			p.ei.fill(guardByte)
			c.enable(setup{})
			for range 20 {
				c.q().ok(c.tick())
			}
			c.never("a page of before the reset was written", func() bool {
				return !p.shadow.is(0, pageSize, guardByte) || !p.ei.is(0, pageSize, guardByte)
			})
		},
	},
	{
		ID: "doorbell.shadow.refused", Ref: "NVMe Base 2.0c 5.8, shadowbell R26", needs: join(needShadow, needNS),
		Text: "a Doorbell Buffer Config that fails leaves the pages in use as they were",
		run: func(c *ctl) {
			c.sharePages(nvme.AdminDoorbellBufferConfig)
			q := c.makePair(1, 8)
			bad := c.newPages().command(nvme.AdminDoorbellBufferConfig)
			bad.PRP2 += 8
			for range 10 {
				c.refused(bad, nvme.StatusInvalidField, nvme.StatusPRPOffsetInvalid)
				q.ok(c.tick())
			}
		},
	},
	{
		ID: "doorbell.vendor-2014", Ref: "shadowbell R16", needs: join(need2014, needNS),
		Text: "the vendor command of 2014 (C0h) works as Doorbell Buffer Config does",
		run: func(c *ctl) {
			c.sharePages(nvme.AdminDoorbellMemory2014)
			q := c.makePair(1, 8)
			for range 200 {
				q.ok(c.tick())
			}
		},
	},
	{
		ID: "doorbell.vendor-2014.refused", Ref: "shadowbell R24", needs: need2014,
		Text: "the vendor command of 2014 refuses pages that are not aligned, with its own status 1/C0h",
		run: func(c *ctl) {
			bad := c.newPages().command(nvme.AdminDoorbellMemory2014)
			bad.PRP1 += 8
			c.refused(bad, nvme.StatusDoorbellMemoryInvalid)
		},
	},
}

var (
	needShadow = oacs(nvme.OACSDoorbellBuf, "Doorbell Buffer Config")
	need2014   = join(needShadow, bitNeed("the controller is not one with the command of 2014", func(f *facts) bool {
		_, ours := f.id.Shadowbell()
		return ours || f.id.VID == nvme.PCIVendorGoogle
	}))
)

// harmsOne spoils queue pair 1, looks whether the rest works, and makes the pair anew.
func (c *ctl) harmsOne(spoil func(q *sq)) {
	other := c.makePair(2, 8)
	q := c.q()
	q.ok(c.tick())
	spoil(q)
	c.alive()
	for range 10 {
		other.ok(c.tick())
	}
	c.ok(c.deleteSQ(1))
	c.ok(c.deleteCQ(1))
	c.makePair(1, 8).ok(c.tick())
	other.ok(c.tick())
	c.alive()
}

// movePages configures new pages while q is in use, and goes over to them.
func (c *ctl) movePages(q *sq) {
	p := c.newPages()
	tail, head := q.tail.Published(), q.cq.head.Published()
	tailWord, tailEI := p.slot(q.qid, false)
	headWord, headEI := p.slot(q.cq.qid, true)
	tailWord.Store(tail)
	headWord.Store(head)
	c.ok(p.command(nvme.AdminDoorbellBufferConfig))
	c.pages = p
	q.tail = dbbuf.NewShadow(tailWord, tailEI, func(v uint32) error { c.ringSQ(q.qid, v); return nil })
	q.cq.head = dbbuf.NewShadow(headWord, headEI, func(v uint32) error { c.ringCQ(q.cq.qid, v); return nil })
	c.must(q.tail.Resume(tail))
	c.must(q.cq.head.Resume(head))
}

// spinFor waits without sleeping: a sleep is far longer than what is to be met.
func spinFor(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
	}
}
