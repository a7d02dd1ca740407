package inproc_test

import (
	"math/rand/v2"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/hostmed"
)

// TestLimitsUnderLoad changes the limits of a controller and of its namespace again and again while a driver works and verifies, with queues on
// two workers.
func TestLimitsUnderLoad(t *testing.T) {
	const changes, nqn = 60, "nqn.2026-11.org.example:limits"
	for _, mode := range []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap, hostmed.Mmap} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			m := serve(t, hostmed.Config{CPUs: []int{-1, -1}, Subsystems: []hostmed.SubsystemConfig{{
				NQN:         nqn,
				Controllers: []hostmed.ControllerConfig{{Socket: name, Doorbells: mode, Limits: hostmed.Limits{IOPS: hostmed.Limit{Rate: 500}}}},
				Namespaces:  []hostmed.NamespaceConfig{{Spec: "mem:size=64MiB"}},
			}}})
			c := open(t, m, name, guestdrv.Options{Queues: 2, DMASize: 16 << 20})
			l := startLoad(t, c, 4)
			rnd := rand.New(rand.NewPCG(1, uint64(mode)))
			for i := range changes {
				at := l.good.Load()
				l.until("commands under these limits", func() bool { return l.good.Load() >= at+10 })
				x := hostmed.Limits{}
				for _, f := range x.Fields() {
					if rnd.IntN(3) > 0 {
						continue
					}
					f.Limit.Rate, f.Limit.Burst = 300+rnd.Uint64N(3000), rnd.Uint64N(100)
					if f.Bytes {
						f.Limit.Rate, f.Limit.Burst = f.Limit.Rate*loadSize, f.Limit.Burst*loadSize
					}
				}
				if err := m.SetNamespaceLimits(nqn, 1, x); err != nil {
					t.Fatal(err)
				}
				if i%2 == 0 {
					if err := m.SetControllerLimits(name, x); err != nil {
						t.Fatal(err)
					}
				}
			}
			s, err := m.Stats(name)
			if err != nil || s.Throttled == 0 || s.ThrottledFor == 0 {
				t.Errorf("%+v, %v", s, err)
			}
			l.stop()
			for _, n := range l.noted() {
				t.Error(n)
			}
		})
	}
}
