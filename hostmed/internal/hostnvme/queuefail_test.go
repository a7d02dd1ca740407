package hostnvme

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// TestResetUnderLoad resets the controller while writes are under way: all of them end well, and the disk has what they wrote.
func TestResetUnderLoad(t *testing.T) {
	r := newRig(t, nvmetest.Config{Queues: 2})
	const n = 4096
	mem := r.guests.Memory(n * 512)
	data := random(n * 512)
	copy(mem, data)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	queues := []*Queue{r.queue(t, Attach{Slice: all, Owner: 0}), r.queue(t, Attach{Slice: all, Owner: 1})}
	queues[0].AddMemory(mem)
	r.mem.Settle(patience)
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			select {
			case <-stop:
				return
			default:
				if err := r.dev.Reset(context.Background()); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}()
	for w, q := range queues {
		for i := w; i < n; i += 32 {
			q.Begin()
			k := 0
			for j := i; j < min(i+32, n); j += 2 {
				x := q.Take()
				x.Op, x.Off, x.Len, x.Vec = Write, uint64(j)<<9, 512, []Seg{seg(mem[j<<9:][:512])}
				q.Put(x)
				k++
			}
			q.Commit()
			for _, x := range q.wait(t, k) {
				if !x.Status.OK() {
					t.Fatal(x.Status)
				}
				q.Free(x)
			}
		}
	}
	close(stop)
	wg.Wait()
	if !bytes.Equal(r.model.Disk(1)[:n*512], data) {
		t.Fatal("the disk has something else")
	}
	c, _ := r.Counts()
	t.Logf("%d resets, %+v", r.dev.Stats().Resets, c)
	if r.dev.Stats().Resets == 0 {
		t.Fatal("no reset")
	}
}

// TestResetBehindOurBack is a reset of the function that somebody else makes: it is found out long before commands are late.
func TestResetBehindOurBack(t *testing.T) {
	var hold atomic.Bool
	r := newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{Command: func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
		if qid != 0 && hold.Load() {
			return nvmetest.Verdict{Action: nvmetest.Drop}
		}
		return nvmetest.Verdict{}
	}}})
	q := r.queue(t, Attach{Slice: all})
	mem := r.guests.Memory(4096)
	hold.Store(true)
	x := q.put1(Request{Op: Read, Len: 4096, Vec: []Seg{seg(mem)}})
	if err := r.guests.Device.Reset(); err != nil {
		t.Fatal(err)
	}
	hold.Store(false)
	q.wait(t, 1)
	if !x.Status.OK() || r.dev.Stats().Resets != 1 {
		t.Fatalf("%v, %+v", x.Status, r.dev.Stats())
	}
}

// TestHostileCompletions posts what no device may. The controller is reset for it, and every request ends.
func TestHostileCompletions(t *testing.T) {
	for name, spoil := range map[string]func(*ring.Entry){
		"unknown identifier": func(e *ring.Entry) { e.Hi ^= 0xFF << 40 },
		"wrong queue":        func(e *ring.Entry) { e.Hi ^= 1 << 20 },
		"SQ head":            func(e *ring.Entry) { e.Hi |= 0xFFFF },
	} {
		t.Run(name, func(t *testing.T) {
			var n atomic.Int32
			r := newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{Post: func(qid uint16, e *ring.Entry) {
				if qid != 0 && n.Add(1)%50 == 0 {
					spoil(e)
				}
			}}})
			q := r.queue(t, Attach{Slice: all})
			mem := r.guests.Memory(4096)
			for range 120 {
				q.must(t, Request{Op: Read, Len: 4096, Vec: []Seg{seg(mem)}})
			}
			if c, _ := r.Counts(); c.Wrong == 0 || c.Reissued == 0 {
				t.Fatalf("%+v", c)
			}
		})
	}
}

// TestDeviceGone ends everything with an error, now and later.
func TestDeviceGone(t *testing.T) {
	r := newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{Command: func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
		return nvmetest.Verdict{Action: map[bool]nvmetest.Action{true: nvmetest.Drop}[qid != 0]}
	}}})
	q := r.queue(t, Attach{Slice: all})
	mem := r.guests.Memory(1 << 20)
	q.Begin()
	for range 600 {
		x := q.Take()
		x.Op, x.Len, x.Vec = Write, 512, []Seg{seg(mem[:512])}
		q.Put(x)
	}
	q.Commit()
	r.guests.Device.(interface{ Gone() }).Gone()
	for _, x := range q.wait(t, 600) {
		if x.Status != failure {
			t.Fatal(x.Status)
		}
		q.Free(x)
	}
	if st := q.do(t, Request{Op: Flush}); st != failure {
		t.Fatal(st)
	}
	if c, _ := r.Counts(); c.Failed != 601 {
		t.Fatalf("%+v", c)
	}
}

// TestCommandThatHangsTheDevice is one that is never completed. It ends with an error, and the device goes on with the others.
func TestCommandThatHangsTheDevice(t *testing.T) {
	r := newRig(t, nvmetest.Config{Hooks: nvmetest.Hooks{Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid != 0 && cmd.SLBA() == 13 {
			return nvmetest.Verdict{Action: nvmetest.Drop}
		}
		return nvmetest.Verdict{}
	}}}, func(o *Options) { o.Timeout = 200 * time.Millisecond })
	q, other := r.queue(t, Attach{Slice: all}), r.queue(t, Attach{Slice: all})
	mem := r.guests.Memory(4096)
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			other.put1(Request{Op: Read, Len: 512, Vec: []Seg{seg(mem[512:1024])}})
			for len(other.Reap(1)) == 0 {
				other.nap()
			}
			if x := other.reaped[0]; !x.Status.OK() {
				done <- fmt.Errorf("request %d: %v", n, x.Status)
				return
			} else {
				other.Free(x)
			}
		}
	}()
	st := q.do(t, Request{Op: Read, Off: 13 << 9, Len: 512, Vec: []Seg{seg(mem[:512])}})
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if st != nvme.StatusInternalError {
		t.Fatal(st)
	}
}
