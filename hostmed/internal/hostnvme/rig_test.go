package hostnvme

import (
	"context"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// single is a machine with one function.
type single struct{ fn Function }

func (single) Lookup(address string) (string, error)  { return address, nil }
func (m single) Open(string, Hooks) (Function, error) { return m.fn, nil }

// rig is a controller model that is driven by Pairs.
type rig struct {
	guests *nvmetest.Guests
	model  *nvmetest.Device
	dev    *Device
	*Pairs
}

func newRig(tb testing.TB, cfg nvmetest.Config, change ...func(*Options)) *rig {
	tb.Helper()
	return newRigIn(tb, cfg, 0, change...)
}

// newRigIn has memory that the controller finds run pages by run pages; 0: in one piece.
func newRigIn(tb testing.TB, cfg nvmetest.Config, run int, change ...func(*Options)) *rig {
	tb.Helper()
	model := nvmetest.New(cfg)
	tb.Cleanup(model.Close)
	g := model.ForGuests()
	o := Options{Timeout: patience}
	for _, f := range change {
		f(&o)
	}
	fn := Function(g)
	if run > 0 {
		fn = g.Scattered(run)
	}
	dev, err := OpenOn(context.Background(), single{fn}, tb.Name(), o)
	if err != nil {
		tb.Fatal(err)
	}
	r := &rig{guests: g, model: model, dev: dev, Pairs: dev.Pairs()}
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
