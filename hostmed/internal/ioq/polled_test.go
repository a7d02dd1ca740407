package ioq

import (
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestPolledBackend has a medium that tells nobody when it is done: the worker must look, also when all its queues are armed, and must still
// hear everyone else.
func TestPolledBackend(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		s := &slow{info: openBackend(t, "null:size=1GiB").Info(), polled: true}
		c.backend = s
		r := newRig(t, c)
		p := r.pair(1, 16, false)
		var heard sourceFunc
		var socket atomic.Int32
		heard = func(uint32) { socket.Add(1) }
		fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		for _, w := range r.workers {
			w.Call(func() { err = w.AddEdge(fd, heard) })
			if err != nil {
				t.Fatal(err)
			}
		}
		for round := range 3 {
			for i := range 5 {
				p.push(rw(nvme.IORead, uint64(i), 1, base+dataOff))
			}
			p.publish()
			r.eventually("the medium has them", func() bool { return s.held() == 5 })
			r.eventually("the queue is armed", func() bool { return r.state(1) == Armed })
			before := socket.Load()
			writeEventFD(fd)
			r.eventually("the worker looks at its sockets", func() bool { return socket.Load() >= before+int32(len(r.workers)) })
			if n := p.reapSome(); n > 0 {
				t.Fatalf("round %d: %d completions of nothing", round, n)
			}
			if s.finish(2) != 2 {
				t.Fatal("finish")
			}
			p.reap(2)
			p.push(rw(nvme.IORead, 9, 1, base+dataOff)) // wakes the queue
			p.publish()
			r.eventually("the medium has another", func() bool { return s.held() == 4 })
			if s.finish(4) != 4 {
				t.Fatal("finish")
			}
			p.reap(4)
		}
		r.noError()
	})
}

// TestPolledBackendIdle measures that a worker with polled queues uses no CPU when nothing is in flight.
func TestPolledBackendIdle(t *testing.T) {
	s := &slow{info: openBackend(t, "null:size=1GiB").Info(), polled: true}
	r := newRig(t, rigConfig{backend: s, shadow: true})
	p := r.pair(1, 16, false)
	used := func() (d time.Duration) {
		r.workers[0].Call(func() {
			var now unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &now); err != nil {
				t.Error(err)
			}
			d = time.Duration(now.Nano())
		})
		return d
	}
	over := func(d time.Duration) time.Duration {
		begin := used()
		for end := time.Now().Add(d); time.Now().Before(end); {
			time.Sleep(time.Until(end))
		}
		return used() - begin
	}
	p.push(rw(nvme.IORead, 0, 1, base+dataOff))
	p.publish()
	r.eventually("the medium has it", func() bool { return s.held() == 1 })
	r.eventually("the queue is armed", func() bool { return r.state(1) == Armed })
	if busy := over(100 * time.Millisecond); busy == 0 {
		t.Error("no CPU time was used to poll")
	}
	s.finish(1)
	p.reap(1)
	r.eventually("the worker sleeps", func() bool { return over(200*time.Millisecond) < 2*time.Millisecond })
}

// TestPolledInVain has a polled medium that hangs: it is looked at about once a millisecond, and all the time again when it has something to do.
func TestPolledInVain(t *testing.T) {
	for name, c := range map[string]rigConfig{"": {shadow: true}, "no polling of queues": {noSpin: true}, "mapped": {mode: ctrl.Mmap}} {
		t.Run(name, func(t *testing.T) {
			s := &slow{info: openBackend(t, "null:size=1GiB").Info(), polled: true}
			c.backend = s
			r := newRig(t, c)
			p := r.pair(1, 16, false)
			for range 3 {
				before := s.looks.Load()
				p.push(rw(nvme.IORead, 0, 1, base+dataOff))
				p.publish()
				r.eventually("the medium has it", func() bool { return s.held() == 1 })
				r.eventually("it is polled", func() bool { return s.looks.Load() > before+100 })
				// window returns how many looks there are in 40 ms, and how many there may be: one a millisecond, and the 18 of the way from firstLook to
				// lastLook, for a worker that was kept from its core meanwhile.
				window := func() (looks, most int64) {
					begin, from := time.Now(), s.looks.Load()
					time.Sleep(40 * time.Millisecond)
					return s.looks.Load() - from, time.Since(begin).Milliseconds() + 20
				}
				r.eventually("looks become rare", func() bool {
					looks, most := window()
					return looks > 0 && looks <= most
				})
				for range 5 {
					if looks, most := window(); looks > most {
						t.Errorf("it is polled again, and has nothing new to do: %d looks, %d at most", looks, most)
					}
				}
				still := s.looks.Load()
				r.eventually("it is looked at all the same", func() bool { return s.looks.Load() > still })
				s.finish(1)
				p.reap(1)
			}
			r.noError()
		})
	}
}

// TestFlushOfPolledBackend is Flush of a medium that must be asked.
func TestFlushOfPolledBackend(t *testing.T) {
	s := &slow{info: openBackend(t, "null:size=1GiB").Info(), polled: true}
	done := make(chan error, 1)
	go func() { done <- Flush(s) }()
	for begin := time.Now(); s.finish(1) == 0; {
		if !pauseAfter(begin) {
			t.Fatal("no flush came")
		}
	}
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal("the flush is done, and Flush does not return")
	}
}

type sourceFunc func(uint32)

func (f sourceFunc) Ready(events uint32) { f(events) }

var _ backend.Poller = (*slowQueue)(nil)
