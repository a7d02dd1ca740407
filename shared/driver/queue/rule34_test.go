package queue

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRule34_FailDoesNotBlock clears O_NONBLOCK and fills the counter to the brim: a write to it would never return.
func TestRule34_FailDoesNotBlock(t *testing.T) {
	p := newPair(t, 64, func(c *Config) { eventFD(t, c) })
	full := [8]byte{0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF}
	if _, err := unix.Write(p.fd, full[:]); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(p.fd, false); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		_ = p.Fail(errors.New("because"))
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("Fail hangs in a write to the eventfd")
		var b [8]byte
		_, _ = unix.Read(p.fd, b[:])
		<-done
	}
}

// TestRule34_DrainTakesAllAndNeverWaits drains a blocking eventfd that is signalled, and then one that is empty.
func TestRule34_DrainTakesAllAndNeverWaits(t *testing.T) {
	p := newPair(t, 64, func(c *Config) { eventFD(t, c) })
	if err := unix.SetNonblock(p.fd, false); err != nil {
		t.Fatal(err)
	}
	three := [8]byte{3}
	if _, err := unix.Write(p.fd, three[:]); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		p.drain()
		if n, err := p.pollFD(0); n != 0 || err != nil {
			t.Errorf("still readable after a drain: %d, %v", n, err)
		}
		p.drain()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("drain waits on an empty eventfd")
		_, _ = unix.Write(p.fd, three[:])
		<-done
	}
	if n := testing.AllocsPerRun(100, p.drain); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
