package ublk

import (
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// lateNVMe ends a command when it has been looked for some times, as a controller does that is polled.
type lateNVMe struct {
	*fakeNVMe
	looks int
}

func (l *lateNVMe) Reap(out []export.Result) (int, error) {
	if l.looks++; len(l.seen) > 0 && l.looks%5 == 0 {
		l.end(0, nvme.StatusSuccess)
	}
	return l.fakeNVMe.Reap(out)
}

// TestSystemCallsOfARequest counts them where one request comes at a time: the call that waits for the next request carries the end of the last one,
// and the watch for the interrupt.
func TestSystemCallsOfARequest(t *testing.T) {
	const requests = 200
	for name, c := range map[string]struct {
		fd    int
		polls bool // the command ends while it is polled for
		calls int  // for each request
	}{
		"polled":               {5, true, 1},
		"slept for":            {5, false, 2},
		"without interrupts":   {-1, true, 1},
		"an unknown interrupt": {99, false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 4, 4)
			r.dev.fd = c.fd
			if c.polls {
				r.queue.nvme = &lateNVMe{fakeNVMe: r.dev}
			}
			asked := 0
			r.port.onWait = func() {
				switch {
				case len(r.dev.seen) > 0 && c.polls && c.fd >= 0:
					t.Error("it sleeps, and polling would have paid")
					fallthrough
				case len(r.dev.seen) > 0:
					r.dev.end(0, nvme.StatusSuccess)
					if r.watch {
						r.port.events = append(r.port.events, event{watch: true})
					}
				case asked == requests:
					r.port.stop(4)
				default:
					r.port.request(uint16(asked%4), opRead, 8, 0)
					asked++
				}
			}
			if err := r.run(); err != nil {
				t.Fatal(err)
			}
			if n := len(r.port.done); n != requests {
				t.Fatalf("%d requests ended, want %d", n, requests)
			}
			// The first call fetches, the last one waits for the end.
			calls := r.port.flushes + len(r.port.waits)
			if want := 2 + requests*c.calls; calls != want {
				t.Errorf("%d system calls for %d requests, want %d", calls, requests, want)
			}
			if n := r.counts.Enters.Load(); n != uint64(calls) {
				t.Errorf("%d system calls are counted, %d were made", n, calls)
			}
		})
	}
}

// TestCommitsDoNotWaitForTheController: with commands under way what has ended is handed over at once, and in any case by the call that brings
// what the kernel holds.
func TestCommitsDoNotWaitForTheController(t *testing.T) {
	r := newRig(t, 4, 4)
	for tag := range uint16(2) {
		r.port.request(tag, opWrite, 8, 0)
	}
	step := func(commands, commits, flushes int) {
		t.Helper()
		r.port.flushes = 0
		if _, err := r.step(); err != nil {
			t.Fatal(err)
		}
		if len(r.dev.seen) != commands || len(r.port.prepared) != commits || r.port.flushes != flushes {
			t.Fatalf("%d commands, %d commits that wait, %d calls; want %d, %d, %d", len(r.dev.seen), len(r.port.prepared), r.port.flushes, commands, commits, flushes)
		}
	}
	step(2, 0, 0)
	r.dev.end(0, nvme.StatusSuccess)
	step(1, 0, 1)
	r.dev.end(0, nvme.StatusSuccess)
	step(0, 1, 0) // the call that sleeps comes next
	r.port.request(2, opWrite, 8, 0)
	r.port.holds = true
	step(1, 0, 1)
	if n := len(r.port.done); n != 2 {
		t.Errorf("%d requests have ended, want 2", n)
	}
}
