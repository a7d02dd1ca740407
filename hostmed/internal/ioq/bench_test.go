package ioq

import (
	"fmt"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
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
