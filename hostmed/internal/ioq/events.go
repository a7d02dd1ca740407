package ioq

import (
	"fmt"
	"sync"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Trace points: what becomes of each command, and when queues and threads sleep, as records of package events. Each worker writes a ring of
// its own, by what is private to it: Worker.trace, which is nil while nobody listens. Then a batch pays for two looks at it, when it is fetched and
// when it is done (what else there is hides behind a look that sampling takes anyway, Worker.extra), and a command for nothing.
//
// The clock is read once for each batch and phase: tracer.now is the time of all that is recorded until the next reading. So each ring is in the
// order of its times, and an event is never said to be earlier than what must come before it, here or on the other side:
//
//	fetch     after the tail was loaded
//	submit    before the backend is called
//	complete  after it has returned
//	post      before the CQEs are stored
//
// docs/trace-points.md has the rest.

// Tracing is what all workers have in common while somebody listens: the numbers of the media.
type Tracing struct {
	mu    sync.Mutex
	ids   map[backend.Backend]uint16
	media []events.Medium
}

// maxMedia is how many media are told apart. What comes later has the number 0, as what is not known.
const maxMedia = 1<<16 - 1

// NewTracing returns a Tracing without media.
func NewTracing() *Tracing { return &Tracing{ids: map[backend.Backend]uint16{}} }

// Media returns the media that workers have met, by their numbers from 1 on.
func (t *Tracing) Media() []events.Medium {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]events.Medium(nil), t.media...)
}

// medium returns the description of b, with its number.
func (t *Tracing) medium(b backend.Backend) events.Medium {
	t.mu.Lock()
	defer t.mu.Unlock()
	id, ok := t.ids[b]
	if !ok {
		x := backend.MediumOf(b)
		if len(t.media) == maxMedia {
			return x
		}
		id = uint16(len(t.media) + 1)
		x.ID = id
		t.ids[b], t.media = id, append(t.media, x)
	}
	return t.media[id-1]
}

// tracer is a worker's while somebody listens.
type tracer struct {
	ring  *events.Writer
	of    *Tracing
	clock events.Clock
	now   int64
}

// traced is what a media has for records.
type traced struct {
	id    uint16
	real  bool   // hostmed drives the device
	base  uint64 // of the namespace on the medium
	known bool
}

// Listen makes the worker record into ring, which is its own from here on. With a nil ring it stops; the last one is its caller's again.
func (w *Worker) Listen(t *Tracing, ring *events.Writer) {
	w.Call(func() {
		w.endSample()
		w.trace, w.extra = nil, false
		if ring != nil {
			w.trace = &tracer{ring: ring, of: t, clock: events.NewClock()}
			w.trace.stamp()
		}
		for _, m := range w.queues {
			m.traced = traced{}
		}
		w.extra = w.trace != nil
	})
}

// Describe returns what the worker's ring says of itself.
func (w *Worker) Describe() events.Config {
	return events.Config{Name: fmt.Sprintf("hostmed worker %d", w.id), Number: uint32(w.id), Thread: uint32(w.tid)}
}

func (t *tracer) stamp() { t.now = t.clock.Now() }

func (s *sq) key() events.Key    { return events.NewKey(s.g.ctl.cfg.Trace, s.qid) }
func (g *group) key() events.Key { return events.NewKey(g.ctl.cfg.Trace, g.qid) }

// fetchTraced is fetch.
func (w *Worker) fetchTraced(s *sq, n uint32) {
	t, key := w.trace, s.key()
	t.stamp()
	for range n {
		r := w.take(s)
		w.pending = r
		s.cons.Fetch(&r.cmd)
		c := &r.cmd
		r.RealQID, r.RealCID = 0, 0
		t.ring.Fetch(t.now, key, c.CID, c.Opcode, c.NSID, c.SLBA(), events.Blocks(c.Opcode, c.CDW10, c.CDW12)) // a submit in this loop has stamped anew
		if s.first != nil || len(s.aborts) > 0 {
			w.startOdd(r)
		} else {
			w.start(r)
		}
	}
	w.pending = nil
}

// submitExtra is submit for a batch that is recorded or measured.
func (w *Worker) submitExtra(m *media, batch []*backend.Request) {
	t := w.trace
	if t == nil {
		w.submitSampled(m, batch)
		return
	}
	if !m.traced.known {
		x := t.of.medium(m.backend)
		m.traced = traced{id: x.ID, real: x.Kind == "vfio", base: x.Base, known: true}
	}
	t.stamp()
	if !m.traced.real {
		for _, b := range batch {
			r := w.reqs[b.Owner]
			t.ring.Submit(t.now, r.sq.key(), r.cmd.CID, r.cmd.Opcode, uint8(r.Op), m.traced.id, m.traced.base+r.Off, r.Len)
		}
		t.ring.Flush() // the backend may be slow, and readers want to match what it does
	}
	n := m.q.Submit(batch, w.finished[:])
	m.vain, m.next = 0, 0
	if m.traced.real {
		// What the device calls them is known only now.
		for _, b := range batch {
			r := w.reqs[b.Owner]
			t.ring.SubmitReal(t.now, r.sq.key(), r.cmd.CID, r.cmd.Opcode, uint8(r.Op), m.traced.id, m.traced.base+r.Off, r.RealQID, r.RealCID)
		}
	}
	w.inflight += len(batch) - n
	w.finish(w.finished[:n])
}

// finishTraced is finish.
func (w *Worker) finishTraced(done []*backend.Request) {
	w.trace.stamp()
	for _, b := range done {
		if r := w.reqs[b.Owner]; r.step == oneStep {
			w.complete(r, r.Status)
		} else {
			w.finishStep(r)
		}
	}
}

// completed records the end of r.
func (t *tracer) completed(r *request, st nvme.Status) {
	t.ring.Complete(t.now, r.sq.key(), r.cmd.CID, r.cmd.Opcode, uint16(st), r.RealQID, r.RealCID)
}

// postExtra posts what is staged, recorded or measured.
func (w *Worker) postExtra(g *group) {
	if t := w.trace; t != nil {
		t.stamp()
		trace := g.ctl.cfg.Trace
		for _, e := range g.staged {
			t.ring.Post(t.now, events.NewKey(trace, e.SQID()), e.CID(), g.qid, uint16(e.Status()))
		}
	}
	g.prod.Post(g.staged)
	if w.cost.on {
		w.cost.charge(&g.stats.Costs.Complete, 0)
	}
}

// endExtra is the end of a round: readers see what was recorded.
func (w *Worker) endExtra() {
	if w.cost.on {
		w.endSample()
	}
	if t := w.trace; t != nil {
		t.ring.Flush()
	}
}

// traceArm records that g sleeps, or which of its queues keep it from that.
func (w *Worker) traceArm(g *group, armed bool) {
	t := w.trace
	t.stamp()
	for _, s := range g.sqs {
		if s.asks() {
			t.armed(s.key(), s.tail, s.cons.Head(), armed, false)
		}
	}
	if g.blocked && g.room() == 0 {
		t.armed(g.key(), g.head, g.prod.Head(), armed, true)
	}
}

// armed records what Arm of p found, if that is so or is the reason that it is not.
func (t *tracer) armed(key events.Key, p *dbbuf.Poller, consumed uint32, armed, cq bool) {
	r := events.Record{Time: t.now, Kind: events.Arm, Key: key, Consumed: consumed, Tail: p.Saw, Event: p.Index, CQ: cq}
	if !armed {
		if r.Kind = events.ArmLost; r.Tail == consumed {
			return
		}
	}
	t.ring.Put(&r)
}

// traceWake records that g, which slept, is polled again.
func (w *Worker) traceWake(g *group) {
	w.trace.stamp()
	w.trace.ring.Put(&events.Record{Time: w.trace.now, Kind: events.Wake, Key: g.key()})
}

// traceKick records a doorbell message, which came to this worker. Of a queue of another one it knows no more.
func (w *Worker) traceKick(g *group, qid uint16, cq bool, value uint32) {
	r := events.Record{Kind: events.Kick, Key: events.NewKey(g.ctl.cfg.Trace, qid), Value: value, CQ: cq}
	if g.w == w {
		r.Asleep = g.state == Armed
		if s := g.ctl.sqs[qid].Load(); s != nil && !cq {
			r.Consumed = s.cons.Head()
		}
	}
	w.trace.stamp()
	r.Time = w.trace.now
	w.trace.ring.Put(&r)
}

// traceSleep records that the thread sleeps for timeout ns at the most, and traceWoke that it has, with n descriptors ready.
func (w *Worker) traceSleep(timeout int64) {
	w.trace.stamp()
	w.trace.ring.Put(&events.Record{Time: w.trace.now, Kind: events.Sleep, Timeout: timeout})
	w.trace.ring.Flush()
}

func (w *Worker) traceWoke(n int) {
	if w.trace == nil { // a descriptor's owner has ended it meanwhile
		return
	}
	w.trace.stamp()
	w.trace.ring.Put(&events.Record{Time: w.trace.now, Kind: events.Wake, Ready: uint32(n)})
}
