// Package device says what the driver needs of an NVMe controller, whoever is behind it: the registers of
// BAR0, doorbells, memory that the controller can reach, and interrupts. The ways to get there are in the packages below:
// vfiouser talks to a server over a unix socket.
//
// Nothing here knows NVMe beyond where BAR0's doorbells begin, and nothing is trusted that comes
// from the other side: values go to the caller as they were read.
package device

import (
	"errors"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// ErrGone says that the device's other side has gone away: its process died, or it closed the connection.
var ErrGone = errors.New("the device is gone")

// Device is one controller. It is safe for concurrent use. After it was opened, and Interrupts and AllocDMA were called,
// it makes only system calls that a locked sandbox has: no new file descriptor, no shared mapping.
type Device interface {
	// Read32, Read64, Write32 and Write64 access the registers of BAR0 at byte offset off, each in one access. They end
	// within some seconds whatever the device does.
	Read32(off uint32) (uint32, error)
	Read64(off uint32) (uint64, error)
	Write32(off uint32, v uint32) error
	Write64(off uint32, v uint64) error

	// RegisterSpace returns how many bytes of BAR0 there are, doorbells included.
	RegisterSpace() uint64

	// Doorbell returns the 32-bit doorbell at byte offset off of BAR0.
	Doorbell(off uint32) Doorbell

	// AllocDMA returns size bytes, rounded up to pages, of zeroed memory that the device can reach.
	AllocDMA(size uint64) (*DMARegion, error)

	// MaxInterrupts returns how many interrupt vectors the device has; 0: it must be polled.
	MaxInterrupts() int

	// Interrupts gives vectors 0 to n-1 an eventfd each, non-blocking, and returns them. It is called once. The descriptors are
	// the caller's to close, after Close.
	Interrupts(n int) ([]int, error)

	// Reset resets the function, as an FLR would.
	Reset() error

	// Done is closed when the device can no longer be reached; Err then says why.
	Done() <-chan struct{}
	Err() error

	// PeerPID returns the process that serves the device, or 0 if there is none or it is not known.
	PeerPID() int

	// Close ends the connection. DMA memory and mapped doorbells stay readable and writable, so that queues in use elsewhere do
	// not fault, until DMARegion.Free and Unmap. It may be called more than once.
	Close() error

	// Unmap takes the mapped doorbells away. It is the last call.
	Unmap() error
}

// Doorbell is one doorbell register.
type Doorbell struct {
	// Mapped is the register itself, where the device lets its doorbell page be mapped and polls it; nil: it must be rung.
	Mapped *atomic.Uint32
	// Ring writes the register in the device's way. It is always there.
	Ring func(v uint32) error
}

// DMARegion is memory that the device can reach: byte 0 of the Region is at IOVA.
type DMARegion struct {
	*shm.Region
	IOVA uint64
	free func() error
}

// NewDMARegion is for implementations: free takes the memory from the device and unmaps it.
func NewDMARegion(mem *shm.Region, iova uint64, free func() error) *DMARegion {
	return &DMARegion{Region: mem, IOVA: iova, free: free}
}

// Free takes the memory back from the device, as far as it still listens, and unmaps it. It is the last use of the region.
func (r *DMARegion) Free() error { return r.free() }
