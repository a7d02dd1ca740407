package ioq

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// interrupts returns how many there were since the last call.
func (p *pair) interrupts() uint64 {
	var b [8]byte
	if _, err := unix.Read(p.irq, b[:]); err != nil {
		return 0
	}
	return binary.LittleEndian.Uint64(b[:])
}

// Two CQs of different workers share a vector: their completions are gathered together. NVMe Base 2.0c 5.27.1.6.
func TestCoalescingIsPerVector(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, workers: 2})
	a, b := r.pair(1, 64, true), r.pair(2, 64, true)
	g := r.ctl.cqs[2].Load()
	if g.w == r.ctl.cqs[1].Load().w {
		t.Fatal("both queues have one worker")
	}
	g.w.Call(func() { g.vector = &r.ctl.vectors[1] })
	r.ctl.SetCoalescing(7, 255) // eight, or 25.5 ms
	read := rw(nvme.IORead, 0, 8, base+dataOff)
	for range 20 {
		for range 4 {
			if st := a.do(read); !st.OK() {
				t.Fatal(st)
			}
			if st := b.do(read); !st.OK() {
				t.Fatal(st)
			}
		}
		r.eventually("the interrupt of eight completions of two queues", func() bool { return a.interrupts() > 0 })
	}
	if n := b.interrupts(); n != 0 {
		t.Errorf("%d interrupts of a vector that no queue has", n)
	}
	b.do(read)
	r.eventually("the interrupt after the aggregation time", func() bool { return a.interrupts() > 0 })

	// What is held back when coalescing is turned off, or a queue deleted, comes in its time.
	a.do(read)
	r.ctl.SetCoalescing(0, 0)
	r.eventually("the interrupt of before", func() bool { return a.interrupts() > 0 })
	r.ctl.SetCoalescing(7, 100)
	a.do(read)
	r.ctl.DeleteSQ(1)
	r.ctl.DeleteCQ(1)
	r.eventually("the interrupt of a deleted queue", func() bool { return a.interrupts() > 0 })
}

func TestHeld(t *testing.T) {
	var h held
	step := func(n uint32, wantFire, wantFirst bool, wantWait uint32) {
		t.Helper()
		if fire, first, wait := h.gather(n, 8); fire != wantFire || first != wantFirst || wait != wantWait {
			t.Errorf("gather %d: fire %v first %v wait %d, want %v %v %d", n, fire, first, wait, wantFire, wantFirst, wantWait)
		}
	}
	step(3, false, true, 0)
	step(4, false, false, 0)
	step(1, true, false, 0)
	if h.expire(0) {
		t.Error("the timer of a wait that the threshold ended fires")
	}
	step(9, true, false, 1)
	step(1, false, true, 2)
	if !h.expire(2) || h.expire(2) {
		t.Error("a wait ends once")
	}
	step(1, false, true, 3)
	h.reset()
	if h.expire(3) {
		t.Error("the timer of before a reset fires")
	}
	h.v.Store(1<<64 - 1<<32) // the count of waits wraps
	step(1, false, true, 1<<32-1)
	if !h.expire(1<<32 - 1) {
		t.Error("a wait before the wrap does not end")
	}
	step(1, false, true, 0)

	// However many gather at once, each completion is in an interrupt or in what is held at the end.
	h = held{}
	var fired, begun atomic.Uint32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10_000 {
				fire, first, _ := h.gather(1, 8)
				if fire {
					fired.Add(1)
				}
				if first {
					begun.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if fired.Load() != 5000 || begun.Load() != 5000 || uint32(h.v.Load()) != 0 {
		t.Errorf("%d interrupts and %d waits of 40000 completions by eight, %d held", fired.Load(), begun.Load(), uint32(h.v.Load()))
	}
}

// noting is a backend that writes down which requests had to be durable.
type noting struct {
	backend.Backend
	mu  sync.Mutex
	fua map[backend.Op][]bool
}

type notingQueue struct {
	backend.Queue
	b *noting
}

func (b *noting) NewQueue() (backend.Queue, error) {
	q, err := b.Backend.NewQueue()
	return &notingQueue{q, b}, err
}

func (q *notingQueue) Submit(reqs, done []*backend.Request) int {
	q.b.mu.Lock()
	for _, r := range reqs {
		q.b.fua[r.Op] = append(q.b.fua[r.Op], r.FUA)
	}
	q.b.mu.Unlock()
	return q.Queue.Submit(reqs, done)
}

// With the write cache off each write is durable, whether the host says FUA or not.
func TestWriteCacheOff(t *testing.T) {
	mem, err := backend.Open("mem:size=16MiB")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	b := &noting{Backend: mem, fua: map[backend.Op][]bool{}}
	r := newRig(t, rigConfig{shadow: true, backend: b})
	p := r.pair(1, 64, false)
	for _, on := range []bool{true, false, true} {
		r.ctl.SetWriteCache(on)
		for _, op := range []uint8{nvme.IOWrite, nvme.IOWriteZeroes, nvme.IORead} {
			if st := p.do(rw(op, 0, 8, base+dataOff)); !st.OK() {
				t.Fatal(st)
			}
		}
	}
	r.ctl.SetWriteCache(false)
	r.ctl.Stop(patience)
	if r.ctl.through.Load() {
		t.Error("a reset leaves the cache off")
	}
	for op, want := range map[backend.Op][]bool{backend.OpWrite: {false, true, false}, backend.OpWriteZeroes: {false, true, false}, backend.OpRead: {false, false, false}} {
		if got := b.fua[op]; len(got) != 3 || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
			t.Errorf("op %v: FUA %v, want %v", op, got, want)
		}
	}
}

// Every doorbell stride in every mode: each queue has doorbells of its own.
func TestDoorbellStrides(t *testing.T) {
	for dstrd := range uint8(8) {
		for _, c := range []rigConfig{{shadow: true}, {mode: ctrl.Trap}, {mode: ctrl.Mmap}} {
			c.dstrd = dstrd
			slots := 4096 / nvme.DoorbellStride(dstrd)
			if c.shadow && slots < 2*(8+1) {
				continue // R29: the page has no room for eight queues
			}
			r := newRig(t, c)
			for qid := uint16(1); qid <= 8; qid += 7 {
				p := r.pair(qid, 8, false)
				for range 20 {
					if st := p.do(rw(nvme.IORead, 0, 8, base+dataOff)); !st.OK() {
						t.Fatal(st)
					}
				}
			}
			r.noError()
			if dstrd > 0 && c.mode == ctrl.Trap {
				r.workers[0].Call(func() { r.ctl.Doorbell(r.workers[0], 4, 1) }) // between two doorbells
				if e := <-r.errs; e.Kind != NoQueue {
					t.Errorf("stride %d: a write between doorbells is %v", nvme.DoorbellStride(dstrd), e.Kind)
				}
			}
		}
	}
}
