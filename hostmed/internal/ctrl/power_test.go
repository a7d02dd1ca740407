package ctrl

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestPowerStates(t *testing.T) {
	h := newEnabled(t, testConfig())
	id := h.controller()
	if id.NPSS.Count() != 3 || id.APSTA != 1 {
		t.Errorf("NPSS %d APSTA %d", id.NPSS, id.APSTA)
	}
	for i, p := range id.PSD {
		if i > int(id.NPSS) && p != (nvme.PowerState{}) {
			t.Errorf("power state %d beyond NPSS: %+v", i, p)
		}
		if i == 0 || i > int(id.NPSS) {
			continue
		}
		// Each state draws no more than the one before. NVMe Base 2.0c 8.15.
		if p.MaxPowerMilliwatts() >= id.PSD[i-1].MaxPowerMilliwatts() || p.RRT > uint8(id.NPSS) || p.RWL > uint8(id.NPSS) {
			t.Errorf("power state %d: %+v after %+v", i, p, id.PSD[i-1])
		}
	}
	// I/O leads out of an idle state to the one before it.
	stats := IOStats{}
	h.c.cfg.Stats = func() IOStats { return stats }
	for _, ps := range []uint32{1, 2 | 3<<5} {
		h.ok(setFeature(nvme.FeaturePowerManagement, 0, ps))
		if got := h.ok(getFeature(nvme.FeaturePowerManagement, 0, 0, 0)); got != ps {
			t.Errorf("power management %#x, want %#x", got, ps)
		}
	}
	stats.ReadCommands++
	if got := h.ok(getFeature(nvme.FeaturePowerManagement, 0, 0, 0)); got != 1|3<<5 {
		t.Errorf("after I/O in state 2: %#x, want state 1 and the same workload hint", got)
	}
	h.disable()
	h.enable()
	if got := h.ok(getFeature(nvme.FeaturePowerManagement, 0, 0, 0)); got != 0 {
		t.Errorf("after a reset: %#x", got)
	}
}

func (h *host) controller() *nvme.IdentifyController {
	h.Helper()
	id := new(nvme.IdentifyController)
	copy(id.Bytes()[:], h.identify(nvme.CNSController, 0))
	return id
}

// setAPST sends a table.
func (h *host) setAPST(table []uint64, cdw11 uint32) nvme.Command {
	b := make([]byte, apstBytes)
	for i, e := range table {
		binary.LittleEndian.PutUint64(b[8*i:], e)
	}
	if !h.mem.WriteIOVA(dataIOVA, b) {
		h.Fatal("data buffer")
	}
	return setFeature(nvme.FeatureAPST, 0, cdw11)
}

func TestAPST(t *testing.T) {
	h := newEnabled(t, testConfig())
	get := func(sel nvme.FeatureSelect) (on uint32, first uint64) {
		on = h.ok(getFeature(nvme.FeatureAPST, 0, sel, 0))
		return on, binary.LittleEndian.Uint64(h.data(apstBytes))
	}
	if on, e := get(nvme.FeatureCurrent); on != 0 || e != 0 {
		t.Errorf("at first %d %#x", on, e)
	}
	const idle = 2<<3 | 100<<8 // after 100 ms to state 2
	h.ok(h.setAPST([]uint64{idle | 7, idle}, 1))
	if on, e := get(nvme.FeatureCurrent); on != 1 || e != idle {
		t.Errorf("set: %d %#x", on, e)
	}
	if on, e := get(nvme.FeatureSaved); on != 0 || e != 0 {
		t.Errorf("saved: %d %#x", on, e)
	}
	h.ok(saved(h.setAPST([]uint64{idle}, 1)))
	h.ok(h.setAPST(nil, 0))
	if on, e := get(nvme.FeatureCurrent); on != 0 || e != 0 {
		t.Errorf("turned off: %d %#x", on, e)
	}
	h.disable()
	h.enable()
	for sel, want := range map[nvme.FeatureSelect]uint64{nvme.FeatureCurrent: idle, nvme.FeatureSaved: idle, nvme.FeatureDefault: 0} {
		if on, e := get(sel); on != uint32(min(want, 1)) || e != want {
			t.Errorf("select %d after a reset: %d %#x, want %#x", sel, on, e, want)
		}
	}
	for name, e := range map[string]uint64{"no such state": 3<<3 | 1<<8, "an operational state": 1<<3 | 1<<8} {
		t.Run(name, func(t *testing.T) {
			h.TB = t
			h.fails(h.setAPST([]uint64{e}, 1), nvme.StatusInvalidField)
		})
	}
	h.TB = t
	h.ok(h.setAPST([]uint64{3 << 3, 0, 0, 1<<3 | 1<<8}, 1)) // a time of 0 is no transition, state 3 does not exist
	if on, e := get(nvme.FeatureCurrent); on != 1 || e != 0 {
		t.Errorf("no transitions: %d %#x", on, e)
	}
}

func TestHostBehavior(t *testing.T) {
	h := newEnabled(t, testConfig())
	set := func(b ...byte) nvme.Command {
		p := make([]byte, 512)
		copy(p, b)
		if !h.mem.WriteIOVA(dataIOVA, p) {
			t.Fatal("data buffer")
		}
		return setFeature(nvme.FeatureHostBehavior, 0, 0)
	}
	h.ok(set(1, 1, 1, 0, 9))
	h.ok(getFeature(nvme.FeatureHostBehavior, 0, 0, 0))
	if p := h.data(512); p[0] != 1 || p[1] != 1 || p[2] != 1 || p[4] != 0 {
		t.Errorf("% x", p[:8])
	}
	for i := range 3 {
		b := make([]byte, 3)
		b[i] = 2
		h.fails(set(b...), nvme.StatusInvalidField)
	}
	h.ok(getFeature(nvme.FeatureHostBehavior, 0, nvme.FeatureDefault, 0))
	if p := h.data(512); p[0] != 0 {
		t.Errorf("default % x", p[:8])
	}
	h.disable()
	h.enable()
	h.ok(getFeature(nvme.FeatureHostBehavior, 0, 0, 0))
	if p := h.data(512); p[0] != 0 {
		t.Errorf("after a reset % x", p[:8])
	}
}

func TestKeepAlive(t *testing.T) {
	keepAlive := nvme.Command{Opcode: nvme.AdminKeepAlive}
	for name, tt := range map[string]struct {
		do      func(*host)
		expires bool
	}{
		"off":           {func(h *host) { time.Sleep(time.Hour) }, false},
		"off again":     {func(h *host) { h.ok(setFeature(nvme.FeatureKeepAlive, 0, 0)); time.Sleep(time.Hour) }, false},
		"in time":       {func(h *host) { time.Sleep(2900 * time.Millisecond) }, false},
		"too late":      {func(h *host) { time.Sleep(3100 * time.Millisecond) }, true},
		"set again":     {func(h *host) { h.ok(setFeature(nvme.FeatureKeepAlive, 0, 9000)); time.Sleep(8 * time.Second) }, false},
		"after a reset": {func(h *host) { h.disable(); h.enable(); time.Sleep(time.Hour) }, false},
		"shut down":     {func(h *host) { h.shutDown(); time.Sleep(time.Hour) }, false},
		"kept alive": {func(h *host) {
			for range 10 {
				time.Sleep(2 * time.Second)
				h.ok(keepAlive)
			}
		}, false},
		"other commands do not count": {func(h *host) {
			for range 2 {
				time.Sleep(1900 * time.Millisecond)
				h.c.AdminKick()
				if h.csts().RDY() && !h.csts().CFS() {
					h.identify(nvme.CNSController, 0)
				}
			}
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newEnabled(t, testConfig())
				h.ok(keepAlive) // without a timer it means nothing
				if name != "off" {
					h.ok(setFeature(nvme.FeatureKeepAlive, 0, 2001)) // rounded up to 3 s
				}
				h.dp.calls = nil
				tt.do(h)
				synctest.Wait()
				h.c.AdminKick()
				if st := h.csts(); st.CFS() != tt.expires || h.c.Enabled() == tt.expires {
					t.Fatalf("%v, enabled %v", st, h.c.Enabled())
				}
				if !tt.expires {
					return
				}
				if !h.dp.called("Stop") {
					t.Error("I/O goes on")
				}
				h.disable()
				h.enable()
				if e := h.errorEntries(1)[0]; e.Status() != nvme.StatusKeepAliveExpired || e.SQID != 0xffff || e.CID != 0xffff {
					t.Errorf("error log %+v", e)
				}
			})
		})
	}
	if got := keepAliveTimeout(1<<32 - 1); got < 1<<32-2000 {
		t.Errorf("the longest time became %d", got)
	}
}
