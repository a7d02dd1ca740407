// Package testrig has what the tests of all rooms need and none of them is about: servers that run beside a test, and logs that can be read
// while they are written. It is not in tools/internal because the tests of guestdrv and hostmed use it, too; so it imports neither.
package testrig

import (
	"bytes"
	"context"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// Serve runs a server until the end of the test, or until stop is called, which returns what the server returned, and nil when it is called again.
// An error that nobody was told fails the test.
func Serve(t testing.TB, run func(context.Context) error) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	var once sync.Once
	stop = func() (err error) {
		once.Do(func() { cancel(); err = <-ended })
		return err
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("shutdown: %v", err)
		}
	})
	return stop
}

// Buffer is written by some goroutines and read by others. The zero Buffer is empty and ready for use.
type Buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write never fails.
func (l *Buffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String returns what has been written so far.
func (l *Buffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Log returns a logger of all but traces. What it was told is shown at the end of the test if that has failed.
func Log(t testing.TB) hclog.Logger {
	var b Buffer
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(b.String())
		}
	})
	return hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, Output: &b})
}
