package guestdrv

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/device/devices"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/admin"
	"github.com/shadowbell/shadowbell/shared/driver/dma"
	"github.com/shadowbell/shadowbell/shared/driver/lane"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

const (
	// maxTransfer bounds the data of one command, whatever the controller allows.
	maxTransfer = 1 << 20
	// minPool is the least DMA memory that the queues and one transfer fit in.
	minPool = 1 << 20
)

// Open opens the controller that name says, for instance vfio-user:PATH (package device/devices has all kinds), and makes it ready for I/O.
// ctx ends the attempt only. After Open the package opens nothing more: no file, no socket, no shared memory.
func Open(ctx context.Context, name string, o Options) (*Controller, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	dev, err := devices.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	if notice := devices.Notice(dev); notice != "" {
		o.Logger.Warn(notice)
	}
	return OpenDevice(ctx, dev, o)
}

// numbers are those of controllers in event records.
var numbers atomic.Uint32

// OpenDevice is Open for a device of any kind, which becomes the controller's, also if it fails.
func OpenDevice(ctx context.Context, dev device.Device, o Options) (*Controller, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, errors.Join(err, dev.Close(), dev.Unmap())
	}
	c := &Controller{
		opts: o, log: o.Logger, dev: dev, number: uint16(numbers.Add(1)),
		pairs: map[*QueuePair]struct{}{}, late: make(chan lateCommand, 64), slow: make(chan struct{}, 1), changed: make(chan struct{}, 1),
	}
	c.spaces.Store(&spaces{})
	c.life, c.end = context.WithCancel(context.Background())
	c.gate.init()
	c.ops.New = c.newOp
	c.refs.Store(1)
	// Register accesses have no context: what ends them early is the end of the connection.
	stop := context.AfterFunc(ctx, func() { dev.Close() })
	err = c.setup(ctx)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		if ctxErr := ctx.Err(); ctxErr != nil && !errors.Is(err, ctxErr) {
			err = fmt.Errorf("%w: %w", ctxErr, err)
		}
		c.Close()
		return nil, err
	}
	return c, nil
}

// setup goes in this order because each step needs the one before.
func (c *Controller) setup(ctx context.Context) error {
	if err := c.allocate(); err != nil {
		return err
	}
	if err := c.openInterrupts(); err != nil {
		return err
	}
	if err := c.enable(ctx); err != nil {
		return err
	}
	if err := c.limits(); err != nil {
		return err
	}
	if err := c.arbitrate(ctx); err != nil {
		return err
	}
	if err := c.chooseDoorbells(ctx); err != nil {
		return err
	}
	if err := c.readNamespaces(ctx); err != nil {
		return err
	}
	if err := c.openLanes(ctx); err != nil {
		return err
	}
	c.watching.Add(1)
	go c.tellChanges(c.sizes())
	c.adm.WatchEvents(admin.Watcher{Namespaces: c.namespacesChanged})
	c.adm.RequestEvents(ctx)
	return c.begin()
}

func (c *Controller) allocate() error {
	if c.opts.DMASize < minPool {
		return fmt.Errorf("options: DMASize of %d bytes, at least %d", c.opts.DMASize, minPool)
	}
	mem, err := c.dev.AllocDMA(c.opts.DMASize)
	if err != nil {
		return err
	}
	c.mem = mem
	c.pool, err = dma.NewPool(mem, "raise Options.DMASize")
	return err
}

// openInterrupts takes a vector for the admin queue and for each queue that there may ever be, as far as the device has them.
func (c *Controller) openInterrupts() error {
	n := min(c.dev.MaxInterrupts(), 1+c.opts.Queues+c.opts.MaxQueuePairs)
	if n <= 0 {
		return nil
	}
	fds, err := c.dev.Interrupts(n)
	if err != nil {
		return fmt.Errorf("interrupts: %w", err)
	}
	c.eventFDs = fds
	for v := 1; v < n; v++ {
		c.vectors = append(c.vectors, v)
	}
	return nil
}

// takeEventFD hands over a vector's descriptor; who gets it closes it.
func (c *Controller) takeEventFD(vector int) int {
	fd := c.eventFDs[vector]
	c.eventFDs[vector] = -1
	return fd
}

func (c *Controller) enable(ctx context.Context) error {
	fd := -1
	if len(c.eventFDs) > 0 {
		fd = c.takeEventFD(0)
	}
	adm, err := admin.Open(ctx, admin.Config{
		Device: c.dev, Pool: c.pool, EventFD: fd, Timeout: c.opts.Timeout, Logger: c.log,
		Weighted: c.opts.Arbitration != nil, Unsupported: ErrUnsupported,
		Failed:  func(err error) { c.fail(err) },
		Refused: func(cmd nvme.Command, status nvme.Status) error { return &StatusError{cmd, true, status} },
	})
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.adm = adm // what fail looks at
	c.mu.Unlock()
	c.watching.Add(1)
	go c.watch()
	return adm.Identify(ctx)
}

// limits works out what one command may move.
func (c *Controller) limits() error {
	c.maxTransfer = c.transferLimit()
	if c.opts.SGL && c.adm.Identity().SGLS&(nvme.SGLSByteAligned|nvme.SGLSDwordAligned) == 0 {
		return fmt.Errorf("its SGLs (SGLS %#x): %w", c.adm.Identity().SGLS, ErrUnsupported)
	}
	return nil
}

func (c *Controller) transferLimit() uint32 {
	n := c.adm.Identity().MaxTransfer(c.adm.Capabilities().MPSMIN())
	if n == 0 {
		n = maxTransfer
	}
	return uint32(min(n, maxTransfer))
}

// chooseDoorbells shares the doorbell pages if they are wanted and offered. A controller that then refuses them is used
// without (R26), unless they were demanded.
func (c *Controller) chooseDoorbells(ctx context.Context) error {
	if c.opts.Doorbells != DoorbellsMMIO {
		if err := c.shareDoorbells(ctx); err != nil {
			if c.opts.Doorbells == DoorbellsShadow || ctx.Err() != nil || c.Err() != nil {
				return fmt.Errorf("shared doorbell pages: %w", err)
			}
			c.log.Info("no shared doorbell pages", "reason", err, "doorbells", c.Doorbells())
		}
	}
	c.shared = c.adm.Shared()
	if !c.adm.QuietOffered() || c.Doorbells() == "mmio" {
		return nil
	}
	if err := c.adm.EnableQuiet(ctx); err != nil {
		if ctx.Err() != nil || c.Err() != nil {
			return err
		}
		c.log.Info("no quiet polling", "reason", err)
		return nil
	}
	c.quiet = true
	return nil
}

func (c *Controller) shareDoorbells(ctx context.Context) error {
	if !c.opts.Vendor2014 && !c.adm.DoorbellsOffered() {
		return fmt.Errorf("its Doorbell Buffer Config (OACS bit 8): %w", ErrUnsupported)
	}
	return c.adm.ShareDoorbells(ctx, c.opts.Vendor2014)
}

// openLanes asks for the queues and creates those of the plain API.
func (c *Controller) openLanes(ctx context.Context) error {
	granted, err := c.grant(ctx)
	if err != nil {
		return err
	}
	c.regrant(granted)
	// One queue always, more only with interrupts of their own, unless they need none.
	n := min(c.opts.Queues, granted)
	if c.opts.Completions != CompletionsPoll {
		n = max(min(n, len(c.vectors)), 1)
	}
	for range n {
		if err := c.openLane(ctx); err != nil {
			return err
		}
	}
	return nil
}

// grant asks for as many queue pairs as there may ever be, and returns how many can be used.
func (c *Controller) grant(ctx context.Context) (int, error) {
	granted, err := c.adm.QueueCount(ctx, min(c.opts.Queues+c.opts.MaxQueuePairs, 65535))
	if err != nil {
		return 0, err
	}
	granted = min(granted, int(c.adm.MaxQID()))
	if granted < 1 {
		return 0, fmt.Errorf("the controller has no I/O queue whose doorbells can be reached: %v, BAR0 of %#x bytes", c.Capabilities(), c.dev.RegisterSpace())
	}
	return granted, nil
}

func (c *Controller) openLane(ctx context.Context) error {
	poll := c.opts.Completions == CompletionsPoll
	qid, vector, err := c.takeQueue(!poll && len(c.vectors) > 0)
	if err != nil {
		return err
	}
	// The lane waits and keeps the deadlines; the queue does neither.
	q, err := c.newIOQueue(ctx, c.epoch(), qid, c.opts.QueueDepth, vector, c.opts.Priority, queue.Config{EventFD: -1})
	if err != nil {
		return err
	}
	if err := q.addAllLists(); err != nil {
		return err
	}
	fd := -1
	if vector != noVector {
		fd = c.takeEventFD(vector)
	}
	l, err := lane.New(lane.Config{
		Queue: q.q, Head: q.head, QID: qid, EventFD: fd, Quiet: c.quiet && !poll, Timeout: c.opts.Timeout,
		Waiting: c.opts.Completions.waiting(), Failed: func(err error) { c.fail(err) },
	})
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lanes = append(c.lanes, &ioLane{Lane: l, io: q})
	return c.now.err
}

// Close ends the controller in order: whoever waits for I/O gets ErrClosed, the controller is told to shut down and is disabled, each
// with a limit of some seconds, and the connection is closed. Memory stays mapped until the last Buffer and QueuePair is given back.
// Only the first call does anything. The error is that of the shutdown; everything is released all the same.
func (c *Controller) Close() error {
	c.mu.Lock()
	if c.closing {
		c.mu.Unlock()
		return nil
	}
	c.closing = true
	c.mu.Unlock()

	healthy := c.healthy()
	c.fail(ErrClosed)
	c.markClosed()
	c.gate.shut()
	c.watching.Wait()

	for _, l := range c.lanes {
		l.Close()
	}
	var err error
	if c.adm != nil {
		c.adm.Close()
		err = c.shutdown(healthy)
	}
	err = errors.Join(err, c.dev.Close())
	// From here on the device has no memory of ours, or no right to it.
	for _, l := range c.lanes {
		l.Drop()
		l.io.give()
	}
	if c.adm != nil {
		c.adm.Drop()
	}
	c.release()
	return err
}

// shutdown stops the controller, if it can still be reached. What a controller that has failed says to that is of no interest.
func (c *Controller) shutdown(healthy bool) error {
	select {
	case <-c.dev.Done():
		if healthy {
			return c.gone()
		}
		return nil
	default:
	}
	err := c.adm.Shutdown()
	if !healthy {
		return nil
	}
	return err
}

// release drops one reference to the memory; the last one unmaps it.
func (c *Controller) release() {
	if c.refs.Add(-1) > 0 {
		return
	}
	var err error
	if c.mem != nil {
		err = c.mem.Free()
	}
	err = errors.Join(err, c.dev.Unmap())
	for _, fd := range c.eventFDs {
		if fd >= 0 {
			err = errors.Join(err, unix.Close(fd))
		}
	}
	c.eventFDs = nil
	if err != nil {
		c.log.Error("releasing memory", "error", err)
	}
}
