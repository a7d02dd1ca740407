package path

import (
	"cmp"
	"slices"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// feeder gives a Matcher what a world has, in pieces, as rings are read: always behind the time, and no ring at the same pace as another.
type feeder struct {
	t    *rapid.T
	m    *Matcher
	got  []Command
	ring []int
	rest [][]events.Record
	tail []trace.Event
}

func newFeeder(t *rapid.T, w *world, c Config) *feeder {
	f := &feeder{t: t, tail: w.kernel}
	f.m = New(c, func(c *Command) {
		f.got = append(f.got, *c)
	})
	for i, r := range w.workers {
		f.ring, f.rest = append(f.ring, f.m.Worker(events.Info{Thread: threadOf(i)})), append(f.rest, r)
	}
	for _, r := range w.guests {
		f.ring, f.rest = append(f.ring, f.m.Guest()), append(f.rest, r)
	}
	return f
}

// upTo gives all before a time, and more of some.
func (f *feeder) upTo(until int64) {
	more := func(n int) int { return rapid.IntRange(0, min(n, 5)).Draw(f.t, "more") }
	for i, r := range f.rest {
		n := 0
		for n < len(r) && r[n].Time < until {
			n++
		}
		n += more(len(r) - n)
		f.m.Records(f.ring[i], r[:n])
		f.rest[i] = r[n:]
	}
	n := 0
	for n < len(f.tail) && f.tail[n].Time < until {
		n++
	}
	n += more(len(f.tail) - n)
	f.m.Events(f.tail[:n])
	f.tail = f.tail[n:]
}

func (f *feeder) all(w *world) {
	for at := int64(1000); at < 14000; at += int64(rapid.IntRange(1, 4000).Draw(f.t, "step")) {
		f.upTo(at)
		if f.m.Unknown() {
			f.m.Media(w.media)
		}
		f.m.Advance(at)
	}
	f.upTo(events.End)
	f.m.Media(w.media)
	f.m.Close()
}

type wayKey struct {
	key   events.Key
	cid   uint16
	began int64
}

// TestEveryCommandIsMatched: whatever is interleaved, split, merged and tried again, each command is found in the kernel's queues, and its spans
// are what a model says that takes each ns by itself, and so add up to its whole time.
func TestEveryCommandIsMatched(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := makeWorld(t, false)
		f := newFeeder(t, w, Config{})
		f.all(w)
		f.check(w, nil)
		c := f.m.Counts()
		if n := uint64(len(w.truth)); c.Commands != n || c.Unmatched != 0 || c.Matched+c.Own+c.Unseen != n {
			t.Errorf("of %d commands: %+v", n, c)
		}
		if c.Real != uint64(w.reals) || c.Shared != uint64(w.shared) || c.Foreign != uint64(w.foreign) || c.RealUnmatched != 0 {
			t.Errorf("of %d real commands, %d shared and %d foreign: %+v", w.reals, w.shared, w.foreign, c)
		}
		if c.Before+c.Dropped+c.Suspect+c.Full+c.LostRecords+c.LostEvents+c.Late != 0 {
			t.Errorf("%+v", c)
		}
		f.empty()
	})
}

// check compares what came out with what was. With guestless, a command may be without its guest.
func (f *feeder) check(w *world, guestless func(*way) bool) {
	t := f.t
	truth := map[wayKey]*way{}
	for _, x := range w.truth {
		began := x.fetch
		truth[wayKey{x.key, x.cid, began}] = x
	}
	for i := range f.got {
		c := &f.got[i]
		fetched := c.Began + c.Spans[GuestQueue]
		x := truth[wayKey{c.Key, c.CID, fetched}]
		if x == nil {
			t.Fatalf("a command that never was, or came twice: %+v", *c)
		}
		delete(truth, wayKey{c.Key, c.CID, fetched})
		sum := int64(0)
		for _, ns := range c.Spans {
			sum += ns
		}
		if sum != c.Total {
			t.Fatalf("the spans of %+v are %d ns", *c, sum)
		}
		y := *x
		if !c.Guest && x.guest >= 0 {
			if guestless == nil || !guestless(x) {
				t.Fatalf("the guest of %+v is not known: %+v", *x, *c)
			}
			y.guest = -1
		}
		if guestless != nil && c.Match == Unmatched {
			continue
		}
		medium := uint16(0)
		if len(x.steps) > 0 {
			medium = x.media.ID
		}
		if c.Match != x.match || c.Spans != y.spans() || c.Steps != len(x.steps) || c.Medium != medium {
			t.Fatalf("%+v: %v, want %v, spans %v: %+v", *c, c.Match, x.match, y.spans(), *x)
		}
		if x.media.Kind != "vfio" && x.media.Kind != "mem" && c.Real != x.real {
			t.Fatalf("%+v: %d real commands", *c, x.real)
		}
	}
}

// empty looks for what a Matcher has kept.
func (f *feeder) empty() {
	m := f.m
	kept := len(m.open) + len(m.settling) + len(m.real) + len(m.guests.published) + len(m.guests.waiting)
	for _, d := range m.disks {
		if d.first != nil || d.last != nil {
			kept++
		}
		kept += len(d.at)
	}
	if kept != 0 || m.queued != 0 {
		f.t.Fatalf("%d things are left, %d are queued", kept, m.queued)
	}
}

// TestLostRecords: whatever is missing of hostmed's rings and the guests', no command comes out as what it was not; each is accounted for.
func TestLostRecords(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := makeWorld(t, true)
		f := newFeeder(t, w, Config{})
		f.m.Media(w.media)
		lost := uint64(0)
		for i, r := range f.rest {
			at := 0
			for at < len(r) {
				n := rapid.IntRange(1, 20).Draw(t, "read")
				n = min(n, len(r)-at)
				f.m.Records(f.ring[i], r[at:at+n])
				at += n
				if gone := min(rapid.IntRange(0, 6).Draw(t, "lost"), len(r)-at); gone > 2 {
					f.m.Lost(f.ring[i], uint64(gone))
					lost += uint64(gone)
					at += gone
				}
			}
		}
		f.m.Events(w.kernel)
		f.m.Close()
		f.check(w, func(*way) bool { return true })
		c := f.m.Counts()
		if c.LostRecords != lost {
			t.Errorf("%d records were lost: %+v", lost, c)
		}
		if lost == 0 && (c.Commands != uint64(len(w.truth)) || c.Unmatched != 0) {
			t.Errorf("of %d: %+v", len(w.truth), c)
		}
		if c.Commands+c.Suspect+c.Dropped > uint64(len(w.truth)) {
			t.Errorf("of %d commands: %+v", len(w.truth), c)
		}
		f.emptyButReal()
	})
}

// emptyButReal is empty where ends may be missing.
func (f *feeder) emptyButReal() {
	clear(f.m.real)
	clear(f.m.guests.published)
	clear(f.m.guests.waiting)
	f.empty()
}

// TestLostEvents: a command is matched or not, and never with a time that is not the device's.
func TestLostEvents(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := makeWorld(t, true)
		f := newFeeder(t, w, Config{})
		f.m.Media(w.media)
		for i, r := range f.rest {
			f.m.Records(f.ring[i], r)
		}
		lost, both := 0, map[realKey]int{}
		for i := range w.kernel {
			e := &w.kernel[i]
			if rapid.IntRange(0, 5).Draw(t, "lost") == 0 {
				lost++
				both[realKey{e.Device, e.QID, e.CID}]++
				continue
			}
			f.m.Events(w.kernel[i : i+1])
		}
		f.m.LostEvents(uint64(lost))
		f.m.Close()
		f.check(w, func(*way) bool { return false })
		c := f.m.Counts()
		if n := uint64(len(w.truth)); c.Commands != n || c.Matched+c.Own+c.Unseen+c.Unmatched != n || lost == 0 && c.Unmatched > 0 || c.LostEvents != uint64(lost) {
			t.Errorf("%d events lost of %d commands: %+v", lost, n, c)
		}
		f.emptyButReal()
	})
}

// script is a Matcher over one disk with one worker.
type script struct {
	*Matcher
	t    *testing.T
	ring int
	all  []events.Record
	got  []Command
}

func newScript(t *testing.T, c Config, kind string) *script {
	s := &script{t: t}
	s.Matcher = New(c, func(c *Command) { s.got = append(s.got, *c) })
	s.ring = s.Worker(events.Info{Thread: 10})
	s.Media([]events.Medium{{ID: 1, Kind: kind, Disk: "nvme0n1", Shift: 9}})
	return s
}

// virtual puts in a command of one step.
func (s *script) virtual(cid uint16, op, opcode uint8, offset uint64, bytes uint32, fetch, submit, complete, post int64) {
	key := events.NewKey(1, 1)
	s.all = append(s.all,
		events.Record{Time: fetch, Kind: events.Fetch, Key: key, CID: cid, Opcode: opcode},
		events.Record{Time: submit, Kind: events.Submit, Key: key, CID: cid, Opcode: opcode, Op: op, Medium: 1, Offset: offset, Bytes: bytes},
		events.Record{Time: complete, Kind: events.Complete, Key: key, CID: cid, Opcode: opcode},
		events.Record{Time: post, Kind: events.Post, Key: key, CID: cid},
	)
}

// end gives what virtual has put in, in the order of its times.
func (s *script) end() {
	slices.SortStableFunc(s.all, func(a, b events.Record) int { return cmp.Compare(a.Time, b.Time) })
	s.Records(s.ring, s.all)
	s.Close()
}

func (s *script) command(cid uint16, opcode uint8, disk string, offset uint64, bytes uint32, thread uint32, comm string, begin, end int64) {
	e := trace.Event{Kind: trace.Start, Time: begin, QID: 1, CID: cid, Opcode: opcode, Disk: disk, SLBA: offset >> 9, Blocks: bytes >> 9, TID: thread, Comm: comm}
	s.Events([]trace.Event{e})
	e.Kind, e.Time, e.Latency = trace.End, end, end-begin
	s.Events([]trace.Event{e})
}

// TestWhoseIsIt: of steps that are alike the real command is that of its thread's, and then the first's.
func TestWhoseIsIt(t *testing.T) {
	var got []Command
	m := New(Config{}, func(c *Command) { got = append(got, *c) })
	m.Media([]events.Medium{{ID: 1, Kind: "nvme", Disk: "nvme0n1", Shift: 9}})
	rings := []int{m.Worker(events.Info{Thread: 10}), m.Worker(events.Info{Thread: 20})}
	for i, ring := range []int{0, 0, 1, 1} {
		key := events.NewKey(uint16(i+1), 1)
		at := int64(100 + i)
		m.Records(rings[ring], []events.Record{
			{Time: at, Kind: events.Fetch, Key: key, Opcode: nvme.IORead},
			{Time: at, Kind: events.Submit, Key: key, Opcode: nvme.IORead, Op: OpRead, Medium: 1, Offset: 4096, Bytes: 4096},
		})
	}
	for i, x := range []struct {
		thread uint32
		comm   string
	}{{20, "hostmed"}, {7, "iou-wrk-20"}, {7, "kworker/1:1H"}, {10, "hostmed"}} {
		m.Events([]trace.Event{
			{Kind: trace.Start, Time: int64(200 + i), QID: 1, CID: uint16(i), Opcode: nvme.IORead, Disk: "nvme0n1", SLBA: 8, Blocks: 8, TID: x.thread, Comm: x.comm},
			{Kind: trace.End, Time: int64(300 + 10*i), QID: 1, CID: uint16(i), Opcode: nvme.IORead, Disk: "nvme0n1", SLBA: 8, Blocks: 8, TID: x.thread, Comm: x.comm},
		})
	}
	for i, ring := range []int{0, 0, 1, 1} {
		key := events.NewKey(uint16(i+1), 1)
		m.Records(rings[ring], []events.Record{{Time: 500, Kind: events.Complete, Key: key, Opcode: nvme.IORead}, {Time: 600, Kind: events.Post, Key: key}})
	}
	m.Close()
	if len(got) != 4 {
		t.Fatalf("%d commands: %+v", len(got), m.Counts())
	}
	want := map[uint16]int64{3: 300, 4: 310, 1: 320, 2: 330}
	for _, c := range got {
		if ended := 600 - c.Spans[Back]; ended != want[c.Key.Controller()] || c.Match != Matched {
			t.Errorf("controller %d has the real command that ended at %d, want %d: %+v", c.Key.Controller(), ended, want[c.Key.Controller()], c)
		}
	}
}

// TestFlushes: the block layer lets one flush serve all that wait for one; past it each has its own.
func TestFlushes(t *testing.T) {
	for kind, want := range map[string]Counts{
		"block": {Commands: 2, Matched: 2, Real: 1, Shared: 1, Guestless: 2},
		"nvme":  {Commands: 2, Matched: 1, Unmatched: 1, Real: 1, Guestless: 2},
	} {
		s := newScript(t, Config{}, kind)
		for cid := range uint16(2) {
			s.virtual(cid, OpFlush, nvme.IOFlush, 0, 0, 100, 110, 400, 410)
		}
		s.command(1, nvme.IOFlush, "nvme0n1", 0, 0, 9, "kworker", 200, 300)
		s.end()
		if got := s.Counts(); got != want {
			t.Errorf("%s: %+v, want %+v", kind, got, want)
		}
	}
}

// TestOddOnes are commands that hang together otherwise.
func TestOddOnes(t *testing.T) {
	for name, x := range map[string]struct {
		play func(s *script)
		want Counts
	}{
		"by one of several paths": {func(s *script) {
			s.virtual(1, OpRead, nvme.IORead, 0, 512, 100, 110, 400, 410)
			s.command(1, nvme.IORead, "nvme0c1n1", 0, 512, 10, "", 200, 300)
		}, Counts{Commands: 1, Matched: 1, Real: 1, Guestless: 1}},
		"on another disk": {func(s *script) {
			s.virtual(1, OpRead, nvme.IORead, 0, 512, 100, 110, 400, 410)
			s.command(1, nvme.IORead, "nvme1n1", 0, 512, 10, "", 200, 300)
		}, Counts{Commands: 1, Unmatched: 1, Foreign: 1, Guestless: 1}},
		"half of it": {func(s *script) {
			s.virtual(1, OpRead, nvme.IORead, 0, 1024, 100, 110, 400, 410)
			s.command(1, nvme.IORead, "nvme0n1", 0, 512, 10, "", 200, 300)
		}, Counts{Commands: 1, Unmatched: 1, Real: 1, Guestless: 1}},
		"a write for a read": {func(s *script) {
			s.virtual(1, OpRead, nvme.IORead, 0, 512, 100, 110, 400, 410)
			s.command(1, nvme.IOWrite, "nvme0n1", 0, 512, 10, "", 200, 300)
		}, Counts{Commands: 1, Unmatched: 1, RealUnmatched: 1, Guestless: 1}},
		"too late": {func(s *script) {
			s.virtual(1, OpRead, nvme.IORead, 0, 512, 100, 110, 400, 410)
			s.command(1, nvme.IORead, "nvme0n1", 0, 512, 10, "", 405, 406)
		}, Counts{Commands: 1, Unmatched: 1, RealUnmatched: 1, Guestless: 1}},
		"zeroes by writes": {func(s *script) {
			s.virtual(1, OpWriteZeroes, nvme.IOWriteZeroes, 0, 1024, 100, 110, 400, 410)
			s.command(1, nvme.IOWrite, "nvme0n1", 0, 512, 10, "", 200, 300)
			s.command(2, nvme.IOWriteZeroes, "nvme0n1", 512, 512, 10, "", 200, 300)
		}, Counts{Commands: 1, Matched: 1, Real: 2, Guestless: 1}},
		"a command as it is": {func(s *script) {
			s.virtual(1, OpCommand, nvme.IOCompare, 0, 1024, 100, 110, 400, 410)
			s.command(1, nvme.IOCompare, "nvme0n1", 0, 1024, 10, "", 200, 300)
			s.virtual(2, OpCommand, nvme.IODSM, 0, 1024, 100, 110, 400, 410)
			s.command(2, nvme.IODSM, "nvme0n1", 0, 0, 10, "", 200, 300)
		}, Counts{Commands: 2, Matched: 2, Real: 2, Guestless: 2}},
		"ends after its Complete": { // by a ns
			func(s *script) {
				s.virtual(1, OpRead, nvme.IORead, 0, 512, 100, 110, 400, 400)
				s.command(1, nvme.IORead, "nvme0n1", 0, 512, 10, "", 200, 401)
			}, Counts{Commands: 1, Matched: 1, Real: 1, Guestless: 1}},
		"without its Post": {func(s *script) {
			for range 2 {
				s.Records(s.ring, []events.Record{{Time: 100, Kind: events.Fetch, Key: events.NewKey(1, 1), CID: 7}})
			}
		}, Counts{Dropped: 2}},
		"without its Fetch": {func(s *script) {
			s.Records(s.ring, []events.Record{{Time: 100, Kind: events.Complete, Key: 7}, {Time: 100, Kind: events.Post, Key: 7}})
		}, Counts{Before: 2}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScript(t, Config{}, "nvme")
			x.play(s)
			s.end()
			if got := s.Counts(); got != x.want {
				t.Errorf("%+v, want %+v", got, x.want)
			}
			for _, c := range s.got {
				if sum := c.Spans[Hostmed] + c.Spans[RealQueue] + c.Spans[Device] + c.Spans[Back]; sum != c.Total {
					t.Errorf("%+v", c)
				}
			}
		})
	}
}

// TestBounds: nothing is kept for ever, and not more than was said.
func TestBounds(t *testing.T) {
	const second = int64(1e9)
	s := newScript(t, Config{MaxAge: 4e9, MaxOpen: 8, MaxQueued: 64}, "nvme")
	guest := s.Guest()
	for i := range int64(200) {
		at := i * second
		s.Records(guest, []events.Record{{Time: at, Kind: events.Publish, Key: events.NewKey(3, uint16(i)), CID: 1}})
		for cid := range uint16(20) { // never posted
			s.Records(s.ring, []events.Record{{Time: at, Kind: events.Fetch, Key: events.NewKey(2, uint16(i)), CID: cid}})
		}
		s.Events([]trace.Event{{Kind: trace.Start, Time: at, QID: uint16(i + 1), Opcode: nvme.IORead, Disk: "nvme0n1", Blocks: 1}})
		s.Advance(at + 1)
		if s.UnderWay() != len(s.open) || len(s.open) > 8 || len(s.real) > 8 || s.queued > 64+40 || len(s.guests.published) > 8 {
			t.Fatalf("%d, %d, %d, %d", len(s.open), len(s.real), s.queued, len(s.guests.published))
		}
	}
	c := s.Counts()
	if c.Dropped == 0 || c.Full == 0 || c.Dropped+c.Full+uint64(len(s.open)) < 200*20 {
		t.Errorf("%+v", c)
	}
	// What no Advance takes is taken anyway.
	for i := range int64(1000) {
		s.all = nil
		s.virtual(uint16(i), OpRead, nvme.IORead, 0, 512, 300*second+i, 300*second+i, 300*second+i, 300*second+i)
		s.Records(s.ring, s.all)
		if s.queued > 64+4 {
			t.Fatalf("%d are queued", s.queued)
		}
	}
}

// TestGuestsAreToldApart: two guests use the same queues, CIDs and blocks at the same time; which is which, those commands say that only one has.
func TestGuestsAreToldApart(t *testing.T) {
	var got []Command
	m := New(Config{}, func(c *Command) { got = append(got, *c) })
	worker := m.Worker(events.Info{Thread: 1})
	guests := []int{m.Guest(), m.Guest()}
	for i := range int64(2000) {
		at := 1000 * i
		for g, ring := range guests {
			slba := uint64(i)
			if i < 20 {
				slba += uint64(g) * 1000
			}
			theirs, mine := events.NewKey(1, 1), events.NewKey(uint16(7-g), 1)
			m.Records(ring, []events.Record{
				{Time: at + 10*int64(g), Kind: events.Publish, Key: theirs, CID: uint16(i), Opcode: nvme.IORead, SLBA: slba},
				{Time: at + 200, Kind: events.Reap, Key: theirs, CID: uint16(i), Opcode: nvme.IORead},
			})
			m.Records(worker, []events.Record{
				{Time: at + 100, Kind: events.Fetch, Key: mine, CID: uint16(i), Opcode: nvme.IORead, SLBA: slba},
				{Time: at + 100, Kind: events.Post, Key: mine, CID: uint16(i)},
			})
		}
	}
	m.Close()
	if len(got) != 4000 {
		t.Fatalf("%d commands", len(got))
	}
	for _, c := range got {
		if want := int64(100 - 10*(7-int(c.Key.Controller()))); !c.Guest || c.Spans[GuestQueue] != want {
			t.Fatalf("%+v: %d ns in its guest's queue, want %d", c, c.Spans[GuestQueue], want)
		}
	}
}

func TestSummary(t *testing.T) {
	var s Summary
	for i := range int64(100) {
		c := Command{Medium: 2, Match: Matched, Guest: true, Total: 60 * i}
		for j := range c.Spans {
			c.Spans[j] = 10 * i
		}
		s.Add(&c)
	}
	s.Add(&Command{Medium: 2, Match: Unmatched, Guest: true, Total: 1e9})
	s.Add(&Command{Match: Own})
	s.Add(&Command{Medium: 1, Match: Unseen, Total: 7})
	g := s.Groups()
	if len(g) != 3 || g[0].Medium != 1 || g[1].Medium != 2 || !g[1].Guest || !g[2].Own {
		t.Fatalf("%+v", g)
	}
	if g[1].Total.Count() != 100 || g[1].Unmatched.Count() != 1 || g[1].Total.Mean() != 2970 {
		t.Errorf("%d, %d, %v", g[1].Total.Count(), g[1].Unmatched.Count(), g[1].Total.Mean())
	}
	share := 0.0
	for x := range Spans {
		share += g[1].Share(x)
	}
	if share < 0.999 || share > 1.001 {
		t.Errorf("the shares add up to %v", share)
	}
	var sum Summary
	sum.Merge(&s)
	sum.Merge(&s)
	if n := sum.Groups()[1].Total.Count(); n != 200 {
		t.Errorf("%d", n)
	}
}
