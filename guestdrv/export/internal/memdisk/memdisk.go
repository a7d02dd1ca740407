// Package memdisk is a disk in memory for tests of the servers: it has everything that package export knows of, counts what it
// was asked for, and fails or waits where a test wants it to. What is written is there at once; it says nothing of durability
// but how often it was asked for.
package memdisk

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
)

// Op is what the disk is asked for.
type Op uint8

// Operations.
const (
	Read Op = iota
	Write
	WriteFUA
	Flush
	Discard
	Zeroes
	Deallocate
	Extents
	ops
)

// Disk is the disk. The fields are set before it is used.
type Disk struct {
	Block     int  // bytes of a logical block
	Protect   bool // ReadOnly
	Lacks     Lack
	Cacheless bool

	// Before is asked before each operation, without a lock; an error is the operation's. nil: nothing.
	Before func(ctx context.Context, op Op, off, length int64) error

	// Count is how often each operation was asked for.
	Count [ops]atomic.Int64
	// Lent is how many pieces of DMAMemory have not been given back.
	Lent atomic.Int64

	mu        sync.RWMutex
	data      []byte
	allocated []bool // by block
}

// Lack is what a disk does without.
type Lack struct{ Discard, Zeroes, Deallocate, Map, ReadsZeroes bool }

// New returns a disk of blocks of size bytes, none of them allocated.
func New(blocks, size int) *Disk {
	return &Disk{Block: size, data: make([]byte, blocks*size), allocated: make([]bool, blocks)}
}

// Bytes returns a copy of what is on the disk.
func (d *Disk) Bytes() []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return append([]byte(nil), d.data...)
}

// Resize changes the size to blocks. What is new is not allocated.
func (d *Disk) Resize(blocks int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	data, allocated := make([]byte, blocks*d.Block), make([]bool, blocks)
	copy(data, d.data)
	copy(allocated, d.allocated)
	d.data, d.allocated = data, allocated
}

func (d *Disk) begin(ctx context.Context, op Op, off, length int64) error {
	d.Count[op].Add(1)
	if d.Before != nil {
		if err := d.Before(ctx, op, off, length); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	b := int64(d.Block)
	if size := d.Size(); off < 0 || length < 0 || off%b != 0 || length%b != 0 || off > size || length > size-off {
		return fmt.Errorf("memdisk: %d bytes at %d: not full blocks of the disk", length, off)
	}
	return nil
}

// ReadAtContext implements export.Disk.
func (d *Disk) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.begin(ctx, Read, off, int64(len(p))); err != nil {
		return 0, err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	return copy(p, d.data[off:]), nil
}

// WriteAtContext implements export.Disk.
func (d *Disk) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	return d.write(ctx, Write, p, off)
}

// WriteFUA implements export.Disk.
func (d *Disk) WriteFUA(ctx context.Context, p []byte, off int64) (int, error) {
	return d.write(ctx, WriteFUA, p, off)
}

func (d *Disk) write(ctx context.Context, op Op, p []byte, off int64) (int, error) {
	if err := d.begin(ctx, op, off, int64(len(p))); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mark(off, int64(len(p)), true)
	return copy(d.data[off:], p), nil
}

// Flush implements export.Disk.
func (d *Disk) Flush(ctx context.Context) error { return d.begin(ctx, Flush, 0, 0) }

// Discard implements export.Disk: the blocks read as zeroes, or, if the disk lacks ReadsZeroes, as what they were.
func (d *Disk) Discard(ctx context.Context, off, length int64) error {
	return d.clear(ctx, Discard, off, length, d.Lacks.ReadsZeroes, false)
}

// WriteZeroes implements export.Disk.
func (d *Disk) WriteZeroes(ctx context.Context, off, length int64) error {
	return d.clear(ctx, Zeroes, off, length, false, true)
}

// WriteZeroesDeallocate implements export.Deallocator.
func (d *Disk) WriteZeroesDeallocate(ctx context.Context, off, length int64) error {
	return d.clear(ctx, Deallocate, off, length, false, false)
}

func (d *Disk) clear(ctx context.Context, op Op, off, length int64, keep, allocated bool) error {
	if err := d.begin(ctx, op, off, length); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !keep {
		clear(d.data[off : off+length])
	}
	d.mark(off, length, allocated)
	return nil
}

func (d *Disk) mark(off, length int64, allocated bool) {
	b := int64(d.Block)
	for i := off / b; i < (off+length)/b; i++ {
		d.allocated[i] = allocated
	}
}

// Extents implements export.Mapper.
func (d *Disk) Extents(ctx context.Context, off, length int64, each func(length int64, allocated bool) bool) error {
	if err := d.begin(ctx, Extents, off, length); err != nil {
		return err
	}
	b := int64(d.Block)
	for at, end := off/b, (off+length)/b; at < end; {
		d.mu.RLock()
		is, n := d.allocated[at], int64(1)
		for at+n < end && d.allocated[at+n] == is {
			n++
		}
		d.mu.RUnlock()
		if !each(n*b, is) {
			return nil
		}
		at += n
	}
	return nil
}

// DMAMemory implements export.Memory.
func (d *Disk) DMAMemory(n int) (p []byte, free func(), err error) {
	d.Lent.Add(1)
	return make([]byte, n), sync.OnceFunc(func() { d.Lent.Add(-1) }), nil
}

// Size implements export.Disk.
func (d *Disk) Size() int64 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return int64(len(d.data))
}

// BlockSize implements export.Disk.
func (d *Disk) BlockSize() int { return d.Block }

// ReadOnly implements export.Disk.
func (d *Disk) ReadOnly() bool { return d.Protect }

// CanDiscard implements export.Capable.
func (d *Disk) CanDiscard() bool { return !d.Lacks.Discard }

// CanWriteZeroes implements export.Capable.
func (d *Disk) CanWriteZeroes() bool { return !d.Lacks.Zeroes }

// HasCache implements export.Capable.
func (d *Disk) HasCache() bool { return !d.Cacheless }

// CanDeallocate implements export.Deallocator.
func (d *Disk) CanDeallocate() bool { return !d.Lacks.Deallocate }

// CanMap implements export.Mapper.
func (d *Disk) CanMap() bool { return !d.Lacks.Map }

// ReadsZeroes implements export.Mapper.
func (d *Disk) ReadsZeroes() bool { return !d.Lacks.ReadsZeroes }
