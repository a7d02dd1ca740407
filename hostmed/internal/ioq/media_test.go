package ioq

import (
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
)

// registrar is null, and takes note of the memory that its queues are told of. It is a Sharer and a Pinner.
type registrar struct {
	backend.Backend
	t       testing.TB
	queues  []*registrarQueue // that were opened, by one worker after the other
	awaited atomic.Int64
	known   atomic.Int64 // how many pieces of memory the open queues knew when it was last awaited
}

type registrarQueue struct {
	backend.Queue
	b      *registrar
	owner  any
	closed bool
	memory [][]byte
	calls  int // of AddMemory and RemoveMemory
}

func newRegistrar(t testing.TB) *registrar {
	return &registrar{Backend: openBackend(t, "null:size=1MiB"), t: t}
}

func (b *registrar) NewQueueFor(owner any) (backend.Queue, error) {
	q, err := b.Backend.NewQueue()
	b.queues = append(b.queues, &registrarQueue{Queue: q, b: b, owner: owner})
	return b.queues[len(b.queues)-1], err
}

func (b *registrar) AwaitMemory() {
	n := 0
	for _, q := range b.queues {
		if !q.closed {
			n += len(q.memory)
		}
	}
	b.awaited.Add(1)
	b.known.Store(int64(n))
}

func (q *registrarQueue) index(m []byte) int {
	return slices.IndexFunc(q.memory, func(x []byte) bool { return &x[0] == &m[0] && len(x) == len(m) })
}

func (q *registrarQueue) AddMemory(m []byte) {
	if q.calls++; q.closed || q.index(m) >= 0 {
		q.b.t.Errorf("AddMemory of %d bytes: the queue is closed (%v), or knows them", len(m), q.closed)
	}
	q.memory = append(q.memory, m)
}

func (q *registrarQueue) RemoveMemory(m []byte) {
	q.calls++
	i := q.index(m)
	if i < 0 || q.closed {
		q.b.t.Fatalf("RemoveMemory of %d bytes: the queue is closed (%v), or does not know them", len(m), q.closed)
	}
	if m[0]++; m[0] == 0 { // it is mapped yet: otherwise this ends the test
		q.b.t.Error("this memory held something")
	}
	q.memory = slices.Delete(q.memory, i, i+1)
}

func (q *registrarQueue) Close() error {
	q.closed = true
	return q.Queue.Close()
}

// tells makes the rig's client tell the controller what it maps, as a session does, until the rig's workers are stopped.
func (r *rig) tells() *rig {
	r.mem.Opened, r.mem.Closing = r.ctl.MemoryAdded, r.ctl.MemoryRemoved
	r.t.Cleanup(func() { r.mem.Opened, r.mem.Closing = nil, nil })
	return r
}

// knows fails the test unless the queue knows pieces of memory of these sizes, in any order.
func (q *registrarQueue) knows(when string, sizes ...int) {
	q.b.t.Helper()
	var has []int
	for _, m := range q.memory {
		has = append(has, len(m))
	}
	slices.Sort(has)
	slices.Sort(sizes)
	if !slices.Equal(has, sizes) {
		q.b.t.Errorf("%s: the queue knows memory of %v bytes, want %v", when, has, sizes)
	}
}

// mapFile maps size bytes of a new file at base+off.
func (r *rig) mapFile(off, size uint64) (fd int) {
	r.t.Helper()
	fd, err := unix.MemfdCreate("more", unix.MFD_CLOEXEC)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		r.t.Fatal(err)
	}
	r.mapAgain(off, size, 0, fd)
	return fd
}

// mapAgain maps size bytes of fd's file from begin on at base+off.
func (r *rig) mapAgain(off, size, begin uint64, fd int) {
	r.t.Helper()
	fd, err := unix.Dup(fd)
	if err == nil {
		err = r.mem.Map(base+off, size, begin, fd, true)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

const (
	moreAt = 1 << 30
	moreMB = 1 << 20
)

func TestMediaAreToldOfGuestMemory(t *testing.T) {
	b := newRegistrar(t)
	r := newRig(t, rigConfig{backend: b}).tells()
	if len(b.queues) != 0 || b.awaited.Load() != 0 {
		t.Fatal("a queue was opened, or memory awaited, before there is a CQ")
	}
	r.pair(1, 16, false)
	r.pair(2, 16, false)
	if len(b.queues) != 1 || b.queues[0].owner != any(r.workers[0]) {
		t.Fatalf("%d queues for two CQs of one worker, the first for %v", len(b.queues), b.queues[0].owner)
	}
	q := b.queues[0]
	q.knows("from the start", guestSize)
	if q.calls != 1 || b.known.Load() != 1 {
		t.Errorf("told %d times of one file; %d were known when it was awaited", q.calls, b.known.Load())
	}

	awaited := b.awaited.Load()
	fd := r.mapFile(moreAt, 2*moreMB)
	q.knows("a file more", guestSize, 2*moreMB)
	if b.awaited.Load() != awaited+1 || b.known.Load() != 2 {
		t.Errorf("awaited %d times for it, with %d files known", b.awaited.Load()-awaited, b.known.Load())
	}
	r.mapAgain(moreAt+1<<30, moreMB, moreMB, fd) // of a file that is known
	if q.calls != 2 {
		t.Errorf("told %d times of two files", q.calls)
	}
	r.unmap(moreAt, 2*moreMB)
	q.knows("a file of which a part is mapped elsewhere", guestSize, 2*moreMB)
	r.unmap(moreAt+1<<30, moreMB)
	q.knows("the last of it is unmapped", guestSize)
}

func TestMediaThatComeLaterAreToldOfGuestMemory(t *testing.T) {
	first, second := newRegistrar(t), newRegistrar(t)
	r := newRig(t, rigConfig{backend: first}).tells()
	attach := func(bs ...*registrar) {
		t.Helper()
		var list []ctrl.Namespace
		for i, b := range bs {
			list = append(list, ctrl.Namespace{NSID: uint32(i + 1), Backend: b, Info: b.Info()})
		}
		if err := r.ctl.SetNamespaces(list); err != nil {
			t.Fatal(err)
		}
	}
	attach(first, second)
	if len(second.queues) != 0 {
		t.Error("a queue was opened for a worker without CQs")
	}
	attach(first)
	r.pair(1, 16, false)
	r.mapFile(moreAt, moreMB)
	attach(first, second)
	if len(first.queues) != 1 || len(second.queues) != 1 {
		t.Fatalf("%d and %d queues, want one each", len(first.queues), len(second.queues))
	}
	second.queues[0].knows("attached later", guestSize, moreMB)
	if n := first.queues[0].calls; n != 2 {
		t.Errorf("the namespace that was there was told %d times of two files", n)
	}

	// What is detached has its queue open yet, and so must let go of what is unmapped.
	attach(first)
	r.unmap(moreAt, moreMB)
	second.queues[0].knows("detached", guestSize)
	r.mapFile(moreAt, 2*moreMB)
	second.queues[0].knows("detached, and more is mapped", guestSize)
	attach(first, second)
	second.queues[0].knows("attached again", guestSize, 2*moreMB)
	first.queues[0].knows("attached all the time", guestSize, 2*moreMB)
}

func TestQueuesThatAreOpenedAgainAreToldOfGuestMemory(t *testing.T) {
	b := newRegistrar(t)
	r := newRig(t, rigConfig{backend: b}).tells()
	r.pair(1, 16, false)
	r.mapFile(moreAt, moreMB)
	pool := Pool(r.workers)
	pool.Suspend(b)
	if !b.queues[0].closed {
		t.Fatal("the queue is open while it is suspended")
	}
	r.unmap(moreAt, moreMB)
	r.mapFile(moreAt, 2*moreMB)
	if err := pool.Resume(b); err != nil {
		t.Fatal(err)
	}
	if len(b.queues) != 2 || b.queues[1].owner != any(r.workers[0]) {
		t.Fatalf("%d queues after one was opened again", len(b.queues))
	}
	b.queues[1].knows("opened again", guestSize, 2*moreMB)
	r.unmap(moreAt, 2*moreMB)
	b.queues[1].knows("unmapped", guestSize)
}

func TestEachWorkersQueueIsToldOfGuestMemory(t *testing.T) {
	b := newRegistrar(t)
	r := newRig(t, rigConfig{backend: b, workers: 2}).tells()
	for qid := uint16(1); qid <= 4; qid++ {
		r.pair(qid, 16, false)
	}
	if len(b.queues) != 2 || b.queues[0].owner == b.queues[1].owner {
		t.Fatalf("%d queues of two workers, or one owner of both", len(b.queues))
	}
	r.mapFile(moreAt, moreMB)
	for _, q := range b.queues {
		q.knows("two files", guestSize, moreMB)
	}
	r.unmap(moreAt, moreMB)
	for _, q := range b.queues {
		q.knows("one file", guestSize)
	}
}

// Memory without a file is nothing that a medium could register.
func TestMediaAreNotToldOfHeapMemory(t *testing.T) {
	b := newRegistrar(t)
	r := newRig(t, rigConfig{backend: b, heap: true}).tells()
	r.pair(1, 16, false)
	b.queues[0].knows("memory on the heap")
}
