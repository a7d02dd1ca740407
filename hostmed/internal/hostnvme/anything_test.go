package hostnvme

import (
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

var (
	anythingSeed = flag.Uint64("anything.seed", 1, "the first seed of TestAnything")
	anythingRuns = flag.Int("anything.runs", 2, "how many seeds TestAnything has")
)

// TestAnything has guests, each with a slice, do whatever requests can be, with memory that comes and goes and queues that are closed and opened, on a device
// that fails commands, completes late and in any order, never completes, is reset by this side and behind its back, fails, and posts what it may not. Every request ends once,
// every byte is its guest's, and none of a neighbour's changes.
func TestAnything(t *testing.T) {
	for seed := *anythingSeed; seed < *anythingSeed+uint64(*anythingRuns); seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { anything(t, seed) })
	}
}

const (
	cellBlocks = 128
	cellBytes  = cellBlocks << 9
	cells      = 48 // of each guest
	gapBlocks  = 64 // between two guests, which nobody may write
)

// anyGuest is a guest, and what it knows of its blocks.
type anyGuest struct {
	t    *testing.T
	rng  *rand.Rand
	r    *rig
	a    Attach
	q    *Queue
	mem  []byte
	has  bool // the device was told of mem
	disk []byte
	sure []bool // by block: disk has what is there
	busy [cells]bool
	n    int
	ends int
}

// anyOp is a request of a guest.
type anyOp struct {
	req         Request
	first, span int // cells
	off, n      int // blocks of the guest
	ended       bool
	list        []byte
}

func anything(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 7))
	guests := 2 + rng.IntN(3)
	cfg := nvmetest.Config{
		Queues: 1 + rng.IntN(3), Vectors: 16, NoShadow: rng.IntN(2) == 0, MDTS: uint8([]int{0, 1, 3, 5}[rng.IntN(4)]),
		SGLS:       []uint32{0, nvme.SGLSDwordAligned, nvme.SGLSByteAligned}[rng.IntN(3)],
		CAP:        nvme.CAP(0).WithMQES([]nvme.ZeroBased16{1, 2, 6, 63, 1023}[rng.IntN(5)]).WithTO(2).WithCSS(nvme.CAPCSSNVM).WithCQR(true).WithDSTRD(uint8(rng.IntN(3))),
		Namespaces: []nvmetest.Namespace{{Blocks: uint64(guests*(cells*cellBlocks+gapBlocks) + gapBlocks), LBADS: 9, GUID: 1}},
	}
	var mu sync.Mutex
	dice := rand.New(rand.NewPCG(seed, 9)) // of the device
	roll := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return dice.IntN(n)
	}
	var calm atomic.Bool
	var wrongs atomic.Int32
	cfg.Hooks.Command = func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
		if qid == 0 || calm.Load() {
			return nvmetest.Verdict{}
		}
		switch x := roll(4000); {
		case x < 1:
			return nvmetest.Verdict{Action: nvmetest.Drop}
		case x < 160:
			return nvmetest.Verdict{Action: nvmetest.Fail, Status: nvme.StatusUnrecoveredRead | nvme.StatusMore}
		case x < 800:
			return nvmetest.Verdict{Action: nvmetest.Hold}
		}
		return nvmetest.Verdict{}
	}
	cfg.Hooks.Post = func(qid uint16, e *ring.Entry) {
		if qid != 0 && !calm.Load() && roll(2000) == 0 && wrongs.Add(1) < maxBroken {
			e.Hi ^= 1 << (32 + roll(16)) // of the SQ, or of the identifier
		}
	}
	r := newRig(t, cfg, func(o *Options) { o.Timeout = time.Second })
	before := make([]byte, len(r.model.Disk(1)))
	for i := range before {
		before[i] = byte(rng.Uint32())
	}
	r.model.Fill(1, before)

	stop := make(chan struct{})
	var chaos, work sync.WaitGroup
	chaos.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 8))
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(rng.IntN(8000)) * time.Microsecond):
			}
			switch x := rng.IntN(400); {
			case x < 12:
				_ = r.dev.Reset(context.Background())
			case x < 14:
				r.model.Fault()
			case x < 16:
				_ = r.guests.Device.Reset()
			default:
				r.model.Release()
			}
		}
	})
	batches := 60
	if testing.Short() {
		batches = 20
	}
	var all []*anyGuest
	for i := range guests {
		s := Slice{
			NSID: 1, First: uint64(gapBlocks + i*(cells*cellBlocks+gapBlocks)), Blocks: cells * cellBlocks, Shift: 9, MaxTransfer: uint64(r.dev.MaxTransfer()),
			Zeroes: rng.IntN(2) == 0, MaxZeroes: 1 << (10 + rng.IntN(10)), Discard: true, MaxDiscard: 1 << (9 + rng.IntN(12)), Is: r.dev.Space(1),
		}
		if rng.IntN(2) == 0 {
			s.Boundary = 4096 << rng.IntN(6)
		}
		g := &anyGuest{
			t: t, rng: rand.New(rand.NewPCG(seed, 100+uint64(i))), r: r, a: Attach{Slice: s, Owner: i % 2, Polled: cfg.Queues > 2 && i == 1},
			mem: r.guests.Memory(cells * cellBytes), disk: before[s.First<<9:][:s.Blocks<<9], sure: make([]bool, s.Blocks),
		}
		for i := range g.sure {
			g.sure[i] = true
		}
		g.disk = bytes.Clone(g.disk)
		all = append(all, g)
		work.Go(func() { g.live(batches) })
	}
	work.Wait()
	close(stop)
	chaos.Wait()
	calm.Store(true)
	after := r.model.Disk(1)
	for _, g := range all {
		mine := after[g.a.Slice.First<<9:][:g.a.Slice.Blocks<<9]
		for b, sure := range g.sure {
			if sure && !bytes.Equal(mine[b<<9:][:512], g.disk[b<<9:][:512]) {
				t.Errorf("guest at %d: block %d is not what it wrote", g.a.Slice.First, b)
				break
			}
		}
	}
	for at := 0; at < len(after); at += (gapBlocks + cells*cellBlocks) << 9 {
		if !bytes.Equal(after[at:][:gapBlocks<<9], before[at:][:gapBlocks<<9]) {
			t.Errorf("block %d and what follows, which are nobody's, have changed", at>>9)
		}
	}
	c, _ := r.Counts()
	t.Logf("%d guests, %d pairs of %d entries: %+v, %+v", guests, cfg.Queues, cfg.CAP.MQES().Count(), c, r.dev.Stats())
}

// live does some batches.
func (g *anyGuest) live(batches int) {
	for n := range batches {
		if g.q == nil {
			q, err := g.r.NewQueue(g.a)
			if err != nil {
				if g.r.dev.Err() == nil && !g.a.Polled {
					g.a.Polled = true // nobody would wake it otherwise
					continue
				}
				g.t.Error(err)
				return
			}
			g.q = q
		}
		if g.n == g.ends {
			switch x := g.rng.IntN(12); {
			case x < 3 && g.has:
				g.q.RemoveMemory(g.mem)
				g.has = false
			case x < 6 && !g.has:
				g.q.AddMemory(g.mem)
				if g.has = true; x == 3 {
					g.r.mem.Settle(patience)
				}
			}
		}
		g.q.Begin()
		for range 1 + g.rng.IntN(40) {
			if o := g.make(); o != nil {
				x := g.q.Take()
				o.req.q = g.q
				*x = o.req
				x.Owner = o
				g.n++
				g.q.Put(x)
			}
		}
		g.q.Commit()
		g.end(g.q.Collect(64))
		last := n == batches-1 || g.rng.IntN(10) == 0
		left := g.rng.IntN(20)
		if last {
			left = 0
		}
		for end := time.Now().Add(patience); g.q.Inflight() > left; {
			got := g.q.Reap(1 + g.rng.IntN(20))
			if g.end(got); len(got) > 0 {
				continue
			}
			if time.Now().After(end) {
				g.t.Errorf("guest at %d: %d of %d requests have not ended", g.a.Slice.First, g.n-g.ends, g.n)
				return
			}
			g.q.nap()
		}
		if last {
			if g.n != g.ends {
				g.t.Errorf("%d requests put, %d ended, none in flight", g.n, g.ends)
			}
			if err := g.q.Close(); err != nil {
				g.t.Error(err)
			}
			g.q, g.has = nil, false
		}
	}
}

// make makes a request on cells where nothing is under way; nil: there is none.
func (g *anyGuest) make() *anyOp {
	o := &anyOp{first: g.rng.IntN(cells), span: 1}
	if g.rng.IntN(8) == 0 {
		o.span = 1 + g.rng.IntN(12)
	}
	if o.first+o.span > cells {
		return nil
	}
	for c := o.first; c < o.first+o.span; c++ {
		if g.busy[c] {
			return nil
		}
	}
	o.n = 1 + g.rng.IntN(o.span*cellBlocks)
	if g.rng.IntN(2) == 0 {
		o.n = min(o.n, 8)
	}
	o.off = o.first*cellBlocks + g.rng.IntN(o.span*cellBlocks-o.n+1)
	r := &o.req
	r.Off, r.Len = uint64(o.off)<<9, uint64(o.n)<<9
	switch x := g.rng.IntN(20); {
	case x < 7:
		r.Op = Read
	case x < 14:
		r.Op = Write
	case x == 14:
		r.Op, r.Off, r.Len = Flush, 0, 0
	case x == 15:
		r.Op, r.Dealloc = WriteZeroes, g.rng.IntN(2) == 0
	case x == 16:
		r.Op = Discard
	case x == 17: // Compare
		r.Op, r.Cmd = Command, &nvme.Command{Opcode: nvme.IOCompare}
	case x == 18: // outside of the slice
		r.Op = Op(g.rng.IntN(2))
		r.Off = g.a.Slice.Blocks<<9 - uint64(o.n-1)<<9
	default: // of two ranges
		r.Op, r.Cmd = Command, &nvme.Command{Opcode: nvme.IODSM, CDW10: 1, CDW11: nvme.DSMDeallocate}
		o.list = make([]byte, 32)
		half := o.n / 2
		binary.LittleEndian.PutUint32(o.list[4:], uint32(half))
		binary.LittleEndian.PutUint64(o.list[8:], uint64(o.off))
		binary.LittleEndian.PutUint32(o.list[20:], uint32(o.n-half))
		binary.LittleEndian.PutUint64(o.list[24:], uint64(o.off+half))
	}
	g.occupy(o, true)
	mem := g.mem[o.off<<9:][:o.n<<9]
	switch {
	case o.list != nil:
		r.Vec = []Seg{seg(o.list)}
	case r.Op == Read:
		clear(mem)
	case r.Op == Write:
		for i := 0; i < len(mem); i += 8 {
			binary.LittleEndian.PutUint64(mem[i:], g.rng.Uint64())
		}
	case r.Op == Command:
		copy(mem, g.disk[o.off<<9:])
	}
	if o.list == nil && r.Op != Flush {
		r.Vec = g.pieces(mem)
	}
	return o
}

func (g *anyGuest) occupy(o *anyOp, yes bool) {
	for c := o.first; c < o.first+o.span; c++ {
		g.busy[c] = yes
	}
}

// pieces cuts mem up, sometimes where no page ends.
func (g *anyGuest) pieces(mem []byte) (vec []Seg) {
	for len(mem) > 0 {
		n := len(mem)
		switch g.rng.IntN(4) {
		case 0:
			n = min(n, 4*(1+g.rng.IntN(2000)))
		case 1:
			n = min(n, 4096*(1+g.rng.IntN(8)))
		}
		vec = append(vec, seg(mem[:n]))
		mem = mem[n:]
	}
	return vec
}

// end takes requests that are done.
func (g *anyGuest) end(done []*Request) {
	for _, x := range done {
		o := x.Owner.(*anyOp)
		g.ends++
		if o.ended {
			g.t.Errorf("%v ended twice", x.Op)
		}
		o.ended = true
		g.judge(o, x.Status)
		g.occupy(o, false)
		g.q.Free(x)
	}
}

func (g *anyGuest) judge(o *anyOp, st nvme.Status) {
	mem, disk := g.mem[o.off<<9:][:o.n<<9], g.disk[o.off<<9:][:o.n<<9]
	allSure := true
	for _, s := range g.sure[o.off:][:o.n] {
		allSure = allSure && s
	}
	r := &o.req
	switch {
	case r.Op <= Write && r.Off+r.Len > g.a.Slice.Blocks<<9:
		if st != nvme.StatusLBAOutOfRange.WithDNR() {
			g.t.Errorf("%v outside of the slice: %v", r.Op, st)
		}
	case r.Op == Flush:
	case r.Op == Read:
		for b := 0; st.OK() && b < o.n; b++ {
			if g.sure[o.off+b] && !bytes.Equal(mem[b<<9:][:512], disk[b<<9:][:512]) {
				g.t.Errorf("guest at %d read block %d of %d and %d, and has something else", g.a.Slice.First, o.off+b, o.off, o.n)
				return
			}
		}
	case r.Op == Command && r.Cmd.Opcode == nvme.IOCompare:
		if st.Code() == nvme.StatusCompareFailure && allSure {
			g.t.Errorf("guest at %d: blocks %d and %d are others", g.a.Slice.First, o.off, o.n)
		}
	case !st.OK():
		for b := range o.n {
			g.sure[o.off+b] = false
		}
	default:
		if r.Op == Write {
			copy(disk, mem)
		} else {
			clear(disk)
		}
		for b := range o.n {
			g.sure[o.off+b] = true
		}
	}
	// What is not known of a request is known of none of the device's: it says More to nobody here.
	if st.More() {
		g.t.Errorf("%v: %v", r.Op, st)
	}
}
