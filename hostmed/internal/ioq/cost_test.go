package ioq

import (
	"math"
	"slices"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// sampleAll makes w measure each batch.
func (w *Worker) sampleAll() {
	w.Call(func() { w.cost.every, w.cost.left, w.cost.back = 1, 1, 1 })
}

// near says that n commands were measured, but for those during which the thread was away: many, on a busy machine under the race detector.
func near(p Phase, n uint64) bool { return p.Commands <= n && p.Commands >= n/8 && p.Time > 0 }

// TestCosts measures every batch and finds every command in each phase.
func TestCosts(t *testing.T) {
	for name, b := range map[string]backend.Backend{
		"at once": openBackend(t, "mem:size=16MiB"),
		"later":   &slow{info: openBackend(t, "null:size=1GiB").Info()},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{deaf: true, shadow: true, backend: b})
			r.workers[0].sampleAll()
			p, quiet := r.pair(1, 64, true), r.pair(2, 64, false)
			const n = 640
			for range n / 8 {
				for _, q := range []*pair{p, quiet} {
					for i := range 8 {
						q.push(rw(nvme.IORead, uint64(i), 8, base+dataOff))
					}
					q.publish()
				}
				if s, ok := b.(*slow); ok {
					r.eventually("the medium has them", func() bool { return s.held() == 16 })
					s.finish(16)
				}
				p.reap(8)
				quiet.reap(8)
			}
			c := r.ctl.Stats().Costs
			if !near(c.Translate, 2*n) || !near(c.Submit, 2*n) || !near(c.Complete, 2*n) || !near(c.Interrupt, n) {
				t.Errorf("of %d commands, half of them with interrupts: %+v", 2*n, c)
			}
			r.ctl.DeleteSQ(1)
			r.ctl.DeleteCQ(1)
			if after := r.ctl.Stats().Costs; after != c {
				t.Errorf("after a queue is gone: %+v, before %+v", after, c)
			}
			r.noError()
		})
	}
}

// TestCostsOfEach has two controllers on one worker and one medium, whose commands come back together.
func TestCostsOfEach(t *testing.T) {
	s := &slow{info: openBackend(t, "null:size=1GiB").Info()}
	r := newRig(t, rigConfig{deaf: true, shadow: true, backend: s})
	other, err := NewController(Config{
		Workers: r.workers, Home: r.workers[0], Memory: r.mem, MaxQueues: 8, Vectors: 9, MDTSBytes: 1 << 20,
		Namespaces: []ctrl.Namespace{{NSID: 1, Backend: s, Info: s.Info()}}, PageSize: func() uint32 { return 4096 }, OnAdmin: func() {}, OnError: func(QueueError) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	defer s.finish(64)
	second := &rig{t: t, workers: r.workers, mem: r.mem, ctl: other, guest: r.guest, errs: r.errs, next: 0x80000}
	p, q := r.pair(1, 64, false), second.pair(1, 64, false)
	r.workers[0].sampleAll()
	const laps = 50
	for range laps {
		for i := range 4 {
			p.push(rw(nvme.IORead, uint64(i), 8, base+dataOff))
			if i < 2 {
				q.push(rw(nvme.IORead, uint64(i), 8, base+dataOff))
			}
		}
		p.publish()
		q.publish()
		r.eventually("the medium has them", func() bool { return s.held() == 6 })
		s.finish(6)
		p.reap(4)
		q.reap(2)
	}
	if a, b := r.ctl.Stats().Costs, other.Stats().Costs; !near(a.Complete, 4*laps) || !near(b.Complete, 2*laps) || !near(a.Submit, 4*laps) || !near(b.Submit, 2*laps) {
		t.Errorf("of %d and %d commands: %+v, %+v", 4*laps, 2*laps, a, b)
	}
}

func TestSampleEvery(t *testing.T) {
	for _, clock := range []int64{0, 1, 20, 45, 300, 1500, 1 << 40} {
		every := sampleEvery(clock)
		if cost := float64(sampleReads*clock) / float64(every); clock < 1<<20 && cost > float64(leastCommand)/samplePart {
			t.Errorf("a clock of %d ns: one batch in %d: %.3f ns for each", clock, every, cost)
		}
		s := sampler{every: every, seed: 1}
		sum := 0.0
		for range 1000 {
			n := s.next()
			if n == 0 || uint64(n) > 2*uint64(every) {
				t.Fatalf("one in %d: %d are left out", every, n)
			}
			sum += float64(n)
		}
		if mean := sum / 1000 / float64(every); math.Abs(mean-1) > 0.1 {
			t.Errorf("one in %d is one in %.0f", every, mean*float64(every))
		}
	}
}

// BenchmarkSampling is what a worker's commands cost with the counters of phases and without, in turn: "cost-%" is the median of the
// difference between neighbours. The figures of a phase are those of all that was measured.
func BenchmarkSampling(b *testing.B) {
	for _, qd := range []int{1, 16} {
		b.Run("qd="+string(rune('0'+qd/10))+string(rune('0'+qd%10)), func(b *testing.B) {
			be := openBackend(b, "null:size=1GiB")
			r := newRig(b, rigConfig{backend: be, shadow: true})
			p := r.pair(1, 256, false)
			var err error
			var ratios []float64
			w := r.workers[0]
			w.Call(func() {
				g := r.ctl.cqs[1].Load()
				w.resume(g)
				const chunk = 1 << 15
				run := func(on bool) (spent time.Duration) {
					w.cost.left = math.MaxUint32
					if on {
						w.cost.left = w.cost.next()
					}
					for i := 0; i < chunk && err == nil; i += qd {
						var took time.Duration
						took, err = p.batch(w, g, qd)
						spent += took
					}
					return spent
				}
				for i := 0; b.Loop() && err == nil; i++ {
					on, off := run(i%2 == 0), run(i%2 == 1)
					if i%2 == 1 {
						on, off = off, on
					}
					ratios = append(ratios, 100*(float64(on)/float64(off)-1))
				}
			})
			if err != nil {
				b.Fatal(err)
			}
			slices.Sort(ratios)
			c := r.ctl.Stats().Costs
			b.ReportMetric(ratios[len(ratios)/2], "cost-%")
			b.ReportMetric(c.Translate.PerCommand(), "translate-ns")
			b.ReportMetric(c.Submit.PerCommand(), "submit-ns")
			b.ReportMetric(c.Complete.PerCommand(), "complete-ns")
			b.ReportMetric(float64(w.cost.every), "every")
			b.ReportMetric(float64(w.cost.clock), "clock-ns")
		})
	}
}

// batch has w execute qd reads of p, whose group is g, and returns how long that took.
func (p *pair) batch(w *Worker, g *group, qd int) (time.Duration, error) {
	for i := range qd {
		p.push(rw(nvme.IORead, uint64(i)*8, 8, base+dataOff+uint64(i)<<12))
	}
	if err := p.tail.Publish(p.sq.Tail()); err != nil {
		return 0, err
	}
	begin := time.Now()
	w.poll(g)
	took := time.Since(begin)
	for range qd {
		e, ok := p.cq.Next()
		if !ok || !e.Status().OK() {
			return 0, nvme.StatusInternalError.Err()
		}
		if err := p.sq.Released(e.SQHead()); err != nil {
			return 0, err
		}
	}
	return took, p.head.Publish(p.cq.Head())
}
