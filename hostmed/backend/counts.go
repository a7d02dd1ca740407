package backend

import (
	"sync"
	"sync/atomic"
)

// Counts are what a medium was asked to do since it was opened. Commands are those that the device got, or the kernel in its place: a large request
// may take several.
type Counts struct {
	Commands uint64
	Native   uint64 // of Commands, those that are the guest's own (OpCommand): Compare, Verify, Dataset Management, Copy, ...
	// Of Commands, those that moved data of the guest's: to or from its memory with no copy of hostmed's, and by a buffer of hostmed's. Of a file
	// without O_DIRECT the kernel copies to and from its page cache, which is not counted here.
	Mapped, Bounced uint64
	Waited          uint64 // how often a request waited for room in the queue, or for a buffer
	Repeated        uint64 // commands that were given again: after a reset of the device, or when the kernel was short of something
	Failed          uint64 // requests that the end of the device has ended (vfio:)
	Doorbells       uint64 // MMIO writes to the device's doorbells, as far as they are hostmed's (vfio:)
}

// Counted is a Backend that counts. One that moves the data itself, from or to memory, does not.
type Counted interface {
	Backend
	// Counts may be called from any goroutine, until Close.
	Counts() Counts
}

// Sub returns what was added since before.
func (c Counts) Sub(before Counts) Counts {
	return Counts{
		Commands: c.Commands - before.Commands, Native: c.Native - before.Native, Mapped: c.Mapped - before.Mapped, Bounced: c.Bounced - before.Bounced,
		Waited: c.Waited - before.Waited, Repeated: c.Repeated - before.Repeated, Failed: c.Failed - before.Failed, Doorbells: c.Doorbells - before.Doorbells,
	}
}

func (c *Counts) add(o Counts) {
	c.Commands += o.Commands
	c.Native += o.Native
	c.Mapped += o.Mapped
	c.Bounced += o.Bounced
	c.Waited += o.Waited
	c.Repeated += o.Repeated
	c.Failed += o.Failed
	c.Doorbells += o.Doorbells
}

// tally makes a Backend Counted: it sums what its queues have counted, also those that are closed.
type tally struct {
	mu   sync.Mutex
	open map[Queue]func() Counts
	past Counts
}

// join is called when q is open, and leave when it is closed. counts is called from any goroutine.
func (t *tally) join(q Queue, counts func() Counts) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.open == nil {
		t.open = map[Queue]func() Counts{}
	}
	t.open[q] = counts
}

func (t *tally) leave(q Queue) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if counts := t.open[q]; counts != nil {
		t.past.add(counts())
		delete(t.open, q)
	}
}

// Counts is Counted's.
func (t *tally) Counts() Counts {
	t.mu.Lock()
	defer t.mu.Unlock()
	sum := t.past
	for _, counts := range t.open {
		sum.add(counts())
	}
	return sum
}

// ringCounts are those of a queue over io_uring. Its goroutine adds to fresh, and publishes that at the end of each batch.
type ringCounts struct {
	fresh                                               Counts
	commands, native, mapped, bounced, waited, repeated atomic.Uint64
}

// gave counts a command that the kernel gets, again or for the first time.
func (c *ringCounts) gave(again bool) {
	if again {
		c.fresh.Repeated++
	} else {
		c.fresh.Commands++
	}
}

// moved counts one that has moved data of the guest's.
func (c *ringCounts) moved(bounced bool) {
	if bounced {
		c.fresh.Bounced++
	} else {
		c.fresh.Mapped++
	}
}

func (c *ringCounts) publish() {
	if c.fresh == (Counts{}) {
		return
	}
	for _, x := range [...]struct {
		n  uint64
		to *atomic.Uint64
	}{
		{c.fresh.Commands, &c.commands}, {c.fresh.Native, &c.native}, {c.fresh.Mapped, &c.mapped}, {c.fresh.Bounced, &c.bounced}, {c.fresh.Waited, &c.waited}, {c.fresh.Repeated, &c.repeated},
	} {
		if x.n > 0 {
			x.to.Add(x.n)
		}
	}
	c.fresh = Counts{}
}

// get may be called from any goroutine.
func (c *ringCounts) get() Counts {
	return Counts{
		Commands: c.commands.Load(), Native: c.native.Load(), Mapped: c.mapped.Load(), Bounced: c.bounced.Load(), Waited: c.waited.Load(), Repeated: c.repeated.Load(),
	}
}
