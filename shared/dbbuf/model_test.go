package dbbuf_test

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
)

// Random interleavings of what the two sides do, whole operations at a time; the steps inside them are for
// model/ and for tools/stress. Sleeping with work pending and no kick on its way is a lost wake-up.
func TestNoInterleavingLosesAWakeUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom(wrapSizes).Draw(t, "size")
		word, ei := new32(), new32()
		var (
			kick     bool
			asleep   bool
			polling  bool   // since BehindNow, with no Arm in between
			consumed uint32 // by the device
			waiting  uint32 // published, not consumed
			posted   uint32 // consumed, the driver does not know
			rings    uint64
		)
		pub := dbbuf.NewShadow(word, ei, func(uint32) error { kick = true; return nil })
		poll := dbbuf.NewPoller(word, ei, size)
		t.Repeat(map[string]func(*rapid.T){
			"publish": func(t *rapid.T) {
				room := size - 1 - waiting - posted
				if room == 0 {
					t.Skip("full")
				}
				n := rapid.Uint32Range(1, min(room, 40)).Draw(t, "n")
				if err := pub.Publish((pub.Published() + n) % size); err != nil {
					t.Fatal(err)
				}
				waiting += n
			},
			"quiet": func(t *rapid.T) { pub.SetQuiet(rapid.Bool().Draw(t, "on")) },
			"consume": func(t *rapid.T) {
				if asleep {
					t.Skip("asleep")
				}
				tail := poll.Load() &^ dbbuf.QuietBit
				if (tail+size-consumed)%size != waiting {
					t.Fatalf("the device sees the tail %d, it is %d", tail, (consumed+waiting)%size)
				}
				n := rapid.Uint32Range(0, min(waiting, 16)).Draw(t, "n")
				waiting -= n
				posted += n
				consumed = (consumed + n) % size
				poll.Behind(consumed)
			},
			"complete": func(*rapid.T) { posted = 0 },
			"behind": func(t *rapid.T) {
				if asleep {
					t.Skip("asleep")
				}
				poll.BehindNow(consumed)
				polling = true
			},
			"arm": func(t *rapid.T) {
				if asleep {
					t.Skip("asleep")
				}
				kick = false // cleared before the last probe
				polling = false
				stood := poll.Arm(consumed)
				if stood != (waiting == 0) {
					t.Fatalf("Arm(%d) says %v with %d waiting", consumed, stood, waiting)
				}
				asleep = stood
			},
			"wake": func(t *rapid.T) {
				if !asleep || !kick {
					t.Skip("nothing to wake")
				}
				asleep = false
			},
			"spurious wake": func(*rapid.T) { asleep = false },
			"": func(t *rapid.T) {
				if asleep && !kick && waiting > 0 {
					t.Fatalf("asleep at %d with %d waiting and no kick; event index %d", consumed, waiting, ei.Load())
				}
				if rings != pub.Rings && polling && size <= 4 {
					t.Fatalf("a polling device was rung") // small rings publish at each step: exact
				}
				rings = pub.Rings
			},
		})
	})
}

// R11: every event index is one that was read from the doorbell, or one behind it.
func TestRule11_EventIndexIsConsumedOrOneBehind(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom(wrapSizes).Draw(t, "size")
		word, ei := new32(), new32()
		poll := dbbuf.NewPoller(word, ei, size)
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			consumed := rapid.Uint32Range(0, size-1).Draw(t, "consumed")
			const untouched = 0xdeadbeef
			ei.Store(untouched)
			word.Store(rapid.SampledFrom([]uint32{consumed, consumed | dbbuf.QuietBit, (consumed + 1) % size}).Draw(t, "tail"))
			behind := (consumed + size - 1) % size
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0:
				poll.Arm(consumed)
				if ei.Load() != consumed {
					t.Fatalf("Arm(%d) stored %d", consumed, ei.Load())
				}
			case 1:
				poll.BehindNow(consumed)
				if ei.Load() != behind {
					t.Fatalf("BehindNow(%d) stored %d", consumed, ei.Load())
				}
			case 2:
				poll.Behind(consumed)
				if v := ei.Load(); v != behind && v != untouched {
					t.Fatalf("Behind(%d) stored %d", consumed, v)
				}
			case 3:
				poll.Load()
				poll.Quiet()
				if ei.Load() != untouched {
					t.Fatalf("a look stored %d", ei.Load())
				}
			}
		}
	})
}

// R14: a device that polls is never rung, however often the ring wraps, however full the driver keeps it
// and however many entries the device takes at a time.
func TestRule14_NoExitsAtWrap(t *testing.T) {
	for _, size := range []uint32{2, 3, 4, 5, 64, 256, 1024} {
		for _, depth := range []uint32{1, 2, size / 4, size / 2, size - 2, size - 1} {
			for _, batch := range []uint32{1, 3, 16, size} {
				if depth == 0 || depth >= size {
					continue
				}
				t.Run(fmt.Sprintf("size=%d/depth=%d/batch=%d", size, depth, batch), func(t *testing.T) {
					noExits(t, size, depth, batch)
				})
			}
		}
	}
}

func noExits(t *testing.T, size, depth, batch uint32) {
	p := newPair(t, "heap", size)
	p.poll.BehindNow(0)
	// What the queue was told to hold is there from the first look on.
	var tail, consumed, outstanding uint32
	fill := func() {
		n := depth - outstanding
		tail = (tail + n) % size
		outstanding += n
		if p.publish(t, tail) {
			t.Fatalf("rung at tail %d with %d consumed, event index %d", tail, consumed, p.ei.Load())
		}
	}
	for laps := uint32(0); laps < 20*size; {
		fill()
		waiting := (p.poll.Load() + size - consumed) % size
		n := min(batch, waiting)
		consumed = (consumed + n) % size
		laps += n
		p.poll.Behind(consumed)
		outstanding -= n // completed, and the driver knows
	}
}
