package queue

import (
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Trace points, with Config.Events: publish and reap of each command, sleep and wake of the queue. The clock is read once for each batch: a
// publish is not said to be later than the store of the tail, nor a reap earlier than its CQE.

// tracer is what a queue that is recorded has.
type tracer struct {
	out    *events.Shared
	key    events.Key
	clock  events.Clock
	pushed []pushed // and not published
	asleep bool
}

// pushed is what is told of a command once it is published.
type pushed struct {
	slba   uint64
	nsid   uint32
	blocks uint32
	cid    uint16
	opcode uint8
}

func newTracer(c *Config) *tracer {
	if c.Events == nil {
		return nil
	}
	return &tracer{out: c.Events, key: c.Key, clock: events.NewClock(), pushed: make([]pushed, 0, c.Size)}
}

func (t *tracer) push(c *nvme.Command) {
	t.pushed = append(t.pushed, pushed{c.SLBA(), c.NSID, events.Blocks(c.Opcode, c.CDW10, c.CDW12), c.CID, c.Opcode})
}

// publish is Publish of the tail.
func (q *Queue) publishTraced() error {
	t := q.trace
	now, rings := t.clock.Now(), q.tail.Rings
	err := q.tail.Publish(q.sq.Tail())
	w := t.out.Lock()
	for i := range t.pushed {
		p := &t.pushed[i]
		w.Publish(now, t.key, p.cid, p.opcode, p.nsid, p.slba, p.blocks, q.tail.Rings != rings)
	}
	t.out.Unlock()
	t.pushed = t.pushed[:0]
	return err
}

// traceReap records what was reaped. The slots are free, and not taken again yet.
func (q *Queue) traceReap(done []Completion) {
	t := q.trace
	q.TraceWake()
	now := t.clock.Now()
	w := t.out.Lock()
	for i := range done {
		c := &done[i]
		w.Reap(now, t.key, q.slots[c.Slot].cid-q.genUnit, c.Opcode, uint16(c.Status))
	}
	t.out.Unlock()
}

// TraceSleep records that who waits for the queue is about to sleep, for ns at the most; -1: until something happens. TraceWake records that that is
// over. Reap does it too.
func (q *Queue) TraceSleep(ns int64) {
	if t := q.trace; t != nil && !t.asleep {
		t.asleep = true
		w := t.out.Lock()
		w.Put(&events.Record{Time: t.clock.Now(), Kind: events.Sleep, Key: t.key, Timeout: ns})
		t.out.Unlock()
	}
}

// TraceWake is described at TraceSleep.
func (q *Queue) TraceWake() {
	if t := q.trace; t != nil && t.asleep {
		t.asleep = false
		w := t.out.Lock()
		w.Put(&events.Record{Time: t.clock.Now(), Kind: events.Wake, Key: t.key})
		t.out.Unlock()
	}
}
