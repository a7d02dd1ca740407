package lane

import "time"

// listen sleeps on the interrupt, in the runtime's network poller, and reaps when it comes.
//
// It never reads the eventfd. The poller is edge-triggered and every write by the device is an edge; a read could block for ever,
// because the peer shares the file description and may clear its O_NONBLOCK (R34). An interrupt that comes while the function
// runs is kept by the poller.
func (l *Lane) listen() {
	defer close(l.done)
	_ = l.conn.Read(func(uintptr) bool {
		l.mu.Lock()
		defer l.unlock()
		if l.reap() > 0 {
			l.wakeups++
		}
		return l.err != nil
	})
}

const (
	minNap = 20 * time.Microsecond
	maxNap = time.Millisecond
)

// pollLoop stands in for the interrupt of a device that has none: while commands are outstanding it looks, less and less often.
func (l *Lane) pollLoop() {
	defer close(l.done)
	for {
		select {
		case <-l.work:
		case <-l.failed:
			return
		}
		for nap := minNap; l.look(&nap); {
			time.Sleep(nap)
			if l.cfg.Waiting != Poll {
				nap = min(nap+nap/4, maxNap)
			}
		}
	}
}

// look reaps, and reports whether commands are left that it is worth looking for. Events of the controller come when they come: Rescue
// finds them.
func (l *Lane) look(nap *time.Duration) bool {
	l.mu.Lock()
	defer l.unlock()
	l.naps++
	if l.reap() > 0 {
		*nap = minNap
		l.wakeups++
	}
	return l.err == nil && l.mode != paused && l.busy()
}
