package guestdrv

import (
	"cmp"
	"slices"
)

// QueueStats is what one queue pair has counted since it was created.
type QueueStats struct {
	QID        uint16
	Commands   uint64 // completed
	MMIOWrites uint64 // doorbells rung, that is not only stored in memory
	Wakeups    uint64 // sleeps that an interrupt ended
}

// Stats is what a controller has counted since Open.
type Stats struct {
	Commands   uint64 // completed, admin commands included
	MMIOWrites uint64
	Wakeups    uint64
	Rescued    uint64       // completions that were found without their interrupt
	Queues     []QueueStats // those that exist now, by QID; the admin queue is 0
}

func (s *Stats) add(q QueueStats) {
	s.Commands += q.Commands
	s.MMIOWrites += q.MMIOWrites
	s.Wakeups += q.Wakeups
}

// Stats returns the counts so far. Those of a QueuePair lag behind by some commands while it is in use.
func (c *Controller) Stats() Stats {
	c.mu.Lock()
	s := c.past
	lanes := c.lanes
	for p := range c.pairs {
		s.Queues = append(s.Queues, p.lastStats())
	}
	c.mu.Unlock()

	admin := c.adm.Lane().Stats()
	s.Queues = append(s.Queues, QueueStats{QID: 0, Commands: admin.Commands, MMIOWrites: admin.MMIOWrites, Wakeups: admin.Wakeups})
	s.Rescued = admin.Rescued
	for _, l := range lanes {
		st := l.Stats()
		s.Rescued += st.Rescued
		s.Queues = append(s.Queues, QueueStats{QID: l.io.qid, Commands: st.Commands, MMIOWrites: st.MMIOWrites, Wakeups: st.Wakeups})
	}
	for _, q := range s.Queues {
		s.add(q)
	}
	slices.SortFunc(s.Queues, func(a, b QueueStats) int { return cmp.Compare(a.QID, b.QID) })
	return s
}
