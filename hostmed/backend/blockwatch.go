package backend

import (
	"os"
	"path/filepath"
	"time"
)

// lookEvery is how often the device's size is asked for where no event has said that it may be another: containers have no events, and
// a partition that is resized makes none.
const lookEvery = 2 * time.Second

// Watch has f hear of the device's size and of its end. The kernel's events only say when to look.
func (b *block) Watch(f func(Event)) {
	if !b.watching.CompareAndSwap(false, true) {
		return
	}
	b.stop, b.stopped = make(chan struct{}), make(chan struct{})
	look := make(chan struct{}, 1)
	deaf, err := b.events.listen(func(e uevent) {
		if e == (uevent{}) || e.subsystem == "block" && (e.name == b.facts.name || e.name == b.facts.disk) {
			select {
			case look <- struct{}{}:
			default: // it will anyway
			}
		}
	})
	if err != nil {
		deaf = func() {} // the clock has to do
	}
	// The queues may be open, and Info be about to change: what was seen last is the goroutine's own.
	go b.watch(f, look, deaf, b.info.Size())
}

func (b *block) watch(f func(Event), look <-chan struct{}, deaf func(), size uint64) {
	defer close(b.stopped)
	defer deaf()
	clock := time.NewTicker(lookEvery)
	defer clock.Stop()
	for {
		select {
		case <-b.stop:
			return
		case <-look:
		case <-clock.C:
		}
		now, err := blockSize(b.fd)
		switch {
		case err != nil || !b.there():
			f(EventGone)
			return
		case now != size:
			size = now
			f(EventChanged)
		}
	}
}

// there reports whether the kernel still has the device by its name.
func (b *block) there() bool {
	_, err := os.Stat(filepath.Join(b.h.sys, "class/block", b.facts.name))
	return err == nil
}

func (b *block) endWatch() {
	if b.watching.Load() {
		close(b.stop)
		<-b.stopped
	}
}
