package lane

import (
	"context"
	"runtime"
	"time"
)

const (
	looksPerClock = 16 // looks at the CQ between two at the clock
	pause         = 64 // looks at the waiter's own flag between two at the CQ

	// pollSlice is how long a goroutine that only polls does so before it looks at its context and lets others run.
	pollSlice = 50 * time.Microsecond
)

// Wait returns nil once w has been signalled, or the error that ended the wait: the lane's, or ctx's. One goroutine of the lane at a
// time polls, for all of them, for as long as that has paid off lately; the others sleep, and so does that one when its time is up.
//
// After a nil the caller looks at what it waits for, and waits again if it is not there: a signal may be an old one.
func (l *Lane) Wait(ctx context.Context, w *Waiter) error {
	if w.ready.Swap(false) {
		return nil
	}
	l.mu.Lock()
	l.reap()
	if done, err := l.ended(w); done {
		l.unlock()
		return err
	}
	if !l.polling && l.mode != paused {
		if done, err := l.awake(ctx, w); done {
			l.unlock()
			return err
		}
	}
	w.asleep = true
	l.unlock()

	select {
	case <-w.wake:
		w.ready.Store(false)
		return nil
	case <-l.failed:
		return l.giveUp(w, l.Err())
	case <-ctx.Done():
		return l.giveUp(w, ctx.Err())
	}
}

// awake waits as long as the lane's way of waiting does without sleep, and reports whether that was enough.
func (l *Lane) awake(ctx context.Context, w *Waiter) (bool, error) {
	limit := l.budget.Limit()
	switch {
	case l.cfg.Waiting == Poll:
		return l.pollOnly(ctx, w)
	case l.cfg.Waiting == Sleep || limit == 0:
		l.arm()
	default:
		l.poll(w, limit)
	}
	return l.ended(w)
}

// pollOnly polls until w is signalled, and lets others run now and then. If another goroutine has begun to poll it does that for w too.
func (l *Lane) pollOnly(ctx context.Context, w *Waiter) (bool, error) {
	for !l.polling && l.mode != paused {
		l.poll(w, pollSlice)
		if done, err := l.ended(w); done {
			return true, err
		}
		if err := ctx.Err(); err != nil {
			l.room.remove(w)
			l.offer()
			w.ready.Store(false)
			return true, err
		}
		l.unlock()
		runtime.Gosched()
		l.mu.Lock()
	}
	return l.ended(w)
}

// ended reports whether w need not wait any more. It is called under the lock.
func (l *Lane) ended(w *Waiter) (bool, error) {
	if w.ready.Swap(false) {
		return true, nil
	}
	if l.err != nil {
		l.room.remove(w)
		return true, l.err
	}
	return false, nil
}

// giveUp leaves w as if it had never slept.
func (l *Lane) giveUp(w *Waiter, err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.room.remove(w)
	l.offer()
	if !w.asleep { // it was signalled at the same moment
		<-w.wake
	}
	w.asleep = false
	w.ready.Store(false)
	return err
}

// poll reaps for everybody until w is signalled, limit has passed or the lane has failed or is paused. It is called under the lock, holds it only
// for each look so that others can start commands, and returns with it. Afterwards the interrupt is on if anything is outstanding.
func (l *Lane) poll(w *Waiter, limit time.Duration) {
	l.polling = true
	if l.cfg.Quiet {
		l.head.SetQuiet(true)
	}
	l.mu.Unlock()
	begin := time.Now()
	var spent time.Duration
	for failed := false; !failed && spent < limit && !w.ready.Load(); spent = time.Since(begin) {
		failed = l.lookOften(w)
	}
	l.mu.Lock()
	l.polling = false
	if l.mode == paused {
		return
	}
	if w.ready.Load() {
		l.budget.Earned(spent)
	} else {
		l.budget.Failed()
	}
	if l.q.Outstanding() > 0 {
		l.arm()
	}
}

// lookOften takes some looks at the CQ, with longer pauses in between, unless w is signalled. It reports whether there is no point in more.
func (l *Lane) lookOften(w *Waiter) (failed bool) {
	for range looksPerClock {
		for range pause {
			if w.ready.Load() {
				return false
			}
		}
		if !l.mu.TryLock() {
			continue // whoever has it reaps, or starts something
		}
		l.reap()
		failed = l.err != nil || l.mode == paused
		l.unlock()
		if failed {
			return true
		}
	}
	if runtime.GOMAXPROCS(0) == 1 {
		runtime.Gosched() // or nobody who could signal w would run
	}
	return false
}

// arm turns the interrupt on and looks at the CQ once more. The device posts and then looks for the quiet bit; one of the two sees the
// other. It is called under the lock.
func (l *Lane) arm() {
	if l.mode == paused {
		return // the doorbells may be another queue's by now
	}
	l.head.SetQuiet(false)
	l.reap()
	if l.q.Outstanding() > 0 {
		l.q.TraceSleep(-1)
	}
}
