package path

import (
	"math"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/events"
)

// kernel is the stream of the kernel's events.
const kernel = 0

// stream is what one ring, or the kernel, has sent and has not had its turn. Its order is its own; times serve to put several together.
type stream struct {
	items  []item
	first  int
	guest  int    // number of a guest's ring, from 1
	thread uint32 // of the worker
	last   int64  // time of what was taken last: none is taken to be earlier
}

type item struct {
	at     int64
	lost   bool
	event  trace.Kind // 0: a record
	record events.Record
	real   realEvent
}

func (s *stream) push(x item) {
	if s.first > 1024 && s.first > len(s.items)/2 {
		s.items = s.items[:copy(s.items, s.items[s.first:])]
		s.first = 0
	}
	s.items = append(s.items, x)
}

// pushSorted is push for a stream whose items are not quite in order: those of several CPUs.
func (s *stream) pushSorted(x item) {
	s.push(x)
	for i := len(s.items) - 1; i > s.first && s.items[i-1].at > x.at; i-- {
		s.items[i], s.items[i-1] = s.items[i-1], x
	}
}

// head is what comes next, and when.
func (s *stream) head() (x *item, at int64) {
	if s.first == len(s.items) {
		return nil, math.MaxInt64
	}
	x = &s.items[s.first]
	return x, max(x.at, s.last)
}

// Advance takes what was added so far up to the time until, in ns. Nothing before that may be added afterwards: a ring is read some ms after it was
// written, and the kernel's events later still. What comes all the same is late.
func (m *Matcher) Advance(until int64) {
	for m.next(until) {
	}
	m.now = max(m.now, until)
	m.settle()
	if m.now-m.swept > int64(m.c.MaxAge)/4 && until != events.End {
		m.sweep()
	}
}

// press takes what comes next when too much waits.
func (m *Matcher) press() {
	for m.queued > m.c.MaxQueued && m.next(math.MaxInt64) {
	}
}

// rank orders what has the same time in several streams: as it happens to a command.
func (x *item) rank() int {
	switch {
	case x.event == trace.Start:
		return 4
	case x.event == trace.End:
		return 5
	}
	return ranks[x.record.Kind]
}

var ranks = map[events.Kind]int{events.Publish: 1, events.Fetch: 2, events.Submit: 3, events.Complete: 6, events.Post: 7, events.Reap: 8}

// next takes the earliest item, if that is before until.
func (m *Matcher) next(until int64) bool {
	var best *stream
	var x *item
	at := until
	for _, s := range m.streams {
		y, t := s.head()
		if y == nil || t > at || t == until && until != math.MaxInt64 {
			continue
		}
		if t < at || x == nil || y.rank() < x.rank() {
			best, x, at = s, y, t
		}
	}
	if x == nil {
		return false
	}
	best.first++
	best.last = at
	m.queued--
	m.now = max(m.now, at)
	switch {
	case x.lost:
		m.suspect(best)
	case x.event == trace.Start:
		m.start(&x.real)
	case x.event == trace.End:
		m.end(&x.real)
	default:
		m.record(best, &x.record)
	}
	if best.first == len(best.items) {
		best.items, best.first = best.items[:0], 0
	}
	return true
}
