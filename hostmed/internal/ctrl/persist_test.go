package ctrl

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/internal/state"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// countingStore is a store that can be full.
type countingStore struct {
	state.Store
	mu  sync.Mutex // guards n and err
	n   int
	err error
}

func (s *countingStore) Save(key string, v any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	if s.err != nil {
		return s.err
	}
	return s.Store.Save(key, v)
}

// saves returns how many there were when all that is due is done.
func (s *countingStore) saves() int {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

func (s *countingStore) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func openPersistent(t testing.TB, store state.Store) *Persistent {
	t.Helper()
	p, err := OpenPersistent(store, "ctrl-SB0001", hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// connect is a client of a controller that keeps things in p.
func connect(t testing.TB, p *Persistent, stats *IOStats) *host {
	cfg := testConfig()
	cfg.Persistent = p
	cfg.Stats = func() IOStats { return *stats }
	return newEnabled(t, cfg)
}

func (h *host) smart() *nvme.SMARTLog {
	h.Helper()
	l := new(nvme.SMARTLog)
	copy(l.Bytes()[:], h.log(nvme.LogSMART, 512, true))
	return l
}

func saved(cmd nvme.Command) nvme.Command {
	cmd.CDW10 |= 1 << 31
	return cmd
}

func (h *host) shutDown() {
	h.writeReg(nvme.RegCC, 4, uint64(goodCC.WithSHN(nvme.SHNNormal)))
	synctest.Wait()
	if st := h.csts(); st.SHST() != nvme.SHSTComplete {
		h.Fatal(st)
	}
}

func TestPersistsOverClients(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		store, err := state.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer store.Close()
		p := openPersistent(t, store)
		stats := IOStats{ReadBytes: 512_000, WriteBytes: 1_024_000, ReadCommands: 5, WriteCommands: 6, MediaErrors: 1, Busy: time.Minute}
		h := connect(t, p, &stats)
		h.fails(nvme.Command{Opcode: 0xff}, nvme.StatusInvalidOpcode)
		h.ok(saved(setFeature(nvme.FeatureArbitration, 0, 3)))
		h.ok(saved(setFeature(nvme.FeatureErrorRecovery, nvme.NSIDAll, 9)))
		h.ok(setFeature(nvme.FeatureArbitration, 0, 4))
		time.Sleep(3*time.Hour + time.Minute)
		h.shutDown()
		h.c.Close()

		check := func(h *host, cycles, unsafe, units, errs uint64) {
			t.Helper()
			if l := h.smart(); l.PowerCycles.Lo != cycles || l.UnsafeShutdowns.Lo != unsafe || l.PowerOnHours.Lo != 3 || l.DataUnitsRead.Lo != units ||
				l.DataUnitsWritten.Lo != 2*units || l.HostReads.Lo != 5*units || l.HostWrites.Lo != 6*units || l.MediaErrors.Lo != units || l.BusyMinutes.Lo != units ||
				l.ErrorLogEntries.Lo != errs {
				t.Errorf("%d cycles: %+v", cycles, l)
			}
			if e := h.errorEntries(1)[0]; e.Count != errs || e.Status().Code() != nvme.StatusInvalidOpcode {
				t.Errorf("error log %+v", e)
			}
			if v := h.ok(getFeature(nvme.FeatureArbitration, 0, nvme.FeatureCurrent, 0)); v != 3 {
				t.Errorf("arbitration %d, saved was 3", v)
			}
			if v := h.ok(getFeature(nvme.FeatureErrorRecovery, 3, nvme.FeatureSaved, 0)); v != 9 {
				t.Errorf("error recovery of namespace 3: %d, saved was 9", v)
			}
		}
		h = connect(t, p, &stats) // it does the same again, and goes without a word
		check(h, 2, 0, 2, 1)
		h.fails(nvme.Command{Opcode: 0xff}, nvme.StatusInvalidOpcode)
		h.c.Close()
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}

		stats = IOStats{}
		p = openPersistent(t, store) // hostmed is started again
		h = connect(t, p, &stats)
		check(h, 3, 1, 2, 2)
		time.Sleep(2 * saveAfter)
		// hostmed is killed: nothing is closed
		p = openPersistent(t, store)
		h = connect(t, p, &stats)
		check(h, 4, 2, 2, 2)
		h.shutDown()
		h.c.Close()
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		h = connect(t, openPersistent(t, store), &stats)
		check(h, 5, 2, 2, 2)
		h.c.Close()
	})
}

// A client that never enables the controller can lose nothing.
func TestUnsafeShutdown(t *testing.T) {
	for name, tt := range map[string]struct {
		do   func(*host)
		want uint64
	}{
		"never enabled":               {func(*host) {}, 0},
		"enabled":                     {func(h *host) { h.enable() }, 1},
		"disabled":                    {func(h *host) { h.enable(); h.disable() }, 1},
		"shut down":                   {func(h *host) { h.enable(); h.shutDown() }, 0},
		"shut down and reset":         {func(h *host) { h.enable(); h.shutDown(); h.c.Reset() }, 0},
		"shut down and enabled":       {func(h *host) { h.enable(); h.shutDown(); h.disable(); h.enable() }, 1},
		"flush of the shutdown fails": {func(h *host) { h.enable(); h.dp.flushErr = errors.New("full"); h.shutDown() }, 1},
		"nobody looked": {func(h *host) {
			h.enable()
			h.writeReg(nvme.RegCC, 4, uint64(goodCC.WithSHN(nvme.SHNAbrupt)))
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := testConfig()
				cfg.Persistent = openPersistent(t, nil)
				h := newHost(t, cfg)
				tt.do(h)
				h.c.Close()
				if got := cfg.Persistent.v.UnsafeShutdowns; got != tt.want {
					t.Errorf("%d unsafe shutdowns, want %d", got, tt.want)
				}
			})
		})
	}
}

// However much happens, a save comes once in saveAfter; when nothing happens, none comes but that of the time that passes.
func TestSavesAreLazy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &countingStore{Store: state.NewMemory()}
		p := openPersistent(t, store)
		h := connect(t, p, new(IOStats))
		h.c.cfg.IOErrors = func() ([]IOError, uint64) { return []IOError{{SQID: 1, Status: nvme.StatusLBAOutOfRange}}, 1 }
		time.Sleep(saveAfter + time.Second)
		was := store.saves()
		for range 10_000 {
			h.c.takeIOErrors()
		}
		if store.saves() != was {
			t.Errorf("%d saves while the session waited", store.saves()-was)
		}
		time.Sleep(saveAfter + time.Second)
		if store.saves() != was+1 {
			t.Errorf("%d saves of 10000 errors", store.saves()-was)
		}
		was = store.saves()
		store.fail(errors.New("no room"))
		h.c.takeIOErrors()
		time.Sleep(saveAfter + time.Second)
		if store.saves() != was+1 || !p.failed {
			t.Errorf("%d saves, failed %v", store.saves()-was, p.failed)
		}
		store.fail(nil)
		h.c.cfg.IOErrors = func() ([]IOError, uint64) { return nil, 0 }
		h.c.Close()
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if n := openPersistent(t, store).v.ErrorCount; n != 10_001 {
			t.Errorf("%d errors were saved, want 10001", n)
		}
		was = store.saves()
		h.c.takeIOErrors()
		time.Sleep(time.Hour)
		if store.saves() != was {
			t.Error("a save after Close")
		}
	})
}

// The minutes of a client that does nothing but live are counted.
func TestSampleWhileRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := openPersistent(t, state.NewMemory())
		stats := new(IOStats)
		h := connect(t, p, stats)
		stats.WriteCommands = 77
		for range 5 {
			time.Sleep(samplePeriod)
			h.c.AdminKick()
		}
		if p.v.IO.WriteCommands != 77 || p.v.PowerOn < 4*time.Minute {
			t.Errorf("%+v", p.v)
		}
		h.c.Close()
	})
}

func TestPersistentOfACorruptFile(t *testing.T) {
	dir := t.TempDir()
	store, err := state.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	for _, content := range []string{"", `{"version":1,"key":"ctrl-SB0001","data":{"powerCycles":5,"features":{"nonsense":1}}}`} {
		if err := os.WriteFile(filepath.Join(dir, "ctrl-SB0001.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		p := openPersistent(t, store)
		if p.v.PowerCycles != 0 || len(p.v.Features) != 0 {
			t.Errorf("%q was read as %+v", content, p.v)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := OpenPersistent(store, "a/b", hclog.NewNullLogger()); err == nil {
		t.Error("a key that is a path")
	}
}

func TestFeatureKeyText(t *testing.T) {
	want := map[featureKey]uint32{{nvme.FeatureTemperature, 1}: 5, {nvme.FeatureWriteProtect, 1<<32 - 1}: 6, {fid: nvme.FeatureArbitration}: 7}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got map[featureKey]uint32
	if err := json.Unmarshal(b, &got); err != nil || !maps.Equal(got, want) {
		t.Errorf("%s: %v, %v", b, got, err)
	}
	for _, bad := range []string{"", "4", "4/", "/4", "100/1", "xx/1", "04/4294967296", "04/1/2"} {
		if err := new(featureKey).UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q is a feature", bad)
		}
	}
}
