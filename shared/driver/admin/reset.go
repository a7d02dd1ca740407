package admin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Look reads CSTS. The error is one that wraps ErrFatal or device.ErrGone when the register says so, or why it could not be read.
func (a *Admin) Look() error {
	csts, err := a.status()
	if err == nil && csts.CFS() {
		return fmt.Errorf("%v: %w", csts, ErrFatal)
	}
	if err == nil && csts == 0 { // an enabled controller is ready
		var v uint64
		if v, err = a.dev.Read64(nvme.RegCAP); err == nil {
			err = checkCAP(v)
		}
	}
	return err
}

// Kept returns an error if the controller, which this side has enabled, is disabled: somebody else has reset its function. The error wraps ErrFatal, or says why
// the register could not be read.
func (a *Admin) Kept() error {
	cc, err := a.config()
	if err != nil || cc.EN() {
		return err
	}
	return fmt.Errorf("somebody else has reset it: %v: %w", cc, ErrFatal)
}

// Abort asks the controller to end command cid of queue sqid. It returns when the controller has answered, whatever it has; the command may
// end or not. NVMe Base 2.0c 5.1.
func (a *Admin) Abort(ctx context.Context, sqid, cid uint16) error {
	var cmd nvme.Command
	cmd.SetAbort(sqid, cid)
	_, _, err := a.Exec(ctx, cmd, nil)
	return err
}

// Stop disables the controller, and resets its function if that does not help. After nil it writes no memory any more, and has forgotten
// its queues and every command.
func (a *Admin) Stop(ctx context.Context) error {
	err := a.stop(ctx)
	if err == nil || errors.Is(err, device.ErrGone) || ctx.Err() != nil {
		return err
	}
	a.log.Warn("the controller cannot be disabled, resetting its function", "error", err)
	if resetErr := a.ResetFunction(ctx); resetErr != nil {
		return fmt.Errorf("%w; and its function cannot be reset: %w", err, resetErr)
	}
	if err := a.stop(ctx); err != nil {
		return fmt.Errorf("after a reset of the function: %w", err)
	}
	return nil
}

// ResetFunction resets the function, and does not wait for longer than ctx. One that hangs goes on in a goroutine, until the device is closed.
func (a *Admin) ResetFunction(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- a.dev.Reset() }()
	select {
	case err := <-done:
		return err
	case <-a.dev.Done():
		return a.dev.Err()
	case <-ctx.Done():
		return fmt.Errorf("the reset has not ended: %w", context.Cause(ctx))
	}
}

// stop disables the controller, within CAP.TO or less, so that ctx leaves time for something else.
func (a *Admin) stop(ctx context.Context) error {
	limit := a.readyLimit()
	if end, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(end)/4)
	}
	cc, err := a.config()
	if err != nil {
		return err
	}
	return a.clearEnable(ctx, cc, limit)
}

// Restart enables a controller that was stopped, with an admin queue that only private commands can use as yet. It insists that it is what
// it was.
func (a *Admin) Restart(ctx context.Context) error {
	v, err := a.dev.Read64(nvme.RegCAP)
	if err != nil {
		return err
	}
	if err := checkCAP(v); err != nil {
		return err
	}
	now := nvme.CAP(v)
	if now.DSTRD() != a.cap.DSTRD() || now.MQES() < a.cap.MQES() || now.MPSMIN() != a.cap.MPSMIN() || a.cfg.Weighted && now.AMS()&nvme.CAPAMSWeighted == 0 || now.CSS()&a.cap.CSS() != a.cap.CSS() {
		return fmt.Errorf("%w: %v, and before %v", ErrChanged, now, a.cap)
	}
	clear(a.cfg.Pool.Bytes(a.mem))
	if err := a.lane.Renew(a.registerPublishers(0)); err != nil {
		return err
	}
	if err := a.enable(ctx); err != nil {
		return err
	}
	a.lane.Private()
	before := a.Identity()
	if err := a.Identify(ctx); err != nil {
		return err
	}
	if id := a.Identity(); id.SN != before.SN || id.MN != before.MN || id.SUBNQN != before.SUBNQN {
		return fmt.Errorf("%w: %q serial number %q (%s), and before %q, %q (%s)", ErrChanged, id.Model(), id.Serial(), id.Subsystem(),
			before.Model(), before.Serial(), before.Subsystem())
	}
	return nil
}

// ErrChanged says that the controller is another one after a reset than it was before, or can do less.
var ErrChanged = errors.New("the controller has changed under a reset")
