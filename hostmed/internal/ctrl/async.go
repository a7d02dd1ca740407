package ctrl

import (
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// What does not end while the session waits: admin commands that take long, and timers. Both have their work done
// elsewhere and come back by mail, which AdminKick reads, so that everything of a controller is
// still done by one goroutine.

// asyncLimit is how many commands may be run in the background at once; with more of them the next is not
// fetched.
const asyncLimit = 8

type async struct {
	mu     sync.Mutex // guards mail and closed
	mail   []func()
	closed bool

	running int // commands in the background that a completion is owed for
	epoch   int // counts resets: what was begun before one is owed nothing
	work    sync.WaitGroup
}

// Post makes the session's goroutine call fn soon. Any goroutine may call it; after Close it does nothing.
func (c *Controller) Post(fn func()) {
	c.async.mu.Lock()
	open := !c.async.closed
	if open {
		c.async.mail = append(c.async.mail, fn)
	}
	c.async.mu.Unlock()
	if open {
		c.cfg.Wake()
	}
}

// readMail does what was posted. Guest memory that faults under it is the end of the controller (R36).
func (c *Controller) readMail() {
	c.async.mu.Lock()
	mail := c.async.mail
	c.async.mail = nil
	c.async.mu.Unlock()
	for _, fn := range mail {
		c.guardedMail(fn)
	}
}

// after posts fn in d, unless stop is called before.
func (c *Controller) after(d time.Duration, fn func()) (stop func() bool) {
	return time.AfterFunc(d, func() { c.Post(fn) }).Stop
}

// background runs work, which may take long, in a goroutine of its own, and completes cmd with what finish says, which is called on
// the session's goroutine. work touches neither the controller nor guest memory. After a reset finish is
// called all the same, for what it has to put in order, and its result is dropped; after Close it is not.
func (c *Controller) background(cmd *nvme.Command, work func() error, finish func(error) result) result {
	saved, epoch := *cmd, c.async.epoch
	c.async.running++
	c.async.work.Go(func() {
		err := work()
		c.Post(func() {
			r := finish(err)
			c.logEnded(&saved, &r)
			if epoch != c.async.epoch {
				return
			}
			c.async.running--
			if c.ready {
				c.finish(&saved, r)
				c.interrupt()
			}
		})
	})
	return result{later: true}
}

// forgetBackground is for a reset: nobody waits for what is going on.
func (c *Controller) forgetBackground() {
	c.async.epoch++
	c.async.running = 0
}

// closeAsync waits for what runs in the background, and drops what it has to say.
func (c *Controller) closeAsync() {
	c.async.mu.Lock()
	c.async.closed = true
	c.async.mail = nil
	c.async.mu.Unlock()
	c.async.work.Wait()
}
