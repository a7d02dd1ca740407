package load

import (
	"time"

	"golang.org/x/sys/unix"
)

// pace says when a job with Config.Rate may start commands.
type pace struct {
	gap  time.Duration
	next time.Time
}

// paceDebt is how much a job that was held up makes up for.
const paceDebt = 100 * time.Millisecond

func newPace(rate uint32) *pace { return &pace{gap: time.Second / time.Duration(rate)} }

// due reports whether a command may be started now, and takes its place.
func (p *pace) due() bool {
	now := time.Now()
	if p.next.After(now) {
		return false
	}
	if late := now.Add(-paceDebt); p.next.Before(late) {
		p.next = late
		if p.gap > paceDebt {
			p.next = now
		}
	}
	p.next = p.next.Add(p.gap)
	return true
}

// sleep waits for the next place, or for a while, on the job's own thread: a timer of Go's would hand it over to another twice.
func (p *pace) sleep() {
	if d := min(time.Until(p.next), paceDebt); d > 0 {
		t := unix.NsecToTimespec(int64(d))
		_ = unix.Nanosleep(&t, nil) // an early end is another look
	}
}
