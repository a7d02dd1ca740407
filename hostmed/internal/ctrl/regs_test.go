package ctrl

import (
	"bytes"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestCapabilities(t *testing.T) {
	h := newHost(t, testConfig())
	cap := nvme.CAP(h.readReg(nvme.RegCAP, 8))
	if cap.MQES().Count() != 4096 || !cap.CQR() || cap.CSS() != nvme.CAPCSSNVM|nvme.CAPCSSIOCS || cap.DSTRD() != 0 || cap.MPSMIN() != 0 || cap.MPSMAX() != 4 || !cap.NSSRS() ||
		cap.TO() == 0 || cap.AMS() != nvme.CAPAMSWeighted || cap.BPS() || cap.CPS() != 0 || cap.PMRS() || cap.CMBS() || cap.NSSS() || cap.CRMS() != nvme.CAPCRMSMedia {
		t.Error(cap)
	}
	if lo, hi := h.readReg(nvme.RegCAP, 4), h.readReg(nvme.RegCAP+4, 4); lo|hi<<32 != uint64(cap) {
		t.Errorf("CAP in halves %#x %#x, whole %#x", lo, hi, uint64(cap))
	}
	for i := range uint64(8) {
		if got := h.readReg(i, 1); got != uint64(cap)>>(8*i)&0xff {
			t.Errorf("byte %d of CAP: %#x", i, got)
		}
	}
	if got := h.readReg(2, 2); got != uint64(cap)>>16&0xffff {
		t.Errorf("upper half of CAP.lo: %#x", got)
	}
	if v := nvme.Version(h.readReg(nvme.RegVS, 4)); v.Major() != 2 || v.Minor() != 0 {
		t.Errorf("VS %v", v)
	}
	if v := h.readReg(nvme.RegCRTO, 4); v != uint64(cap.TO()) {
		t.Errorf("CRTO %#x, want CRWMT as CAP.TO and no CRIMT", v)
	}
	for _, off := range []uint64{nvme.RegCMBLOC, nvme.RegCMBSZ, nvme.RegBPINFO, nvme.RegBPMBL, nvme.RegCMBMSC, nvme.RegNSSD, nvme.RegPMRCAP, nvme.RegNSSR} {
		if v := h.readReg(off, 4); v != 0 {
			t.Errorf("%s is %#x", nvme.RegisterName(uint32(off)), v)
		}
	}
}

func TestReadOnlyAndReserved(t *testing.T) {
	h := newHost(t, testConfig())
	for _, off := range []uint64{nvme.RegCAP, nvme.RegVS, 0x18, nvme.RegCMBLOC, nvme.RegBPINFO, nvme.RegCRTO, nvme.RegPMRCAP, 0xff8} {
		was := h.readReg(off, 4)
		h.writeReg(off, 4, 0xffffffff)
		if got := h.readReg(off, 4); got != was {
			t.Errorf("register %#x: %#x became %#x", off, was, got)
		}
	}
	h.writeReg(nvme.RegAQA, 4, 0xffffffff)
	h.writeReg(nvme.RegASQ, 8, ^uint64(0))
	h.writeReg(nvme.RegACQ, 8, ^uint64(0))
	h.writeReg(nvme.RegCC, 4, 0xff00000e)
	for off, want := range map[uint64]uint64{nvme.RegAQA: 0x0fff0fff, nvme.RegASQ: ^uint64(0xfff), nvme.RegACQ: ^uint64(0xfff), nvme.RegCC: 0} {
		if got := h.readReg(off, 4); got != want&(1<<32-1) {
			t.Errorf("register %#x: %#x, want %#x", off, got, want)
		}
	}
}

func TestQueueBaseInHalves(t *testing.T) {
	h := newHost(t, testConfig())
	h.writeReg(nvme.RegASQ+4, 4, 0x12)
	h.writeReg(nvme.RegASQ, 4, 0x34567fff)
	if got := h.readReg(nvme.RegASQ, 8); got != 0x1234567000 {
		t.Errorf("high half first: %#x", got)
	}
	h.writeReg(nvme.RegACQ, 4, 0x89abc000)
	h.writeReg(nvme.RegACQ+4, 4, 0x7)
	if got := h.readReg(nvme.RegACQ, 8); got != 0x789abc000 {
		t.Errorf("low half first: %#x", got)
	}
	h.writeReg(nvme.RegACQ+5, 1, 0xcd)
	h.writeReg(nvme.RegACQ+2, 2, 0x1111)
	if got := h.readReg(nvme.RegACQ, 8); got != 0xcd071111c000 {
		t.Errorf("bytes: %#x", got)
	}
}

func TestInterruptMask(t *testing.T) {
	h := newHost(t, testConfig())
	h.writeReg(nvme.RegINTMS, 4, 0x0f)
	h.writeReg(nvme.RegINTMS+3, 1, 0x80)
	h.writeReg(nvme.RegINTMC, 4, 0x05)
	if got := h.readReg(nvme.RegINTMS, 4); got != 0x8000000a || h.c.InterruptMask() != 0x8000000a {
		t.Errorf("INTMS %#x, mask %#x", got, h.c.InterruptMask())
	}
	if got := h.readReg(nvme.RegINTMC, 4); got != 0x8000000a {
		t.Errorf("INTMC %#x", got)
	}
	h.enable()
	h.disable()
	if h.c.InterruptMask() != 0 {
		t.Error("the mask survived a reset")
	}
}

func TestBadAccess(t *testing.T) {
	h := newHost(t, testConfig())
	for _, a := range []struct {
		off uint64
		n   int
	}{{0, 0}, {0, 3}, {0, 5}, {0, 16}, {1, 2}, {2, 4}, {4, 8}, {0x1000, 4}, {0xffc, 8}, {^uint64(0), 1}, {^uint64(0) - 7, 8}, {1 << 40, 4}} {
		p := make([]byte, a.n)
		if err := h.c.ReadReg(a.off, p); !errors.Is(err, ErrAccess) {
			t.Errorf("read %d at %#x: %v", a.n, a.off, err)
		}
		if err := h.c.WriteReg(a.off, p); !errors.Is(err, ErrAccess) {
			t.Errorf("write %d at %#x: %v", a.n, a.off, err)
		}
	}
	if err := h.c.ReadReg(0xfff, make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

func TestEnableChecks(t *testing.T) {
	for name, cc := range map[string]nvme.CC{
		"MPS":                         goodCC.WithMPS(5),
		"MPS 15":                      goodCC.WithMPS(15),
		"CSS admin":                   goodCC.WithCSS(nvme.CSSAdmin),
		"CSS 1":                       goodCC.WithCSS(1),
		"CSS 5":                       goodCC.WithCSS(5),
		"AMS":                         goodCC.WithAMS(2),
		"AMS 7":                       goodCC.WithAMS(7),
		"ASQ not aligned to the page": goodCC.WithMPS(4), // sqIOVA is 64 KiB aligned, cqIOVA is not
	} {
		h := newHost(t, testConfig())
		h.writeReg(nvme.RegAQA, 4, 0x001f001f)
		h.writeReg(nvme.RegASQ, 8, sqIOVA)
		h.writeReg(nvme.RegACQ, 8, cqIOVA)
		h.writeReg(nvme.RegCC, 4, uint64(cc))
		if st := h.csts(); st.RDY() || !st.CFS() || h.c.Enabled() || h.c.State() != "failed" {
			t.Errorf("%s: %v, %s", name, st, h.c.State())
		}
		h.disable()
		if st := h.csts(); st != 0 {
			t.Errorf("%s: after the reset %v", name, st)
		}
		h.enable()
	}
}

func TestEnableQueueMemory(t *testing.T) {
	for name, set := range map[string]func(*host){
		"ASQ outside": func(h *host) { h.writeReg(nvme.RegASQ, 8, 0x1000) },
		"ACQ outside": func(h *host) { h.writeReg(nvme.RegACQ, 8, 1<<63) },
		"ASQ over end": func(h *host) {
			h.writeReg(nvme.RegASQ, 8, ramBase+ramSize-0x1000)
			h.writeReg(nvme.RegAQA, 4, 0x00ff00ff)
		},
		"SQ of 1 entry": func(h *host) { h.writeReg(nvme.RegAQA, 4, 0x001f0000) },
		"CQ of 1 entry": func(h *host) { h.writeReg(nvme.RegAQA, 4, 0x0000001f) },
	} {
		h := newHost(t, testConfig())
		h.writeReg(nvme.RegAQA, 4, 0x001f001f)
		h.writeReg(nvme.RegASQ, 8, sqIOVA)
		h.writeReg(nvme.RegACQ, 8, cqIOVA)
		set(h)
		h.writeReg(nvme.RegCC, 4, uint64(goodCC))
		if st := h.csts(); st.RDY() || !st.CFS() {
			t.Errorf("%s: %v", name, st)
		}
		h.c.AdminKick()
	}
}

func TestEnabledRegistersAreLocked(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.writeReg(nvme.RegASQ, 8, 0x5000)
	h.writeReg(nvme.RegACQ+4, 4, 1)
	h.writeReg(nvme.RegAQA, 4, 0)
	h.ok(createCQ(1, 16, 1))
	h.writeReg(nvme.RegCC, 4, uint64(goodCC.WithMPS(3).WithIOSQES(0).WithIOCQES(5).WithCSS(7).WithAMS(1)))
	if h.readReg(nvme.RegASQ, 8) != sqIOVA || h.readReg(nvme.RegACQ, 8) != cqIOVA || h.readReg(nvme.RegAQA, 4) != 0x001f001f ||
		nvme.CC(h.readReg(nvme.RegCC, 4)) != goodCC {
		t.Error("a register in use was changed")
	}
	h.identify(nvme.CNSController, 0)
}

// The spec lets a host set the sizes of I/O queue entries when Identify has told it of them, before it creates queues.
func TestEntrySizesAfterEnable(t *testing.T) {
	h := newHost(t, testConfig())
	h.enableWith(goodCC.WithIOSQES(0).WithIOCQES(0), 0)
	h.identify(nvme.CNSController, 0)
	for _, cc := range []nvme.CC{goodCC.WithIOSQES(0).WithIOCQES(0), goodCC.WithIOSQES(7), goodCC.WithIOCQES(5)} {
		h.writeReg(nvme.RegCC, 4, uint64(cc))
		h.fails(createCQ(1, 16, 0), nvme.StatusInvalidQueueSize)
	}
	h.writeReg(nvme.RegCC, 4, uint64(goodCC))
	if !h.csts().RDY() {
		t.Fatal(h.csts())
	}
	h.ok(createCQ(1, 16, 0))
	h.ok(createSQ(1, 16, 1))
}

// Every memory page size and command set that CAP allows.
func TestPageSizes(t *testing.T) {
	for mps := range uint8(maxMPS + 1) {
		for _, css := range []uint8{nvme.CSSNVM, nvme.CSSIOCS} {
			cfg := testConfig()
			cfg.MDTSBytes = 8 << 10
			h := newHost(t, cfg)
			size := uint64(4096) << mps
			h.enableWith(goodCC.WithMPS(mps).WithCSS(css), 0x10000)
			if h.c.PageSize() != uint32(size) {
				t.Errorf("page size %d, want %d", h.c.PageSize(), size)
			}
			want := h.identify(nvme.CNSController, 0)
			// Over the border of two memory pages: PRP2 is the second.
			cmd := identifyCmd(nvme.CNSController, 0)
			cmd.PRP1, cmd.PRP2 = ramBase+0x50000-8, ramBase+0x80000
			h.ok(cmd)
			got := make([]byte, nvme.IdentifySize)
			if !h.mem.ReadIOVA(cmd.PRP1, got[:8]) || !h.mem.ReadIOVA(cmd.PRP2, got[8:]) || !bytes.Equal(got, want) {
				t.Errorf("pages of %d: data over the border is wrong", size)
			}
			if mps > 0 {
				cmd.PRP2 += 0x1000
				h.fails(cmd, nvme.StatusPRPOffsetInvalid)
				create := createCQ(1, 16, 0)
				create.PRP1 = ramBase + 0x51000
				h.fails(create, nvme.StatusPRPOffsetInvalid)
			}
			for _, iova := range []uint64{ramBase + 0x60000, ramBase + 0x70000} {
				if err := h.mem.r.Zero(iova-ramBase, size); err != nil {
					t.Fatal(err)
				}
			}
			h.ok(doorbellConfig(nvme.AdminDoorbellBufferConfig, ramBase+0x60000, ramBase+0x70000))
			if h.dp.shadow.Len() != size {
				t.Errorf("doorbell page of %d bytes, memory page of %d", h.dp.shadow.Len(), size)
			}
		}
	}
}

// CC written a byte at a time, as a 2-byte and an 8-byte access.
func TestEnableWithOtherWidths(t *testing.T) {
	h := newHost(t, testConfig())
	h.writeReg(nvme.RegAQA, 4, 0x001f001f)
	h.writeReg(nvme.RegASQ, 8, sqIOVA)
	h.writeReg(nvme.RegACQ, 8, cqIOVA)
	h.writeReg(nvme.RegCC+2, 2, 0x0046)
	if h.csts().RDY() {
		t.Fatal("ready without EN")
	}
	h.writeReg(nvme.RegCC, 1, 1)
	if !h.csts().RDY() {
		t.Fatalf("EN by a byte: %v", h.csts())
	}
	h.writeReg(nvme.RegINTMC, 8, 0)
	if h.csts() != 0 {
		t.Fatalf("EN=0 by 8 bytes at INTMC: %v", h.csts())
	}
	h.writeReg(nvme.RegINTMC, 8, uint64(goodCC)<<32)
	if !h.csts().RDY() {
		t.Fatalf("EN=1 by 8 bytes at INTMC: %v", h.csts())
	}
}

func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newEnabled(t, testConfig())
		h.dp.flushing = make(chan struct{})
		h.writeReg(nvme.RegCC, 4, uint64(goodCC.WithSHN(nvme.SHNNormal)))
		synctest.Wait()
		if st := h.csts(); st.SHST() != nvme.SHSTOccurs || h.c.Shutdown() {
			t.Errorf("while the flush is going on: %v", st)
		}
		close(h.dp.flushing)
		synctest.Wait()
		if st := h.csts(); st.SHST() != nvme.SHSTComplete || !st.RDY() || !h.c.Shutdown() || h.c.State() != "shut down" {
			t.Errorf("after the flush: %v, %s", st, h.c.State())
		}
		h.disable()
		h.enable()
		if h.csts().SHST() != nvme.SHSTNormal {
			t.Error("SHST survived the reset")
		}
	})
}

// A driver that asks for shutdowns while a flush hangs gets one flush at a time.
func TestShutdownAgainAndAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newEnabled(t, testConfig())
		h.dp.flushing = make(chan struct{})
		h.dp.flushErr = errors.New("disk full")
		for range 100 {
			h.writeReg(nvme.RegCC, 4, uint64(goodCC.WithSHN(nvme.SHNAbrupt)))
			synctest.Wait()
			h.disable()
			h.enable()
		}
		h.writeReg(nvme.RegCC, 4, uint64(goodCC.WithSHN(nvme.SHNAbrupt)))
		close(h.dp.flushing)
		synctest.Wait()
		if !h.c.Shutdown() {
			t.Error("the last shutdown did not complete")
		}
		if h.c.flush.running {
			t.Error("the flusher runs on")
		}
	})
}

// A reserved value of SHN asks for nothing; SHN may come with the write that disables.
func TestShutdownNotifications(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newEnabled(t, testConfig())
		h.writeReg(nvme.RegCC, 4, uint64(goodCC.WithSHN(3)))
		synctest.Wait()
		if st := h.csts(); st.SHST() != nvme.SHSTNormal {
			t.Errorf("SHN 3: %v", st)
		}
		h.writeReg(nvme.RegCC, 4, uint64(goodCC.WithSHN(nvme.SHNNormal).WithEN(false)))
		synctest.Wait()
		if st := h.csts(); st.SHST() != nvme.SHSTComplete || st.RDY() {
			t.Errorf("SHN with EN=0: %v", st)
		}
	})
}

func TestShutdownWhileDisabled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t, testConfig())
		h.writeReg(nvme.RegCC, 4, uint64(nvme.CC(0).WithSHN(nvme.SHNNormal)))
		synctest.Wait()
		if h.csts().SHST() != nvme.SHSTComplete {
			t.Error(h.csts())
		}
		h.enable()
		if h.csts().SHST() != nvme.SHSTNormal {
			t.Error(h.csts())
		}
	})
}

func TestSubsystemReset(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.writeReg(nvme.RegNSSR, 4, 0x12345678)
	if !h.csts().RDY() {
		t.Fatal("a wrong value reset the subsystem")
	}
	h.writeReg(nvme.RegNSSR, 4, nvme.NSSRReset)
	if st := h.csts(); st.RDY() || !st.NSSRO() || h.readReg(nvme.RegCC, 4) != 0 || h.readReg(nvme.RegASQ, 8) != 0 {
		t.Errorf("after the reset: %v", st)
	}
	h.enable()
	h.disable()
	if !h.csts().NSSRO() {
		t.Error("NSSRO did not survive a controller reset")
	}
	h.writeReg(nvme.RegCSTS, 4, 1<<4)
	if h.csts() != 0 {
		t.Errorf("NSSRO was not cleared: %v", h.csts())
	}
}

func TestResetFromOutside(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.c.Reset()
	for _, off := range []uint64{nvme.RegCC, nvme.RegCSTS, nvme.RegAQA, nvme.RegASQ, nvme.RegACQ} {
		if v := h.readReg(off, 4); v != 0 {
			t.Errorf("register %#x is %#x after a reset", off, v)
		}
	}
	h.enable()
	h.identify(nvme.CNSController, 0)
}
