package backend

import "github.com/shadowbell/shadowbell/shared/shm"

// What the queues over io_uring have in common, whatever their entries are: slots, of which the kernel has one for each, and bounce buffers.

const (
	sqEntries = 128
	cqEntries = 1024
	maxSlots  = cqEntries // so that completions always fit into the ring
)

// slots are those of a queue, by index. There are as many as were ever in use at once.
type slots[T any] struct {
	all  []T
	free []uint32
}

// room says that there is one to take.
func (s *slots[T]) room() bool { return len(s.free) > 0 || len(s.all) < maxSlots }

func (s *slots[T]) take() uint32 {
	if len(s.free) == 0 {
		from := len(s.all)
		s.all = append(s.all, make([]T, min(64, maxSlots-from))...)
		for i := len(s.all) - 1; i >= from; i-- {
			s.free = append(s.free, uint32(i))
		}
	}
	i := s.free[len(s.free)-1]
	s.free = s.free[:len(s.free)-1]
	return i
}

func (s *slots[T]) give(i uint32) { s.free = append(s.free, i) }

const (
	bounceSize  = 128 << 10
	bounceCount = 8
)

const noBounce = bounceIndex(-1)

// bounceIndex is a buffer that a slot has, or noBounce.
type bounceIndex int8

// bounceBuffers stand between the kernel and guest memory that does not suit it: for O_DIRECT, or for the device. There
// are few of them, made when the first is needed: a slot that finds none waits for one, and a long
// request goes through its own in pieces.
type bounceBuffers struct {
	mem     []byte // on the heap, from a page boundary on
	free    []bounceIndex
	waiting fifo[uint32] // slots
}

// get gives slot i a buffer, or puts it in line and returns false.
func (p *bounceBuffers) get(i uint32, b *bounceIndex) bool {
	if p.mem == nil {
		mem := make([]byte, bounceSize*bounceCount+shm.PageSize)
		p.mem = mem[-address(mem)&(shm.PageSize-1):][:bounceSize*bounceCount]
		for k := range bounceIndex(bounceCount) {
			p.free = append(p.free, k)
		}
	}
	if len(p.free) == 0 {
		p.waiting.push(i)
		return false
	}
	*b = p.free[len(p.free)-1]
	p.free = p.free[:len(p.free)-1]
	return true
}

// put takes a slot's buffer back and returns the slot that is next in line for one.
func (p *bounceBuffers) put(b *bounceIndex) (next uint32, ok bool) {
	p.free = append(p.free, *b)
	*b = noBounce
	if p.waiting.n == 0 {
		return 0, false
	}
	return p.waiting.pop(), true
}

func (p *bounceBuffers) buffer(b bounceIndex) []byte {
	return p.mem[int(b)*bounceSize:][:bounceSize]
}

// fill copies vec into a buffer. It is false if the guest's memory has gone away.
func (p *bounceBuffers) fill(b bounceIndex, vec []Seg) bool {
	return shm.Guard(func() { gather(p.buffer(b), vec) }) == nil
}

// empty copies the first n bytes of a buffer to vec. It is false if the guest's memory has gone away.
func (p *bounceBuffers) empty(b bounceIndex, vec []Seg, n uint64) bool {
	return shm.Guard(func() { scatter(vec, p.buffer(b)[:n]) }) == nil
}
