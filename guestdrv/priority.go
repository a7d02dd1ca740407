package guestdrv

import (
	"context"
	"fmt"
	"math/bits"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Arbitration is weighted round robin with an urgent class: how the controller chooses among submission queues that have commands. Those of urgent priority come first,
// always. The others share by their weights: in each cycle so many commands of a priority are fetched as its weight says. NVMe Base 2.0c 3.4.4.
type Arbitration struct {
	// The weights, 1 to 256; 0: 1. If all three and Burst are 0, those that the controller has are left alone.
	High, Medium, Low int
	// Burst is how many commands are fetched from one queue at a time: a power of two up to 64; 0: no limit.
	Burst int
}

// Priority is the class of a submission queue. It counts with Options.Arbitration only.
type Priority uint8

// The priorities.
const (
	PriorityDefault Priority = iota // PriorityMedium
	PriorityUrgent
	PriorityHigh
	PriorityMedium
	PriorityLow
)

var priorityNames = [...]string{"default", "urgent", "high", "medium", "low"}

// String returns "default", "urgent", "high", "medium" or "low".
func (p Priority) String() string {
	if int(p) < len(priorityNames) {
		return priorityNames[p]
	}
	return fmt.Sprintf("Priority(%d)", uint8(p))
}

// ParsePriority reads what String writes.
func ParsePriority(s string) (Priority, error) {
	for p, name := range priorityNames {
		if s == name {
			return Priority(p), nil
		}
	}
	return 0, fmt.Errorf("priority %q is none of %v", s, priorityNames[1:])
}

// qprio is what Create I/O Submission Queue has for p.
func (p Priority) qprio() uint8 {
	if p == PriorityDefault {
		p = PriorityMedium
	}
	return uint8(p - PriorityUrgent)
}

// check says what is wrong with p.
func (p Priority) check(a *Arbitration) error {
	switch {
	case p > PriorityLow:
		return fmt.Errorf("unknown priority %v", p)
	case p != PriorityDefault && a == nil:
		return fmt.Errorf("priority %v: queues have priorities with Options.Arbitration only", p)
	}
	return nil
}

// check says what is wrong with a, which may be nil.
func (a *Arbitration) check() error {
	if a == nil {
		return nil
	}
	for _, w := range []int{a.High, a.Medium, a.Low} {
		if w < 0 || w > 256 {
			return fmt.Errorf("Arbitration: weights high %d, medium %d, low %d: each is 1 to 256", a.High, a.Medium, a.Low)
		}
	}
	if a.Burst < 0 || a.Burst > 64 || a.Burst&(a.Burst-1) != 0 {
		return fmt.Errorf("Arbitration: Burst %d is no power of two up to 64, and not 0 for no limit", a.Burst)
	}
	return nil
}

// feature is a as feature 01h.
func (a *Arbitration) feature() nvme.Arbitration {
	weight := func(n int) nvme.ZeroBased8 {
		z, _ := nvme.ToZeroBased8(uint32(max(n, 1)))
		return z
	}
	ab := uint8(nvme.NoArbitrationBurst)
	if a.Burst > 0 {
		ab = uint8(bits.TrailingZeros(uint(a.Burst)))
	}
	return nvme.MakeArbitration(ab, weight(a.Low), weight(a.Medium), weight(a.High))
}

// arbitrate tells the controller the weights. It is part of every enable.
func (c *Controller) arbitrate(ctx context.Context) error {
	a := c.opts.Arbitration
	if a == nil || *a == (Arbitration{}) {
		return nil
	}
	if err := c.adm.SetArbitration(ctx, a.feature()); err != nil {
		return fmt.Errorf("weights of priorities: %w", err)
	}
	return nil
}
