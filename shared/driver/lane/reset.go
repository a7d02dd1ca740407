package lane

import (
	"errors"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// How a lane lives through a reset of the controller:
//
//  1. Pause: callers that start or wait sleep, pollers stop, nothing is reaped.
//  2. The controller is disabled: it writes no memory any more.
//  3. Lose: what had been completed is handed out, every other command is lost, or kept to be sent once more.
//  4. Renew: an empty queue over zeroed rings and new doorbells. The controller creates it.
//  5. Private: those who set the controller up may start commands; for the admin queue.
//  6. Resume: the commands that were kept go first, then whoever waits.
//
// A lane may be paused and lost again at any of these points, and may fail at any.

// mode says who may use the queue.
type mode uint8

const (
	running mode = iota // everybody
	private             // StartPrivate and StartForever
	paused              // nobody
)

var (
	errUnwanted = errors.New("nobody waits for it any more")
	errNoRoom   = errors.New("no slot to send it again")
)

func (l *Lane) open(priv bool) bool { return l.mode == running || priv && l.mode == private }

// Again is a Sink whose command can be sent once more after a reset.
type Again interface {
	Sink
	// Again fills in the command for a slot, as Source.Next does. After an error or false it is lost: false says that nobody waits
	// for it any more.
	Again(slot uint16, cmd *nvme.Command) (bool, error)
}

// Pause keeps everybody from the queue until Resume.
func (l *Lane) Pause() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mode = paused
}

// Lose ends the outstanding commands of a paused lane, whose device can write no memory any more. What it had completed before ends so.
// Of the others, those that can be sent again and were not before are kept if replay says so; the rest is lost, with an error that wraps
// queue.ErrReset and cause. Whoever waits for one that was late gets queue.ErrTimeout with it.
func (l *Lane) Lose(cause error, replay bool) {
	l.mu.Lock()
	defer l.unlock()
	if l.err != nil {
		return
	}
	l.mode = private
	l.reap()
	l.mode = paused
	if l.err == nil {
		l.lose(cause, replay)
	}
}

func (l *Lane) lose(cause error, replay bool) {
	// Those that were kept by an earlier Lose have not been sent since.
	if !replay {
		for _, o := range l.again {
			l.lost(o, cause)
		}
		l.again = nil
	}
	for i := range l.owners {
		o := l.owners[i]
		if o.sink == nil {
			continue
		}
		l.owners[i] = owner{}
		l.q.Cancel(uint16(i))
		if _, ok := o.sink.(Again); ok && replay && !o.forever && !o.second {
			l.again = append(l.again, o)
			continue
		}
		l.lost(o, cause)
	}
	l.forever = 0
}

// lost ends one command that the controller has forgotten.
func (l *Lane) lost(o owner, cause error) {
	err := fmt.Errorf("%w: %w", queue.ErrReset, cause)
	if o.late {
		err = fmt.Errorf("%w: %w after %.1f s (%w)", queue.ErrReset, queue.ErrTimeout, float64(l.q.Stamp()-o.started)/1e9, cause)
	}
	o.sink.Lost(err)
}

// Renew makes the queue of a paused lane new; see queue.Renew. The controller does not know it yet.
func (l *Lane) Renew(tail, head *dbbuf.Publisher) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.head = head
	return l.q.Renew(tail, head)
}

// Private lets those in who set the controller up.
func (l *Lane) Private() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mode = private
}

// Resume lets everybody in again, the commands that were kept first.
func (l *Lane) Resume() {
	l.mu.Lock()
	defer l.unlock()
	l.mode = running
	again := l.again
	l.again = nil
	if l.err != nil {
		l.again = again // for Drop
		return
	}
	now, sent := l.q.Stamp(), 0
	for _, o := range again {
		// There is room: they had slots before, in a queue of the same size.
		slot, ok := l.q.Take(0)
		if !ok {
			l.lost(o, errNoRoom)
			continue
		}
		l.cmd = nvme.Command{}
		wanted, err := o.sink.(Again).Again(slot, &l.cmd)
		if err != nil || !wanted {
			l.q.Cancel(slot)
			if err == nil {
				err = errUnwanted
			}
			l.lost(o, err)
			continue
		}
		l.owners[slot] = owner{sink: o.sink, started: now, second: true}
		l.q.Push(slot, &l.cmd)
		sent++
	}
	if sent > 0 && l.publish() != nil {
		return
	}
	l.offer()
	l.reap() // an interrupt may have come while it was paused
}

// Drop ends all outstanding commands. It is for a closed lane whose memory the device can no longer write.
func (l *Lane) Drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lose(ErrClosed, false)
}

// end hands out one completion. A command that was aborted because it was late is lost to who waits for it.
func (l *Lane) end(o owner, c *queue.Completion) {
	if o.forever {
		l.forever--
	}
	if o.late && c.Status.Code() == nvme.StatusAbortRequested {
		o.sink.Lost(fmt.Errorf("%w after %v, and was aborted", queue.ErrTimeout, time.Duration(l.q.Stamp()-o.started).Round(time.Millisecond)))
		return
	}
	if !o.forever {
		l.executed++
	}
	o.sink.Complete(c.Status, c.Result)
}

// busy reports whether commands with a deadline are outstanding.
func (l *Lane) busy() bool { return l.q.Outstanding() > l.forever }
