package ioq

import (
	"errors"
	"slices"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// namespace is a namespace as the workers see it: what it was when the controller's table was made. Another
// medium is another namespace.
type namespace struct {
	of      *subsys.Namespace        // has the gate
	limits  atomic.Pointer[qos.Path] // nil: none
	media   []*media                 // by worker; the entry belongs to that worker
	dulbe   atomic.Bool              // reads of blocks that are not allocated fail, which mapper tells
	info    backend.Info             // its first fields are wanted for each command, as are those above
	native  backend.Opcodes          // of info.Native, those that there are rules for
	backend backend.Backend
	mapper  backend.Mapper
}

// namespace returns what is attached as nsid, or nil.
func (c *Controller) namespace(nsid uint32) *namespace {
	t := *c.ns.Load()
	if i := nsid - 1; i < uint32(len(t)) {
		return t[i]
	}
	return nil
}

// SetDULBE is the bit of feature 05h: reads of blocks of nsid that are not allocated fail.
func (c *Controller) SetDULBE(nsid uint32, on bool) {
	c.dulbe[nsid] = on
	if n := c.namespace(nsid); n != nil && n.mapper != nil {
		n.dulbe.Store(on)
	}
}

// look is namespace with the status of a command for nsid if that is nothing: an id up to NN is valid, and merely inactive (NVMe Base 2.0c 3.2.1).
func (c *Controller) look(nsid uint32) (*namespace, nvme.Status) {
	t := *c.ns.Load() // one table for both, while they come and go
	highest := uint32(len(t))
	if nsid-1 < highest && t[nsid-1] != nil {
		return t[nsid-1], nvme.StatusSuccess
	}
	if self := c.cfg.Self; self != nil {
		highest = max(highest, self.Subsystem().HighestNSID(self.Manages))
	}
	if nsid-1 < highest {
		return nil, nvme.StatusInvalidField
	}
	return nil, nvme.StatusInvalidNamespace
}

// table makes a table of list; what is in the present one and has not changed is taken over.
func (c *Controller) table(list []ctrl.Namespace) *[]*namespace {
	var t []*namespace
	for i := range list {
		x := &list[i]
		for uint32(len(t)) < x.NSID {
			t = append(t, nil)
		}
		of := x.Of
		if of == nil {
			of = subsys.Alone(x.NSID, x.Backend, x.Info)
		}
		n := &namespace{of: of, info: x.Info, backend: x.Backend, native: nativeOf(x.Info.Native), media: make([]*media, len(c.cfg.Workers))}
		if x.Info.Maps {
			n.mapper, _ = x.Backend.(backend.Mapper)
			n.dulbe.Store(n.mapper != nil && c.dulbe[x.NSID])
		}
		t[x.NSID-1] = n
		n.limits.Store(c.path(n))
		if c.ns.Load() == nil {
			continue
		}
		if old := c.namespace(x.NSID); old != nil && old.of == of && old.backend == x.Backend && old.info == x.Info {
			t[x.NSID-1] = old
		}
	}
	return &t
}

// SetNamespaces replaces what is attached. Commands that are under way go on with what they began with: see Pool.Drain. A
// namespace whose medium a worker cannot open is left out, and the error says so.
func (c *Controller) SetNamespaces(list []ctrl.Namespace) error {
	t := *c.table(list)
	var errs []error
	for _, w := range c.cfg.Workers {
		w.Call(func() {
			if !slices.ContainsFunc(c.groups, func(g *group) bool { return g.w == w }) {
				return
			}
			for i := range t {
				if err := w.openMedia(t[i:i+1], c.mem); err != nil {
					errs = append(errs, err)
					t[i] = nil
				}
			}
		})
	}
	c.ns.Store(&t)
	// When this returns nobody begins a command with the old table any more: its caller may open a gate next.
	for _, w := range c.cfg.Workers {
		w.Call(func() { w.leaveLanes(c) })
	}
	return errors.Join(errs...)
}

// Pool is all workers of a mediator, as a subsystem sees them.
type Pool []*Worker

var _ subsys.Workers = Pool(nil)

// Drain returns when every command of n that was begun before is complete, except those that n's gate holds back.
func (p Pool) Drain(n *subsys.Namespace) {
	for _, w := range p {
		w.outlast(func(r *request) bool { return r.ns != nil && r.ns.of == n }, func() bool {
			for _, r := range w.reqs {
				if r.ns != nil && r.ns.of == n && !r.held {
					return false
				}
			}
			return true
		})
	}
}

// Release begins again what n's gate held back.
func (p Pool) Release(*subsys.Namespace) {
	for _, w := range p {
		w.post(w.retryHeld)
	}
}

// Suspend closes what the workers have open of b. Nothing of b is in flight.
func (p Pool) Suspend(b backend.Backend) {
	for _, w := range p {
		w.Call(func() {
			if m := w.find(b); m != nil {
				m.close()
			}
		})
	}
}

// Resume opens what Suspend has closed.
func (p Pool) Resume(b backend.Backend) error {
	var errs []error
	for _, w := range p {
		w.Call(func() {
			if m := w.find(b); m != nil {
				errs = append(errs, m.open())
			}
		})
	}
	return errors.Join(errs...)
}

// Forget is Suspend for good: b may be closed when it returns.
func (p Pool) Forget(b backend.Backend) {
	for _, w := range p {
		w.Call(func() {
			keep := w.queues[:0]
			for _, m := range w.queues {
				if m.backend == b {
					m.close()
				} else {
					keep = append(keep, m)
				}
			}
			clear(w.queues[len(keep):])
			w.queues = keep
		})
	}
}
