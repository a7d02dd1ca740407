package dbbuf_test

import (
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/shm"
)

var wrapSizes = []uint32{2, 3, 4, 5, 64, 256, 65536}

// R2, R3: Arm stores, looks again, and says whether the device may sleep.
func TestRule02_ArmSaysWhetherTheTailStoodStill(t *testing.T) {
	for _, size := range wrapSizes {
		p := newPair(t, "memfd", size)
		for lap := range min(3*size, 1000) {
			at := lap % size
			if !p.poll.Arm(at) {
				t.Fatalf("size %d: Arm(%d) lost to nobody", size, at)
			}
			if !p.publish(t, (at+1)%size) {
				t.Fatalf("size %d: armed at %d, and the next value did not ring", size, at)
			}
		}
		if p.poll.Lost != 0 || p.poll.Armed != uint64(len(p.rung)) {
			t.Errorf("size %d: armed %d, lost %d, rung %d", size, p.poll.Armed, p.poll.Lost, len(p.rung))
		}
	}
}

func TestRule03_LostRaceMeansStayAwake(t *testing.T) {
	for _, size := range wrapSizes {
		p := newPair(t, "memfd", size)
		p.poll.BehindNow(0)
		// The driver publishes after the last probe and before Arm: it saw "one behind" and did not ring.
		if p.publish(t, 1) {
			t.Fatalf("size %d: rang a polling device", size)
		}
		if p.poll.Arm(0) {
			t.Fatalf("size %d: Arm allows sleep with one entry pending and no ring", size)
		}
		if p.poll.Lost != 1 || p.poll.Armed != 0 {
			t.Errorf("size %d: armed %d, lost %d", size, p.poll.Armed, p.poll.Lost)
		}
		if !p.poll.Arm(1) {
			t.Errorf("size %d: Arm at the tail", size)
		}
	}
}

// R8: a device blocked on CQ space arms the CQ head at the head as it stands. At the tail it would
// mean "never", because the head cannot pass it in one step.
func TestRule08_CQHeadArmedAtTheHead(t *testing.T) {
	for _, size := range []uint32{2, 3, 4, 64} {
		p := newPair(t, "memfd", size)
		head := uint32(0)
		for range 3 * size {
			tail := (head + size - 1) % size // full
			if !p.poll.Arm(head) {
				t.Fatal("the head stood still")
			}
			next := (head + 1) % size
			if !p.publish(t, next) {
				t.Fatalf("size %d: the driver freed an entry at %d and did not ring", size, head)
			}
			head = next
			// Armed at the tail instead, the freed entry goes unannounced, unless the ring is freed to its end.
			p.ei.Store(tail)
			next = (head + 1) % size
			if rang := p.publish(t, next); rang != (tail == head) {
				t.Fatalf("size %d: armed at the tail %d, %d to %d rang: %v", size, tail, head, next, rang)
			}
			head = next
		}
	}
}

// R10: a kick is sticky. It is cleared before the last probe, so that one which comes later is
// still there when the device sleeps.
func TestRule10_KickIsSticky(t *testing.T) {
	kick := eventFD(t)
	p := newPair(t, "memfd", 64)
	pub := dbbuf.NewShadow(p.word, p.ei, func(uint32) error {
		one := [8]byte{1}
		_, err := unix.Write(kick, one[:])
		return err
	})
	kicked := func() bool {
		fds := []unix.PollFd{{Fd: int32(kick), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(fds, 0)
			if err == unix.EINTR { // the runtime's preemption
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			return n == 1
		}
	}
	clear := func() {
		if kicked() { // only after poll (R34)
			var b [8]byte
			if _, err := unix.Read(kick, b[:]); err != nil {
				t.Fatal(err)
			}
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		clear()
		consumed := pub.Published()
		p.poll.BehindNow(consumed)
		// The driver may publish between any two of the device's steps.
		maybe := func(where string) {
			if rapid.Bool().Draw(t, where) {
				if err := pub.Publish((pub.Published() + 1) % 64); err != nil {
					t.Fatal(err)
				}
			}
		}
		for sleeps := 0; sleeps < 3; {
			maybe("before clear")
			clear()
			maybe("before probe")
			consumed = p.poll.Load()
			maybe("before Arm")
			if !p.poll.Arm(consumed) {
				continue
			}
			sleeps++
			maybe("before sleep")
			maybe("asleep")
			if !kicked() && p.poll.Load() != consumed {
				t.Fatalf("asleep at %d with the tail at %d and no kick", consumed, p.poll.Load())
			}
			p.poll.BehindNow(consumed)
		}
	})
}

// R12: whatever was published while polling, going to sleep arms.
func TestRule12_ArmReplacesThePollMarker(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom(wrapSizes).Draw(t, "size")
		var word, ei = new32(), new32()
		poll := dbbuf.NewPoller(word, ei, size)
		at := rapid.Uint32Range(0, size-1).Draw(t, "tail")
		word.Store(at)
		for range rapid.IntRange(0, 5).Draw(t, "polls") {
			poll.Behind(rapid.Uint32Range(0, size-1).Draw(t, "consumed"))
			poll.BehindNow(rapid.Uint32Range(0, size-1).Draw(t, "consumed now"))
		}
		if !poll.Arm(at) || ei.Load() != at {
			t.Fatalf("armed at %d, event index %d", at, ei.Load())
		}
	})
}

// R13: arming needs no entry to have been taken: a queue that nobody drains is armed again each
// time the device goes to sleep.
func TestRule13_ArmWithoutDraining(t *testing.T) {
	p := newPair(t, "memfd", 8)
	for i := range 5 {
		p.poll.BehindNow(0) // awake, for a reason that was not this queue
		if !p.poll.Arm(0) {
			t.Fatalf("round %d: lost to nobody", i)
		}
	}
	if !p.publish(t, 1) {
		t.Error("no ring after five sleeps")
	}
	// And with a ring that was left unread: the next ring comes for the next value only.
	for next := uint32(2); next < 8; next++ {
		if p.poll.Arm(0) {
			t.Fatal("Arm allows sleep with entries pending")
		}
		if p.publish(t, next) {
			t.Fatalf("rang for %d though the device knows that it is behind", next)
		}
	}
}

// R18: the device writes the event-index page only. Its mapping of the doorbell page is
// read-only here, and the driver's of the event indices, so a store would fault.
func TestRule18_EachSideWritesItsOwnPage(t *testing.T) {
	shadow, events := page(t, "memfd"), page(t, "memfd")
	word, _, _ := dbbuf.Slots(shadow, 1, 0)
	wordRO, _, err := dbbuf.Slots(readOnly(t, shadow), 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	ei, _, _ := dbbuf.Slots(events, 1, 0)
	eiRO, _, err := dbbuf.Slots(readOnly(t, events), 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	pub := dbbuf.NewShadow(word, eiRO, func(uint32) error { return nil })
	poll := dbbuf.NewPoller(wordRO, ei, 16)
	if err := shm.Guard(func() {
		for i := range uint32(100) {
			at := i % 16
			_ = pub.Publish(at)
			pub.SetQuiet(i%3 == 0)
			poll.Load()
			poll.Behind(at)
			poll.BehindNow(at)
			poll.Arm(at)
			poll.Quiet()
		}
	}); err != nil {
		t.Error(err)
	}
}

// R19: what stands in the shared doorbell does not matter to the driver.
func TestRule19_OldIsPrivate(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom(wrapSizes).Draw(t, "size")
		word, ei, cleanWord := new32(), new32(), new32()
		ring := func(uint32) error { return nil }
		scribbled, clean := dbbuf.NewShadow(word, ei, ring), dbbuf.NewShadow(cleanWord, ei, ring)
		for range rapid.IntRange(1, 30).Draw(t, "publishes") {
			ei.Store(rapid.Uint32Range(0, size-1).Draw(t, "ei"))
			word.Store(rapid.Uint32().Draw(t, "scribble"))
			v := rapid.Uint32Range(0, size-1).Draw(t, "value")
			moved := v != scribbled.Published()
			_, _ = scribbled.Publish(v), clean.Publish(v)
			if scribbled.Rings != clean.Rings || scribbled.Published() != clean.Published() {
				t.Fatalf("publishing %d: %d rings, %d without the scribbling", v, scribbled.Rings, clean.Rings)
			}
			if moved && word.Load() != v {
				t.Fatalf("the doorbell holds %d after publishing %d", word.Load(), v)
			}
		}
	})
}

func new32() *atomic.Uint32 { return new(atomic.Uint32) }
