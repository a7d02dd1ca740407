package queue

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestFloodedEventFD is a device that does nothing but signal: a Wait must still see its context and its deadline.
func TestFloodedEventFD(t *testing.T) {
	p := newPair(t, 64, func(c *Config) { eventFD(t, c); c.Timeout = 100 * time.Millisecond })
	var stop atomic.Bool
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		one := [8]byte{1}
		for !stop.Load() {
			_, _ = unix.Write(p.fd, one[:])
		}
	}()
	p.submit(t, 1)
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- p.Wait(context.Background()) }()
	select {
	case err := <-done:
		if !errors.Is(err, ErrTimeout) {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("Wait never comes to look at the clock")
	}
	stop.Store(true)
	<-ended
}
