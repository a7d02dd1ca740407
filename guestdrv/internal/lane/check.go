package lane

import (
	"fmt"

	"github.com/shadowbell/shadowbell/guestdrv/internal/queue"
)

// Check looks for commands past their deadline and returns the first as an error that is queue.ErrTimeout. The lane does not fail by
// it: the caller can first find out more. It reaps before, so that an interrupt which was lost costs time and no more.
func (l *Lane) Check() error {
	l.mu.Lock()
	defer l.unlock()
	if l.err != nil || l.q.Outstanding() == 0 {
		return nil
	}
	l.rescued += uint64(l.reap())
	limit := int64(l.cfg.Timeout)
	if limit <= 0 || l.err != nil {
		return nil
	}
	now := l.q.Stamp()
	for slot := range l.owners {
		if o := &l.owners[slot]; o.sink != nil && !o.forever && now-o.started > limit {
			return fmt.Errorf("%v on queue %d: %w after %.1f s", o.sink, l.cfg.QID, queue.ErrTimeout, float64(now-o.started)/1e9)
		}
	}
	return nil
}
