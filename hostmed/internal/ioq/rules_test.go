package ioq

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// stopped gives the test the worker's thread: nothing of it runs until release.
func (r *rig) stopped(w *Worker) (release func()) {
	begun, end := make(chan struct{}), make(chan struct{})
	w.Post(func() { close(begun); <-end })
	<-begun
	return func() { close(end) }
}

func (r *rig) asleep(qid uint16) {
	r.t.Helper()
	r.eventually("the queue to be armed", func() bool { return r.state(qid) == Armed })
}

func TestRule03_SleepOnlyWhenArmSaidYes(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	r.asleep(1)
	g := r.ctl.cqs[1].Load()
	w := r.workers[0]
	release := r.stopped(w)
	// The tail moves after the event index was loaded by the driver and before the device arms: nobody rings.
	tail, _, err := dbbuf.Slots(r.view(shadowOff, 4096), 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	c := rw(nvme.IORead, 0, 8, base+dataOff)
	p.sq.Push(&c)
	tail.Store(1)
	g.state = Polling
	if w.arm(g) || g.state == Armed {
		t.Error("a queue with a command in it was put to sleep")
	}
	g.state = Armed
	w.wake(g)
	release()
	p.reap(1)
}

func TestRule08_CQHeadArmedAtHeadWhenBlocked(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 4, false)
	// Three completions fill the CQ; the driver refills the SQ and keeps the head to itself.
	for range 3 {
		p.push(rw(nvme.IORead, 0, 8, base+dataOff))
	}
	p.publish()
	taken := 0
	for taken < 3 {
		if e, ok := p.cq.Next(); ok {
			taken++
			_ = p.sq.Released(e.SQHead())
		}
	}
	p.push(rw(nvme.IORead, 0, 8, base+dataOff))
	p.publish()
	r.asleep(1)
	_, ei, err := dbbuf.Slots(r.view(eiOff, 4096), 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	if ei.Load() != 0 {
		t.Fatalf("CQ event index %d, want the head as it stands, 0", ei.Load())
	}
	rung := p.rings.Load()
	if err := p.head.Publish(p.cq.Head()); err != nil {
		t.Fatal(err)
	}
	if p.rings.Load() != rung+1 {
		t.Error("a blocked device was not rung when the CQ got room")
	}
	p.reap(1)
}

func TestRule09_NoCommandFetchedWithoutRoomForItsCompletion(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1024, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: b})
	p := r.pair(1, 4, false)
	more := &pair{r: r, qid: 2}
	// A second SQ on the same CQ: six commands, three CQ entries.
	off, mem, dev := r.alloc(4 * 64)
	if err := r.ctl.CreateSQ(ctrl.SQParams{QID: 2, CQID: 1, Size: 4, IOVA: base + off, Mem: dev}); err != nil {
		t.Fatal(err)
	}
	var err error
	if more.sq, err = ring.NewSQProducer(mem, 4); err != nil {
		t.Fatal(err)
	}
	more.tail = r.publisher(2, false, &more.rings)
	for range 3 {
		p.push(rw(nvme.IORead, 0, 1, base+dataOff))
		more.push(rw(nvme.IORead, 0, 1, base+dataOff))
	}
	p.publish()
	more.publish()
	r.eventually("three commands in flight", func() bool { return b.held() == 3 })
	r.asleep(1)
	if n := b.held(); n != 3 {
		t.Fatalf("%d commands fetched for 3 CQ entries", n)
	}
	sqs := map[uint16]*pair{1: p, 2: more}
	for done := 0; done < 6; {
		b.finish(1)
		if e, ok := p.cq.Next(); ok {
			done++
			_ = sqs[e.SQID()].sq.Released(e.SQHead())
			if err := p.head.Publish(p.cq.Head()); err != nil {
				t.Fatal(err)
			}
		}
	}
	r.noError()
}

func TestRule10_KickIsSticky(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	r.asleep(1)
	g := r.ctl.cqs[1].Load()
	for range 1000 {
		// The kick races with the worker's going to sleep after the last command.
		p.push(rw(nvme.IORead, 0, 8, base+dataOff))
		p.publish()
		g.kick()
		g.kick()
		p.reap(1)
	}
	r.asleep(1)
	if g.kicked.Load() {
		t.Error("a kick was left behind by a queue that sleeps")
	}
}

func TestRule12_SleepAlwaysArms(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	sqEI, _, err := dbbuf.Slots(r.view(eiOff, 4096), 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint32(40) {
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
		r.asleep(1)
		if want := (i + 1) % 16; sqEI.Load() != want {
			t.Fatalf("asleep with event index %d, consumed %d", sqEI.Load(), want)
		}
	}
}

func TestRule13_ArmingBelongsToSleeping(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	idle := r.pair(2, 16, false)
	// Queue 2 is never drained: nothing was ever in it. It is armed all the same.
	r.asleep(2)
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	idle.push(rw(nvme.IORead, 0, 8, base+dataOff))
	idle.publish()
	if idle.rings.Load() != 1 {
		t.Errorf("%d rings for the first command of a queue that sleeps", idle.rings.Load())
	}
	idle.reap(1)
}

func TestRule15_PageIsTheOnlyTruth(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	w := r.workers[0]
	w.Call(func() { r.ctl.Doorbell(w, 8, 5) })
	r.asleep(1)
	r.noError()
	if x, _ := r.ctl.bells.Word32(8); x.Load() != 0 {
		t.Errorf("the register kept %d beside the page's value", x.Load())
	}
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
}

func TestRule17_LateMMIOValueIsIgnored(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	w := r.workers[0]
	for i := range 100 {
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
		w.Call(func() { r.ctl.Doorbell(w, 8, uint32(i*7)) }) // any old value, out of the ring too
	}
	if e, ok := p.cq.Next(); ok {
		t.Fatalf("a late doorbell replayed the ring: %+v", e)
	}
	r.noError()
}

func TestRule21_PageIsDroppedByReset(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1024, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: b})
	p := r.pair(1, 16, false)
	p.push(rw(nvme.IORead, 0, 1, base+dataOff))
	p.publish()
	r.eventually("a command in flight", func() bool { return b.held() == 1 })
	done := make(chan struct{})
	go func() { r.ctl.Stop(patience); close(done) }()
	select {
	case <-done:
		t.Fatal("reset was done with a command in flight")
	case <-time.After(20 * time.Millisecond):
	}
	b.finish(1)
	<-done
	// The next system's memory: sentinels in both pages and the old rings.
	sentinel := make([]byte, 0x40000)
	fill(sentinel, 0x5a)
	if err := r.guest.Write(0, sentinel); err != nil {
		t.Fatal(err)
	}
	w := r.workers[0]
	for i := range uint64(16) {
		w.Call(func() { r.ctl.Doorbell(w, i*4, 3) })
	}
	time.Sleep(5 * time.Millisecond)
	got := make([]byte, len(sentinel))
	if err := r.guest.Read(0, got); err != nil {
		t.Fatal(err)
	}
	if string(got) != string(sentinel) {
		t.Error("guest memory was written after the reset")
	}
}

func TestRule22_CreateClearsOldSlots(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	shadow, ei := r.view(shadowOff, 4096), r.view(eiOff, 4096)
	for _, page := range []*shm.Region{shadow, ei} {
		for off := uint64(0); off < 256; off += 4 {
			x, _ := page.Word32(off)
			x.Store(7)
		}
	}
	p := r.pair(1, 16, false)
	sqTail, cqHead, _ := dbbuf.Slots(shadow, 1, 0)
	if sqTail.Load() != 0 || cqHead.Load() != 0 {
		t.Errorf("doorbells of a new queue: tail %d, head %d", sqTail.Load(), cqHead.Load())
	}
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.noError()
	if other, _, _ := dbbuf.Slots(shadow, 3, 0); other.Load() != 7 {
		t.Error("slots of another queue were written")
	}
}

func TestRule23_ConfiguredUnderLoad(t *testing.T) {
	r := newRig(t, rigConfig{workers: 2})
	shadow, ei := r.view(shadowOff, 4096), r.view(eiOff, 4096)
	pairs := []*pair{r.pair(1, 16, false), r.pair(2, 64, false)}
	for round := range 60 {
		for i, p := range pairs {
			for range 5 + i {
				p.push(rw(nvme.IORead, 0, 8, base+dataOff))
			}
			p.publish()
		}
		// While these are on their way the page comes, or goes.
		on := round%2 == 0
		var err error
		if on {
			err = r.ctl.SetDoorbellPages(shadow, ei)
		} else {
			err = r.ctl.SetDoorbellPages(nil, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		for i, p := range pairs {
			p.reap(5 + i)
		}
		r.settle(pairs)
		for _, p := range pairs {
			if on {
				sq, _, _ := dbbuf.Slots(shadow, p.qid, 0)
				if sq.Load() != p.sq.Tail() {
					t.Fatalf("round %d: queue %d: the page was seeded with tail %d, the driver is at %d", round, p.qid, sq.Load(), p.sq.Tail())
				}
			}
			p.move()
		}
	}
	r.noError()
}

// move makes the driver use the doorbells where they are now, from the values it had.
func (p *pair) move() {
	p.r.t.Helper()
	tail, head := p.tail.Published(), p.head.Published()
	p.tail, p.head = p.r.publisher(p.qid, false, &p.rings), p.r.publisher(p.qid, true, &p.rings)
	if err := errors.Join(p.tail.Resume(tail), p.head.Resume(head)); err != nil {
		p.r.t.Fatal(err)
	}
}

// settle waits until every doorbell message has been taken.
func (r *rig) settle(pairs []*pair) {
	for _, w := range r.workers {
		w.Call(func() {})
	}
	for _, p := range pairs {
		r.asleep(p.qid)
	}
}

func TestRule25_UnmappedPageFallsBackToRegisters(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	for range 5 {
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	}
	if err := r.ctl.SetDoorbellPages(nil, nil); err != nil {
		t.Fatal(err)
	}
	// The page is somebody else's memory now.
	junk := make([]byte, 8192)
	fill(junk, 9)
	if err := r.guest.Write(shadowOff, junk); err != nil {
		t.Fatal(err)
	}
	p.move()
	for range 40 {
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	}
	got := make([]byte, 8192)
	if err := r.guest.Read(shadowOff, got); err != nil {
		t.Fatal(err)
	}
	if string(got) != string(junk) {
		t.Error("the page was written after it was given back")
	}
	r.noError()
}

func TestRule27_ResumeProbesEveryQueue(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, workers: 2})
	pairs := []*pair{r.pair(1, 16, false), r.pair(2, 16, false), r.pair(3, 16, false)}
	for range 50 {
		r.ctl.pause()
		for _, p := range pairs {
			p.push(rw(nvme.IORead, 0, 8, base+dataOff))
			p.publish()
		}
		for _, w := range r.workers {
			w.Call(func() {}) // the kicks have been taken, and ignored
		}
		r.ctl.resume()
		for _, p := range pairs {
			p.reap(1)
		}
	}
}

func TestRule30_InvalidDoorbellStopsTheQueueAlone(t *testing.T) {
	for name, value := range map[string]uint32{"past the ring": 16, "huge": 1 << 31, "all ones": ^uint32(0)} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{shadow: true})
			p, other := r.pair(1, 16, false), r.pair(2, 16, false)
			p.do(rw(nvme.IORead, 0, 8, base+dataOff))
			tail, _, _ := dbbuf.Slots(r.view(shadowOff, 4096), 1, 0)
			tail.Store(value)
			r.workers[0].Call(func() { r.ctl.Doorbell(r.workers[0], 8, 0) })
			if e := <-r.errs; e.Kind != BadSQTail || e.QID != 1 {
				t.Errorf("reported %v of queue %d", e.Kind, e.QID)
			}
			if s := r.state(1); s != Failed {
				t.Errorf("the queue is %v", s)
			}
			other.do(rw(nvme.IORead, 0, 8, base+dataOff))
		})
	}
	t.Run("CQ head", func(t *testing.T) {
		r := newRig(t, rigConfig{shadow: true})
		p := r.pair(1, 4, false)
		_, head, _ := dbbuf.Slots(r.view(shadowOff, 4096), 1, 0)
		head.Store(3) // nothing was posted
		for range 3 {
			p.push(rw(nvme.IORead, 0, 8, base+dataOff))
		}
		p.publish()
		for n := 0; n < 3; {
			if e, ok := p.cq.Next(); ok {
				n++
				_ = p.sq.Released(e.SQHead())
			}
		}
		head.Store(9)
		p.push(rw(nvme.IORead, 0, 8, base+dataOff))
		p.publish()
		if e := <-r.errs; e.Kind != BadCQHead {
			t.Errorf("reported %v", e.Kind)
		}
	})
	t.Run("CQ head register, with room in the CQ", func(t *testing.T) {
		r := newRig(t, rigConfig{mode: ctrl.Trap})
		p := r.pair(1, 4, false)
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
		r.workers[0].Call(func() { r.ctl.Doorbell(r.workers[0], 12, 4) })
		if e := <-r.errs; e.Kind != BadCQHead || e.QID != 1 {
			t.Errorf("reported %v of queue %d", e.Kind, e.QID)
		}
		if s := r.state(1); s != Failed {
			t.Errorf("the queue is %v", s)
		}
	})
}

func TestRule33_InflightMovesWithSlots(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1024, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: b})
	p := r.pair(1, 64, false)
	g := r.ctl.cqs[1].Load()
	for round := range 50 {
		bad := 0
		for i := range 20 {
			c := rw(nvme.IORead, 0, 1, base+dataOff)
			if (i+round)%3 == 0 {
				c.NSID = 9 // fails inline
				bad++
			}
			p.push(c)
		}
		p.publish()
		r.eventually("the good ones in flight", func() bool { return b.held() == 20-bad })
		r.workers[0].Call(func() {
			if g.inflight != uint32(20-bad) || g.sqs[0].inflight != g.inflight {
				t.Errorf("in flight: %d of the CQ, %d of the SQ; want %d", g.inflight, g.sqs[0].inflight, 20-bad)
			}
		})
		b.finish(64)
		p.reap(20)
	}
	r.workers[0].Call(func() {
		if g.inflight != 0 {
			t.Errorf("%d in flight at rest", g.inflight)
		}
	})
}

func TestRule34_FullEventFDDoesNotBlockTheWorker(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, true)
	// The peer fills the counter and clears O_NONBLOCK on the shared description.
	var full [8]byte
	binary.LittleEndian.PutUint64(full[:], ^uint64(1))
	if _, err := unix.Write(p.irq, full[:]); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(p.irq), unix.F_SETFL, 0); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	}
}

func TestRule35_UnmapWaitsForWhatIsInFlight(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1024, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: b})
	extra, err := shm.NewMemfd("extra", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	fd, _ := unix.Dup(extra.FD())
	const at = 0x9_0000_0000
	if err := r.mem.Map(at, 1<<20, 0, fd, true); err != nil {
		t.Fatal(err)
	}
	p := r.pair(1, 16, false)
	p.push(rw(nvme.IORead, 0, 1, at))
	p.publish()
	r.eventually("a command in flight", func() bool { return b.held() == 1 })
	gone, err := r.mem.Unmap(at, 1<<20)
	if err != nil || len(gone) != 1 {
		t.Fatal(gone, err)
	}
	done := make(chan struct{})
	go func() { r.ctl.Unmapped(gone, patience); close(done) }()
	select {
	case <-done:
		t.Fatal("memory was given up under a command in flight")
	case <-time.After(20 * time.Millisecond):
	}
	b.finish(1)
	<-done
	if err := r.mem.Release(gone); err != nil {
		t.Fatal(err)
	}
	p.reap(1)
	p.push(rw(nvme.IORead, 0, 1, at))
	p.publish()
	if st := p.reap(1)[0].Status(); st.Code() != nvme.StatusDataTransferError {
		t.Errorf("a read into unmapped memory: %v", st)
	}
}

func TestRule36_ShrunkMemoryFailsItsControllerAlone(t *testing.T) {
	good := newRig(t, rigConfig{shadow: true})
	gp := good.pair(1, 16, false)
	for name, spec := range map[string]string{"memory": "mem:size=1MiB", "null": "null:size=1MiB"} {
		t.Run(name, func(t *testing.T) {
			b, err := backend.Open(spec)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { b.Close() })
			r := newRig(t, rigConfig{shadow: true, backend: b})
			// Queue memory in a file without seals, which its owner shrinks to nothing.
			fd, err := unix.MemfdCreate("shrinks", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Ftruncate(fd, 1<<20); err != nil {
				t.Fatal(err)
			}
			dup, _ := unix.Dup(fd)
			defer unix.Close(dup)
			const at = 0x9_0000_0000
			if err := r.mem.Map(at, 1<<20, 0, fd, true); err != nil {
				t.Fatal(err)
			}
			p := &pair{r: r, qid: 1}
			table := r.mem.Table()
			cqMem, err1 := table.View(at+0x20000, 4096)
			sqMem, err2 := table.View(at+0x21000, 4096)
			if err := errors.Join(err1, err2); err != nil {
				t.Fatal(err)
			}
			if err := r.ctl.CreateCQ(ctrl.CQParams{QID: 1, Size: 16, Mem: cqMem}); err != nil {
				t.Fatal(err)
			}
			if err := r.ctl.CreateSQ(ctrl.SQParams{QID: 1, CQID: 1, Size: 16, Mem: sqMem}); err != nil {
				t.Fatal(err)
			}
			p.tail = r.publisher(1, false, &p.rings)
			if err := unix.Ftruncate(dup, 0); err != nil {
				t.Fatal(err)
			}
			if err := p.tail.Publish(1); err != nil {
				t.Fatal(err)
			}
			select {
			case e := <-r.errs:
				var f *shm.FaultError
				if e.Kind != MemoryFault || !errors.As(e.Err, &f) {
					t.Errorf("reported %v: %v", e.Kind, e.Err)
				}
			case <-time.After(patience):
				t.Fatal("the fault was not reported")
			}
			r.workers[0].Call(func() {}) // it lives
		})
	}
	gp.do(rw(nvme.IORead, 0, 8, base+dataOff))
}
