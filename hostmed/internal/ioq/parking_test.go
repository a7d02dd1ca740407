package ioq

import (
	"bytes"
	"fmt"
	"os"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// unmap takes [base+off, +n) away as the session does for a client.
func (r *rig) unmap(off, n uint64) {
	r.t.Helper()
	gone, err := r.mem.Unmap(base+off, n)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, page := range []uint64{shadowOff, eiOff} {
		if r.ctl.shadow != nil && lost(gone, base+page, 4096) {
			if err := r.ctl.SetDoorbellPages(nil, nil); err != nil {
				r.t.Fatal(err)
			}
		}
	}
	r.ctl.Unmapped(gone, patience)
	if err := r.mem.Release(gone); err != nil {
		r.t.Fatal(err)
	}
}

// remap gives it back.
func (r *rig) remap(off, n uint64) {
	r.t.Helper()
	r.dmaMap(off, n)
	if r.ctl.away {
		shadow, err1 := r.mem.Table().View(base+shadowOff, 4096)
		ei, err2 := r.mem.Table().View(base+eiOff, 4096)
		if err1 == nil && err2 == nil {
			if err := r.ctl.ResumeDoorbellPages(shadow, ei); err != nil {
				r.t.Fatal(err)
			}
		}
	}
	r.ctl.Mapped()
}

// read returns n bytes of guest memory, mapped or not.
func (r *rig) read(off, n uint64) []byte {
	r.t.Helper()
	if r.scatter {
		p := make([]byte, 0, n)
		for at := off; at < off+n; at += 4096 {
			b, _ := r.guest.Bytes(filePage(at), 4096)
			p = append(p, b...)
		}
		return p
	}
	p := make([]byte, n)
	if err := r.guest.Read(off, p); err != nil {
		r.t.Fatal(err)
	}
	return p
}

// eachMappedMode is eachMode for guest memory that can be mapped again.
func eachMappedMode(t *testing.T, f func(t *testing.T, c rigConfig)) {
	for _, m := range modes {
		if !m.config.heap {
			t.Run(m.name, func(t *testing.T) { f(t, m.config) })
		}
	}
}

func eachKindOfGuest(t *testing.T, f func(t *testing.T, c rigConfig)) {
	eachMappedMode(t, func(t *testing.T, c rigConfig) {
		for _, c.scatter = range []bool{false, true} {
			t.Run(fmt.Sprintf("scattered=%v", c.scatter), func(t *testing.T) { f(t, c) })
		}
	})
}

// A guest behind a vIOMMU: queues of many pages, none of which lies beside the next.
func TestScatteredQueues(t *testing.T) {
	eachMappedMode(t, func(t *testing.T, c rigConfig) {
		c.scatter, c.workers = true, 2
		r := newRig(t, c)
		before := mappings(t)
		pairs := []*pair{r.pair(1, 1024, false), r.pair(2, 1024, true), r.pair(3, 300, false)}
		for round := range 40 { // over the wrap
			for i, p := range pairs {
				n := 90 + i
				for k := range n {
					at := uint64(dataOff + (k*7%64)*4096)
					op := nvme.IOWrite
					if round%2 == 1 {
						op = nvme.IORead
					}
					p.push(rw(uint8(op), uint64(k)*8, 8, base+at))
				}
				p.publish()
			}
			for i, p := range pairs {
				seen := map[uint16]bool{}
				for _, e := range p.reap(90 + i) {
					if e.Status() != nvme.StatusSuccess || seen[e.CID()] {
						t.Fatalf("round %d: CID %d: %v, seen %v", round, e.CID(), e.Status(), seen[e.CID()])
					}
					seen[e.CID()] = true
				}
			}
		}
		r.noError()
		for _, p := range pairs {
			r.ctl.DeleteSQ(p.qid)
			r.ctl.DeleteCQ(p.qid)
		}
		// The driver's views are left, one page each.
		if got := mappings(t) - before; got != 2*(4+16)+2+5 {
			t.Errorf("%d mappings more than before the queues", got)
		}
	})
}

func mappings(t *testing.T) int {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(maps, []byte("memfd:guest"))
}

// A queue whose memory is unmapped is not touched, does not fail, and goes on where it was when its memory is
// back, with what was rung meanwhile.
func TestRule25_QueueParked(t *testing.T) {
	eachKindOfGuest(t, func(t *testing.T, c rigConfig) {
		r := newRig(t, c)
		p, other := r.pair(1, 16, true), r.pair(2, 16, false)
		lose := []struct {
			name   string
			off, n uint64
		}{
			{"SQ", p.sqOff, 4096}, {"CQ", p.cqOff, 4096}, {"both", p.cqOff, 8192},
		}
		rounds := 60
		if testing.Short() {
			rounds = 15 // over the wrap and both phases yet
		}
		for round := range rounds {
			l := lose[round%len(lose)]
			p.do(rw(nvme.IORead, 0, 8, base+dataOff))
			off, n := l.off, l.n
			if !c.scatter {
				off, n = 0, guestSize // one range: all or nothing
			}
			r.unmap(off, n)
			if l.name == "CQ" && r.state(1) != Parked {
				t.Fatalf("the queue is %v", r.state(1))
			}
			cq := r.read(p.cqOff, 4096)
			for range 3 {
				p.push(rw(nvme.IORead, 0, 8, base+dataOff))
				p.publish()
			}
			for _, w := range r.workers {
				w.Call(func() {})
			}
			if c.scatter { // the other queue's memory is there
				other.do(rw(nvme.IORead, 0, 8, base+dataOff))
			}
			if !bytes.Equal(cq, r.read(p.cqOff, 4096)) {
				t.Fatalf("round %d: memory that is not mapped was written", round)
			}
			r.remap(off, n)
			for _, e := range p.reap(3) {
				if e.Status() != nvme.StatusSuccess {
					t.Fatalf("round %d: %v", round, e.Status())
				}
			}
		}
		r.noError()
	})
}

// What is in flight when the CQ's memory goes is completed there before the client has its answer.
func TestRule35_ParkingDrains(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1024, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: b, scatter: true})
	p := r.pair(1, 16, false)
	p.push(rw(nvme.IORead, 0, 1, base+dataOff))
	p.push(rw(nvme.IORead, 0, 1, base+dataOff))
	p.publish()
	r.eventually("two commands in flight", func() bool { return b.held() == 2 })
	done := make(chan struct{})
	go func() { r.unmap(p.cqOff, 4096); close(done) }()
	for range 2 {
		select {
		case <-done:
			t.Fatal("the CQ's memory was given up under a command in flight")
		case <-time.After(10 * time.Millisecond):
		}
		b.finish(1)
	}
	<-done
	p.push(rw(nvme.IORead, 0, 1, base+dataOff))
	p.publish()
	if n := b.held(); n != 0 {
		t.Errorf("%d commands fetched for a CQ that is not there", n)
	}
	p.reap(2)
	r.remap(p.cqOff, 4096)
	r.eventually("the third in flight", func() bool { return b.held() == 1 })
	b.finish(1)
	p.reap(1)
	r.noError()
}

// An unmap waits for the commands that use its memory, and for no others.
func TestRule35_UnmapWaitsForItsOwnCommandsOnly(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1024, LBAShift: 9}}
	for name, op := range map[string]uint8{"read": nvme.IORead, "write": nvme.IOWrite, "compare": nvme.IOCompare} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{shadow: true, backend: b, scatter: true, workers: 2})
			p, idle := r.pair(1, 64, false), r.pair(2, 64, false)
			const first, second, third = dataOff, dataOff + 0x1000, dataOff + 0x2000
			two := rw(op, 0, 16, base+first)
			two.PRP2 = base + second
			p.push(two)
			p.publish()
			r.eventually("a command in flight", func() bool { return b.held() == 1 })
			for i := range uint64(50) { // memory of nobody: at once
				r.unmap(third+i*4096, 4096)
			}
			r.unmap(idle.cqOff, 4096) // a queue with nothing in flight
			done := make(chan struct{})
			go func() { r.unmap(second, 4096); close(done) }()
			select {
			case <-done:
				t.Fatal("memory was given up under a command in flight")
			case <-time.After(20 * time.Millisecond):
			}
			b.finish(1)
			<-done
			p.reap(1)
			p.push(two)
			p.publish()
			if st := p.reap(1)[0].Status(); st.Code() != nvme.StatusDataTransferError {
				t.Errorf("a command whose data is not mapped: %v", st)
			}
		})
	}
}

// An unmap of many ranges is not compared with each command: it waits for all that are in flight.
func TestRule35_UnmapOfManyRangesWaitsForAll(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1024, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: b, scatter: true})
	p := r.pair(1, 16, false)
	p.push(rw(nvme.IORead, 0, 1, base+dataOff))
	p.publish()
	r.eventually("a command in flight", func() bool { return b.held() == 1 })
	r.unmap(dataOff+0x10000, fewRanges*4096)
	done := make(chan struct{})
	go func() { r.unmap(dataOff+0x40000, (fewRanges+1)*4096); close(done) }()
	select {
	case <-done:
		t.Fatal("it did not wait")
	case <-time.After(20 * time.Millisecond):
	}
	b.finish(1)
	<-done
	p.reap(1)
	r.noError()
}

// One SQ of a CQ is parked; the other works.
func TestOneSQOfTwoParked(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, scatter: true})
	p := r.pair(1, 64, false)
	off, mem, dev := r.alloc(8 * 64)
	if err := r.ctl.CreateSQ(ctrl.SQParams{QID: 2, CQID: 1, Size: 8, IOVA: base + off, Mem: dev}); err != nil {
		t.Fatal(err)
	}
	q := &pair{r: r, qid: 2, cq: p.cq, head: p.head, irq: -1}
	var err error
	if q.sq, err = ring.NewSQProducer(mem, 8); err != nil {
		t.Fatal(err)
	}
	q.tail = r.publisher(2, false, &q.rings)
	for range 20 {
		r.unmap(off, 4096)
		q.push(rw(nvme.IORead, 0, 8, base+dataOff))
		q.publish()
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
		r.remap(off, 4096)
		if e := q.reap(1)[0]; e.SQID() != 2 {
			t.Fatalf("completion of SQ %d", e.SQID())
		}
	}
	r.unmap(off, 4096)
	r.unmap(p.cqOff, 4096)
	r.ctl.DeleteSQ(2)
	r.remap(off, 4096) // nobody's now
	r.remap(p.cqOff, 4096)
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.unmap(0, guestSize)
	r.ctl.DeleteSQ(1)
	r.ctl.DeleteCQ(1)
	r.remap(0, guestSize)
	r.pair(1, 16, false).do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.noError()
}

// A queue made while the doorbell pages are away has its slots seeded when they come back: they hold an older queue's (R22).
func TestRule22_QueueMadeWhilePagesAreAway(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, scatter: true})
	old := r.pair(1, 16, false)
	old.do(rw(nvme.IORead, 0, 8, base+dataOff))
	shadow := r.view(shadowOff, 4096)
	for off := uint64(16); off < 64; off += 4 {
		x, _ := shadow.Word32(off)
		x.Store(11)
	}
	r.unmap(shadowOff, 4096)
	p := r.pair(2, 16, false)
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.settle([]*pair{p})
	r.remap(shadowOff, 4096)
	p.move()
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	old.do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.noError()
}

// A bad doorbell of a parked queue is found when the queue goes on (R30), and a failed one stays so.
func TestRule30_BadDoorbellWhileParked(t *testing.T) {
	r := newRig(t, rigConfig{scatter: true})
	p := r.pair(1, 16, false)
	r.unmap(p.sqOff, 4096)
	w := r.workers[0]
	w.Call(func() { r.ctl.Doorbell(w, 8, 99) })
	r.noError()
	r.remap(p.sqOff, 4096)
	if e := <-r.errs; e.Kind != BadSQTail {
		t.Errorf("reported %v", e.Kind)
	}
	r.unmap(p.cqOff, 8192)
	r.remap(p.cqOff, 8192)
	if s := r.state(1); s != Failed {
		t.Errorf("the queue is %v", s)
	}
}

// Stop, while anything is parked, leaves nothing behind.
func TestStopWhileParked(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, scatter: true})
	for _, off := range []uint64{0, 4096} {
		p := r.pair(1, 16, false)
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
		r.unmap(p.cqOff+off, 4096)
		r.unmap(shadowOff, 4096)
		r.ctl.Stop(patience)
		r.remap(p.cqOff+off, 4096)
		r.dmaMap(shadowOff, 4096)
		r.ctl.Mapped()
		if r.ctl.shadow != nil || len(r.ctl.groups) > 0 {
			t.Fatal("queues or pages came back after a reset (R21)")
		}
		if err := r.ctl.SetDoorbellPages(r.view(shadowOff, 4096), r.view(eiOff, 4096)); err != nil {
			t.Fatal(err)
		}
	}
}

// Commands on two queues, unmaps and maps in any order: every command is completed once, and data is what was written.
func TestParkingAgainstNaiveModel(t *testing.T) {
	eachMappedMode(t, func(t *testing.T, c rigConfig) {
		c.scatter = true
		r := newRig(t, c)
		pairs := []*pair{r.pair(1, 8, false), r.pair(2, 150, true)}
		pages := []uint64{shadowOff, eiOff, dataOff}
		for _, p := range pairs {
			pages = append(pages, p.cqOff, p.sqOff, p.sqOff+4096)
		}
		rapid.Check(t, func(rt *rapid.T) {
			away := map[uint64]bool{}
			waiting := [2]int{}
			take := func(i int) {
				for e, ok := pairs[i].cq.Next(); ok; e, ok = pairs[i].cq.Next() {
					if st := e.Status(); st != nvme.StatusSuccess && st.Code() != nvme.StatusDataTransferError {
						rt.Fatalf("queue %d: %v", i+1, st)
					}
					if err := pairs[i].sq.Released(e.SQHead()); err != nil {
						rt.Fatal(err)
					}
					waiting[i]--
				}
				if err := pairs[i].head.Publish(pairs[i].cq.Head()); err != nil {
					rt.Fatal(err)
				}
			}
			for range rapid.IntRange(1, 60).Draw(rt, "steps") {
				i := rapid.IntRange(0, 1).Draw(rt, "queue")
				page := rapid.SampledFrom(pages).Draw(rt, "page")
				switch rapid.IntRange(0, 3).Draw(rt, "step") {
				case 0:
					for range rapid.IntRange(1, 10).Draw(rt, "commands") {
						if pairs[i].sq.Free() > 0 {
							pairs[i].push(rw(nvme.IORead, 0, 8, base+dataOff))
							waiting[i]++
						}
					}
					pairs[i].publish()
				case 1:
					take(i)
				case 2:
					if !away[page] {
						r.unmap(page, 4096)
						away[page] = true
					}
				case 3:
					if away[page] {
						r.remap(page, 4096)
						delete(away, page)
					}
				}
			}
			for page := range away {
				r.remap(page, 4096)
			}
			for i := range pairs {
				for end := time.Now().Add(patience); waiting[i] > 0; {
					take(i)
					if time.Now().After(end) {
						rt.Fatalf("queue %d: %d commands were never completed\n%v", i+1, waiting[i], r.ctl)
					}
				}
				if waiting[i] < 0 {
					rt.Fatalf("queue %d: %d completions too many", i+1, -waiting[i])
				}
			}
			r.noError()
		})
	})
}

// What one DMA_UNMAP costs the workers while commands are in flight.
func BenchmarkUnmap(b *testing.B) {
	for _, workers := range []int{1, 2} {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			s := &slow{info: backend.Info{Blocks: 1024, LBAShift: 9}}
			r := newRig(b, rigConfig{shadow: true, backend: s, scatter: true, workers: workers})
			p := r.pair(1, 64, false)
			for range 32 {
				p.push(rw(nvme.IORead, 0, 1, base+dataOff))
			}
			p.publish()
			r.eventually("commands in flight", func() bool { return s.held() == 32 })
			b.ReportAllocs()
			for b.Loop() {
				r.unmap(dataOff+0x10000, 4096)
				r.remap(dataOff+0x10000, 4096)
			}
			s.finish(32)
			p.reap(32)
		})
	}
}
