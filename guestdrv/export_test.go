package guestdrv

import "github.com/shadowbell/shadowbell/guestdrv/internal/queue"

// ForceReset makes the controller be reset, as for a command that is late and cannot be aborted.
func (c *Controller) ForceReset(cause error) {
	c.late <- lateCommand{Late: queue.Late{Err: cause}, old: true, epoch: c.epoch()}
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
