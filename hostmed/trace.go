package hostmed

import (
	"errors"
	"os"
	"sync"

	"github.com/shadowbell/shadowbell/hostmed/internal/gmem"
	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
	"github.com/shadowbell/shadowbell/shared/events"
)

// tracing is the trace points' side of a Mediator: the workers record while there is a listener.
type tracing struct {
	mu        sync.Mutex // taken after Mediator.mu
	listeners int
	common    *ioq.Tracing
	rings     []*events.Writer // by worker
	over      bool             // the workers are about to end
}

// Trace is one listener to what workers do with commands, and to their sleep: see package events and docs/trace-points.md. The workers record from the
// first Listen to the last Close, all into the same rings.
type Trace struct {
	// Rings are the workers', in order. Their descriptors are for readers, who map them by events.Map; they can be handed to other
	// processes, which cannot write through them. They are the Trace's until Close.
	Rings []TraceRing

	of     *tracing
	m      *Mediator
	common *ioq.Tracing
	once   sync.Once
	err    error
}

// TraceRing is the ring of one worker.
type TraceRing struct {
	FD   int
	Size uint64 // bytes
}

// Listen begins to record, if nobody listens yet: then records, the number that each worker's ring holds, counts. 0: events.DefaultRecords. A listener
// that comes later finds what was recorded before: events.Reader.Skip passes over it.
func (m *Mediator) Listen(records uint32) (*Trace, error) {
	t := &m.tracing
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return nil, errShutdown
	}
	if t.listeners == 0 {
		if err := t.begin(m.workers, records); err != nil {
			return nil, err
		}
	}
	t.listeners++
	x := &Trace{of: t, m: m, common: t.common}
	for _, r := range t.rings {
		x.Rings = append(x.Rings, TraceRing{FD: r.FD(), Size: r.Size()})
	}
	return x, nil
}

// begin makes the rings. mu is held.
func (t *tracing) begin(workers []*ioq.Worker, records uint32) error {
	for _, w := range workers {
		c := w.Describe()
		c.Records = records
		r, err := events.New(c)
		if err != nil {
			return errors.Join(err, t.free())
		}
		t.rings = append(t.rings, r)
	}
	t.common = ioq.NewTracing()
	for i, w := range workers {
		w.Listen(t.common, t.rings[i])
	}
	return nil
}

// end makes the workers stop, which they do between two rounds. mu is held.
func (t *tracing) end(workers []*ioq.Worker) error {
	for _, w := range workers {
		w.Listen(nil, nil)
	}
	t.listeners, t.common = 0, nil
	return t.free()
}

func (t *tracing) free() (err error) {
	for _, r := range t.rings {
		err = errors.Join(err, r.Close())
	}
	t.rings = nil
	return err
}

// close is the end for all listeners, before the workers end.
func (t *tracing) close(workers []*ioq.Worker) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	if t.listeners == 0 {
		return nil
	}
	return t.end(workers)
}

// Files opens the rings for readers, who can write through none of them. They are the caller's, also after Close.
func (t *Trace) Files() (files []*os.File, err error) {
	t.of.mu.Lock() // until Close
	defer t.of.mu.Unlock()
	for i := range t.Rings {
		var f *os.File
		if t.of.common != t.common {
			err = errShutdown
		} else {
			f, err = gmem.ReadOnly(t.Rings[i].FD)
		}
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

// Media returns the media that commands have gone to since the first Listen, by the numbers that records have. One that is met later has the next number.
func (t *Trace) Media() []events.Medium { return t.common.Media() }

// Close ends the listening. With the last listener nothing is recorded any more when it returns; who has mapped a ring keeps it. It may be called more
// than once, and after the Mediator's Close.
func (t *Trace) Close() error {
	t.once.Do(func() {
		t.of.mu.Lock()
		defer t.of.mu.Unlock()
		if t.of.over {
			return
		}
		if t.of.listeners--; t.of.listeners == 0 {
			t.err = t.of.end(t.m.workers)
		}
	})
	return t.err
}
