package hostnvme

import (
	"bytes"
	"context"
	"maps"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Event is what a watcher is told of its namespace.
type Event uint8

// The events.
const (
	Changed Event = iota // its size or format may be another: Namespace tells
	Gone                 // it is away for good: deleted, detached or replaced, or the device has failed
	Health               // the device warns of something that its SMART log tells
)

// Space is a namespace as long as it is what it was when it was asked for: the same one, with the same blocks. What is another is sent nothing, whatever id
// it has: its blocks are not those that slices were made of.
type Space struct{ other atomic.Bool }

// elsewhere is what guests get of a namespace that is another.
var elsewhere = nvme.StatusNamespaceNotReady.WithDNR()

// gone says that it is not what it was.
func (s *Space) gone() bool { return s != nil && s.other.Load() }

// Space returns the namespace that has this id now. What Namespace says after it is of it, or it is gone.
func (d *Device) Space(nsid uint32) *Space {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.taken[nsid]
	if s == nil {
		s = &Space{}
		d.taken[nsid] = s
	}
	return s
}

// same says whether the namespaces of two times are one, with the same blocks.
func same(was, is *nvme.IdentifyNamespace) bool {
	if was == nil || is == nil || was.NGUID != is.NGUID || was.EUI64 != is.EUI64 {
		return false
	}
	a, b := was.Format(), is.Format()
	return a.LBADS == b.LBADS && a.MS == b.MS
}

type watcher struct {
	nsid uint32
	tell func(Event)
	over bool // it was told of Gone
}

// Watch makes f hear what happens to a namespace, one event at a time, until cancel has returned. f calls neither cancel nor anything that waits for the
// device. If the device has failed already f is told at once.
func (d *Device) Watch(nsid uint32, f func(Event)) (cancel func()) {
	w := &watcher{nsid: nsid, tell: f}
	d.telling.Lock()
	defer d.telling.Unlock()
	d.mu.Lock()
	d.watchers[w] = struct{}{}
	failed := d.state == failed
	d.mu.Unlock()
	if failed {
		w.over = true
		f(Gone)
	}
	return func() {
		d.telling.Lock()
		defer d.telling.Unlock()
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.watchers, w)
	}
}

// tell tells the watchers that what says so. No lock is held.
func (d *Device) tell(what func(*watcher) (Event, bool)) {
	d.telling.Lock()
	defer d.telling.Unlock()
	d.mu.Lock()
	all := maps.Clone(d.watchers)
	d.mu.Unlock()
	for w := range all {
		if e, yes := what(w); yes && !w.over {
			w.over = e == Gone
			w.tell(e)
		}
	}
}

// identifyNamespaces reads what there is.
func (d *Device) identifyNamespaces(ctx context.Context) (map[uint32]*nvme.IdentifyNamespace, error) {
	ids, err := d.adm.ActiveNamespaces(ctx)
	if err != nil {
		return nil, err
	}
	spaces := map[uint32]*nvme.IdentifyNamespace{}
	for _, nsid := range ids {
		if spaces[nsid], err = d.adm.IdentifyNamespace(ctx, nsid); err != nil {
			return nil, err
		}
	}
	return spaces, nil
}

// namespacesChanged is told by the controller's events.
func (d *Device) namespacesChanged(ctx context.Context) {
	spaces, err := d.identifyNamespaces(ctx)
	if err != nil {
		// A reset that went over it reads them again.
		if ctx.Err() == nil {
			d.log.Warn("reading the namespaces", "error", err)
		}
		return
	}
	d.updateNamespaces(spaces)
}

// healthChanged is told by the controller's events, and tells all.
func (d *Device) healthChanged(context.Context) {
	d.tell(func(*watcher) (Event, bool) { return Health, true })
}

// updateNamespaces takes what was read, and tells who watches one that is different.
func (d *Device) updateNamespaces(spaces map[uint32]*nvme.IdentifyNamespace) {
	d.mu.Lock()
	old := d.spaces
	d.spaces = spaces
	for nsid, s := range d.taken {
		if !same(old[nsid], spaces[nsid]) {
			s.other.Store(true)
			delete(d.taken, nsid)
		}
	}
	d.mu.Unlock()
	d.tell(func(w *watcher) (Event, bool) {
		was, is := old[w.nsid], spaces[w.nsid]
		switch {
		case was == nil: // it was told when that went
			return 0, false
		case is == nil || was.NGUID != is.NGUID || was.EUI64 != is.EUI64:
			return Gone, true
		}
		return Changed, differ(was, is)
	})
}

// differ says whether more has changed than how much of a namespace is used.
func differ(a, b *nvme.IdentifyNamespace) bool {
	x, y := *a, *b
	x.NUSE, y.NUSE = 0, 0
	return !bytes.Equal(x.Bytes()[:], y.Bytes()[:])
}
