package dbbuf_test

import (
	"bytes"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// inRange is "ei in [old, new)" of a ring, by walking it.
func inRange(ei, new, old, size uint32) bool {
	for i := old; i != new; i = (i + 1) % size {
		if i == ei {
			return true
		}
	}
	return false
}

func TestNeedEventBruteForce(t *testing.T) {
	for _, size := range []uint32{2, 3, 4, 5, 7, 8, 16, 33, 64} {
		for old := range size {
			for new := range size {
				for ei := range size {
					if got := dbbuf.NeedEvent(ei, new, old); got != inRange(ei, new, old, size) {
						t.Fatalf("size %d: NeedEvent(ei %d, new %d, old %d) = %v", size, ei, new, old, got)
					}
				}
			}
		}
	}
}

func TestNeedEventLargeRings(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom([]uint32{4095, 4096, 32768, 65535, 65536}).Draw(t, "size")
		index := rapid.OneOf(rapid.Uint32Range(0, size-1), rapid.Uint32Range(0, 3), rapid.Uint32Range(size-3, size-1))
		ei, new, old := index.Draw(t, "ei"), index.Draw(t, "new"), index.Draw(t, "old")
		want := (ei+size-old)%size < (new+size-old)%size
		if got := dbbuf.NeedEvent(ei, new, old); got != want {
			t.Fatalf("size %d: NeedEvent(ei %d, new %d, old %d) = %v", size, ei, new, old, got)
		}
	})
}

// Whatever a hostile device writes as event index, the answer is yes or no.
func TestNeedEventOfAnything(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ei := rapid.Uint32().Draw(t, "ei")
		new, old := rapid.Uint32Range(0, 65535).Draw(t, "new"), rapid.Uint32Range(0, 65535).Draw(t, "old")
		if got := dbbuf.NeedEvent(ei, new, old); got != dbbuf.NeedEvent(uint32(uint16(ei)), new, old) {
			t.Fatalf("NeedEvent(ei %#x, new %d, old %d) = %v", ei, new, old, got)
		}
	})
}

// R29: slots are bounded by the page, for every queue and every stride.
func TestRule29_SlotsInsideThePage(t *testing.T) {
	pg := page(t, "memfd")
	base := uintptr(pg.Base())
	for dstrd := range uint8(16) {
		stride := uint64(4) << dstrd
		inside := 0
		for qid := uint32(0); qid < 1<<16; qid++ {
			if qid > 600 && qid < 65500 && qid%97 != 0 {
				continue // beyond the page for every stride: a sample
			}
			end := (2*uint64(qid)+1)*stride + 4
			sq, cq, err := dbbuf.Slots(pg, uint16(qid), dstrd)
			if end > shm.PageSize {
				if !errors.Is(err, shm.ErrRange) || sq != nil || cq != nil {
					t.Fatalf("queue %d, stride %d: %v", qid, stride, err)
				}
				continue
			}
			if err != nil {
				t.Fatalf("queue %d, stride %d: %v", qid, stride, err)
			}
			inside++
			sq.Store(0xa0000000 + qid)
			cq.Store(0xb0000000 + qid)
			for at, want := range map[uint64]uint32{2 * uint64(qid) * stride: 0xa0000000 + qid, (2*uint64(qid) + 1) * stride: 0xb0000000 + qid} {
				if w, err := pg.Word32(at); err != nil || w.Load() != want {
					t.Fatalf("queue %d, stride %d: not at offset %d of the page at %#x", qid, stride, at, base)
				}
			}
		}
		// The last queue whose two slots fit.
		if want := int(shm.PageSize / (2 * stride)); dstrd <= 9 && inside != want {
			t.Errorf("stride %d: %d queues in a page, want %d", stride, inside, want)
		}
		if dstrd > 9 && inside != 0 {
			t.Errorf("stride %d: %d queues in a page", stride, inside)
		}
	}
	// CAP.DSTRD has 4 bits.
	if a, _, err := dbbuf.Slots(pg, 1, 0x10); err != nil {
		t.Error(err)
	} else if b, _, _ := dbbuf.Slots(pg, 1, 0); a != b {
		t.Error("more than 4 bits of DSTRD count")
	}
	odd, err := pg.View(2, 2048)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := dbbuf.Slots(odd, 0, 0); !errors.Is(err, shm.ErrAlign) {
		t.Errorf("an odd page: %v", err)
	}
	if _, _, err := dbbuf.Slots(&shm.Region{}, 0, 0); !errors.Is(err, shm.ErrRange) {
		t.Errorf("no page: %v", err)
	}
}

// R20: doorbells and event indices are 32-bit little-endian words in both pages.
func TestRule20_WidthAndByteOrder(t *testing.T) {
	for _, kind := range []string{"heap", "memfd"} {
		shadow, events := page(t, kind), page(t, kind)
		_, word, err1 := dbbuf.Slots(shadow, 3, 1)
		_, ei, err2 := dbbuf.Slots(events, 3, 1)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		pub := dbbuf.NewShadow(word, ei, func(uint32) error { return nil })
		pub.SetQuiet(true)
		if err := pub.Publish(0x1234); err != nil {
			t.Fatal(err)
		}
		dbbuf.NewPoller(word, ei, 0x8000).Arm(0x4321)
		const at = 7 * 8 // CQ head of queue 3, stride 8
		for _, c := range []struct {
			page *shm.Region
			want []byte
		}{
			{shadow, []byte{0x34, 0x12, 0x00, 0x80}}, // bit 31 is the quiet bit
			{events, []byte{0x21, 0x43, 0x00, 0x00}},
		} {
			got, want := make([]byte, shm.PageSize), make([]byte, shm.PageSize)
			copy(want[at:], c.want)
			if err := c.page.Read(0, got); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s: bytes % x at the slot, want % x and nothing elsewhere", kind, got[at:at+4], c.want)
			}
		}
	}
}

// R6: nothing but Publish moves a doorbell, and it moves it before it rings.
func TestRule06_OnlyPublishMovesTheTail(t *testing.T) {
	p := newPair(t, "memfd", 8)
	if p.word.Load() != 0 || p.pub.Published() != 0 {
		t.Fatal("a fresh doorbell is not zero")
	}
	p.pub.SetQuiet(true)
	p.pub.SetQuiet(false)
	p.poll.Load()
	p.poll.Arm(0)
	p.poll.Behind(3)
	p.poll.BehindNow(5)
	p.poll.Quiet()
	if p.word.Load() != 0 || len(p.rung) != 0 {
		t.Fatalf("the doorbell moved to %d without Publish", p.word.Load())
	}
	seen := uint32(0)
	p.ei.Store(0)
	pub := dbbuf.NewShadow(p.word, p.ei, func(v uint32) error {
		seen = p.word.Load()
		return nil
	})
	if err := pub.Publish(1); err != nil {
		t.Fatal(err)
	}
	if seen != 1 {
		t.Errorf("the doorbell held %d when the register was written", seen)
	}
	// The same value twice is no event.
	if err := pub.Publish(1); err != nil || pub.Rings != 1 || pub.Stores != 1 || pub.Published() != 1 {
		t.Errorf("%d rings, %d stores, published %d: %v", pub.Rings, pub.Stores, pub.Published(), err)
	}
}

// An error of the MMIO write reaches the caller; the value stays published.
func TestPublishReportsTheRingsError(t *testing.T) {
	lost := errors.New("connection lost")
	p := newPair(t, "heap", 8)
	for name, pub := range map[string]*dbbuf.Publisher{
		"shadow": dbbuf.NewShadow(p.word, p.ei, func(uint32) error { return lost }),
		"MMIO":   dbbuf.NewMMIO(func(uint32) error { return lost }),
	} {
		if err := pub.Publish(1); !errors.Is(err, lost) || pub.Published() != 1 {
			t.Errorf("%s: %v, published %d", name, err, pub.Published())
		}
	}
	if p.word.Load() != 1 {
		t.Errorf("the doorbell holds %d", p.word.Load())
	}
}

// The three kinds of doorbell differ only in where a value goes.
func TestKindsOfDoorbell(t *testing.T) {
	var word, ei atomic.Uint32
	ring := func(uint32) error { return nil }
	mapped, mmio, shadow := dbbuf.NewMapped(&word), dbbuf.NewMMIO(ring), dbbuf.NewShadow(&word, &ei, ring)
	ei.Store(5)
	for i := uint32(1); i <= 5; i++ {
		for _, p := range []*dbbuf.Publisher{mapped, mmio, shadow} {
			if err := p.Publish(i); err != nil {
				t.Fatal(err)
			}
		}
		if word.Load() != i {
			t.Errorf("the mapped doorbell holds %d", word.Load())
		}
	}
	for _, c := range []struct {
		name          string
		p             *dbbuf.Publisher
		rings, stores uint64
	}{{"mapped", mapped, 0, 5}, {"MMIO", mmio, 5, 5}, {"shadow", shadow, 0, 5}} {
		if c.p.Rings != c.rings || c.p.Stores != c.stores || c.p.Published() != 5 {
			t.Errorf("%s: %d rings, %d stores, published %d", c.name, c.p.Rings, c.p.Stores, c.p.Published())
		}
	}
	mmio.SetQuiet(true) // nowhere to say it
	if mmio.Quiet() {
		t.Error("a doorbell register without memory is quiet")
	}
	poll := dbbuf.NewPoller(&word, nil, 8)
	poll.Behind(3)
	poll.BehindNow(3)
	if !poll.Arm(5) || poll.Arm(4) || ei.Load() != 5 {
		t.Error("a doorbell without an event index is armed by looking at it")
	}
}

func TestNothingAllocates(t *testing.T) {
	for _, kind := range []string{"heap", "memfd"} {
		p := newPair(t, kind, 64)
		pub := dbbuf.NewShadow(p.word, p.ei, func(uint32) error { return nil })
		v := uint32(0)
		if n := testing.AllocsPerRun(1000, func() {
			v = (v + 1) % 64
			_ = pub.Publish(v)
			pub.SetQuiet(v%2 == 0)
			p.poll.Load()
			p.poll.Behind(v)
			p.poll.Arm(v)
			p.poll.Quiet()
		}); n != 0 {
			t.Errorf("%s: %v allocations", kind, n)
		}
	}
}

func ExampleNeedEvent() {
	fmt.Println(dbbuf.NeedEvent(4, 6, 3)) // the device waits for 4, the driver went from 3 to 6
	fmt.Println(dbbuf.NeedEvent(2, 6, 3)) // it is one behind: it polls
	fmt.Println(dbbuf.NeedEvent(6, 6, 3)) // it waits for the next
	// Output:
	// true
	// false
	// false
}
