package backend

import (
	"errors"
	"math"
	"slices"
	"sync"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

const (
	registeredMost  = 1 << 14 // entries of a queue's table: the kernel's limit
	registeredShift = 22      // log2 of the bytes of one, by address
	registerAfter   = 4       // uses of a piece of memory before it is registered
)

// bufferTable is what registered needs of a uring.Ring.
type bufferTable interface {
	RegisterSparseBuffers(n int) error
	UpdateBuffers(at int, bufs [][]byte) error
}

// registered is guest memory that a queue's ring has pinned, so that the kernel need not look for its pages with every request. Memory that
// the kernel does not take, for its kind or for the limit of locked memory, is served without.
//
// It is pinned in pieces of 4 MiB, when they have been used some times: the whole of a guest would make all of its memory resident, and where that has
// never been touched a worker would be away for seconds. What is pinned stays what it is: pages that a balloon takes away and gives back
// are others than those that the ring knows, which is why vfio has no balloon either.
type registered struct {
	ring   bufferTable
	state  int8 // 0: not asked yet; 1: there is a table; -1: the kernel has none
	next   int  // first entry that was never used
	free   []uint16
	full   func() // tells that the kernel lets this process lock no more memory; nil: nobody
	maps   []registeredMap
	latest int // index in maps of what was found last
}

// registeredMap is a mapping of guest memory.
type registeredMap struct {
	b        []byte
	from, to uintptr
	places   []int32 // by piece: its entry in the table; or less than 0, minus the number of uses; or refused
}

const refused = math.MinInt32

// add says that there is b.
func (p *registered) add(b []byte) {
	from := address(b)
	if len(b) == 0 || slices.ContainsFunc(p.maps, func(m registeredMap) bool { return m.from == from }) {
		return
	}
	m := registeredMap{b: b, from: from, to: from + uintptr(len(b))}
	m.places = make([]int32, (m.to-1)>>registeredShift-from>>registeredShift+1)
	for i := range m.places {
		m.places[i] = -1
	}
	p.maps = append(p.maps, m)
}

// remove unpins b.
func (p *registered) remove(b []byte) {
	from := address(b)
	p.maps = slices.DeleteFunc(p.maps, func(m registeredMap) bool {
		if m.from != from {
			return false
		}
		for _, place := range m.places {
			// A place that cannot be emptied is not used again.
			if place >= 0 && p.ring.UpdateBuffers(int(place), [][]byte{nil}) == nil {
				p.free = append(p.free, uint16(place))
			}
		}
		return true
	})
	p.latest = 0
}

// find returns the index of the buffer that s lies in.
func (p *registered) find(s *Seg) (index uint16, ok bool) {
	if len(p.maps) == 0 || s.Len == 0 {
		return 0, false
	}
	from := segAddress(s)
	last := from + uintptr(s.Len) - 1
	m := &p.maps[p.latest]
	if from < m.from || last >= m.to || last < from {
		if m = p.other(from, last); m == nil {
			return 0, false
		}
	}
	piece := from>>registeredShift - m.from>>registeredShift
	if from>>registeredShift != last>>registeredShift {
		return 0, false
	}
	place := m.places[piece]
	if place < 0 {
		if place = p.use(m, piece); place < 0 {
			return 0, false
		}
	}
	return uint16(place), true
}

// other finds the mapping that is not the latest.
func (p *registered) other(from, last uintptr) *registeredMap {
	if last < from {
		return nil
	}
	for i := range p.maps {
		if m := &p.maps[i]; from >= m.from && last < m.to {
			p.latest = i
			return m
		}
	}
	return nil
}

// use counts a use of a piece that is not registered, and registers it when it is worth it.
func (p *registered) use(m *registeredMap, piece uintptr) int32 {
	place := &m.places[piece]
	switch {
	case *place == refused:
		return refused
	case *place > -registerAfter:
		*place--
		return *place
	}
	*place = refused
	index, ok := p.entry()
	if !ok {
		return refused
	}
	from := max(m.from, (m.from>>registeredShift+piece)<<registeredShift)
	to := min(m.to, (m.from>>registeredShift+piece+1)<<registeredShift)
	if err := p.ring.UpdateBuffers(int(index), [][]byte{m.b[from-m.from : to-m.from]}); err != nil {
		if errors.Is(err, unix.ENOMEM) && p.full != nil {
			p.full()
		}
		p.free = append(p.free, index)
		return refused
	}
	*place = int32(index)
	return *place
}

// raiseMemlock is what to do about it.
const raiseMemlock = "raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=) or give CAP_IPC_LOCK; nopin registers none"

// memlock tells of a namespace, once, that some memory of its guests could not be registered.
type memlock struct {
	log  hclog.Logger // nil: nobody is told
	once sync.Once
}

// tell is called by any worker.
func (m *memlock) tell(namespace string) {
	m.once.Do(func() {
		if m.log != nil {
			m.log.Warn("the kernel registers no more memory of guests: the rest is served without, which costs more for each command", "namespace", namespace, "remedy", raiseMemlock)
		}
	})
}

// entry takes an entry of the table, which is made for the first one.
func (p *registered) entry() (index uint16, ok bool) {
	if p.state == 0 {
		p.state = -1
		if p.ring.RegisterSparseBuffers(registeredMost) == nil {
			p.state = 1
		}
	}
	if p.state < 0 {
		return 0, false
	}
	if n := len(p.free) - 1; n >= 0 {
		index, p.free = p.free[n], p.free[:n]
		return index, true
	}
	if p.next == registeredMost {
		return 0, false
	}
	p.next++
	return uint16(p.next - 1), true
}

// findAll returns the index of the buffer that all of vec lies in.
func (p *registered) findAll(vec []Seg) (index uint16, ok bool) {
	piece := segAddress(&vec[0]) >> registeredShift
	for i := range vec {
		from := segAddress(&vec[i])
		last := from + uintptr(vec[i].Len) - 1
		if from>>registeredShift != piece || last>>registeredShift != piece || last < from {
			return 0, false
		}
	}
	if index, ok = p.find(&vec[0]); !ok {
		return 0, false
	}
	in := &p.maps[p.latest]
	for i := range vec {
		if from := segAddress(&vec[i]); from < in.from || from+uintptr(vec[i].Len) > in.to {
			return 0, false
		}
	}
	return index, true
}
