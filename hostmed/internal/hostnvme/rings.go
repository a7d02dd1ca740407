package hostnvme

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/admin"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// ErrNoPairs says that the controller has no more I/O queue pairs.
var ErrNoPairs = fmt.Errorf("the device has no more I/O queue pairs: %w", unix.EBUSY)

// User is who has a Pair: it moves commands, and keeps them over a reset. The life of the device calls it from goroutines of its own, with no lock
// held; whoever implements it has a lock under which its queue is used, and takes that here. It holds none when it calls NewPair, Pair.Close,
// Exec or Reset, which may wait for a reset. Calls may come before NewPair has returned.
type User interface {
	// Pause: from its return on nobody touches the queue or a doorbell until Resume. What is submitted is kept.
	Pause()
	// Stopped: the controller writes no memory any more, and has forgotten every command. What it had completed is handed out, the rest is dropped
	// from the queue and kept. It may be called again before Resume.
	Stopped()
	// Resume: the queue is empty, and the controller has it. What was kept is sent again.
	Resume()
	// Fail: the device is gone for good and writes no memory any more; neither queue nor doorbell is there. Everything ends with an error, now and
	// later. Pause was called before.
	Fail(err error)
	// Check calls the queue's Check, unless it is paused, and wakes who sleeps although completions are there. It returns how many commands have ended so
	// far, and whether any is outstanding.
	Check() (ended uint64, busy bool)
}

// PairConfig says what a Pair is to be like.
type PairConfig struct {
	Depth uint32 // commands at a time; the controller may grant fewer
	Extra uint64 // bytes of DMA memory beside the rings, for PRP lists
	Poll  bool   // no interrupt
}

// Pair is an I/O queue pair of the device. Its fields do not change, except that Head is another after each reset; they are User's between NewPair and Fail or
// Close, but for the times between Pause and Resume.
type Pair struct {
	QID     uint16
	Size    uint32 // entries of each ring; one command fewer fits
	Q       *queue.Queue
	Head    *dbbuf.Publisher  // of the CQ
	EventFD int               // -1: there is no interrupt
	Mem     *device.DMARegion // the rings, then Extra
	ExtraAt uint64            // where Extra begins in Mem

	dev    *Device
	user   User
	epoch  uint64 // in which the controller has it
	vector int    // -1: none
	sq, cq *shm.Region
}

// NewPair creates a queue pair. It waits for a reset that is under way, and tries again after one that goes over it.
func (d *Device) NewPair(ctx context.Context, c PairConfig, u User) (*Pair, error) {
	d.using.RLock()
	defer d.using.RUnlock()
	if err := d.Err(); err != nil {
		return nil, err
	}
	size := min(max(c.Depth+1, 2), queue.MaxSize, d.cap.MQES().Count())
	p := &Pair{dev: d, user: u, Size: size, EventFD: -1, vector: -1}
	if err := p.allocate(c); err != nil {
		return nil, fmt.Errorf("%s: %w", d.address, err)
	}
	for {
		epoch, err := d.awaitLive(ctx)
		if err != nil {
			p.free()
			return nil, err
		}
		known, err := p.create(ctx)
		if err == nil {
			if d.add(p, epoch) {
				return p, nil
			}
			err, known = d.Err(), false // why, unless it was a reset
		}
		if d.now() != epoch {
			// A reset went over the queues, or between the two, or they were created after it: it is not known which.
			if known = d.adm.ForgetPair(ctx, p.QID) == nil; known {
				continue
			}
		}
		if known {
			p.free()
		} else {
			d.orphan(p)
		}
		return nil, fmt.Errorf("%s: queue pair %d: %w", d.address, p.QID, err)
	}
}

// allocate takes what a pair needs of this side.
func (p *Pair) allocate(c PairConfig) (err error) {
	d := p.dev
	d.mu.Lock()
	if len(d.qids) == 0 {
		d.mu.Unlock()
		return fmt.Errorf("%w: all %d are in use", ErrNoPairs, d.granted)
	}
	p.QID, d.qids = d.qids[0], d.qids[1:]
	if !c.Poll && len(d.vectors) > 0 {
		p.vector, d.vectors = d.vectors[0], d.vectors[1:]
		p.EventFD = d.fds[p.vector]
	}
	d.mu.Unlock()
	defer func() {
		if err != nil {
			p.free()
		}
	}()
	sq, cq := roundUp(uint64(p.Size)*ring.SQESize), roundUp(uint64(p.Size)*ring.CQESize)
	p.ExtraAt = sq + cq
	if p.Mem, err = d.fn.AllocDMA(p.ExtraAt + roundUp(c.Extra)); err != nil {
		return err
	}
	if n := p.Mem.Contiguous; n != 0 && n < p.ExtraAt {
		return fmt.Errorf("its memory is contiguous over %d bytes, the rings have %d: ask for a shorter queue", n, p.ExtraAt)
	}
	if p.sq, err = p.Mem.View(0, sq); err != nil {
		return err
	}
	p.cq, err = p.Mem.View(sq, cq)
	return err
}

// create makes the queue empty and tells the controller of it. known is false if the controller may use its memory despite the error.
func (p *Pair) create(ctx context.Context) (known bool, err error) {
	d := p.dev
	if err := errors.Join(p.sq.Zero(0, p.sq.Len()), p.cq.Zero(0, p.cq.Len())); err != nil {
		return true, err
	}
	tail, head, err := d.adm.Publishers(p.QID)
	if err != nil {
		return true, err
	}
	p.Head, p.epoch = head, d.now()
	if p.Q != nil {
		err = p.Q.Renew(tail, head)
	} else {
		p.Q, err = queue.New(queue.Config{
			QID: p.QID, Size: p.Size, SQ: p.sq, CQ: p.cq, Tail: tail, Head: head, EventFD: p.EventFD, Generation: d.generation(),
			Timeout: d.opts.Timeout, Grace: d.opts.grace(), Late: p.lateness, Slow: d.slowness,
		})
	}
	if err != nil {
		return true, err
	}
	known, err = d.adm.CreatePair(ctx, admin.Pair{
		QID: p.QID, Size: p.Size, SQIOVA: p.Mem.IOVAOf(0), CQIOVA: p.Mem.IOVAOf(p.sq.Len()), Vector: uint16(max(p.vector, 0)), Interrupts: p.vector >= 0,
	})
	if errors.Is(err, queue.ErrReset) {
		known = true // that has made it forget
	}
	return known, err
}

// generation is where the identifiers of a new queue begin: elsewhere than those of one that had its id before.
func (d *Device) generation() uint16 { return uint16(d.made.Add(1)) }

// lateness is what the queue tells of a command past its deadline.
func (p *Pair) lateness(l queue.Late, old bool) bool {
	select {
	case p.dev.late <- lateCommand{Late: l, old: old, epoch: p.epoch}:
		return true
	default:
		return false
	}
}

// slowness is what a pair's queue tells of a command that takes its time: the watch looks at the controller.
func (d *Device) slowness() {
	select {
	case d.slow <- struct{}{}:
	default:
	}
}

// Trouble tells of an error of the queue, which takes a reset. It is called under the user's lock.
func (p *Pair) Trouble(err error) { p.dev.report(err, p.epoch) }

// awaitLive waits for a reset to end, and returns the epoch.
func (d *Device) awaitLive(ctx context.Context) (uint64, error) {
	for {
		d.mu.Lock()
		state, changed, epoch, err := d.state, d.changed, d.epoch, d.err
		d.mu.Unlock()
		switch {
		case err != nil:
			return 0, err
		case state == live:
			return epoch, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// add makes p one of the pairs, unless the controller was reset since epoch.
func (d *Device) add(p *Pair, epoch uint64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state != live || d.epoch != epoch {
		return false
	}
	d.pairs = append(d.pairs, p)
	return true
}

// Close deletes the queue pair. Nothing is outstanding on it, unless the device has failed.
func (p *Pair) Close() error {
	d := p.dev
	ctx, cancel := context.WithTimeout(d.life, d.opts.Timeout+d.opts.ResetTimeout)
	defer cancel()
	epoch, err := d.remove(ctx, p)
	if err != nil {
		<-d.severed
		return p.free()
	}
	d.using.RLock()
	defer d.using.RUnlock()
	err = d.adm.DeletePair(ctx, p.QID)
	if d.Err() == nil && (err == nil || errors.Is(err, queue.ErrReset) || d.now() != epoch) {
		return p.free() // a controller that was reset does not know it
	}
	d.orphan(p) // until it is stopped
	if d.Err() != nil {
		return nil
	}
	return fmt.Errorf("%s: deleting queue pair %d: %w", d.address, p.QID, err)
}

// remove takes p out of the pairs when no reset is under way. The error is why the device has ended.
func (d *Device) remove(ctx context.Context, p *Pair) (epoch uint64, err error) {
	for {
		_, err := d.awaitLive(ctx)
		d.mu.Lock()
		if d.state != live && d.err == nil { // another reset
			d.mu.Unlock()
			continue
		}
		defer d.mu.Unlock()
		if d.err != nil {
			err = d.err
		}
		d.pairs = slices.DeleteFunc(d.pairs, func(q *Pair) bool { return q == p })
		return d.epoch, err
	}
}

// free gives back what allocate took. The controller uses none of it.
func (p *Pair) free() (err error) {
	d := p.dev
	if p.Mem != nil {
		err = p.Mem.Free()
		p.Mem = nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.qids = append(d.qids, p.QID)
	if p.vector >= 0 {
		d.vectors = append(d.vectors, p.vector)
	}
	return err
}

// orphan keeps what p has until the controller is stopped.
func (d *Device) orphan(p *Pair) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.orphans = append(d.orphans, p)
}

// dropOrphans is called while the controller is stopped.
func (d *Device) dropOrphans() {
	d.mu.Lock()
	all := d.orphans
	d.orphans = nil
	d.mu.Unlock()
	for _, p := range all {
		if err := p.free(); err != nil {
			d.log.Warn("memory of a queue pair", "error", err)
		}
	}
}

func roundUp(n uint64) uint64 { return (n + shm.PageSize - 1) &^ (shm.PageSize - 1) }
