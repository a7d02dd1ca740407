package ioq

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// The same pages again and again, while the driver goes on storing to them: no doorbell is lost (R24).
func TestRule24_SamePagesUnderLoad(t *testing.T) {
	r := newRig(t, rigConfig{workers: 2, shadow: true})
	shadow, ei := r.view(shadowOff, 4096), r.view(eiOff, 4096)
	pairs := []*pair{r.pair(1, 8, false), r.pair(2, 64, false)}
	var stop atomic.Bool
	var wg sync.WaitGroup
	for _, p := range pairs {
		wg.Go(func() {
			for i := 0; !stop.Load() && !t.Failed(); i++ {
				for range 1 + i%5 {
					p.push(rw(nvme.IORead, 0, 8, base+dataOff))
				}
				if err := p.tail.Publish(p.sq.Tail()); err != nil {
					t.Error(err)
				}
				n := 0
				for begin := time.Now(); n < 1+i%5; {
					e, ok := p.cq.Next()
					switch {
					case ok:
						n++
						if err := p.sq.Released(e.SQHead()); err != nil {
							t.Error(err)
						}
					case !pauseAfter(begin):
						t.Errorf("queue %d: a doorbell was lost", p.qid)
						return
					}
				}
				if err := p.head.Publish(p.cq.Head()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 300 {
		if err := r.ctl.ResumeDoorbellPages(shadow, ei); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	wg.Wait()
	r.noError()
}
