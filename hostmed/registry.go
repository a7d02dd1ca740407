package hostmed

import (
	"slices"
	"strconv"
	"sync"
)

// registry is which controllers there are, for those who only look: Mediator.mu may be held for as long as a medium takes to open or close.
type registry struct {
	mu    sync.Mutex // guards the rest; nothing is called with it held
	ports []*port
	last  uint16 // trace number
}

// add gives p a number that no other port has. There are less than 65535 of them.
func (r *registry) add(p *port) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if r.last++; r.last != 0 && !slices.ContainsFunc(r.ports, func(x *port) bool { return x.trace == r.last }) {
			break
		}
	}
	p.trace = r.last
	r.ports = append(r.ports, p)
}

func (r *registry) remove(p *port) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ports = slices.DeleteFunc(r.ports, func(x *port) bool { return x == p })
}

// find returns the ports that which means: a socket's path, a trace number, or, empty, all.
func (r *registry) find(which string) []*port {
	r.mu.Lock()
	defer r.mu.Unlock()
	if which == "" {
		return slices.Clone(r.ports)
	}
	for _, p := range r.ports {
		if p.path == which || strconv.Itoa(int(p.trace)) == which {
			return []*port{p}
		}
	}
	return nil
}

// client returns p's session, nil if it has none.
func (p *port) client() *session {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.session; s != nil {
		select {
		case <-s.done:
		default:
			return s
		}
	}
	return nil
}
