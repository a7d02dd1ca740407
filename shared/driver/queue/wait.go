package queue

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// pollState is what a sleep needs, kept so that it allocates nothing.
type pollState struct {
	fds [1]unix.PollFd
	buf [8]byte
	vec [1][]byte
}

const (
	// spinsPerLook is how many looks at the CQ pass between two at the clock.
	spinsPerLook = 64
	// nap bounds one sleep in ms, so that cancellation and deadlines are seen.
	nap = 50
)

// Wait returns when a completion can be reaped, or with the error that ended the wait: the
// queue's, a command's deadline, or ctx's. It polls for as long as that has paid off
// lately, then asks for the interrupt and sleeps.
func (q *Queue) Wait(ctx context.Context) error {
	if q.cq.Ready() {
		return nil
	}
	if p := q.failed.Load(); p != nil {
		return *p
	}
	if q.Outstanding() == 0 {
		return fmt.Errorf("queue %d: waiting with no command outstanding", q.qid)
	}
	if q.eventFD < 0 {
		return q.pollOnly(ctx)
	}
	begin := q.Stamp()
	if limit := int64(q.budget.Limit()); limit > 0 && !q.noSpin {
		if q.quiet {
			q.head.SetQuiet(true)
		}
		for {
			for i := range spinsPerLook {
				if q.cq.Ready() {
					q.looks.untimed += uint64(i)
					q.looks.spent += q.clock - begin
					q.budget.Earned(time.Duration(q.clock - begin))
					return nil
				}
			}
			q.looks.timed += spinsPerLook
			if q.Stamp()-begin > limit {
				break
			}
		}
		q.looks.spent += q.clock - begin
		q.budget.Failed()
	}
	for !q.cq.Ready() {
		if err := q.sleep(); err != nil {
			return err
		}
		if q.cq.Ready() {
			break
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := q.Check(); err != nil {
			return err
		}
	}
	return nil
}

// looks counts looks at the CQ that found nothing. Only every 64th of them has a look at the clock behind it.
type looks struct {
	timed, untimed uint64
	spent          int64 // ns, for the timed ones
}

// Polled is the time that Wait has spent with looking in vain, as far as it can be told without a look at the clock for each: what was not timed took as long as what
// was. A queue without an interrupt does not know.
func (q *Queue) Polled() time.Duration {
	l := &q.looks
	if l.timed == 0 {
		return 0
	}
	return time.Duration(float64(l.spent) * (1 + float64(l.untimed)/float64(l.timed)))
}

// pollOnly waits on a queue that has no interrupt.
func (q *Queue) pollOnly(ctx context.Context) error {
	for looks := uint32(1); !q.cq.Ready(); looks++ {
		if looks%4096 != 0 {
			continue
		}
		if err := q.Check(); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// sleep asks for an interrupt and waits for one, a nap long at the most.
func (q *Queue) sleep() error {
	if armed, err := q.Arm(); err != nil || !armed {
		return err
	}
	n, err := q.pollFD(nap)
	q.TraceWake()
	if n > 0 {
		q.Wakeups++
	}
	return err
}

func (q *Queue) pollFD(ms int) (int, error) {
	q.poll.fds[0] = unix.PollFd{Fd: int32(q.eventFD), Events: unix.POLLIN}
	n, err := unix.Poll(q.poll.fds[:], ms)
	if err == unix.EINTR {
		return 0, nil
	}
	if err != nil {
		return 0, q.Fail(fmt.Errorf("queue %d: waiting for its interrupt: %w", q.qid, err))
	}
	if n > 0 && q.poll.fds[0].Revents&unix.POLLIN == 0 {
		return 0, q.Fail(fmt.Errorf("queue %d: its interrupt eventfd reports %#x", q.qid, q.poll.fds[0].Revents))
	}
	return n, nil
}

// drain takes back what was signalled before, once: no peer keeps us here by signalling on. It reads without waiting whatever
// O_NONBLOCK says, which the peer may have cleared on the shared description (R34).
func (q *Queue) drain() {
	q.poll.vec[0] = q.poll.buf[:]
	if _, err := unix.Preadv2(q.eventFD, q.poll.vec[:], -1, unix.RWF_NOWAIT); err != unix.EOPNOTSUPP {
		return
	}
	// Before Linux 5.8: only once poll has said that it is readable.
	if n, err := q.pollFD(0); err == nil && n > 0 {
		_, _ = unix.Read(q.eventFD, q.poll.buf[:])
	}
}

// Arm asks for an interrupt. It returns false if there is no need to wait for one. Before it returns true it has seen, in this order: the head
// published and not quiet, the eventfd drained, no completion. The device posts and then looks for the quiet bit, so one of
// the two sees the other.
func (q *Queue) Arm() (bool, error) {
	if q.unpublished > 0 {
		if err := q.publishHead(); err != nil {
			return false, err
		}
	}
	q.head.SetQuiet(false)
	if q.eventFD >= 0 {
		q.drain()
	}
	if q.cq.Ready() || q.failed.Load() != nil {
		return false, nil
	}
	if q.trace != nil {
		q.TraceSleep(int64(nap) * int64(time.Millisecond))
	}
	return true, nil
}
