package spin

import (
	"testing"
	"time"
)

// wait plays one wait whose work arrives after arrive and returns how long was polled.
func wait(b *Budget, arrive time.Duration) time.Duration {
	limit := b.Limit()
	switch {
	case limit == 0:
		return 0
	case arrive <= limit:
		b.Earned(arrive)
		return arrive
	default:
		b.Failed()
		return limit
	}
}

func TestBusySideKeepsPolling(t *testing.T) {
	var b Budget
	for i := range 1000 {
		if got := wait(&b, 2*time.Microsecond); got == 0 {
			t.Fatalf("wait %d was slept through though every wait before it was short", i)
		}
	}
}

func TestFutilePollingDecays(t *testing.T) {
	var b Budget
	var polled time.Duration
	const waits = 100_000
	for range waits {
		polled += wait(&b, time.Millisecond)
	}
	if share := float64(polled) / float64(waits*time.Millisecond); share > 0.001 {
		t.Errorf("polled for %.3f %% of the time of a side that is never served in time", 100*share)
	}
}

func TestPollingReturns(t *testing.T) {
	var b Budget
	for range 10_000 {
		wait(&b, time.Second)
	}
	for i := range maxSkip + 2 {
		if wait(&b, time.Microsecond) > 0 {
			return
		}
		if i > maxSkip {
			t.Fatalf("no poll within %d short waits after idling", i)
		}
	}
}

func TestLimitBounds(t *testing.T) {
	for _, most := range []time.Duration{0, Min, time.Millisecond} {
		b := Budget{Most: most}
		bound, longest := most, time.Duration(0)
		if most == 0 {
			bound = Max
		}
		for i := range 10_000 {
			l := b.Limit()
			if l != 0 && (l < Min || l > bound) {
				t.Fatalf("limit %v outside [%v, %v]", l, Min, bound)
			}
			longest = max(longest, l)
			if i%3 == 0 {
				b.Earned(time.Duration(i) * time.Nanosecond)
			} else if l != 0 {
				b.Failed()
			}
		}
		if longest != bound {
			t.Errorf("longest poll %v, want %v", longest, bound)
		}
	}
}
