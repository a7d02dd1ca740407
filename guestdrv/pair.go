package guestdrv

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/driver/tally"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// IO is one command of the batch API. The memory at IOVA must be the controller's own (Buffer), contiguous, and the
// controller's until the command ends.
type IO struct {
	Op     uint8  // nvme.IORead, IOWrite, IOCompare, IOFlush, IOWriteZeroes, IOVerify, IOWriteUncorrectable or IODSM
	FUA    bool   // Read and Write: from or to the media itself
	NSID   uint32 // of an active namespace
	Blocks uint32 // logical blocks; Dataset Management: ranges to deallocate at IOVA; Flush: ignored
	LBA    uint64 // first logical block
	IOVA   uint64 // of the data, if the command has any: a multiple of 4
	Tag    uint64 // comes back in Result
}

// Result is the end of one command.
type Result struct {
	Tag     uint64
	Status  nvme.Status
	DW0     uint32
	Latency time.Duration // from Submit to Reap; the clock is read once for each batch of either
}

// QueuePairOptions are what NewQueuePair can be told.
type QueuePairOptions struct {
	// Depth is how many commands the pair holds at least, if the controller allows it; 0: Options.QueueDepth, at most MaxQueueDepth.
	Depth uint32
	// Poll makes a pair without an interrupt: Wait polls until a completion is there. So does every pair of a device that has no interrupts.
	Poll bool
	// Priority is that of the submission queue, with Options.Arbitration.
	Priority Priority
	// NoSpin makes Wait sleep on the interrupt at once, instead of polling for as long as that pays: for measurements.
	NoSpin bool
}

// QueuePair is the hot path: commands are submitted and reaped in batches, and nothing is copied or allocated. The order of calls:
//
//	n, err := p.Submit(ios)    // written to the SQ, unseen
//	err = p.Publish()          // one doorbell for all of them
//	err = p.Wait(ctx)          // poll, then sleep, until there is something to reap
//	n, err = p.Reap(results)
//
// It belongs to one goroutine at a time. Only Controller.Close may be called meanwhile.
//
// After a reset of the controller every call returns an error that wraps ErrReset: the owner closes the pair and makes another. What was
// outstanding has no result, and the memory of it is the controller's until Close has returned. A command that is aborted because it
// was late ends with nvme.StatusAbortRequested.
type QueuePair struct {
	io  *ioQueue
	q   *queue.Queue
	cmd nvme.Command

	tally *tally.Tally

	// The namespace of the last command, in the table of that time.
	spaces *spaces
	nsid   uint32
	shift  uint8
	known  bool

	batch  [64]queue.Completion
	epoch  uint64 // of the controller's resets
	moved  bool   // a command has ended
	closed bool

	// What Controller.Stats sees; it is brought up to date now and then.
	completed uint64
	seen      struct {
		commands, rings, wakeups atomic.Uint64
		polled                   atomic.Int64
	}
}

// statsEvery is after how many commands Controller.Stats sees them.
const statsEvery = 256

// NewQueuePair creates a queue pair. It needs no system call that a sandbox forbids. While the controller is reset it waits for the
// end of that.
func (c *Controller) NewQueuePair(o QueuePairOptions) (*QueuePair, error) {
	return c.NewQueuePairContext(context.Background(), o)
}

// NewQueuePairContext is NewQueuePair whose wait for the end of a reset ctx can end. Once the controller is asked for the queues the
// deadline is theirs (Options.Timeout): a creation that was given up half-way would leave it unknown who has them.
func (c *Controller) NewQueuePairContext(ctx context.Context, o QueuePairOptions) (*QueuePair, error) {
	if o.Depth > MaxQueueDepth {
		return nil, fmt.Errorf("queue pair of depth %d: at most %d", o.Depth, MaxQueueDepth)
	}
	if err := o.Priority.check(c.opts.Arbitration); err != nil {
		return nil, fmt.Errorf("queue pair: %w", err)
	}
	if o.Depth == 0 {
		o.Depth = c.opts.QueueDepth
	}
	if !c.gate.enter() {
		return nil, ErrClosed
	}
	defer c.gate.leave()
	for {
		epoch, err := c.awaitLive(ctx)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return nil, err
		}
		p, err := c.newPair(o, epoch)
		// Each further try needs a further reset, and those that do no good are counted.
		if err == nil || !errors.Is(err, errStale) && !errors.Is(err, ErrReset) {
			return p, err
		}
	}
}

func (c *Controller) newPair(o QueuePairOptions, epoch uint64) (*QueuePair, error) {
	qid, vector, err := c.takeQueue(!o.Poll && c.dev.MaxInterrupts() > 0)
	if err != nil {
		return nil, err
	}
	eventFD := -1
	if vector != noVector {
		eventFD = c.eventFDs[vector]
	}
	ctx := context.Background()
	io, err := c.newIOQueue(ctx, epoch, qid, o.Depth, vector, o.Priority, queue.Config{
		EventFD: eventFD, Quiet: c.quiet, NoSpin: o.NoSpin, Timeout: c.opts.Timeout, Late: c.lateness(epoch), Grace: c.opts.grace(), Slow: c.slowness,
	})
	if err != nil {
		c.giveQueue(qid, vector)
		return nil, c.explain(err)
	}
	p := &QueuePair{io: io, q: io.q, epoch: epoch, tally: tally.New(false)}
	c.refs.Add(1)
	if err := c.addPair(p); err != nil {
		// The memory is given back if the controller is known not to have it.
		if errors.Is(err, errStale) && c.adm.ForgetPair(ctx, qid) == nil {
			io.give()
			c.giveQueue(qid, vector)
		}
		c.release()
		return nil, err
	}
	return p, nil
}

// Depth returns how many commands the pair holds.
func (p *QueuePair) Depth() int { return int(p.q.Size() - 1) }

// Free returns how many commands can be submitted now.
func (p *QueuePair) Free() int { return p.q.Free() }

// Outstanding returns how many commands have been submitted and not reaped.
func (p *QueuePair) Outstanding() int { return p.q.Outstanding() }

// QID returns the queue's identifier.
func (p *QueuePair) QID() uint16 { return p.io.qid }

// Submit writes commands into the SQ, where the controller does not see them before Publish. It returns how many: fewer than
// len(ios) when the pair is full, which is no error. An error is about ios[n], or the pair's own.
func (p *QueuePair) Submit(ios []IO) (int, error) {
	q := p.q
	if err := q.Err(); err != nil {
		return 0, err
	}
	q.Stamp()
	if now := p.io.c.spaces.Load(); now != p.spaces {
		p.spaces, p.known = now, false
	}
	for i := range ios {
		slot, ok := q.Take(ios[i].Tag)
		if !ok {
			return i, nil
		}
		if err := p.build(slot, &ios[i]); err != nil {
			q.Cancel(slot)
			return i, err
		}
		q.Push(slot, &p.cmd)
	}
	return len(ios), nil
}

// build makes p.cmd from io. Of p.cmd only the fields that it sets are ever not zero.
func (p *QueuePair) build(slot uint16, io *IO) error {
	if io.NSID != p.nsid || !p.known {
		if err := p.lookup(io); err != nil {
			return err
		}
	}
	cmd := &p.cmd
	if io.Op != nvme.IORead && io.Op != nvme.IOWrite {
		return p.buildOther(slot, io)
	}
	bytes := uint64(io.Blocks) << p.shift
	if bytes-1 >= uint64(p.io.c.maxTransfer) {
		return p.badLength(io)
	}
	cmd.Opcode, cmd.NSID = io.Op, io.NSID
	cmd.CDW10, cmd.CDW11, cmd.CDW12 = uint32(io.LBA), uint32(io.LBA>>32), io.Blocks-1
	if io.FUA {
		cmd.CDW12 |= nvme.RWForceUnit
	}
	if io.IOVA&3 == 0 && io.IOVA&(pageSize-1)+bytes <= pageSize && !p.io.c.opts.SGL {
		cmd.PRP1, cmd.PRP2 = io.IOVA, 0
		return nil
	}
	return p.io.point(slot, cmd, io.IOVA, uint32(bytes))
}

// buildOther is build for what is not Read or Write.
func (p *QueuePair) buildOther(slot uint16, io *IO) error {
	cmd := &p.cmd
	*cmd = nvme.Command{Opcode: io.Op, NSID: io.NSID}
	switch io.Op {
	case nvme.IOFlush:
		return nil
	case nvme.IODSM:
		if io.Blocks == 0 || io.Blocks > nvme.DSMMaxRanges {
			return fmt.Errorf("%s: %d ranges, 1 to %d fit", nvme.IOOpcodeName(io.Op), io.Blocks, nvme.DSMMaxRanges)
		}
		cmd.CDW10, cmd.CDW11 = io.Blocks-1, nvme.DSMDeallocate
		err := p.io.point(slot, cmd, io.IOVA, io.Blocks*dsmRangeSize)
		return err
	case nvme.IOCompare, nvme.IOWriteZeroes, nvme.IOVerify, nvme.IOWriteUncorrectable:
	default:
		return fmt.Errorf("%s: not a command that Submit knows", nvme.IOOpcodeName(io.Op))
	}
	blocks, ok := nvme.ToZeroBased16(io.Blocks)
	if !ok {
		return p.badLength(io)
	}
	cmd.SetRW(io.Op, io.NSID, io.LBA, blocks)
	if io.FUA {
		cmd.CDW12 |= nvme.RWForceUnit
	}
	if io.Op != nvme.IOCompare {
		return nil
	}
	bytes := uint64(io.Blocks) << p.shift
	if bytes > uint64(p.io.c.maxTransfer) {
		return p.badLength(io)
	}
	return p.io.point(slot, cmd, io.IOVA, uint32(bytes))
}

func (p *QueuePair) badLength(io *IO) error {
	return fmt.Errorf("%s of %d blocks of %d bytes: 1 block to %d bytes and 65536 blocks fit in one command",
		nvme.IOOpcodeName(io.Op), io.Blocks, uint64(1)<<p.shift, p.io.c.maxTransfer)
}

// lookup remembers the block size of io's namespace.
func (p *QueuePair) lookup(io *IO) error {
	p.known = false
	if io.Op == nvme.IOFlush && io.NSID == nvme.NSIDAll {
		return nil
	}
	ns, err := p.io.c.Namespace(io.NSID)
	if err != nil {
		return err
	}
	p.nsid, p.shift, p.known = io.NSID, ns.shift, true
	// Leftovers of commands with other fields.
	p.cmd = nvme.Command{}
	return nil
}

// Publish shows the controller what Submit has written, with one doorbell.
func (p *QueuePair) Publish() error {
	if err := p.q.Publish(); err != nil {
		return p.failed(err)
	}
	return nil
}

// Reap takes up to len(out) results that are there and returns how many; it does not wait.
func (p *QueuePair) Reap(out []Result) (int, error) {
	total := 0
	for total < len(out) {
		n, err := p.q.Reap(p.batch[:min(len(p.batch), len(out)-total)])
		if n > 0 {
			p.report(p.batch[:n], out[total:total+n])
			total += n
		}
		if err != nil {
			p.count(total)
			return total, p.failed(err)
		}
		if n < len(p.batch) {
			break
		}
	}
	if total == 0 {
		return 0, p.q.Err()
	}
	p.count(total)
	return total, nil
}

// report makes results of completions, and counts them. Those that were submitted together have the same stamps: they are counted together.
func (p *QueuePair) report(batch []queue.Completion, out []Result) {
	out = out[:len(batch)]
	now := p.q.Stamp()
	opcode, started, first := batch[0].Opcode, batch[0].Started, 0
	latency, bad := now-started, nvme.Status(0)
	for i := range batch {
		c := &batch[i]
		if c.Started != started || c.Opcode != opcode {
			p.tally.Ended(opcode, latency, uint64(i-first))
			opcode, started, first = c.Opcode, c.Started, i
			latency = now - started
		}
		bad |= c.Status
		out[i] = Result{Tag: c.Tag, Status: c.Status, DW0: c.Result, Latency: time.Duration(latency)}
	}
	p.tally.Ended(opcode, latency, uint64(len(batch)-first))
	if bad.OK() {
		return
	}
	for i := range batch {
		if c := &batch[i]; !c.Status.OK() {
			p.tally.Failed(c.Opcode)
		}
	}
}

// Wait returns nil when there is something to reap. It polls for as long as that has paid off lately, then sleeps on the interrupt. An
// error is ctx's, the pair's, or that nothing is outstanding.
func (p *QueuePair) Wait(ctx context.Context) error {
	err := p.q.Wait(ctx)
	if err != nil && ctx.Err() == nil {
		return p.failed(err)
	}
	return err
}

// failed makes an error of the queue that is the controller's fault the controller's failure.
func (p *QueuePair) failed(err error) error {
	c := p.io.c
	if p.q.Err() == nil || errors.Is(err, ErrReset) || p.closed {
		return err
	}
	return c.fail(err)
}

// count adds n completions, and from time to time tells those who look from outside.
func (p *QueuePair) count(n int) {
	p.completed += uint64(n)
	if !p.moved {
		p.moved = true
		p.io.c.progress.Store(true)
	}
	if p.completed-p.seen.commands.Load() >= statsEvery {
		p.tell()
	}
}

func (p *QueuePair) tell() {
	p.seen.commands.Store(p.completed)
	p.seen.rings.Store(p.q.Rings())
	p.seen.wakeups.Store(p.q.Wakeups)
	p.seen.polled.Store(int64(p.q.Polled()))
}

// Close deletes the queues. Commands that are outstanding are aborted. It may be called more than once.
func (p *QueuePair) Close() error {
	if p.closed {
		return nil
	}
	p.closed = true
	c := p.io.c
	p.tell()
	c.removePair(p)
	defer c.release()
	_ = p.q.Fail(fmt.Errorf("queue pair %d: %w", p.io.qid, ErrClosed))
	if !c.gate.enter() {
		return nil // the controller is closed, and with it the queues
	}
	defer c.gate.leave()
	if err := p.delete(); err != nil {
		if errors.Is(err, ErrClosed) {
			return nil
		}
		// The controller may still use the memory, so it is not given back.
		return fmt.Errorf("deleting queue pair %d: %w", p.io.qid, err)
	}
	p.io.give()
	c.giveQueue(p.io.qid, p.io.vector)
	return nil
}

// delete makes sure that the controller does not have the queues any more. After a reset it does not.
func (p *QueuePair) delete() error {
	c := p.io.c
	epoch, err := c.awaitLive(context.Background())
	if err != nil || epoch != p.epoch {
		return err
	}
	err = c.adm.DeletePair(context.Background(), p.io.qid)
	if err == nil {
		return nil
	}
	if now, liveErr := c.awaitLive(context.Background()); liveErr == nil && now != p.epoch {
		return nil
	}
	return c.explain(err)
}
