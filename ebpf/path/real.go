package path

import (
	"math"
	"strconv"
	"strings"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// What hostmed asks a medium for, in Record.Op.
const (
	OpRead = iota
	OpWrite
	OpFlush
	OpWriteZeroes
	OpDiscard
	OpCommand
)

type medium struct {
	events.Medium
	disk *disk // nil: the kernel's NVMe queues do not show what it does
}

// disk is one that the kernel's nvme driver has.
type disk struct {
	shift uint8
	// at has the steps that miss bytes by the first of these, those that were there first first; open has all that are under way, in their order.
	at          map[uint64]chain
	first, last *step
}

type chain struct{ first, last *step }

func (m *Matcher) disk(name string) *disk {
	d := m.disks[name]
	if d == nil {
		d = &disk{at: map[uint64]chain{}}
		m.disks[name] = d
	}
	return d
}

// diskOf returns the disk that the kernel calls so in its trace, or nil. One that is reached by several paths has a number for each, nvme0c1n1.
func (m *Matcher) diskOf(name string) *disk {
	d, ok := m.disks[name]
	if !ok && len(m.disks) < 1<<16 {
		if c := strings.LastIndexByte(name, 'c'); c > 0 {
			if n := strings.LastIndexByte(name, 'n'); n > c {
				d = m.disks[name[:c]+name[n:]]
			}
		}
		if d != nil {
			m.disks[name] = d
		}
	}
	return d
}

type extent struct{ from, to uint64 }
type interval struct{ from, to int64 }

// step is one thing that a medium was asked for.
type step struct {
	v        *virtual
	gen      uint32 // another step has the memory when it has changed
	medium   *medium
	thread   uint32
	op       uint8
	opcode   uint8 // the guest's
	submit   int64
	complete int64 // 0: under way
	named    bool  // hostmed said what the device calls the command

	ranged    bool
	whole     extent
	bare      []extent // bytes that no real command has, ascending
	intervals []interval
	real      int // real commands
	open      int // of them, under way
	loose     bool
	broken    bool // the end of one is not known

	on            *disk // while it is under way
	indexed       bool
	key           uint64
	prev, next    *step // in on.at
	before, after *step // in on.first, on.last
}

// want says which bytes of the disk s is about.
func (s *step) want(offset uint64, bytes uint32) {
	s.ranged = bytes > 0
	if s.op == OpCommand {
		switch s.opcode {
		case nvme.IORead, nvme.IOWrite, nvme.IOWriteUncorrectable, nvme.IOCompare, nvme.IOWriteZeroes, nvme.IOVerify:
		default:
			s.ranged = false
		}
	}
	if !s.ranged {
		return
	}
	s.whole = extent{offset, offset + uint64(bytes)}
	if bytes == math.MaxUint32 { // or more
		s.whole.to = math.MaxUint64
	}
	s.bare = append(s.bare, s.whole)
}

// takes says whether a real command with this opcode may be of s.
func (s *step) takes(opcode uint8) bool {
	switch s.op {
	case OpRead:
		return opcode == nvme.IORead
	case OpWrite:
		return opcode == nvme.IOWrite
	case OpFlush:
		return opcode == nvme.IOFlush
	case OpWriteZeroes, OpDiscard:
		return opcode == nvme.IOWriteZeroes || opcode == nvme.IODSM || opcode == nvme.IOWrite
	}
	return opcode == s.opcode
}

// matched says whether all that s asked for is in real commands.
func (s *step) matched() bool {
	if s.medium != nil && s.medium.Kind == "vfio" {
		return s.named
	}
	return s.real > 0 && !s.broken && (len(s.bare) == 0 || s.loose || s.whole.to == math.MaxUint64)
}

// add makes s one of those under way.
func (d *disk) add(s *step) {
	s.on = d
	if s.before = d.last; d.last != nil {
		d.last.after = s
	} else {
		d.first = s
	}
	d.last = s
	s.index()
}

func (s *step) index() {
	if len(s.bare) == 0 {
		return
	}
	s.indexed, s.key = true, s.bare[0].from
	c := s.on.at[s.key]
	if s.prev, s.next = c.last, nil; c.last != nil {
		c.last.next = s
	} else {
		c.first = s
	}
	c.last = s
	s.on.at[s.key] = c
}

func (s *step) unindex() {
	if !s.indexed {
		return
	}
	s.indexed = false
	c := s.on.at[s.key]
	if s.prev != nil {
		s.prev.next = s.next
	} else {
		c.first = s.next
	}
	if s.next != nil {
		s.next.prev = s.prev
	} else {
		c.last = s.prev
	}
	if c.first == nil {
		delete(s.on.at, s.key)
	} else {
		s.on.at[s.key] = c
	}
}

// leave takes s out of those under way.
func (s *step) leave() {
	d := s.on
	if d == nil {
		return
	}
	s.unindex()
	if s.before != nil {
		s.before.after = s.after
	} else {
		d.first = s.after
	}
	if s.after != nil {
		s.after.before = s.before
	} else {
		d.last = s.before
	}
	s.on, s.before, s.after = nil, nil, nil
}

// cover takes bytes out of s.bare.
func (s *step) cover(x extent) {
	s.unindex()
	for i := 0; i < len(s.bare); i++ {
		b := s.bare[i]
		switch {
		case x.to <= b.from || b.to <= x.from:
		case x.from <= b.from && b.to <= x.to:
			s.bare = append(s.bare[:i], s.bare[i+1:]...)
			i--
		case x.from <= b.from:
			s.bare[i].from = x.to
		case b.to <= x.to:
			s.bare[i].to = x.from
		default:
			s.bare[i].to = x.from
			s.bare = append(s.bare, extent{})
			copy(s.bare[i+2:], s.bare[i+1:])
			s.bare[i+1] = extent{x.to, b.to}
		}
	}
	s.index()
}

type realKey struct{ device, qid, cid uint16 }

// realEvent is what counts of a trace.Event.
type realEvent struct {
	realKey
	opcode  uint8
	at      int64
	latency int64
	thread  uint32 // or the one that it works for
	disk    string
	slba    uint64
	blocks  uint32
}

// realOf takes what counts. io_uring's own threads work for the one that they are named after.
func realOf(e *trace.Event) realEvent {
	x := realEvent{realKey{e.Device, e.QID, e.CID}, e.Opcode, e.Time, e.Latency, e.TID, e.Disk, e.SLBA, e.Blocks}
	if owner, ok := strings.CutPrefix(e.Comm, "iou-wrk-"); ok {
		if n, err := strconv.ParseUint(owner, 10, 32); err == nil {
			x.thread = uint32(n)
		}
	}
	return x
}

// real is a command of a real queue that is under way.
type real struct {
	at    int64
	of    extent
	op    uint8
	steps []stepRef
}

type stepRef struct {
	*step
	gen uint32
}

// start takes a command that was written for a real queue.
func (m *Matcher) start(e *realEvent) {
	d := m.diskOf(e.disk)
	var of extent
	if d != nil && e.blocks > 0 {
		of = extent{e.slba << d.shift, (e.slba + uint64(e.blocks)) << d.shift}
	}
	if old := m.real[e.realKey]; old != nil {
		if old.op == e.opcode && old.of == of && old.underWay() {
			old.at = e.at // the driver had to give it back, and writes it once more
			return
		}
		m.forget(e.realKey, old)
	}
	if len(m.real) >= m.c.MaxOpen {
		m.counts.Full++
		return
	}
	r := pop(&m.freeReal)
	*r = real{at: e.at, op: e.opcode, of: of, steps: r.steps[:0]}
	if d != nil {
		if e.blocks > 0 {
			m.byRange(d, r, e)
		} else {
			m.byKind(d, r, e)
		}
	}
	switch len(r.steps) {
	case 0:
		if d != nil && m.threads[e.thread] {
			m.counts.RealUnmatched++
		} else {
			m.counts.Foreign++
		}
	case 1:
		m.counts.Real++
	default:
		m.counts.Real++
		m.counts.Shared++
	}
	m.real[e.realKey] = r
}

// underWay says whether a step of r's is.
func (r *real) underWay() bool {
	for _, x := range r.steps {
		if x.step.gen == x.gen && x.on != nil {
			return true
		}
	}
	return false
}

func (r *real) join(s *step) {
	for _, x := range r.steps {
		if x.step == s {
			return
		}
	}
	r.steps = append(r.steps, stepRef{s, s.gen})
	s.real++
	s.open++
	s.v.open++
}

// byRange finds the steps that miss r's bytes.
func (m *Matcher) byRange(d *disk, r *real, e *realEvent) {
	for at := r.of.from; at < r.of.to; {
		s, part := d.missing(extent{at, r.of.to}, e)
		if s == nil {
			break
		}
		r.join(s)
		s.cover(part)
		at = part.to
	}
	if len(r.steps) > 0 {
		return
	}
	// Nobody misses them: the command is tried again.
	for s := d.first; s != nil; s = s.after {
		if s.ranged && s.takes(e.opcode) && s.whole.from < r.of.to && r.of.from < s.whole.to {
			r.join(s)
			return
		}
	}
}

// missing returns the step that is to have the first bytes of x that any step misses, and which bytes.
func (d *disk) missing(x extent, e *realEvent) (best *step, part extent) {
	most := -1
	for s := d.at[x.from].first; s != nil && most < 3; s = s.next {
		if !s.takes(e.opcode) {
			continue
		}
		fit := 0
		if s.thread == e.thread {
			fit += 2
		}
		if s.bare[0] == x {
			fit++
		}
		if fit > most {
			best, most, part = s, fit, extent{x.from, min(x.to, s.bare[0].to)}
		}
	}
	if best != nil {
		return best, part
	}
	for s := d.first; s != nil; s = s.after {
		if !s.takes(e.opcode) {
			continue
		}
		for _, b := range s.bare {
			p := extent{max(b.from, x.from), min(b.to, x.to)}
			if p.from >= p.to {
				continue
			}
			if best == nil || p.from < part.from || p.from == part.from && best.thread != e.thread && s.thread == e.thread {
				best, part = s, p
			}
		}
	}
	return best, part
}

// byKind finds the step of a command that names no blocks of its own, or whose blocks are in a list. The block layer lets one flush do for all that wait
// for one.
func (m *Matcher) byKind(d *disk, r *real, e *realEvent) {
	var best *step
	most := -1
	for s := d.first; s != nil; s = s.after {
		if !s.takes(e.opcode) {
			continue
		}
		fit := 0
		if s.op != OpWriteZeroes { // few devices are asked for zeroes by anything without blocks
			fit += 4
		}
		if s.real == 0 {
			fit += 2
		}
		if s.thread == e.thread {
			fit++
		}
		if fit > most {
			best, most = s, fit
		}
	}
	if best == nil {
		return
	}
	r.join(best)
	best.loose = true
	if best.op != OpFlush || best.medium.Kind != "block" {
		return
	}
	for s := d.first; s != nil; s = s.after {
		if s.op == OpFlush && s.real == 0 && s.medium.Kind == "block" {
			r.join(s)
			s.loose = true
		}
	}
}

// end takes a command that the driver has the completion of.
func (m *Matcher) end(e *realEvent) {
	r := m.real[e.realKey]
	if r == nil || r.op != e.opcode || e.latency > 0 && r.at != e.at-e.latency {
		// Its Start was lost, or came late.
		x := *e
		x.at -= e.latency
		m.start(&x)
		if r = m.real[e.realKey]; r == nil {
			return
		}
	}
	for _, x := range r.steps {
		if s := x.step; s.gen == x.gen {
			s.intervals = append(s.intervals, interval{r.at, e.at})
			m.ended(s)
		}
	}
	delete(m.real, e.realKey)
	m.freeReal = append(m.freeReal, r)
}

func (m *Matcher) ended(s *step) {
	if s.open--; s.v.open > 0 { // 0: it was not awaited any longer
		s.v.open--
	}
	m.whole(s.v)
}

// forget gives up a real command whose end was not seen.
func (m *Matcher) forget(k realKey, r *real) {
	for _, x := range r.steps {
		if s := x.step; s.gen == x.gen {
			s.broken = true
			m.ended(s)
		}
	}
	delete(m.real, k)
	m.freeReal = append(m.freeReal, r)
}
