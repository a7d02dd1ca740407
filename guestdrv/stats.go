package guestdrv

import (
	"cmp"
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/tally"
	"github.com/shadowbell/shadowbell/shared/latency"
)

// Histogram is a distribution of latencies in buckets of a fixed size, at most 1/16 of their values wide: Count, Mean, Max, Quantile, the
// buckets themselves (All, Cumulative), Merge and Sub. Package shared/latency has its documentation.
type Histogram = latency.Histogram

// Op is a kind of command, as counters tell them apart.
type Op uint8

// The kinds. OpOther is every I/O command that has no kind of its own, OpAdmin every admin command.
const (
	OpRead Op = iota
	OpWrite
	OpFlush
	OpDiscard // Dataset Management
	OpWriteZeroes
	OpCompare
	OpOther
	OpAdmin
)

// They are those of package tally.
var _ = [1]struct{}{}[OpAdmin-Op(tally.Admin)]

var opNames = [tally.Kinds]string{"read", "write", "flush", "discard", "write_zeroes", "compare", "other", "admin"}

// String returns "read", "write", "flush", "discard", "write_zeroes", "compare", "other" or "admin".
func (o Op) String() string {
	if int(o) < len(opNames) {
		return opNames[o]
	}
	return "unknown"
}

// OpStats is what has been counted of one kind of command.
type OpStats struct {
	Op     Op
	Errors uint64 // ended with a status other than success

	// Latency has every command that has ended, with success or not, by the time from its being sent to its completion being
	// seen. Its Count is their number. What was lost by a reset is not in it, nor what has no deadline (Asynchronous Event Request).
	Latency Histogram
}

// QueueStats is what one queue pair has counted since it was created.
type QueueStats struct {
	QID        uint16 // 0: the admin queue
	Commands   uint64 // completed
	MMIOWrites uint64 // doorbells rung, that is not only stored in memory
	Wakeups    uint64 // sleeps that an interrupt ended

	// Polling is the time that the Waits of a QueuePair have spent with looking for completions that were not there yet: an estimate, which costs
	// nothing. Of the admin queue, of a controller without interrupts and of the queues behind Namespace's calls it is 0.
	Polling time.Duration
}

// MMIOPerIO returns the doorbell register writes for each command; 0 if there was none.
func (q QueueStats) MMIOPerIO() float64 { return ratio(q.MMIOWrites, q.Commands) }

// Stats is what a controller has counted since Open. It has some 4 KiB for each kind of command: pass pointers.
type Stats struct {
	Commands   uint64 // completed, admin commands included
	MMIOWrites uint64 // doorbell register writes
	Wakeups    uint64 // sleeps that an interrupt ended
	Rescued    uint64 // completions that were found without their interrupt

	Errors   uint64 // commands that the controller ended with a status other than success
	Timeouts uint64 // commands that missed their deadline (Options.Timeout)
	Aborts   uint64 // Abort commands sent because of that
	Resets   uint64 // controller resets since Open, complete or not

	Ops    []OpStats    // the kinds of command of which some have ended, by Op
	Queues []QueueStats // those that exist now, by QID; the admin queue is 0
}

func (s *Stats) add(q QueueStats) {
	s.Commands += q.Commands
	s.MMIOWrites += q.MMIOWrites
	s.Wakeups += q.Wakeups
}

func ratio(n, of uint64) float64 {
	if of == 0 {
		return 0
	}
	return float64(n) / float64(of)
}

// Op returns what has been counted of one kind of command. It is never nil.
func (s *Stats) Op(op Op) *OpStats {
	for i := range s.Ops {
		if s.Ops[i].Op == op {
			return &s.Ops[i]
		}
	}
	return &OpStats{Op: op}
}

// adminQueue returns the counts of queue 0.
func (s *Stats) adminQueue() QueueStats {
	for _, q := range s.Queues {
		if q.QID == 0 {
			return q
		}
	}
	return QueueStats{}
}

// io returns the counts of all I/O queues, those that are closed among them.
func (s *Stats) io() QueueStats {
	a := s.adminQueue()
	return QueueStats{Commands: s.Commands - a.Commands, MMIOWrites: s.MMIOWrites - a.MMIOWrites, Wakeups: s.Wakeups - a.Wakeups}
}

// MMIOPerIO returns the doorbell register writes for each I/O command; 0 if there was none. The admin queue, which always
// rings, does not count.
func (s *Stats) MMIOPerIO() float64 { return s.io().MMIOPerIO() }

// Sub returns what has been counted since before, which an earlier call of Controller.Stats returned. A queue that did not exist then
// counts from its creation. Each Latency.Max is the end of the highest bucket in which something came to lie since.
func (s *Stats) Sub(before *Stats) Stats {
	d := Stats{
		Commands: s.Commands - before.Commands, MMIOWrites: s.MMIOWrites - before.MMIOWrites, Wakeups: s.Wakeups - before.Wakeups,
		Rescued: s.Rescued - before.Rescued, Errors: s.Errors - before.Errors, Timeouts: s.Timeouts - before.Timeouts,
		Aborts: s.Aborts - before.Aborts, Resets: s.Resets - before.Resets,
	}
	for i := range s.Ops {
		o, old := s.Ops[i], before.Op(s.Ops[i].Op)
		o.Errors -= old.Errors
		if o.Latency.Sub(&old.Latency); o.Latency.Count() > 0 {
			d.Ops = append(d.Ops, o)
		}
	}
	for _, q := range s.Queues {
		for _, old := range before.Queues {
			if old.QID == q.QID && old.Commands <= q.Commands && old.MMIOWrites <= q.MMIOWrites && old.Wakeups <= q.Wakeups {
				q.Commands -= old.Commands
				q.MMIOWrites -= old.MMIOWrites
				q.Wakeups -= old.Wakeups
				q.Polling = max(q.Polling-old.Polling, 0)
			}
		}
		d.Queues = append(d.Queues, q)
	}
	return d
}

// opStats is counts as the API has them.
func opStats(counts *tally.Counts) []OpStats {
	var ops []OpStats
	for k := range counts {
		if c := &counts[k]; c.Times.Count() > 0 {
			ops = append(ops, OpStats{Op: Op(k), Errors: c.Errors, Latency: c.Times})
		}
	}
	return ops
}

// Stats returns the counts so far. Commands, MMIOWrites and Wakeups of a QueuePair lag behind by some commands while it is in use. It
// costs some 50 us for each queue and takes nothing from who does I/O.
func (c *Controller) Stats() Stats {
	counts := new(tally.Counts)
	c.mu.Lock()
	s := c.past
	c.pastOps.addTo(counts)
	lanes := c.lanes
	for p := range c.pairs {
		s.Queues = append(s.Queues, p.lastStats())
		p.tally.AddTo(counts)
	}
	c.mu.Unlock()

	admin := c.adm.Lane().Stats()
	s.Queues = append(s.Queues, QueueStats{QID: 0, Commands: admin.Commands, MMIOWrites: admin.MMIOWrites, Wakeups: admin.Wakeups})
	s.Rescued = admin.Rescued
	c.adm.Lane().Tally().AddTo(counts)
	for _, l := range lanes {
		st := l.Stats()
		s.Rescued += st.Rescued
		s.Queues = append(s.Queues, QueueStats{QID: l.io.qid, Commands: st.Commands, MMIOWrites: st.MMIOWrites, Wakeups: st.Wakeups})
		l.Tally().AddTo(counts)
	}
	for _, q := range s.Queues {
		s.add(q)
	}
	slices.SortFunc(s.Queues, func(a, b QueueStats) int { return cmp.Compare(a.QID, b.QID) })
	s.Ops = opStats(counts)
	for i := range s.Ops {
		s.Errors += s.Ops[i].Errors
	}
	s.Timeouts, s.Aborts, s.Resets = c.trouble.timeouts.Load(), c.trouble.aborts.Load(), c.trouble.resets.Load()
	return s
}

// Stats returns what the pair has counted.
func (p *QueuePair) Stats() QueueStats {
	p.tell()
	return p.lastStats()
}

// lastStats is Stats from another goroutine.
func (p *QueuePair) lastStats() QueueStats {
	return QueueStats{
		QID: p.io.qid, Commands: p.seen.commands.Load(), MMIOWrites: p.seen.rings.Load(), Wakeups: p.seen.wakeups.Load(),
		Polling: time.Duration(p.seen.polled.Load()),
	}
}

// Ops returns the pair's commands by kind. Any goroutine may call it.
func (p *QueuePair) Ops() []OpStats {
	counts := new(tally.Counts)
	p.tally.AddTo(counts)
	return opStats(counts)
}

// closedOps is the counts of pairs that are closed.
type closedOps struct{ counts *tally.Counts }

func (o *closedOps) add(t *tally.Tally) {
	if o.counts == nil {
		o.counts = new(tally.Counts)
	}
	t.AddTo(o.counts)
}

func (o *closedOps) addTo(counts *tally.Counts) {
	if o.counts != nil {
		counts.Merge(o.counts)
	}
}
