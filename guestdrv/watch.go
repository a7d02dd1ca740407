package guestdrv

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/queue"
)

const (
	// The watch looks after deadlines this often, Options.Timeout/8 within these bounds.
	minTick = 5 * time.Millisecond
	maxTick = time.Second
	// lookEvery is how often it reads CSTS while commands are outstanding. An idle controller is not asked.
	lookEvery = time.Second
	// A command has this long to end once it was aborted: a quarter of its deadline within these bounds.
	minGrace = 20 * time.Millisecond
	maxGrace = 2 * time.Second
)

// lateCommand is a command of a pair that is past its deadline. old: it is still there after its Abort.
type lateCommand struct {
	queue.Late
	old   bool
	epoch uint64
}

// grace is how long a command that was aborted has to end.
func (o *Options) grace() time.Duration { return min(max(o.Timeout/4, minGrace), maxGrace) }

// watch looks after deadlines and the device's life until the controller fails or is closed. What takes time, it leaves to heal, of
// which there is one at a time.
func (c *Controller) watch() {
	defer c.watching.Done()
	ticker := time.NewTicker(min(max(c.opts.Timeout/8, minTick), maxTick))
	defer ticker.Stop()
	var healing chan struct{} // closed when heal has ended; nil: it does not run
	var asked time.Time       // when CSTS was read last
	var late []queue.Late
	var meanwhile []lateCommand // told while heal runs
	var aborting bool           // heal runs because of late commands
	var aborted time.Time       // when that had ended last
	heal := func(cause error) {
		done, commands := make(chan struct{}), late
		healing, late, aborting = done, nil, len(late) > 0
		go func() {
			defer close(done)
			c.heal(commands, cause)
		}()
	}
	for {
		select {
		case <-c.life.Done():
			if healing != nil {
				<-healing
			}
			return
		case <-c.dev.Done():
			c.fail(c.gone())
		case <-healing:
			healing = nil
			if aborting {
				aborted = time.Now()
			}
			for _, l := range meanwhile {
				if l.epoch == c.epoch() { // what was late before a reset is not any more
					late = append(late, l.Late)
				}
			}
			if meanwhile = nil; len(late) > 0 {
				heal(nil)
			}
		case l := <-c.late:
			switch {
			case l.epoch != c.epoch():
			case l.old && (healing != nil || time.Since(aborted) < c.opts.grace()/2): // told before that had ended: it tells again, if it is still there
			case healing != nil: // next time it is an old one, which Abort was not tried on
				meanwhile = append(meanwhile, l)
			case l.old:
				heal(&l.Late)
			default:
				late = append(late, l.Late)
				heal(nil)
			}
		case <-c.slow:
			if healing == nil {
				heal(nil)
			}
		case now := <-ticker.C:
			busy := c.rescue()
			if healing != nil {
				continue
			}
			look := busy && now.Sub(asked) >= lookEvery
			if look {
				asked = now
			}
			adminErr := error(nil)
			if l := c.adm.Lane().Late(); len(l) > 0 {
				adminErr = l[0].Err
				c.trouble.timeouts.Add(uint64(len(l)))
			}
			for _, l := range c.allLanes() {
				late = append(late, l.Late()...)
			}
			if look || adminErr != nil || len(late) > 0 {
				heal(adminErr)
			}
		}
	}
}

func (c *Controller) allLanes() []*ioLane {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lanes
}

// rescue reaps in all lanes, and reports whether commands with a deadline are outstanding.
func (c *Controller) rescue() bool {
	busy := c.adm.Lane().Rescue()
	for _, l := range c.allLanes() {
		busy = l.Rescue() || busy
	}
	return busy
}

// heal finds out what is wrong and does something about it: late are commands past their deadline, cause is set if Abort cannot help. With
// neither it only looks whether the controller is well.
func (c *Controller) heal(late []queue.Late, cause error) {
	c.trouble.timeouts.Add(uint64(len(late)))
	err := c.adm.Look()
	switch {
	case errors.Is(err, ErrGone):
		c.fail(c.withCommand(late, cause, err))
		return
	case errors.Is(err, ErrFatal):
		cause = c.withCommand(late, cause, err)
	case err != nil:
		// Its registers do not answer: recover finds out whether that stays so.
		cause = c.withCommand(late, cause, fmt.Errorf("reading its status: %w", err))
	}
	if cause == nil && len(late) > 0 {
		cause = c.abort(late)
	}
	if cause != nil {
		c.recover(cause)
	}
}

// withCommand adds what was late to what the registers say.
func (c *Controller) withCommand(late []queue.Late, cause, err error) error {
	if cause == nil && len(late) > 0 {
		cause = late[0].Err
	}
	if cause == nil {
		return err
	}
	return fmt.Errorf("%w (%w)", cause, err)
}

// abort asks the controller to abort what is late, and returns nil if that ends it within the grace. Those of pairs tell again when it does
// not. The controller executes no more Aborts at one time than ACL says: here it is one.
func (c *Controller) abort(late []queue.Late) error {
	ctx, cancel := context.WithTimeout(c.life, c.opts.grace())
	defer cancel()
	c.log.Warn("commands are late, aborting them", "number", len(late), "first", late[0].Err)
	for _, l := range late {
		c.trouble.aborts.Add(1)
		if err := c.adm.Abort(ctx, l.QID, l.CID); err != nil {
			return fmt.Errorf("%w, nor did its Abort end: %w", l.Err, err)
		}
	}
	for {
		c.rescue()
		err := c.overdue()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Millisecond):
		}
	}
}

// overdue returns an error about a command that was late before and still is outstanding.
func (c *Controller) overdue() error {
	for _, l := range c.allLanes() {
		if err := l.Overdue(); err != nil {
			return err
		}
	}
	return nil
}

func (c *Controller) gone() error {
	if err := c.dev.Err(); errors.Is(err, ErrGone) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrGone, c.dev.Err())
}
