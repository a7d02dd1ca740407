package ioq

import (
	"encoding/binary"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// eventfd returns an eventfd of the test's and a duplicate to be given away.
func eventfd(t testing.TB) (mine, theirs int) {
	t.Helper()
	mine, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(mine) })
	if theirs, err = unix.Dup(mine); err != nil {
		t.Fatal(err)
	}
	return mine, theirs
}

// taken returns how often an eventfd was written since the last time.
func taken(fd int) uint64 {
	var b [8]byte
	if n, _ := unix.Read(fd, b[:]); n != 8 {
		return 0
	}
	return binary.LittleEndian.Uint64(b[:])
}

func TestVectorMasks(t *testing.T) {
	r := newRig(t, rigConfig{})
	p := r.pair(1, 16, true)
	cmd := rw(nvme.IORead, 0, 8, base+dataOff)
	for name, why := range map[string][]Mask{
		"client": {MaskClient}, "table": {MaskTable}, "function": {MaskFunction}, "two at once": {MaskFunction, MaskTable},
	} {
		p.do(cmd)
		r.eventually("the interrupt", func() bool { return taken(p.irq) == 1 })
		for _, m := range why {
			r.ctl.MaskVectors(0, 9, m, true)
		}
		for range 3 {
			p.do(cmd)
		}
		r.workers[0].Call(func() {})
		if n := taken(p.irq); n != 0 || !r.ctl.Pending(1) || r.ctl.Pending(2) || r.ctl.Pending(9) {
			t.Errorf("%s: %d interrupts while masked, pending %v", name, n, r.ctl.Pending(1))
		}
		for i, m := range why {
			r.ctl.MaskVectors(1, 1, m, false)
			if n, last := taken(p.irq), i == len(why)-1; last != (n == 1) || r.ctl.Pending(1) == last {
				t.Errorf("%s: %d interrupts and pending %v after unmasking %d of %d", name, n, r.ctl.Pending(1), i+1, len(why))
			}
		}
		r.ctl.MaskVectors(0, 9, why[0], false)
	}
	// An eventfd that is given while masked is in force when the mask goes.
	mine, theirs := eventfd(t)
	r.ctl.MaskVectors(1, 1, MaskClient, true)
	r.ctl.SetVectors(1, []int{theirs}, 1)
	p.do(cmd)
	r.ctl.MaskVectors(1, 1, MaskClient, false)
	r.eventually("the interrupt", func() bool { return taken(mine) == 1 })
	r.ctl.SetVectors(8, []int{-1}, 1)
	if _, extra := eventfd(t); true { // past the last vector: closed, and nothing else
		r.ctl.SetVectors(9, []int{extra}, 1)
		if err := unix.Close(extra); err != unix.EBADF {
			t.Errorf("an eventfd for no vector stays open: %v", err)
		}
	}
}

// pinRig is a rig whose function interrupts by its pin, and the client's end of it.
func pinRig(t *testing.T, c rigConfig) (r *rig, pin int, mask *atomic.Uint32) {
	mask = new(atomic.Uint32)
	r = newRig(t, c)
	r.ctl.cfg.InterruptMask = mask.Load
	r.later = make(chan uint32, 1)
	r.ctl.cfg.OnPin = func(rung uint32, _ time.Duration) {
		select {
		case r.later <- rung:
		default:
		}
	}
	pin, theirs := eventfd(t)
	r.ctl.SetPin(theirs)
	r.ctl.UsePin(true)
	return r, pin, mask
}

// pinPair is a queue pair whose completions interrupt by vector 0.
func (r *rig) pinPair(qid uint16, size uint32) *pair {
	p := r.pair(qid, size, false)
	g := r.ctl.cqs[qid].Load()
	g.w.Call(func() { g.ien, g.index, g.vector = true, 0, &r.ctl.vectors[0] })
	return p
}

// posted returns CQ qid's tail.
func (r *rig) posted(qid uint16) (tail uint32) {
	g := r.ctl.cqs[qid].Load()
	g.w.Call(func() { tail = g.prod.Tail() })
	return tail
}

// take is reap by an interrupt handler: while QEMU's line is up the doorbells of a mapped page are messages too.
func (p *pair) take(n int) {
	p.r.t.Helper()
	p.reap(n)
	p.acknowledge()
}

func (p *pair) acknowledge() {
	if p.r.ctl.mode == ctrl.Mmap {
		w := p.r.workers[0]
		w.Call(func() { p.r.ctl.Doorbell(w, uint64(p.qid)*8+4, p.cq.Head()) })
	}
}

func TestPinIsALevel(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		r, pin, mask := pinRig(t, c)
		p := r.pinPair(1, 16)
		cmd := rw(nvme.IORead, 0, 8, base+dataOff)
		level := func() bool { return r.ctl.PinLevel(false) }
		raised := func(what string) {
			t.Helper()
			r.eventually(what, func() bool { return taken(pin) == 1 })
		}
		// quiet lets everything on its way arrive.
		quiet := func(what string) {
			t.Helper()
			r.settle([]*pair{p})
			if n := taken(pin); n != 0 {
				t.Fatalf("%s: raised %d times", what, n)
			}
		}
		for range 40 {
			p.push(cmd)
			p.publish()
			raised("the first completion")
			if !level() {
				t.Fatal("raised, and the level is low")
			}
			p.push(cmd)
			p.publish()
			r.eventually("the second", func() bool { return r.posted(1) == (p.cq.Head()+2)%16 })
			quiet("masked since it was raised")
			r.ctl.CheckPin(false, true)
			quiet("unmasked before a CQ head was rung")
			r.ctl.PinOverdue(false, <-r.later)
			raised("unmasked with completions there")
			rung := p.rings.Load()
			p.take(2)
			if c.shadow && p.rings.Load() == rung {
				t.Fatal("a driver that takes completions by the pin does not ring, and so nobody lowers it")
			}
			r.settle([]*pair{p})
			if level() {
				t.Fatal("the level is high with all completions given back")
			}
			r.ctl.CheckPin(false, true)
			quiet("unmasked with nothing there")

			// INTMS keeps it down, and INTMC lets it rise.
			mask.Store(1)
			p.push(cmd)
			p.publish()
			r.eventually("the completion", func() bool { return r.posted(1) != p.cq.Head() })
			quiet("INTMS")
			mask.Store(0)
			r.ctl.CheckPin(false, false)
			raised("INTMC")
			p.take(1)
			r.settle([]*pair{p})
			r.ctl.CheckPin(false, true)
		}
		// The client masks; another eventfd unmasks.
		r.ctl.MaskPin()
		p.push(cmd)
		p.publish()
		r.eventually("the completion", func() bool { return r.posted(1) != p.cq.Head() })
		quiet("masked by the client")
		mine, theirs := eventfd(t)
		r.ctl.SetPin(theirs)
		r.ctl.CheckPin(false, false)
		if taken(mine) != 1 || taken(pin) != 0 {
			t.Error("not raised by the new eventfd")
		}
		r.ctl.UsePin(false)
		r.ctl.CheckPin(true, true)
		if taken(mine) != 0 {
			t.Error("raised while the function does not use it")
		}
		r.ctl.UsePin(true)
		r.ctl.CheckPin(true, false)
		r.ctl.PinOverdue(true, <-r.later)
		if taken(mine) != 1 {
			t.Error("the admin queue does not raise it")
		}
		r.ctl.CheckPin(false, true)
		taken(mine)
		p.take(1)
		r.ctl.CheckPin(false, true)
		taken(mine)
		r.ctl.Interrupt(0)
		if taken(mine) != 1 {
			t.Error("an admin completion does not raise it")
		}
	})
}

// A driver that sleeps until the pin rises misses nothing, whoever is ahead.
func TestPinLosesNothing(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		r, pin, _ := pinRig(t, c)
		pairs := []*pair{r.pinPair(1, 8), r.pinPair(2, 32)}
		waiting := 0
		for i := range 300 {
			for _, p := range pairs {
				for range i%3 + 1 {
					if p.sq.Free() > 0 {
						p.push(rw(nvme.IORead, 0, 8, base+dataOff))
						waiting++
					}
				}
				p.publish()
			}
			for waiting > 0 {
				for end := time.Now().Add(patience); taken(pin) == 0; {
					fds := []unix.PollFd{{Fd: int32(pin), Events: unix.POLLIN}}
					_, _ = unix.Poll(fds, 1)
					select {
					case rung := <-r.later:
						r.ctl.PinOverdue(false, rung)
					default:
					}
					if time.Now().After(end) {
						t.Fatalf("round %d: asleep with %d completions to come\n%v", i, waiting, r.ctl)
					}
				}
				// The guest's interrupt handler: all queues, one touch of the device, then the client unmasks.
				for _, p := range pairs {
					for e, ok := p.cq.Next(); ok; e, ok = p.cq.Next() {
						if err := p.sq.Released(e.SQHead()); err != nil {
							t.Fatal(err)
						}
						waiting--
					}
					if err := p.head.Publish(p.cq.Head()); err != nil {
						t.Fatal(err)
					}
					p.acknowledge()
				}
				for _, w := range r.workers {
					w.Call(func() {}) // the socket keeps the order
				}
				r.ctl.CheckPin(false, true)
			}
		}
		r.noError()
	})
}

// Completions that are held back do not assert the pin before their time (NVMe Base 2.0c 5.27.1.6).
func TestPinIsCoalesced(t *testing.T) {
	for end := time.Now().Add(6 * patience); !pinIsCoalesced(t); {
		if time.Now().After(end) {
			t.Fatal("never within the longest time there is to gather completions")
		}
	}
}

// pinIsCoalesced returns false if the time was over before anything could be seen, as happens on a busy machine.
func pinIsCoalesced(t *testing.T) bool {
	r, pin, _ := pinRig(t, rigConfig{})
	p := r.pinPair(1, 16)
	r.ctl.SetCoalescing(2, 255) // three, or 25.5 ms
	begin := time.Now()
	for range 3 {
		p.push(rw(nvme.IORead, 0, 8, base+dataOff))
		p.publish()
	}
	r.eventually("the pin, of three", func() bool { return taken(pin) == 1 })
	p.reap(3)
	for range 2 {
		p.push(rw(nvme.IORead, 0, 8, base+dataOff))
		p.publish()
	}
	r.ctl.CheckPin(false, true)
	early := taken(pin) != 0
	if time.Since(begin) > 25*time.Millisecond {
		p.reap(2)
		return false
	}
	if early {
		t.Error("raised before the interrupt is due")
	}
	r.ctl.PinOverdue(false, <-r.later)
	if taken(pin) != 1 {
		t.Error("not raised when it is due")
	}
	p.reap(2)
	return true
}

func TestHoldStopsFetching(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		r := newRig(t, c)
		p := r.pair(1, 16, false)
		for range 20 {
			r.ctl.Hold(true)
			r.ctl.Hold(true)
			p.push(rw(nvme.IORead, 0, 8, base+dataOff))
			p.publish()
			for _, w := range r.workers {
				w.Call(func() {})
			}
			if _, ok := p.cq.Next(); ok {
				t.Fatal("a command was done without bus mastering")
			}
			r.ctl.Hold(false)
			p.reap(1)
		}
		r.noError()
	})
}

// Memory that comes back while the function is held does not start the queue.
func TestParkedAndHeld(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, scatter: true})
	p := r.pair(1, 16, false)
	for _, off := range []uint64{p.sqOff, p.cqOff} {
		r.unmap(off, 4096)
		r.ctl.Hold(true)
		p.push(rw(nvme.IORead, 0, 8, base+dataOff))
		p.publish()
		r.remap(off, 4096)
		r.workers[0].Call(func() {})
		if s := r.state(1); s != Draining {
			t.Fatalf("the queue is %v", s)
		}
		r.ctl.Hold(false)
		p.reap(1)
		r.ctl.Hold(true)
		r.unmap(off, 4096)
		r.ctl.Hold(false)
		r.remap(off, 4096)
		p.do(rw(nvme.IORead, 0, 8, base+dataOff))
	}
	r.noError()
}
