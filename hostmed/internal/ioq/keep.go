package ioq

import (
	"time"

	"github.com/shadowbell/shadowbell/hostmed/backend"
)

// What a medium keeps back, as one with faults does on purpose (backend.Keeper), nobody may wait for: not a reset, not the deletion of
// a queue, not an unmap. Each of these has it given up first.

// giveUp makes the media end the requests that they keep back and that which chooses, soon. aborted is backend.Keeper's. It runs on the
// worker's thread, and returns how many.
func (w *Worker) giveUp(aborted bool, which func(*request) bool) (n int) {
	for _, m := range w.queues {
		if k, ok := m.q.(backend.Keeper); ok {
			n += k.GiveUp(aborted, func(b *backend.Request) bool { return which(w.reqs[b.Owner]) })
		}
	}
	return n
}

// outlast returns when met, which is asked as until asks, says so. What the media keep back of those that which chooses is given up meanwhile, also
// what they begin to keep back only then.
func (w *Worker) outlast(which func(*request) bool, met func() bool) {
	w.until(w.giving(which, met))
}

// outlastFor is outlast as within is until.
func (w *Worker) outlastFor(most time.Duration, which func(*request) bool, met func() bool, then func()) bool {
	return w.within(most, w.giving(which, met), then)
}

// giving is met that gives up first, once each tick: it may be asked for as long as a medium hangs.
func (w *Worker) giving(which func(*request) bool, met func() bool) func() bool {
	begun := false
	return func() bool {
		if !begun || w.rounds%roundsPerTick == 0 || len(w.active) == 0 {
			begun = true
			w.giveUp(false, which)
		}
		return met()
	}
}
