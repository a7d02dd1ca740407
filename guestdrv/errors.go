package guestdrv

import (
	"errors"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/admin"
	"github.com/shadowbell/shadowbell/shared/driver/dma"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// What errors of this package wrap; errors.Is tells them apart.
//
// For good: after an error that wraps ErrProtocol, ErrGone or ErrClosed nothing more comes from this Controller, and there is nothing to
// do but Close. ErrFatal and ErrTimeout are so too when the controller could not be brought back. Controller.Err says whether it has failed:
// from then on each call returns that first error, at once.
//
// Not for good: ErrReset and a *StatusError are about one command, ErrUnaligned, ErrRange, ErrUnsupported and ErrNoNamespace about one
// call, which was refused before anything was sent. ErrNoMemory ends as soon as a Buffer or a QueuePair is given back. The errors of
// a context (context.Canceled, context.DeadlineExceeded) are about the wait: the command itself may still be executed.
var (
	// ErrTimeout is a command that did not end within Options.Timeout. It was aborted, or lost by the reset that followed: then the error
	// wraps ErrReset too.
	ErrTimeout = queue.ErrTimeout
	// ErrProtocol is a device that does what no conforming one does, for instance completes a command that nobody sent.
	ErrProtocol = queue.ErrProtocol
	// ErrGone is a device whose process has died, or that was unplugged.
	ErrGone = device.ErrGone
	// ErrFatal is a controller that reports a fatal error (CSTS.CFS, NVMe Base 2.0c 3.1.3.6).
	ErrFatal = admin.ErrFatal
	// ErrReset is a command that was outstanding when the controller was reset. Whether it was executed is not known: a write may have
	// happened, or a part of it. It can be sent again if that does no harm. A QueuePair returns it from its reset on: Close it and make another.
	ErrReset = queue.ErrReset

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

// StatusError is a command that the controller ended with a status other than success (NVMe Base 2.0c 3.3.3.2.1): nothing is
// wrong with the controller. errors.As finds it:
//
//	var se *guestdrv.StatusError
//	if errors.As(err, &se) && se.Status.Code() == nvme.StatusUnrecoveredRead { … }
//
// It wraps an *nvme.StatusError, so nvme.StatusOf finds the status too.
type StatusError struct {
	Command nvme.Command // as it was sent
	Admin   bool         // it was an admin command, and not one of a namespace
	Status  nvme.Status  // as it came, with its bits for retries
}

// Error prints "READ nsid=1 slba=0x10 nlb=8: LBA Out of Range (0/80h, DNR)".
func (e *StatusError) Error() string {
	return e.Command.Describe(e.Admin) + ": " + e.Status.String()
}

// Unwrap returns the status as an *nvme.StatusError.
func (e *StatusError) Unwrap() error { return e.Status.Err() }

// SCT returns the status code type, 0 to 7: nvme.SCTGeneric, SCTCommand, SCTMedia, SCTPath or SCTVendor.
func (e *StatusError) SCT() uint8 { return e.Status.SCT() }

// SC returns the status code, whose meaning depends on SCT.
func (e *StatusError) SC() uint8 { return e.Status.SC() }

// DNR returns the bit Do Not Retry: the same command would fail again.
func (e *StatusError) DNR() bool { return e.Status.DNR() }

// Retriable reports whether the same command may succeed later: the controller did not say otherwise (DNR).
func (e *StatusError) Retriable() bool { return !e.Status.DNR() }
