package ioq

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// limited is a rig with a subsystem whose limits go by a clock that the test turns.
type limited struct {
	*rig
	sub   *subsys.Subsystem
	ns    []*subsys.Namespace
	self  *subsys.Controller
	clock atomic.Int64
}

func newLimited(t testing.TB, c rigConfig, media ...backend.Backend) *limited {
	t.Helper()
	r := newRig(t, c)
	l := &limited{rig: r, sub: subsys.New(subsys.Config{Workers: Pool(r.workers)})}
	r.closeAtEnd(l.sub)
	l.clock.Store(int64(time.Hour))
	for _, w := range r.workers {
		w.Call(func() { w.limitClock = l.clock.Load })
	}
	l.self = l.sub.AddController(1)
	r.ctl.cfg.Self = l.self
	for i, b := range media {
		l.ns = append(l.ns, l.sub.AddNamespace(subsys.NamespaceConfig{NSID: uint32(i + 1), Backend: b, Shared: true}))
	}
	r.attach(l.ns...)
	return l
}

// limit sets the limits of namespace i, from 1, or of the controller, 0.
func (l *limited) limit(i int, x qos.Limits) {
	m := l.self.Limiter()
	if i > 0 {
		m = l.ns[i-1].Limiter()
	}
	m.Set(x, l.clock.Load())
	l.ctl.SetLimits()
}

// advance turns the clock, in steps that workers would be woken after. What may go then has begun when it returns.
func (l *limited) advance(d time.Duration) {
	step := max(min(d, time.Millisecond), d/1000)
	for at := time.Duration(0); ; at += step {
		l.clock.Add(int64(min(step, d-at)))
		for _, w := range l.workers {
			w.Call(func() {
				for w.takeTurns() > 0 {
				}
			})
		}
		if at+step >= d {
			return
		}
	}
}

// waiting is how many commands limits hold back.
func (l *limited) waiting() (n int) {
	for _, w := range l.workers {
		w.Call(func() {
			for _, g := range l.ctl.groups {
				if g.w == w {
					for _, s := range g.sqs {
						n += int(s.waiting)
					}
				}
			}
		})
	}
	return n
}

func (l *limited) awaitWaiting(n int) {
	l.t.Helper()
	l.eventually("as many commands to wait as limits do not let go", func() bool { return l.waiting() == n })
}

// empty checks that nothing is left of what waited.
func (l *limited) empty() {
	l.t.Helper()
	for _, w := range l.workers {
		w.Call(func() {
			if len(w.lanes)+len(w.stalled)+len(w.held) != 0 {
				l.t.Errorf("%d lanes, %d stalled, %d held", len(w.lanes), len(w.stalled), len(w.held))
			}
			for _, r := range w.reqs {
				if r.lane != nil || r.next != nil || r.paid || r.held || r.sq != nil {
					l.t.Errorf("a request is not as it was: %+v", r)
				}
			}
		})
	}
}

// ready is how many completions there are, none of which is taken.
func (l *limited) ready(p *pair) (n int) {
	g := l.ctl.cqs[p.qid].Load()
	g.w.Call(func() { n = int((g.prod.Tail() + g.prod.Size() - p.cq.Head()) % g.prod.Size()) })
	return n
}

func (l *limited) wantReady(p *pair, n int) {
	l.t.Helper()
	if got := l.ready(p); got != n {
		l.t.Fatalf("queue %d: %d completions instead of %d", p.qid, got, n)
	}
}

func (p *pair) pushAll(n int, c nvme.Command) (cids []uint16) {
	for range n {
		cids = append(cids, p.push(c))
	}
	p.publish()
	return cids
}

func inNS(nsid uint32, c nvme.Command) nvme.Command {
	c.NSID = nsid
	return c
}

var (
	aRead  = rw(nvme.IORead, 0, 1, base+dataOff)
	aWrite = rw(nvme.IOWrite, 0, 1, base+dataOff)
)

func iops(rate, burst uint64) qos.Limits {
	return qos.Limits{IOPS: qos.Limit{Rate: rate, Burst: burst}}
}

// TestLimitedCommandsGoInTheirTurn, in the order of the queue, and to the command as many as the rate has.
func TestLimitedCommandsGoInTheirTurn(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		l := newLimited(t, c, openBackend(t, "mem:size=1MiB"))
		l.limit(1, iops(10, 2))
		p := l.pair(1, 64, false)
		cids := p.pushAll(30, aRead)
		l.awaitWaiting(28)
		l.wantReady(p, 2)
		for i, step := range []struct {
			d    time.Duration
			more int
		}{{99 * time.Millisecond, 0}, {5 * time.Millisecond, 1}, {250 * time.Millisecond, 2}, {50 * time.Millisecond, 1}, {2 * time.Second, 20}} {
			before := l.ready(p)
			if l.advance(step.d); l.ready(p) != before+step.more {
				t.Fatalf("step %d: %d commands went, not %d", i, l.ready(p)-before, step.more)
			}
		}
		for i, e := range p.reap(26) {
			if e.CID() != cids[i] || !e.Status().OK() {
				t.Errorf("completion %d is of command %d: %v", i, e.CID(), e.Status())
			}
		}
		l.limit(1, qos.Limits{})
		p.reap(4)
		s := l.ctl.Stats()
		if s.Throttled != 28 || s.Reads != 30 {
			t.Errorf("%d of %d commands were throttled, not 28 of 30", s.Throttled, s.Reads)
		}
		// 24 that went at 100 ms, 200 ms and so on, and 4 at 2.4 s.
		if want := 24*25/2*100*time.Millisecond + 4*2400*time.Millisecond; s.ThrottledFor < want || s.ThrottledFor > want+4*time.Second {
			t.Errorf("throttled for %v, not %v", s.ThrottledFor, want)
		}
		if n, ns := l.ns[0].Limiter().Held(); n != 28 || time.Duration(ns) != s.ThrottledFor {
			t.Errorf("the namespace has held %d for %v", n, time.Duration(ns))
		}
		l.empty()
		l.noError()
	})
}

// TestLimitsBlockNobodyElse: not other namespaces in the same queue, not reads if it is writes that wait, not other queues, not flushes.
func TestLimitsBlockNobodyElse(t *testing.T) {
	l := newLimited(t, rigConfig{shadow: true}, openBackend(t, "mem:size=1MiB"), openBackend(t, "mem:size=1MiB"))
	l.limit(1, qos.Limits{WriteIOPS: qos.Limit{Rate: 1, Burst: 1}})
	p, q := l.pair(1, 64, false), l.pair(2, 64, false)
	p.pushAll(5, aWrite)
	l.awaitWaiting(4)
	p.reap(1)
	for _, c := range []nvme.Command{inNS(2, aWrite), aRead, inNS(1, nvme.Command{Opcode: nvme.IOFlush}), rw(nvme.IOVerify, 0, 1, 0)} {
		for _, x := range []*pair{p, q} {
			if st := x.do(c); !st.OK() {
				t.Errorf("%s: %v", nvme.IOOpcodeName(c.Opcode), st)
			}
		}
	}
	q.pushAll(1, aWrite) // of the same namespace: it waits, in its own queue
	l.awaitWaiting(5)
	l.wantReady(q, 0)
	l.limit(0, qos.Limits{ReadBandwidth: qos.Limit{Rate: qos.MinBandwidth, Burst: 512}}) // the controller: for all its namespaces
	p.pushAll(2, inNS(2, aRead))
	l.awaitWaiting(6)
	if st := q.do(inNS(2, aWrite)); !st.OK() {
		t.Error(st)
	}
	l.limit(0, qos.Limits{})
	p.reap(2)
	l.limit(1, qos.Limits{})
	p.reap(4)
	q.reap(1)
	l.empty()
	l.noError()
}

// TestLimitsAreFairBetweenQueues, on the same worker and on different ones: a queue with one command at a time has as many as one with 60.
func TestLimitsAreFairBetweenQueues(t *testing.T) {
	for _, workers := range []int{1, 2} {
		l := newLimited(t, rigConfig{shadow: true, workers: workers}, openBackend(t, "mem:size=1MiB"))
		l.limit(1, iops(1000, 1))
		deep, shallow, third := l.pair(1, 64, false), l.pair(2, 64, false), l.pair(3, 64, false)
		deep.pushAll(60, aRead)
		l.awaitWaiting(59)
		third.pushAll(60, aWrite)
		l.awaitWaiting(119)
		shallow.pushAll(1, aRead)
		l.awaitWaiting(120)
		served := 0
		for range 90 {
			l.advance(time.Millisecond)
			if l.ready(shallow) > 0 {
				shallow.reap(1)
				served++
				shallow.pushAll(1, aRead)
				l.awaitWaiting(120 - l.ready(deep) - l.ready(third) + 1) // the deep queue's first was let go before
			}
		}
		if n := l.ready(deep) - 1; served < 29 || served > 31 || n < 29 || n > 31 {
			t.Errorf("%d workers: of 90 commands the queue with one at a time has had %d, those with 60 had %d and %d", workers, served, n, l.ready(third))
		}
		l.limit(1, qos.Limits{})
		deep.reap(60)
		third.reap(60)
		shallow.reap(1)
		l.empty()
	}
}

// TestThousandsOfLimitedCommands: of what a guest queues hostmed fetches only so much; other queues go on; and all of it ends.
func TestThousandsOfLimitedCommands(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		l := newLimited(t, c, openBackend(t, "null:size=1MiB"), openBackend(t, "null:size=1MiB"))
		l.limit(1, iops(1, 1))
		p, q := l.pair(1, 8192, false), l.pair(2, 64, false)
		cids := p.pushAll(6000, aRead)
		l.eventually("the lane to be full", func() bool { return l.waiting() >= fullLane })
		for range 20 {
			if st := q.do(inNS(2, aRead)); !st.OK() {
				t.Fatal(st)
			}
		}
		if n := l.waiting(); n >= fullLane+batchMax {
			t.Errorf("%d commands are held", n)
		}
		l.asleep(1) // the worker polls nothing: not the queue that it may not fetch from
		if !l.ctl.Abort(1, cids[5]) || !l.ctl.Abort(1, cids[5999]) {
			t.Error("a command that waits was not aborted")
		}
		l.limit(1, iops(1000_000, 1))
		seen := 0
		for begin := time.Now(); seen < 6000; {
			l.advance(100 * time.Microsecond)
			for n := l.ready(p); n > 0; n-- {
				e := p.reap(1)[0]
				if want := e.CID() == cids[5] || e.CID() == cids[5999]; want != (e.Status().Code() == nvme.StatusAbortRequested) {
					t.Fatalf("command %d: %v", e.CID(), e.Status())
				}
				seen++
				begin = time.Now()
			}
			if time.Since(begin) > patience {
				t.Fatalf("%d of 6000 completed:\n%s", seen, l.ctl.String())
			}
		}
		if n, granted := l.ctl.Stats().Throttled, l.clock.Load(); n < 5900 {
			t.Errorf("%d were throttled, at %d", n, granted)
		}
		l.empty()
		l.noError()
	})
}

// TestLimitedCommandsEndWithTheirQueue, controller and namespace, at once; and what they had paid is given back.
func TestLimitedCommandsEndWithTheirQueue(t *testing.T) {
	l := newLimited(t, rigConfig{shadow: true, workers: 2}, openBackend(t, "mem:size=1MiB"), openBackend(t, "mem:size=1MiB"))
	l.limit(1, iops(1, 1))
	p, q := l.pair(1, 2048, false), l.pair(2, 2048, false)
	p.pushAll(2000, aRead)
	q.pushAll(2000, aWrite)
	l.eventually("both queues to be full", func() bool { return l.waiting() >= 2*fullLane })
	begin := time.Now()
	l.ctl.DeleteSQ(1)
	for l.ready(p) > 0 {
		if st := p.reap(1)[0].Status(); !st.OK() && st.Code() != nvme.StatusAbortSQDeleted {
			t.Fatal(st)
		}
	}
	l.ctl.DeleteCQ(1)
	// Namespace 1 goes: what waits for it fails, what comes for it too.
	l.attach(l.ns[1])
	for range 2000 {
		if st := q.reap(1)[0].Status(); !st.OK() && st.Code() != nvme.StatusInvalidField && st.Code() != nvme.StatusInvalidNamespace {
			t.Fatal(st)
		}
	}
	l.attach(l.ns...)
	q.pushAll(100, aRead)
	l.awaitWaiting(100) // the one token went to the first of all commands
	l.ctl.Stop(patience)
	if d := time.Since(begin); d > patience {
		t.Errorf("that took %v", d)
	}
	l.empty()
	if err := l.ctl.SetDoorbellPages(l.view(shadowOff, 4096), l.view(eiOff, 4096)); err != nil {
		t.Fatal(err)
	}
	l.clock.Add(int64(time.Second))
	r := l.pair(1, 16, false)
	if st := r.do(aRead); !st.OK() { // what had been paid in advance was given back: one second is one token
		t.Error(st)
	}
	l.noError()
}

// TestLimitedCommandsWaitForNobodysMemory: nothing of them has begun, so memory goes, queues are parked and controllers paused without waiting for
// tokens. They keep their places.
func TestLimitedCommandsWaitForNobodysMemory(t *testing.T) {
	eachMappedMode(t, func(t *testing.T, c rigConfig) {
		c.scatter = true
		l := newLimited(t, c, openBackend(t, "mem:size=1MiB"))
		l.limit(1, iops(10, 1))
		p := l.pair(1, 64, false)
		p.pushAll(10, aRead)
		l.awaitWaiting(9)
		l.unmap(dataOff, 4096)
		l.advance(100 * time.Millisecond)
		l.eventually("two completions", func() bool { return l.ready(p) == 2 })
		p.reap(1)
		if st := p.reap(1)[0].Status().Code(); st != nvme.StatusDataTransferError {
			t.Errorf("a read to memory that has gone: %v", st)
		}
		l.remap(dataOff, 4096)
		for _, off := range []uint64{p.sqOff, p.cqOff} {
			l.unmap(off, 4096)
			l.advance(100 * time.Millisecond)
			l.remap(off, 4096)
			l.advance(0)
		}
		if es := p.reap(2); !es[0].Status().OK() || !es[1].Status().OK() {
			t.Error(es[0].Status(), es[1].Status())
		}
		l.ctl.Hold(true)
		l.advance(200 * time.Millisecond)
		l.wantReady(p, 0)
		if !l.begunBy(func(w *Worker) bool { return len(w.lanes) == 0 && len(w.stalled) == 1 }) {
			t.Error("a paused controller's lane is waited for")
		}
		l.ctl.Hold(false)
		l.advance(0)
		l.wantReady(p, 2) // the one whose turn came meanwhile, and the burst
		l.advance(time.Second)
		p.reap(6)
		l.empty()
		l.noError()
	})
}

func (l *limited) begunBy(f func(*Worker) bool) (ok bool) {
	w := l.workers[0]
	w.Call(func() { ok = f(w) })
	return ok
}

// TestLimitsChangeLive: up, down, off, for who waits as for who comes.
func TestLimitsChangeLive(t *testing.T) {
	l := newLimited(t, rigConfig{shadow: true}, openBackend(t, "mem:size=1MiB"))
	p := l.pair(1, 256, false)
	if st := p.do(aRead); !st.OK() {
		t.Fatal(st)
	}
	l.limit(1, iops(10, 1))
	l.limit(0, iops(100, 1))
	p.pushAll(200, aRead)
	l.awaitWaiting(199)
	p.reap(1)
	l.advance(time.Second)
	l.wantReady(p, 10)
	l.limit(1, qos.Limits{}) // the controller's is left
	before := l.ready(p)
	l.advance(500 * time.Millisecond)
	if n := l.ready(p) - before; n < 49 || n > 51 {
		t.Errorf("%d commands in half a second at 100 IOPS", n)
	}
	l.limit(0, iops(1, 1))
	before = l.ready(p)
	l.advance(10 * time.Second)
	if n := l.ready(p) - before; n < 9 || n > 11 {
		t.Errorf("%d commands in 10 s at 1 IOPS", n)
	}
	l.limit(0, qos.Limits{})
	p.reap(199)
	p.pushAll(100, aRead)
	p.reap(100)
	l.empty()
	l.noError()
}

// TestLimitsOfBandwidth count bytes, a command larger than the burst passes, and what a Copy moves is paid for by those after it.
func TestLimitsOfBandwidth(t *testing.T) {
	l := newLimited(t, rigConfig{shadow: true}, openBackend(t, "mem:size=8MiB"))
	l.limit(1, qos.Limits{Bandwidth: qos.Limit{Rate: 1 << 20, Burst: 64 << 10}})
	p := l.pair(1, 64, false)
	if st := p.do(rw(nvme.IOWriteZeroes, 0, 2048, 0)); !st.OK() { // 1 MiB
		t.Fatal(st)
	}
	p.pushAll(1, rw(nvme.IORead, 0, 8, base+dataOff))
	l.awaitWaiting(1)
	l.advance(time.Second - 62500*time.Microsecond)
	l.wantReady(p, 0)
	l.advance(7 * time.Millisecond)
	p.reap(1)
	l.advance(10 * time.Second)
	cp := l.copyCmd(4096, source(0, 512))
	if st := p.do(cp); !st.OK() {
		t.Fatal(st)
	}
	p.pushAll(1, aRead) // 512 KiB, of which 64 were there
	l.awaitWaiting(1)
	l.advance(437 * time.Millisecond)
	l.wantReady(p, 0)
	l.advance(4 * time.Millisecond)
	p.reap(1)
	l.empty()
	l.noError()
}

// TestLimitsHoldCopiesBack, of bytes alone, of either side: though how much a Copy moves is known only when it has begun.
func TestLimitsHoldCopiesBack(t *testing.T) {
	for name, x := range map[string]qos.Limits{
		"both":  {Bandwidth: qos.Limit{Rate: 1 << 20, Burst: 64 << 10}},
		"read":  {ReadBandwidth: qos.Limit{Rate: 512 << 10, Burst: 64 << 10}},
		"write": {WriteBandwidth: qos.Limit{Rate: 512 << 10, Burst: 64 << 10}},
	} {
		l := newLimited(t, rigConfig{shadow: true}, openBackend(t, "mem:size=8MiB"))
		l.limit(1, x)
		p := l.pair(1, 64, false)
		p.pushAll(5, l.copyCmd(4096, source(0, 512))) // 256 KiB, in half a second
		l.awaitWaiting(4)
		p.reap(1)
		if x.Bandwidth.Rate == 0 { // what is of the other side does not wait behind them
			c := aWrite
			if name == "write" {
				c = aRead
			}
			if st := p.do(c); !st.OK() {
				t.Error(st)
			}
		}
		l.advance(1900 * time.Millisecond)
		if n := l.ready(p); n < 3 || n > 4 {
			t.Errorf("%s: %d copies of half a second each in 1.9 s", name, n)
		}
		l.advance(time.Second)
		p.reap(4)
		l.empty()
	}
}

// TestPriceOf each command.
func TestPriceOf(t *testing.T) {
	n := &namespace{info: backend.Info{LBAShift: 12, Blocks: 100_000}, native: backend.Opcodes{}.With(0xc0, 0xc1, 0xc2)}
	s := &sq{g: &group{ctl: &Controller{mdts: 1 << 20}}}
	type price struct {
		class qos.Class
		bytes uint64
		free  bool
	}
	at := func(op uint8, lba uint64, blocks uint32) price {
		r := &request{cmd: rw(op, lba, blocks, 0), sq: s}
		class, bytes, free := r.price(n)
		return price{class, bytes, free}
	}
	for op, want := range map[uint8]price{
		nvme.IORead: {qos.Read, 16384, false}, nvme.IOCompare: {qos.Read, 16384, false}, nvme.IOVerify: {qos.Read, 16384, false},
		nvme.IOWrite: {qos.Write, 16384, false}, nvme.IOWriteZeroes: {qos.Write, 16384, false},
		nvme.IODSM: {qos.Write, 0, false}, nvme.IOWriteUncorrectable: {qos.Write, 0, false}, nvme.IOCopy: {qos.Write, 4096, false},
		nvme.IOFlush: {qos.Other, 0, false}, nvme.IOReservationAcquire: {0, 0, true}, nvme.IOReservationReport: {0, 0, true},
		0xc1: {qos.Write, 400, false}, 0xc2: {qos.Read, 400, false}, 0xc0: {qos.Other, 0, false}, 0xc5: {qos.Other, 0, false}, 0x7f: {qos.Other, 0, false},
	} {
		if got := at(op, 100, 4); got != want {
			t.Errorf("opcode %#x: %+v, not %+v", op, got, want)
		}
	}
	// What fails moves nothing, however much it names.
	for name, got := range map[string]price{
		"MDTS": at(nvme.IORead, 0, 257), "past the end": at(nvme.IORead, 99_999, 2), "far past it": at(nvme.IORead, 1<<63, 1),
		"verify": at(nvme.IOVerify, 0, 65536), "vendor": at(0xc2, 1<<31, 1),
	} {
		if got != (price{qos.Read, 0, false}) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got := at(nvme.IOWriteZeroes, 0, 65536); got.bytes != 256<<20 {
		t.Errorf("write zeroes has no limit of its size: %+v", got)
	}
}

// TestLimitedFusedPairs wait, as one, for both halves, and are aborted and deleted as one.
func TestLimitedFusedPairs(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	l := newLimited(t, rigConfig{shadow: true, backend: disk}, disk)
	p := l.pair(1, 64, false)
	a, b := fused(8, 16, dataOff, dataOff)
	b.PRP2 = a.PRP2
	l.limit(1, qos.Limits{WriteIOPS: qos.Limit{Rate: 1, Burst: 1}}) // of which there is nothing for the Compare alone
	if x, y := p.both(a, b); !x.OK() || !y.OK() {
		t.Fatal(x, y)
	}
	pushPairs := func(n int) (cids []uint16) {
		for range n {
			cids = append(cids, p.push(a), p.push(b))
		}
		p.publish()
		return cids
	}
	cids := pushPairs(4)
	l.awaitWaiting(4) // and their second halves, elsewhere
	if st := p.do(aRead); !st.OK() {
		t.Error(st)
	}
	l.limit(1, iops(2, 1))
	// The first has a place by the old limits, and goes at once: there is none for writes any more. The second wants two commands' worth, and one is there.
	l.advance(0)
	if es := p.reap(2); !es[0].Status().OK() || !es[1].Status().OK() {
		t.Error(es[0].Status(), es[1].Status())
	}
	l.advance(400 * time.Millisecond)
	l.wantReady(p, 0)
	l.advance(200 * time.Millisecond)
	p.reap(2)
	if !l.ctl.Abort(1, cids[5]) { // the second half of the third
		t.Error("not aborted")
	}
	got := p.statuses(2)
	if got[cids[5]] != nvme.StatusAbortRequested || got[cids[4]] != nvme.StatusAbortMissingFused {
		t.Errorf("an aborted second half: %v", got)
	}
	if !l.ctl.Abort(1, cids[6]) {
		t.Error("not aborted")
	}
	if got := p.statuses(2); got[cids[6]] != nvme.StatusAbortRequested || got[cids[7]] != nvme.StatusAbortFailedFused {
		t.Errorf("an aborted first half: %v", got)
	}
	l.limit(1, iops(1, 1))
	p.pushAll(1, aRead)
	pushPairs(3)
	l.eventually("three pairs and perhaps a read", func() bool { return l.waiting() >= 3 })
	l.ctl.DeleteSQ(1)
	l.ctl.DeleteCQ(1)
	l.empty()
	l.noError()
}

// TestAbortOfLimited commands, wherever they are in their lane.
func TestAbortOfLimited(t *testing.T) {
	l := newLimited(t, rigConfig{shadow: true}, openBackend(t, "mem:size=1MiB"))
	l.limit(1, iops(1, 1))
	p := l.pair(1, 64, false)
	cids := p.pushAll(7, aRead)
	l.awaitWaiting(6)
	p.reap(1)
	for _, i := range []int{1, 6, 3} {
		if !l.ctl.Abort(1, cids[i]) {
			t.Errorf("command %d was not aborted", i)
		}
		if st := p.statuses(1); st[cids[i]] != nvme.StatusAbortRequested {
			t.Errorf("aborted: %v", st)
		}
	}
	for _, i := range []int{2, 4, 5} { // they are not later for it, but for the place of the one that gave up its own
		l.advance(time.Second)
		if st, ok := p.statuses(1)[cids[i]]; !ok || st != nvme.StatusSuccess {
			t.Errorf("not command %d is next", i)
		}
	}
	if l.ctl.Abort(1, cids[2]) {
		t.Error("what is over was aborted")
	}
	l.empty()
}
