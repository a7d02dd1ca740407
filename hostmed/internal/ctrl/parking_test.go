package ctrl

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// unmap takes pages away as a client does: what was there is somebody else's by the time MemoryLost returns.
func (h *host) unmap(iova, size uint64) {
	for p := iova; p < iova+size; p += 0x1000 {
		h.mem.gone[p] = true
	}
	h.c.MemoryLost(iova, size)
}

func (h *host) remap(iova, size uint64) {
	for p := iova; p < iova+size; p += 0x1000 {
		delete(h.mem.gone, p)
	}
	h.c.MemoryGained()
}

// An admin queue whose memory is unmapped is parked: no CFS, no access, and when the memory is back the commands
// rung meanwhile are run.
func TestRule25_AdminQueueParked(t *testing.T) {
	for name, iova := range map[string]uint64{"SQ": sqIOVA, "CQ": cqIOVA} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig()
			wakes := 0
			cfg.Wake = func() { wakes++ }
			h := newEnabled(t, cfg)
			for round := range 2 * adminDepth { // over the wrap and both phases
				h.unmap(iova, 0x1000)
				if st := h.csts(); st.CFS() || !st.RDY() || !h.c.Enabled() {
					t.Fatalf("%v", st)
				}
				cid := h.push(nvme.Command{Opcode: 0xff})
				h.ring()
				h.c.QueueError(1, BadDoorbellValue)
				if _, ok := h.cq.Next(); ok || h.dp.interrupts > round {
					t.Fatal("something was done without the queue's memory")
				}
				before := wakes
				h.remap(iova, 0x1000)
				if wakes != before+1 {
					t.Fatal("nobody looks for what was rung meanwhile (R27)")
				}
				h.c.AdminKick()
				if es := h.reap(); len(es) != 1 || es[0].CID() != cid {
					t.Fatalf("round %d: completions %+v, want one of %d", round, es, cid)
				}
			}
		})
	}
}

func TestRule25_AdminQueueRanges(t *testing.T) {
	for name, lose := range map[string]func(*Controller){
		"SQ":         func(c *Controller) { c.MemoryLost(sqIOVA+0x400, 0x1000) },
		"CQ":         func(c *Controller) { c.MemoryLost(cqIOVA, 1) },
		"everything": func(c *Controller) { c.MemoryLost(0, 0) },
		"to 2^64":    func(c *Controller) { c.MemoryLost(ramBase, ^uint64(0)-ramBase+1) },
		"wraps":      func(c *Controller) { c.MemoryLost(ramBase, ^uint64(0)) },
	} {
		h := newEnabled(t, testConfig())
		h.c.MemoryLost(0, ramBase)
		h.c.MemoryLost(ramBase+ramSize, 0)
		if h.c.admin.parked {
			t.Fatalf("%s: parked for memory that is not its own", name)
		}
		lose(h.c)
		if st := h.csts(); st.CFS() || !h.c.admin.parked {
			t.Errorf("%s: %v, parked %v", name, st, h.c.admin.parked)
		}
		h.dp.tail.Store(3)
		h.c.AdminKick()
		h.c.QueueError(1, BadDoorbellValue)
		h.c.MemoryLost(0, 0)
		h.disable() // a reset leads out of it, whatever is mapped
		h.enable()
		h.identify(nvme.CNSController, 0)
	}
}

// Only some of the memory is back: the queue stays parked, and so it is after an enable that finds none.
func TestAdminQueueStaysParked(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.unmap(sqIOVA, 0x1000)
	h.unmap(cqIOVA, 0x1000)
	h.remap(sqIOVA, 0x1000)
	if !h.c.admin.parked || h.csts().CFS() {
		t.Fatal("not parked without a CQ")
	}
	h.disable()
	h.remap(ramBase, 0) // nothing is parked now
	h.writeReg(nvme.RegCC, 4, uint64(goodCC))
	if st := h.csts(); !st.CFS() {
		t.Errorf("enabled without a CQ: %v", st)
	}
	h.disable()
	h.remap(cqIOVA, 0x1000)
	h.enable()
	h.identify(nvme.CNSController, 0)
}

// An event that is due while the queue is parked is posted afterwards.
func TestEventWhileParked(t *testing.T) {
	h := newEnabled(t, testConfig())
	cid := h.push(aer())
	h.ring()
	h.unmap(cqIOVA, 0x1000)
	h.c.QueueError(3, BadDoorbellValue)
	if h.dp.interrupts != 0 {
		t.Error("an interrupt without a completion")
	}
	h.remap(cqIOVA, 0x1000)
	h.c.AdminKick()
	if es := h.reap(); len(es) != 1 || es[0].CID() != cid || nvme.AsyncEvent(es[0].Result()).Type() != nvme.EventError {
		t.Errorf("completions %+v", es)
	}
	if h.dp.interrupts != 1 {
		t.Errorf("%d interrupts", h.dp.interrupts)
	}
}

// The doorbell pages come back: what the driver stored in them while they were away counts, and they are not seeded.
func TestRule25_PagesComeBack(t *testing.T) {
	for _, slots := range []bool{false, true} {
		for _, iova := range []uint64{page1IOVA, page2IOVA} {
			h := newEnabled(t, testConfig())
			h.configure()
			// Linux rings queue 0 by its registers, libvfn by its slots, and the register when the event index says so.
			bell := func() {
				if slots {
					h.mem.word(page1IOVA).Store(h.sq.Tail())
				} else {
					h.dp.tail.Store(h.sq.Tail())
				}
				h.c.AdminKick()
			}
			take := func(what string, want uint16) {
				t.Helper()
				e, ok := h.cq.Next()
				if !ok || e.CID() != want {
					t.Fatalf("%s: completion %v %+v, want %d", what, ok, e, want)
				}
				if err := h.sq.Released(e.SQHead()); err != nil {
					t.Fatal(err)
				}
				if slots {
					h.mem.word(page1IOVA + 4).Store(h.cq.Head())
				} else {
					h.dp.head.Store(h.cq.Head())
				}
				h.c.AdminKick()
			}
			for range 2 * adminDepth {
				cid := h.push(nvme.Command{Opcode: 0xff})
				bell()
				take("with the pages", cid)
				h.unmap(iova, 0x1000)
				if h.dp.shadow != nil || h.c.admin.tail.slot != nil {
					t.Fatal("the pages are still in use")
				}
				h.c.MemoryGained() // something else
				cid = h.push(nvme.Command{Opcode: 0xff})
				bell() // a driver of slots does not ring the register
				if h.dp.shadow != nil {
					t.Fatal("the pages are in use without their memory")
				}
				if !slots {
					take("without the pages", cid)
				}
				h.remap(iova, 0x1000)
				if h.dp.shadow == nil || !h.dp.called("ResumeDoorbellPages") {
					t.Fatal("the pages are not in use again")
				}
				h.c.AdminKick()
				if slots {
					take("when the pages are back", cid)
				}
				if h.c.admin.stopped || h.c.admin.sq.Head() != h.sq.Tail() {
					t.Fatalf("stopped %v, head %d, tail %d", h.c.admin.stopped, h.c.admin.sq.Head(), h.sq.Tail())
				}
			}
			// New pages, or a reset, make an end of the old ones.
			h.unmap(iova, 0x1000)
			h.ok(doorbellConfig(nvme.AdminDoorbellBufferConfig, page3IOVA, page4IOVA))
			h.remap(iova, 0x1000)
			if h.c.pages.shadowIOVA != page3IOVA || h.c.pages.away {
				t.Error("pages that were replaced came back")
			}
			h.unmap(page3IOVA, 0x1000)
			h.disable()
			h.dp.calls = nil
			h.remap(page3IOVA, 0x1000)
			if h.dp.shadow != nil || h.dp.called("ResumeDoorbellPages") {
				t.Error("pages came back after a reset (R21)")
			}
		}
	}
}

// Commands, unmaps and maps in any order: each command is completed once, and in order, when its memory is there.
func TestParkingAgainstNaiveModel(t *testing.T) {
	pages := []uint64{sqIOVA, cqIOVA, page1IOVA, page2IOVA}
	rapid.Check(t, func(rt *rapid.T) {
		h := newEnabled(t, testConfig())
		if rapid.Bool().Draw(rt, "pages") {
			h.configure()
		}
		var want []uint16
		take := func() {
			for e, ok := h.cq.Next(); ok; e, ok = h.cq.Next() {
				if len(want) == 0 || e.CID() != want[0] {
					rt.Fatalf("completion of %d, want %v", e.CID(), want)
				}
				want = want[1:]
				if err := h.sq.Released(e.SQHead()); err != nil {
					rt.Fatal(err)
				}
			}
			h.dp.head.Store(h.cq.Head())
		}
		for range rapid.IntRange(1, 80).Draw(rt, "steps") {
			page := rapid.SampledFrom(pages).Draw(rt, "page")
			switch rapid.IntRange(0, 4).Draw(rt, "step") {
			case 0:
				if h.sq.Free() > 0 {
					want = append(want, h.push(nvme.Command{Opcode: 0xff}))
					h.ring()
				}
			case 1:
				take()
				h.c.AdminKick()
			case 2:
				h.unmap(page, 0x1000)
			case 3:
				h.remap(page, 0x1000)
				h.c.AdminKick()
			case 4:
				h.c.QueueError(1, BadDoorbellValue)
			}
			if st := h.csts(); st.CFS() || h.c.admin.stopped {
				rt.Fatalf("%v, stopped %v", st, h.c.admin.stopped)
			}
		}
		for _, page := range pages {
			h.remap(page, 0x1000)
		}
		for range 2 {
			h.c.AdminKick()
			take()
		}
		if len(want) > 0 {
			rt.Fatalf("%d commands were never completed", len(want))
		}
		if used := uint64(adminDepth) * ring.SQESize; used != h.c.admin.sqBytes() {
			rt.Fatal("the queue has another size")
		}
	})
}
