// Package dma divides the one piece of memory that the device can reach: rings, lists, bounce buffers and the buffers that
// callers hold. Everything is whole pages, contiguous in memory and for the device: where the device has the memory in runs, nothing crosses
// from one to the next.
//
// A Block is memory that one owner takes and gives back. A Buffer is a Block that may be given back while the device still has a
// command that names it: it then returns to the pool when the last such command has ended.
//
// The package does not know what is in the memory, never clears it, and does not map or unmap it.
package dma

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// PageSize is the unit of allocation in bytes.
const PageSize = shm.PageSize

var (
	// ErrNoMemory says that the pool has no run of pages that is long enough.
	ErrNoMemory = errors.New("out of DMA memory")
	// ErrFreed says that memory of the pool was used after it was given back.
	ErrFreed = errors.New("DMA memory was freed")
)

// Block is a run of pages.
type Block struct {
	Off uint64 // bytes from the pool's start
	Len uint64 // bytes
}

// Pool is the memory. It is safe for concurrent use.
type Pool struct {
	mem []byte
	dma *device.DMARegion
	run uint64 // the most bytes that are contiguous for the device

	remedy string

	// mu guards what follows. It is taken last of all locks of the driver.
	mu      sync.Mutex
	pages   *buddy
	buffers map[uint64]*Buffer // by offset
	starts  []uint64           // bitmap of the pages at which buffers begin
	bounced int                // blocks that TakeBounce has out
	freed   chan struct{}      // closed when memory comes back; nil: nobody waits
}

// NewPool returns the pool of all pages of region. remedy is what the user does when there is not enough, as the end of an error.
func NewPool(region *device.DMARegion, remedy string) (*Pool, error) {
	n := region.Len() / PageSize
	if n == 0 || n > 1<<31 {
		return nil, fmt.Errorf("DMA pool of %d bytes: it has 1 to 2^31 pages of %d bytes", region.Len(), PageSize)
	}
	mem, err := region.Bytes(0, n*PageSize)
	if err != nil {
		return nil, err
	}
	top, run := maxOrder, n*PageSize
	if region.Contiguous != 0 {
		top = bits.TrailingZeros64(region.Contiguous / PageSize)
		run = min(run, region.Contiguous)
	}
	return &Pool{
		mem: mem, dma: region, run: run, remedy: remedy, pages: newBuddy(uint32(n), top),
		buffers: map[uint64]*Buffer{}, starts: make([]uint64, (n+63)/64),
	}, nil
}

// Size returns the pool's size in bytes.
func (p *Pool) Size() uint64 { return uint64(len(p.mem)) }

// Free returns how many bytes are free, in however many pieces.
func (p *Pool) Free() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return uint64(p.pages.free) * PageSize
}

// Largest returns how many bytes a block can have at most: the size of the pool, or of a run if the device has the memory in several.
func (p *Pool) Largest() uint64 { return p.run }

// Take returns a block of at least n bytes, n > 0, or ErrNoMemory.
func (p *Pool) Take(n uint64) (Block, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.take(n)
}

func (p *Pool) take(n uint64) (Block, error) {
	pages := n/PageSize + min(n%PageSize, 1)
	if pages == 0 || pages > p.run/PageSize {
		return Block{}, p.exhausted(n)
	}
	page, ok := p.pages.take(uint32(pages))
	if !ok {
		return Block{}, p.exhausted(n)
	}
	return Block{Off: uint64(page) * PageSize, Len: pages * PageSize}, nil
}

func (p *Pool) exhausted(n uint64) error {
	if n > p.run && p.run < p.Size() {
		return fmt.Errorf("%w: %d bytes wanted in one piece; for this device memory is contiguous over %d bytes at most, however much there is: ask for less at a time",
			ErrNoMemory, n, p.run)
	}
	_, largest := p.pages.run(none)
	return fmt.Errorf("%w: %d bytes wanted, of the pool's %d bytes %d are free, at most %d in one piece: %s",
		ErrNoMemory, n, p.Size(), uint64(p.pages.free)*PageSize, uint64(largest)*PageSize, p.remedy)
}

// Give returns a block.
func (p *Pool) Give(b Block) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.give(b)
}

func (p *Pool) give(b Block) {
	p.pages.give(uint32(b.Off/PageSize), uint32(b.Len/PageSize))
	if p.freed != nil {
		close(p.freed)
		p.freed = nil
	}
}

// TakeBounce is Take for memory that is soon given back by GiveBounce. It takes less, but at least least bytes, when there is no piece
// of n, and while others have such memory out it waits for them, until ctx or stop end it.
func (p *Pool) TakeBounce(ctx context.Context, stop <-chan struct{}, n, least uint64) (Block, error) {
	for {
		b, wait, err := p.tryBounce(n, least)
		if wait == nil {
			return b, err
		}
		select {
		case <-wait:
		case <-stop:
			return Block{}, err
		case <-ctx.Done():
			return Block{}, ctx.Err()
		}
	}
}

// tryBounce returns a block, or why there is none and, if that can change, what to wait for.
func (p *Pool) tryBounce(n, least uint64) (Block, <-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, err := p.take(n)
	for err != nil && n > least {
		n = max(n/2, least)
		b, err = p.take(n)
	}
	if err == nil {
		p.bounced++
		return b, nil, nil
	}
	if p.bounced == 0 {
		return b, nil, err
	}
	if p.freed == nil {
		p.freed = make(chan struct{})
	}
	return b, p.freed, err
}

// TryBounce is TakeBounce without waiting; false if there is no memory now.
func (p *Pool) TryBounce(n, least uint64) (Block, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, err := p.take(n)
	for err != nil && n > least {
		n = max(n/2, least)
		b, err = p.take(n)
	}
	if err != nil {
		return b, false
	}
	p.bounced++
	return b, true
}

// GiveBounce returns a block that TakeBounce gave.
func (p *Pool) GiveBounce(b Block) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bounced--
	p.give(b)
}

// Region returns a block as a region.
func (p *Pool) Region(b Block) (*shm.Region, error) { return p.dma.View(b.Off, b.Len) }

// Bytes returns a block's memory.
func (p *Pool) Bytes(b Block) []byte { return p.mem[b.Off : b.Off+b.Len : b.Off+b.Len] }

// IOVA returns where the device finds byte off of the pool, and what follows it in the same block.
func (p *Pool) IOVA(off uint64) uint64 { return p.dma.IOVAOf(off) }
