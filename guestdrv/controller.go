package guestdrv

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/admin"
	"github.com/shadowbell/shadowbell/shared/driver/dma"
	"github.com/shadowbell/shadowbell/shared/driver/lane"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Controller is an open NVMe controller. Its methods are safe for concurrent use.
type Controller struct {
	opts Options
	log  hclog.Logger
	dev  device.Device
	mem  *device.DMARegion
	pool *dma.Pool
	adm  *admin.Admin

	// Fixed after Open.
	number      uint16    // in event records
	eventFDs    []int     // by vector
	maxTransfer uint32    // bytes of one command
	shared      bool      // it has the doorbell pages
	quiet       bool      // the controller honours the quiet bit
	ops         sync.Pool // of *op

	gate gate         // what touches memory is inside; Close waits for it
	refs atomic.Int64 // the controller itself, pairs and buffers: who keeps the memory mapped

	// trouble is what Stats says of it.
	trouble struct{ timeouts, aborts, resets atomic.Uint64 }

	spaces  atomic.Pointer[spaces] // replaced as a whole, under mu
	changed chan struct{}          // cap 1: it may be another

	nextLane atomic.Uint32
	watching sync.WaitGroup
	life     context.Context // ends when the controller fails or is closed
	end      context.CancelFunc
	late     chan lateCommand // of pairs
	slow     chan struct{}    // cap 1: a pair has a slow command
	progress atomic.Bool      // a command was executed since the last reset, as far as lanes do not count it

	// mu guards what follows. Only Queue.Fail is called under it.
	mu      sync.Mutex
	lanes   []*ioLane
	pairs   map[*QueuePair]struct{}
	vectors []int    // free interrupt vectors
	qids    []uint16 // free queue identifiers
	granted int      // the highest queue identifier that may be used
	past    Stats    // of pairs that are closed
	pastOps closedOps
	now     lifeState
	reads   struct{ begun, applied uint64 } // of the namespaces
	closing bool
}

// ioLane is a queue of the plain API.
type ioLane struct {
	*lane.Lane
	io *ioQueue
}

// Identify returns the Identify Controller data as it was at Open, or after the last reset. It must not be changed.
func (c *Controller) Identify() *nvme.IdentifyController { return c.adm.Identity() }

// Capabilities returns the register CAP.
func (c *Controller) Capabilities() nvme.CAP { return c.adm.Capabilities() }

// Version returns the register VS.
func (c *Controller) Version() nvme.Version { return c.adm.Version() }

// Doorbells returns how the controller is told of new commands: "shadow" (shared pages), "mmap" (the registers are mapped) or "mmio"
// (a message for each).
func (c *Controller) Doorbells() string {
	switch {
	case c.shared:
		return "shadow"
	case c.adm.Mapped():
		return "mmap"
	}
	return "mmio"
}

// MaxTransfer returns the most bytes of data that one command moves.
func (c *Controller) MaxTransfer() int { return int(c.maxTransfer) }

// Files returns the descriptors that the device goes on using, for the rules of a sandbox.
func (c *Controller) Files() device.Files { return device.FilesOf(c.dev) }

// PeerPID returns the process that serves the device, or 0.
func (c *Controller) PeerPID() int { return c.dev.PeerPID() }

// Admin executes one admin command. data goes to the controller, comes from it, or both, as the opcode says; it is at most 1 MiB and
// is copied. It returns dword 0 of the completion. A status that is not success is a *StatusError.
//
// Its deadline is that of ctx, if it has one that is later than Options.Timeout: a Format may take hours. If the controller is reset under it the
// error wraps ErrReset, whatever Options.OnReset says; while that goes on commands wait.
//
// Nothing stops the caller from a command that breaks the driver, such as deleting its queues.
func (c *Controller) Admin(ctx context.Context, cmd *nvme.Command, data []byte) (uint32, error) {
	if !c.gate.enter() {
		return 0, ErrClosed
	}
	defer c.gate.leave()
	status, result, err := c.adm.Exec(admin.Patient(ctx), *cmd, data)
	if err != nil {
		return 0, c.explain(err)
	}
	c.progress.Store(true)
	if !status.OK() {
		return result, &StatusError{Command: *cmd, Admin: true, Status: status}
	}
	return result, nil
}

// explain turns the error of a lane that was closed into the public one.
func (c *Controller) explain(err error) error {
	if errors.Is(err, lane.ErrClosed) {
		return ErrClosed
	}
	return err
}

// Buffer is memory that the controller can reach: data in it is not copied on the way. Its start is page-aligned.
type Buffer struct {
	c *Controller
	b *dma.Buffer
}

// Alloc returns a Buffer of n bytes, 0 < n <= MaxAlloc, with undefined contents. It stays valid until Free, even beyond Close.
func (c *Controller) Alloc(n int) (*Buffer, error) {
	if !c.gate.enter() {
		return nil, ErrClosed
	}
	defer c.gate.leave()
	b, err := c.pool.NewBuffer(n)
	if err != nil {
		return nil, err
	}
	c.refs.Add(1)
	return &Buffer{c: c, b: b}, nil
}

// MaxAlloc returns the most bytes that one Buffer can have: Options.DMASize, or less with a device for which memory is contiguous
// over shorter runs only, such as one without an IOMMU.
func (c *Controller) MaxAlloc() uint64 { return c.pool.Largest() }

// Bytes returns the memory. While a command that names it is under way it is the controller's.
func (b *Buffer) Bytes() []byte { return b.b.Bytes() }

// IOVA returns the memory's address for IO.IOVA.
func (b *Buffer) IOVA() uint64 { return b.b.IOVA() }

// IOVA returns the address, for IO.IOVA, of memory that lies in a Buffer; false: it is other memory.
func (c *Controller) IOVA(p []byte) (iova uint64, ok bool) {
	off, ok := c.pool.Find(p)
	if !ok {
		return 0, false
	}
	return c.pool.IOVA(off), true
}

// Free gives the buffer back. Commands of Namespace that were cancelled may still have it: it is then kept until they end. Commands
// of a QueuePair must have been reaped. It may be called more than once.
func (b *Buffer) Free() {
	if b.b.Free() {
		b.c.release()
	}
}

// addPair makes p known to fail, unless the controller has failed or been reset since p's queue was begun.
func (c *Controller) addPair(p *QueuePair) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now.err != nil {
		return c.now.err
	}
	if c.now.epoch != p.epoch {
		return errStale
	}
	c.pairs[p] = struct{}{}
	return nil
}

func (c *Controller) removePair(p *QueuePair) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pairs, p)
	c.past.add(p.lastStats())
	c.pastOps.add(p.tally)
}

// takeQueue takes a free queue identifier, and an interrupt vector if one is wanted.
func (c *Controller) takeQueue(interrupt bool) (qid uint16, vector int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.now.err != nil {
		return 0, 0, c.now.err
	}
	if len(c.qids) == 0 {
		return 0, 0, errors.New("no queue pair is free: raise Options.MaxQueuePairs, if the controller has more queues")
	}
	vector = noVector
	if interrupt {
		if len(c.vectors) == 0 {
			return 0, 0, errors.New("no interrupt vector is free: raise Options.MaxQueuePairs, if the controller has more vectors, or set QueuePairOptions.Poll")
		}
		vector, c.vectors = c.vectors[0], c.vectors[1:]
	}
	qid, c.qids = c.qids[0], c.qids[1:]
	return qid, vector, nil
}

func (c *Controller) giveQueue(qid uint16, vector int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if int(qid) <= c.granted {
		c.qids = append(c.qids, qid)
	}
	if vector != noVector {
		c.vectors = append(c.vectors, vector)
	}
}
