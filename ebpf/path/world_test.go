package path

import (
	"cmp"
	"slices"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// world is a made-up machine whose every command's way is known.
type world struct {
	media   []events.Medium
	workers [][]events.Record // by worker
	guests  [][]events.Record // by guest's ring
	kernel  []trace.Event
	truth   []*way
	reals   int // of the kernel's queues, that serve commands
	shared  int
	foreign int
}

// way is one virtual command as it was.
type way struct {
	worker, guest  int // guest -1: not known
	key            events.Key
	cid            uint16
	opcode         uint8
	publish, fetch int64
	post, reap     int64
	steps          []wayStep
	media          events.Medium // of the steps
	match          Match
	real           int
}

type wayStep struct {
	submit, complete int64
	real             []interval
}

const (
	mediumSlice = iota // nvme:, with a base, blocks of 4096 bytes
	mediumPart         // block:, a partition
	mediumMemory
	mediumVFIO
)

var worldMedia = []events.Medium{
	{ID: 1, Name: "nvme:/dev/ng0n1", Kind: "nvme", Disk: "nvme0n1", NSID: 1, Base: 1 << 30, Shift: 12},
	{ID: 2, Name: "block:/dev/nvme1n1p2", Kind: "block", Disk: "nvme1n1", Base: 1 << 20, Shift: 9},
	{ID: 3, Name: "mem:size=1GiB", Kind: "mem", Shift: 9},
	{ID: 4, Name: "vfio:0000:01:00.0", Kind: "vfio", NSID: 1, Base: 0, Shift: 9},
}

// threadOf is a worker's.
func threadOf(worker int) uint32 { return 1000 + uint32(worker) }

type maker struct {
	*world
	t    *rapid.T
	slot uint64 // each step has a place on the disks for itself
	loss bool   // nothing that a loss would make ambiguous
}

const slotBytes = 1 << 17

func (m *maker) n(low, high int, what string) int { return rapid.IntRange(low, high).Draw(m.t, what) }
func (m *maker) after(at int64) int64             { return at + int64(m.n(1, 400, "ns")) }

// makeWorld draws lanes, each a CID of a queue that has one command after the other, all lanes side by side.
func makeWorld(t *rapid.T, loss bool) *world {
	m := &maker{t: t, world: &world{media: worldMedia}, loss: loss}
	workers := m.n(1, 3, "workers")
	m.workers = make([][]events.Record, workers)
	rings := m.n(0, 2, "guests")
	m.guests = make([][]events.Record, rings)
	for lane := range m.n(1, 12, "lanes") {
		worker := m.n(0, workers-1, "worker")
		guest := m.n(-1, rings-1, "guest")
		// hostmed's number of a controller is not the guest's, which is always 1. All guests use the same queue and CIDs.
		controller := uint16(10 + guest)
		if guest < 0 {
			controller = 90 + uint16(worker)
		}
		cid := uint16(lane)
		// A queue is one worker's.
		key := events.NewKey(controller, uint16(1+worker))
		at := int64(1000 + m.n(0, 3000, "begin"))
		for range m.n(1, 5, "commands") {
			w := m.command(worker, guest, key, cid, uint16(lane), at)
			at = m.after(w.post)
			if guest >= 0 {
				at = m.after(w.reap)
			}
		}
	}
	for range m.n(0, 10, "foreign") {
		m.foreignReal()
	}
	if !loss {
		for range m.n(0, 3, "pairs") {
			m.pair()
		}
	}
	m.sort()
	return m.world
}

func (m *maker) sort() {
	byTime := func(a, b events.Record) int { return cmp.Compare(a.Time, b.Time) }
	for _, r := range slices.Concat(m.workers, m.guests) {
		slices.SortStableFunc(r, byTime)
	}
	slices.SortStableFunc(m.kernel, func(a, b trace.Event) int { return cmp.Compare(a.Time, b.Time) })
}

func (m *maker) put(w *way, kind events.Kind, at int64, r events.Record) {
	r.Time, r.Kind, r.Key, r.CID, r.Opcode = at, kind, w.key, w.cid, w.opcode
	if kind == events.Post {
		r.Opcode = 0
	}
	if kind == events.Publish || kind == events.Reap {
		r.Key = events.NewKey(1, w.key.QID())
		m.guests[w.guest] = append(m.guests[w.guest], r)
		return
	}
	m.workers[w.worker] = append(m.workers[w.worker], r)
}

// command draws one and puts its records and events in. tag tells real commands apart.
func (m *maker) command(worker, guest int, key events.Key, cid, tag uint16, at int64) *way {
	w := &way{worker: worker, guest: guest, key: key, cid: cid, match: Own}
	medium := m.n(0, 3, "medium")
	w.media = m.media[medium]
	write := rapid.Bool().Draw(m.t, "write")
	w.opcode = nvme.IORead
	if write {
		w.opcode = nvme.IOWrite
	}
	m.slot++
	fetched := events.Record{NSID: 1, SLBA: m.slot * 8, Blocks: 8}
	w.fetch = at
	if guest >= 0 {
		w.publish, w.fetch = at, m.after(at)
		m.put(w, events.Publish, w.publish, fetched)
	}
	m.put(w, events.Fetch, w.fetch, fetched)
	at = w.fetch
	for range m.n(0, 3, "steps") {
		at = m.step(w, medium, tag, m.after(at))
	}
	if n := len(w.steps); n > 0 {
		m.put(w, events.Complete, w.steps[n-1].complete, events.Record{})
		w.match = [...]Match{Matched, Matched, Unseen, Matched}[medium]
	}
	w.post = m.after(at)
	m.put(w, events.Post, w.post, events.Record{CQID: key.QID()})
	if guest >= 0 {
		w.reap = m.after(w.post)
		m.put(w, events.Reap, w.reap, events.Record{})
	}
	m.truth = append(m.truth, w)
	return w
}

// step draws what the medium is asked for, and returns when it is done. A step before the last has no Complete: the next Submit is its end.
func (m *maker) step(w *way, medium int, tag uint16, at int64) int64 {
	x := m.media[medium]
	m.slot++
	blocks := uint64(m.n(1, 16, "blocks"))
	offset, bytes := x.Base+m.slot*slotBytes, blocks<<12
	op, real := uint8(OpRead), w.opcode
	if w.opcode == nvme.IOWrite {
		op = OpWrite
	}
	kinds := m.n(0, 9, "kind")
	switch {
	case kinds == 0:
		op, real = OpWriteZeroes, nvme.IOWriteZeroes
	case kinds == 1 && !m.loss && tag == 0: // one at a time: several cannot be told apart
		op, real = OpDiscard, nvme.IODSM
	}
	s := wayStep{submit: at}
	r := events.Record{Op: op, Medium: x.ID, Offset: offset, Bytes: uint32(bytes)}
	if medium == mediumVFIO {
		r.RealQID, r.RealCID, r.Bytes = 3, tag, 0
	}
	m.put(w, events.Submit, at, r)
	if medium == mediumMemory || medium == mediumVFIO {
		if medium == mediumVFIO {
			w.real++
		}
		s.complete = m.after(at)
		w.steps = append(w.steps, s)
		return s.complete
	}
	parts := m.n(1, 4, "parts")
	if real == nvme.IODSM {
		parts = 1
	}
	end := at
	order := rapid.Permutation([]int{0, 1, 2, 3}).Draw(m.t, "order")
	for i, p := range order {
		first, last := blocks*uint64(p)/4, blocks*uint64(p+1)/4
		if parts == 1 {
			if first, last = 0, blocks; i > 0 {
				break
			}
		}
		if first == last {
			continue
		}
		begin := m.after(at)
		e := trace.Event{
			Device: uint16(medium), QID: 1, CID: tag<<4 | uint16(len(w.steps))<<2 | uint16(i), Opcode: real, NSID: 1, TID: threadOf(w.worker), Disk: x.Disk,
			SLBA: (offset + first<<12) >> x.Shift, Blocks: uint32((last - first) << 12 >> x.Shift), Comm: "worker",
		}
		switch {
		case real == nvme.IODSM:
			e.SLBA, e.Blocks = 0, 0
		case m.n(0, 3, "thread") == 0:
			e.TID, e.Comm = 7, "kworker/0:1H"
		}
		tries := 1
		if !m.loss && real != nvme.IODSM && m.n(0, 7, "again") == 0 {
			tries = 2
		}
		m.reals += tries
		w.real += tries
		for range tries {
			done := m.after(begin)
			m.real(e, begin, done)
			s.real = append(s.real, interval{begin, done})
			end, begin = max(end, done), m.after(done)
		}
	}
	s.complete = m.after(end)
	w.steps = append(w.steps, s)
	return s.complete
}

// real puts in both events of a real command.
func (m *maker) real(e trace.Event, begin, done int64) {
	e.Kind, e.Time = trace.Start, begin
	m.kernel = append(m.kernel, e)
	e.Kind, e.Time, e.Latency = trace.End, done, done-begin
	m.kernel = append(m.kernel, e)
}

func (m *maker) foreignReal() {
	m.foreign++
	begin := int64(m.n(1000, 9000, "begin"))
	e := trace.Event{
		Device: uint16(m.n(0, 3, "device")), QID: 2, CID: uint16(m.foreign), Opcode: nvme.IORead, NSID: 1, TID: 5, Disk: []string{"nvme0n1", "nvme1n1", "nvme7n1"}[m.n(0, 2, "disk")],
		SLBA: uint64(m.n(0, 1000, "slba")), Blocks: 1, Comm: "dd",
	}
	m.real(e, begin, m.after(begin))
}

// pair draws two writes beside each other on the partition that the block layer makes one of.
func (m *maker) pair() {
	x := m.media[mediumPart]
	m.slot++
	offset, begin := x.Base+m.slot*slotBytes, int64(m.n(1000, 9000, "begin"))
	begin += 400 * 3
	end := m.after(begin)
	m.shared++
	m.reals++
	for i := range 2 {
		w := &way{worker: m.n(0, len(m.workers)-1, "worker"), guest: -1, cid: uint16(i), opcode: nvme.IOWrite, media: x, match: Matched, real: 1}
		w.key = events.NewKey(200+uint16(m.shared), uint16(1+w.worker))
		s := wayStep{submit: begin - int64(m.n(1, 400, "ns")), complete: m.after(end), real: []interval{{begin, end}}}
		w.fetch, w.post, w.steps = s.submit-1, m.after(s.complete), []wayStep{s}
		m.put(w, events.Fetch, w.fetch, events.Record{NSID: 1, SLBA: m.slot*8 + uint64(i), Blocks: 8})
		m.put(w, events.Submit, s.submit, events.Record{Op: OpWrite, Medium: x.ID, Offset: offset + uint64(i)<<12, Bytes: 4096})
		m.put(w, events.Complete, s.complete, events.Record{})
		m.put(w, events.Post, w.post, events.Record{})
		m.truth = append(m.truth, w)
	}
	m.real(trace.Event{Device: 1, QID: 3, CID: uint16(m.shared), Opcode: nvme.IOWrite, TID: threadOf(0), Disk: x.Disk, SLBA: offset >> 9, Blocks: 16}, begin, end)
}

// spans is the naive way to tell them: each ns by itself.
func (w *way) spans() (out [Spans]int64) {
	first, last := w.fetch, w.post
	if w.guest >= 0 {
		first, last = w.publish, w.reap
	}
	for ns := first; ns < last; ns++ {
		out[w.at(ns)]++
	}
	return out
}

func (w *way) at(ns int64) Span {
	switch {
	case ns < w.fetch:
		return GuestQueue
	case ns >= w.post:
		return ToGuest
	}
	for i, s := range w.steps {
		if ns < s.submit {
			return Hostmed
		}
		end := s.complete
		if i+1 < len(w.steps) {
			end = w.steps[i+1].submit // hostmed does not say when the one before was done
		}
		if ns >= end {
			continue
		}
		if s.real == nil {
			return Device
		}
		later := false
		for _, r := range s.real {
			if r.from <= ns && ns < r.to {
				return Device
			}
			later = later || ns < r.from
		}
		if later {
			return RealQueue
		}
		return Back
	}
	if len(w.steps) == 0 {
		return Hostmed
	}
	return Back
}
