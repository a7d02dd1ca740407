package ioq

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
)

// load writes b to blocks from lba on, and stored reads them back.
func (p *pair) load(lba uint64, b []byte) {
	p.r.t.Helper()
	const at = dataOff + 0x400000
	p.r.put(at, b)
	if st := p.do(p.r.sgl(rw(nvme.IOWrite, lba, uint32(len(b)/512), 0), prp.Extent{IOVA: base + at, Len: uint32(len(b))})); st != nvme.StatusSuccess {
		p.r.t.Fatalf("write: %v", st)
	}
}

func (p *pair) stored(lba uint64, n int) []byte {
	p.r.t.Helper()
	const at = dataOff + 0x500000
	if st := p.do(p.r.sgl(rw(nvme.IORead, lba, uint32(n/512), 0), prp.Extent{IOVA: base + at, Len: uint32(n)})); st != nvme.StatusSuccess {
		p.r.t.Fatalf("read: %v", st)
	}
	return p.r.get(at, n)
}

func randomData(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

// TestLargeCompare finds one wrong byte anywhere in a transfer of MDTS, however guest memory is cut.
func TestLargeCompare(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	data := randomData(1 << 20)
	p.load(0, data)
	r.put(dataOff, data)
	cmp := func(cut uint32) nvme.Status {
		return p.do(r.sgl(rw(nvme.IOCompare, 0, 2048, 0),
			prp.Extent{IOVA: base + dataOff, Len: cut}, prp.Extent{IOVA: base + dataOff + uint64(cut), Len: 1<<20 - cut}))
	}
	for _, cut := range []uint32{1, scratchSize - 1, scratchSize, scratchSize + 1, 1<<20 - 1} {
		if st := cmp(cut); st != nvme.StatusSuccess {
			t.Errorf("cut at %d: %v", cut, st)
		}
	}
	for _, at := range []uint64{0, scratchSize - 1, scratchSize, 3*scratchSize + 77, 1<<20 - 1} {
		r.put(dataOff+at, []byte{^data[at]})
		if st := cmp(500_000); st.Code() != nvme.StatusCompareFailure {
			t.Errorf("byte %d is wrong: %v", at, st)
		}
		r.put(dataOff+at, data[at:at+1])
	}
	if s := r.ctl.Stats(); s.Reads != 5 || s.BytesRead != 5<<20 {
		t.Errorf("%+v", s)
	}
}

func TestVerify(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	blocks := r.ctl.namespace(1).info.Blocks
	for name, x := range map[string]struct {
		lba    uint64
		blocks uint32
		want   nvme.Status
	}{
		"a block":        {0, 1, nvme.StatusSuccess},
		"all that goes":  {0, ctrl.MaxVerify / 512, nvme.StatusSuccess},
		"the last block": {blocks - 1, 1, nvme.StatusSuccess},
		"over VSL":       {0, ctrl.MaxVerify/512 + 1, nvme.StatusLBAOutOfRange}, // the medium is no larger
		"past the end":   {blocks - 1, 2, nvme.StatusLBAOutOfRange},
	} {
		if st := p.do(rw(nvme.IOVerify, x.lba, x.blocks, 0)); st.Code() != x.want {
			t.Errorf("%s: %v, want %v", name, st, x.want)
		}
	}
	if s := r.ctl.Stats(); s.Reads != 0 || s.Others != 3 || s.BytesRead != ctrl.MaxVerify+1024 {
		t.Errorf("%+v", s)
	}
	big := newRig(t, rigConfig{shadow: true, backend: openBackend(t, "null:size=1GiB")})
	q := big.pair(1, 16, false)
	if st := q.do(rw(nvme.IOVerify, 0, ctrl.MaxVerify/512+1, 0)); st.Code() != nvme.StatusInvalidField || !st.DNR() {
		t.Errorf("over VSL: %v", st)
	}
	if st := q.do(rw(nvme.IOVerify, 0, ctrl.MaxVerify/512, 0)); st != nvme.StatusSuccess {
		t.Errorf("VSL: %v", st)
	}
}

// copyCmd puts ranges of lba and blocks into the guest's memory and returns a Copy of them.
func (r *rig) copyCmd(to uint64, ranges ...nvme.CopyRange) nvme.Command {
	for i := range ranges {
		r.put(sglOff+0x10000+uint64(i)*32, ranges[i].Bytes()[:])
	}
	c := nvme.Command{PRP1: base + sglOff + 0x10000}
	z, _ := nvme.ToZeroBased8(uint32(len(ranges)))
	c.SetCopy(1, to, z)
	c.PRP2 = base + sglOff + 0x11000
	return c
}

func source(lba uint64, blocks uint32) nvme.CopyRange {
	z, _ := nvme.ToZeroBased16(blocks)
	return nvme.CopyRange{SLBA: lba, NLB: z}
}

func TestCopy(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		r := newRig(t, c)
		p := r.pair(1, 16, false)
		data := randomData(1 << 20)
		p.load(0, data)
		p.load(2048, data)
		cp := r.copyCmd(8192, source(3, 5), source(2048, 1024), source(1, 1))
		cp.CDW12 |= nvme.RWForceUnit
		if st := p.do(cp); st != nvme.StatusSuccess {
			t.Fatalf("copy: %v", st)
		}
		want := append(append(append([]byte(nil), data[3*512:8*512]...), data[:1024*512]...), data[512:1024]...)
		if !bytes.Equal(p.stored(8192, len(want)), want) {
			t.Fatal("copied other data")
		}
		if !bytes.Equal(p.stored(8192+1030, 512), make([]byte, 512)) {
			t.Fatal("copied too much")
		}
		// Onto themselves, up and down, by more and less than a piece.
		for _, by := range []int{1, 511, 513, 1000} {
			p.load(0, data)
			if st := p.do(r.copyCmd(uint64(by), source(0, 2048))); st != nvme.StatusSuccess {
				t.Fatalf("copy up by %d: %v", by, st)
			}
			if !bytes.Equal(p.stored(uint64(by), 1<<20), data) {
				t.Fatalf("copy up by %d: other data", by)
			}
			p.load(uint64(by), data)
			if st := p.do(r.copyCmd(0, source(uint64(by), 2048))); st != nvme.StatusSuccess {
				t.Fatalf("copy down by %d: %v", by, st)
			}
			if !bytes.Equal(p.stored(0, 1<<20), data) {
				t.Fatalf("copy down by %d: other data", by)
			}
		}
		r.noError()
	})
}

// TestCopyModel copies random ranges, one after the other, on a namespace and on a slice.
func TestCopyModel(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, backend: openBackend(t, "mem:size=1MiB")})
	p := r.pair(1, 16, false)
	model := randomData(1 << 20)
	p.load(0, model)
	rapid.Check(t, func(t *rapid.T) {
		var ranges []nvme.CopyRange
		total := uint64(0)
		for range rapid.IntRange(1, 6).Draw(t, "ranges") {
			n := rapid.Uint64Range(1, 300).Draw(t, "blocks")
			ranges = append(ranges, source(rapid.Uint64Range(0, 2048-n).Draw(t, "from"), uint32(n)))
			total += n
		}
		to := rapid.Uint64Range(0, 2048-total).Draw(t, "to")
		if st := p.do(r.copyCmd(to, ranges...)); st != nvme.StatusSuccess {
			t.Fatal(st)
		}
		at := to * 512
		for _, x := range ranges {
			n := uint64(x.NLB.Count()) * 512
			copy(model[at:at+n], model[x.SLBA*512:x.SLBA*512+n])
			at += n
		}
		if !bytes.Equal(p.stored(0, 1<<20), model) {
			t.Fatal("the medium differs from the model")
		}
	})
}

func TestBadCopies(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, backend: openBackend(t, "null:size=1GiB")})
	p := r.pair(1, 16, false)
	blocks := r.ctl.namespace(1).info.Blocks
	many := make([]nvme.CopyRange, 129)
	large := make([]nvme.CopyRange, 5)
	for i := range large {
		large[i] = source(0, 16384)
	}
	with := func(c nvme.Command, f func(*nvme.Command)) nvme.Command {
		f(&c)
		return c
	}
	for name, x := range map[string]struct {
		c    nvme.Command
		want nvme.Status
	}{
		"MSRC":              {r.copyCmd(0, many[:128]...), nvme.StatusSuccess},
		"over MSRC":         {r.copyCmd(0, many...), nvme.StatusCommandSizeLimit},
		"format 1":          {with(r.copyCmd(0, source(0, 1)), func(c *nvme.Command) { c.CDW12 |= 1 << 8 }), nvme.StatusInvalidField},
		"past the end":      {r.copyCmd(blocks-1, source(0, 1), source(0, 1)), nvme.StatusLBAOutOfRange},
		"no such namespace": {with(r.copyCmd(0, source(0, 1)), func(c *nvme.Command) { c.NSID = 2 }), nvme.StatusInvalidNamespace},
		"unmapped ranges":   {with(r.copyCmd(0, source(0, 1)), func(c *nvme.Command) { c.PRP1 = 0x1000 }), nvme.StatusDataTransferError},
	} {
		e := p.run(x.c)
		if e.Status().Code() != x.want || (!x.want.OK() && !e.Status().DNR()) || e.Result() != 0 {
			t.Errorf("%s: %v, DW0 %d, want %v", name, e.Status(), e.Result(), x.want)
		}
	}
	// These have their ranges in the memory that the next overwrites.
	for name, x := range map[string]struct {
		ranges []nvme.CopyRange
		want   nvme.Status
	}{
		"MCL":               {large[:4], nvme.StatusSuccess},
		"over MCL":          {large, nvme.StatusCommandSizeLimit},
		"over MSSRL":        {[]nvme.CopyRange{source(0, 16385)}, nvme.StatusCommandSizeLimit},
		"from past the end": {[]nvme.CopyRange{source(0, 1), source(blocks-1, 2)}, nvme.StatusLBAOutOfRange},
		"around the end":    {[]nvme.CopyRange{source(^uint64(0), 2)}, nvme.StatusLBAOutOfRange},
	} {
		if st := p.do(r.copyCmd(0, x.ranges...)); st.Code() != x.want {
			t.Errorf("%s: %v, want %v", name, st, x.want)
		}
	}
	r.noError()
}

// TestCopyFailsHalfWay wants to hear which range it was.
func TestCopyFailsHalfWay(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1 << 20, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: b})
	p := r.pair(1, 16, false)
	p.push(r.copyCmd(1000, source(0, 8), source(8, 1024), source(16, 8)))
	p.publish()
	// One read and one write of the first, two of each of the second, the second of which fails.
	for i := range 6 {
		r.eventually("a step", func() bool { return b.held() == 1 })
		if i == 5 {
			b.status = nvme.StatusWriteFault
		}
		b.finish(1)
	}
	if e := p.reap(1)[0]; e.Status().Code() != nvme.StatusWriteFault || e.Result() != 1 {
		t.Errorf("%v, DW0 %d", e.Status(), e.Result())
	}
}

// TestScratchIsBounded has more commands that need scratch memory than there is. They wait, nothing of them has begun, and they are
// gone with their queue.
func TestScratchIsBounded(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1 << 20, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: b})
	p, q := r.pair(1, 64, false), r.pair(2, 64, false)
	for i := range 3 * scratchCount {
		switch i % 3 {
		case 0:
			p.push(rw(nvme.IOVerify, uint64(i), 1, 0))
		case 1:
			p.push(rw(nvme.IOCompare, uint64(i), 1, base+dataOff))
		case 2:
			p.push(r.copyCmd(0, source(0, 1)))
		}
	}
	p.publish()
	r.eventually("as many to begin as there is memory for", func() bool { return b.held() == scratchCount && r.heldBack(2*scratchCount)() })
	// Another queue's commands that need none go on.
	q.push(rw(nvme.IORead, 0, 1, base+dataOff))
	q.push(rw(nvme.IOVerify, 0, 1, 0))
	q.publish()
	r.eventually("a read to begin", func() bool { return b.held() == scratchCount+1 })
	for done := 0; done < 3*scratchCount+2; {
		done += p.reapSome() + q.reapSome()
		b.finish(3)
	}
	r.workers[0].Call(func() {
		if w := r.workers[0]; w.scratches != scratchCount || len(w.scratch) != scratchCount || len(w.held) != 0 {
			t.Errorf("%d pieces of scratch memory, %d free, %d held", w.scratches, len(w.scratch), len(w.held))
		}
	})
	// Deleted while they wait.
	for range 2 * scratchCount {
		p.push(rw(nvme.IOVerify, 0, 1, 0))
	}
	p.publish()
	r.eventually("half of them to wait", r.heldBack(scratchCount))
	gone := make(chan struct{})
	go func() { r.ctl.DeleteSQ(1); close(gone) }()
	r.eventually("none to wait", r.heldBack(0))
	b.finish(scratchCount)
	<-gone
	aborted := 0
	for _, e := range p.reap(2 * scratchCount) {
		if e.Status().Code() == nvme.StatusAbortSQDeleted {
			aborted++
		}
	}
	if aborted != scratchCount {
		t.Errorf("%d of %d aborted", aborted, scratchCount)
	}
	r.noError()
}

// TestCompareMemoryGone takes guest memory away between the read of the medium and the comparison.
func TestCompareMemoryGone(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1 << 20, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: b})
	fd, err := unix.MemfdCreate("shrinks", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	dup, _ := unix.Dup(fd)
	defer unix.Close(dup)
	const at = 0x9_0000_0000
	if err := errors.Join(unix.Ftruncate(fd, 1<<20), r.mem.Map(at, 1<<20, 0, fd, true)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*pair{r.pair(1, 16, false), r.pair(2, 16, false)} {
		p.push(rw(nvme.IOCompare, 0, 1, at))
		p.publish()
	}
	r.eventually("both to be read", func() bool { return b.held() == 2 })
	if err := unix.Ftruncate(dup, 0); err != nil {
		t.Error(err)
	}
	b.finish(2) // in one batch: the second must not be forgotten
	for range 2 {
		if e := <-r.errs; e.Kind != MemoryFault {
			t.Errorf("%v: %v", e.Kind, e.Err)
		}
	}
	r.workers[0].Call(func() {
		for _, g := range r.ctl.groups {
			if g.inflight != 0 || g.state != Failed {
				t.Errorf("CQ %d: %v, %d in flight", g.qid, g.state, g.inflight)
			}
		}
	})
}

// TestForcedReads flushes before it reads from a medium with a cache, and only then.
func TestForcedReads(t *testing.T) {
	for _, cache := range []bool{false, true} {
		b := &slow{info: backend.Info{Blocks: 1 << 20, LBAShift: 9, VolatileCache: cache}}
		r := newRig(t, rigConfig{shadow: true, backend: b})
		p := r.pair(1, 16, false)
		ops := func(c nvme.Command) (ops []backend.Op) {
			p.push(c)
			p.publish()
			r.eventually("a completion", func() bool {
				if held := b.ops(); len(held) > 0 {
					ops = append(ops, held...)
					b.finish(len(held))
				}
				return p.cq.Ready()
			})
			if st := p.reap(1)[0].Status(); st != nvme.StatusSuccess {
				t.Errorf("%s: %v", c.Describe(false), st)
			}
			return ops
		}
		for _, op := range []uint8{nvme.IORead, nvme.IOCompare, nvme.IOVerify} {
			c := rw(op, 0, 8, base+dataOff)
			if got := ops(c); !slices.Equal(got, []backend.Op{backend.OpRead}) {
				t.Errorf("%s: %v", c.Describe(false), got)
			}
			c.CDW12 |= nvme.RWForceUnit
			want := []backend.Op{backend.OpRead}
			if cache {
				want = []backend.Op{backend.OpFlush, backend.OpRead}
			}
			if got := ops(c); !slices.Equal(got, want) {
				t.Errorf("%s, cache %v: %v", c.Describe(false), cache, got)
			}
		}
		c := r.copyCmd(100, source(0, 1))
		c.CDW12 |= nvme.RWForceUnit
		if got := ops(c); !slices.Equal(got, []backend.Op{backend.OpRead, backend.OpWrite}) {
			t.Errorf("copy: %v", got)
		}
	}
}

// TestStarvedCommandsThatFail has commands wait for scratch memory that they do not need any more when their turn comes: their namespace is gone. All end.
func TestStarvedCommandsThatFail(t *testing.T) {
	b := &slow{info: backend.Info{Blocks: 1 << 20, LBAShift: 9}}
	r := newRig(t, rigConfig{shadow: true, backend: b})
	p := r.pair(1, 64, false)
	for range scratchCount + 20 {
		p.push(rw(nvme.IOVerify, 0, 1, 0))
	}
	p.publish()
	r.eventually("twenty to wait", r.heldBack(20))
	if err := r.ctl.SetNamespaces(nil); err != nil {
		t.Fatal(err)
	}
	b.finish(1)
	failed := 0
	for _, e := range p.reap(21) {
		if e.Status().Code() == nvme.StatusInvalidNamespace {
			failed++
		}
	}
	if failed != 20 {
		t.Errorf("%d of 20 failed", failed)
	}
	b.finish(scratchCount)
	p.reap(scratchCount - 1)
	r.noError()
}
