// Package device says what a driver needs of an NVMe controller, whoever is behind it: the registers of
// BAR0, doorbells, memory that the controller can reach, and interrupts. The ways to get there are in the packages below (vfiopci,
// sysfspci) and in guestdrv/device/vfiouser, which talks to a server over a unix socket.
//
// Nothing here knows NVMe beyond where BAR0's doorbells begin, and nothing is trusted that comes
// from the other side: values go to the caller as they were read.
package device

import (
	"errors"
	"fmt"
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

	// AllocDMA returns size bytes, rounded up to pages, of zeroed memory that the device can reach: in one piece for this process, in
	// runs for the device (DMARegion.Contiguous).
	AllocDMA(size uint64) (*DMARegion, error)

	// MaxInterrupts returns how many interrupt vectors the device has; 0: it must be polled.
	MaxInterrupts() int

	// Interrupts gives vectors 0 to n-1 an eventfd each, non-blocking, and returns them. It is called once. The descriptors are
	// the caller's to close, after Close.
	Interrupts(n int) ([]int, error)

	// Reset resets the function, as an FLR would, and leaves it as it was found but for the controller's own registers: it may reach memory, its
	// interrupts are those of Interrupts, DMA memory keeps its place. It may be called with queues in use, and in a locked sandbox. The error is
	// errors.ErrUnsupported if the function has no reset. Close ends it, if it takes long.
	Reset() error

	// Done is closed when the device can no longer be reached; Err then says why, ErrGone included. A device that nobody watches is found out
	// by a register that reads as all ones: Read32 and Read64 then return ErrGone.
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

// Files are the open files that a Device in a locked sandbox still makes system calls on, besides read, write and close. A Device
// that has some has a method Files (FileUser).
type Files struct {
	// VFIODevice is the descriptor of a VFIO device; -1: none. Reset makes the ioctl VFIO_DEVICE_RESET on it, Reset and Close read and
	// write its configuration space (pread64, pwrite64). There is nothing else: no mapping, no interrupt is changed after the set-up.
	VFIODevice int
	// Write are files that are read and written by pread64 and pwrite64: a function's configuration space, and its reset in sysfs.
	Write []int
	// Sockets are those that messages go over (sendmsg, recvmsg).
	Sockets []int
}

// Doorbell is one doorbell register.
type Doorbell struct {
	// Mapped is the register itself, where the device lets its doorbell page be mapped and polls it; nil: it must be rung.
	Mapped *atomic.Uint32
	// Ring writes the register in the device's way. It is always there.
	Ring func(v uint32) error
}

// DMARegion is memory that the device can reach. It is one piece for this process; for the device it may be several, its runs.
type DMARegion struct {
	*shm.Region
	// IOVA is where the device finds byte 0.
	IOVA uint64
	// Contiguous is how long each run is in bytes: a power of two, and run i begins at byte i*Contiguous. 0: all of it is one run.
	Contiguous uint64

	runs []uint64 // the IOVA of each, if there are several
	free func() error
}

// NewDMARegion is for implementations: free takes the memory from the device and unmaps it.
func NewDMARegion(mem *shm.Region, iova uint64, free func() error) *DMARegion {
	return &DMARegion{Region: mem, IOVA: iova, free: free}
}

// NewDMARuns is NewDMARegion for memory that is scattered: run bytes, a power of two of at least a page, are at each of iovas. The last
// may be longer than what is left of mem. Runs that follow one another are no longer for that.
func NewDMARuns(mem *shm.Region, run uint64, iovas []uint64, free func() error) (*DMARegion, error) {
	switch {
	case run < shm.PageSize || run&(run-1) != 0:
		return nil, fmt.Errorf("runs of %d bytes: they are a power of two, and a page at least", run)
	case len(iovas) == 0 || mem.Len() > run*uint64(len(iovas)) || mem.Len() <= run*uint64(len(iovas)-1):
		return nil, fmt.Errorf("%d bytes of memory in %d runs of %d bytes", mem.Len(), len(iovas), run)
	}
	r := NewDMARegion(mem, iovas[0], free)
	if len(iovas) > 1 {
		r.Contiguous, r.runs = run, iovas
	}
	return r, nil
}

// IOVAOf returns where the device finds byte off, which must lie in the region. What begins there goes on for the device to the end of
// the run: the next multiple of Contiguous.
func (r *DMARegion) IOVAOf(off uint64) uint64 {
	if r.runs == nil {
		return r.IOVA + off
	}
	return r.runs[off/r.Contiguous] + off&(r.Contiguous-1)
}

// Free takes the memory back from the device, as far as it still listens, and unmaps it. It is the last use of the region.
func (r *DMARegion) Free() error { return r.free() }

// Wrap returns the same memory with another way to free it, which gets r.
func (r *DMARegion) Wrap(free func(r *DMARegion) error) *DMARegion {
	w := *r
	w.free = func() error { return free(r) }
	return &w
}
