package ioq

import (
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
	w.until(func() bool {
		w.giveUp(false, which)
		return met()
	})
}
