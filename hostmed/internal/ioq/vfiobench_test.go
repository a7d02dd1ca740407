package ioq

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/hostnvme"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// quickFunction is a controller, and the machine that it is in, that ends each I/O command with success and moves no data, when Step tells it to.
type quickFunction struct{ device.Device }

func (quickFunction) MapDMA([]byte) (uint64, error) { return 1 << 40, nil }
func (quickFunction) UnmapDMA(_, _ uint64) error    { return nil }
func (f quickFunction) Sever()                      { f.Close() }

func (f quickFunction) Lookup(address string) (string, error)                  { return address, nil }
func (f quickFunction) Open(string, hostnvme.Hooks) (hostnvme.Function, error) { return f, nil }

func quickDevice(tb testing.TB) (*nvmetest.Device, backend.Backend) {
	tb.Helper()
	log := hclog.Default()
	hclog.SetDefault(hclog.NewNullLogger())
	tb.Cleanup(func() { hclog.SetDefault(log) })
	m := nvmetest.New(nvmetest.Config{
		Manual: true, Namespaces: []nvmetest.Namespace{{Blocks: 1 << 20, LBADS: 9}},
		Hooks: nvmetest.Hooks{Command: func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
			if qid == 0 {
				return nvmetest.Verdict{}
			}
			return nvmetest.Verdict{Action: nvmetest.Fail, Status: nvme.StatusSuccess}
		}},
	})
	tb.Cleanup(m.Close)
	dev, err := hostnvme.OpenOn(tb.Context(), quickFunction{m.InProc()}, tb.Name(), hostnvme.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	be, err := backend.OverDevice(backend.Spec{Kind: backend.KindVFIO, Path: tb.Name(), Poll: true}, dev)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := be.Close(); err != nil {
			tb.Error(err)
		}
	})
	return m, be
}

// BenchmarkVFIO is what a 4 KiB read of a vfio: namespace costs hostmed's core from the guest's SQ to its CQ: fetched, checked, translated, given the device's addresses, put
// in the device's SQ and shown by a doorbell in memory; then taken from the device's CQ and posted in the guest's. Guest and device take no part: they
// run in turn with the worker, on its thread, and their time is not counted. "worker-ns/io" is all of it, of the chunk of commands that only one in
// twenty was faster than; "to-device" and "back" are its halves.
func BenchmarkVFIO(b *testing.B) {
	for _, qd := range []int{1, 32} {
		b.Run(fmt.Sprintf("qd=%d", qd), func(b *testing.B) {
			m, be := quickDevice(b)
			r := newRig(b, rigConfig{backend: be, shadow: true})
			p := r.pair(1, 256, false)
			be.(backend.Pinner).AwaitMemory()
			x, spaces := uint64(1), be.Info().Blocks/8
			push := func() error {
				for i := range qd {
					x ^= x << 13
					x ^= x >> 7
					x ^= x << 17
					p.push(rw(nvme.IORead, x%spaces*8, 8, base+dataOff+uint64(i)<<12))
				}
				return p.tail.Publish(p.sq.Tail())
			}
			take := func() error {
				for i := range qd {
					e, ok := p.cq.Next()
					if !ok || !e.Status().OK() {
						return fmt.Errorf("completion %d of %d: %v, %v", i, qd, ok, e.Status())
					}
					if err := p.sq.Released(e.SQHead()); err != nil {
						return err
					}
				}
				return p.head.Publish(p.cq.Head())
			}
			const chunk = 512 // commands
			type times struct{ there, back time.Duration }
			var chunks []times
			var err error
			w := r.workers[0]
			w.Call(func() {
				g := r.ctl.cqs[1].Load()
				w.resume(g)
				clock := time.Duration(clockCost())
				for b.Loop() && err == nil {
					var t times
					for i := 0; i < chunk && err == nil; i += qd {
						if err = push(); err != nil {
							break
						}
						begin := time.Now()
						for fetched := 0; fetched < qd; { // a batch of 16 at a time
							fetched += w.poll(g)
						}
						t.there += time.Since(begin) - clock
						m.Step()
						begin = time.Now()
						for reaped := 0; reaped < qd; {
							reaped += w.reap()
						}
						w.postAll()
						w.endSample()
						t.back += time.Since(begin) - clock
						err = take()
					}
					chunks = append(chunks, t)
				}
			})
			if err != nil {
				b.Fatal(err)
			}
			at := func(of func(times) time.Duration) float64 {
				var all []time.Duration
				for _, t := range chunks {
					all = append(all, of(t))
				}
				slices.Sort(all)
				return float64(all[len(all)/20].Nanoseconds()) / chunk
			}
			b.ReportMetric(at(func(t times) time.Duration { return t.there + t.back }), "worker-ns/io")
			b.ReportMetric(at(func(t times) time.Duration { return t.there }), "to-device-ns/io")
			b.ReportMetric(at(func(t times) time.Duration { return t.back }), "back-ns/io")
			c := be.(backend.Counted).Counts()
			if c.Bounced != 0 || c.Mapped != c.Commands {
				b.Fatalf("%+v", c)
			}
			b.ReportMetric(float64(c.Doorbells)/float64(c.Commands), "mmio/io")
		})
	}
}
