package guestdrv

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// How the namespaces are followed: readNamespaces reads the list of active namespaces and what each is, at Open, when the controller says by an
// event that something has changed, after each reset, and for Rescan. What it has read is compared with the table in use as a whole, so it
// does not matter which event was missed. apply puts a new table in its place.

// spaces is which namespaces there are. It does not change.
type spaces struct {
	list     []*Namespace // that can be used, by rising NSID
	byID     map[uint32]*Namespace
	unusable map[uint32]error // the other active ones, and why
}

// ChangeKind is what happened to a namespace.
type ChangeKind uint8

const (
	// Appeared is a namespace that can be used now.
	Appeared ChangeKind = iota + 1
	// Vanished is a Namespace that cannot be used any more. If it was replaced under its NSID, or has got blocks of another size, an
	// Appeared follows.
	Vanished
	// Resized is a Namespace whose Size is another.
	Resized
)

// String returns "appeared", "vanished" or "resized".
func (k ChangeKind) String() string {
	switch k {
	case Appeared:
		return "appeared"
	case Vanished:
		return "vanished"
	case Resized:
		return "resized"
	}
	return fmt.Sprintf("ChangeKind(%d)", uint8(k))
}

// Change is one change of the namespaces of a controller.
type Change struct {
	Kind      ChangeKind
	NSID      uint32
	Namespace *Namespace // for Vanished the one that is no more
}

// Namespaces returns the active namespaces that can be used, by rising NSID.
func (c *Controller) Namespaces() []*Namespace {
	return append([]*Namespace(nil), c.spaces.Load().list...)
}

// Namespace returns the namespace nsid. The error wraps ErrNoNamespace, and says why if there is one that cannot be used.
func (c *Controller) Namespace(nsid uint32) (*Namespace, error) {
	s := c.spaces.Load()
	if ns, ok := s.byID[nsid]; ok {
		return ns, nil
	}
	if why, ok := s.unusable[nsid]; ok {
		return nil, fmt.Errorf("namespace %d: %w: %w", nsid, ErrNoNamespace, why)
	}
	return nil, fmt.Errorf("namespace %d: %w", nsid, ErrNoNamespace)
}

// Rescan reads again which namespaces there are. It is for controllers that do not tell of changes by events; of others nobody needs it.
func (c *Controller) Rescan(ctx context.Context) error {
	if !c.gate.enter() {
		return ErrClosed
	}
	defer c.gate.leave()
	return c.explain(c.readNamespaces(ctx))
}

// Err returns why the namespace cannot be used any more, or nil. The controller's failure is not in it.
func (ns *Namespace) Err() error {
	if p := ns.gone.Load(); p != nil {
		return *p
	}
	return nil
}

// namespacesChanged is told of the event. After a failure the reset that follows reads everything again.
func (c *Controller) namespacesChanged(ctx context.Context) {
	if err := c.readNamespaces(ctx); err != nil && ctx.Err() == nil {
		c.log.Warn("reading the namespaces again", "error", err)
	}
}

// found is one active namespace: what the controller says of it, or why it says nothing.
type found struct {
	nsid uint32
	id   *nvme.IdentifyNamespace
	err  error
}

func (c *Controller) readNamespaces(ctx context.Context) error {
	c.mu.Lock()
	c.reads.begun++
	number := c.reads.begun
	c.mu.Unlock()
	ids, err := c.adm.ActiveNamespaces(ctx)
	if err != nil {
		return err
	}
	all := make([]found, 0, len(ids))
	for _, nsid := range ids {
		id, err := c.adm.IdentifyNamespace(ctx, nsid)
		var refused *StatusError
		if err != nil && !errors.As(err, &refused) {
			return err
		}
		// One that cannot be used is no reason to do without the others.
		all = append(all, found{nsid, id, err})
	}
	c.apply(number, all)
	return nil
}

// apply makes the table that all says, unless something newer was read meanwhile.
func (c *Controller) apply(number uint64, all []found) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if number < c.reads.applied {
		return
	}
	c.reads.applied = number
	old := c.spaces.Load()
	now := &spaces{byID: map[uint32]*Namespace{}, unusable: map[uint32]error{}}
	for _, f := range all {
		ns := old.byID[f.nsid]
		shift, err := c.usable(f)
		if ns != nil {
			if why := ns.differs(f, shift, err); why != nil {
				ns.vanish(why)
				ns = nil
			} else {
				ns.update(f.id)
			}
		}
		if err != nil {
			now.unusable[f.nsid] = err
			if before := old.unusable[f.nsid]; before == nil || before.Error() != err.Error() {
				c.log.Warn("namespace cannot be used", "nsid", f.nsid, "reason", err)
			}
			continue
		}
		if ns == nil {
			ns = &Namespace{c: c, nsid: f.nsid, shift: shift}
			ns.update(f.id)
		}
		now.list = append(now.list, ns)
		now.byID[f.nsid] = ns
	}
	for _, ns := range old.list {
		if now.byID[ns.nsid] == nil && ns.Err() == nil {
			ns.vanish(errors.New("the controller has it no more"))
		}
	}
	c.spaces.Store(now)
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// usable checks what the controller says of a namespace.
func (c *Controller) usable(f found) (shift uint8, err error) {
	if f.err != nil {
		return 0, f.err
	}
	size, ok := f.id.BlockSize()
	format := f.id.Format()
	switch {
	case f.id.NSZE == 0:
		return 0, errors.New("it has no blocks")
	case !ok:
		return 0, fmt.Errorf("block size of 2^%d bytes", format.LBADS)
	case size > c.maxTransfer:
		return 0, fmt.Errorf("blocks of %d bytes, commands of at most %d", size, c.maxTransfer)
	case format.MS != 0:
		return 0, fmt.Errorf("%d bytes of metadata per block: format it without (nvme format)", format.MS)
	case f.id.NSZE > math.MaxInt64>>format.LBADS:
		return 0, fmt.Errorf("%d blocks of %d bytes are more than 2^63 bytes", f.id.NSZE, size)
	}
	return format.LBADS, nil
}

// differs says why f is not ns any more, or not one that can be used, or returns nil.
func (ns *Namespace) differs(f found, shift uint8, err error) error {
	switch {
	case err != nil:
		return err
	case shift != ns.shift:
		return fmt.Errorf("it has blocks of %d bytes now, and had %d", 1<<shift, ns.BlockSize())
	case f.id.NGUID != ns.Identify().NGUID || f.id.EUI64 != ns.Identify().EUI64:
		return errors.New("another has taken its place")
	}
	return nil
}

// update takes what the controller says now.
func (ns *Namespace) update(id *nvme.IdentifyNamespace) {
	ns.id.Store(id)
	ns.blocks.Store(id.NSZE)
}

func (ns *Namespace) vanish(why error) {
	err := fmt.Errorf("namespace %d: %w: %w", ns.nsid, ErrNoNamespace, why)
	ns.gone.Store(&err)
}

// sizes returns the namespaces that there are and their sizes.
func (c *Controller) sizes() map[*Namespace]int64 {
	sizes := map[*Namespace]int64{}
	for _, ns := range c.Namespaces() {
		sizes[ns] = ns.Size()
	}
	return sizes
}

// tellChanges logs what has changed and calls OnChange, until the controller fails or is closed. It compares with told, what it has told before: what came and
// went while OnChange took its time is not told, so however often the controller changes its mind, nothing piles up.
func (c *Controller) tellChanges(told map[*Namespace]int64) {
	defer c.watching.Done()
	tell := func(kind ChangeKind, ns *Namespace) {
		if c.life.Err() != nil {
			return
		}
		c.log.Info("namespace has changed", "nsid", ns.nsid, "what", kind, "size", ns.Size())
		if c.opts.OnChange != nil {
			c.opts.OnChange(Change{kind, ns.nsid, ns})
		}
	}
	for {
		select {
		case <-c.changed:
		case <-c.life.Done():
			return
		}
		now := c.spaces.Load()
		for ns := range told {
			if now.byID[ns.nsid] != ns {
				delete(told, ns)
				tell(Vanished, ns)
			}
		}
		for _, ns := range now.list {
			size := ns.Size()
			before, known := told[ns]
			told[ns] = size
			switch {
			case !known:
				tell(Appeared, ns)
			case before != size:
				tell(Resized, ns)
			}
		}
	}
}
