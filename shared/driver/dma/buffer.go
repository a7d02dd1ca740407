package dma

import (
	"fmt"
	"math/bits"
)

// Buffer is memory that a caller holds. Its methods are safe for concurrent use, its memory is not.
type Buffer struct {
	pool  *Pool
	block Block
	n     int
	pins  int  // commands that name it
	freed bool // by the caller
}

// NewBuffer returns a buffer of n bytes, n > 0. What is in it is undefined.
func (p *Pool) NewBuffer(n int) (*Buffer, error) {
	if n <= 0 {
		return nil, fmt.Errorf("DMA buffer of %d bytes", n)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	block, err := p.take(uint64(n))
	if err != nil {
		return nil, err
	}
	b := &Buffer{pool: p, block: block, n: n}
	p.buffers[block.Off] = b
	page := block.Off / PageSize
	p.starts[page/64] |= 1 << (page % 64)
	return b, nil
}

// Bytes returns the memory.
func (b *Buffer) Bytes() []byte { return b.pool.Bytes(b.block)[:b.n:b.n] }

// IOVA returns where the device finds it.
func (b *Buffer) IOVA() uint64 { return b.pool.IOVA(b.block.Off) }

// Free gives the buffer back, at once or when the last command that names it has ended. It reports whether this was the
// first call.
func (b *Buffer) Free() bool {
	p := b.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if b.freed {
		return false
	}
	b.freed = true
	b.drop()
	return true
}

// Unpin ends one command's use of the buffer.
func (b *Buffer) Unpin() {
	p := b.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	b.pins--
	b.drop()
}

func (b *Buffer) drop() {
	if !b.freed || b.pins > 0 {
		return
	}
	p := b.pool
	page := b.block.Off / PageSize
	p.starts[page/64] &^= 1 << (page % 64)
	delete(p.buffers, b.block.Off)
	p.give(b.block)
}

// Find returns the offset in the pool of mem, or false if mem is not memory of the pool.
func (p *Pool) Find(mem []byte) (off uint64, ok bool) {
	off = distance(p.mem, mem)
	return off, off < uint64(len(p.mem)) && uint64(len(mem)) <= uint64(len(p.mem))-off
}

// Pin finds the buffer that the n bytes at offset off of the pool lie in, and keeps its memory until Unpin. If there
// is none the error is ErrFreed.
func (p *Pool) Pin(off, n uint64) (*Buffer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.buffers[p.startBefore(off/PageSize)*PageSize]
	if b == nil || b.freed || off < b.block.Off || off+n > b.block.Off+b.block.Len {
		return nil, fmt.Errorf("%w: %d bytes at offset %#x of the pool belong to no buffer", ErrFreed, n, off)
	}
	b.pins++
	return b, nil
}

// startBefore returns the last page up to page at which a buffer begins, or 0.
func (p *Pool) startBefore(page uint64) uint64 {
	word := p.starts[page/64] << (63 - page%64) >> (63 - page%64)
	for i := page / 64; ; i-- {
		if word != 0 {
			return i*64 + uint64(bits.Len64(word)) - 1
		}
		if i == 0 {
			return 0
		}
		word = p.starts[i-1]
	}
}
