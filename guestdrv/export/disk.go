// Package export is what the servers that give a namespace to other programs have in common: how they see the disk (Disk,
// and what a disk may offer beside it), and how errors become errno values. The servers are in the packages below it.
//
// A server takes a Disk, and finds by itself what it has beside the methods of that: Capable, Deallocator, Mapper, Memory, Queued.
//
// It knows nothing of the driver: *guestdrv.Namespace is a Disk, and so is memory in tests. It opens nothing and serves nothing.
package export

import "context"

// Disk is a block device. Its methods are safe for any number of goroutines. Offsets and lengths are bytes, multiples of BlockSize
// and inside Size.
//
// When a context ends, a call returns at once. What was under way may still be done.
type Disk interface {
	// ReadAtContext fills p from offset off.
	ReadAtContext(ctx context.Context, p []byte, off int64) (int, error)
	// WriteAtContext writes p at offset off. It is durable after a Flush that begins later.
	WriteAtContext(ctx context.Context, p []byte, off int64) (int, error)
	// WriteFUA is WriteAtContext that is durable when it returns.
	WriteFUA(ctx context.Context, p []byte, off int64) (int, error)
	// Flush makes durable what was written before, by anybody and through any queue.
	Flush(ctx context.Context) error
	// Discard says that the bytes are not needed. What they read as afterwards is the disk's choice.
	Discard(ctx context.Context, off, length int64) error
	// WriteZeroes makes the bytes read as zeroes, without giving up their room.
	WriteZeroes(ctx context.Context, off, length int64) error
	// Size is the size in bytes. It may change.
	Size() int64
	// BlockSize is the size of a logical block in bytes, a power of two from 512 on.
	BlockSize() int
	// ReadOnly says that writes are refused.
	ReadOnly() bool
}

// Capable is a Disk that may lack what an optional command does. A Disk without this interface has everything, and a cache.
type Capable interface {
	// CanDiscard says that Discard works.
	CanDiscard() bool
	// CanWriteZeroes says that WriteZeroes works.
	CanWriteZeroes() bool
	// HasCache says that there is a volatile write cache: without one all writes are durable and Flush has nothing to do.
	HasCache() bool
}

// Deallocator is a Disk whose Write Zeroes can give the room up.
type Deallocator interface {
	// CanDeallocate says that WriteZeroesDeallocate gives room up; otherwise it is WriteZeroes.
	CanDeallocate() bool
	// WriteZeroesDeallocate makes the bytes read as zeroes, and gives their room up.
	WriteZeroesDeallocate(ctx context.Context, off, length int64) error
}

// Mapper is a Disk that can say which blocks are in use.
type Mapper interface {
	// Extents calls each for the pieces of [off, off+length), in order and without gaps, until each returns false. A piece that is not
	// allocated reads as zeroes if ReadsZeroes. A disk that does not know says that everything is allocated.
	Extents(ctx context.Context, off, length int64, each func(length int64, allocated bool) bool) error
	// CanMap says that Extents knows.
	CanMap() bool
	// ReadsZeroes says that what is not allocated reads as zeroes.
	ReadsZeroes() bool
}

// Memory is a Disk with memory that the device can reach: data in it is not copied on the way.
type Memory interface {
	// DMAMemory returns n bytes, page-aligned, and what gives them back. Nothing may use them after that.
	DMAMemory(n int) (p []byte, free func(), err error)
}

// DMAMemory returns n bytes of the disk's own memory, or of the heap if it has none.
func DMAMemory(d Disk, n int) (p []byte, free func(), err error) {
	if m, ok := d.(Memory); ok {
		return m.DMAMemory(n)
	}
	return make([]byte, n), func() {}, nil
}

// Caps are what a disk offers, all of it in one place.
type Caps struct {
	Discard     bool // Discard works
	Zeroes      bool // WriteZeroes works
	Deallocate  bool // WriteZeroesDeallocate gives room up
	Cache       bool // Flush matters
	Map         bool // Extents knows what is allocated
	ReadsZeroes bool // and the rest reads as zeroes
}

// CapsOf asks d for what it offers.
func CapsOf(d Disk) Caps {
	c := Caps{Discard: true, Zeroes: true, Cache: true}
	if o, ok := d.(Capable); ok {
		c.Discard, c.Zeroes, c.Cache = o.CanDiscard(), o.CanWriteZeroes(), o.HasCache()
	}
	if o, ok := d.(Deallocator); ok {
		c.Deallocate = c.Zeroes && o.CanDeallocate()
	}
	if o, ok := d.(Mapper); ok {
		c.Map, c.ReadsZeroes = o.CanMap(), o.ReadsZeroes()
	}
	return c
}
