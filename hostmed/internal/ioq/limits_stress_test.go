package ioq

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// TestLimitsUnderStress: guests that do whatever they like to limited queues, with limits that change, and nothing is lost, done twice or
// done too often.
func TestLimitsUnderStress(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 1))
	l := newLimited(t, rigConfig{shadow: true, workers: 2, heap: true}, openBackend(t, "null:size=1MiB"), openBackend(t, "null:size=1MiB"))
	const n = 4
	var ps [n]*pair
	var out [n]map[uint16]bool
	for i := range ps {
		ps[i], out[i] = l.pair(uint16(i+1), 128, false), map[uint16]bool{}
	}
	took := func(i int, es []ring.Entry) {
		for _, e := range es {
			if !out[i][e.CID()] {
				t.Fatalf("seed %d: a completion of command %d in queue %d, which is none", seed, e.CID(), i)
			}
			delete(out[i], e.CID())
		}
	}
	// What was rung is posted to the workers, and must not arrive after its queue has gone.
	heard := func() {
		for _, w := range l.workers {
			w.Call(func() {})
		}
	}
	a, b := fused(8, 1, dataOff, dataOff)
	copies := []nvme.Command{aRead, aWrite, aRead, inNS(2, aRead), inNS(2, aWrite), {Opcode: nvme.IOFlush, NSID: 1}, rw(nvme.IOCompare, 0, 1, base+dataOff), rw(nvme.IOVerify, 0, 100, 0), inNS(3, aRead)}
	for range 3000 {
		i := rnd.IntN(n)
		p := ps[i]
		switch rnd.IntN(12) {
		case 0, 1, 2, 3, 4:
			for range rnd.IntN(20) {
				if len(out[i]) < 100 {
					out[i][p.push(copies[rnd.IntN(len(copies))])] = true
				}
			}
			if rnd.IntN(4) == 0 && len(out[i]) < 100 {
				out[i][p.push(a)] = true
				out[i][p.push(b)] = true
			}
			p.publish()
		case 5:
			for cid := range out[i] {
				l.ctl.Abort(p.qid, cid)
				break
			}
		case 6:
			x := qos.Limits{}
			for _, f := range x.Fields() {
				if rnd.IntN(3) == 0 {
					f.Limit.Rate = 1 + rnd.Uint64N(5000)
					if f.Bytes {
						f.Limit.Rate *= 1000
					}
				}
			}
			l.limit(rnd.IntN(3), x)
		case 7:
			l.advance(time.Duration(rnd.IntN(3e6)))
		case 8:
			l.ctl.Hold(true)
			l.advance(time.Duration(rnd.IntN(3e6)))
			l.ctl.Hold(false)
		case 9:
			if rnd.IntN(2) == 0 {
				l.attach(l.ns[rnd.IntN(2)])
			} else {
				l.attach(l.ns...)
			}
		case 10:
			if rnd.IntN(10) == 0 {
				end := exclusive(l.sub, l.ns[0])
				l.advance(time.Millisecond)
				end()
			}
		case 11:
			if rnd.IntN(10) == 0 {
				heard()
				l.ctl.DeleteSQ(p.qid)
				took(i, p.reap(l.ready(p)))
				clear(out[i]) // those that were not fetched
				heard()
				l.ctl.DeleteCQ(p.qid)
				if l.next > guestSize/4 {
					l.next = 0x10000 + 0x20000
				}
				ps[i] = l.pair(p.qid, 128, false)
			}
		}
		took(i, ps[i].reap(l.ready(ps[i])))
	}
	l.limit(0, qos.Limits{})
	l.limit(1, qos.Limits{})
	l.limit(2, qos.Limits{})
	l.attach(l.ns...)
	for i, p := range ps {
		p.pushAll(1, aRead) // a first half may wait for its second
		out[i][p.nextCID-1] = true
		took(i, p.reap(len(out[i])))
	}
	l.empty()
	l.noError()
}

// TestWorkerSleepsUntilTheTurn, by its own clock: it wakes by itself, and does not look around until then.
func TestWorkerSleepsUntilTheTurn(t *testing.T) {
	l := newLimited(t, rigConfig{shadow: true}, openBackend(t, "mem:size=1MiB"))
	w := l.workers[0]
	w.Call(func() { w.limitClock = nil })
	l.ns[0].Limiter().Set(iops(20, 1), Now())
	l.ctl.SetLimits()
	p := l.pair(1, 64, false)
	begin := time.Now()
	p.pushAll(21, aRead)
	p.reap(21)
	if d := time.Since(begin); d < 950*time.Millisecond { // 20 of them wait for 50 ms each
		t.Errorf("21 commands at 20 IOPS took %v", d)
	}
	var rounds uint32
	p.pushAll(11, aRead)
	l.awaitWaiting(10)
	w.Call(func() { rounds = w.rounds })
	p.reap(11)
	w.Call(func() { rounds = w.rounds - rounds })
	// It polls for 250 us at the most before it sleeps, ever more seldom; a worker that did not sleep would go round a million times.
	if rounds > 100_000 {
		t.Errorf("%d rounds in half a second for 10 commands", rounds)
	}
}
