package suite

import (
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Interrupts by MSI-X. NVMe Base 2.0c 5.4.1, 5.27.1.6, 5.27.1.7, PCIe Transport 1.0c 3.5.

var interruptCases = []Case{
	{
		ID: "interrupt.admin", Ref: "PCIe Transport 1.0c 3.5", needs: needIRQ,
		Text: "the admin CQ interrupts by vector 0",
		run: func(c *ctl) {
			for range 5 {
				c.drainInterrupts()
				c.alive()
				c.wantInterrupt(0)
				c.noInterrupt(1)
			}
		},
	},
	{
		ID: "interrupt.vector", Ref: "NVMe Base 2.0c 5.4.1", needs: join(needIRQ3, needNS, needQueues),
		Text: "each CQ interrupts by its own vector and no other",
		run: func(c *ctl) {
			a := c.makeSQ(1, 8, c.makeCQVector(1, 8, 2, true))
			b := c.makeSQ(2, 8, c.makeCQVector(2, 8, 1, true))
			for range 5 {
				c.drainInterrupts()
				a.ok(c.tick())
				c.wantInterrupt(2)
				c.noInterrupt(1)
				b.ok(c.tick())
				c.wantInterrupt(1)
				c.noInterrupt(2)
			}
		},
	},
	{
		ID: "interrupt.off", Ref: "NVMe Base 2.0c 5.4.1", needs: join(needIRQ, needNS),
		Text: "a CQ with IEN=0 does not interrupt",
		run: func(c *ctl) {
			q := c.makeSQ(1, 8, c.makeCQVector(1, 8, 1, false))
			for range 5 {
				q.ok(c.tick())
			}
			c.noInterrupt(1)
		},
	},
	{
		ID: "interrupt.shared", Ref: "NVMe Base 2.0c 5.4.1, PCIe Transport 1.0c 3.5", needs: join(needIRQ, needNS, needQueues),
		Text: "two CQs may have one vector",
		run: func(c *ctl) {
			a := c.makeSQ(1, 8, c.makeCQVector(1, 8, 1, true))
			b := c.makeSQ(2, 8, c.makeCQVector(2, 8, 1, true))
			for _, q := range []*sq{a, b, b, a} {
				c.drainInterrupts()
				q.ok(c.tick())
				c.wantInterrupt(1)
			}
		},
	},
	{
		ID: "interrupt.each", Ref: "PCIe Transport 1.0c 3.5", needs: join(needIRQ, needNS),
		Text: "a completion that finds the CQ empty interrupts, again and again",
		run: func(c *ctl) {
			q := c.makeSQ(1, 4, c.makeCQVector(1, 4, 1, true))
			for range 200 {
				cid := q.submit(c.tick())
				c.wantInterrupt(1)
				q.wait(cid)
			}
		},
	},
	{
		ID: "interrupt.coalesced", Ref: "NVMe Base 2.0c 5.27.1.6", needs: join(needIRQ, needNS),
		Text: "with Interrupt Coalescing an interrupt comes after the threshold, or after the time: none is lost",
		run: func(c *ctl) {
			c.coalesce()
			q := c.makeSQ(1, 32, c.makeCQVector(1, 32, 1, true))
			for _, n := range []int{8, 1, 3, 20, 1} {
				c.drainInterrupts()
				for range n {
					q.push(c.tick())
				}
				q.ring()
				c.wantInterrupt(1)
				c.settled(q)
			}
		},
	},
	{
		ID: "interrupt.coalesced.not-this", Ref: "NVMe Base 2.0c 5.27.1.7", needs: join(needIRQ, needNS),
		Text: "a vector with CD=1 interrupts without waiting for others",
		run: func(c *ctl) {
			c.coalesce()
			cmd := setFeatureCmd(nvme.FeatureVectorConfig, 0, uint32(nvme.MakeVectorConfig(1, true)))
			cpl := c.adm.exec(cmd)
			if cpl.Status().Code() == nvme.StatusFeatureNotChangeable {
				c.skipf("Interrupt Vector Configuration cannot be changed")
			}
			c.adm.want(&cmd, cpl, nvme.StatusSuccess)
			q := c.makeSQ(1, 8, c.makeCQVector(1, 8, 1, true))
			for range 20 {
				cid := q.submit(c.tick())
				c.wantInterrupt(1)
				q.wait(cid)
			}
		},
	},
	{
		ID: "interrupt.reused", Ref: "NVMe Base 2.0c 5.4.1, 5.6", needs: join(needIRQ, needNS),
		Text: "a vector whose CQ was deleted serves the next CQ, with no interrupt of the old one",
		run: func(c *ctl) {
			for range 5 {
				q := c.makeSQ(1, 8, c.makeCQVector(1, 8, 1, true))
				cid := q.submit(c.tick())
				c.wantInterrupt(1)
				q.wait(cid)
				c.ok(c.deleteSQ(1))
				c.ok(c.deleteCQ(1))
				c.interrupted(1)
				c.noInterrupt(1)
			}
		},
	},
	{
		ID: "interrupt.event", Ref: "NVMe Base 2.0c 5.2, PCIe Transport 1.0c 3.5", needs: needIRQ,
		Text: "an asynchronous event interrupts by vector 0",
		run: func(c *ctl) {
			c.aer()
			c.q()
			c.alive()
			// Each of the commands before has had an interrupt, and in a virtual machine the last of them may be late.
			for range 5 {
				c.until(quietFor, func() bool { return c.interrupted(0) })
			}
			c.noInterrupt(0)
			c.ringSQ(1, c.io.size+7)
			c.wantInterrupt(0)
			c.wantEvent(nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError)
		},
	},
}

func (c *ctl) wantInterrupt(v int) {
	if !c.until(soon, func() bool { return c.interrupted(v) }) {
		c.failf("no interrupt by vector %d in %v", v, soon)
	}
}

func (c *ctl) noInterrupt(v int) {
	if c.until(quietFor, func() bool { return c.interrupted(v) }) {
		c.failf("an interrupt by vector %d", v)
	}
}

// coalesce gathers 4 completions, for 2 ms at most, before an interrupt.
func (c *ctl) coalesce() {
	if !c.changeable(nvme.FeatureCoalescing, 0, 0) {
		c.skipf("Interrupt Coalescing cannot be changed")
	}
	c.setFeature(nvme.FeatureCoalescing, 0, uint32(nvme.MakeCoalescing(3, 20)))
}
