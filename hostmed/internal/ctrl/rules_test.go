package ctrl

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Nothing is fetched that cannot be completed, and a full admin CQ resumes when its head moves.
func TestRule09_AdminCQFull(t *testing.T) {
	h := newHost(t, testConfig())
	h.smallCQ()
	for range 10 {
		h.push(nvme.Command{Opcode: 0xff})
	}
	h.ring()
	head := uint32(0)
	for done := 0; done < 10; {
		n := min(3, 10-done)
		if got := h.c.admin.sq.Head(); int(got) != done+n {
			t.Fatalf("%d commands fetched with %d completions taken and room for 3", got, done)
		}
		h.c.AdminKick()
		if int(h.c.admin.sq.Head()) != done+n {
			t.Fatal("a kick fetched without room")
		}
		done += n
		head = (head + uint32(n)) % 4
		h.dp.head.Store(head)
		h.c.AdminKick()
	}
}

// An event that finds the CQ full is posted when the head moves.
func TestRule09_EventWaitsForRoom(t *testing.T) {
	h := newHost(t, testConfig())
	h.smallCQ()
	h.push(aer())
	for range 3 {
		h.push(nvme.Command{Opcode: 0xff})
	}
	h.ring()
	if free := h.c.admin.cq.Free(); free != 0 {
		t.Fatalf("room for %d", free)
	}
	h.c.QueueError(9, BadDoorbellValue)
	if len(h.c.admin.waiting) != 1 {
		t.Fatalf("%d completions wait", len(h.c.admin.waiting))
	}
	interrupts := h.dp.interrupts
	h.dp.head.Store(3)
	h.c.AdminKick()
	if len(h.c.admin.waiting) != 0 || h.c.admin.cq.Tail() != 0 || h.dp.interrupts != interrupts+1 {
		t.Errorf("%d wait, CQ tail %d, %d interrupts", len(h.c.admin.waiting), h.c.admin.cq.Tail(), h.dp.interrupts-interrupts)
	}
}

// smallCQ enables the controller with an admin CQ of 4: room for 3 completions.
func (h *host) smallCQ() {
	h.enable()
	h.disable()
	h.writeReg(nvme.RegAQA, 4, 3<<16|(adminDepth-1))
	h.writeReg(nvme.RegCC, 4, uint64(goodCC))
	h.newRings()
}

// configure puts the doorbells on the pages at page1IOVA and page2IOVA.
func (h *host) configure() {
	h.Helper()
	h.ok(doorbellConfig(nvme.AdminDoorbellBufferConfig, page1IOVA, page2IOVA))
}

// Linux and SPDK: registers only. The values are mirrored, and the event indices follow.
func TestRule16_RegisterDriver(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.configure()
	for range 3 * adminDepth {
		h.identify(nvme.CNSController, 0)
		for _, w := range []struct {
			name string
			iova uint64
			want uint32
		}{
			{"shadow tail", page1IOVA, h.sq.Tail()}, {"shadow head", page1IOVA + 4, h.cq.Head()},
			{"tail event index", page2IOVA, h.sq.Tail()}, {"head event index", page2IOVA + 4, h.cq.Head()},
		} {
			if got := h.mem.word(w.iova).Load(); got != w.want {
				t.Fatalf("%s is %d, want %d", w.name, got, w.want)
			}
		}
	}
	if h.c.admin.tail.owned || h.c.admin.head.owned {
		t.Error("the slots are taken for the driver's")
	}
}

// libvfn: writes the slots, rings when the event index says so, and register values come late.
func TestRule16_SlotDriver(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.configure()
	var late []uint32 // register writes under way
	for i := range 3 * adminDepth {
		cid := h.push(nvme.Command{Opcode: 0xff})
		if ei := h.mem.word(page2IOVA).Load(); ei != (h.sq.Tail()+adminDepth-1)%adminDepth {
			t.Fatalf("round %d: event index %d does not ask for a ring at %d", i, ei, h.sq.Tail())
		}
		h.mem.word(page1IOVA).Store(h.sq.Tail())
		late = append(late, h.sq.Tail())
		if i%3 == 0 {
			// A register value that is behind what the slot said must not move the tail back (R17).
			h.dp.tail.Store(late[0])
			late = late[1:]
		}
		h.c.AdminKick()
		e, ok := h.cq.Next()
		if !ok || e.CID() != cid {
			t.Fatalf("round %d: completion %v %+v", i, ok, e)
		}
		if err := h.sq.Released(e.SQHead()); err != nil {
			t.Fatal(err)
		}
		h.mem.word(page1IOVA + 4).Store(h.cq.Head())
		h.c.AdminKick()
		if i%3 == 1 {
			h.dp.tail.Store(late[0]) // and one that comes by itself
			late = late[1:]
			h.c.AdminKick()
		}
		if h.c.admin.stopped || h.c.admin.sq.Head() != h.sq.Tail() {
			t.Fatalf("round %d: stopped %v, head %d, tail %d", i, h.c.admin.stopped, h.c.admin.sq.Head(), h.sq.Tail())
		}
	}
}

// In the other modes there are no pages, and nothing but the register counts.
func TestRule16_RegisterOnly(t *testing.T) {
	cfg := testConfig()
	cfg.Mode = Trap
	h := newEnabled(t, cfg)
	h.fails(doorbellConfig(nvme.AdminDoorbellBufferConfig, page1IOVA, page2IOVA), nvme.StatusInvalidOpcode)
	h.fails(doorbellConfig(nvme.AdminDoorbellMemory2014, page1IOVA, page2IOVA), nvme.StatusInvalidOpcode)
	h.mem.word(page1IOVA).Store(17)
	h.identify(nvme.CNSController, 0)
}

// A reset stops the data path while the controller still says ready, and afterwards neither page is
// written, whatever the driver does.
// TestRule21_ShutdownDropsThePages: Linux frees the pages when its driver goes, after a shutdown and without a reset. What then woke the admin
// queue, such as bus mastering for the next driver, wrote event indices into memory that had become somebody else's page tables.
func TestRule21_ShutdownDropsThePages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newEnabled(t, testConfig())
		h.configure()
		h.identify(nvme.CNSController, 0)
		h.writeReg(nvme.RegCC, 4, uint64(goodCC.WithSHN(nvme.SHNNormal)))
		synctest.Wait()
		if st := h.csts(); st.SHST() != nvme.SHSTComplete {
			t.Fatal(st)
		}
		if h.dp.shadow != nil {
			t.Error("the queues still have the pages")
		}
		const sentinel = 0xdeadbeef
		for off := uint64(0); off < 0x1000; off += 4 {
			h.mem.word(page1IOVA + off).Store(sentinel)
			h.mem.word(page2IOVA + off).Store(sentinel)
		}
		h.c.Hold(true)
		h.c.Hold(false)
		h.c.AdminKick()
		h.c.MemoryGained()
		h.c.AdminKick()
		for off := uint64(0); off < 0x1000; off += 4 {
			if h.mem.word(page1IOVA+off).Load() != sentinel || h.mem.word(page2IOVA+off).Load() != sentinel {
				t.Fatalf("a page was written at %#x after the shutdown", off)
			}
		}
		// A driver that goes on all the same does so by the registers.
		h.identify(nvme.CNSController, 0)
		if !h.c.Enabled() {
			t.Error("the controller has failed")
		}
	})
}

func TestRule21_ResetDropsThePages(t *testing.T) {
	for name, reset := range map[string]func(*host){
		"CC.EN":  (*host).disable,
		"Reset":  func(h *host) { h.c.Reset() },
		"NSSR":   func(h *host) { h.writeReg(nvme.RegNSSR, 4, nvme.NSSRReset) },
		"failed": func(h *host) { h.c.fatal("test", errors.New("test")); h.disable() },
	} {
		t.Run(name, func(t *testing.T) {
			h := newEnabled(t, testConfig())
			h.configure()
			h.ok(createCQ(1, 16, 0))
			h.ok(createSQ(1, 16, 1))
			stopped := false
			h.dp.onStop = func() {
				stopped = true
				if !h.c.regs.csts.RDY() {
					t.Error("RDY is 0 before the data path has stopped")
				}
				if h.c.Enabled() {
					t.Error("admin commands are still taken")
				}
			}
			reset(h)
			if !stopped || h.csts().RDY() || h.dp.shadow != nil {
				t.Fatalf("stopped %v, %v", stopped, h.csts())
			}
			const sentinel = 0xdeadbeef
			for off := uint64(0); off < 0x1000; off += 4 {
				h.mem.word(page1IOVA + off).Store(sentinel)
				h.mem.word(page2IOVA + off).Store(sentinel)
			}
			if h.dp.tail.Load() != 0 || h.dp.head.Load() != 0 {
				t.Error("the admin doorbells are not zero")
			}
			h.dp.tail.Store(9) // rung while disabled
			h.c.AdminKick()
			h.dp.onStop = nil
			h.enable()
			h.identify(nvme.CNSController, 0)
			for off := uint64(0); off < 0x1000; off += 4 {
				if h.mem.word(page1IOVA+off).Load() != sentinel || h.mem.word(page2IOVA+off).Load() != sentinel {
					t.Fatalf("a page of the last life was written at %#x", off)
				}
			}
			h.ok(createCQ(1, 16, 0)) // and the queues are gone
		})
	}
}

func TestRule24_PagesAreChecked(t *testing.T) {
	h := newEnabled(t, testConfig())
	for _, tt := range []struct {
		name       string
		shadow, ei uint64
	}{
		{"zero shadow", 0, page2IOVA}, {"zero ei", page1IOVA, 0}, {"equal", page1IOVA, page1IOVA},
		{"misaligned shadow", page1IOVA + 0x800, page2IOVA}, {"misaligned ei", page1IOVA, page2IOVA + 4},
		{"shadow outside", 0x1000, page2IOVA}, {"ei outside", page1IOVA, ramBase + ramSize}, {"top", page1IOVA, ^uint64(0xfff)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h.TB = t
			h.fails(doorbellConfig(nvme.AdminDoorbellBufferConfig, tt.shadow, tt.ei), nvme.StatusInvalidField)
			h.fails(doorbellConfig(nvme.AdminDoorbellMemory2014, tt.shadow, tt.ei), nvme.StatusDoorbellMemoryInvalid)
			if h.dp.shadow != nil || h.c.pages.shadow != nil {
				t.Error("a page is in use")
			}
		})
	}
	h.TB = t
	// Configured twice: the second pair is in use, the first is left alone.
	h.configure()
	h.ok(doorbellConfig(nvme.AdminDoorbellMemory2014, page3IOVA, page4IOVA))
	was := h.mem.word(page1IOVA).Load()
	h.identify(nvme.CNSController, 0)
	if h.mem.word(page1IOVA).Load() != was || h.mem.word(page3IOVA).Load() != h.sq.Tail() {
		t.Error("the first pages are still in use")
	}
	// Configured again on the shadow page in use, to which the driver is storing: nothing there is overwritten.
	h.dp.calls = nil
	h.push(doorbellConfig(nvme.AdminDoorbellBufferConfig, page3IOVA, page2IOVA))
	h.ring()
	slot := h.mem.word(page3IOVA)
	slot.Store(h.sq.Tail() + 1) // a driver that uses the slot of queue 0, and is ahead
	h.push(identifyCmd(nvme.CNSController, 0))
	h.c.AdminKick()
	if es := h.reap(); len(es) != 2 || !es[0].Status().OK() || !es[1].Status().OK() || slot.Load() != h.sq.Tail() || !h.dp.called("ResumeDoorbellPages") {
		t.Errorf("configured again: %+v, slot %d of %d, %q", es, slot.Load(), h.sq.Tail(), h.dp.calls)
	}
	if h.c.pages.eiIOVA != page2IOVA || h.mem.word(page2IOVA).Load() != h.sq.Tail() {
		t.Error("the new event indices are not in use")
	}
}

func TestRule25_PageMemoryLost(t *testing.T) {
	for _, iova := range []uint64{page1IOVA, page2IOVA} {
		h := newEnabled(t, testConfig())
		h.configure()
		h.identify(nvme.CNSController, 0)
		h.c.MemoryLost(page1IOVA-0x1000, 0x1000)
		h.c.MemoryLost(page2IOVA+0x1000, 0x1000)
		if h.dp.shadow == nil {
			t.Fatal("pages dropped for memory beside them")
		}
		h.c.MemoryLost(iova, 0x1000)
		if h.dp.shadow != nil || h.c.admin.tail.slot != nil || !h.c.Enabled() {
			t.Fatal("the pages are still in use, or the controller failed")
		}
		for range 2 * adminDepth {
			h.identify(nvme.CNSController, 0)
		}
		h.configure()
		h.identify(nvme.CNSController, 0)
	}
}

func TestRule26_FailureLeavesEverything(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.dp.fail = errors.New("no")
	h.fails(doorbellConfig(nvme.AdminDoorbellBufferConfig, page1IOVA, page2IOVA), nvme.StatusInternalError)
	if h.dp.shadow != nil || h.c.pages.shadow != nil || h.c.admin.tail.slot != nil {
		t.Fatal("pages are in use after a failure")
	}
	h.identify(nvme.CNSController, 0)
	h.configure()
	h.dp.fail = errors.New("no")
	h.fails(doorbellConfig(nvme.AdminDoorbellBufferConfig, page3IOVA, page4IOVA), nvme.StatusInternalError)
	h.fails(doorbellConfig(nvme.AdminDoorbellBufferConfig, 0, page4IOVA), nvme.StatusInvalidField)
	h.identify(nvme.CNSController, 0)
	if h.mem.word(page1IOVA).Load() != h.sq.Tail() || h.mem.word(page3IOVA).Load() != 0 {
		t.Error("the pages in use were exchanged by a command that failed")
	}
}

// After a reset the controller has no pages until the driver sends the configuration again.
func TestRule28_ConfigurationDoesNotSurvive(t *testing.T) {
	h := newEnabled(t, testConfig())
	for range 3 {
		if h.c.pages.shadow != nil {
			t.Fatal("pages without a configuration")
		}
		h.configure()
		h.identify(nvme.CNSController, 0)
		h.disable()
		h.enable()
	}
}

// There are no more queues than have slots in one page, and a page that is too small is refused.
func TestRule29_SlotsFitThePage(t *testing.T) {
	for dstrd, want := range map[uint8]uint16{0: 64, 1: 64, 2: 64, 3: 63, 4: 31, 6: 7, 8: 1} {
		cfg := testConfig()
		cfg.DSTRD = dstrd
		h := newEnabled(t, cfg)
		if got := h.c.MaxIOQueues(); got != want {
			t.Errorf("DSTRD %d: %d queues, want %d", dstrd, got, want)
		}
		if last := (2*uint32(h.c.MaxIOQueues()) + 1) * nvme.DoorbellStride(dstrd); last+4 > minPageSize {
			t.Errorf("DSTRD %d: the last slot is at %#x", dstrd, last)
		}
		h.configure()
		h.fails(createCQ(want+1, 16, 0), nvme.StatusInvalidQueueID)
	}
	cfg := testConfig()
	cfg.DSTRD = 0xf // two slots are 256 KiB apart: no page has them
	h := newEnabled(t, cfg)
	h.fails(doorbellConfig(nvme.AdminDoorbellBufferConfig, page1IOVA, page2IOVA), nvme.StatusInvalidField)
}
