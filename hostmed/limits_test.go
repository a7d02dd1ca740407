package hostmed

import (
	"context"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
)

func TestParseLimits(t *testing.T) {
	l, err := ParseLimits("iops=2000, read_bandwidth=100MiB,iops_burst=500")
	want := Limits{IOPS: Limit{Rate: 2000, Burst: 500}, ReadBandwidth: Limit{Rate: 100 << 20}}
	if err != nil || l != want {
		t.Errorf("%+v, %v", l, err)
	}
	if s := l.String(); s != "iops=2000,iops_burst=500,read_bandwidth=100MiB" {
		t.Error(s)
	}
	for text, says := range map[string]string{
		"":                       "KEY=VALUE",
		"2000":                   "iops=2000",
		"iops=0":                 "leave it out",
		"iops=-1":                "iops",
		"iops=2k":                "2000 (commands)",
		"iops=1,iops=2":          "twice",
		"bandwith=1MiB":          "read_bandwidth",
		"bandwidth=100":          "100MiB?",
		"write_iops_burst=5":     "give write_iops too",
		"iops=99999999999999999": "leave it out",
	} {
		if _, err := ParseLimits(text); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// reading keeps depth reads under way on namespace nsid of c until stop is called.
func reading(t *testing.T, c *guestdrv.Controller, nsid uint32, depth int) (stop func()) {
	t.Helper()
	ns, err := c.Namespace(nsid)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for range depth {
		all.Go(func() {
			buf := make([]byte, 4096)
			for ctx.Err() == nil {
				if _, err := ns.ReadAt(buf, 0); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	return func() {
		cancel()
		all.Wait()
	}
}

// TestLimitsThroughTheDoor: limits of the configuration hold, Reload and the API change and remove them while guests work, and what they do is
// counted. A limit can never be exceeded, so that is asserted by the clock; that it is used up only the bench shows.
func TestLimitsThroughTheDoor(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	const nqn, rate, burst, depth = "nqn.2026-11.org.example:limits", 500, 20, 16
	config := func(ctl, ns Limits) Config {
		return Config{Subsystems: []SubsystemConfig{{
			NQN:         nqn,
			Controllers: []ControllerConfig{{Socket: socket, Limits: ctl}},
			Namespaces:  []NamespaceConfig{{Spec: "null:size=1GiB", Limits: ns}, {Spec: "null:size=1GiB"}},
		}}}
	}
	low := Limits{ReadIOPS: Limit{Rate: rate, Burst: burst}}
	m := serve(t, config(Limits{}, low))
	c, err := guestdrv.Open(t.Context(), "vfio-user:"+socket, guestdrv.Options{Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	stats := func() Stats {
		t.Helper()
		s, err := m.Stats(socket)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	// atMost passes time in which no more than r a second are done.
	atMost := func(r float64) {
		t.Helper()
		begin, before := time.Now(), stats()
		eventually(t, "100 commands", func() bool { return stats().Reads-before.Reads >= 100 })
		did := stats().Sub(before)
		// A few had begun before.
		if most := time.Since(begin).Seconds()*r + burst + depth + 1; float64(did.Reads) > most {
			t.Errorf("%d commands in %v, at most %.0f a second", did.Reads, time.Since(begin), r)
		}
		if did.Throttled == 0 || did.ThrottledFor == 0 {
			t.Errorf("nothing was throttled: %+v", did)
		}
	}
	unlimited := func() {
		t.Helper()
		before := stats().Reads
		begin := time.Now()
		eventually(t, "more commands than any limit allows", func() bool {
			return float64(stats().Reads-before) > 2*(time.Since(begin).Seconds()*4*rate+burst)
		})
	}
	stop := reading(t, c, 1, depth)
	atMost(rate)
	if s, err := m.NamespaceStats(nqn, 1); err != nil || s.Throttled == 0 || s.ThrottledFor == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	if s, err := m.NamespaceStats(nqn, 2); err != nil || s.Throttled != 0 {
		t.Errorf("the other namespace: %+v, %v", s, err)
	}
	if err := m.Reload(config(Limits{}, Limits{})); err != nil {
		t.Fatal(err)
	}
	unlimited()
	if err := m.Reload(config(low, Limits{})); err != nil {
		t.Fatal(err)
	}
	atMost(rate)
	if err := m.SetControllerLimits(socket, Limits{IOPS: Limit{Rate: 4 * rate, Burst: burst}}); err != nil {
		t.Fatal(err)
	}
	atMost(4 * rate)
	if err := m.SetNamespaceLimits(nqn, 1, Limits{Bandwidth: Limit{Rate: rate * 4096, Burst: burst * 4096}}); err != nil {
		t.Fatal(err)
	}
	atMost(rate)
	if err := m.Reload(config(low, Limits{})); err != nil { // as the last: what the API has set stays
		t.Fatal(err)
	}
	atMost(rate)
	if err := m.SetControllerLimits(socket, Limits{}); err != nil {
		t.Fatal(err)
	}
	if err := m.SetNamespaceLimits(nqn, 1, Limits{}); err != nil {
		t.Fatal(err)
	}
	unlimited()
	// Held commands do not keep a guest from leaving.
	if err := m.SetNamespaceLimits(nqn, 1, Limits{IOPS: Limit{Rate: 1000, Burst: 1}}); err != nil {
		t.Fatal(err)
	}
	stop()
	for err, says := range map[error]string{
		m.SetControllerLimits("/nowhere", low):                       "/nowhere",
		m.SetNamespaceLimits("nqn.x", 1, low):                        "nqn.x",
		m.SetNamespaceLimits(nqn, 7, low):                            "namespace 7",
		m.SetControllerLimits(socket, Limits{IOPS: Limit{Burst: 1}}): "iops_burst",
	} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %s", err, says)
		}
	}
}
