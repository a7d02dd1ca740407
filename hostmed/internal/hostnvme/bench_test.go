package hostnvme

import (
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// bare is a queue pair with a device that only answers, on the same thread.
type bare struct {
	*Pair
	sq      *ring.SQConsumer
	cq      *ring.CQProducer
	tail    uint32
	head    uint32
	entries [batch]ring.Entry
}

const batch = 16

func newBare(b *testing.B) *bare {
	b.Helper()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	d := &bare{Pair: &Pair{QID: 1, Size: depth + 1, EventFD: -1}}
	sq, cq := roundUp(uint64(d.Size)*ring.SQESize), roundUp(uint64(d.Size)*ring.CQESize)
	d.ExtraAt = sq + cq
	mem := shm.NewHeap(int(d.ExtraAt + extra))
	d.Mem = device.NewDMARegion(mem, 1<<40, func() error { return nil })
	var err error
	d.Pair.sq, err = mem.View(0, sq)
	must(err)
	d.Pair.cq, err = mem.View(sq, cq)
	must(err)
	d.sq, err = ring.NewSQConsumer(d.Pair.sq, d.Size)
	must(err)
	d.cq, err = ring.NewCQProducer(d.Pair.cq, d.Size)
	must(err)
	d.Q, err = queue.New(queue.Config{
		QID: 1, Size: d.Size, SQ: d.Pair.sq, CQ: d.Pair.cq, EventFD: -1,
		Tail: dbbuf.NewMMIO(func(v uint32) error { d.tail = v; return nil }), Head: dbbuf.NewMMIO(func(v uint32) error { d.head = v; return nil }),
	})
	must(err)
	return d
}

// answer completes the n commands of a batch.
func (d *bare) answer(b *testing.B, n int) {
	if pending, err := d.sq.Pending(d.tail); err != nil || int(pending) != n {
		b.Fatal(pending, err)
	}
	if err := d.cq.Consumed(d.head); err != nil {
		b.Fatal(err)
	}
	var cmd nvme.Command
	for i := range n {
		d.sq.Fetch(&cmd)
		d.entries[i] = ring.MakeEntry(0, d.sq.Head(), 1, cmd.CID, nvme.StatusSuccess)
	}
	d.cq.Post(d.entries[:n])
}

// BenchmarkCommand is a read of 4 KiB from its request to its end, on a device that takes no time: first with nothing but the pair's queue, as a driver of its own would have it, and then with
// all that mediation adds to it: checks, translation, slots, the lock.
func BenchmarkCommand(b *testing.B) {
	for _, n := range []int{1, batch} {
		name := map[int]string{1: "/qd1", batch: "/batch"}[n]
		b.Run("bare"+name, func(b *testing.B) {
			d := newBare(b)
			var out [batch]queue.Completion
			b.ReportAllocs()
			for i := 0; i < b.N; i += n {
				for range n {
					slot, _ := d.Q.Take(0)
					cmd := nvme.Command{Opcode: nvme.IORead, NSID: 1, PRP1: 1 << 30}
					cmd.SetSLBA(8)
					cmd.CDW12 = 7
					d.Q.Push(slot, &cmd)
				}
				if err := d.Q.Publish(); err != nil {
					b.Fatal(err)
				}
				d.answer(b, n)
				if got, err := d.Q.Reap(out[:]); got != n || err != nil {
					b.Fatal(got, err)
				}
			}
		})
		b.Run("mediated"+name, func(b *testing.B) {
			d := newBare(b)
			p := &mux{log: hclog.NewNullLogger()}
			if err := p.open(d.Pair); err != nil {
				b.Fatal(err)
			}
			mem := heap(b, 64*page)
			m := NewMemory(&scattered{place: func([]byte) (uint64, error) { return 1 << 32, nil }}, hclog.NewNullLogger())
			m.add(mem)
			m.Settle(patience)
			q := &Queue{pair: p, slice: all, fd: -1, polled: true, pointers: pointers{finder: finder{m: m}, page: devicePage, block: 512}}
			owner := new(int)
			vecs := make([][]Seg, batch)
			for i := range vecs {
				vecs[i] = []Seg{seg(mem[i*page:][:page])}
			}
			guest := &nvme.Command{Opcode: nvme.IORead}
			b.ReportAllocs()
			for i := 0; i < b.N; i += n {
				q.Begin()
				for k := range n {
					x := q.Take()
					x.Op, x.Off, x.Len, x.Vec, x.Cmd, x.Owner = Read, uint64(k)*page, page, vecs[k], guest, owner
					q.Put(x)
				}
				q.Commit()
				d.answer(b, n)
				done := q.Reap(batch)
				if len(done) != n {
					b.Fatal(len(done))
				}
				for _, x := range done {
					q.Free(x)
				}
			}
		})
	}
	b.Run("nothing", func(b *testing.B) { // a Reap that finds nothing
		d := newBare(b)
		p := &mux{log: hclog.NewNullLogger()}
		if err := p.open(d.Pair); err != nil {
			b.Fatal(err)
		}
		q := &Queue{pair: p, slice: all, fd: -1, polled: true}
		for b.Loop() {
			if len(q.Reap(batch)) != 0 {
				b.Fatal("something")
			}
		}
	})
}
