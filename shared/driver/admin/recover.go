package admin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/queue"
)

// How a controller is brought back, whoever's queues it has. What is done with these between the steps is the owner's business.

const (
	// maxAttempts is how often one recovery stops and restarts the controller.
	maxAttempts = 3
	// MaxFutile is how many recoveries in a row may pass without one command that the controller executes.
	MaxFutile = 4
)

// Recover stops the controller and restarts it, again if that did not help and may the next time, within limit. stop ends with Stop and what has to be done before the
// controller is set up again, restart with everything that it had; its context is a Private one.
func (a *Admin) Recover(life context.Context, limit time.Duration, cause error, stop, restart func(context.Context) error) error {
	a.log.Warn("resetting the controller", "reason", cause)
	ctx, cancel := context.WithTimeoutCause(life, limit, fmt.Errorf("%w: not back after %v", queue.ErrTimeout, limit))
	defer cancel()
	for attempt := 1; ; attempt++ {
		err := stop(ctx)
		if err == nil {
			if err = restart(Private(ctx)); err == nil {
				return nil
			}
			if attempt < maxAttempts && ctx.Err() == nil && passing(err) {
				a.log.Warn("the controller does not come back, trying again", "error", err)
				continue
			}
		}
		return fmt.Errorf("resetting the controller failed: %w (it was reset because of: %w)", err, cause)
	}
}

// passing says whether another attempt may end better.
func passing(err error) bool {
	return errors.Is(err, queue.ErrTimeout) || errors.Is(err, ErrFatal) || errors.Is(err, queue.ErrReset)
}

// Futile counts recoveries in a row that have led to nothing. Its owner's lock guards it.
type Futile struct {
	n     int
	ended uint64 // commands that had ended when the last began
}

// Begin is told that there is one more, because of cause, of how many commands had ended by then, and whether there was other progress since the last. wanted is one
// that was asked for, which does not count. The error says why it is not worth it.
func (f *Futile) Begin(cause error, ended uint64, progress, wanted bool) error {
	if progress || ended != f.ended {
		f.n = 0
	}
	f.ended = ended
	if !wanted {
		f.n++
	}
	if f.n > MaxFutile {
		return fmt.Errorf("%w; and %d resets in a row have not made it execute one command", cause, MaxFutile)
	}
	return nil
}
