package ctrl

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestCapabilities(t *testing.T) {
	h := newHost(t, testConfig())
	cap := nvme.CAP(h.readReg(nvme.RegCAP, 8))
	if cap.MQES().Count() != 4096 || !cap.CQR() || cap.CSS() != nvme.CAPCSSNVM || cap.DSTRD() != 0 || cap.MPSMIN() != 0 || !cap.NSSRS() || cap.TO() == 0 {
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
	if v := nvme.Version(h.readReg(nvme.RegVS, 4)); v.Major() != 1 || v.Minor() != 4 {
		t.Errorf("VS %v", v)
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
		"IOSQES":  goodCC.WithIOSQES(5),
		"IOCQES":  goodCC.WithIOCQES(0),
		"MPS":     goodCC.WithMPS(1),
		"CSS":     goodCC.WithCSS(nvme.CSSAdmin),
		"CSS all": goodCC.WithCSS(nvme.CSSIOCS),
		"AMS":     goodCC.WithAMS(1),
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
	h.writeReg(nvme.RegCC, 4, uint64(goodCC.WithMPS(3).WithIOSQES(0).WithCSS(7)))
	if h.readReg(nvme.RegASQ, 8) != sqIOVA || h.readReg(nvme.RegACQ, 8) != cqIOVA || h.readReg(nvme.RegAQA, 4) != 0x001f001f ||
		nvme.CC(h.readReg(nvme.RegCC, 4)) != goodCC {
		t.Error("a register in use was changed")
	}
	h.identify(nvme.CNSController, 0)
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
