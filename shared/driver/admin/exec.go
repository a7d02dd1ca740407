package admin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/dma"
	"github.com/shadowbell/shadowbell/shared/driver/lane"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
)

// MaxData is the most bytes that one admin command moves.
const MaxData = 1 << 20

// Exec executes one admin command and returns its status and dword 0. data goes to the controller, comes from it, or both, as bits 1:0
// of the opcode say (NVMe Base 2.0c figure 139); it is copied, so that the device never sees it.
//
// An error means that the command did not end: ctx's, or the queue's. After a cancellation the device may still execute it. While the
// controller is reset commands that were not sent wait; those that were fail with queue.ErrReset: a Format or a Set Features is not sent twice
// behind the caller's back.
func (a *Admin) Exec(ctx context.Context, cmd nvme.Command, data []byte) (nvme.Status, uint32, error) {
	if len(data) > MaxData {
		return 0, 0, fmt.Errorf("%s: %d bytes of data, at most %d", cmd.Describe(true), len(data), MaxData)
	}
	c := &call{pool: a.cfg.Pool, cmd: cmd, w: lane.NewWaiter(), start: a.lane.Start}
	if err := c.attach(data); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", cmd.Describe(true), err)
	}
	end, hasEnd := ctx.Deadline()
	if hasEnd && ctx.Value(patientKey{}) != nil {
		c.patience = time.Until(end)
	}
	if private(ctx) {
		limit := a.cfg.Timeout
		if hasEnd {
			limit = min(limit, time.Until(end)/3) // a recovery has time for another attempt
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit, fmt.Errorf("%w after %v", queue.ErrTimeout, limit.Round(time.Millisecond)))
		defer cancel()
		c.start = a.lane.StartPrivate
	}
	if err := c.run(ctx, a.lane); err != nil {
		if private(ctx) && errors.Is(err, ctx.Err()) {
			err = context.Cause(ctx)
		}
		return 0, 0, fmt.Errorf("%s: %w", cmd.Describe(true), err)
	}
	if cmd.Opcode&fromController != 0 && c.status.OK() {
		copy(data, a.cfg.Pool.Bytes(c.data))
	}
	c.release()
	return c.status, c.result, nil
}

// exec is Exec for commands whose failure is an error.
func (a *Admin) exec(ctx context.Context, cmd nvme.Command, data []byte) (uint32, error) {
	status, result, err := a.Exec(ctx, cmd, data)
	if err == nil && !status.OK() {
		err = a.cfg.Refused(cmd, status)
	}
	return result, err
}

type privateKey struct{}

// Private returns a context for the commands of who sets the controller up after a reset, while all others wait. Each then has
// a deadline of its own, Config.Timeout at the most, so that a recovery can have another attempt.
func Private(ctx context.Context) context.Context { return context.WithValue(ctx, privateKey{}, true) }

type patientKey struct{}

// Patient returns a context whose deadline is that of the commands too, if it is later than Config.Timeout.
func Patient(ctx context.Context) context.Context { return context.WithValue(ctx, patientKey{}, true) }

func private(ctx context.Context) bool { return ctx.Value(privateKey{}) != nil }

// Bits 1:0 of an opcode: where the data goes.
const (
	toController   = 1
	fromController = 2
)

// call is one command on its way. Its last six fields are guarded by the lane's lock until it has ended.
type call struct {
	pool *dma.Pool
	cmd  nvme.Command
	w    *lane.Waiter
	data dma.Block
	list dma.Block

	start    func(lane.Source, *lane.Waiter) (int, error)
	patience time.Duration // until ctx ends, for Patient

	started bool
	ended   bool
	orphan  bool // nobody waits for it any more
	lost    error
	status  nvme.Status
	result  uint32
}

// attach gives the command memory for its data. The block is never larger than what was asked for by less than a page, and what lies
// behind the data is cleared with it.
func (c *call) attach(data []byte) error {
	if len(data) == 0 {
		return nil
	}
	block, err := c.pool.Take(uint64(len(data)))
	if err != nil {
		return err
	}
	c.data = block
	mem := c.pool.Bytes(block)
	clear(mem)
	if c.cmd.Opcode&toController != 0 {
		copy(mem, data)
	}
	var list prp.ListPage
	if n := prp.ListBytes(uint32(len(data)), pageSize); len(data) > 2*pageSize {
		if c.list, err = c.pool.Take(n); err != nil {
			c.release()
			return err
		}
		list.IOVA = c.pool.IOVA(c.list.Off)
		if list.Mem, err = c.pool.Region(c.list); err != nil {
			c.release()
			return err
		}
	}
	if err := prp.Build(&c.cmd, c.pool.IOVA(block.Off), uint32(len(data)), pageSize, list); err != nil {
		c.release()
		return err
	}
	return nil
}

func (c *call) release() {
	if c.data.Len != 0 {
		c.pool.Give(c.data)
	}
	if c.list.Len != 0 {
		c.pool.Give(c.list)
	}
	c.data, c.list = dma.Block{}, dma.Block{}
}

// Next and Complete are the lane's side.
func (c *call) Next(_ uint16, cmd *nvme.Command) (lane.Sink, error) {
	if c.started {
		return nil, nil
	}
	c.started = true
	*cmd = c.cmd
	return c, nil
}

func (c *call) Complete(status nvme.Status, result uint32) {
	c.status, c.result = status, result
	c.end()
}

// Lost is the end of a command that a reset went over.
func (c *call) Lost(err error) {
	c.lost = err
	c.end()
}

func (c *call) end() {
	c.ended = true
	if c.orphan {
		c.release()
		return
	}
	c.w.Signal()
}

// Patience lets a command take as long as its caller wants.
func (c *call) Patience() time.Duration { return c.patience }

// String is what a timeout calls the command.
func (c *call) String() string { return c.cmd.Describe(true) }

// run starts the command and waits for its end. After an error its memory is no longer the caller's.
func (c *call) run(ctx context.Context, l *lane.Lane) error {
	for {
		n, err := c.start(c, c.w)
		if n > 0 {
			break
		}
		if err == nil {
			err = l.Wait(ctx, c.w)
		}
		if err != nil {
			c.release()
			return err
		}
	}
	for {
		err := l.Wait(ctx, c.w)
		ended := false
		l.With(func() {
			ended = c.ended
			c.orphan = err != nil && !ended
		})
		if ended && c.lost != nil {
			c.release()
			return c.lost
		}
		if ended {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
