package hostnvme

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// guests is the memory of guests as the controller model finds it, and a machine with one controller.
type guests struct {
	device.Device
	model *nvmetest.Device

	mu      sync.Mutex
	regions map[uint64]*shm.Region // by address
}

func (g *guests) lookup(address string) (string, error) { return address, nil }

func (g *guests) open(string, hooks) (function, error) {
	g.Device = g.model.InProc()
	return g, nil
}

func (g *guests) MapDMA(mem []byte) (uint64, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.regions[blockOf(mem).base]
	if r == nil || r.Len() != uint64(len(mem)) {
		return 0, errors.New("no memory of a guest")
	}
	return g.model.Reach(r), nil
}

func (g *guests) Sever() { g.Close() }

func (g *guests) UnmapDMA(iova, _ uint64) error {
	if !g.model.Forget(iova) {
		return errors.New("not mapped")
	}
	return nil
}

// memory returns n bytes of a guest's.
func (g *guests) memory(tb testing.TB, n int) []byte {
	tb.Helper()
	r := shm.NewHeap(n)
	b, err := r.Bytes(0, uint64(n))
	if err != nil {
		tb.Fatal(err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.regions[blockOf(b).base] = r
	return b
}

// rig is a controller model that is driven by Pairs.
type rig struct {
	*guests
	dev *Device
	*Pairs
}

func newRig(tb testing.TB, cfg nvmetest.Config, change ...func(*Options)) *rig {
	tb.Helper()
	g := &guests{model: nvmetest.New(cfg), regions: map[uint64]*shm.Region{}}
	tb.Cleanup(g.model.Close)
	o := Options{Timeout: patience}
	for _, f := range change {
		f(&o)
	}
	dev, err := open(context.Background(), g, tb.Name(), o)
	if err != nil {
		tb.Fatal(err)
	}
	r := &rig{guests: g, dev: dev, Pairs: dev.Pairs()}
	tb.Cleanup(func() {
		if err := r.Trim(); err != nil {
			tb.Error(err)
		}
		if err := dev.Close(); err != nil {
			tb.Error(err)
		}
	})
	return r
}

// all is the model's first namespace.
var all = Slice{NSID: 1, Blocks: 16384, Shift: 9, MaxTransfer: 128 << 10, Zeroes: true, MaxZeroes: 32 << 20, Discard: true, MaxDiscard: 1 << 40}

func (r *rig) queue(tb testing.TB, a Attach) *Queue {
	tb.Helper()
	q, err := r.NewQueue(a)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := q.Close(); err != nil {
			tb.Error(err)
		}
	})
	return q
}

// put begins x as a batch of its own.
func (q *Queue) put1(x Request) *Request {
	q.Begin()
	r := q.Take()
	x.q, x.next = r.q, nil
	*r = x
	q.Put(r)
	q.Commit()
	return r
}

// wait returns n requests that are done.
func (q *Queue) wait(tb testing.TB, n int) []*Request {
	tb.Helper()
	var done []*Request
	for end := time.Now().Add(patience); len(done) < n; {
		got := q.Reap(n - len(done))
		done = append(done, got...)
		if len(got) > 0 {
			continue
		}
		if time.Now().After(end) {
			tb.Fatalf("%d of %d requests are done", len(done), n)
		}
		q.nap()
	}
	return done
}

// do does x and returns its status.
func (q *Queue) do(tb testing.TB, x Request) nvme.Status {
	tb.Helper()
	r := q.put1(x)
	q.wait(tb, 1)
	st := r.Status
	q.Free(r)
	return st
}

func (q *Queue) must(tb testing.TB, x Request) {
	tb.Helper()
	if st := q.do(tb, x); !st.OK() {
		tb.Fatalf("%v: %v", x.Op, st)
	}
}
