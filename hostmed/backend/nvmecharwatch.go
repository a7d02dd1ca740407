package backend

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// The device's own events (Asynchronous Event Request) are its driver's: what is left for others is what the kernel makes of them, which is a change of
// the block device's size, and its end.

// Watch has f hear of the namespace by the kernel's events, since it was opened. Where there are none, as in some containers, there is nothing to hear.
func (b *nvmeChar) Watch(f func(Event)) {
	b.telling.Lock()
	defer b.telling.Unlock()
	b.watcher = f
	for _, e := range b.missed {
		f(e)
	}
}

// listen begins to hear.
func (b *nvmeChar) listen() {
	w := diskWatch{h: &disks, name: b.name, f: b.happened}
	if end, err := b.events.listen(func(e uevent) {
		w.event(e)
		b.partitioned(e)
	}); err == nil {
		b.deaf = end
	}
}

// partitioned sees to partitions that are made on the disk, or may have been.
func (b *nvmeChar) partitioned(e uevent) {
	made := e.subsystem == "block" && (e.action == "add" || e.action == "change") && strings.HasPrefix(e.name, b.name)
	if b.claim == nil || !made && e != (uevent{}) {
		return
	}
	if err := b.claim.cover(); err != nil {
		hclog.Default().Named("nvme").Error("somebody has made a partition where a guest has its blocks: what one writes there the other loses", "spec", b.info.Name, "error", err)
	}
}

// happened looks at what the device is now. One that the host has formatted with other blocks would be written to in the wrong places.
func (b *nvmeChar) happened(e Event) {
	if e == EventChanged {
		id, err := readIdent(b.asks)
		// One that does not answer at the moment is no other for that.
		if id != nil && (err != nil || id.shift != b.shift || id.nsid != b.nsid) {
			b.other.Store(true)
		}
	}
	b.telling.Lock()
	defer b.telling.Unlock()
	switch {
	case b.watcher != nil:
		b.watcher(e)
	case !slices.Contains(b.missed, e):
		b.missed = append(b.missed, e)
	}
}

// diskWatch turns the kernel's events of a disk, or of the character device of the same namespace, into those of a medium.
type diskWatch struct {
	h    *diskHost
	name string // of the block device
	f    func(Event)
	gone bool
}

func (w *diskWatch) event(e uevent) {
	char := "ng" + strings.TrimPrefix(w.name, "nvme")
	var is Event
	switch {
	case w.gone:
		return
	case e == uevent{}: // some were lost
		is = EventChanged
		if _, err := os.Stat(filepath.Join(w.h.sys, "class/block", w.name)); err != nil {
			is = EventGone
		}
	case e.subsystem == "block" && e.name == w.name && e.action == "change":
		is = EventChanged
	case e.action == "remove" && (e.subsystem == "block" && e.name == w.name || e.subsystem == "nvme-generic" && e.name == char):
		is = EventGone
	default:
		return
	}
	w.gone = is == EventGone
	w.f(is)
}
