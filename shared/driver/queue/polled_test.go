package queue

import (
	"context"
	"testing"
	"time"
)

// TestPolled: what Wait spends with looking in vain is counted, and what it spends asleep is not.
func TestPolled(t *testing.T) {
	p := newPair(t, 64, func(c *Config) { eventFD(t, c) })
	if p.Polled() != 0 {
		t.Fatal("it has not waited yet")
	}
	wait := func() (took time.Duration) {
		p.submit(t, 1)
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel() // after polling and one nap
		begin := time.Now()
		if err := p.Wait(ctx); err != context.Canceled {
			t.Fatal(err)
		}
		return time.Since(begin)
	}
	took := wait()
	polled := p.Polled()
	if polled <= 0 || polled > took-nap*time.Millisecond/2 {
		t.Fatalf("%v of %v, of which a nap of %d ms was slept", polled, took, nap)
	}
	p.noSpin = true
	if wait(); p.Polled() != polled {
		t.Errorf("%v, and %v after a sleep", polled, p.Polled())
	}
	// What was looked for without the clock counts as much as what was timed.
	p.looks = looks{timed: 64, untimed: 32, spent: 1000}
	if p.Polled() != 1500 {
		t.Error(p.Polled())
	}
}
