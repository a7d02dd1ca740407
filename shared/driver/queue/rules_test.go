package queue

import (
	"context"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// device answers commands in a goroutine of its own until stop, and interrupts unless the driver polls.
func (p *pairOfHalves) device(t *testing.T, quiet bool, stop *atomic.Bool, done chan<- int) {
	interrupts := 0
	for !stop.Load() {
		cmds := p.fetch(t)
		for i := range cmds {
			p.answer(t, &cmds[i])
		}
		p.tail.Behind(p.sq.Head())
		if len(cmds) > 0 && !(quiet && p.head.Quiet()) {
			interrupts++
			one := [8]byte{1}
			_, _ = unix.Write(p.fd, one[:])
		}
		if len(cmds) == 0 {
			runtime.Gosched() // where both have one core, it is the driver's turn
		}
	}
	done <- interrupts
}

// TestRule05_BodyBeforePhase lets a device post as fast as it can, on memory that the race detector sees: a completion whose phase
// is new must have its own body. Result and identifier were stored in different words.
func TestRule05_BodyBeforePhase(t *testing.T) {
	for _, size := range []uint32{2, 3, 64} {
		runPair(t, size, false, 3000, 0)
	}
}

// TestSleepNeverMissesAWakeUp makes the driver go to sleep as often as it can while the device decides whether to interrupt. A lost
// wake-up shows as an interrupt that never comes.
func TestSleepNeverMissesAWakeUp(t *testing.T) {
	for _, quiet := range []bool{false, true} {
		runPair(t, 64, quiet, 4000, 1)
	}
}

// runPair sends commands one after the other, or depth at a time, to a device in another goroutine.
func runPair(t *testing.T, size uint32, quiet bool, commands uint64, depth int) {
	t.Helper()
	p := newPair(t, size, func(c *Config) { eventFD(t, c); c.Quiet = quiet; c.Timeout = patience })
	p.tail.BehindNow(0)
	p.head.BehindNow(0)
	var stop atomic.Bool
	defer stop.Store(true)
	done := make(chan int, 1)
	go p.device(t, quiet, &stop, done)
	out := make([]Completion, 16)
	begin := time.Now()
	for tag := uint64(0); tag < commands && (tag < 100 || time.Since(begin) < patience/4); { // fewer where both have one core: each sleep takes a time slice there
		for p.Free() > 0 && (depth == 0 || p.Outstanding() < depth) {
			p.submit(t, tag)
			tag++
		}
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		for p.Outstanding() > 0 {
			if depth != 0 && !p.Queue.cq.Ready() {
				p.sleepUntilInterrupt(t)
			} else if err := p.Wait(context.Background()); err != nil {
				t.Fatal(err)
			}
			n, err := p.Reap(out)
			if err != nil {
				t.Fatal(err)
			}
			for i := range out[:n] {
				checkResult(t, &out[i])
			}
			if quiet {
				p.Queue.head.SetQuiet(tag%2 == 0)
			}
		}
	}
	stop.Store(true)
	if interrupts := <-done; depth != 0 && interrupts == 0 {
		t.Error("the driver never slept")
	}
}

// sleepUntilInterrupt is a sleep that goes on after a nap: one that is late on a slow machine is not lost. It is not Wait, which polls first and so
// would hardly ever sleep here.
func (p *pairOfHalves) sleepUntilInterrupt(t *testing.T) {
	t.Helper()
	armed, err := p.Arm()
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); armed; {
		switch n, err := p.pollFD(nap); {
		case err != nil:
			t.Fatal(err)
		case n > 0:
			return
		case time.Since(begin) > patience:
			t.Fatalf("asleep for %v without an interrupt; a completion is there: %v", patience, p.Queue.cq.Ready())
		}
	}
}

// TestRule06_PublishMovesTheTail looks at the doorbell between Push and Publish.
func TestRule06_PublishMovesTheTail(t *testing.T) {
	p := newPair(t, 64, nil)
	for i := range uint64(10) {
		p.submit(t, i)
		if v := p.tail.Load(); v != 0 {
			t.Fatalf("the device sees tail %d before Publish", v)
		}
	}
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	if v := p.tail.Load(); v != 10 {
		t.Fatalf("tail %d", v)
	}
	cmds := p.fetch(t)
	for i := range cmds {
		if cmds[i].CDW10 != uint32(i) {
			t.Fatalf("command %d holds %d", i, cmds[i].CDW10)
		}
	}
}

// TestRule09_RoomForEveryCompletion keeps the rings as full as they get and never reaps more than the smallest batch: the device must
// always have room for what it was sent. answer reports it if not.
func TestRule09_RoomForEveryCompletion(t *testing.T) {
	for _, size := range sizes {
		p := newPair(t, size, nil)
		var waiting []nvme.Command
		out := make([]Completion, 1)
		for i := range uint64(5 * size) {
			for p.Free() > 0 {
				p.submit(t, i)
			}
			if err := p.Publish(); err != nil {
				t.Fatal(err)
			}
			waiting = append(waiting, p.fetch(t)...)
			for i := range waiting {
				p.answer(t, &waiting[i])
			}
			waiting = waiting[:0]
			if n, err := p.Reap(out); n != 1 || err != nil {
				t.Fatalf("size %d: %d, %v", size, n, err)
			}
		}
	}
}

// TestRule19_OldValueIsPrivate is a device that writes the doorbell page, which is the driver's: whether to ring is decided by what
// the driver last published all the same.
func TestRule19_OldValueIsPrivate(t *testing.T) {
	p := newPair(t, 64, nil)
	word, err := p.page.Word32(2 * qid * 4)
	if err != nil {
		t.Fatal(err)
	}
	ei, err := p.page.Word32(4096 + 2*qid*4)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint32(50) {
		ei.Store(i % 64) // wake me for the next
		word.Store(i + 1)
		p.submit(t, uint64(i))
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		if n := p.Queue.tail.Rings; n != uint64(i)+1 {
			t.Fatalf("command %d: %d rings; the value in the page was believed", i, n)
		}
		cmds := p.fetch(t)
		p.answer(t, &cmds[0])
		if n, err := p.Reap(make([]Completion, 1)); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
}

// TestRule34_BlockingEventFD clears O_NONBLOCK on the interrupt's file description, as the peer that shares it can.
func TestRule34_BlockingEventFD(t *testing.T) {
	p := newPair(t, 64, func(c *Config) { eventFD(t, c); c.Timeout = patience })
	if err := unix.SetNonblock(p.fd, false); err != nil {
		t.Fatal(err)
	}
	p.submit(t, 1)
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- p.Wait(ctx) }()
	select {
	case err := <-done:
		if err != context.DeadlineExceeded {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal("Wait hangs in a read of the eventfd")
	}
	cmds := p.fetch(t)
	go func() {
		time.Sleep(5 * time.Millisecond)
		p.cq.Post([]ring.Entry{ring.MakeEntry(1, p.sq.Head(), qid, cmds[0].CID, 1)})
		one := [8]byte{1}
		_, _ = unix.Write(p.fd, one[:])
	}()
	if err := p.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
}
