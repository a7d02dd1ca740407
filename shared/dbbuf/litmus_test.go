package dbbuf_test

import (
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// twoSides runs a and b of each round at the same time, as nearly as two threads can, and then check. Rounds
// count from 1; there are as many as go into a second, until check says no.
func twoSides(a, b func(round uint32), check func(round uint32) bool) {
	const over = 1 << 31
	end := time.Now().Add(time.Second)
	if testing.Short() {
		end = time.Now().Add(time.Second / 4)
	}
	var begin, ended atomic.Uint32
	await := func(w *atomic.Uint32, v uint32) {
		for spins := 0; w.Load() < v; spins++ {
			if spins > 2000 { // fewer cores than sides
				runtime.Gosched()
			}
		}
	}
	done := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(done)
		for r := uint32(1); ; r++ {
			if await(&begin, r); begin.Load() == over {
				return
			}
			b(r)
			ended.Store(r)
		}
	}()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for r := uint32(1); r%256 != 0 || time.Now().Before(end); r++ {
		begin.Store(r)
		for range r * 7 % 61 { // slide the two over each other
			_ = begin.Load()
		}
		a(r)
		await(&ended, r)
		if !check(r) {
			break
		}
	}
	begin.Store(over)
	<-done
}

// R1, R2: the tail store and the event-index load are both sequentially consistent, as are Arm's two: either the
// driver sees that it must ring, or the device sees that it must not sleep. (tools/stress shows that
// this is observable: with a plain store on either side it is lost.)
func TestRule01_EitherRingOrStayAwake(t *testing.T) {
	for _, kind := range []string{"heap", "memfd"} {
		t.Run(kind, func(t *testing.T) {
			const size = 64
			p := newPair(t, kind, size)
			var rung, slept bool
			var rang, sleeps int
			twoSides(
				func(r uint32) {
					was := p.pub.Rings
					_ = p.pub.Publish(r % size)
					rung = p.pub.Rings > was
				},
				func(r uint32) { slept = p.poll.Arm((r - 1) % size) },
				func(r uint32) bool {
					if slept && !rung {
						t.Errorf("round %d: the device sleeps and the driver did not ring", r)
						return false
					}
					if rung {
						rang++
					}
					if slept {
						sleeps++
					}
					p.rung = p.rung[:0]
					return true
				})
			if rang == 0 && sleeps == 0 {
				t.Error("the two sides never met")
			}
		})
	}
}

// The same hand-over for interrupts: either the device sees that the driver is quiet no longer, or the driver
// sees the completion.
func TestQuietHandshake(t *testing.T) {
	for _, kind := range []string{"heap", "memfd"} {
		t.Run(kind, func(t *testing.T) {
			const size = 64
			mem := page(t, kind)
			prod, err := ring.NewCQProducer(mem, size)
			if err != nil {
				t.Fatal(err)
			}
			cons, err := ring.NewCQConsumer(mem, size)
			if err != nil {
				t.Fatal(err)
			}
			p := newPair(t, kind, size)
			es := []ring.Entry{{}}
			var quiet, seen bool
			p.pub.SetQuiet(true)
			twoSides(
				func(uint32) {
					p.pub.SetQuiet(false)
					seen = cons.Ready()
				},
				func(uint32) {
					prod.Post(es)
					quiet = p.poll.Quiet()
				},
				func(r uint32) bool {
					if quiet && !seen {
						t.Errorf("round %d: no interrupt, and the driver saw no completion", r)
						return false
					}
					if _, ok := cons.Next(); !ok {
						t.Errorf("round %d: no completion", r)
						return false
					}
					_ = p.pub.Publish(cons.Head())
					if err := prod.Consumed(p.poll.Load() &^ dbbuf.QuietBit); err != nil {
						t.Error(err)
						return false
					}
					p.pub.SetQuiet(true)
					return true
				})
		})
	}
}

// The quiet bit rides on the CQ head and changes nothing else.
func TestQuietBitOnTheHead(t *testing.T) {
	p := newPair(t, "memfd", 64)
	expect := func(word uint32, quiet bool) {
		t.Helper()
		if p.word.Load() != word || p.poll.Quiet() != quiet || p.pub.Quiet() != quiet {
			t.Fatalf("doorbell %#x, device %v, driver %v; want %#x, %v", p.word.Load(), p.poll.Quiet(), p.pub.Quiet(), word, quiet)
		}
	}
	expect(0, false)
	p.pub.SetQuiet(true)
	expect(dbbuf.QuietBit, true)
	p.publish(t, 5)
	expect(dbbuf.QuietBit|5, true)
	if p.pub.Published() != 5 {
		t.Errorf("published %#x", p.pub.Published())
	}
	if p.poll.Arm(4) || !p.poll.Arm(5) {
		t.Error("the quiet bit counts in Arm")
	}
	if !p.publish(t, 6) {
		t.Error("armed at 5, and a quiet head did not ring")
	}
	p.pub.SetQuiet(true) // again: nothing to say
	p.pub.SetQuiet(false)
	expect(6, false)
	p.publish(t, 7)
	expect(7, false)
	if p.pub.Stores != 3 {
		t.Errorf("%d values published of 3", p.pub.Stores)
	}
	// A doorbell value of a driver without the feature is never quiet.
	heap := shm.NewHeap(64)
	w, _ := heap.Word32(0)
	for _, v := range []uint32{0, 1, 65535, 1 << 30} {
		w.Store(v)
		if dbbuf.NewPoller(w, nil, 64).Quiet() {
			t.Errorf("%#x is quiet", v)
		}
	}
}
