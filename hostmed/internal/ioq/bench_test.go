package ioq

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// BenchmarkRead is 4 KiB reads between a driver that does nothing but rings and a worker, on two cores if there
// are two.
func BenchmarkRead(b *testing.B) {
	for _, spec := range []string{"null:size=1GiB", "mem:size=256MiB"} {
		for _, qd := range []int{1, 32, 128} {
			b.Run(fmt.Sprintf("%s/qd=%d", spec, qd), func(b *testing.B) {
				be, err := backend.Open(spec)
				if err != nil {
					b.Fatal(err)
				}
				b.Cleanup(func() { be.Close() })
				r := newRig(b, rigConfig{backend: be, shadow: true})
				pinTo := func(cpu int) {
					var set unix.CPUSet
					set.Set(cpu % runtime.NumCPU())
					_ = unix.SchedSetaffinity(0, &set)
				}
				r.workers[0].Call(func() { pinTo(1) })
				runtime.LockOSThread() // not unlocked: the thread is pinned
				pinTo(0)
				p := r.pair(1, 1024, false)
				blocks := be.Info().Blocks / 8
				b.ReportAllocs()
				b.ResetTimer()
				out, x, unpub := 0, uint64(1), 0
				for done := 0; done < b.N; {
					for ; out < qd; out++ {
						x ^= x << 13
						x ^= x >> 7
						x ^= x << 17
						c := rw(nvme.IORead, x%blocks*8, 8, base+dataOff+uint64(out)<<12)
						p.push(c)
					}
					if unpub > 256 {
						_ = p.head.Publish(p.cq.Head())
						unpub = 0
					}
					p.publish()
					n := 0
					for n == 0 {
						for {
							e, ok := p.cq.Next()
							if !ok {
								break
							}
							if e.Status() != 0 {
								b.Fatal(e.Status())
							}
							_ = p.sq.Released(e.SQHead())
							n++
						}
					}
					out -= n
					unpub += n
					done += n
				}
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds()/1e6, "Mio/s")
				b.ReportMetric(float64(p.rings.Load())/float64(b.N), "rings/io")
			})
		}
	}
}

// BenchmarkPoll is what a command costs the worker, with a driver that takes no part in it: both run in turn on the worker's thread.
// "worker-ns/io" is of the chunk of commands that only one in twenty was faster than, and so hardly depends on what else the
// machine does; compare two binaries by it, in turn.
func BenchmarkPoll(b *testing.B) {
	for _, spec := range []string{"null:size=1GiB", "mem:size=16MiB"} {
		for _, tc := range []struct {
			op     uint8
			qd     int
			blocks uint32
			with   string // "/limited": by more than it does; "/listened": every command is recorded
		}{
			{nvme.IORead, 1, 8, ""}, {nvme.IORead, 16, 8, ""}, {nvme.IOWrite, 16, 8, ""}, {nvme.IORead, 16, 64, ""}, {nvme.IORead, 16, 8, "/limited"},
			{nvme.IORead, 1, 8, "/listened"}, {nvme.IORead, 16, 8, "/listened"},
		} {
			b.Run(fmt.Sprintf("%s/%s/qd=%d/%dk%s", spec, nvme.IOOpcodeName(tc.op), tc.qd, tc.blocks/2, tc.with), func(b *testing.B) {
				be, err := backend.Open(spec)
				if err != nil {
					b.Fatal(err)
				}
				b.Cleanup(func() { be.Close() })
				r := newRig(b, rigConfig{backend: be, shadow: true})
				if tc.with == "/listened" {
					ring, err := events.New(events.Config{})
					if err != nil {
						b.Fatal(err)
					}
					r.workers[0].Listen(NewTracing(), ring)
					b.Cleanup(func() { ring.Close() })
				}
				if tc.with == "/limited" {
					most := qos.Limit{Rate: 8 << 30, Burst: qos.MaxRate}
					r.ctl.namespace(1).of.Limiter().Set(qos.Limits{IOPS: most, Bandwidth: most}, Now())
					r.ctl.SetLimits()
				}
				p := r.pair(1, 256, false)
				const listOff, pages = 0x80000, 64 // of the PRP list that all commands share
				list := r.view(listOff, 4096)
				for i := range uint64(pages) {
					entry, err := list.Word64(8 * i)
					if err != nil {
						b.Fatal(err)
					}
					entry.Store(base + dataOff + i*5%pages<<12)
				}
				x, spaces := uint64(1), be.Info().Blocks/64
				batch := func(w *Worker, g *group) (time.Duration, error) {
					for i := range tc.qd {
						x ^= x << 13
						x ^= x >> 7
						x ^= x << 17
						c := rw(tc.op, x%spaces*64, tc.blocks, base+dataOff+uint64(i)<<12)
						c.PRP2 = base + listOff
						p.push(c)
					}
					if err := p.tail.Publish(p.sq.Tail()); err != nil {
						return 0, err
					}
					begin := time.Now()
					w.poll(g)
					took := time.Since(begin)
					for i := range tc.qd {
						e, ok := p.cq.Next()
						if !ok || !e.Status().OK() {
							return 0, fmt.Errorf("completion %d of %d: %v, %v", i, tc.qd, ok, e.Status())
						}
						if err := p.sq.Released(e.SQHead()); err != nil {
							return 0, err
						}
					}
					return took, p.head.Publish(p.cq.Head())
				}
				const chunk = 512 // commands
				var chunks []time.Duration
				w := r.workers[0]
				w.Call(func() {
					g := r.ctl.cqs[1].Load()
					w.resume(g)
					for b.Loop() && err == nil {
						var spent, took time.Duration
						for i := 0; i < chunk && err == nil; i += tc.qd {
							took, err = batch(w, g)
							spent += took
						}
						chunks = append(chunks, spent)
					}
				})
				if err != nil {
					b.Fatal(err)
				}
				slices.Sort(chunks)
				b.ReportMetric(float64(chunks[len(chunks)/20].Nanoseconds())/chunk, "worker-ns/io")
			})
		}
	}
}
