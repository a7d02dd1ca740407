package hostmed

import (
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// BenchmarkListen is 4 KiB reads of the null backend by guestdrv, 32 at a time, through a socket's queues: with nobody listening, with the events
// recorded and not read, and with a reader that wakes each millisecond. The three are in one process; "Mio/s" and "lost/record" say the rest.
func BenchmarkListen(b *testing.B) {
	for _, how := range []string{"off", "recorded", "read"} {
		b.Run(how, func(b *testing.B) {
			socket := filepath.Join(b.TempDir(), "s")
			m := serve(b, Config{Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"null:size=1GiB"}}}, CPUs: []int{1}, Logger: hclog.NewNullLogger()})
			c := open(b, socket, guestdrv.Options{})
			p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 128})
			if err != nil {
				b.Fatal(err)
			}
			defer p.Close()
			buf, err := c.Alloc(4096)
			if err != nil {
				b.Fatal(err)
			}
			defer buf.Free()
			var got, lost atomic.Uint64
			if how != "off" {
				tr, err := m.Listen(0)
				if err != nil {
					b.Fatal(err)
				}
				defer tr.Close()
				if how == "read" {
					r, err := events.Map(tr.Rings[0].FD)
					if err != nil {
						b.Fatal(err)
					}
					over, done := make(chan bool), make(chan bool)
					defer func() { close(over); <-done; r.Close() }()
					go func() {
						defer close(done)
						out := make([]events.Record, 4096)
						for tick := time.NewTicker(time.Millisecond); ; {
							select {
							case <-over:
								return
							case <-tick.C:
							}
							for n := 1; n > 0; got.Add(uint64(n)) {
								n, _ = r.Read(out)
							}
							lost.Store(r.Lost())
						}
					}()
				}
			}
			ios := make([]guestdrv.IO, 16)
			var results [64]guestdrv.Result
			x, free := uint64(1), 32
			b.ResetTimer()
			for done := 0; done < b.N; {
				n := min(free, len(ios))
				for i := range ios[:n] {
					x = x*6364136223846793005 + 1442695040888963407
					ios[i] = guestdrv.IO{Op: nvme.IORead, NSID: 1, Blocks: 8, LBA: x >> 44 * 8 % (1 << 21), IOVA: buf.IOVA()}
				}
				if n > 0 {
					k, err := p.Submit(ios[:n])
					if err == nil {
						err = p.Publish()
					}
					if err != nil {
						b.Fatal(err)
					}
					free -= k
				}
				if free == 0 {
					if err := p.Wait(b.Context()); err != nil {
						b.Fatal(err)
					}
				}
				k, err := p.Reap(results[:])
				if err != nil {
					b.Fatal(err)
				}
				free += k
				done += k
			}
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds()/1e6, "Mio/s")
			if how == "read" {
				b.ReportMetric(float64(lost.Load())/float64(max(lost.Load()+got.Load(), 1)), "lost/record")
			}
		})
	}
}
