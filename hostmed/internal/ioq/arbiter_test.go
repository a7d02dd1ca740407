package ioq

import (
	"sync"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// recorder notes in what order commands come to it.
type recorder struct {
	backend.Backend

	mu   sync.Mutex
	lbas []uint64
}

func (b *recorder) NewQueue() (backend.Queue, error) {
	q, err := b.Backend.NewQueue()
	return &recorderQueue{q, b}, err
}

func (b *recorder) take() []uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.lbas
	b.lbas = nil
	return l
}

type recorderQueue struct {
	backend.Queue
	b *recorder
}

func (q *recorderQueue) Submit(reqs, done []*backend.Request) int {
	q.b.mu.Lock()
	for _, r := range reqs {
		q.b.lbas = append(q.b.lbas, r.Cmd.SLBA())
	}
	q.b.mu.Unlock()
	return q.Queue.Submit(reqs, done)
}

// weigh makes four pairs with a QPRIO each and SQ ids from 1, whose commands are of LBA 1000*QPRIO and on; together says that they share a CQ.
func (r *rig) weigh(together bool) (pairs [classCount]*pair) {
	for prio := range pairs {
		qid := uint16(prio + 1)
		if !together || prio == 0 {
			pairs[prio] = r.pairPrio(qid, uint8(prio))
			continue
		}
		off, mem, dev := r.alloc(64 * 64)
		if err := r.ctl.CreateSQ(ctrl.SQParams{QID: qid, CQID: 1, Size: 64, IOVA: base + off, Mem: dev, Prio: uint8(prio)}); err != nil {
			r.t.Fatal(err)
		}
		q := &pair{r: r, qid: qid, cq: pairs[0].cq, head: pairs[0].head, irq: -1}
		var err error
		if q.sq, err = ring.NewSQProducer(mem, 64); err != nil {
			r.t.Fatal(err)
		}
		q.tail = r.publisher(qid, false, &q.rings)
		pairs[prio] = q
	}
	return pairs
}

// pairPrio is pair with 64 and 256 entries and a QPRIO.
func (r *rig) pairPrio(qid uint16, prio uint8) *pair {
	p := &pair{r: r, qid: qid, irq: -1}
	_, cqMem, cqDev := r.alloc(256 * 16)
	_, sqMem, sqDev := r.alloc(64 * 64)
	err := r.ctl.CreateCQ(ctrl.CQParams{QID: qid, Size: 256, Mem: cqDev, Vector: qid})
	if err == nil {
		err = r.ctl.CreateSQ(ctrl.SQParams{QID: qid, CQID: qid, Size: 64, Mem: sqDev, Prio: prio})
	}
	if err == nil {
		p.sq, err = ring.NewSQProducer(sqMem, 64)
	}
	if err == nil {
		p.cq, err = ring.NewCQConsumer(cqMem, 256)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	p.tail, p.head = r.publisher(qid, false, &p.rings), r.publisher(qid, true, &p.rings)
	return p
}

// saturate fills every SQ with n commands before the worker sees any of them, and returns the classes in the order in which they were fetched.
func (r *rig) saturate(b *recorder, pairs []*pair, n int) (order []int) {
	r.ctl.Hold(true)
	for _, p := range pairs {
		for i := range n {
			p.push(rw(nvme.IORead, uint64(p.qid-1)*1000+uint64(i), 1, base+dataOff))
		}
		p.publish()
	}
	r.ctl.Hold(false)
	r.eventually("all are done", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.lbas) == n*len(pairs)
	})
	for _, lba := range b.take() {
		order = append(order, int(lba/1000))
	}
	return order
}

func counts(order []int) (n [classCount]int) {
	for _, c := range order {
		n[c]++
	}
	return n
}

func arbitration(ab, l, m, h uint32) nvme.Arbitration {
	return nvme.Arbitration(ab | (l-1)<<8 | (m-1)<<16 | (h-1)<<24)
}

// TestWeightedRoundRobin fills SQs of all classes and looks at what is fetched first.
func TestWeightedRoundRobin(t *testing.T) {
	for name, together := range map[string]bool{"a CQ each": false, "one CQ": true} {
		t.Run(name, func(t *testing.T) {
			b := &recorder{Backend: openBackend(t, "null:size=1GiB")}
			r := newRig(t, rigConfig{shadow: true, backend: b})
			r.ctl.SetArbitration(true, arbitration(7, 2, 4, 8))
			pairs := r.weigh(together)
			reap := func() {
				if !together {
					for _, p := range pairs {
						p.reap(32)
					}
					return
				}
				for range 4 * 32 {
					pairs[0].reapAny()
				}
				if err := pairs[0].head.Publish(pairs[0].cq.Head()); err != nil {
					t.Fatal(err)
				}
				for _, p := range pairs {
					if err := p.sq.Released(uint16(p.sq.Tail())); err != nil {
						t.Fatal(err)
					}
				}
			}
			for _, x := range []struct {
				v       nvme.Arbitration
				h, m, l int // of the first 28 after the urgent ones
			}{
				{arbitration(7, 2, 4, 8), 16, 8, 4}, {arbitration(0, 2, 4, 8), 16, 8, 4}, {arbitration(1, 1, 1, 1), 10, 9, 9},
				{arbitration(7, 16, 1, 1), 2, 2, 24}, {arbitration(7, 256, 256, 256), 28, 0, 0},
			} {
				r.ctl.SetArbitration(true, x.v)
				order := r.saturate(b, pairs[:], 32)
				if n := counts(order[:32]); n[urgent] != 32 {
					t.Errorf("%#x: of the first 32, %d are urgent", x.v, n[urgent])
				}
				if n := counts(order[32:60]); n[high] != x.h || n[medium] != x.m || n[low] != x.l {
					t.Errorf("%#x: of the next 28, %d are high, %d medium, %d low; want %d, %d, %d", x.v, n[high], n[medium], n[low], x.h, x.m, x.l)
				}
				if n := counts(order); n != [classCount]int{32, 32, 32, 32} {
					t.Errorf("%#x: %v in all", x.v, n)
				}
				reap()
			}
			// A burst is from one SQ at a time.
			r.ctl.SetArbitration(true, arbitration(2, 8, 8, 8))
			other := r.pairPrio(5, high)
			order := r.saturate(b, []*pair{pairs[high], other}, 16)
			for i, class := range order {
				if want := []int{high, 4}[i/4%2]; class != want && class != high+4-want {
					t.Fatalf("burst of 4: %v", order)
				}
			}
			if order[0] != order[3] || order[0] == order[4] || order[4] != order[7] || order[0] != order[8] {
				t.Errorf("burst of 4: %v", order)
			}
			r.noError()
		})
	}
}

// reapAny takes one completion of any SQ.
func (p *pair) reapAny() {
	p.r.t.Helper()
	p.r.eventually("a completion", func() bool { _, ok := p.cq.Next(); return ok })
}

// TestWeightedQueuesComeAndGo deletes and makes SQs of a controller that weighs, and goes back to round robin.
func TestWeightedQueuesComeAndGo(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		r := newRig(t, c)
		r.ctl.SetArbitration(true, arbitration(7, 1, 2, 3))
		for range 3 {
			for qid := uint16(1); qid <= 6; qid++ {
				p := r.pairPrio(qid, uint8(qid))
				for i := range 40 {
					p.push(rw(nvme.IORead, uint64(i), 8, base+dataOff))
				}
				p.publish()
				p.reap(40)
			}
			r.workers[0].Call(func() {}) // has the doorbells, which were posted to it
			for qid := uint16(6); qid > 0; qid-- {
				r.ctl.DeleteSQ(qid)
				if qid%2 == 0 {
					r.ctl.DeleteCQ(qid)
				}
			}
			for qid := uint16(1); qid <= 5; qid += 2 {
				r.ctl.DeleteCQ(qid)
			}
		}
		r.pairPrio(1, low).do(rw(nvme.IORead, 0, 8, base+dataOff))
		r.ctl.Stop(patience)
		p := r.pair(1, 16, false)
		if st := p.do(rw(nvme.IORead, 0, 8, base+dataOff)); st != nvme.StatusSuccess || r.ctl.cqs[1].Load().arbiter != nil {
			t.Errorf("after a reset: %v", st)
		}
		r.noError()
	})
}

// TestWeightedBadTail has one SQ of several whose driver writes what cannot be.
func TestWeightedBadTail(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	r.ctl.SetArbitration(true, arbitration(7, 1, 1, 1))
	good, bad := r.pairPrio(1, low), r.pairPrio(2, urgent)
	if err := bad.tail.Publish(64); err != nil {
		t.Fatal(err)
	}
	if e := <-r.errs; e.Kind != BadSQTail || e.QID != 2 {
		t.Errorf("%+v", e)
	}
	if st := good.do(rw(nvme.IORead, 0, 8, base+dataOff)); st != nvme.StatusSuccess {
		t.Error(st)
	}
}
