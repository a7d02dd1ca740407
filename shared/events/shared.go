package events

import "sync"

// Shared is a Writer that several goroutines write to, a batch at a time.
type Shared struct {
	mu sync.Mutex
	w  *Writer
}

// NewShared returns w for several goroutines. Nobody else writes to it any more.
func NewShared(w *Writer) *Shared { return &Shared{w: w} }

// Lock returns the Writer for one batch, which Unlock ends.
func (s *Shared) Lock() *Writer {
	s.mu.Lock()
	return s.w
}

// Unlock flushes the batch.
func (s *Shared) Unlock() {
	s.w.Flush()
	s.mu.Unlock()
}
