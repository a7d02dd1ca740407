package ioq

import (
	"bytes"
	"slices"
	"sync"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// speaker is a medium in memory that does commands itself, and says what it was asked.
type speaker struct {
	backend.Backend
	info   backend.Info
	status nvme.Status
	dw0    uint32
	fill   byte // of vendor specific data to the guest
	spoil  bool // changes the lists that it gets, as a slice does

	mu   sync.Mutex
	seen []asked
}

// asked is an OpCommand as the medium has seen it.
type asked struct {
	cmd      nvme.Command
	off, len uint64
	fua      bool
	data     []byte
}

func newSpeaker(t *testing.T, spec string, ops ...uint8) *speaker {
	t.Helper()
	b := openBackend(t, spec)
	s := &speaker{Backend: b, info: b.Info()}
	s.info.Native = s.info.Native.With(ops...)
	return s
}

func (s *speaker) Info() backend.Info { return s.info }

func (s *speaker) NewQueue() (backend.Queue, error) {
	q, err := s.Backend.NewQueue()
	return &speakerQueue{q, s}, err
}

// say makes st the answer to what comes.
func (s *speaker) say(st nvme.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status = st
}

// take returns what was asked since the last take.
func (s *speaker) take() []asked {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := s.seen
	s.seen = nil
	return seen
}

type speakerQueue struct {
	backend.Queue
	s *speaker
}

func (q *speakerQueue) Submit(reqs, done []*backend.Request) int {
	n := 0
	for i, r := range reqs {
		if r.Op == backend.OpCommand {
			q.s.command(r)
			done[n] = r
			n++
		} else {
			n += q.Queue.Submit(reqs[i:i+1], done[n:])
		}
	}
	return n
}

func (s *speaker) command(r *backend.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := asked{cmd: *r.Cmd, off: r.Off, len: r.Len, fua: r.FUA}
	for _, v := range r.Vec {
		b := bytesOf(v)
		if r.Cmd.Opcode >= firstVendor && r.Cmd.Opcode&3 == 2 {
			for i := range b {
				b[i] = s.fill
			}
		}
		a.data = append(a.data, b...)
		if s.spoil {
			clear(b)
		}
	}
	s.seen = append(s.seen, a)
	r.Status, r.DW0 = s.status, s.dw0
}

// TestNative checks what a medium gets to see of each command that it does itself, and what the guest of its answer.
func TestNative(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		s := newSpeaker(t, "mem:size=16MiB", nvme.IOCompare, nvme.IOVerify, nvme.IOWriteUncorrectable, nvme.IODSM, nvme.IOCopy, 0x80, 0x81, 0xfe, 0x83,
			nvme.IORead, nvme.IOFlush, nvme.IOReservationReport, 0x7d)
		c.backend = s
		s.dw0, s.fill = 0x12345678, 9
		r := newRig(t, c)
		p := r.pair(1, 16, false)
		data := randomData(8192)
		r.put(dataOff, data)
		cmp := rw(nvme.IOCompare, 100, 16, base+dataOff)
		cmp.PRP2 = base + dataOff + 4096
		cmp.CDW14 = 77
		vendor := func(op uint8, dwords uint32) nvme.Command {
			return nvme.Command{Opcode: op, NSID: 1, PRP1: base + dataOff, CDW10: dwords, CDW13: 5}
		}
		dsm := func() nvme.Command {
			c := r.dsm(nvme.DSMRange{SLBA: 8, Length: 8, Attributes: 3}, nvme.DSMRange{SLBA: 1 << 60}, nvme.DSMRange{SLBA: 50, Length: 1})
			c.CDW11 |= 1 // integral dataset for read
			return c
		}
		for name, x := range map[string]struct {
			make func() nvme.Command
			want asked
		}{
			"compare":             {func() nvme.Command { return cmp }, asked{off: 51200, len: 8192, data: data}},
			"verify":              {func() nvme.Command { return rw(nvme.IOVerify, 7, 3, 0) }, asked{off: 7 * 512, len: 3 * 512}},
			"write uncorrectable": {func() nvme.Command { return rw(nvme.IOWriteUncorrectable, 9, 1, 0) }, asked{off: 9 * 512, len: 512}},
			"dsm": {dsm, asked{off: 8 * 512, data: slices.Concat((&nvme.DSMRange{SLBA: 8, Length: 8, Attributes: 3}).Bytes()[:],
				(&nvme.DSMRange{}).Bytes()[:], (&nvme.DSMRange{SLBA: 50, Length: 1}).Bytes()[:])}},
			"copy": {func() nvme.Command { return r.copyCmd(2000, source(3, 5), source(900, 2)) },
				asked{off: 2000 * 512, len: 7 * 512, data: slices.Concat(ptr(source(3, 5)).Bytes()[:], ptr(source(900, 2)).Bytes()[:])}},
			"vendor, no data":     {func() nvme.Command { return vendor(0x80, 12) }, asked{}},
			"vendor, to medium":   {func() nvme.Command { r.put(dataOff, data); return vendor(0x81, 25) }, asked{len: 100, data: data[:100]}},
			"vendor, from medium": {func() nvme.Command { return vendor(0xfe, 1024) }, asked{len: 4096, data: bytes.Repeat([]byte{9}, 4096)}},
		} {
			for _, st := range []nvme.Status{nvme.StatusSuccess, nvme.StatusWriteFault, 0x3c1} {
				s.say(st)
				r.put(dataOff, data)
				c := x.make()
				e := p.run(c)
				seen := s.take()
				if e.Status().Code() != st || e.Status().DNR() || e.Result() != s.dw0 {
					t.Errorf("%s: %v, DW0 %#x; the medium said %v, %#x", name, e.Status(), e.Result(), st, s.dw0)
				}
				if len(seen) != 1 {
					t.Fatalf("%s: asked for %d times", name, len(seen))
				}
				c.CID = seen[0].cmd.CID
				if got := seen[0]; got.cmd != c || got.off != x.want.off || got.len != x.want.len || got.fua || !bytes.Equal(got.data, x.want.data) {
					t.Errorf("%s: %+v, want %+v", name, got, x.want)
				}
			}
		}
		if n := r.ctl.Stats(); n.Native != 8 || n.Emulated != 0 {
			t.Errorf("%d commands by the medium, %d by hostmed; want 8 that succeeded, and none", n.Native, n.Emulated)
		}
		s.say(nvme.StatusSuccess)
		p.do(vendor(0xfe, 1024))
		if !bytes.Equal(r.get(dataOff, 4096), bytes.Repeat([]byte{9}, 4096)) {
			t.Error("the guest has not got the medium's data")
		}
		s.take()
		// None of these gets there, or has an operation of its own.
		for name, x := range map[string]struct {
			c    nvme.Command
			want nvme.Status
		}{
			"read":                 {rw(nvme.IORead, 0, 1, base+dataOff), nvme.StatusSuccess},
			"flush":                {nvme.Command{NSID: 1}, nvme.StatusSuccess},
			"zeroes":               {rw(nvme.IOWriteZeroes, 0, 1, 0), nvme.StatusSuccess},
			"report":               {nvme.Command{Opcode: nvme.IOReservationReport, NSID: 1, PRP1: base + dataOff}, nvme.StatusInvalidOpcode},
			"no rule":              {nvme.Command{Opcode: 0x7d, NSID: 1}, nvme.StatusInvalidOpcode},
			"vendor, not native":   {vendor(0x84, 0), nvme.StatusInvalidOpcode},
			"vendor, both ways":    {vendor(0x83, 1), nvme.StatusInvalidOpcode},
			"vendor, over MDTS":    {vendor(0x81, 1<<18+1), nvme.StatusInvalidField},
			"vendor, 16 GiB":       {vendor(0x81, 1<<32-1), nvme.StatusInvalidField},
			"vendor, metadata":     {func() nvme.Command { c := vendor(0x81, 1); c.CDW11 = 1; return c }(), nvme.StatusInvalidField},
			"vendor, unmapped":     {func() nvme.Command { c := vendor(0x81, 1); c.PRP1 = 0x1000; return c }(), nvme.StatusDataTransferError},
			"compare past the end": {rw(nvme.IOCompare, 32768-1, 2, base+dataOff), nvme.StatusLBAOutOfRange},
			"compare, unmapped":    {rw(nvme.IOCompare, 0, 1, 0x1000), nvme.StatusDataTransferError},
			"verify past the end":  {rw(nvme.IOVerify, ^uint64(0), 2, 0), nvme.StatusLBAOutOfRange},
			"mark past the end":    {rw(nvme.IOWriteUncorrectable, 32768, 1, 0), nvme.StatusLBAOutOfRange},
			"dsm past the end":     {r.dsm(nvme.DSMRange{SLBA: 1, Length: 1}, nvme.DSMRange{SLBA: 32760, Length: 9}), nvme.StatusLBAOutOfRange},
		} {
			e := p.run(x.c)
			if e.Status().Code() != x.want || e.Result() != 0 {
				t.Errorf("%s: %v, DW0 %#x, want %v", name, e.Status(), e.Result(), x.want)
			}
			if seen := s.take(); len(seen) > 0 {
				t.Errorf("%s: the medium was asked for %+v", name, seen)
			}
		}
		for name, x := range map[string]func() nvme.Command{
			"from": func() nvme.Command { return r.copyCmd(0, source(1, 1), source(32767, 2)) },
			"to":   func() nvme.Command { return r.copyCmd(32767, source(1, 2)) },
		} {
			if st := p.do(x()); st.Code() != nvme.StatusLBAOutOfRange || len(s.take()) > 0 {
				t.Errorf("copy %s past the end: %v", name, st)
			}
		}
		r.noError()
	})
}

func ptr[T any](v T) *T { return &v }

// TestNativeMax has the medium asked for what it takes, and hostmed do the rest.
func TestNativeMax(t *testing.T) {
	s := newSpeaker(t, "mem:size=16MiB", nvme.IOCompare, nvme.IOVerify, nvme.IOWriteUncorrectable, nvme.IODSM, nvme.IOCopy)
	s.info.NativeMax = backend.CommandLimits{Compare: 1024, Verify: 1024, WriteUncorrectable: 1024, DSMRanges: 2, DSMRange: 8, DSM: 12, CopyRanges: 2, CopyRange: 8, Copy: 12}
	r := newRig(t, rigConfig{shadow: true, backend: s})
	p := r.pair(1, 16, false)
	p.load(0, randomData(64<<10))
	r.put(dataOff, randomData(64 << 10)[:8192])
	at := base + uint64(dataOff)
	for name, x := range map[string]struct{ in, over func() nvme.Command }{
		"compare":             {func() nvme.Command { return rw(nvme.IOCompare, 0, 2, at) }, func() nvme.Command { return rw(nvme.IOCompare, 0, 3, at) }},
		"verify":              {func() nvme.Command { return rw(nvme.IOVerify, 0, 2, at) }, func() nvme.Command { return rw(nvme.IOVerify, 0, 3, at) }},
		"write uncorrectable": {func() nvme.Command { return rw(nvme.IOWriteUncorrectable, 900, 2, 0) }, func() nvme.Command { return rw(nvme.IOWriteUncorrectable, 900, 3, 0) }},
		"dsm ranges": {func() nvme.Command {
			return r.dsm(nvme.DSMRange{SLBA: 200, Length: 1}, nvme.DSMRange{SLBA: 200, Length: 1})
		}, func() nvme.Command {
			return r.dsm(nvme.DSMRange{SLBA: 200, Length: 1}, nvme.DSMRange{SLBA: 200, Length: 1}, nvme.DSMRange{SLBA: 300, Length: 1})
		}},
		"dsm range": {func() nvme.Command { return r.dsm(nvme.DSMRange{SLBA: 200, Length: 8}) }, func() nvme.Command { return r.dsm(nvme.DSMRange{SLBA: 200, Length: 9}) }},
		"dsm": {func() nvme.Command {
			return r.dsm(nvme.DSMRange{SLBA: 200, Length: 8}, nvme.DSMRange{SLBA: 300, Length: 4})
		}, func() nvme.Command {
			return r.dsm(nvme.DSMRange{SLBA: 200, Length: 8}, nvme.DSMRange{SLBA: 300, Length: 5})
		}},
		"copy ranges": {func() nvme.Command { return r.copyCmd(500, source(0, 1), source(0, 1)) }, func() nvme.Command { return r.copyCmd(500, source(0, 1), source(0, 1), source(1, 1)) }},
		"copy range":  {func() nvme.Command { return r.copyCmd(500, source(0, 8)) }, func() nvme.Command { return r.copyCmd(500, source(0, 9)) }},
		"copy":        {func() nvme.Command { return r.copyCmd(500, source(0, 8), source(0, 4)) }, func() nvme.Command { return r.copyCmd(500, source(0, 8), source(0, 5)) }},
	} {
		if st := p.do(x.in()); st != nvme.StatusSuccess || len(s.take()) != 1 {
			t.Errorf("%s: %v, or the medium was not asked", name, st)
		}
		if st := p.do(x.over()); st != nvme.StatusSuccess || len(s.take()) != 0 {
			t.Errorf("more than its limit of %s: %v, or the medium was asked", name, st)
		}
	}
	if !bytes.Equal(p.stored(500, 512), randomData(64 << 10)[:512]) {
		t.Error("what was too large for the medium to copy was not copied")
	}
	r.noError()
}

// TestNativeRules holds commands that the medium does itself to what holds for a namespace.
func TestNativeRules(t *testing.T) {
	all := []uint8{nvme.IOCompare, nvme.IOVerify, nvme.IOWriteUncorrectable, nvme.IODSM, nvme.IOCopy, 0x80}
	commands := func(r *rig, op uint8) nvme.Command {
		switch op {
		case nvme.IODSM:
			return r.dsm(nvme.DSMRange{SLBA: 10, Length: 1}, nvme.DSMRange{SLBA: 12, Length: 1})
		case nvme.IOCopy:
			return r.copyCmd(10, source(1000, 3))
		case 0x80:
			return nvme.Command{Opcode: op, NSID: 1}
		}
		return rw(op, 10, 3, base+dataOff)
	}
	t.Run("read-only", func(t *testing.T) {
		s := newSpeaker(t, "mem:size=1MiB", all...)
		s.info.ReadOnly = true
		r := newRig(t, rigConfig{shadow: true, backend: s})
		p := r.pair(1, 16, false)
		for _, op := range all {
			st, want := p.do(commands(r, op)), nvme.Status(nvme.StatusNamespaceWriteProtected)
			if op == nvme.IOCompare || op == nvme.IOVerify {
				want = nvme.StatusSuccess
			}
			if st.Code() != want || (len(s.take()) > 0) != (want == nvme.StatusSuccess) {
				t.Errorf("opcode %#x: %v, want %v", op, st, want)
			}
		}
	})
	t.Run("protected", func(t *testing.T) {
		s := newSpeaker(t, "mem:size=1MiB", all...)
		r := newRig(t, rigConfig{shadow: true, backend: s})
		p := r.pair(1, 16, false)
		of := r.ctl.namespace(1).of
		of.EditGate(func(g *subsys.Gate) { g.Protected = true })
		for _, op := range all {
			st, want := p.do(commands(r, op)), nvme.Status(nvme.StatusNamespaceWriteProtected)
			if op == nvme.IOCompare || op == nvme.IOVerify {
				want = nvme.StatusSuccess
			}
			if st.Code() != want || (len(s.take()) > 0) != (want == nvme.StatusSuccess) {
				t.Errorf("opcode %#x: %v, want %v", op, st, want)
			}
		}
	})
	t.Run("marked", func(t *testing.T) { // by hostmed, before the medium could
		s := newSpeaker(t, "mem:size=1MiB", all...)
		s.spoil = true
		r := newRig(t, rigConfig{shadow: true, backend: s})
		p := r.pair(1, 16, false)
		of := r.ctl.namespace(1).of
		of.Mark(10, 3)
		for _, op := range []uint8{nvme.IOCompare, nvme.IOVerify} {
			if st := p.do(commands(r, op)); st.Code() != nvme.StatusUnrecoveredRead || len(s.take()) > 0 {
				t.Errorf("opcode %#x: %v", op, st)
			}
		}
		if e := p.run(r.copyCmd(500, source(0, 1), source(11, 2))); e.Status().Code() != nvme.StatusUnrecoveredRead || e.Result() != 1 || len(s.take()) > 0 {
			t.Errorf("copy: %v, DW0 %d", e.Status(), e.Result())
		}
		if st := p.do(commands(r, nvme.IODSM)); st != nvme.StatusSuccess || of.Gate() == nil || of.Gate().Marked(10, 1) || !of.Gate().Marked(11, 1) || of.Gate().Marked(12, 1) {
			t.Errorf("dsm: %v, %+v", st, of.Gate())
		}
		s.say(nvme.StatusWriteFault)
		if st := p.do(commands(r, nvme.IOCopy)); st.Code() != nvme.StatusWriteFault || of.Gate() == nil || !of.Gate().Marked(11, 1) {
			t.Errorf("a copy that failed: %v, %+v", st, of.Gate())
		}
		s.say(nvme.StatusSuccess)
		if st := p.do(commands(r, nvme.IOCopy)); st != nvme.StatusSuccess || of.Gate() != nil && of.Gate().Marked(10, 3) {
			t.Errorf("copy: %v, %+v", st, of.Gate())
		}
	})
	t.Run("no write cache", func(t *testing.T) {
		s := newSpeaker(t, "mem:size=1MiB", all...)
		r := newRig(t, rigConfig{shadow: true, backend: s})
		p := r.pair(1, 16, false)
		r.ctl.SetWriteCache(false)
		for _, op := range all {
			if st := p.do(commands(r, op)); st != nvme.StatusSuccess {
				t.Fatal(st)
			}
			if a := s.take(); a[0].fua != (op == nvme.IOCopy) {
				t.Errorf("opcode %#x: FUA %v", op, a[0].fua)
			}
		}
	})
}

// TestCommandBesideRequest has a medium see the guest's command beside each operation.
func TestCommandBesideRequest(t *testing.T) {
	s := &slow{info: openBackend(t, "null:size=1GiB").Info()}
	r := newRig(t, rigConfig{shadow: true, backend: s})
	p := r.pair(1, 16, false)
	s.status = nvme.StatusWriteFault // so that one request is all that there is
	for _, op := range []uint8{nvme.IORead, nvme.IOWrite, nvme.IOFlush, nvme.IOWriteZeroes, nvme.IOCompare} {
		c := rw(op, 5, 1, base+dataOff)
		c.CDW13 = uint32(op) + 1000
		c.CID = p.push(c)
		p.publish()
		var got *nvme.Command
		r.eventually("the request comes", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, q := range s.queues {
				q.mu.Lock()
				if len(q.held) == 1 {
					got = q.held[0].Cmd
				}
				q.mu.Unlock()
			}
			return got != nil
		})
		if *got != c {
			t.Errorf("opcode %#x: %+v, want %+v", op, *got, c)
		}
		s.finish(1)
		p.reap(1)
	}
}

// slowPins is a medium that takes its time for memory.
type slowPins struct {
	backend.Backend
	await func()
}

func (p *slowPins) AwaitMemory() { p.await() }

// TestMediaAwaitMemoryTogether: a client that hands out memory waits for the slowest of its media, and not for one after the other: QEMU gives up after 5 s.
func TestMediaAwaitMemoryTogether(t *testing.T) {
	var all sync.WaitGroup
	all.Add(3)
	var table []*namespace
	for range 3 {
		table = append(table, &namespace{backend: &slowPins{await: func() { all.Done(); all.Wait() }}}, nil)
	}
	c := &Controller{}
	c.ns.Store(&table)
	c.awaitMemory()
}
