package hostnvme

import (
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestRequestThatFailsInLineTakesNobodyAlong has a request that waits for room with a part of it under way, and that part fails. Those behind it
// in the line were lost with it, and never ended.
func TestRequestThatFailsInLineTakesNobodyAlong(t *testing.T) {
	r := newRig(t, nvmetest.Config{Queues: 1, Hooks: nvmetest.Hooks{Command: func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
		return nvmetest.Verdict{Action: map[bool]nvmetest.Action{true: nvmetest.Hold}[qid != 0]}
	}}})
	larger := all
	larger.Blocks *= 4 // than the device's namespace
	q, err := r.NewQueue(Attach{Slice: larger})
	if err != nil {
		t.Fatal(err)
	}
	mem := r.guests.Memory(1 << 20)
	q.AddMemory(mem)
	r.mem.Settle(patience)
	put := func(off, n uint64) {
		x := q.Take()
		x.Op, x.Off, x.Len, x.Vec = Read, off, n, []Seg{seg(mem[:n])}
		q.Put(x)
	}
	const first, behind = depth - 3, 20
	q.Begin()
	for range first {
		put(0, 512)
	}
	put(16<<20, 1<<20) // of its commands three have room
	for range behind {
		put(0, 512)
	}
	q.Commit()
	for end := time.Now().Add(patience); r.model.Held() < depth; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d commands are held", r.model.Held())
		}
	}
	q.pair.mu.Lock() // so that all that the device has completed is found at once
	r.model.Release()
	q.pair.mu.Unlock()
	stop := make(chan struct{})
	defer close(stop)
	go func() { // what came after it
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				r.model.Release()
			}
		}
	}()
	failed := 0
	for _, x := range q.wait(t, first+1+behind) {
		if !x.Status.OK() {
			failed++
		}
		q.Free(x)
	}
	if failed != 1 {
		t.Fatalf("%d failed", failed)
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
}
