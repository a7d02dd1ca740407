package ioq

import (
	"encoding/binary"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var modes = []struct {
	name   string
	config rigConfig
}{
	{"shadow", rigConfig{shadow: true}},
	{"shadow/heap", rigConfig{shadow: true, heap: true}},
	{"shadow/sleeping", rigConfig{shadow: true, noSpin: true}},
	{"trap", rigConfig{mode: ctrl.Trap}},
	{"mmap", rigConfig{mode: ctrl.Mmap}},
	{"shadow/two workers", rigConfig{shadow: true, workers: 2}},
	{"trap/two workers", rigConfig{mode: ctrl.Trap, workers: 2}},
}

func eachMode(t *testing.T, f func(t *testing.T, c rigConfig)) {
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) { f(t, m.config) })
	}
}

func fill(p []byte, seed byte) {
	for i := range p {
		p[i] = seed + byte(i*7) + byte(i>>8)
	}
}

func TestReadWriteCompare(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		r := newRig(t, c)
		p := r.pair(2, 16, false)
		want, got := make([]byte, 8192), make([]byte, 8192)
		fill(want, 3)
		if err := r.guest.Write(dataOff, want); err != nil {
			t.Fatal(err)
		}
		w := rw(nvme.IOWrite, 8, 16, base+dataOff)
		w.PRP2 = base + dataOff + 4096
		if st := p.do(w); st != nvme.StatusSuccess {
			t.Fatalf("write: %v", st)
		}
		const to = dataOff + 0x4000
		rd := rw(nvme.IORead, 8, 16, base+to)
		rd.PRP2 = base + to + 4096
		if st := p.do(rd); st != nvme.StatusSuccess {
			t.Fatalf("read: %v", st)
		}
		if err := r.guest.Read(to, got); err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Fatal("read other data than was written")
		}
		cmp := rd
		cmp.Opcode = nvme.IOCompare
		if st := p.do(cmp); st != nvme.StatusSuccess {
			t.Fatalf("compare of equal data: %v", st)
		}
		if err := r.guest.Write(to+5000, []byte{^want[5000]}); err != nil {
			t.Fatal(err)
		}
		if st := p.do(cmp); st.Code() != nvme.StatusCompareFailure {
			t.Fatalf("compare of different data: %v", st)
		}
		zero := nvme.Command{Opcode: nvme.IOWriteZeroes, NSID: 1, CDW10: 8, CDW12: 7}
		if st := p.do(zero); st != nvme.StatusSuccess {
			t.Fatalf("write zeroes: %v", st)
		}
		if st := p.do(nvme.Command{Opcode: nvme.IOFlush, NSID: 1}); st != nvme.StatusSuccess {
			t.Fatalf("flush: %v", st)
		}
		if st := p.do(rd); st != nvme.StatusSuccess {
			t.Fatalf("read: %v", st)
		}
		if err := r.guest.Read(to, got); err != nil {
			t.Fatal(err)
		}
		for i, b := range got[:4096] {
			if b != 0 {
				t.Fatalf("byte %d is %#x after write zeroes", i, b)
			}
		}
		if string(got[4096:]) != string(want[4096:]) {
			t.Fatal("write zeroes went beyond its range")
		}
		r.noError()
	})
}

func TestDeallocate(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	ranges := make([]byte, 3*16)
	put := func(i int, lba uint64, n uint32) {
		binary.LittleEndian.PutUint32(ranges[i*16+4:], n)
		binary.LittleEndian.PutUint64(ranges[i*16+8:], lba)
	}
	put(0, 0, 8)
	put(1, 100, 0)
	put(2, 64, 64)
	dsm := nvme.Command{Opcode: nvme.IODSM, NSID: 1, PRP1: base + dataOff, CDW10: 2, CDW11: nvme.DSMDeallocate}
	if err := r.guest.Write(dataOff, ranges); err != nil {
		t.Fatal(err)
	}
	if st := p.do(dsm); st != nvme.StatusSuccess {
		t.Errorf("deallocate of three ranges, one empty: %v", st)
	}
	blocks := r.ctl.namespace(1).info.Blocks
	put(1, blocks-1, 2)
	if err := r.guest.Write(dataOff, ranges); err != nil {
		t.Fatal(err)
	}
	if st := p.do(dsm); st.Code() != nvme.StatusLBAOutOfRange {
		t.Errorf("a range past the end: %v", st)
	}
	dsm.CDW11 = 0
	if st := p.do(dsm); st != nvme.StatusSuccess {
		t.Errorf("a hint that asks for nothing: %v", st)
	}
	dsm.CDW11, dsm.PRP1 = nvme.DSMDeallocate, 0x10
	if st := p.do(dsm); st.Code() != nvme.StatusDataTransferError {
		t.Errorf("ranges outside guest memory: %v", st)
	}
}

func TestBadCommands(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	blocks := r.ctl.namespace(1).info.Blocks
	ok := rw(nvme.IORead, 0, 8, base+dataOff)
	with := func(f func(*nvme.Command)) nvme.Command {
		c := ok
		f(&c)
		return c
	}
	for name, x := range map[string]struct {
		c    nvme.Command
		want nvme.Status
	}{
		"no namespace":      {with(func(c *nvme.Command) { c.NSID = 0 }), nvme.StatusInvalidNamespace},
		"other namespace":   {with(func(c *nvme.Command) { c.NSID = 2 }), nvme.StatusInvalidNamespace},
		"all namespaces":    {with(func(c *nvme.Command) { c.NSID = nvme.NSIDAll }), nvme.StatusInvalidNamespace},
		"past the end":      {with(func(c *nvme.Command) { c.SetSLBA(blocks - 7) }), nvme.StatusLBAOutOfRange},
		"wrapping range":    {with(func(c *nvme.Command) { c.SetSLBA(^uint64(0) - 2) }), nvme.StatusLBAOutOfRange},
		"over MDTS":         {with(func(c *nvme.Command) { c.SetNLB(2048) }), nvme.StatusInvalidField},
		"PSDT 11b":          {with(func(c *nvme.Command) { c.Flags = 0xc0 }), nvme.StatusInvalidField},
		"fused":             {with(func(c *nvme.Command) { c.Flags = 1 }), nvme.StatusInvalidField},
		"unmapped PRP":      {with(func(c *nvme.Command) { c.PRP1 = 0x1000 }), nvme.StatusDataTransferError},
		"PRP at the end":    {with(func(c *nvme.Command) { c.PRP1 = base + guestSize - 2048; c.PRP2 = base + guestSize }), nvme.StatusDataTransferError},
		"misaligned PRP":    {with(func(c *nvme.Command) { c.PRP1 = base + dataOff + 2 }), nvme.StatusPRPOffsetInvalid},
		"misaligned PRP2":   {with(func(c *nvme.Command) { c.PRP1 += 512; c.PRP2 = base + dataOff + 8 }), nvme.StatusPRPOffsetInvalid},
		"unknown opcode":    {with(func(c *nvme.Command) { c.Opcode = 0x7f }), nvme.StatusInvalidOpcode},
		"list not mapped":   {with(func(c *nvme.Command) { c.SetNLB(255); c.PRP2 = 0x2000 }), nvme.StatusDataTransferError},
		"zero address":      {with(func(c *nvme.Command) { c.PRP1 = 0 }), nvme.StatusDataTransferError},
		"address near 2^64": {with(func(c *nvme.Command) { c.PRP1 = ^uint64(0xfff) }), nvme.StatusDataTransferError},
	} {
		if st := p.do(x.c); st.Code() != x.want || !st.DNR() {
			t.Errorf("%s: %v, want %v with DNR", name, st, x.want)
		}
	}
	if st := p.do(ok); st != nvme.StatusSuccess {
		t.Errorf("a good command after the bad ones: %v", st)
	}
	r.noError()
}

func TestReadOnlyNamespace(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1024, LBAShift: 9, ReadOnly: true}}
	r := newRig(t, rigConfig{shadow: true, backend: b})
	p := r.pair(1, 16, false)
	for _, op := range []uint8{nvme.IOWrite, nvme.IOWriteZeroes} {
		if st := p.do(rw(op, 0, 8, base+dataOff)); st.Code() != nvme.StatusNamespaceWriteProtected {
			t.Errorf("opcode %#x: %v", op, st)
		}
	}
}

func TestSeveralSQsOnOneCQ(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		r := newRig(t, c)
		p := r.pair(1, 64, false)
		more := []*pair{p}
		for qid := uint16(2); qid <= 4; qid++ {
			off, mem, dev := r.alloc(8 * 64)
			if err := r.ctl.CreateSQ(ctrl.SQParams{QID: qid, CQID: 1, Size: 8, IOVA: base + off, Mem: dev}); err != nil {
				t.Fatal(err)
			}
			q := &pair{r: r, qid: qid, cq: p.cq, head: p.head, irq: -1}
			var err error
			if q.sq, err = ring.NewSQProducer(mem, 8); err != nil {
				t.Fatal(err)
			}
			q.tail = r.publisher(qid, false, &q.rings)
			more = append(more, q)
		}
		rounds := 200
		if testing.Short() {
			rounds = 40 // some laps
		}
		for round := range rounds {
			for _, q := range more {
				for range 3 {
					q.push(rw(nvme.IORead, uint64(round), 8, base+dataOff))
				}
				q.publish()
			}
			count := map[uint16]int{}
			for n, begin := 0, time.Now(); n < 12; {
				e, ok := p.cq.Next()
				if !ok {
					if !pauseAfter(begin) {
						t.Fatalf("round %d: %d of 12 completions after %v", round, n, patience)
					}
					continue
				}
				n++
				count[e.SQID()]++
				if err := more[e.SQID()-1].sq.Released(e.SQHead()); err != nil {
					t.Fatal(err)
				}
			}
			for qid := uint16(1); qid <= 4; qid++ {
				if count[qid] != 3 {
					t.Fatalf("round %d: SQ %d has %d completions of 3", round, qid, count[qid])
				}
			}
			if err := p.head.Publish(p.cq.Head()); err != nil {
				t.Fatal(err)
			}
		}
		r.noError()
	})
}

// TestManyLaps runs shallow rings for many laps, with pauses in which the device goes to sleep.
func TestManyLaps(t *testing.T) {
	rounds := 200 // a hundred laps of each ring
	if testing.Short() {
		rounds = 60
	}
	eachMode(t, func(t *testing.T, c rigConfig) {
		r := newRig(t, c)
		for qid, size := range map[uint16]uint32{1: 2, 2: 3, 3: 64} {
			p := r.pair(qid, size, false)
			for i := range rounds {
				n := i%int(size-1) + 1
				for range n {
					p.push(rw(nvme.IORead, uint64(i), 8, base+dataOff))
				}
				p.publish()
				p.reap(n)
				if i%30 == 29 {
					time.Sleep(time.Millisecond)
				}
			}
		}
		r.noError()
	})
}

// TestMappedQueueIsSeenBesideABusyOne wakes an idle queue whose doorbell cannot ring while the worker never idles.
func TestMappedQueueIsSeenBesideABusyOne(t *testing.T) {
	r := newRig(t, rigConfig{mode: ctrl.Mmap})
	busy, idle := r.pair(1, 16, false), r.pair(2, 16, false)
	r.asleep(2)
	idle.push(rw(nvme.IORead, 0, 8, base+dataOff))
	idle.publish()
	for end := time.Now().Add(patience); !idle.cq.Ready(); {
		if time.Now().After(end) {
			t.Fatal("the idle queue's command was never seen")
		}
		busy.do(rw(nvme.IORead, 0, 8, base+dataOff))
	}
	idle.reap(1)
}

func TestInterruptAndCoalescing(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 64, true)
	read := func() uint64 {
		var b [8]byte
		if _, err := unix.Read(p.irq, b[:]); err != nil {
			return 0
		}
		return binary.LittleEndian.Uint64(b[:])
	}
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.eventually("an interrupt", func() bool { return read() > 0 })

	// Aggregate eight, for at most 25.5 ms: seven raise nothing, the eighth does. On a machine that is too busy for
	// that the time is over first.
	r.ctl.SetCoalescing(7, 255)
	begin := time.Now()
	for range 7 {
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	}
	if n := read(); n != 0 && time.Since(begin) < 25*time.Millisecond {
		t.Errorf("%d interrupts for seven completions with a threshold of eight", n)
	}
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.eventually("the interrupt of the eighth completion", func() bool { return read() > 0 })

	// One completion, and the time: 10 ms.
	r.ctl.SetCoalescing(7, 100)
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.eventually("the interrupt after the aggregation time", func() bool { return read() > 0 })

	// The vector is excepted (feature 09h).
	r.ctl.SetCoalescing(7, 255)
	r.ctl.SetVectorConfig(1, true)
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.eventually("the interrupt of an excepted vector", func() bool { return read() > 0 })
}

// TestInterruptLatched takes the eventfd away while an interrupt comes due, as QEMU does for each vector that the guest
// unmasks.
func TestInterruptLatched(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 64, true)
	r.ctl.SetVectors(0, nil, 9)
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.eventually("the interrupt to be latched", r.ctl.vectors[1].pending.Load)
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	dup, _ := unix.Dup(fd)
	defer unix.Close(fd)
	r.ctl.SetVectors(1, []int{dup}, 1)
	var b [8]byte
	if _, err := unix.Read(fd, b[:]); err != nil {
		t.Fatalf("the latched interrupt was not raised: %v", err)
	}
}

func TestQuietDriverIsNotInterrupted(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	r.ctl.SetQuiet(true)
	p := r.pair(1, 64, true)
	p.head.SetQuiet(true)
	for range 100 {
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	}
	r.workers[0].Call(func() {})
	var b [8]byte
	if _, err := unix.Read(p.irq, b[:]); err != unix.EAGAIN {
		t.Errorf("a driver that polls was interrupted (%v)", err)
	}
	p.head.SetQuiet(false)
	p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	r.eventually("an interrupt", func() bool { _, err := unix.Read(p.irq, b[:]); return err == nil })
	r.noError()
}

func TestNoAllocationsPerCommand(t *testing.T) {
	r := newRig(t, rigConfig{mode: ctrl.Mmap}) // the rig's own way to ring allocates
	p := r.pair(1, 64, false)
	c := rw(nvme.IORead, 0, 8, base+dataOff)
	one := func() {
		c.CID++
		p.sq.Push(&c)
		_ = p.tail.Publish(p.sq.Tail())
		for begin := time.Now(); ; {
			if e, ok := p.cq.Next(); ok {
				_ = p.sq.Released(e.SQHead())
				break
			}
			if !pauseAfter(begin) {
				t.Fatalf("no completion after %v", patience)
			}
		}
		_ = p.head.Publish(p.cq.Head())
	}
	for range 100 {
		one()
	}
	// Not testing.AllocsPerRun, which leaves one P for both sides.
	const runs = 5000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range runs {
		one()
	}
	runtime.ReadMemStats(&after)
	if n := after.Mallocs - before.Mallocs; n > runs/100 {
		t.Errorf("%d allocations in %d commands", n, runs)
	}
}

func TestDoorbellOfNoQueue(t *testing.T) {
	r := newRig(t, rigConfig{mode: ctrl.Trap})
	w := r.workers[0]
	for _, off := range []uint64{8, 12, 8 * 8, 8*8 + 4, 8 * 9, 2, 1 << 40, ^uint64(7)} {
		w.Call(func() { r.ctl.Doorbell(w, off, 1) })
		if e := <-r.errs; e.Kind != NoQueue {
			t.Errorf("offset %#x: %v", off, e.Kind)
		}
	}
	w.Call(func() { r.ctl.Doorbell(w, 0, 5) })
	if tail, _ := r.ctl.AdminDoorbells(); tail.Load() != 5 || r.admin.Load() != 1 {
		t.Errorf("admin tail %d, %d kicks", tail.Load(), r.admin.Load())
	}
}

func TestDoorbellMessagesAreCounted(t *testing.T) {
	r := newRig(t, rigConfig{mode: ctrl.Trap})
	p := r.pair(1, 16, false)
	w := r.workers[0]
	w.Call(func() {
		r.ctl.Doorbell(w, 8, 0)
		r.ctl.Doorbell(w, 8, 0)
		r.ctl.Doorbell(w, 12, 0)
		r.ctl.Doorbell(w, 16, 0) // queue 2, which does not exist
		r.ctl.Doorbell(w, 0, 0)
	})
	if s := r.ctl.Stats(); s.SQDoorbells != 2 || s.CQDoorbells != 1 || s.MMIO() != 0 {
		t.Errorf("%+v, %v per command", s, s.MMIO())
	}
	p.do(nvme.Command{Opcode: nvme.IOFlush, NSID: 1})
	if s := r.ctl.Stats(); s.MMIO() != float64(s.SQDoorbells+s.CQDoorbells) || s.SQDoorbells != 3 {
		t.Errorf("%+v, %v per command", s, s.MMIO())
	}
}

func TestMappedAdminDoorbellIsSeen(t *testing.T) {
	r := newRig(t, rigConfig{mode: ctrl.Mmap})
	tail, _ := r.ctl.AdminDoorbells()
	for i := range uint32(3) {
		time.Sleep(20 * time.Millisecond) // long enough for the looks to become rare
		tail.Store(i + 1)
		r.eventually("the session to be told", func() bool { return r.admin.Load() > i })
	}
}

// A driver that resets the controller rings the value that it rang before. The worker may not have looked while it was 0.
func TestMappedAdminDoorbellIsSeenAfterAReset(t *testing.T) {
	r := newRig(t, rigConfig{mode: ctrl.Mmap})
	tail, _ := r.ctl.AdminDoorbells()
	for i := range uint32(50) {
		r.ctl.ZeroAdminDoorbells()
		tail.Store(1)
		r.eventually("the session to be told", func() bool { return r.admin.Load() > i })
	}
}

// The session goes on as long as it finds commands, so that a tail can come round to the same value between two looks of the worker.
func TestMappedAdminDoorbellIsSeenAfterALap(t *testing.T) {
	r := newRig(t, rigConfig{mode: ctrl.Mmap})
	tail, _ := r.ctl.AdminDoorbells()
	tail.Store(1)
	for i := range uint32(50) {
		r.eventually("the session to be told", func() bool { return r.admin.Load() > i })
		// In a queue of two entries it has run this command and the next, whose tail was 0; then came a third.
		r.ctl.AdminTaken(0, 0)
	}
}
