package ioq

import (
	"fmt"
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/backend"
)

// What a command costs its worker, phase by phase. One batch in some hundreds is measured, with a look at the clock after each phase; the others pay
// for a counter that goes down. How many are left out follows from what the clock itself costs, so that all of this stays below one percent
// of the shortest command.

// Phase is what one part of the way of those commands took that were measured.
type Phase struct {
	Commands uint64
	Time     time.Duration
}

// PerCommand is the mean in ns; 0 while nothing was measured.
func (p Phase) PerCommand() float64 {
	if p.Commands == 0 {
		return 0
	}
	return float64(p.Time) / float64(p.Commands)
}

func (p *Phase) add(o Phase) {
	p.Commands += o.Commands
	p.Time += o.Time
}

// Costs is the time of a worker's thread that commands took, without what else it does.
type Costs struct {
	Translate Phase // from the fetch to what the backend gets
	Submit    Phase // in the backend's Submit: the data's way itself, where the backend moves it there and then
	Complete  Phase // from the backend's result to the entry in the CQ; Reap is in it
	Interrupt Phase // of CQs that have interrupts on: raising it, or finding that it need not be
}

func (c *Costs) add(o Costs) {
	c.Translate.add(o.Translate)
	c.Submit.add(o.Submit)
	c.Complete.add(o.Complete)
	c.Interrupt.add(o.Interrupt)
}

// Sub returns what was added since before.
func (c Costs) Sub(before Costs) Costs {
	less := func(a, b Phase) Phase { return Phase{a.Commands - b.Commands, a.Time - b.Time} }
	return Costs{
		less(c.Translate, before.Translate), less(c.Submit, before.Submit), less(c.Complete, before.Complete), less(c.Interrupt, before.Interrupt),
	}
}

// String is the phases' ns per command, in order: "18/10/21/0".
func (c Costs) String() string {
	return fmt.Sprintf("%.0f/%.0f/%.0f/%.0f", c.Translate.PerCommand(), c.Submit.PerCommand(), c.Complete.PerCommand(), c.Interrupt.PerCommand())
}

const (
	// leastCommand is the time that the shortest command takes: what the sampling may cost is measured by it.
	leastCommand = 50 * time.Nanosecond
	// samplePart is the part of a command's time that sampling may take: a two hundredth, for either way, to the backend and back.
	samplePart = 200
	// sampleReads is how often a sample looks at the clock.
	sampleReads = 7
	// longestLap is more than any phase takes but Submit: a thread that was away for so long did something else.
	longestLap = int64(time.Millisecond)
)

// clockCost is what a look at the clock takes, the best of a few tries.
var clockCost = sync.OnceValue(func() int64 {
	const reads = 200
	best := int64(1 << 62)
	for range 7 {
		begin := nanotime()
		for range reads - 1 {
			nanotime()
		}
		best = min(best, (nanotime()-begin)/reads)
	}
	return best
})

// sampleEvery is one in how many batches is measured.
func sampleEvery(clock int64) uint32 {
	const rest = 100 // ns of a sample beside the clock
	return uint32(min(max((sampleReads*clock+rest)*samplePart/int64(leastCommand), 64), 1<<24))
}

// sampler chooses batches and measures them. It is the worker's own.
type sampler struct {
	left   uint32 // batches until the next sample on the way to the backends
	back   uint32 // and on the way back
	every  uint32
	clock  int64
	seed   uint32
	on     bool // a sample is being taken
	wanted bool // the next batch that comes back is to be measured
	mark   int64
	g      *group // of the sample
	groups [2 * batchMax]*group
}

func (s *sampler) init() {
	s.clock, s.seed = clockCost(), 1
	s.every = sampleEvery(s.clock)
	s.left, s.back = s.next(), s.next()
}

// next is how many batches are left out: not always as many, lest the samples fall into step with a ring's laps.
func (s *sampler) next() uint32 {
	s.seed ^= s.seed << 13
	s.seed ^= s.seed >> 17
	s.seed ^= s.seed << 5
	return s.every/2 + s.seed%s.every + 1
}

// sample begins to measure what is fetched for g. What listening costs is no cost of commands: nothing is measured then.
func (w *Worker) sample(g *group) {
	s := &w.cost
	if s.left = s.next(); w.trace != nil {
		return
	}
	s.on, s.g, w.extra = true, g, true
	s.mark = nanotime()
}

// lap returns the time since the last lap.
func (s *sampler) lap() int64 {
	now := nanotime()
	took := max(now-s.mark-s.clock, 0)
	s.mark = now
	return took
}

// charge adds a lap to a phase of n commands.
func (s *sampler) charge(p *Phase, n int) {
	if took := s.lap(); took < longestLap {
		p.Commands += uint64(n)
		p.Time += time.Duration(took)
	}
}

// submitSampled is submit for a batch that is measured.
func (w *Worker) submitSampled(m *media, batch []*backend.Request) {
	c := &w.cost.g.stats.Costs
	w.cost.charge(&c.Translate, 0)
	n := m.q.Submit(batch, w.finished[:])
	m.vain, m.next = 0, 0
	c.Submit.add(Phase{uint64(len(batch)), time.Duration(w.cost.lap())})
	w.inflight += len(batch) - n
	w.finish(w.finished[:n])
	w.cost.charge(&c.Complete, n)
}

// reapSampled is reap for one queue when the next batch that comes back is to be measured.
func (w *Worker) reapSampled(m *media) int {
	s := &w.cost
	s.mark = nanotime()
	n := m.q.Reap(w.finished[:])
	if n == 0 {
		return 0
	}
	s.wanted, s.back = false, s.next()
	m.vain, m.next = 0, 0
	w.inflight -= n
	groups := s.groups[:n]
	for i, b := range w.finished[:n] {
		groups[i] = w.reqs[b.Owner].sq.g
	}
	w.finish(w.finished[:n])
	s.on, s.g, w.extra = true, groups[0], true
	if took := s.lap(); took < longestLap {
		for _, g := range groups {
			g.stats.Costs.Complete.add(Phase{1, time.Duration(took / int64(n))})
		}
	}
	clear(groups)
	return n
}

// came counts a batch that has come back.
func (s *sampler) came() {
	if s.back--; s.back == 0 {
		s.wanted = true
	}
}

// endSample is called when what was measured is posted.
func (w *Worker) endSample() { w.cost.on, w.cost.g, w.extra = false, nil, w.trace != nil }
