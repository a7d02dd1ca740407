package guestdrv

import (
	"context"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/driver/dma"
	"github.com/shadowbell/shadowbell/shared/driver/lane"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// How a call of Namespace becomes commands:
//
//  1. prepare cuts chunks off the request until the window is full, and gives each its memory: the caller's own if it is a
//     Buffer, otherwise a bounce block.
//  2. The lane takes them (Next), as many as it has slots, and publishes them together.
//  3. Complete, under the lane's lock, files each chunk under what has ended.
//  4. collect copies data out and gives the memory back.
//  5. When the wait ends early, abandon leaves the chunks that the device still has to themselves: they give their memory
//     back when they end.

const (
	// window is how many commands of one call are under way at one time.
	window = 8
	// bounceChunk is the most bytes of a command whose data is copied: copying one and moving another go on at the same time.
	bounceChunk = 128 << 10
	// maxZeroes and maxDiscard are the most blocks of one Write Zeroes, and of one range of Dataset Management.
	maxZeroes  = 1 << 16
	maxDiscard = 1 << 31
)

// request is what one call wants.
type request struct {
	opcode uint8
	lba    uint64
	blocks uint64
	data   []byte // blocks << shift bytes, or nil
	flags  uint32 // of CDW12, for Write and Write Zeroes
}

// op is one call under way.
type op struct {
	ns   *Namespace
	lane *ioLane
	w    *lane.Waiter
	req  request

	next   uint64 // blocks that chunks have been cut for
	whole  bool   // a request without blocks, which is one command: not yet cut
	direct bool   // data is memory of the pool, at
	at     uint64 // this offset

	chunks [window]chunk
	free   []*chunk // not in use
	ready  []*chunk // prepared, not started
	full   bool     // the lane had no slot for any of them

	// Guarded by the lane's lock.
	flying int
	ended  []*chunk

	bad uint64 // first block of the first chunk that did not succeed
	err error  // why
}

// chunk is one command.
type chunk struct {
	op     *op
	cmd    nvme.Command
	first  uint64 // block, relative to the request
	blocks uint64
	bytes  uint32 // of data at iova
	iova   uint64
	bounce dma.Block   // Len 0: none
	pin    *dma.Buffer // nil: none

	// Guarded by the lane's lock.
	flying bool
	orphan bool // nobody waits for it
	status nvme.Status
	err    error // it was lost
}

const allGood = ^uint64(0)

// newOp makes an op with a lane of its own choice. Ops are kept by sync.Pool, so goroutines on one core stay with one lane.
func (c *Controller) newOp() any {
	o := &op{
		lane: c.lanes[int(c.nextLane.Add(1)-1)%len(c.lanes)], w: lane.NewWaiter(),
		free: make([]*chunk, 0, window), ready: make([]*chunk, 0, window), ended: make([]*chunk, 0, window),
	}
	for i := range o.chunks {
		o.chunks[i].op = o
		o.free = append(o.free, &o.chunks[i])
	}
	return o
}

// run executes a request and returns how many bytes of data, from the first on, are done.
func (c *Controller) run(ctx context.Context, ns *Namespace, r request) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := ns.Err(); err != nil {
		return 0, err
	}
	if !c.gate.enter() {
		return 0, ErrClosed
	}
	defer c.gate.leave()
	o := c.ops.Get().(*op)
	o.ns, o.req = ns, r
	o.next, o.whole, o.bad, o.err = 0, r.blocks == 0, allGood, nil
	o.at, o.direct = 0, false
	if r.data != nil {
		off, ok := c.pool.Find(r.data)
		o.at, o.direct = off, ok && off&3 == 0
	}
	reusable := o.drive(ctx)
	n, err := len(r.data), o.err
	if err != nil {
		n = int(min(o.bad, o.next) << ns.shift)
		err = c.explain(err)
	}
	o.ns, o.req, o.err = nil, request{}, nil
	if reusable {
		c.ops.Put(o)
	}
	return n, err
}

// drive runs until everything has ended, or nothing is waited for any more. It reports whether the device has no chunk
// of o left.
func (o *op) drive(ctx context.Context) (reusable bool) {
	for {
		if o.err == nil {
			o.prepare(ctx)
		}
		busy, err := o.start()
		if err == nil {
			if busy == 0 && len(o.ready) == 0 {
				o.leave()
				return true
			}
			err = o.lane.Wait(ctx, o.w)
		}
		o.collect()
		if err != nil {
			return o.abandon(err)
		}
	}
}

// prepare cuts chunks until the window is full, there is nothing left to cut, or memory is short. It waits for memory only if nothing
// is under way that would give some back.
func (o *op) prepare(ctx context.Context) {
	for o.err == nil && len(o.free) > 0 && (o.next < o.req.blocks || o.whole) {
		last := len(o.free) - 1
		c := o.free[last]
		if !o.cut(ctx, c) {
			return
		}
		o.free = o.free[:last]
		o.ready = append(o.ready, c)
	}
}

// idle reports whether o has no chunk in use.
func (o *op) idle() bool { return len(o.free) == window }

// cut makes c the next chunk. It returns false if there is no memory for it, now or, with o.err set, at all.
func (o *op) cut(ctx context.Context, c *chunk) bool {
	r := &o.req
	c.first, c.bytes, c.bounce, c.pin, c.orphan, c.err = o.next, 0, dma.Block{}, nil, false, nil
	c.blocks = min(r.blocks-o.next, o.mostBlocks())
	var ok bool
	switch {
	case r.opcode == nvme.IODSM:
		ok = o.cutDiscard(ctx, c)
	case r.data == nil:
		ok = true
	case o.direct:
		ok = o.cutDirect(c)
	default:
		ok = o.cutBounce(ctx, c)
	}
	if !ok {
		return false
	}
	o.next += c.blocks
	o.whole = false
	o.command(c)
	return true
}

// mostBlocks is how many blocks one command of the request may have.
func (o *op) mostBlocks() uint64 {
	switch {
	case o.req.opcode == nvme.IODSM:
		return maxDiscard
	case o.req.data == nil:
		return maxZeroes
	case o.direct:
		return min(uint64(o.ns.c.maxTransfer)>>o.ns.shift, maxZeroes)
	}
	return max(min(uint64(o.ns.c.maxTransfer), bounceChunk)>>o.ns.shift, 1)
}

// cutDirect pins the caller's memory, so that it is not given to others before the command has ended.
func (o *op) cutDirect(c *chunk) bool {
	pool := o.ns.c.pool
	off := o.at + c.first<<o.ns.shift
	c.bytes = uint32(c.blocks << o.ns.shift)
	pin, err := pool.Pin(off, uint64(c.bytes))
	if err != nil {
		o.fail(c.first, err)
		return false
	}
	c.pin, c.iova = pin, pool.IOVA(off)
	return true
}

// cutBounce takes memory of the pool, fewer blocks if there is little of it, and copies data that is to be written into it.
func (o *op) cutBounce(ctx context.Context, c *chunk) bool {
	if !o.takeBounce(ctx, c, c.blocks<<o.ns.shift, 1<<o.ns.shift) {
		return false
	}
	c.blocks = min(c.blocks, c.bounce.Len>>o.ns.shift)
	c.bytes = uint32(c.blocks << o.ns.shift)
	if o.req.opcode != nvme.IORead {
		copy(o.ns.c.pool.Bytes(c.bounce), o.data(c))
	}
	return true
}

func (o *op) cutDiscard(ctx context.Context, c *chunk) bool {
	if !o.takeBounce(ctx, c, dsmRangeSize, dsmRangeSize) {
		return false
	}
	c.bytes = dsmRangeSize
	putRange(o.ns.c.pool.Bytes(c.bounce), o.req.lba+c.first, uint32(c.blocks))
	return true
}

func (o *op) takeBounce(ctx context.Context, c *chunk, n, least uint64) bool {
	pool := o.ns.c.pool
	var ok bool
	if c.bounce, ok = pool.TryBounce(n, least); !ok {
		if !o.idle() {
			return false
		}
		var err error
		if c.bounce, err = pool.TakeBounce(ctx, o.lane.Failed(), n, least); err != nil {
			if laneErr := o.lane.Err(); laneErr != nil {
				err = laneErr
			}
			o.fail(c.first, err)
			return false
		}
	}
	c.iova = pool.IOVA(c.bounce.Off)
	return true
}

// data is c's part of the caller's memory.
func (o *op) data(c *chunk) []byte {
	begin := c.first << o.ns.shift
	return o.req.data[begin : begin+uint64(c.bytes)]
}

// command builds c.cmd but for the data pointer, which needs the slot.
func (o *op) command(c *chunk) {
	c.cmd = nvme.Command{Opcode: o.req.opcode, NSID: o.ns.nsid}
	switch o.req.opcode {
	case nvme.IOFlush:
	case nvme.IODSM:
		c.cmd.CDW11 = nvme.DSMDeallocate // one range
	default:
		blocks, _ := nvme.ToZeroBased16(uint32(c.blocks)) // 1 to 65536, see mostBlocks
		c.cmd.SetRW(o.req.opcode, o.ns.nsid, o.req.lba+c.first, blocks)
		c.cmd.CDW12 |= o.req.flags
	}
}

// start hands the lane what is ready, and returns how many commands have not been collected.
func (o *op) start() (busy int, err error) {
	if len(o.ready) > 0 {
		var n int
		n, err = o.lane.Start(o, o.w)
		o.full = n == 0 && err == nil
		if o.err != nil {
			err = nil // a chunk that cannot be pointed at its data is not the lane's failure
		}
	}
	o.lane.With(func() { busy = o.flying + len(o.ended) })
	return busy, err
}

// leave gives up the place in the queue for a slot, if o has one.
func (o *op) leave() {
	if o.full {
		o.full = false
		o.lane.Leave(o.w)
	}
}

// Next gives the lane the next chunk that is ready.
func (o *op) Next(slot uint16, cmd *nvme.Command) (lane.Sink, error) {
	if len(o.ready) == 0 {
		return nil, nil
	}
	c := o.ready[0]
	if c.bytes > 0 {
		if err := o.lane.io.point(slot, &c.cmd, c.iova, c.bytes); err != nil {
			o.fail(c.first, err)
			return nil, err
		}
	}
	o.ready = append(o.ready[:0], o.ready[1:]...)
	*cmd = c.cmd
	c.flying = true
	o.flying++
	return c, nil
}

// String names the command for the error of a timeout.
func (c *chunk) String() string { return c.cmd.Describe(false) }

// Complete takes the end of the command.
func (c *chunk) Complete(status nvme.Status, _ uint32) {
	c.status = status
	c.land()
}

// Lost takes the end of a command that the controller has not executed as it should: it was aborted, or a reset went over it.
func (c *chunk) Lost(err error) {
	c.err = err
	c.land()
}

// Again is for a chunk that is sent once more after a reset. Its memory is still its own.
func (c *chunk) Again(slot uint16, cmd *nvme.Command) (bool, error) {
	if c.orphan {
		return false, nil
	}
	if c.bytes > 0 {
		if err := c.op.lane.io.point(slot, &c.cmd, c.iova, c.bytes); err != nil {
			return true, err
		}
	}
	*cmd = c.cmd
	return true, nil
}

func (c *chunk) land() {
	o := c.op
	c.flying = false
	if c.orphan {
		o.giveMemory(c)
		return
	}
	o.flying--
	o.ended = append(o.ended, c)
	o.w.Signal()
}

// collect deals with the chunks that have ended. If o has failed, those that were never started are dropped.
func (o *op) collect() {
	var ended [window]*chunk
	n := 0
	o.lane.With(func() {
		n = copy(ended[:], o.ended)
		o.ended = o.ended[:0]
	})
	for _, c := range ended[:n] {
		switch {
		case c.err != nil:
			o.fail(c.first, c.lost(c.err))
		case !c.status.OK():
			o.fail(c.first, &StatusError{Command: c.cmd, Status: c.status})
		case o.req.opcode == nvme.IORead && c.bounce.Len != 0:
			copy(o.data(c), o.lane.io.c.pool.Bytes(c.bounce))
		}
		o.recycle(c)
	}
	if o.err != nil {
		o.dropReady()
	}
}

func (o *op) dropReady() {
	for _, c := range o.ready {
		o.fail(c.first, o.err)
		o.recycle(c)
	}
	o.ready = o.ready[:0]
}

func (o *op) recycle(c *chunk) {
	o.giveMemory(c)
	o.free = append(o.free, c)
}

// giveMemory is the one place where a chunk's memory goes back. It is called under the lane's lock or without.
func (o *op) giveMemory(c *chunk) {
	if c.bounce.Len != 0 {
		o.lane.io.c.pool.GiveBounce(c.bounce)
		c.bounce = dma.Block{}
	}
	if c.pin != nil {
		c.pin.Unpin()
		c.pin = nil
	}
}

// fail records that the blocks from first on are not done. The error that counts is that of the lowest.
func (o *op) fail(first uint64, err error) {
	if first < o.bad {
		o.bad, o.err = first, err
	}
}

// abandon stops waiting because of err. It reports whether o can be used again: not while the device has chunks of it.
func (o *op) abandon(err error) bool {
	o.leave()
	o.collect()
	left := 0
	o.lane.With(func() {
		for i := range o.chunks {
			if c := &o.chunks[i]; c.flying {
				c.orphan = true
				o.fail(c.first, c.lost(err))
				left++
			}
		}
	})
	if o.err == nil {
		o.fail(o.next, err)
	}
	// Those that ended between the two looks, and those that were not started.
	o.collect()
	return left == 0
}

func (c *chunk) lost(err error) error { return fmt.Errorf("%s: %w", c.cmd.Describe(false), err) }
