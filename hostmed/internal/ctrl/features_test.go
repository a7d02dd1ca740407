package ctrl

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestFeatureSelect(t *testing.T) {
	const (
		changeable = nvme.FeatureCapChangeable
		saveable   = nvme.FeatureCapChangeable | nvme.FeatureCapSaveable
	)
	h := newEnabled(t, testConfig())
	for _, tt := range []struct {
		fid       nvme.FeatureID
		nsid      uint32
		set, want uint32
		dflt      uint32
		caps      uint32
	}{
		{nvme.FeatureArbitration, 0, 0x010203fb, 0x01020303, 7, saveable},
		{nvme.FeaturePowerManagement, 0, 0x20, 0x20, 0, saveable},
		{nvme.FeatureErrorRecovery, 1, 0x1234, 0x1234, 0, saveable | nvme.FeatureCapNamespace},
		{nvme.FeatureWriteCache, 0, 0xff, 1, 1, saveable},
		{nvme.FeatureQueues, 0, 0x00020001, 0x00020001, 0x003f003f, changeable},
		{nvme.FeatureCoalescing, 0, 0xabcd0507, 0x0507, 0, saveable},
		{nvme.FeatureWriteAtomicity, 0, 1, 1, 0, saveable},
		{nvme.FeatureAsyncEvents, 0, 0xffffffff, 0x51f, 0, saveable},
		{nvme.FeatureKeepAlive, 0, 1001, 2000, 0, changeable},
		{nvme.FeatureCommandSetProfile, 0, 0xfffffe00, 0, 0, changeable},
		{nvme.FeatureQuiet, 0, 1, 1, 0, changeable},
	} {
		t.Run(tt.fid.String(), func(t *testing.T) {
			h.TB = t
			if got := h.ok(getFeature(tt.fid, tt.nsid, nvme.FeatureCurrent, 0)); got != tt.dflt {
				t.Errorf("at first %#x, want %#x", got, tt.dflt)
			}
			h.ok(setFeature(tt.fid, tt.nsid, tt.set))
			selects := func(current, saved uint32) {
				for sel, want := range map[nvme.FeatureSelect]uint32{
					nvme.FeatureCurrent: current, nvme.FeatureDefault: tt.dflt, nvme.FeatureSaved: saved, nvme.FeatureSupported: tt.caps,
				} {
					if got := h.ok(getFeature(tt.fid, tt.nsid, sel, 0)); got != want {
						t.Errorf("select %d: %#x, want %#x", sel, got, want)
					}
				}
			}
			selects(tt.want, tt.dflt)
			h.fails(getFeature(tt.fid, tt.nsid, 5, 0), nvme.StatusInvalidField)
			save := setFeature(tt.fid, tt.nsid, tt.set)
			save.CDW10 |= 1 << 31
			if tt.caps&nvme.FeatureCapSaveable == 0 {
				h.fails(save, nvme.StatusFeatureNotSaveable)
				return
			}
			h.ok(save)
			h.ok(setFeature(tt.fid, tt.nsid, tt.dflt))
			selects(tt.dflt, tt.want)
		})
	}
	h.TB = t
	h.dp.calls = nil
	h.disable()
	h.enable()
	for fid, want := range map[nvme.FeatureID]uint32{
		nvme.FeatureArbitration: 0x01020303, nvme.FeatureCoalescing: 0x0507, nvme.FeatureAsyncEvents: 0x51f, // saved
		nvme.FeatureQueues: 0x003f003f, nvme.FeatureQuiet: 0, // not
	} {
		if got := h.ok(getFeature(fid, 0, nvme.FeatureCurrent, 0)); got != want {
			t.Errorf("%v after a reset: %#x, want %#x", fid, got, want)
		}
	}
	for _, call := range []string{"SetCoalescing 7 5", "SetQuiet false"} {
		if !h.dp.called(call) {
			t.Errorf("the data path was not told %q: %q", call, h.dp.calls)
		}
	}
}

// TestArbitration has weights count where CC chose so, those that were saved too, and nowhere else.
func TestArbitration(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.ok(setFeature(nvme.FeatureArbitration, 0, 0x03020104))
	h.ok(saved(setFeature(nvme.FeatureArbitration, 0, 0x03020102)))
	for _, call := range h.dp.calls {
		if strings.HasPrefix(call, "SetArbitration") {
			t.Errorf("with round robin: %s", call)
		}
	}
	h.disable()
	h.enableWith(goodCC.WithAMS(nvme.AMSWeighted), 0)
	if !h.dp.called("SetArbitration true 0x3020102") {
		t.Errorf("the data path was not told: %q", h.dp.calls)
	}
	h.ok(setFeature(nvme.FeatureArbitration, 0, 0x010101fb))
	if !h.dp.called("SetArbitration true 0x1010103") {
		t.Errorf("the data path was not told: %q", h.dp.calls)
	}
	cmd := createSQ(1, 16, 1)
	cmd.CDW11 |= 3 << 1
	h.ok(createCQ(1, 16, 1))
	h.ok(cmd)
	if !h.dp.called("SetArbitration true 0x1010103") || h.dp.prio != 3 {
		t.Errorf("QPRIO %d", h.dp.prio)
	}
}

func TestFeatureRefuses(t *testing.T) {
	h := newEnabled(t, testConfig())
	for _, tt := range []struct {
		name string
		cmd  nvme.Command
		want nvme.Status
	}{
		{"unknown", setFeature(0xc1, 0, 0), nvme.StatusInvalidField},
		{"unknown get", getFeature(0xc1, 0, 0, 0), nvme.StatusInvalidField},
		{"host memory buffer", setFeature(nvme.FeatureHostMemoryBuffer, 0, 1), nvme.StatusInvalidField},
		{"power state 3", setFeature(nvme.FeaturePowerManagement, 0, 3), nvme.StatusInvalidField},
		{"command set profile 1", setFeature(nvme.FeatureCommandSetProfile, 0, 1), nvme.StatusCommandSetRejected},
		{"saved keep alive", saved(setFeature(nvme.FeatureKeepAlive, 0, 1000)), nvme.StatusFeatureNotSaveable},
		{"saved host behavior", saved(setFeature(nvme.FeatureHostBehavior, 0, 0)), nvme.StatusFeatureNotSaveable},
		{"APST of a controller's namespace", setFeature(nvme.FeatureAPST, 1, 0), nvme.StatusFeatureNotPerNamespace},
		{"controller feature of namespace 1", setFeature(nvme.FeatureArbitration, 1, 0), nvme.StatusFeatureNotPerNamespace},
		{"controller feature of no namespace", setFeature(nvme.FeatureArbitration, 9, 0), nvme.StatusInvalidNamespace},
		{"namespace feature of none", setFeature(nvme.FeatureErrorRecovery, 0, 0), nvme.StatusInvalidNamespace},
		{"namespace feature of no namespace", setFeature(nvme.FeatureErrorRecovery, 9, 0), nvme.StatusInvalidNamespace},
		{"namespace feature of an inactive namespace", setFeature(nvme.FeatureErrorRecovery, 2, 0), nvme.StatusInvalidField},
		{"get namespace feature of all", getFeature(nvme.FeatureErrorRecovery, nvme.NSIDAll, 0, 0), nvme.StatusInvalidNamespace},
		{"DULBE", setFeature(nvme.FeatureErrorRecovery, 1, 1<<16), nvme.StatusInvalidField},
		{"vector", setFeature(nvme.FeatureVectorConfig, 0, 65), nvme.StatusInvalidField},
		{"get vector", getFeature(nvme.FeatureVectorConfig, 0, 0, 65), nvme.StatusInvalidField},
		{"sensor 1", setFeature(nvme.FeatureTemperature, 0, 1<<16), nvme.StatusInvalidField},
		{"get sensor 1", getFeature(nvme.FeatureTemperature, 0, 0, 1<<16), nvme.StatusInvalidField},
		{"threshold type", setFeature(nvme.FeatureTemperature, 0, 2<<20), nvme.StatusInvalidField},
		{"get threshold type", getFeature(nvme.FeatureTemperature, 0, 0, 2<<20), nvme.StatusInvalidField},
		{"timestamp outside of memory", func() nvme.Command { c := setFeature(nvme.FeatureTimestamp, 0, 0); c.PRP1 = 0; return c }(), nvme.StatusDataTransferError},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h.TB = t
			h.fails(tt.cmd, tt.want)
		})
	}
}

func TestFeatureErrorRecoveryOfAll(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.ok(setFeature(nvme.FeatureErrorRecovery, nvme.NSIDAll, 5))
	h.ok(setFeature(nvme.FeatureErrorRecovery, 3, 6))
	if a, b := h.ok(getFeature(nvme.FeatureErrorRecovery, 1, 0, 0)), h.ok(getFeature(nvme.FeatureErrorRecovery, 3, 0, 0)); a != 5 || b != 6 {
		t.Errorf("namespace 1 has %d, 3 has %d", a, b)
	}
}

func TestFeatureVectorConfig(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.ok(setFeature(nvme.FeatureVectorConfig, 0, uint32(nvme.MakeVectorConfig(5, true))))
	if got := nvme.VectorConfig(h.ok(getFeature(nvme.FeatureVectorConfig, 0, 0, 5))); !got.CoalescingDisabled() || got.Vector() != 5 {
		t.Errorf("vector 5: %#x", uint32(got))
	}
	if got := nvme.VectorConfig(h.ok(getFeature(nvme.FeatureVectorConfig, 0, 0, 6))); got.CoalescingDisabled() || got.Vector() != 6 {
		t.Errorf("vector 6: %#x", uint32(got))
	}
	h.disable()
	if !h.dp.called("SetVectorConfig 5 true") || !h.dp.called("SetVectorConfig 5 false") {
		t.Errorf("the data path was told %q", h.dp.calls)
	}
}

func TestFeatureWithoutWriteCacheOrQuiet(t *testing.T) {
	cfg := testConfig()
	cfg.Namespaces = nil
	cfg.Mode = Trap
	h := newEnabled(t, cfg)
	for _, fid := range []nvme.FeatureID{nvme.FeatureWriteCache, nvme.FeatureQuiet} {
		h.fails(getFeature(fid, 0, 0, 0), nvme.StatusInvalidField)
		h.fails(setFeature(fid, 0, 1), nvme.StatusInvalidField)
	}
}

func TestTimestamp(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	h := newHost(t, testConfig())
	h.c.now = func() time.Time { return now }
	h.enable()
	h.disable()
	h.enable()
	get := func() nvme.Timestamp {
		h.ok(getFeature(nvme.FeatureTimestamp, 0, 0, 0))
		return nvme.Timestamp(h.data(8))
	}
	now = now.Add(3 * time.Second)
	if ts := get(); ts.Milliseconds() != 3000 || ts.Attributes() != 0 {
		t.Errorf("since the reset: %d ms, attributes %#x", ts.Milliseconds(), ts.Attributes())
	}
	set := nvme.MakeTimestamp(1<<40, 0)
	h.mem.WriteIOVA(dataIOVA, set[:])
	h.ok(setFeature(nvme.FeatureTimestamp, 0, 0))
	now = now.Add(1500 * time.Millisecond)
	if ts := get(); ts.Milliseconds() != 1<<40+1500 || ts.Attributes() != nvme.TimestampOriginHost<<nvme.TimestampOriginShift {
		t.Errorf("after it was set: %d ms, attributes %#x", ts.Milliseconds(), ts.Attributes())
	}
}

// The command that turns the write cache off is complete when nothing is in it any more.
func TestWriteCacheOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newEnabled(t, testConfig())
		h.dp.flushing = make(chan struct{})
		cid := h.push(saved(setFeature(nvme.FeatureWriteCache, 0, 0)))
		h.ring()
		synctest.Wait()
		h.c.AdminKick()
		if es := h.reap(); len(es) != 0 || !h.dp.called("SetWriteCache false") {
			t.Fatalf("before the flush is done: %+v, %q", es, h.dp.calls)
		}
		close(h.dp.flushing)
		synctest.Wait()
		h.c.AdminKick()
		if es := h.reap(); len(es) != 1 || es[0].CID() != cid || !es[0].Status().OK() {
			t.Errorf("%+v", es)
		}
		if v := h.ok(getFeature(nvme.FeatureWriteCache, 0, 0, 0)); v != 0 {
			t.Errorf("write cache %#x", v)
		}
		h.dp.calls = nil
		h.disable()
		if !h.dp.called("SetWriteCache true") {
			t.Errorf("disabled: %q", h.dp.calls)
		}
		h.dp.calls = nil
		h.enable()
		if !h.dp.called("SetWriteCache false") {
			t.Errorf("saved, and not applied: %q", h.dp.calls)
		}
		h.dp.flushErr = errors.New("disk full")
		h.push(setFeature(nvme.FeatureWriteCache, 0, 0))
		h.ring()
		synctest.Wait()
		h.c.AdminKick()
		if es := h.reap(); len(es) != 1 || es[0].Status().Code() != nvme.StatusInternalError {
			t.Errorf("a flush that fails: %+v", es)
		}
		cfg := testConfig()
		cfg.Namespaces = cfg.Namespaces[:1] // without a cache there is no such feature
		h = newEnabled(t, cfg)
		h.fails(setFeature(nvme.FeatureWriteCache, 0, 0), nvme.StatusInvalidField)
		h.fails(getFeature(nvme.FeatureWriteCache, 0, 0, 0), nvme.StatusInvalidField)
	})
}
