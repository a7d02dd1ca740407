package ring

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Both rings as one queue pair against slices, with random batches and random refusals.
func TestAgainstNaiveModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sqSize := rapid.SampledFrom(sizes[:5]).Draw(t, "SQ size")
		cqSize := rapid.SampledFrom(sizes[:5]).Draw(t, "CQ size")
		sqMem, cqMem := shm.NewHeap(int(sqSize)*SQESize), shm.NewHeap(int(cqSize)*CQESize)
		sp, err1 := NewSQProducer(sqMem, sqSize)
		sc, err2 := NewSQConsumer(sqMem, sqSize)
		cp, err3 := NewCQProducer(cqMem, cqSize)
		cc, err4 := NewCQConsumer(cqMem, cqSize)
		for _, err := range []error{err1, err2, err3, err4} {
			if err != nil {
				t.Fatal(err)
			}
		}

		// The model: what is where, oldest first.
		var (
			pushed    uint64   // commands so far
			unseen    []uint64 // pushed, the tail not published
			waiting   []uint64 // published, not fetched
			fetched   []uint64 // fetched, not completed
			posted    []uint64 // completed, not reaped
			heads     []uint32 // SQ head of each of posted
			reaped    uint32   // reaped, CQ head not published
			released  uint32   // SQ entries below the head that the driver knows
			tail      uint32   // the SQ doorbell
			fetchedTo uint32
			consumed  uint64
		)
		most := int(sqSize) - 1
		used := func() int { return int(pushed) - int(released) }
		t.Repeat(map[string]func(*rapid.T){
			"push": func(t *rapid.T) {
				if sp.Free() == 0 {
					t.Skip("full")
				}
				for range rapid.IntRange(1, int(sp.Free())).Draw(t, "n") {
					cmd := command(pushed)
					sp.Push(&cmd)
					unseen = append(unseen, pushed)
					pushed++
				}
			},
			"publish": func(*rapid.T) {
				tail = sp.Tail()
				waiting = append(waiting, unseen...)
				unseen = nil
			},
			"fetch": func(t *rapid.T) {
				n, err := sc.Pending(tail)
				if err != nil || int(n) != len(waiting) {
					t.Fatalf("%d pending, want %d: %v", n, len(waiting), err)
				}
				room := int(cp.Free()) - len(fetched)
				for range rapid.IntRange(0, min(int(n), room)).Draw(t, "n") {
					var cmd nvme.Command
					sc.Fetch(&cmd)
					if cmd != command(waiting[0]) {
						t.Fatalf("fetched %+v for command %d", cmd, waiting[0])
					}
					fetched = append(fetched, waiting[0])
					waiting = waiting[1:]
					fetchedTo = (fetchedTo + 1) % sqSize
				}
			},
			"post": func(t *rapid.T) {
				var es []Entry
				for range rapid.IntRange(0, len(fetched)).Draw(t, "n") {
					i := rapid.IntRange(0, len(fetched)-1).Draw(t, "which") // in any order
					n := fetched[i]
					fetched = slices.Delete(fetched, i, i+1)
					es = append(es, MakeEntry(n, sc.Head(), 1, uint16(n), nvme.Status(n&0x7fff)))
					posted = append(posted, n)
					heads = append(heads, fetchedTo)
				}
				cp.Post(es)
			},
			"reap": func(t *rapid.T) {
				for range rapid.IntRange(0, len(posted)).Draw(t, "n") {
					e, ok := cc.Next()
					n := posted[0]
					if !ok || e.Lo != n || e.CID() != uint16(n) || e.Status() != nvme.Status(n&0x7fff) || uint32(e.SQHead()) != heads[0] {
						t.Fatalf("reaped %+v, %v for command %d", e, ok, n)
					}
					was := released % sqSize
					released += distance(was, heads[0], sqSize)
					if err := sp.Released(e.SQHead()); err != nil {
						t.Fatal(err)
					}
					posted, heads = posted[1:], heads[1:]
					reaped++
					consumed++
				}
			},
			"publish head": func(t *rapid.T) {
				if err := cp.Consumed(cc.Head()); err != nil {
					t.Fatal(err)
				}
				reaped = 0
			},
			"wild tail": func(t *rapid.T) {
				v := rapid.Uint32().Filter(func(v uint32) bool { return v >= sqSize }).Draw(t, "tail")
				if _, err := sc.Pending(v); err == nil {
					t.Fatalf("tail %d in a ring of %d", v, sqSize)
				}
			},
			"wild head": func(t *rapid.T) {
				v := rapid.Uint32().Draw(t, "head")
				if v < cqSize && distance(cp.Head(), v, cqSize) <= distance(cp.Head(), cp.Tail(), cqSize) {
					t.Skip("a fair value")
				}
				if cp.Consumed(v) == nil {
					t.Fatalf("head %d with head %d, tail %d, size %d", v, cp.Head(), cp.Tail(), cqSize)
				}
			},
			"": func(t *rapid.T) {
				if got, want := int(sp.Free()), most-used(); got != want {
					t.Fatalf("SQ has room for %d, want %d", got, want)
				}
				if got, want := int(cp.Free()), int(cqSize)-1-len(posted)-int(reaped); got != want {
					t.Fatalf("CQ has room for %d, want %d", got, want)
				}
				if cc.Ready() != (len(posted) > 0) || cc.Head() != uint32(consumed%uint64(cqSize)) {
					t.Fatalf("ready %v with %d posted, head %d", cc.Ready(), len(posted), cc.Head())
				}
				if sc.Head() != fetchedTo {
					t.Fatalf("SQ head %d, want %d", sc.Head(), fetchedTo)
				}
			},
		})
	})
}
