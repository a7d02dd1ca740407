package backend

import "github.com/shadowbell/shadowbell/shared/shm"

const (
	bounceSize  = 128 << 10
	bounceCount = 8
)

// bounceBuffers stand between O_DIRECT and guest memory that is not aligned enough for it. There
// are few of them, made when the first is needed: a request that finds none waits for one, and a long
// one goes through its own in pieces.
type bounceBuffers struct {
	mem     []byte // on the heap, from a page boundary on
	free    []int8
	waiting fifo[uint32] // slots
}

// get gives slot s, with index i, a buffer, or puts it in line and returns false.
func (p *bounceBuffers) get(i uint32, s *slot) bool {
	if p.mem == nil {
		mem := make([]byte, bounceSize*bounceCount+shm.PageSize)
		p.mem = mem[-address(mem)&(shm.PageSize-1):][:bounceSize*bounceCount]
		for k := range int8(bounceCount) {
			p.free = append(p.free, k)
		}
	}
	if len(p.free) == 0 {
		p.waiting.push(i)
		return false
	}
	s.bounce = p.free[len(p.free)-1]
	p.free = p.free[:len(p.free)-1]
	return true
}

// put takes the buffer of s back and returns the slot that is next in line for one.
func (p *bounceBuffers) put(s *slot) (next uint32, ok bool) {
	p.free = append(p.free, s.bounce)
	s.bounce = noBounce
	if p.waiting.n == 0 {
		return 0, false
	}
	return p.waiting.pop(), true
}

func (p *bounceBuffers) buffer(s *slot) []byte {
	return p.mem[int(s.bounce)*bounceSize:][:bounceSize]
}

// fill copies the next piece of a write from guest memory. It is false if that has gone away.
func (p *bounceBuffers) fill(s *slot) bool {
	if s.req.Op != OpWrite {
		return true
	}
	return shm.Guard(func() {
		s.vec = rest(s.vec[:0], s.req.Vec, s.moved)
		gather(p.buffer(s), s.vec)
	}) == nil
}

// empty copies the n bytes that were read to guest memory. It is false if that has gone away.
func (p *bounceBuffers) empty(s *slot, n uint64) bool {
	return shm.Guard(func() {
		s.vec = rest(s.vec[:0], s.req.Vec, s.moved)
		scatter(s.vec, p.buffer(s)[:n])
	}) == nil
}
