package ioq

import (
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// fused returns a Compare and a Write of n blocks; the data of both is at offsets of the guest's memory.
func fused(lba uint64, n uint32, compare, write uint64) (first, second nvme.Command) {
	first, second = rw(nvme.IOCompare, lba, n, base+compare), rw(nvme.IOWrite, lba, n, base+write)
	first.PRP2, second.PRP2 = first.PRP1+4096, second.PRP1+4096
	first.Flags, second.Flags = nvme.FuseFirst, nvme.FuseSecond
	return first, second
}

// both runs two commands and returns their statuses in this order, whatever order they complete in.
func (p *pair) both(a, b nvme.Command) (nvme.Status, nvme.Status) {
	p.r.t.Helper()
	first := p.push(a)
	p.push(b)
	p.publish()
	es := p.reap(2)
	if es[0].CID() != first {
		es[0], es[1] = es[1], es[0]
	}
	return es[0].Status(), es[1].Status()
}

const other = dataOff + 0x10000

func TestFusedCompareAndWrite(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		disk := openBackend(t, "mem:size=1MiB")
		c.backend = disk
		r := newRig(t, c)
		r.inSubsystem(disk)
		p := r.pair(1, 16, false)
		old, new := make([]byte, 8192), make([]byte, 8192)
		fill(old, 1)
		fill(new, 2)
		p.load(8, old)
		r.put(dataOff, old)
		r.put(other, new)
		a, b := fused(8, 16, dataOff, other)
		if x, y := p.both(a, b); x != nvme.StatusSuccess || y != nvme.StatusSuccess {
			t.Fatalf("the pair: %v, %v", x, y)
		}
		if string(p.stored(8, 8192)) != string(new) {
			t.Fatal("it was not written")
		}
		// What is there now is not what is compared with.
		if x, y := p.both(a, b); x.Code() != nvme.StatusCompareFailure || y.Code() != nvme.StatusAbortFailedFused {
			t.Errorf("a miss: %v, %v", x, y)
		}
		if string(p.stored(8, 8192)) != string(new) {
			t.Error("a miss has written")
		}
		r.noError()
	})
}

func TestBadPairs(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	r := newRig(t, rigConfig{shadow: true, backend: disk})
	r.inSubsystem(disk)
	p := r.pair(1, 16, false)
	a, b := fused(8, 16, dataOff, other)
	with := func(c nvme.Command, f func(*nvme.Command)) nvme.Command {
		f(&c)
		return c
	}
	plain := rw(nvme.IORead, 0, 1, base+dataOff)
	for name, x := range map[string]struct {
		a, b         nvme.Command
		wantA, wantB nvme.Status
	}{
		"other range":             {a, with(b, func(c *nvme.Command) { c.SetSLBA(9) }), nvme.StatusInvalidField, nvme.StatusInvalidField},
		"other length":            {a, with(b, func(c *nvme.Command) { c.SetNLB(14) }), nvme.StatusInvalidField, nvme.StatusInvalidField},
		"other namespace":         {a, with(b, func(c *nvme.Command) { c.NSID = 2 }), nvme.StatusInvalidField, nvme.StatusInvalidField},
		"second is a read":        {a, with(b, func(c *nvme.Command) { c.Opcode = nvme.IORead }), nvme.StatusInvalidField, nvme.StatusInvalidField},
		"first is a write":        {with(a, func(c *nvme.Command) { c.Opcode = nvme.IOWrite }), b, nvme.StatusInvalidField, nvme.StatusAbortMissingFused},
		"second alone":            {plain, b, nvme.StatusSuccess, nvme.StatusAbortMissingFused},
		"first, then another":     {a, plain, nvme.StatusAbortMissingFused, nvme.StatusSuccess},
		"FUSE 11b":                {plain, with(b, func(c *nvme.Command) { c.Flags = 3 }), nvme.StatusSuccess, nvme.StatusInvalidField},
		"no such namespace":       {with(a, func(c *nvme.Command) { c.NSID = 7 }), with(b, func(c *nvme.Command) { c.NSID = 7 }), nvme.StatusInvalidNamespace, nvme.StatusAbortFailedFused},
		"past the end":            {with(a, func(c *nvme.Command) { c.SetSLBA(2047) }), with(b, func(c *nvme.Command) { c.SetSLBA(2047) }), nvme.StatusLBAOutOfRange, nvme.StatusAbortFailedFused},
		"compare with no memory":  {with(a, func(c *nvme.Command) { c.PRP1 = 0x1000 }), b, nvme.StatusDataTransferError, nvme.StatusAbortFailedFused},
		"write from no memory":    {a, with(b, func(c *nvme.Command) { c.PRP1 = 0x1000 }), nvme.StatusSuccess, nvme.StatusDataTransferError},
		"second's PSDT":           {a, with(b, func(c *nvme.Command) { c.Flags |= 0xc0 }), nvme.StatusInvalidField, nvme.StatusInvalidField},
		"compare with bad blocks": {a, b, nvme.StatusUnrecoveredRead, nvme.StatusAbortFailedFused},
	} {
		if name == "compare with bad blocks" {
			p.do(rw(nvme.IOWriteUncorrectable, 10, 1, 0))
		}
		if x1, x2 := p.both(x.a, x.b); x1.Code() != x.wantA || x2.Code() != x.wantB {
			t.Errorf("%s: %v, %v; want %v, %v", name, x1, x2, x.wantA, x.wantB)
		}
		p.do(rw(nvme.IOWriteZeroes, 0, 64, 0))
	}
	// Two firsts and a second: the first of them is alone.
	p.push(a)
	p.push(a)
	p.push(b)
	p.publish()
	missing := 0
	for _, e := range p.reap(3) {
		switch e.Status().Code() {
		case nvme.StatusAbortMissingFused:
			missing++
		case nvme.StatusSuccess:
		default:
			t.Error(e.Status())
		}
	}
	if missing != 1 {
		t.Errorf("%d halves missed the other", missing)
	}
	r.noError()
}

// TestFirstHalfWaits has the second half come late, or never. Meanwhile the queue goes on to be paused, deleted and stopped.
func TestFirstHalfWaits(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	r := newRig(t, rigConfig{shadow: true, backend: disk})
	s, n := r.inSubsystem(disk)
	p, q := r.pair(1, 16, false), r.pair(2, 16, false)
	a, b := fused(8, 16, dataOff, other)
	p.push(a)
	p.publish()
	r.eventually("the first to wait", r.heldBack(1))
	r.ctl.pause()
	r.ctl.resume()
	exclusive(s, n)()
	r.eventually("the first to wait again", r.heldBack(1))
	if st := q.do(rw(nvme.IORead, 0, 1, base+dataOff)); st != nvme.StatusSuccess {
		t.Error(st)
	}
	p.push(b)
	p.publish()
	for _, e := range p.reap(2) {
		if e.Status() != nvme.StatusSuccess {
			t.Error(e.Status())
		}
	}
	// While somebody has the namespace, the whole pair waits.
	end := exclusive(s, n)
	p.push(a)
	p.push(b)
	p.publish()
	r.eventually("both to wait", r.heldBack(2))
	r.ctl.pause()
	r.ctl.resume()
	end()
	p.reap(2)
	// And is dropped with its queue.
	end = exclusive(s, n)
	for range 3 {
		p.push(a)
		p.push(b)
	}
	p.push(a)
	p.publish()
	r.eventually("three pairs and a half to wait", r.heldBack(7))
	r.ctl.DeleteSQ(1)
	end()
	for _, e := range p.reap(7) {
		if e.Status().Code() != nvme.StatusAbortSQDeleted {
			t.Error(e.Status())
		}
	}
	if x, y := q.both(a, b); !x.OK() && x.Code() != nvme.StatusCompareFailure {
		t.Errorf("the next pair: %v, %v", x, y)
	}
	// Stop with a half and a pair.
	end = exclusive(s, n)
	q.push(a)
	q.push(b)
	q.push(a)
	q.publish()
	r.eventually("a pair and a half to wait", r.heldBack(3))
	r.ctl.Stop(patience)
	end()
	r.noError()
}

// TestPairIsAlone has a slow medium, so that everything that could come between compare and write does.
func TestPairIsAlone(t *testing.T) {
	dev := &slow{info: backend.Info{Blocks: 1000, LBAShift: 9}}
	r := newRig(t, rigConfig{backend: dev, shadow: true, workers: 2})
	r.inSubsystem(dev)
	p, q := r.pair(1, 16, false), r.pair(2, 16, false)
	q.push(rw(nvme.IOWrite, 8, 1, base+other))
	q.publish()
	r.eventually("a write to begin", func() bool { return dev.held() == 1 })
	a, b := fused(8, 1, dataOff, other)
	p.push(a)
	p.push(b)
	p.publish()
	r.eventually("the pair to wait for it", r.heldBack(2))
	q.push(rw(nvme.IOWrite, 8, 1, base+other))
	q.publish()
	r.eventually("a later write to wait for the pair", r.heldBack(3))
	dev.finish(1)
	q.reap(1)
	r.eventually("the compare alone", func() bool { return dev.held() == 1 && r.heldBack(2)() })
	dev.finish(1)
	r.eventually("the write alone", func() bool { return dev.held() == 1 && r.heldBack(1)() })
	p.reap(1)
	dev.finish(1)
	p.reap(1)
	r.eventually("the later write", func() bool { return dev.held() == 1 && r.heldBack(0)() })
	dev.finish(1)
	q.reap(1)
	r.noError()
}

// TestPairsAreAtomic adds to one number from two queues on two workers, by reading it and fusing compare and write. None is lost. Plain
// writes that put it back as it was come between.
func TestPairsAreAtomic(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	r := newRig(t, rigConfig{shadow: true, backend: disk, workers: 2})
	r.inSubsystem(disk)
	pairs := []*pair{r.pair(1, 16, false), r.pair(2, 16, false)}
	var added [2]uint64
	var wg sync.WaitGroup
	for i, p := range pairs {
		wg.Go(func() {
			mine := uint64(dataOff + i*0x100000)
			block := make([]byte, 512)
			for added[i] < 100 {
				p.do(rw(nvme.IORead, 8, 1, base+mine))
				if p.r.guest.Read(mine, block) != nil {
					return
				}
				// Fill the whole block, so that one that is torn is no number.
				v := binary.LittleEndian.Uint64(block) + 1
				for k := 0; k < 512; k += 8 {
					if binary.LittleEndian.Uint64(block[k:]) != v-1 {
						t.Error("torn")
						return
					}
					binary.LittleEndian.PutUint64(block[k:], v)
				}
				if p.r.guest.Write(mine+0x1000, block) != nil {
					return
				}
				a, b := fused(8, 1, mine, mine+0x1000)
				if x, y := p.both(a, b); x.OK() && y.OK() {
					added[i]++
				} else if x.Code() != nvme.StatusCompareFailure || y.Code() != nvme.StatusAbortFailedFused {
					t.Error(x, y)
					return
				}
			}
		})
	}
	wg.Wait()
	if v := binary.LittleEndian.Uint64(pairs[0].stored(8, 512)); v != added[0]+added[1] {
		t.Errorf("%d after %d additions", v, added[0]+added[1])
	}
	r.noError()
}

// TestFusedOnTheSmallestQueue cannot come together: the first keeps the only place in the CQ.
func TestFusedOnTheSmallestQueue(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 2, false)
	off, mem, dev := r.alloc(16 * 64)
	if err := r.ctl.CreateSQ(ctrl.SQParams{QID: 2, CQID: 1, Size: 16, IOVA: base + off, Mem: dev}); err != nil {
		t.Fatal(err)
	}
	q := &pair{r: r, qid: 2, cq: p.cq, head: p.head, irq: -1}
	var err error
	if q.sq, err = ring.NewSQProducer(mem, 16); err != nil {
		t.Fatal(err)
	}
	q.tail = r.publisher(2, false, &q.rings)
	a, b := fused(8, 16, dataOff, other)
	q.push(a)
	q.push(b)
	q.publish()
	r.eventually("the first to wait", r.heldBack(1))
	r.ctl.pause()
	r.ctl.resume()
	r.ctl.DeleteSQ(2)
	if e := q.reap(1)[0]; e.Status().Code() != nvme.StatusAbortSQDeleted {
		t.Error(e.Status())
	}
	r.noError()
}

// TestPairMemoryGone takes the memory of a pair away, before it begins and while it runs. Its controller fails; the namespace goes on.
func TestPairMemoryGone(t *testing.T) {
	for name, when := range map[string]int{"before the compare": 0, "before the comparison": 1, "in the middle of it": 2} {
		t.Run(name, func(t *testing.T) {
			dev := &slow{info: backend.Info{Blocks: 1000, LBAShift: 9}}
			bad, good := newRig(t, rigConfig{backend: dev, shadow: true}), newRig(t, rigConfig{backend: dev, shadow: true})
			sub := subsys.New(subsys.Config{Workers: Pool(append(slices.Clone(bad.workers), good.workers...))})
			t.Cleanup(sub.Close)
			n := sub.AddNamespace(subsys.NamespaceConfig{NSID: 1, Backend: dev, Shared: true})
			bad.attach(n)
			good.attach(n)
			fd, err := unix.MemfdCreate("shrinks", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			dup, _ := unix.Dup(fd)
			defer unix.Close(dup)
			const at = 0x9_0000_0000
			if err := errors.Join(unix.Ftruncate(fd, 1<<20), bad.mem.Map(at, 1<<20, 0, fd, true)); err != nil {
				t.Fatal(err)
			}
			p, q := bad.pair(1, 16, false), good.pair(1, 16, false)
			a, b := fused(8, 600, dataOff, other)
			// Lists, which translation reads, and the data of the compare are in the memory that goes.
			list := make([]byte, 8*80)
			for i := range 80 {
				binary.LittleEndian.PutUint64(list[i*8:], at+0x10000+uint64(i)<<12)
			}
			gone := bad.mem.Table()
			if !gone.WriteIOVA(at, list) {
				t.Fatal("lists")
			}
			a.PRP1, a.PRP2, b.PRP1, b.PRP2 = at+0x8000, at, at+0x9000, at
			p.push(a)
			p.push(b)
			if when == 0 {
				if err := unix.Ftruncate(dup, 0); err != nil {
					t.Fatal(err)
				}
			}
			p.publish()
			if when == 1 {
				bad.eventually("the compare", func() bool { return dev.held() == 1 })
				if err := unix.Ftruncate(dup, 0); err != nil {
					t.Fatal(err)
				}
				dev.finish(1)
			}
			if when == 2 {
				bad.eventually("the compare", func() bool { return dev.held() == 1 })
				dev.finish(1)
				bad.eventually("its second piece", func() bool { return dev.held() == 1 })
				if err := unix.Ftruncate(dup, 0); err != nil {
					t.Fatal(err)
				}
				dev.finish(1)
			}
			if e := <-bad.errs; e.Kind != MemoryFault {
				t.Errorf("%v: %v", e.Kind, e.Err)
			}
			q.push(rw(nvme.IOWrite, 8, 1, base+dataOff))
			q.publish()
			good.eventually("another controller's write", func() bool { return dev.held() == 1 })
			dev.finish(1)
			q.reap(1)
			good.noError()
		})
	}
}
