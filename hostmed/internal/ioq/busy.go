package ioq

import (
	"sync/atomic"
	"time"
)

// busyClock is how long a controller has had a command outstanding. Its queues are on several workers, and what one of them
// has counted the others do not count again.
type busyClock struct {
	until, total atomic.Int64 // ns
}

// add counts the time between two readings of the clock.
func (b *busyClock) add(from, to int64) {
	until := b.until.Load()
	if from = max(from, until); to > from && b.until.CompareAndSwap(until, to) {
		b.total.Add(to - from)
	}
}

func (b *busyClock) get() time.Duration { return time.Duration(b.total.Load()) }

// countBusy is called for a group on the active list each tick, so that no command costs a look at the clock.
func (w *Worker) countBusy(g *group) {
	if g.worked || g.inflight > 0 {
		g.ctl.busy.add(g.busyAt, w.now)
	}
	g.busyAt = w.now
}

// countDozing counts for groups that are armed and wait for their backend.
func (w *Worker) countDozing() {
	keep := w.dozing[:0]
	for _, g := range w.dozing {
		g.ctl.busy.add(g.busyAt, w.now)
		g.busyAt = w.now
		if g.dozing = g.inflight > 0; g.dozing {
			keep = append(keep, g)
		}
	}
	clear(w.dozing[len(keep):])
	w.dozing = keep
}
