package guestdrv

import (
	"errors"

	"github.com/shadowbell/shadowbell/guestdrv/device"
	"github.com/shadowbell/shadowbell/guestdrv/internal/admin"
	"github.com/shadowbell/shadowbell/guestdrv/internal/dma"
	"github.com/shadowbell/shadowbell/guestdrv/internal/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// What errors of this package wrap. The first four mean that the controller has failed, for good: each call then
// returns the first such error, at once.
var (
	// ErrTimeout is a command that did not end within Options.Timeout.
	ErrTimeout = queue.ErrTimeout
	// ErrProtocol is a device that does what no conforming one does.
	ErrProtocol = queue.ErrProtocol
	// ErrGone is a device whose process has died, or that was unplugged.
	ErrGone = device.ErrGone
	// ErrFatal is a controller that reports a fatal error (CSTS.CFS).
	ErrFatal = admin.ErrFatal

	// ErrClosed is a call after, or during, Close.
	ErrClosed = errors.New("guestdrv: closed")
	// ErrNoMemory is a DMA pool that is too small; see Options.DMASize.
	ErrNoMemory = dma.ErrNoMemory
	// ErrUnaligned is an offset or a length that is no multiple of the namespace's block size.
	ErrUnaligned = errors.New("not a multiple of the block size")
	// ErrRange is an access beyond the end of a namespace.
	ErrRange = errors.New("beyond the end of the namespace")
	// ErrUnsupported is a command that the controller says it does not have.
	ErrUnsupported = errors.New("the controller does not support it")
	// ErrNoNamespace is a namespace that is not active, or that this driver cannot use.
	ErrNoNamespace = errors.New("no such namespace")
)

// CommandError is a command that the controller ended with a status other than success. It wraps an *nvme.StatusError, so
// nvme.StatusOf finds the status.
type CommandError struct {
	Command nvme.Command // as it was sent
	Admin   bool         // on the admin queue
	Status  nvme.Status
}

// Error prints "READ nsid=1 slba=0x10 nlb=8: LBA Out of Range (0/80h, DNR)".
func (e *CommandError) Error() string {
	return e.Command.Describe(e.Admin) + ": " + e.Status.String()
}

// Unwrap returns the status.
func (e *CommandError) Unwrap() error { return e.Status.Err() }

// Retriable reports whether the same command may succeed later: the controller did not say otherwise (DNR).
func (e *CommandError) Retriable() bool { return !e.Status.DNR() }
