package lane

import (
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/queue"
)

// Rescue reaps, so that an interrupt which was lost costs time and no more, and reports whether commands with a deadline are
// outstanding.
func (l *Lane) Rescue() (busy bool) {
	l.mu.Lock()
	defer l.unlock()
	if l.err != nil || l.mode == paused || l.q.Outstanding() == 0 {
		return false
	}
	n := l.reap()
	if l.file != nil {
		l.rescued += uint64(n)
	}
	return l.busy()
}

// Patient is a Sink whose command may take longer than others.
type Patient interface {
	Sink
	// Patience returns how long, from Start on, if that is more than Config.Timeout.
	Patience() time.Duration
}

// Late returns the commands that have passed their deadline since the last call.
func (l *Lane) Late() []queue.Late {
	l.mu.Lock()
	defer l.mu.Unlock()
	var late []queue.Late
	l.eachLate(func(slot uint16, o *owner) {
		if !o.late {
			o.late = true
			late = append(late, queue.Late{QID: l.cfg.QID, CID: l.q.CID(slot), Err: l.tooLate(o)})
		}
	})
	return late
}

// Overdue returns an error about a command that Late has told of and that is still outstanding, or nil.
func (l *Lane) Overdue() (err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.eachLate(func(_ uint16, o *owner) {
		if o.late && err == nil {
			err = l.tooLate(o)
		}
	})
	return err
}

func (l *Lane) eachLate(f func(uint16, *owner)) {
	limit := int64(l.cfg.Timeout)
	if l.cfg.Timeout <= 0 || l.err != nil || l.mode == paused || l.q.Outstanding() == 0 {
		return
	}
	now := l.q.Stamp()
	for slot := range l.owners {
		o := &l.owners[slot]
		if o.sink == nil || o.forever || now-o.started <= limit {
			continue
		}
		if p, ok := o.sink.(Patient); ok && now-o.started <= int64(p.Patience()) {
			continue
		}
		f(uint16(slot), o)
	}
}

func (l *Lane) tooLate(o *owner) error {
	return fmt.Errorf("%v on queue %d: %w after %.1f s", o.sink, l.cfg.QID, queue.ErrTimeout, float64(l.q.Stamp()-o.started)/1e9)
}
