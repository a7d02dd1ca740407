// Package spin decides how long to poll before going to sleep. Both sides use it:
// the driver waiting for a completion and the device waiting for a doorbell.
//
// Polling is an investment that has to earn its keep. While waits end within the budget
// it stays, sized by how long they took. Each wait that outlasts it doubles the number of
// waits that are slept through before polling is tried again. So an idle side
// costs nothing, and two sides that share one core, where polling can never succeed because
// the poller keeps the other from running, soon take turns by sleeping.
//
// The package does not poll, sleep or read the clock.
package spin

import "time"

const (
	// Max is the longest poll, unless a Budget says otherwise: some more than what waking the other side takes in a virtual machine, so that a command
	// which has to wake a sleeping device costs one wake-up and not two. Measured: 50 us for the wake-up alone, 140 for the command.
	Max = 250 * time.Microsecond
	// Min is the shortest poll worth trying.
	Min = 10 * time.Microsecond

	maxSkip = 256 // waits slept through between two tries, at the most
)

// Budget is the state of one waiting side. The zero Budget is ready for use. It belongs to one goroutine.
type Budget struct {
	Most time.Duration // the longest poll; 0: Max. It is set before the first use

	gap  time.Duration // moving average of the waits that polling ended
	skip uint32        // waits to sleep through before the next try
	back uint32        // what skip is set to at the next failure
}

// Limit returns how long to poll in the wait that begins now; 0 means to sleep at once. It is called once for each wait.
func (b *Budget) Limit() time.Duration {
	if b.skip > 0 {
		b.skip--
		return 0
	}
	return min(max(8*b.gap, Min), b.most())
}

func (b *Budget) most() time.Duration {
	if b.Most == 0 {
		return Max
	}
	return b.Most
}

// Earned records that polling ended a wait after d.
func (b *Budget) Earned(d time.Duration) {
	b.gap += (d - b.gap) / 8
	b.back = 0
}

// Failed records that polling for the whole limit was in vain.
func (b *Budget) Failed() {
	b.gap = b.most() // a workload that changes its pace starts with the full budget
	b.skip = b.back
	b.back = min(2*b.back+1, maxSkip)
}
