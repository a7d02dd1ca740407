package ioq

import (
	"fmt"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// TestQueueShapes runs laps on pairs whose SQ and CQ are of different sizes, down to two entries: a driver that fills the SQ whenever it can, and
// reaps late.
func TestQueueShapes(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		for _, x := range [][2]uint32{{2, 2}, {2, 64}, {64, 2}, {3, 7}, {7, 3}, {64, 5}} {
			t.Run(fmt.Sprintf("SQ %d CQ %d", x[0], x[1]), func(t *testing.T) {
				r := newRig(t, c)
				p := r.pairOf(1, x[0], x[1])
				n := 20 + 3*int(max(x[0], x[1])) // three laps of either ring: both phases, and the first again
				for pushed, done := 0, 0; done < n; {
					for pushed < n && p.sq.Free() > 0 {
						p.push(rw(nvme.IORead, uint64(pushed), 8, base+dataOff))
						pushed++
					}
					p.publish()
					for _, e := range p.reap(1) {
						if !e.Status().OK() {
							t.Fatal(e.Status())
						}
						done++
					}
				}
				r.noError()
			})
		}
	})
}

// TestManySQsShareASmallCQ has eight SQs of different sizes on a CQ of two entries.
func TestManySQsShareASmallCQ(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pairOf(1, 4, 2)
	all := []*pair{p}
	for qid := uint16(2); qid <= 8; qid++ {
		size := uint32(qid)
		off, mem, dev := r.alloc(uint64(size) * 64)
		if err := r.ctl.CreateSQ(ctrl.SQParams{QID: qid, CQID: 1, Size: size, IOVA: base + off, Mem: dev}); err != nil {
			t.Fatal(err)
		}
		q := &pair{r: r, qid: qid, cq: p.cq, head: p.head, irq: -1}
		var err error
		if q.sq, err = ring.NewSQProducer(mem, size); err != nil {
			t.Fatal(err)
		}
		q.tail = r.publisher(qid, false, &q.rings)
		all = append(all, q)
	}
	const each = 100
	pushed, done := map[uint16]int{}, map[uint16]int{}
	for n := 0; n < each*len(all); {
		for _, q := range all {
			for pushed[q.qid] < each && q.sq.Free() > 0 {
				q.push(rw(nvme.IORead, 0, 8, base+dataOff))
				pushed[q.qid]++
			}
			q.publish()
		}
		r.eventually("a completion", p.cq.Ready)
		for {
			e, ok := p.cq.Next()
			if !ok {
				break
			}
			if err := all[e.SQID()-1].sq.Released(e.SQHead()); err != nil || !e.Status().OK() {
				t.Fatal(err, e.Status())
			}
			done[e.SQID()]++
			n++
		}
		if err := p.head.Publish(p.cq.Head()); err != nil {
			t.Fatal(err)
		}
	}
	for _, q := range all {
		if done[q.qid] != each {
			t.Errorf("SQ %d: %d of %d", q.qid, done[q.qid], each)
		}
	}
	r.noError()
}
