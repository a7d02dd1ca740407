package guestdrv

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/admin"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
)

// How a controller that does not answer, or reports a fatal error, is brought back:
//
//  1. beginRecovery: live -> recovering. Pairs fail with ErrReset: their owners close them and make others.
//  2. Lanes are paused: callers wait, pollers stop, nothing is reaped.
//  3. The controller is stopped: CC.EN = 0, or else a reset of the function. From here on it writes no memory.
//  4. Only now are outstanding commands lost, and their memory given back; or kept, to be sent once more (ResetReplay).
//  5. restart: everything that Open set up is set up again.
//  6. finishRecovery: recovering -> live. Lanes go on, what was kept first.
//
// A step that fails is tried again from 2 on, within Options.ResetTimeout. When that does not help the controller fails for good.

// recover resets the controller because of cause. It is called by heal only.
func (c *Controller) recover(cause error) {
	if !c.beginRecovery(cause) {
		return
	}
	begin := time.Now()
	stop := func(ctx context.Context) error {
		c.pause()
		if err := c.adm.Stop(ctx); err != nil {
			return err
		}
		c.lose(cause)
		return nil
	}
	if err := c.adm.Recover(c.life, c.opts.ResetTimeout, cause, stop, c.restart); err != nil {
		c.fail(err)
		return
	}
	if c.finishRecovery() == nil {
		c.log.Info("controller recovered", "after", time.Since(begin).Round(time.Microsecond))
	}
}

// beginRecovery makes a live controller recovering, and fails its pairs. It returns false for one that is not live, which fails if Open is
// under way.
func (c *Controller) beginRecovery(cause error) bool {
	executed := c.executed()
	c.mu.Lock()
	now := &c.now
	if now.state == opening {
		c.mu.Unlock()
		c.fail(fmt.Errorf("%w (%w)", cause, c.adm.Diagnose()))
		return false
	}
	if now.state != live {
		c.mu.Unlock()
		return false
	}
	if err := now.futile.Begin(cause, executed, c.progress.Swap(false), false); err != nil {
		c.mu.Unlock()
		c.fail(err)
		return false
	}
	now.epoch++
	c.trouble.resets.Add(1)
	c.enter(recovering)
	var late *queue.Late
	_ = errors.As(cause, &late)
	for p := range c.pairs {
		why := cause
		if late == nil || late.QID != p.io.qid {
			why = hideTimeout(cause)
		}
		_ = p.q.Fail(fmt.Errorf("queue pair %d: %w: %w", p.io.qid, ErrReset, why))
	}
	c.mu.Unlock()
	return true
}

// executed counts the commands of lanes that the controller has ended by itself, whatever their status.
func (c *Controller) executed() (n uint64) {
	for _, l := range c.allLanes() {
		n += l.Stats().Executed
	}
	return n
}

// finishRecovery makes the controller live and lets everybody go on.
func (c *Controller) finishRecovery() error {
	c.mu.Lock()
	if c.now.err == nil {
		c.enter(live)
	}
	err := c.now.err
	c.mu.Unlock()
	c.adm.Lane().Resume()
	for _, l := range c.allLanes() {
		l.Resume()
	}
	return err
}

func (c *Controller) pause() {
	c.adm.Lane().Pause()
	for _, l := range c.allLanes() {
		l.Pause()
	}
}

// lose ends what was outstanding. The controller is stopped.
func (c *Controller) lose(cause error) {
	cause = hideTimeout(cause)
	c.adm.Lane().Lose(cause, false)
	for _, l := range c.allLanes() {
		l.Lose(cause, c.opts.OnReset == ResetReplay)
	}
}

// hideTimeout makes of an error that is about one command's deadline one that says so, and is not: other commands were not late.
func hideTimeout(err error) error {
	if errors.Is(err, ErrTimeout) {
		return &toldError{err}
	}
	return err
}

// toldError is an error that was about another command.
type toldError struct{ error }

func (e *toldError) Is(target error) bool { return target != ErrTimeout && errors.Is(e.error, target) }

// restart sets up again what Open has set up, in the same order, and insists that it can be as it was.
func (c *Controller) restart(ctx context.Context) error {
	if err := c.adm.Restart(ctx); err != nil {
		return err
	}
	if limit := c.transferLimit(); limit < c.maxTransfer {
		return fmt.Errorf("%w: commands move at most %d bytes, and before %d", admin.ErrChanged, limit, c.maxTransfer)
	}
	if err := c.arbitrate(ctx); err != nil {
		return err
	}
	if err := c.shareAgain(ctx); err != nil {
		return err
	}
	if err := c.queuesAgain(ctx); err != nil {
		return err
	}
	if err := c.readNamespaces(ctx); err != nil {
		return err
	}
	c.adm.RequestEvents(ctx)
	return nil
}

// shareAgain shares the doorbell pages if they were shared before (R28), and turns quiet polling on again.
func (c *Controller) shareAgain(ctx context.Context) error {
	if c.shared {
		if err := c.adm.ShareDoorbells(ctx, c.opts.Vendor2014); err != nil {
			return fmt.Errorf("shared doorbell pages: %w", err)
		}
	}
	if c.quiet {
		return c.adm.EnableQuiet(ctx)
	}
	return nil
}

// queuesAgain creates the queues of the lanes, with the identifiers and vectors that they had.
func (c *Controller) queuesAgain(ctx context.Context) error {
	granted, err := c.grant(ctx)
	if err != nil {
		return err
	}
	for _, l := range c.allLanes() {
		if int(l.io.qid) > granted {
			return fmt.Errorf("%w: %d I/O queues, and before %d at least", admin.ErrChanged, granted, l.io.qid)
		}
	}
	c.regrant(granted)
	for _, l := range c.allLanes() {
		if err := l.io.again(ctx, l.Lane); err != nil {
			return err
		}
	}
	return nil
}

// regrant changes how many queue identifiers there are. Those that pairs have come back, or not, with giveQueue.
func (c *Controller) regrant(granted int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var free []uint16
	for _, qid := range c.qids {
		if int(qid) <= granted {
			free = append(free, qid)
		}
	}
	for qid := c.granted + 1; qid <= granted; qid++ {
		free = append(free, uint16(qid))
	}
	c.qids, c.granted = free, granted
}

// lateness is what a pair tells of a command past its deadline. It is called by the pair's owner.
func (c *Controller) lateness(epoch uint64) func(queue.Late, bool) bool {
	return func(l queue.Late, old bool) bool {
		select {
		case c.late <- lateCommand{Late: l, old: old, epoch: epoch}:
			return true
		default:
			return false
		}
	}
}

// slowness is what a pair tells of a command that takes its time: the watch looks at the controller.
func (c *Controller) slowness() {
	select {
	case c.slow <- struct{}{}:
	default:
	}
}
