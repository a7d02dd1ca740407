package ring

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestSizesAreChecked(t *testing.T) {
	makers := map[string]struct {
		entry uint64
		make  func(*shm.Region, uint32) error
	}{
		"SQProducer": {SQESize, func(m *shm.Region, n uint32) error { _, err := NewSQProducer(m, n); return err }},
		"SQConsumer": {SQESize, func(m *shm.Region, n uint32) error { _, err := NewSQConsumer(m, n); return err }},
		"CQProducer": {CQESize, func(m *shm.Region, n uint32) error { _, err := NewCQProducer(m, n); return err }},
		"CQConsumer": {CQESize, func(m *shm.Region, n uint32) error { _, err := NewCQConsumer(m, n); return err }},
	}
	big := shm.NewHeap(MaxSize * SQESize)
	for name, m := range makers {
		for _, size := range []uint32{0, 1, MaxSize + 1, 1 << 28, 1<<32 - 1} {
			if m.make(big, size) == nil {
				t.Errorf("%s of %d entries", name, size)
			}
		}
		for _, size := range sizes {
			need := uint64(size) * m.entry
			exact, err := big.View(0, need)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.make(exact, size); err != nil {
				t.Errorf("%s of %d entries in %d bytes: %v", name, size, need, err)
			}
			short, _ := big.View(0, need-1)
			if m.make(short, size) == nil {
				t.Errorf("%s of %d entries in %d bytes", name, size, need-1)
			}
		}
		if m.make(&shm.Region{}, 2) == nil {
			t.Errorf("%s in no memory", name)
		}
		odd, _ := big.View(4, 4096)
		if err := m.make(odd, 2); !errors.Is(err, shm.ErrAlign) {
			t.Errorf("%s on an odd address: %v", name, err)
		}
	}
}

// NVMe Base 2.0c 3.3.3.2, byte for byte.
func TestEntryLayout(t *testing.T) {
	mem := shm.NewHeap(4096)
	p, c := newCQ(t, mem, 2)
	st := nvme.StatusLBAOutOfRange.WithDNR()
	p.Post([]Entry{MakeEntry(0x1122334455667788, 0xffff, 0x0a0b, 0x0c0d, st)})
	var b [16]byte
	if err := mem.Read(0, b[:]); err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	if le.Uint32(b[0:]) != 0x55667788 || le.Uint32(b[4:]) != 0x11223344 ||
		le.Uint16(b[8:]) != 0xffff || le.Uint16(b[10:]) != 0x0a0b || le.Uint16(b[12:]) != 0x0c0d ||
		le.Uint16(b[14:]) != uint16(st)<<1|1 {
		t.Errorf("entry % x", b)
	}
	e, ok := c.Next()
	if !ok || e.Result() != 0x55667788 || e.SQHead() != 0xffff || e.SQID() != 0x0a0b || e.CID() != 0x0c0d || e.Status() != st {
		t.Errorf("read back as %+v, %v", e, ok)
	}
	// Every bit of the status survives, and none reaches the phase.
	for s := range nvme.Status(1 << 15) {
		if e := MakeEntry(0, 1<<16|5, 0, 0, s); e.Status() != s || e.Hi&phaseBit != 0 || e.SQHead() != 5 || e.SQID() != 0 {
			t.Fatalf("status %#x becomes %#x", s, e.Hi)
		}
	}
}

// Batches of every length at every place of the ring, over many laps.
func TestPostOverTheWrap(t *testing.T) {
	onEach(t, func(t *testing.T, size uint32, memory func(uint64) *shm.Region) {
		p, c := newCQ(t, memory(uint64(size)*CQESize), size)
		lens := []uint32{1, 2, 3, size / 2, size - 2, size - 1, 7}
		laps := uint64(20)
		if testing.Short() {
			laps = 4
		}
		var posted, taken uint64
		var es []Entry
		for i := 0; posted < laps*uint64(size) || i < 50; i++ {
			n := min(max(lens[i%len(lens)], 1), size-1)
			if p.Free() != size-1 {
				t.Fatalf("empty ring of %d has room for %d", size, p.Free())
			}
			es = es[:0]
			for range n {
				es = append(es, entry(posted))
				posted++
			}
			if c.Ready() {
				t.Fatalf("ready before entry %d was posted", posted)
			}
			p.Post(es)
			if p.Free() != size-1-n {
				t.Fatalf("room for %d after %d of %d", p.Free(), n, size)
			}
			for range n {
				if !c.Ready() {
					t.Fatalf("entry %d is not ready", taken)
				}
				e, ok := c.Next()
				if want := entry(taken); !ok || e != want {
					t.Fatalf("entry %d: %+v, %v; want %+v", taken, e, ok, want)
				}
				taken++
			}
			if _, ok := c.Next(); ok || c.Ready() {
				t.Fatalf("an entry that was not posted, after %d", taken)
			}
			if want := uint32(taken % uint64(size)); c.Head() != want || p.Tail() != want {
				t.Fatalf("head %d, tail %d, want %d", c.Head(), p.Tail(), want)
			}
			if err := p.Consumed(c.Head()); err != nil {
				t.Fatal(err)
			}
		}
		p.Post(nil)
		if p.Free() != size-1 || c.Ready() {
			t.Error("posting nothing posted something")
		}
	})
}

func TestPushFetchOverTheWrap(t *testing.T) {
	onEach(t, func(t *testing.T, size uint32, memory func(uint64) *shm.Region) {
		p, c := newSQ(t, memory(uint64(size)*SQESize), size)
		var pushed, fetched uint64
		var got nvme.Command
		for i := uint32(0); pushed < 5*uint64(size) || i < 50; i++ {
			n := min(1+i*7%size, size-1)
			for range n {
				cmd := command(pushed)
				p.Push(&cmd)
				pushed++
			}
			if p.Free() != size-1-n {
				t.Fatalf("room for %d after %d of %d", p.Free(), n, size)
			}
			if k, err := c.Pending(p.Tail()); err != nil || k != n {
				t.Fatalf("%d pending, want %d: %v", k, n, err)
			}
			for left := n; left > 0; left-- {
				if k, err := c.Pending(p.Tail()); err != nil || k != left {
					t.Fatalf("%d pending, want %d: %v", k, left, err)
				}
				c.Fetch(&got)
				if want := command(fetched); got != want {
					t.Fatalf("command %d: %+v", fetched, got)
				}
				fetched++
			}
			if err := p.Released(uint16(c.Head())); err != nil {
				t.Fatal(err)
			}
		}
		if c.Size() != size {
			t.Errorf("size %d", c.Size())
		}
	})
}

// R4: an entry is read below a tail that was loaded before it, never beyond.
func TestRule04_NothingBeyondTheTail(t *testing.T) {
	mem := shm.NewHeap(4096)
	tail, err := mem.Word32(2048)
	if err != nil {
		t.Fatal(err)
	}
	p, c := newSQ(t, mem, 8)
	for i := range uint64(5) {
		cmd := command(i)
		p.Push(&cmd)
	}
	// Written, but not published: the device must not know.
	if n, err := c.Pending(tail.Load()); n != 0 || err != nil {
		t.Fatalf("%d pending before the tail moved: %v", n, err)
	}
	tail.Store(3)
	n, err := c.Pending(tail.Load())
	if n != 3 || err != nil {
		t.Fatalf("%d pending of 3: %v", n, err)
	}
	var cmd nvme.Command
	for i := range uint64(3) {
		c.Fetch(&cmd)
		if cmd != command(i) {
			t.Errorf("command %d: %+v", i, cmd)
		}
	}
	if n, err := c.Pending(3); n != 0 || err != nil {
		t.Errorf("%d pending at the tail: %v", n, err)
	}
}

// R9: room is counted before anything is fetched, and a driver that keeps below min(SQ, CQ) - 1
// outstanding never meets a full CQ.
func TestRule09_RoomBeforeFetch(t *testing.T) {
	for _, size := range sizes {
		sq, cq := size, max(size/2, MinSize)
		most := min(sq, cq) - 1
		mem := shm.NewHeap(int(uint64(size) * (SQESize + CQESize)))
		cqMem, err := mem.View(uint64(size)*SQESize, uint64(size)*CQESize)
		if err != nil {
			t.Fatal(err)
		}
		sp, sc := newSQ(t, mem, sq)
		cp, cc := newCQ(t, cqMem, cq)
		if sp.Free() != sq-1 || cp.Free() != cq-1 {
			t.Fatalf("empty rings of %d and %d have room for %d and %d", sq, cq, sp.Free(), cp.Free())
		}
		var cmd nvme.Command
		for lap := range 3 * size / most {
			for range most {
				sp.Push(&cmd)
			}
			n, err := sc.Pending(sp.Tail())
			if err != nil || n != most || cp.Free() < n {
				t.Fatalf("lap %d of %d/%d: %d pending, room for %d: %v", lap, sq, cq, n, cp.Free(), err)
			}
			for range n {
				sc.Fetch(&cmd)
				cp.Post([]Entry{MakeEntry(0, sc.Head(), 1, cmd.CID, 0)})
			}
			for range n {
				e, ok := cc.Next()
				if !ok {
					t.Fatal("a completion is missing")
				}
				if err := sp.Released(e.SQHead()); err != nil {
					t.Fatal(err)
				}
			}
			if err := cp.Consumed(cc.Head()); err != nil {
				t.Fatal(err)
			}
			if sp.Free() != sq-1 || cp.Free() != cq-1 {
				t.Fatalf("after lap %d there is room for %d and %d", lap, sp.Free(), cp.Free())
			}
		}
	}
}

// R30: every value that a doorbell can hold, at every state of a small ring.
func TestRule30_EveryTail(t *testing.T) {
	for size := uint32(2); size <= 9; size++ {
		for head := range size {
			for seen := range size { // entries between head and the tail seen last
				for tail := range 2*size + 3 {
					c := &SQConsumer{entries: make([]nvme.Command, size), size: size, head: head, seen: (head + seen) % size}
					n, err := c.Pending(tail)
					want := (tail + size - head) % size
					if tail >= size || want < seen {
						if !errors.Is(err, ErrDoorbell) || n != 0 || c.seen != (head+seen)%size {
							t.Fatalf("size %d, head %d, seen +%d, tail %d: %d, %v", size, head, seen, tail, n, err)
						}
						continue
					}
					if err != nil || n != want {
						t.Fatalf("size %d, head %d, seen +%d, tail %d: %d, %v; want %d", size, head, seen, tail, n, err, want)
					}
				}
			}
		}
	}
}

func TestRule30_EveryCQHead(t *testing.T) {
	for size := uint32(2); size <= 9; size++ {
		for head := range size {
			for used := range size {
				for v := range 2*size + 3 {
					q := &CQProducer{entries: make([]Entry, size), size: size, head: head, tail: (head + used) % size}
					free := q.Free()
					err := q.Consumed(v)
					gone := (v + size - head) % size
					if v >= size || gone > used {
						if !errors.Is(err, ErrDoorbell) || q.Head() != head || q.Free() != free {
							t.Fatalf("size %d, head %d, used %d, doorbell %d: %v, head %d", size, head, used, v, err, q.Head())
						}
						continue
					}
					if err != nil || q.Head() != v || q.Free() != free+gone {
						t.Fatalf("size %d, head %d, used %d, doorbell %d: %v, head %d", size, head, used, v, err, q.Head())
					}
				}
			}
		}
	}
}

// The driver is as careful with the device's SQHD.
func TestRule30_EverySQHead(t *testing.T) {
	for size := uint32(2); size <= 9; size++ {
		for head := range size {
			for used := range size {
				for v := range 2*size + 3 {
					q := &SQProducer{entries: make([]nvme.Command, size), size: size, head: head, tail: (head + used) % size}
					free := q.Free()
					err := q.Released(uint16(v))
					gone := (v + size - head) % size
					if v >= size || gone > used {
						if !errors.Is(err, ErrDoorbell) || q.Free() != free {
							t.Fatalf("size %d, head %d, used %d, SQHD %d: %v", size, head, used, v, err)
						}
						continue
					}
					if err != nil || q.Free() != free+gone {
						t.Fatalf("size %d, head %d, used %d, SQHD %d: %v", size, head, used, v, err)
					}
				}
			}
		}
	}
}

func TestRule30_WildValues(t *testing.T) {
	for _, size := range sizes {
		_, sc := newSQ(t, shm.NewHeap(int(size)*SQESize), size)
		cp, _ := newCQ(t, shm.NewHeap(int(size)*CQESize), size)
		for _, v := range []uint32{size, size + 1, 1 << 16, 1<<16 | 1, 1 << 31, 1<<31 | 1, 1<<32 - 1, -size} {
			if _, err := sc.Pending(v); !errors.Is(err, ErrDoorbell) {
				t.Errorf("size %d, tail %#x: %v", size, v, err)
			}
			if err := cp.Consumed(v); !errors.Is(err, ErrDoorbell) {
				t.Errorf("size %d, CQ head %#x: %v", size, v, err)
			}
		}
		if err := cp.Consumed(1); !errors.Is(err, ErrDoorbell) {
			t.Errorf("size %d, CQ head past the tail: %v", size, err)
		}
		if cp.Free() != size-1 || sc.Head() != 0 {
			t.Errorf("size %d: refused values moved something", size)
		}
	}
}

// R31: what was fetched stays as it was, whatever the other side writes later.
func TestRule31_CopiedOnce(t *testing.T) {
	mem := shm.NewHeap(4096)
	p, c := newSQ(t, mem, 4)
	cmd := command(7)
	p.Push(&cmd)
	var got nvme.Command
	c.Fetch(&got)
	junk := make([]byte, 4096)
	for i := range junk {
		junk[i] = 0xff
	}
	if err := mem.Write(0, junk); err != nil {
		t.Fatal(err)
	}
	if got != command(7) {
		t.Errorf("the copy changed to %+v", got)
	}
}

// R31: Prefetch is no read: what the other side writes after it is what Fetch copies. The batches go over the wrap too.
func TestRule31_PrefetchReadsNothing(t *testing.T) {
	onEach(t, func(t *testing.T, size uint32, memory func(bytes uint64) *shm.Region) {
		mem := memory(uint64(size) * SQESize)
		p, c := newSQ(t, mem, size)
		n := min(size-1, 16)
		for round := range uint64(3) {
			for i := range n {
				cmd := command(round + uint64(i))
				p.Push(&cmd)
			}
			at := c.Head()
			if c.Prefetch(n); c.Head() != at {
				t.Fatalf("the head moved from %d to %d", at, c.Head())
			}
			late := command(1000 + round)
			commands(mem, size)[at] = late
			for i := range n {
				want := command(round + uint64(i))
				if i == 0 {
					want = late
				}
				var got nvme.Command
				if c.Fetch(&got); got != want {
					t.Fatalf("round %d: entry %d is %+v, want %+v", round, i, got, want)
				}
			}
			if err := p.Released(uint16(c.Head())); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// R31: the device's half knows its tail and phase itself and never asks CQ memory.
func TestRule31_CQNeverReadBack(t *testing.T) {
	const size = 5
	mem := shm.NewHeap(4096)
	p, _ := newCQ(t, mem, size)
	junk := make([]byte, size*CQESize)
	for n := range uint64(40) {
		for i := range junk {
			junk[i] = byte(n) * 0x5b
		}
		if err := mem.Write(0, junk); err != nil {
			t.Fatal(err)
		}
		p.Post([]Entry{entry(n)})
		place := n % size
		lo, _ := mem.Word64(place * CQESize)
		hi, _ := mem.Word64(place*CQESize + 8)
		want := entry(n)
		if n/size%2 == 0 {
			want.Hi |= phaseBit
		}
		if lo.Load() != want.Lo || hi.Load() != want.Hi {
			t.Fatalf("entry %d: %#x %#x, want %#x", n, lo.Load(), hi.Load(), want)
		}
		if err := p.Consumed(p.Tail()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNothingAllocates(t *testing.T) {
	const size = 64
	sp, sc := newSQ(t, shm.NewHeap(size*SQESize), size)
	cp, cc := newCQ(t, shm.NewHeap(size*CQESize), size)
	es := make([]Entry, 0, size)
	var cmd nvme.Command
	if n := testing.AllocsPerRun(1000, func() {
		for range 20 {
			sp.Push(&cmd)
		}
		k, _ := sc.Pending(sp.Tail())
		es = es[:0]
		for range k {
			sc.Fetch(&cmd)
			es = append(es, MakeEntry(0, sc.Head(), 1, cmd.CID, 0))
		}
		cp.Post(es)
		for {
			e, ok := cc.Next()
			if !ok {
				break
			}
			_ = sp.Released(e.SQHead())
		}
		_ = cp.Consumed(cc.Head())
	}); n != 0 {
		t.Errorf("%v allocations per batch", n)
	}
}

// A ring whose memory moves goes on where it was, in the middle of a lap.
func TestDetachAttach(t *testing.T) {
	const size = 5
	sqMem, cqMem := shm.NewHeap(4096), shm.NewHeap(4096)
	sp, err1 := NewSQProducer(sqMem, size)
	sc, err2 := NewSQConsumer(sqMem, size)
	cp, cc := newCQ(t, cqMem, size)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	for i := range 3 * size {
		sp.Push(&nvme.Command{CID: uint16(i)})
		sc.Detach()
		cp.Detach()
		// The driver's halves stay where they are; the device's see the same bytes elsewhere.
		sq, cq := shm.NewHeap(4096), shm.NewHeap(4096)
		b, _ := sqMem.Bytes(0, size*SQESize)
		if err := errors.Join(sq.Write(0, b), sc.Attach(sq), cp.Attach(cq)); err != nil {
			t.Fatal(err)
		}
		if n, err := sc.Pending(sp.Tail()); n != 1 || err != nil {
			t.Fatalf("%d pending, %v", n, err)
		}
		var cmd nvme.Command
		sc.Fetch(&cmd)
		if cmd.CID != uint16(i) {
			t.Fatalf("command %d fetched in turn %d", cmd.CID, i)
		}
		cp.Post([]Entry{MakeEntry(0, sc.Head(), 1, cmd.CID, 0)})
		b, _ = cq.Bytes(uint64(cc.Head())*CQESize, CQESize)
		if err := cqMem.Write(uint64(cc.Head())*CQESize, b); err != nil {
			t.Fatal(err)
		}
		e, ok := cc.Next()
		if !ok || e.CID() != cmd.CID {
			t.Fatalf("completion %v, %v in turn %d", e, ok, i)
		}
		if err := errors.Join(sp.Released(e.SQHead()), cp.Consumed(cc.Head())); err != nil {
			t.Fatal(err)
		}
	}
	small, _ := sqMem.View(0, size*CQESize-1)
	if sc.Attach(small) == nil || cp.Attach(small) == nil {
		t.Error("attached to memory that is too small")
	}
}
