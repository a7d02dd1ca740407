package guestdrv

import (
	"context"
	"errors"

	"github.com/shadowbell/shadowbell/shared/driver/admin"
)

// state is where a controller is in its life:
//
//	           begin            resume
//	opening ----------> live <----------.
//	   |   (opened)      |  `-> recovering
//	   |                 |          |
//	   `------ fail -----+---------'
//	                     v
//	                   failed ----> closed
//
//	opening -> live        Open has set everything up
//	live -> recovering     a command timed out and could not be aborted, an admin command timed out, CSTS.CFS
//	recovering -> live     everything is set up again
//	any -> failed          the device is gone or broke the protocol; opening failed; a recovery failed, or too many did no good
//	any -> closed          Close
//
// Whoever is late for a change finds out by the error: fail takes the first one only.
type state uint8

const (
	opening state = iota
	live
	recovering
	failed
	closed
)

// lifeState is guarded by Controller.mu.
type lifeState struct {
	state   state
	err     error         // failed and closed: why
	epoch   uint64        // counts resets: queues of an earlier one are gone
	futile  admin.Futile  // resets without a command that was executed in between
	changed chan struct{} // closed at the end of recovering; nil: nobody waits
}

// errStale is a queue that was begun before a reset and finished after it.
var errStale = errors.New("the controller was reset meanwhile")

// Err returns why the controller failed, ErrClosed after Close, or nil: also while it is being reset.
func (c *Controller) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now.err
}

// epoch returns how many resets there were.
func (c *Controller) epoch() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now.epoch
}

// healthy reports whether the controller can be told to shut down: neither failed nor in the middle of a reset.
func (c *Controller) healthy() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now.state == opening || c.now.state == live
}

// enter changes the state. It is called under mu.
func (c *Controller) enter(s state) {
	c.now.state = s
	if c.now.changed != nil {
		close(c.now.changed)
		c.now.changed = nil
	}
}

// begin makes a controller that was set up live.
func (c *Controller) begin() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now.err == nil {
		c.enter(live)
	}
	return c.now.err
}

// awaitLive waits for the end of a recovery that is under way, and returns the epoch, or why the controller has failed.
func (c *Controller) awaitLive(ctx context.Context) (epoch uint64, err error) {
	for {
		c.mu.Lock()
		now := c.now
		if now.state == recovering && now.changed == nil {
			c.now.changed = make(chan struct{})
			now.changed = c.now.changed
		}
		c.mu.Unlock()
		if now.err != nil || now.state != recovering {
			return now.epoch, now.err
		}
		select {
		case <-now.changed:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// fail ends everything with err, unless it has ended before, and returns with what. Commands that are outstanding stay the controller's,
// memory and all, until Close.
func (c *Controller) fail(err error) error {
	c.mu.Lock()
	if c.now.err != nil {
		defer c.mu.Unlock()
		return c.now.err
	}
	c.now.err = err
	if errors.Is(err, ErrClosed) {
		c.enter(closed)
	} else {
		c.enter(failed)
	}
	for p := range c.pairs {
		_ = p.q.Fail(err)
	}
	lanes, adm := c.lanes, c.adm
	c.mu.Unlock()

	c.end()
	for _, l := range lanes {
		l.Fail(err)
	}
	if adm != nil {
		adm.Lane().Fail(err)
	}
	if !errors.Is(err, ErrClosed) {
		c.log.Error("controller failed", "error", err)
	}
	return err
}

// markClosed makes ErrClosed the error of calls that come later, also when the controller had failed before.
func (c *Controller) markClosed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now.err = ErrClosed
	c.enter(closed)
}
