package path

import (
	"slices"

	"github.com/shadowbell/shadowbell/shared/events"
)

type virtualKey struct {
	key events.Key
	cid uint16
}

// virtual is a command of a guest's that is followed: from Fetch until it is whole, that is posted, reaped where its guest is known, and its
// real commands have ended.
type virtual struct {
	events.Record // its Fetch
	stream        *stream
	publish       int64
	post, reap    int64
	status        uint16
	guest         guestKey // guest.of 0: its guest is not known
	steps         []*step
	open          int // real commands that have not ended
	isPosted      bool
	finished      bool
}

// guestKey names a command by its guest's record.
type guestKey struct {
	of  int // index in guests.list, from 1
	qid uint16
	cid uint16
}

// guest is a controller as one ring of guestdrv's numbers it.
type guest struct {
	ring   int
	number uint16
	// Which controller of hostmed's it is, is learnt from commands that both have.
	bound uint16
	votes map[uint16]int
}

// enoughVotes is how many commands have to agree.
const enoughVotes = 8

type guests struct {
	rings     int
	list      []guest
	published map[guestKey]*events.Record // not fetched yet
	waiting   map[guestKey]*virtual       // for their Reap
	free      []*events.Record
}

func newGuests() guests {
	return guests{published: map[guestKey]*events.Record{}, waiting: map[guestKey]*virtual{}}
}

// of returns the number of a ring's controller.
func (g *guests) of(ring int, controller uint16) int {
	for i := range g.list {
		if g.list[i].ring == ring && g.list[i].number == controller {
			return i + 1
		}
	}
	g.list = append(g.list, guest{ring: ring, number: controller, votes: map[uint16]int{}})
	return len(g.list)
}

// maxGuests bounds guests.list: a ring may have anything in it.
const maxGuests = 1 << 10

// record takes one record in its turn.
func (m *Matcher) record(s *stream, r *events.Record) {
	switch r.Kind {
	case events.Publish, events.Reap:
		if s.guest == 0 || len(m.guests.list) >= maxGuests {
			return
		}
		k := guestKey{m.guests.of(s.guest, r.Key.Controller()), r.Key.QID(), r.CID}
		if r.Kind == events.Publish {
			m.publish(k, r)
		} else {
			m.reap(k, r)
		}
		return
	case events.Fetch:
		if s.guest == 0 {
			m.fetch(s, r)
		}
		return
	}
	v := m.open[virtualKey{r.Key, r.CID}]
	if v == nil || s.guest != 0 {
		m.counts.Before++
		return
	}
	switch r.Kind {
	case events.Submit:
		m.submit(v, r)
	case events.Complete:
		m.complete(v, r.Time)
		if r.RealQID != 0 && len(v.steps) > 0 {
			v.steps[len(v.steps)-1].named = true
		}
	case events.Post:
		m.posted(v, r)
	}
}

func (m *Matcher) publish(k guestKey, r *events.Record) {
	p := m.guests.published[k]
	if p == nil {
		if len(m.guests.published) >= m.c.MaxOpen {
			m.counts.Full++
			return
		}
		p = pop(&m.guests.free)
		m.guests.published[k] = p
	}
	*p = *r
}

// fetch begins a virtual command.
func (m *Matcher) fetch(s *stream, r *events.Record) {
	k := virtualKey{r.Key, r.CID}
	if old := m.open[k]; old != nil { // its Post never came: the queue was deleted or reset
		m.counts.Dropped++
		m.drop(old)
	}
	if len(m.open) >= m.c.MaxOpen {
		m.counts.Full++
		return
	}
	v := pop(&m.freeVirtual)
	*v = virtual{Record: *r, stream: s, steps: v.steps[:0]}
	m.open[k] = v
	if i := m.guests.find(r); i != 0 {
		v.guest = guestKey{i, r.Key.QID(), r.CID}
		p := m.guests.published[v.guest]
		v.publish = p.Time
		delete(m.guests.published, v.guest)
		m.guests.free = append(m.guests.free, p)
		m.guests.waiting[v.guest] = v
	}
}

// find returns the guest that published what r has fetched, or 0.
func (g *guests) find(r *events.Record) (best int) {
	h := r.Key.Controller()
	for i := range g.list {
		x := &g.list[i]
		if x.bound != 0 && x.bound != h {
			continue
		}
		p := g.published[guestKey{i + 1, r.Key.QID(), r.CID}]
		if p == nil || p.Opcode != r.Opcode || p.NSID != r.NSID || p.SLBA != r.SLBA || p.Time > r.Time {
			continue
		}
		if best == 0 || x.bound == h {
			best = i + 1
		}
	}
	if best == 0 {
		return 0
	}
	if x := &g.list[best-1]; x.bound == 0 {
		x.votes[h]++
		all := 0
		for _, n := range x.votes {
			all += n
		}
		if x.votes[h] >= enoughVotes && x.votes[h]*4 >= all*3 {
			x.bound, x.votes = h, nil
		}
	}
	return best
}

func (m *Matcher) submit(v *virtual, r *events.Record) {
	m.complete(v, r.Time) // of a step before it hostmed need not say when it was done
	s := pop(&m.freeStep)
	*s = step{gen: s.gen, bare: s.bare[:0], intervals: s.intervals[:0], v: v, thread: v.stream.thread, submit: r.Time, op: r.Op, opcode: r.Opcode, named: r.RealQID != 0}
	v.steps = append(v.steps, s)
	s.medium = m.media[r.Medium]
	if s.medium != nil && s.medium.disk != nil {
		s.want(r.Offset, r.Bytes)
		s.medium.disk.add(s)
	}
}

// complete ends the last step.
func (m *Matcher) complete(v *virtual, at int64) {
	if n := len(v.steps); n > 0 && v.steps[n-1].complete == 0 {
		s := v.steps[n-1]
		s.complete = at
		s.leave()
	}
}

func (m *Matcher) posted(v *virtual, r *events.Record) {
	m.complete(v, r.Time)
	v.post, v.status, v.isPosted = r.Time, r.Status, true
	delete(m.open, virtualKey{v.Key, v.CID})
	if m.whole(v) {
		m.freeVirtual = append(m.freeVirtual, v)
	} else {
		m.settling = append(m.settling, v)
	}
}

func (m *Matcher) reap(k guestKey, r *events.Record) {
	v := m.guests.waiting[k]
	if v == nil {
		m.counts.Before++
		return
	}
	delete(m.guests.waiting, k)
	v.reap = r.Time
	m.whole(v)
}

// whole finishes v if nothing of it is awaited any more.
func (m *Matcher) whole(v *virtual) bool {
	if !v.isPosted || v.finished || v.open > 0 || v.guest.of != 0 && v.reap == 0 {
		return false
	}
	m.finish(v)
	return true
}

func (m *Matcher) finish(v *virtual) {
	c := &m.result
	v.result(c)
	m.counts.Commands++
	switch c.Match {
	case Own:
		m.counts.Own++
	case Matched:
		m.counts.Matched++
	case Unseen:
		m.counts.Unseen++
	default:
		m.counts.Unmatched++
	}
	if !c.Guest {
		m.counts.Guestless++
	}
	m.done(c)
	m.release(v)
}

// endPatience is how long after its Post a command waits for the kernel's word that its real commands have ended, which must have been before.
const endPatience = int64(1e9)

// settle finishes what waits for something that will not come. The virtual commands that were finished meanwhile are free now.
func (m *Matcher) settle() {
	m.settling = slices.DeleteFunc(m.settling, func(v *virtual) bool {
		if !v.finished {
			if v.open > 0 && v.post < m.now-endPatience {
				for _, s := range v.steps {
					s.broken = s.broken || s.open > 0
				}
				v.open = 0
			}
			if v.guest.of != 0 && v.reap == 0 && v.post < m.now-int64(m.c.MaxAge) {
				m.forgetGuest(v)
			}
			m.whole(v)
		}
		if v.finished {
			m.freeVirtual = append(m.freeVirtual, v)
		}
		return v.finished
	})
}

func (m *Matcher) forgetGuest(v *virtual) {
	if m.guests.waiting[v.guest] == v {
		delete(m.guests.waiting, v.guest)
	}
	v.guest = guestKey{}
}

// drop forgets a virtual command that was not posted.
func (m *Matcher) drop(v *virtual) {
	delete(m.open, virtualKey{v.Key, v.CID})
	m.release(v)
	m.freeVirtual = append(m.freeVirtual, v)
}

// release gives back what v has. Real commands that still name its steps see by their gen that those are gone.
func (m *Matcher) release(v *virtual) {
	m.forgetGuest(v)
	for _, s := range v.steps {
		s.leave()
		s.gen++
		m.freeStep = append(m.freeStep, s)
	}
	v.steps, v.finished = v.steps[:0], true
}

// suspect drops what is under way in a ring of which records are missing: a Post and the next Fetch with the same CID may be among them.
func (m *Matcher) suspect(s *stream) {
	if s.guest == 0 {
		for _, v := range m.open {
			if v.stream == s {
				m.counts.Suspect++
				m.drop(v)
			}
		}
		return
	}
	for k, v := range m.guests.waiting {
		if m.guests.list[k.of-1].ring == s.guest {
			m.forgetGuest(v)
			m.whole(v)
		}
	}
	for k := range m.guests.published {
		if m.guests.list[k.of-1].ring == s.guest {
			delete(m.guests.published, k)
		}
	}
}

// sweep drops what is too old.
func (m *Matcher) sweep() {
	m.swept = m.now
	old := m.now - int64(m.c.MaxAge)
	for _, v := range m.open {
		if v.Time < old {
			m.counts.Dropped++
			m.drop(v)
		}
	}
	for k, r := range m.real {
		if r.at < old {
			m.forget(k, r)
		}
	}
	for k, p := range m.guests.published {
		if p.Time < old {
			delete(m.guests.published, k)
		}
	}
}

// pop takes one from a list of free ones, or makes one.
func pop[T any](free *[]*T) *T {
	n := len(*free)
	if n == 0 {
		return new(T)
	}
	x := (*free)[n-1]
	*free = (*free)[:n-1]
	return x
}
