package guestdrv

import (
	"context"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/queue"
)

// ForceReset makes the controller be reset, as for a command that is late and cannot be aborted. It returns when the reset has begun: the watch
// hears nothing of it while it looks after something else.
func (c *Controller) ForceReset(cause error) {
	for epoch := c.epoch(); c.epoch() == epoch && c.Err() == nil; time.Sleep(time.Millisecond) {
		select {
		case c.late <- lateCommand{Late: queue.Late{Err: cause}, old: true, epoch: epoch}:
		default:
		}
	}
}

// ResetByForce is ForceReset, and waits for the end of the reset: what is sent while it begins may be lost by it.
func (c *Controller) ResetByForce(cause error) error {
	c.ForceReset(cause)
	return c.AwaitLive()
}

// AwaitLive waits for the end of a reset that is under way.
func (c *Controller) AwaitLive() error {
	_, err := c.awaitLive(context.Background())
	return err
}

// FreeMemory returns how many bytes of DMA memory are free.
func (c *Controller) FreeMemory() uint64 { return c.pool.Free() }

// Polls returns how often the lanes' goroutines that poll have looked.
func (c *Controller) Polls() uint64 {
	n := c.adm.Lane().Stats().Naps
	for _, l := range c.allLanes() {
		n += l.Stats().Naps
	}
	return n
}
