package ioq

import "sync/atomic"

// Interrupt coalescing. NVMe Base 2.0c 5.27.1.6 and 5.27.1.7.
//
// Completions are gathered for each vector, whose CQs may be of several workers. Whoever completes the threshold raises
// the interrupt; whoever gathers the first sees to it that it comes in time.

// coalescing is feature 08h: the aggregation threshold, zero-based, and the time in 100 us.
type coalescing struct{ v atomic.Uint32 }

func (c *coalescing) set(thresholdZ, time100us uint8) {
	c.v.Store(uint32(thresholdZ) | uint32(time100us)<<8)
}

// get returns the threshold in completions and the time in ns. Time 0 turns coalescing off.
func (c *coalescing) get() (entries uint32, delay int64) {
	v := c.v.Load()
	return v&0xff + 1, int64(v>>8) * 100_000
}

// held is how many completions of a vector wait for an interrupt, in the low half, and, in the high half, how many interrupts
// have ended such a wait: a timer that was set for one before is late, and says nothing.
type held struct{ v atomic.Uint64 }

// gather adds n completions. fire says that the threshold is reached, first that a wait of that
// number has begun.
func (h *held) gather(n, entries uint32) (fire, first bool, wait uint32) {
	for {
		old := h.v.Load()
		wait, was := uint32(old>>32), uint32(old)
		if was+n >= entries {
			if h.v.CompareAndSwap(old, uint64(wait+1)<<32) {
				return true, false, wait
			}
		} else if h.v.CompareAndSwap(old, uint64(wait)<<32|uint64(was+n)) {
			return false, was == 0, wait
		}
	}
}

// expire reports whether the wait is still on, and ends it.
func (h *held) expire(wait uint32) bool {
	for {
		old := h.v.Load()
		if uint32(old>>32) != wait {
			return false
		}
		if h.v.CompareAndSwap(old, uint64(wait+1)<<32) {
			return true
		}
	}
}

// reset forgets what is held.
func (h *held) reset() {
	for old := h.v.Load(); uint32(old) != 0 && !h.v.CompareAndSwap(old, uint64(uint32(old>>32)+1)<<32); old = h.v.Load() {
	}
}

// deferred is an interrupt that is raised at a time, if not before.
type deferred struct {
	g    *group // that began the wait
	wait uint32
	at   int64 // ns
}

// gather counts n completions of g and reports whether the interrupt is due now.
func (w *Worker) gather(g *group, n, entries uint32, delay int64) bool {
	fire, first, wait := g.vector.held.gather(n, entries)
	if first {
		w.now = nanotime()
		w.due = append(w.due, deferred{g, wait, w.now + delay})
	}
	return fire
}

// fireDue raises the interrupts whose time has come.
func (w *Worker) fireDue() {
	keep := w.due[:0]
	for _, d := range w.due {
		switch {
		case d.at > w.now:
			keep = append(keep, d)
		case d.g.vector.held.expire(d.wait):
			if d.g.state != Absent { // deleted meanwhile: its counters are
				d.g.stats.Interrupts++
				d.g.unraised = 0
			}
			if c := d.g.ctl; !d.g.vector.fire() && c.pin.on.Load() && c.cfg.OnPin != nil {
				c.cfg.OnPin(c.pin.rung.Load(), 0) // the completions may be another worker's
			}
		}
	}
	clear(w.due[len(keep):])
	w.due = keep
}
