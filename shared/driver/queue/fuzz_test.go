package queue

import (
	"context"
	"encoding/binary"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/ring"
)

// FuzzHostileDevice gives a random device the memory that it shares with the driver, between the driver's steps. The driver must
// not panic or loop, must return each command once at the most, and must not go on after an error.
func FuzzHostileDevice(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Add([]byte{0, 2, 3, 0, 2, 3, 0, 0, 0, 2, 2, 2, 3, 3, 3})
	f.Add([]byte{0, 4, 8, 0, 0, 1, 0, 0, 0, 0, 0, 3, 3})
	f.Fuzz(func(t *testing.T, script []byte) {
		size := uint32(2)
		if len(script) > 0 {
			size += uint32(script[0] % 9)
		}
		p := newPair(t, size, func(c *Config) { c.Timeout = time.Minute })
		live := map[uint64]bool{}
		out := make([]Completion, 3)
		tag := uint64(0)
		take := func(n int) []byte {
			b := make([]byte, n)
			script = script[copy(b, script):]
			return b
		}
		failed := false
		done, cancel := context.WithCancel(context.Background())
		cancel()
		for len(script) > 0 {
			switch op := take(1)[0]; op % 8 {
			case 0: // the driver submits
				if slot, ok := p.Take(tag); ok {
					if int(slot) >= len(p.slots) {
						t.Fatalf("slot %d", slot)
					}
					p.Cancel(slot)
					p.submit(t, tag)
					live[tag] = true
					tag++
				}
			case 1:
				if err := p.Publish(); (err != nil) != failed {
					t.Fatalf("publish: %v, failed before: %v", err, failed)
				}
			case 2: // the device answers as it should, if it still can
				if n, err := p.sq.Pending(p.tail.Load()); err == nil && n > 0 {
					var c [1]ring.Entry
					cmds := p.fetch(t)
					c[0] = ring.MakeEntry(uint64(cmds[0].CDW10), p.sq.Head(), qid, cmds[0].CID, 0)
					p.cq.Post(c[:])
				}
			case 3:
				n, err := p.Reap(out)
				for i := range out[:n] {
					if !live[out[i].Tag] {
						t.Fatalf("tag %d, which is not outstanding", out[i].Tag)
					}
					delete(live, out[i].Tag)
				}
				failed = failed || err != nil
			case 4: // the device posts anything
				b := take(16)
				p.cq.Post([]ring.Entry{{Lo: binary.LittleEndian.Uint64(b), Hi: binary.LittleEndian.Uint64(b[8:]) &^ (1 << 48)}})
			case 5: // or writes anything anywhere
				b := take(10)
				off := uint64(binary.LittleEndian.Uint16(b))
				if w, err := p.cqMem.Word64(off % p.cqMem.Len() &^ 7); err == nil {
					w.Store(binary.LittleEndian.Uint64(b[2:]))
				}
				if w, err := p.page.Word32(off % p.page.Len() &^ 3); err == nil {
					w.Store(binary.LittleEndian.Uint32(b[2:]))
				}
			case 6:
				if err := p.Check(); (err != nil) != failed {
					t.Fatalf("check: %v, failed before: %v", err, failed)
				}
			case 7:
				if failed || p.Outstanding() == 0 {
					if !p.Queue.cq.Ready() && p.Wait(done) == nil {
						t.Fatal("waited with success for nothing")
					}
				}
			}
			if p.Outstanding() != len(live) {
				t.Fatalf("%d outstanding, %d live", p.Outstanding(), len(live))
			}
		}
		n := 0
		p.Drop(func(tag uint64) {
			if !live[tag] {
				t.Fatalf("dropped tag %d", tag)
			}
			n++
		})
		if n != len(live) || p.Outstanding() != 0 {
			t.Fatalf("dropped %d of %d", n, len(live))
		}
	})
}
