package hostnvme

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/shared/device"
)

const (
	// The watch looks after deadlines this often, Options.Timeout/8 within these bounds.
	minTick = 5 * time.Millisecond
	maxTick = time.Second
	// CSTS is read this often while commands are outstanding, and while there are none: a device that was pulled out tells nobody.
	lookBusy = time.Second
	lookIdle = 10 * time.Second
)

// watch looks after the device until it ends, and buries it then. What takes time it leaves to heal, of which there is one at a time.
func (d *Device) watch() {
	defer d.running.Done()
	ticker := time.NewTicker(min(max(d.opts.Timeout/8, minTick), maxTick))
	defer ticker.Stop()
	var healing chan struct{} // closed when heal has ended; nil: it does not run
	var asked time.Time       // when CSTS was read last
	var meanwhile []lateCommand
	heal := func(late []lateCommand, cause error, tell chan<- error) {
		done := make(chan struct{})
		healing = done
		go func() {
			defer close(done)
			err := d.heal(late, cause)
			if tell != nil {
				tell <- err
			}
		}()
	}
	for {
		requests, troubles := d.asked, d.trouble
		if healing != nil {
			requests, troubles = nil, nil
		}
		select {
		case <-d.life.Done():
			d.adm.Lane().Fail(d.Err())
			if healing != nil {
				<-healing
			}
			d.bury()
			return
		case <-d.fn.Done():
			d.fail(gone(d.fn.Err()))
		case <-healing:
			healing = nil
			late := slices.DeleteFunc(meanwhile, func(l lateCommand) bool { return l.epoch != d.now() })
			if meanwhile = nil; len(late) > 0 {
				heal(late, nil, nil)
			}
		case l := <-d.late:
			switch {
			case l.epoch != d.now():
			case healing == nil && l.old:
				heal(nil, l.Err, nil)
			case healing == nil:
				heal([]lateCommand{l}, nil, nil)
			case !l.old && len(meanwhile) < cap(d.late): // an old one is told again
				meanwhile = append(meanwhile, l)
			}
		case <-d.slow:
			if healing == nil {
				asked = time.Now()
				heal(nil, nil, nil)
			}
		case <-troubles:
			if err := d.takeProblem(); err != nil {
				heal(nil, err, nil)
			}
		case tell := <-requests:
			heal(nil, errAsked, tell)
		case now := <-ticker.C:
			busy := d.adm.Lane().Rescue()
			busy = d.check() || busy
			if healing != nil {
				continue
			}
			every := lookIdle
			if busy {
				every = lookBusy
			}
			var cause error
			if late := d.adm.Lane().Late(); len(late) > 0 {
				d.counts.timeouts.Add(uint64(len(late)))
				cause = late[0].Err
			}
			if look := now.Sub(asked) >= every; look || cause != nil {
				asked = now
				heal(nil, cause, nil)
			}
		}
	}
}

// check has all pairs look after their deadlines, and says whether anything is outstanding.
func (d *Device) check() (busy bool) {
	pairs, state := d.present()
	if state != live {
		return false
	}
	for _, p := range pairs {
		_, b := p.user.Check()
		busy = busy || b
	}
	return busy
}

// present returns the pairs and the state of now.
func (d *Device) present() ([]*Pair, state) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.pairs), d.state
}

func (d *Device) now() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.epoch
}

// heal finds out what is wrong and does something about it. late are commands that are to be aborted, cause is set if that cannot help. With
// neither it only looks whether the controller is well.
func (d *Device) heal(late []lateCommand, cause error) error {
	err := d.adm.Look()
	if err == nil {
		err = d.adm.Kept()
	}
	switch {
	case errors.Is(err, device.ErrGone):
		if cause != nil {
			err = fmt.Errorf("%w (%w)", cause, err)
		}
		d.fail(err)
		return err
	case err != nil && cause == nil:
		cause = err
	case err != nil:
		cause = fmt.Errorf("%w (%w)", cause, err)
	}
	if cause == nil && len(late) > 0 {
		cause = d.abort(late)
	}
	if cause == nil {
		return nil
	}
	return d.reset(cause)
}

// abort asks the controller to end what is late. What is still there after the grace is told of once more, as old.
func (d *Device) abort(late []lateCommand) error {
	ctx, cancel := context.WithTimeout(d.life, d.opts.grace())
	defer cancel()
	d.counts.timeouts.Add(uint64(len(late)))
	d.log.Warn("commands are late, aborting them", "number", len(late), "first", late[0].Err)
	for _, l := range late {
		d.counts.aborts.Add(1)
		if err := d.adm.Abort(ctx, l.QID, l.CID); err != nil {
			return fmt.Errorf("%w, nor did its Abort end: %w", l.Err, err)
		}
	}
	return nil
}

// report is told what calls for a reset, from any goroutine, and in which epoch that was.
func (d *Device) report(err error, epoch uint64) {
	d.mu.Lock()
	if epoch == d.epoch {
		d.problem = &problem{err, epoch}
	}
	d.mu.Unlock()
	select {
	case d.trouble <- struct{}{}:
	default:
	}
}

// takeProblem returns what was reported, if no reset has begun since.
func (d *Device) takeProblem() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.problem
	d.problem = nil
	if p == nil || p.epoch != d.epoch {
		return nil
	}
	return p.err
}

// Reset resets the controller, as an operator may want it, and returns when it works again, or why it does not. Commands of guests wait for that.
func (d *Device) Reset(ctx context.Context) error {
	tell := make(chan error, 1)
	select {
	case d.asked <- tell:
	case <-d.life.Done():
		return d.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-tell:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// enter changes the state. It is called under mu.
func (d *Device) enter(s state) {
	d.state = s
	close(d.changed)
	d.changed = make(chan struct{})
}

// begin makes a Device that was set up live, unless it has failed.
func (d *Device) begin() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state != opening {
		return false
	}
	d.enter(live)
	return true
}

// fail ends the device for good, or closes it, with ErrClosed. The watch does the rest; only the first call counts.
func (d *Device) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return
	}
	d.err = err
	if err == ErrClosed {
		d.enter(closed)
	} else {
		d.log.Error("the device has failed", "reason", err)
		d.enter(failed)
	}
	d.end()
}

// bury gives the function back. Nobody uses a queue any more before that, nor reaches the device any guest's memory; only then commands end. What the
// kernel takes for the rest nobody waits for but Close of a device that works.
func (d *Device) bury() {
	err := d.Err()
	d.forget()
	pairs, _ := d.present()
	for _, p := range pairs {
		p.user.Pause()
	}
	if !errors.Is(err, device.ErrGone) || d.fn.Err() == nil { // the kernel wants a function back that may still work
		if shutErr := d.adm.Shutdown(); shutErr != nil {
			d.log.Warn("shutting the controller down", "error", shutErr)
		}
	}
	d.adm.Close()
	d.using.Lock()
	d.fn.Sever()
	d.adm.Drop()
	d.dropOrphans()
	freeErr := d.mem.Free()
	d.using.Unlock()
	for _, p := range pairs {
		p.user.Fail(err)
	}
	close(d.severed)
	if err != ErrClosed {
		d.tell(func(*watcher) (Event, bool) { return Gone, true })
	}
	// The function is given back by what lets go of it last. That may take a minute: it had better be a close than a munmap, for which all of
	// the process waits.
	if err := errors.Join(freeErr, d.fn.Unmap(), d.fn.Close()); err != nil {
		d.log.Warn("giving the function back", "error", err)
	}
	d.forgotten()
	close(d.buried)
}

func gone(err error) error {
	if errors.Is(err, device.ErrGone) {
		return err
	}
	return fmt.Errorf("%w: %w", device.ErrGone, err)
}
