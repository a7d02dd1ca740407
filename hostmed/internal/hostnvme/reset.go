package hostnvme

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/admin"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
)

// How a controller is brought back:
//
//	opening    Open sets everything up; what goes wrong is its error
//	live       commands of guests go to the device
//	resetting  because of: a command past its deadline that its Abort did not end; an admin command past it; CSTS.CFS; registers that cannot be read; a
//	           completion that no conforming device posts; an error of PCI Express; Reset
//	failed     the function is gone (its registers read as all ones, the kernel wants it back); it does not come back; resets do not help
//	closed     Close
//
// A reset, step by step:
//
//  1. Pairs are paused: their users keep what guests submit, and touch no queue.
//  2. The controller is stopped: CC.EN = 0, or else a reset of the function. From here on it writes no memory.
//  3. Completions that it had posted before are handed out; every other command is kept.
//  4. Everything that Open set up is set up again: admin queue, Identify, doorbell pages, queues with the same ids, namespaces, events. It has to be the same
//     controller, by serial number, model and NQN.
//  5. Pairs go on: what was outstanding is sent again, then what came meanwhile.
//
// A step that fails is tried again from 1 on. When that does not help the device has failed: the function is closed, so that it reaches no memory, and only
// then all commands end with an error. The address can be opened again at once.
//
// Sent again are commands whose second execution leaves the medium as the first did. A Read, Write, Flush, Write Zeroes, Write Uncorrectable, Dataset
// Management, Compare or Verify is such a command; a guest that has two of them under way on the same blocks has no order among them anyway (NVM Command Set 1.0c 2.1).

// maxBroken is how many resets a device is worth that breaks the protocol.
const maxBroken = 8

var (
	errAsked   = errors.New("it was asked for")
	errFaulted = errors.New("PCI Express reports an error that it did not recover from")
)

// history is what resets have come to so far.
type history struct {
	futile admin.Futile
	broken int
}

// reset brings the controller back. It is called by heal only.
func (d *Device) reset(cause error) error {
	pairs, err := d.beginReset(cause)
	if err != nil {
		d.fail(err)
		return err
	}
	begin := time.Now()
	stop := func(ctx context.Context) error {
		d.adm.Lane().Pause()
		return d.stop(ctx, cause, pairs)
	}
	restart := func(ctx context.Context) error { return d.restart(ctx, pairs) }
	if err := d.adm.Recover(d.life, d.opts.ResetTimeout, cause, stop, restart); err != nil {
		d.fail(err)
		return err
	}
	if err := d.finishReset(pairs); err != nil {
		return err
	}
	d.log.Info("controller is back", "after", time.Since(begin).Round(time.Microsecond))
	return nil
}

// beginReset makes a live device resetting, with all pairs paused. The error is why it is not worth it.
func (d *Device) beginReset(cause error) ([]*Pair, error) {
	var ended uint64
	pairs, _ := d.present()
	for _, p := range pairs {
		n, _ := p.user.Check()
		ended += n
	}
	d.mu.Lock()
	h := &d.recent
	switch {
	case d.err != nil:
		defer d.mu.Unlock()
		return nil, d.err
	case d.state != live:
		d.mu.Unlock()
		return nil, fmt.Errorf("%w (%w)", cause, d.adm.Diagnose())
	}
	if errors.Is(cause, queue.ErrProtocol) {
		h.broken++
	}
	err := h.futile.Begin(cause, ended, false, cause == errAsked)
	if err == nil && h.broken > maxBroken {
		err = fmt.Errorf("%w; it was reset for that %d times before", cause, maxBroken)
	}
	if err != nil {
		d.mu.Unlock()
		return nil, err
	}
	d.epoch++
	d.counts.resets.Add(1)
	d.enter(resetting)
	pairs = append([]*Pair(nil), d.pairs...) // nobody adds or removes one now
	d.mu.Unlock()
	for _, p := range pairs {
		p.user.Pause()
	}
	return pairs, nil
}

// stop makes the controller forget everything, and takes back what it had.
func (d *Device) stop(ctx context.Context, cause error, pairs []*Pair) error {
	if errors.Is(cause, errFaulted) { // what it does to a link or a register file is unknown: begin with the function
		if err := d.adm.ResetFunction(ctx); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	if err := d.adm.Stop(ctx); err != nil {
		return err
	}
	d.adm.Lane().Lose(cause, false)
	for _, p := range pairs {
		p.user.Stopped()
	}
	d.dropOrphans()
	return nil
}

// restart sets up again what Open has set up, in the same order.
func (d *Device) restart(ctx context.Context, pairs []*Pair) error {
	before := d.MaxTransfer()
	if err := d.adm.Restart(ctx); err != nil {
		return err
	}
	if now := d.MaxTransfer(); now < before {
		return fmt.Errorf("%w: commands move at most %d bytes, and before %d", admin.ErrChanged, now, before)
	}
	if err := d.configure(ctx); err != nil {
		return err
	}
	for _, p := range pairs {
		if _, err := p.create(ctx); err != nil {
			return err
		}
	}
	spaces, err := d.identifyNamespaces(ctx)
	if err != nil {
		return err
	}
	d.updateNamespaces(spaces)
	d.adm.RequestEvents(ctx)
	return nil
}

// finishReset lets everybody go on.
func (d *Device) finishReset(pairs []*Pair) error {
	d.mu.Lock()
	if d.err != nil {
		defer d.mu.Unlock()
		return d.err // bury ends what is kept
	}
	d.enter(live)
	d.mu.Unlock()
	d.adm.Lane().Resume()
	for _, p := range pairs {
		p.user.Resume()
	}
	return nil
}
