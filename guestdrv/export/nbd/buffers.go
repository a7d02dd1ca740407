package nbd

import (
	"math/bits"
	"sync"

	"github.com/shadowbell/shadowbell/guestdrv/export"
)

// Payload is in memory that the device reaches, so that the driver copies nothing, up to a limit; what is needed beyond that is of
// the heap. Buffers have sizes that are powers of two and are kept for the next request.

const (
	minBuffer = 4096
	classes   = 9 // 4 KiB to 1 MiB, which is maxPayload
)

// buffer is memory for one request's payload.
type buffer struct {
	mem   []byte
	class int
	free  func() // gives DMA memory back; nil: heap
}

// pool is all the buffers of a server.
type pool struct {
	disk export.Disk // whose memory it is
	heap [classes]sync.Pool
	once sync.Once
	zero *buffer // nothing but zeroes, see zeroes

	mu    sync.Mutex // guards what follows
	limit int        // bytes of DMA memory
	taken int        // of these, in use or idle
	idle  [classes][]*buffer
	spare int // bytes of idle
	shut  bool
}

// classOf returns the class whose buffers have room for n bytes, n <= maxPayload.
func classOf(n int) int { return max(bits.Len(uint(n-1))-12, 0) }

// sizeOf is the size of a class's buffers.
func sizeOf(class int) int { return minBuffer << class }

// get returns a buffer with room for n bytes, 0 < n <= maxPayload.
func (p *pool) get(n int) *buffer {
	class := classOf(n)
	size := sizeOf(class)
	p.mu.Lock()
	if last := len(p.idle[class]) - 1; last >= 0 {
		b := p.idle[class][last]
		p.idle[class] = p.idle[class][:last]
		p.spare -= size
		p.mu.Unlock()
		return b
	}
	evicted := p.evict(size)
	ok := p.taken+size <= p.limit
	if ok {
		p.taken += size
	}
	p.mu.Unlock()
	for _, b := range evicted {
		b.free()
	}
	if ok {
		mem, free, err := export.DMAMemory(p.disk, size)
		if err == nil {
			return &buffer{mem: mem, class: class, free: free}
		}
		// There is less than was thought: try no more.
		p.mu.Lock()
		p.taken -= size
		p.limit = p.taken
		p.mu.Unlock()
	}
	if b, ok := p.heap[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{mem: make([]byte, size), class: class}
}

// evict takes idle buffers of other classes out until size bytes fit, unless that is impossible. The caller frees them.
func (p *pool) evict(size int) (out []*buffer) {
	if p.taken-p.spare+size > p.limit {
		return nil
	}
	for class := classes - 1; class >= 0; class-- {
		for len(p.idle[class]) > 0 && p.taken+size > p.limit {
			last := len(p.idle[class]) - 1
			out = append(out, p.idle[class][last])
			p.idle[class] = p.idle[class][:last]
			p.taken -= sizeOf(class)
			p.spare -= sizeOf(class)
		}
	}
	return out
}

// put gives a buffer back that nobody uses.
func (p *pool) put(b *buffer) {
	if b.free == nil {
		p.heap[b.class].Put(b)
		return
	}
	p.mu.Lock()
	if !p.shut {
		p.idle[b.class] = append(p.idle[b.class], b)
		p.spare += len(b.mem)
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	p.drop(b)
}

// drop gives a buffer back that the device may still have a command for: the driver keeps the memory until that has ended, and it
// is not used again here.
func (p *pool) drop(b *buffer) {
	if b.free == nil {
		return
	}
	b.free()
	p.mu.Lock()
	p.taken -= len(b.mem)
	p.mu.Unlock()
}

// zeroesAtOnce is how much is written at a time where the disk has no Write Zeroes.
const zeroesAtOnce = 256 << 10

// zeroes returns memory that is all zeroes, for writes. All of them share it, also with those that the device has not ended.
func (p *pool) zeroes() []byte {
	p.once.Do(func() {
		p.zero = p.get(zeroesAtOnce)
		clear(p.zero.mem)
	})
	return p.zero.mem
}

// close gives back what is idle, and lets put give back the rest.
func (p *pool) close() {
	p.mu.Lock()
	p.shut = true
	idle := p.idle
	p.idle, p.spare = [classes][]*buffer{}, 0
	p.mu.Unlock()
	p.once.Do(func() {})
	if p.zero != nil {
		idle[p.zero.class] = append(idle[p.zero.class], p.zero)
		p.zero = nil
	}
	for _, list := range idle {
		for _, b := range list {
			p.drop(b)
		}
	}
}
