package ioq

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// inNoFile finds memory in no file.
func inNoFile(iova, _ uint64) inspect.Memory { return inspect.Memory{IOVA: iova} }

func (r *rig) snapshot() (c inspect.Controller) {
	r.ctl.Snapshot(&c, DoorbellPages{}, inNoFile, patience)
	return c
}

// Snapshots and kicks while every queue is busy: each snapshot is consistent, and nothing is disturbed. On the heap the race detector watches.
func TestSnapshotWhileBusy(t *testing.T) {
	for _, mode := range []ctrl.DoorbellMode{ctrl.Shadow, ctrl.Trap, ctrl.Mmap} {
		t.Run(mode.String(), func(t *testing.T) {
			r := newRig(t, rigConfig{workers: 2, mode: mode, shadow: mode == ctrl.Shadow, heap: mode != ctrl.Mmap})
			const queues, size, rounds = 4, 16, 300
			var pairs []*pair
			for qid := range uint16(queues) {
				pairs = append(pairs, r.pair(qid+1, size, false))
			}
			var drivers sync.WaitGroup
			busy := make(chan struct{})
			for i, p := range pairs {
				drivers.Go(func() {
					for n := range rounds {
						batch := n%7 + 1
						for range batch {
							p.push(rw(nvme.IORead, uint64(i), 1, base+dataOff+uint64(i)*shm.PageSize))
						}
						p.publish()
						p.reap(batch)
						if n%50 == 49 {
							time.Sleep(time.Millisecond) // the queue sleeps
						}
					}
				})
			}
			go func() { drivers.Wait(); close(busy) }()
			before := make([]inspect.Queue, queues)
			look := func() {
				c := r.snapshot()
				if len(c.Busy) != 0 || len(c.Queues) != queues {
					t.Fatalf("%+v", c)
				}
				for i, q := range c.Queues {
					b := &before[i]
					if q.QID != uint16(i+1) || q.SQ.Private >= size || q.CQTail >= size || q.CQ.Private >= size || q.Inflight >= size || q.Room >= size ||
						q.Commands < b.Commands || q.Completions < b.Completions || q.Completions > q.Commands || q.Kicks < b.Kicks || q.Armed < b.Armed ||
						q.LastFetch < b.LastFetch || q.LastPost < q.LastFetch-int64(patience) || q.LastLook < q.LastPost {
						t.Errorf("%+v\nafter %+v", q, *b)
					}
					if q.State == "armed" && !q.Blocked && (q.ArmSaw != q.ArmIndex || q.ArmIndex != q.SQ.Private && q.ArmedAt != 0) {
						t.Errorf("asleep, and armed for something else: %+v", q)
					}
					*b = q
				}
			}
			for done := false; !done; {
				select {
				case <-busy:
					done = true
				default:
				}
				look()
				for qid := range uint16(queues) {
					if _, err := r.ctl.Kick(qid+1, patience); err != nil {
						t.Error(err)
					}
				}
			}
			total := uint64(0)
			for n := range rounds {
				total += uint64(n%7 + 1)
			}
			for _, q := range r.snapshot().Queues {
				if q.Commands != total || q.Completions != total || q.Inflight != 0 || q.Staged != 0 {
					t.Errorf("of %d commands: %+v", total, q)
				}
			}
			r.noError()
		})
	}
}

// One worker of two hangs: the other's queues are shown, and what the first says later nobody hears.
func TestSnapshotOfTwoWorkers(t *testing.T) {
	r := newRig(t, rigConfig{workers: 2, shadow: true})
	r.pair(1, 16, false)
	r.pair(2, 16, false)
	stuck, let := make(chan struct{}), make(chan struct{})
	r.workers[1].Post(func() { close(stuck); <-let })
	<-stuck
	for range 2 { // the second time it owes an answer, and is not waited for
		var c inspect.Controller
		r.ctl.Snapshot(&c, DoorbellPages{}, inNoFile, 20*time.Millisecond)
		if !slices.Equal(c.Busy, []int{1}) || len(c.Queues) != 1 || c.Queues[0].QID != 1 {
			t.Errorf("%+v", c)
		}
		if _, busy := r.ctl.StatsWithin(20 * time.Millisecond); !slices.Equal(busy, []int{1}) {
			t.Errorf("%v", busy)
		}
	}
	for i := range 2 * maxKicking { // what waits is bounded
		if _, err := r.ctl.Kick(2, time.Microsecond); !errors.Is(err, inspect.ErrBusy) {
			t.Errorf("kick %d: %v", i, err)
		}
	}
	w := r.workers[1]
	w.mu.Lock()
	if n := len(w.mail); n > maxKicking+1 {
		t.Errorf("%d letters wait", n)
	}
	w.mu.Unlock()
	close(let)
	r.eventually("all of it", func() bool { c := r.snapshot(); return len(c.Busy) == 0 && len(c.Queues) == 2 })
	if k, err := r.ctl.Kick(2, patience); err != nil || !k.Woken && !k.Awake {
		t.Errorf("%+v, %v", k, err)
	}
}

// A doorbell message that was not asked for, and finds nothing, is spurious; one that finds something is not.
func TestSpuriousKicks(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, noSpin: true})
	p := r.pair(1, 16, false)
	queue := func() inspect.Queue { return r.snapshot().Queues[0] }
	r.eventually("sleep", func() bool { return queue().State == "armed" })
	off := uint64(nvme.SQTailDoorbell(1, 0)) - nvme.DoorbellBase
	w := r.workers[0]
	for range 3 {
		w.Call(func() { r.ctl.Doorbell(w, off, 9) })
		r.eventually("sleep", func() bool { return queue().State == "armed" })
	}
	if q := queue(); q.Kicks != 3 || q.Spurious != 3 || q.SQ.Rung != 9 || q.SQ.Private != 0 {
		t.Errorf("%+v", q)
	}
	if st := p.do(rw(nvme.IORead, 0, 1, base+dataOff)); !st.OK() {
		t.Error(st)
	}
	if q := queue(); q.Kicks != 4 || q.Spurious != 3 {
		t.Errorf("%+v", q)
	}
}

// Queues come and go while they are kicked.
func TestKickWhileQueuesGo(t *testing.T) {
	r := newRig(t, rigConfig{workers: 2, heap: true, shadow: true})
	end := make(chan struct{})
	var kickers sync.WaitGroup
	for range 2 {
		kickers.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				if _, err := r.ctl.Kick(2, patience); err != nil && !errors.Is(err, inspect.ErrNoQueue) {
					t.Error(err)
				}
			}
		})
	}
	for range 50 {
		p := r.pair(2, 16, false)
		if st := p.do(rw(nvme.IORead, 0, 1, base+dataOff)); !st.OK() {
			t.Error(st)
		}
		if later := r.ctl.DeleteSQ(2); later != nil {
			t.Error("commands in flight")
		}
		r.ctl.DeleteCQ(2)
	}
	close(end)
	kickers.Wait()
}

// Memory that goes while it is looked at fails its queue, and not the snapshot (R36).
func TestSnapshotOfMemoryThatIsGone(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	r.pair(1, 16, false)
	r.eventually("sleep", func() bool { return r.snapshot().Queues[0].State == "armed" })
	gone, err := shm.NewMemfd("gone", 2*shm.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	shadow, _ := gone.View(0, shm.PageSize)
	ei, _ := gone.View(shm.PageSize, shm.PageSize)
	if err := r.ctl.SetDoorbellPages(shadow, ei); err != nil {
		t.Fatal(err)
	}
	r.eventually("sleep", func() bool { return r.snapshot().Queues[0].State == "armed" })
	gone.Close() // not mapped any more
	c := r.snapshot()
	if len(c.Busy) != 0 {
		t.Errorf("%+v", c)
	}
	select {
	case e := <-r.errs:
		if e.Kind != MemoryFault {
			t.Error(e)
		}
	case <-time.After(patience):
		t.Error("no error")
	}
	if c := r.snapshot(); len(c.Queues) != 1 || c.Queues[0].State != "failed" {
		t.Errorf("%+v", c)
	}
}
