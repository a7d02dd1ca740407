package suite

import (
	"errors"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// The registers by themselves.

var registerCases = []Case{
	{
		ID: "reg.cap.mqes", Ref: "NVMe Base 2.0c 3.1.3.1",
		Text: "CAP.MQES is at least 1: queues of two entries are possible",
		run:  func(c *ctl) { c.check(c.facts.cap.MQES() >= 1, "%v", c.facts.cap) },
	},
	{
		ID: "reg.cap.css", Ref: "NVMe Base 2.0c 3.1.3.1",
		Text: "CAP.CSS offers the NVM command set or the command sets of Identify CNS 1Ch",
		run: func(c *ctl) {
			c.check(c.facts.cap.CSS()&(nvme.CAPCSSNVM|nvme.CAPCSSIOCS) != 0, "%v", c.facts.cap)
		},
	},
	{
		ID: "reg.cap.mps", Ref: "NVMe Base 2.0c 3.1.3.1",
		Text: "CAP.MPSMIN is not above CAP.MPSMAX",
		run:  func(c *ctl) { c.check(c.facts.cap.MPSMIN() <= c.facts.cap.MPSMAX(), "%v", c.facts.cap) },
	},
	{
		ID: "reg.cap.halves", Ref: "NVMe Base 2.0c 3.1",
		Text: "CAP reads the same as 64 bits and as two halves",
		run: func(c *ctl) {
			low, high := c.read32(nvme.RegCAP), c.read32(nvme.RegCAP+4)
			c.check(uint64(low)|uint64(high)<<32 == uint64(c.facts.cap), "halves %#x %#x, whole %#x", low, high, uint64(c.facts.cap))
		},
	},
	{
		ID: "reg.cap.read-only", Ref: "NVMe Base 2.0c 3.1.3.1",
		Text: "CAP and VS are read-only",
		run: func(c *ctl) {
			c.write64(nvme.RegCAP, ^uint64(0))
			c.write32(nvme.RegVS, ^uint32(0))
			c.check(c.read64(nvme.RegCAP) == uint64(c.facts.cap), "CAP changed from %#x to %#x", uint64(c.facts.cap), c.read64(nvme.RegCAP))
			c.check(c.read32(nvme.RegVS) == uint32(c.facts.vs), "VS changed from %v to %#x", c.facts.vs, c.read32(nvme.RegVS))
		},
	},
	{
		ID: "reg.vs.known", Ref: "NVMe Base 2.0c 3.1.3.2",
		Text: "VS is a version that was published",
		run: func(c *ctl) {
			v := c.facts.vs
			c.check(v.Major() >= 1 && v.Major() <= 2 && v.Minor() <= 4, "VS=%#x", uint32(v))
		},
	},
	{
		ID: "reg.reserved", Ref: "NVMe Base 2.0c 3.1.3",
		Text: "reserved registers read as 0 and ignore writes",
		run: func(c *ctl) {
			for _, off := range []uint32{0x18, 0x70, 0x200, 0xDFC} {
				c.write32(off, ^uint32(0))
				c.check(c.read32(off) == 0, "%s reads %#x", nvme.RegisterName(off), c.read32(off))
			}
		},
	},
	{
		ID: "reg.csts.read-only", Ref: "NVMe Base 2.0c 3.1.3.6",
		Text: "CSTS.RDY, CFS and SHST cannot be written",
		run: func(c *ctl) {
			before := c.csts()
			c.write32(nvme.RegCSTS, ^uint32(0)&^(1<<4))
			c.check(c.csts() == before, "%v, before the write %v", c.csts(), before)
			c.alive()
		},
	},
	{
		ID: "reg.aqa.reserved", Ref: "NVMe Base 2.0c 3.1.3.8", setup: setup{disabled: true},
		Text: "AQA keeps what is written and its reserved bits are 0",
		run: func(c *ctl) {
			c.write32(nvme.RegAQA, ^uint32(0))
			c.check(c.read32(nvme.RegAQA) == 0x0FFF0FFF, "AQA=%#x after ~0 was written", c.read32(nvme.RegAQA))
			c.write32(nvme.RegAQA, 0x001F003F)
			c.check(c.read32(nvme.RegAQA) == 0x001F003F, "AQA=%#x after 0x1f003f was written", c.read32(nvme.RegAQA))
		},
	},
	{
		ID: "reg.asq.reserved", Ref: "NVMe Base 2.0c 3.1.3.9, 3.1.3.10", setup: setup{disabled: true},
		Text: "bits 11:0 of ASQ and ACQ are 0",
		run: func(c *ctl) {
			for _, off := range []uint32{nvme.RegASQ, nvme.RegACQ} {
				c.write64(off, 0x12345FFF)
				c.check(c.read64(off) == 0x12345000, "%s=%#x after 0x12345fff was written", nvme.RegisterName(off), c.read64(off))
			}
		},
	},
	{
		ID: "reg.asq.halves", Ref: "NVMe Base 2.0c 3.1", setup: setup{disabled: true},
		Text: "ASQ and ACQ can be written as two halves, in either order",
		run: func(c *ctl) {
			c.write32(nvme.RegASQ, 0x11111000)
			c.write32(nvme.RegASQ+4, 0x2)
			c.write32(nvme.RegACQ+4, 0x3)
			c.write32(nvme.RegACQ, 0x44444000)
			c.check(c.read64(nvme.RegASQ) == 0x2_1111_1000, "ASQ=%#x", c.read64(nvme.RegASQ))
			c.check(c.read64(nvme.RegACQ) == 0x3_4444_4000, "ACQ=%#x", c.read64(nvme.RegACQ))
		},
	},
	{
		ID: "reg.cc.reads-back", Ref: "NVMe Base 2.0c 3.1.3.5",
		Text: "CC reads as it was written, reserved bits as 0",
		run: func(c *ctl) {
			want := c.ccFor(setup{})
			c.check(c.cc() == want, "%v, written %v", c.cc(), want)
		},
	},
	{
		ID: "reg.nssr.reads-zero", Ref: "NVMe Base 2.0c 3.1.3.7",
		Text: "NSSR reads as 0, and a value that is not \"NVMe\" does nothing",
		run: func(c *ctl) {
			c.check(c.read32(nvme.RegNSSR) == 0, "NSSR=%#x", c.read32(nvme.RegNSSR))
			c.write32(nvme.RegNSSR, 0x4E564D64)
			c.check(c.read32(nvme.RegNSSR) == 0, "NSSR=%#x after a write", c.read32(nvme.RegNSSR))
			c.check(c.csts().RDY() && !c.csts().NSSRO(), "%v after a write of another value", c.csts())
			c.alive()
		},
	},
	{
		ID: "reg.cmb.absent", Ref: "NVMe Base 2.0c 3.1.3.11, 3.1.3.12",
		Text:  "without a controller memory buffer, CMBLOC and CMBSZ are 0",
		needs: bitNeed("CAP.CMBS is 1", func(f *facts) bool { return !f.cap.CMBS() }),
		run: func(c *ctl) {
			c.check(c.read32(nvme.RegCMBLOC) == 0 && c.read32(nvme.RegCMBSZ) == 0, "CMBLOC=%#x CMBSZ=%#x", c.read32(nvme.RegCMBLOC), c.read32(nvme.RegCMBSZ))
		},
	},
	{
		ID: "reg.bp.absent", Ref: "NVMe Base 2.0c 3.1.3.13",
		Text:  "without boot partitions, BPINFO, BPRSEL and BPMBL are 0",
		needs: bitNeed("CAP.BPS is 1", func(f *facts) bool { return !f.cap.BPS() }),
		run: func(c *ctl) {
			c.check(c.read32(nvme.RegBPINFO) == 0 && c.read32(nvme.RegBPRSEL) == 0 && c.read64(nvme.RegBPMBL) == 0,
				"BPINFO=%#x BPRSEL=%#x BPMBL=%#x", c.read32(nvme.RegBPINFO), c.read32(nvme.RegBPRSEL), c.read64(nvme.RegBPMBL))
		},
	},
	{
		ID: "reg.pmr.absent", Ref: "NVMe Base 2.0c 3.1.3.22",
		Text:  "without a persistent memory region, PMRCAP is 0",
		needs: bitNeed("CAP.PMRS is 1", func(f *facts) bool { return !f.cap.PMRS() }),
		run:   func(c *ctl) { c.check(c.read32(nvme.RegPMRCAP) == 0, "PMRCAP=%#x", c.read32(nvme.RegPMRCAP)) },
	},
	{
		ID: "reg.crto", Ref: "NVMe Base 2.0c 3.1.3.21",
		Text:  "with ready modes in CAP.CRMS, CRTO says a timeout that is not below CAP.TO's",
		needs: bitNeed("CAP.CRMS is 0", func(f *facts) bool { return f.cap.CRMS() != 0 }),
		run: func(c *ctl) {
			crwmt := c.read32(nvme.RegCRTO) & 0xFFFF
			c.check(crwmt > 0, "CRTO.CRWMT is 0")
			c.check(crwmt <= 0xFF && uint32(c.facts.cap.TO()) >= min(crwmt, 0xFF) || c.facts.cap.TO() == 0xFF,
				"CRTO.CRWMT=%d, CAP.TO=%d", crwmt, c.facts.cap.TO())
		},
	},
	{
		ID: "reg.intm.masks", Ref: "NVMe Base 2.0c 3.1.3.3, 3.1.3.4",
		Text:  "INTMS sets mask bits, INTMC clears them, both read the mask",
		needs: bitNeed("MSI-X is in use, and the registers must then be left alone", func(f *facts) bool { return f.vectors == 0 }),
		run: func(c *ctl) {
			c.write32(nvme.RegINTMS, 0x5)
			c.check(c.read32(nvme.RegINTMS) == 0x5 && c.read32(nvme.RegINTMC) == 0x5, "INTMS=%#x INTMC=%#x, want 0x5", c.read32(nvme.RegINTMS), c.read32(nvme.RegINTMC))
			c.write32(nvme.RegINTMC, 0x1)
			c.check(c.read32(nvme.RegINTMS) == 0x4, "INTMS=%#x, want 0x4", c.read32(nvme.RegINTMS))
			c.write32(nvme.RegINTMC, ^uint32(0))
		},
	},
}

// The state machine: enable, disable, shutdown, resets.

var stateCases = []Case{
	{
		ID: "state.reset.csts", Ref: "NVMe Base 2.0c 3.7.2", setup: setup{disabled: true},
		Text: "after a controller reset CSTS.RDY, CFS and SHST are 0",
		run: func(c *ctl) {
			s := c.csts()
			c.check(!s.RDY() && !s.CFS() && s.SHST() == nvme.SHSTNormal, "%v", s)
		},
	},
	{
		ID: "state.enable.timeout", Ref: "NVMe Base 2.0c 3.5.1, 3.1.3.1", setup: setup{disabled: true},
		Text: "CSTS.RDY follows CC.EN both ways within CAP.TO",
		run: func(c *ctl) {
			for range 3 {
				c.enable(setup{})
				c.alive()
				c.disable()
			}
		},
	},
	{
		ID: "state.reset.keeps-aqa", Ref: "NVMe Base 2.0c 3.7.2",
		Text: "AQA, ASQ and ACQ survive a controller reset by CC.EN",
		run: func(c *ctl) {
			aqa, asq, acq := c.read32(nvme.RegAQA), c.read64(nvme.RegASQ), c.read64(nvme.RegACQ)
			c.disable()
			c.check(c.read32(nvme.RegAQA) == aqa && c.read64(nvme.RegASQ) == asq && c.read64(nvme.RegACQ) == acq,
				"AQA=%#x ASQ=%#x ACQ=%#x, were %#x %#x %#x", c.read32(nvme.RegAQA), c.read64(nvme.RegASQ), c.read64(nvme.RegACQ), aqa, asq, acq)
		},
	},
	{
		ID: "state.reset.deletes-queues", Ref: "NVMe Base 2.0c 3.7.2",
		Text: "a controller reset deletes all I/O queues",
		run: func(c *ctl) {
			c.q()
			c.disable()
			c.enable(setup{})
			c.refused(c.deleteSQ(1), nvme.StatusInvalidQueueID, nvme.StatusInvalidCQ)
			c.refused(c.deleteCQ(1), nvme.StatusInvalidQueueID, nvme.StatusInvalidCQ) // which of them: queue.delete.absent
			c.makePair(1, 8)
		},
	},
	{
		ID: "state.reset.stops-dma", Ref: "NVMe Base 2.0c 3.7.2", needs: needNS,
		Text: "when CSTS.RDY is 0 the controller writes to host memory no more",
		run: func(c *ctl) {
			q := c.q()
			for range 40 {
				q.submit(c.read(0, 1, c.data(c.facts.lba)))
			}
			c.must(c.dev.Write32(nvme.RegCC, uint32(c.cc().WithEN(false))))
			c.wait(c.readyTime(), "CSTS.RDY=0", func() bool { return !c.csts().RDY() })
			mem := q.cq.mem
			mem.fill(0xA5)
			c.never("a completion was written after CSTS.RDY=0", func() bool { return !mem.is(0, mem.n, 0xA5) })
		},
	},
	{
		ID: "state.reset.doorbells", Ref: "NVMe Base 2.0c 3.7.2", setup: setup{disabled: true},
		Text: "doorbells that are rung while disabled do not count after the enable",
		run: func(c *ctl) {
			c.ringSQ(0, 3)
			c.ringCQ(0, 2)
			c.ringSQ(1, 5)
			c.enable(setup{})
			c.never("a completion came that nobody asked for", func() bool { return c.adm.cq.cons.Ready() })
			c.alive()
		},
	},
	{
		ID: "state.function-reset", Ref: "NVMe Base 2.0c 3.7.2",
		Text: "a function level reset disables the controller and puts its registers back",
		run: func(c *ctl) {
			err := c.dev.Reset()
			if errors.Is(err, errors.ErrUnsupported) {
				c.skipf("%v", err)
			}
			c.must(err)
			c.wait(c.readyTime(), "CSTS.RDY=0 after a function reset", func() bool { return !c.csts().RDY() })
			c.check(c.cc() == 0, "%v after a function reset", c.cc())
			c.check(c.read32(nvme.RegAQA) == 0 && c.read64(nvme.RegASQ) == 0, "AQA=%#x ASQ=%#x after a function reset", c.read32(nvme.RegAQA), c.read64(nvme.RegASQ))
			c.mem.reset()
			c.enable(setup{})
			c.alive()
		},
	},
	{
		ID: "state.aqa.smallest", Ref: "NVMe Base 2.0c 3.1.3.8", setup: setup{asqs: 2, acqs: 2},
		Text: "admin queues of two entries work, and wrap at each command",
		run: func(c *ctl) {
			for range 9 {
				c.identify(nvme.CNSController, 0)
			}
		},
	},
	{
		ID: "state.aqa.largest", Ref: "NVMe Base 2.0c 3.1.3.8", setup: setup{asqs: 4096, acqs: 4096},
		Text: "admin queues of 4096 entries work, filled to the last",
		run: func(c *ctl) {
			var cmd nvme.Command
			cmd.SetGetFeatures(nvme.FeatureArbitration, 0, nvme.FeatureCurrent)
			last := uint16(0)
			for range 4095 {
				last = c.adm.push(cmd)
			}
			c.adm.ring()
			c.wait(whole, "4095 admin commands", func() bool { c.adm.cq.reap(); return len(c.adm.done) == 4095 })
			cpl := c.adm.done[last]
			c.adm.want(&cmd, cpl, nvme.StatusSuccess)
		},
	},
	{
		ID: "state.aqa.uneven", Ref: "NVMe Base 2.0c 3.1.3.8, 3.3.1.2.1", setup: setup{asqs: 64, acqs: 3},
		Text: "an admin CQ that is smaller than the SQ holds commands back and loses none",
		run: func(c *ctl) {
			var cmd nvme.Command
			cmd.SetGetFeatures(nvme.FeatureArbitration, 0, nvme.FeatureCurrent)
			for range 60 {
				c.adm.push(cmd)
			}
			c.adm.ring()
			c.wait(whole, "60 admin commands through a CQ of 3", func() bool { c.adm.cq.reap(); return len(c.adm.done) == 60 })
		},
	},
	{
		ID: "state.shutdown.normal", Ref: "NVMe Base 2.0c 3.6.1",
		Text: "CC.SHN=01b leads to CSTS.SHST=10b",
		run:  func(c *ctl) { c.shutdown(nvme.SHNNormal) },
	},
	{
		ID: "state.shutdown.abrupt", Ref: "NVMe Base 2.0c 3.6.1",
		Text: "CC.SHN=10b leads to CSTS.SHST=10b",
		run:  func(c *ctl) { c.shutdown(nvme.SHNAbrupt) },
	},
	{
		ID: "state.shutdown.again", Ref: "NVMe Base 2.0c 3.6.1",
		Text: "after a shutdown, a reset and an enable, CSTS.SHST is 0 and commands work",
		run: func(c *ctl) {
			c.shutdown(nvme.SHNNormal)
			c.disable()
			c.enable(setup{})
			c.check(c.csts().SHST() == nvme.SHSTNormal, "%v after the enable", c.csts())
			c.alive()
		},
	},
	{
		ID: "state.nssr.resets", Ref: "NVMe Base 2.0c 3.7.1, 3.1.3.7", needs: needNSSR,
		Text: "\"NVMe\" in NSSR resets the subsystem: CSTS.RDY=0, CSTS.NSSRO=1, which a write of 1 clears",
		run: func(c *ctl) {
			c.write32(nvme.RegNSSR, nvme.NSSRReset)
			c.wait(c.readyTime(), "CSTS.RDY=0 after NSSR", func() bool { return !c.csts().RDY() })
			c.check(!c.cc().EN(), "%v after NSSR", c.cc())
			c.check(c.csts().NSSRO(), "%v after NSSR", c.csts())
			c.write32(nvme.RegCSTS, 1<<4)
			c.check(!c.csts().NSSRO(), "%v after 1 was written to NSSRO", c.csts())
			c.mem.reset()
			c.enable(setup{})
			c.alive()
		},
	},
	{
		ID: "state.bad-cc.mps", Ref: "NVMe Base 2.0c 3.1.3.5", setup: setup{disabled: true},
		Text:  "a CC.MPS that CAP does not offer does no lasting harm: a reset mends it",
		needs: bitNeed("CAP.MPSMAX is the most there is", func(f *facts) bool { return f.cap.MPSMAX() < 15 }),
		run:   func(c *ctl) { c.badCC(c.ccFor(setup{}).WithMPS(c.facts.cap.MPSMAX() + 1)) },
	},
	{
		ID: "state.bad-cc.css", Ref: "NVMe Base 2.0c 3.1.3.5", setup: setup{disabled: true},
		Text: "a reserved CC.CSS does no lasting harm: a reset mends it",
		run:  func(c *ctl) { c.badCC(c.ccFor(setup{}).WithCSS(3)) },
	},
	{
		ID: "state.bad-cc.ams", Ref: "NVMe Base 2.0c 3.1.3.5", setup: setup{disabled: true},
		Text: "a reserved CC.AMS does no lasting harm: a reset mends it",
		run:  func(c *ctl) { c.badCC(c.ccFor(setup{}).WithAMS(5)) },
	},
	{
		ID: "state.bad-asq", Ref: "NVMe Base 2.0c 3.1.3.9, 3.5.1", setup: setup{disabled: true}, needs: needIOVA,
		Text: "an admin SQ in memory that the controller cannot reach does no lasting harm: a reset mends it",
		run: func(c *ctl) {
			c.adminQueues(setup{})
			c.write64(nvme.RegASQ, nowhere)
			c.write32(nvme.RegCC, uint32(c.ccFor(setup{})))
			if c.until(50*time.Millisecond, func() bool { return c.csts().RDY() }) {
				c.ringSQ(0, 1)
				c.until(quietFor, func() bool { return c.csts().CFS() })
			}
			c.mends()
		},
	},
	{
		ID: "state.disable-at-once", Ref: "NVMe Base 2.0c 3.5.1, 3.1.3.5", setup: setup{disabled: true},
		Text: "a controller that is disabled before it said that it is ready ends with CSTS.RDY=0, and can be enabled",
		run: func(c *ctl) {
			for range 5 {
				c.adminQueues(setup{})
				c.write32(nvme.RegCC, uint32(c.ccFor(setup{})))
				c.disable()
			}
			c.enable(setup{})
			c.alive()
		},
	},
	{
		ID: "state.shutdown.disabled", Ref: "NVMe Base 2.0c 3.6.1",
		Text: "a controller that is disabled while it shuts down can be enabled, and its shutdown is forgotten",
		run: func(c *ctl) {
			c.q()
			c.write32(nvme.RegCC, uint32(c.cc().WithSHN(nvme.SHNAbrupt)))
			c.disable()
			c.enable(setup{})
			c.check(c.csts().SHST() == nvme.SHSTNormal, "%v after the enable", c.csts())
			c.alive()
		},
	},
	{
		ID: "state.nssr.under-load", Ref: "NVMe Base 2.0c 3.7.1, 3.7.2", needs: join(needNSSR, needNS),
		Text: "after a subsystem reset with I/O outstanding the controller writes to host memory no more",
		run: func(c *ctl) {
			q := c.q()
			for range 60 {
				q.push(c.tick())
			}
			q.ring()
			c.write32(nvme.RegNSSR, nvme.NSSRReset)
			c.wait(c.readyTime(), "CSTS.RDY=0 after NSSR", func() bool { return !c.csts().RDY() })
			mem := q.cq.mem
			mem.fill(guardByte)
			c.never("a completion was written after the reset", func() bool { return !mem.is(0, mem.n, guardByte) })
			c.write32(nvme.RegCSTS, 1<<4)
			c.mends()
		},
	},
	{
		ID: "state.mps.larger", Ref: "NVMe Base 2.0c 3.1.3.5, 4.1.1",
		Text:  "with CC.MPS=1 memory pages are 8 KiB",
		needs: join(needNS, bitNeed("CAP.MPSMAX is 0", func(f *facts) bool { return f.cap.MPSMAX() >= 1 })),
		setup: setup{disabled: true},
		run: func(c *ctl) {
			c.enable(setup{mps: 1})
			at := c.alloc(8192).iova
			var cmd nvme.Command
			cmd.SetRW(nvme.IORead, c.facts.nsid, 0, nvme.ZeroBased16(8192/c.facts.lba-1))
			cmd.PRP1 = at
			c.q().ok(cmd)
		},
	},
	{
		ID: "state.admin-locked", Ref: "NVMe Base 2.0c 3.1.3.8",
		Text: "the admin queues in use stay where they are when AQA, ASQ and ACQ are written while enabled",
		run: func(c *ctl) {
			aqa, asq, acq := c.read32(nvme.RegAQA), c.read64(nvme.RegASQ), c.read64(nvme.RegACQ)
			other := c.alloc(2 * pageSize)
			c.write64(nvme.RegASQ, other.iova)
			c.write64(nvme.RegACQ, other.iova+pageSize)
			c.alive()
			c.write64(nvme.RegASQ, asq)
			c.write64(nvme.RegACQ, acq)
			c.write32(nvme.RegAQA, aqa)
		},
	},
}

// shutdown asks for a shutdown and waits for it.
func (c *ctl) shutdown(shn uint8) {
	c.write32(nvme.RegCC, uint32(c.cc().WithSHN(shn)))
	limit := max(time.Duration(c.facts.id.RTD3E)*time.Microsecond, time.Second)
	c.wait(limit, "CSTS.SHST=10b after a shutdown", func() bool { return c.csts().SHST() == nvme.SHSTComplete })
}

// badCC enables the controller with a CC that is not possible. What comes of it is undefined, but for the reset that ends it.
func (c *ctl) badCC(cc nvme.CC) {
	c.adminQueues(setup{})
	c.write32(nvme.RegCC, uint32(cc))
	c.until(50*time.Millisecond, func() bool { return c.csts().RDY() || c.csts().CFS() })
	c.mends()
}

// mends checks that a reset leads back to a working controller.
func (c *ctl) mends() {
	c.disable()
	c.check(!c.csts().CFS(), "%v after a reset", c.csts())
	c.mem.reset()
	c.enable(setup{})
	c.alive()
}
