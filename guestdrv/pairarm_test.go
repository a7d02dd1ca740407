package guestdrv_test

import (
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestArmedPairMakesItsEventFDReadable is a caller that sleeps on several things at once.
func TestArmedPairMakesItsEventFDReadable(t *testing.T) {
	c := openInProc(t, nvmetest.Config{}, testOptions())
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var out [1]guestdrv.Result
	slept := 0
	for range 50 {
		if armed, err := p.Arm(); err != nil || !armed {
			t.Fatalf("nothing outstanding: %v, %v", armed, err)
		}
		if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}}); err != nil {
			t.Fatal(err)
		}
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		armed, err := p.Arm()
		if err != nil {
			t.Fatal(err)
		}
		if armed {
			slept++
			fds := []unix.PollFd{{Fd: int32(p.EventFD()), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, 10_000)
			for err == unix.EINTR { // the runtime's preemption
				n, err = unix.Poll(fds, 10_000)
			}
			if n != 1 || err != nil {
				t.Fatalf("no interrupt in 10 s: %d, %v", n, err)
			}
		}
		for n := 0; n == 0; {
			if n, err = p.Reap(out[:]); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("slept %d of 50 times", slept)

	polled, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: true})
	if err != nil {
		t.Fatal(err)
	}
	defer polled.Close()
	if fd := polled.EventFD(); fd != -1 {
		t.Errorf("a polled pair has eventfd %d", fd)
	}
	if armed, err := polled.Arm(); !armed || err != nil {
		t.Errorf("arming a polled pair: %v, %v", armed, err)
	}
}

// TestArmKeepsDeadlines is a command that never ends, for a caller that never calls Wait.
func TestArmKeepsDeadlines(t *testing.T) {
	var hold atomic.Bool
	cfg := nvmetest.Config{}
	cfg.Command = func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
		if qid != 0 && hold.Load() {
			return nvmetest.Verdict{Action: nvmetest.Hold}
		}
		return nvmetest.Verdict{}
	}
	o := testOptions()
	o.Timeout = time.Second
	c := openInProc(t, cfg, o)
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	hold.Store(true)
	if _, err := p.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}}); err != nil {
		t.Fatal(err)
	}
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < patience; time.Sleep(5 * time.Millisecond) {
		if _, err := p.Arm(); err != nil {
			return
		}
	}
	t.Error("the deadline passed unseen")
}
