package backend

import "slices"

const (
	registeredMost  = 1024    // entries of a queue's table
	registeredPiece = 1 << 30 // bytes of one: the kernel's limit
)

// bufferTable is what registered needs of a uring.Ring.
type bufferTable interface {
	RegisterSparseBuffers(n int) error
	UpdateBuffers(at int, bufs [][]byte) error
}

// registered is guest memory that a queue's ring has pinned, so that the kernel need not look for its pages with every request. Memory that
// the kernel does not take, for its kind or for the limit of locked memory, is served without.
//
// What is pinned is all there: the whole of a guest's memory becomes resident. And it stays what it is: pages that a balloon takes away
// and gives back are others than those that the ring knows, which is why vfio has no balloon either.
type registered struct {
	ring   bufferTable
	state  int8 // 0: not asked yet; 1: there is a table; -1: the kernel has none
	used   []registeredBuffer
	free   []uint16
	latest int // index in used of what was found last
}

type registeredBuffer struct {
	from, to uintptr
	of       uintptr // the mapping's first byte
	index    uint16
}

// add registers b, all of it or nothing.
func (p *registered) add(b []byte) {
	base := address(b)
	if len(b) == 0 || p.has(base) || !p.table() {
		return
	}
	n := (len(b) + registeredPiece - 1) / registeredPiece
	if n > len(p.free) {
		return
	}
	for i := range n {
		from := i * registeredPiece
		piece := b[from:min(len(b), from+registeredPiece)]
		index := p.free[len(p.free)-1]
		if p.ring.UpdateBuffers(int(index), [][]byte{piece}) != nil {
			p.remove(b)
			return
		}
		p.free = p.free[:len(p.free)-1]
		p.used = append(p.used, registeredBuffer{from: address(piece), to: address(piece) + uintptr(len(piece)), of: base, index: index})
	}
}

func (p *registered) has(base uintptr) bool {
	return slices.ContainsFunc(p.used, func(r registeredBuffer) bool { return r.of == base })
}

// table makes the ring's table with the first memory.
func (p *registered) table() bool {
	if p.state == 0 {
		p.state = -1
		if p.ring.RegisterSparseBuffers(registeredMost) == nil {
			p.state = 1
			for i := range registeredMost {
				p.free = append(p.free, uint16(registeredMost-1-i))
			}
		}
	}
	return p.state > 0
}

// remove unpins b.
func (p *registered) remove(b []byte) {
	base := address(b)
	p.used = slices.DeleteFunc(p.used, func(r registeredBuffer) bool {
		if r.of != base {
			return false
		}
		// A place that cannot be emptied is not used again.
		if p.ring.UpdateBuffers(int(r.index), [][]byte{nil}) == nil {
			p.free = append(p.free, r.index)
		}
		return true
	})
	p.latest = 0
}

// find returns the index of the buffer that s lies in.
func (p *registered) find(s *Seg) (index uint16, ok bool) {
	if len(p.used) == 0 {
		return 0, false
	}
	from := segAddress(s)
	to := from + uintptr(s.Len)
	if r := &p.used[p.latest]; from >= r.from && to <= r.to && to >= from {
		return r.index, true
	}
	for i := range p.used {
		if r := &p.used[i]; from >= r.from && to <= r.to && to >= from {
			p.latest = i
			return r.index, true
		}
	}
	return 0, false
}

// findAll returns the index of the buffer that all of vec lies in.
func (p *registered) findAll(vec []Seg) (index uint16, ok bool) {
	if index, ok = p.find(&vec[0]); !ok {
		return 0, false
	}
	r := &p.used[p.latest]
	for i := range vec[1:] {
		from := segAddress(&vec[1+i])
		if to := from + uintptr(vec[1+i].Len); from < r.from || to > r.to || to < from {
			return 0, false
		}
	}
	return index, true
}
