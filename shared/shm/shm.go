// Package shm gives typed, bounds-checked access to memory that is shared
// with a peer who is not trusted: mapped memory, or heap memory in tests, where
// the race detector can see it.
//
// A Region is checked once, when a word, a view or a slice is taken from it; what
// it hands out then costs no more than an ordinary pointer. The peer can take the
// memory away at any time by shrinking the file under it, so every goroutine that
// touches a Region of a peer runs under [Guard] (rule R36).
//
// Values are little-endian, as NVMe has them, and so are the machines this
// package builds for (rule R20). It does not know what the memory means: rings
// and doorbells are in packages ring and dbbuf.
package shm

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// PageSize is the size of the host's base page in bytes.
const PageSize = 4096

// ErrRange says that an access lies outside its region.
var ErrRange = errors.New("outside the region")

// ErrAlign says that an access is not naturally aligned.
var ErrAlign = errors.New("not naturally aligned")

// Region is a span of shared memory. The zero Region is empty. A Region may be
// read and written from any goroutine; Close must be the last use of it and of
// all that was taken from it.
type Region struct {
	mem     []byte
	mapping *mapping // nil: a view, or heap memory
}

// NewHeap returns size bytes of zeroed, page-aligned heap memory as a Region.
func NewHeap(size int) *Region {
	b := make([]byte, size+PageSize)
	skip := int(-address(b) & (PageSize - 1))
	return &Region{mem: b[skip : skip+size : skip+size]}
}

// NewWords returns size bytes of zeroed heap memory, aligned for any word but not to pages, as a Region.
func NewWords(size int) *Region {
	return &Region{mem: wordBytes(make([]uint64, (size+7)/8))[:size:size]}
}

// Len returns the size in bytes.
func (r *Region) Len() uint64 { return uint64(len(r.mem)) }

func (r *Region) check(off, n, align uint64) error {
	if size := uint64(len(r.mem)); off > size || n > size-off {
		return fmt.Errorf("%w: [%#x, +%#x) of %#x bytes", ErrRange, off, n, size)
	}
	if align > 1 && (off+uint64(address(r.mem)))%align != 0 {
		return fmt.Errorf("%w: offset %#x, width %d", ErrAlign, off, align)
	}
	return nil
}

// View returns the n bytes from off as a Region of their own. It shares the memory, and
// closing it does nothing.
func (r *Region) View(off, n uint64) (*Region, error) {
	if err := r.check(off, n, 1); err != nil {
		return nil, err
	}
	return &Region{mem: r.mem[off : off+n : off+n]}, nil
}

// Word32 returns the 32-bit word at byte offset off, which must be a multiple of 4.
func (r *Region) Word32(off uint64) (*atomic.Uint32, error) {
	if err := r.check(off, 4, 4); err != nil {
		return nil, err
	}
	return word32(r.mem, off), nil
}

// Word64 returns the 64-bit word at byte offset off, which must be a multiple of 8.
func (r *Region) Word64(off uint64) (*atomic.Uint64, error) {
	if err := r.check(off, 8, 8); err != nil {
		return nil, err
	}
	return word64(r.mem, off), nil
}

// Bytes returns the n bytes from off, for use as a backend's I/O vector only: a
// peer may change them under the reader, so they must not be parsed in place (R31).
func (r *Region) Bytes(off, n uint64) ([]byte, error) {
	if err := r.check(off, n, 1); err != nil {
		return nil, err
	}
	return r.mem[off : off+n : off+n], nil
}

// Read copies len(p) bytes from off into p.
func (r *Region) Read(off uint64, p []byte) error {
	if err := r.check(off, uint64(len(p)), 1); err != nil {
		return err
	}
	copy(p, r.mem[off:])
	return nil
}

// Write copies p to off.
func (r *Region) Write(off uint64, p []byte) error {
	if err := r.check(off, uint64(len(p)), 1); err != nil {
		return err
	}
	copy(r.mem[off:], p)
	return nil
}

// Zero clears the n bytes from off.
func (r *Region) Zero(off, n uint64) error {
	if err := r.check(off, n, 1); err != nil {
		return err
	}
	clear(r.mem[off : off+n])
	return nil
}
