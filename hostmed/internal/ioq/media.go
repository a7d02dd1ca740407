package ioq

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
)

// media is a worker's way into a backend.
type media struct {
	backend backend.Backend
	q       backend.Queue
	w       *Worker
}

// Ready is called when the backend's eventfd is readable: the loop reaps anyway.
func (m *media) Ready(uint32) {
	var buf [8]byte
	_, _ = unix.Read(m.q.EventFD(), buf[:])
}

// media returns the worker's way into n, opened at the first CreateCQ on the worker.
func (w *Worker) media(n *namespace) *media { return n.media[w.id] }

// openMedia opens what is not open yet. It runs on the worker's thread.
func (w *Worker) openMedia(c *Controller) error {
	for _, n := range c.ns {
		if n == nil || n.media[w.id] != nil {
			continue
		}
		m := w.find(n.backend)
		if m == nil {
			q, err := n.backend.NewQueue()
			if err != nil {
				return fmt.Errorf("namespace %s: %w", n.info.Name, err)
			}
			m = &media{backend: n.backend, q: q, w: w}
			if fd := q.EventFD(); fd >= 0 {
				if err := w.Add(fd, m); err != nil {
					return errors.Join(err, q.Close())
				}
			}
			w.queues = append(w.queues, m)
		}
		n.media[w.id] = m
		c.mem.Files(m.q.AddMemory)
	}
	return nil
}

func (w *Worker) find(b backend.Backend) *media {
	for _, m := range w.queues {
		if m.backend == b {
			return m
		}
	}
	return nil
}

func (w *Worker) closeMedia() {
	for _, m := range w.queues {
		if fd := m.q.EventFD(); fd >= 0 {
			w.Remove(fd)
		}
		if err := m.q.Close(); err != nil {
			w.log.Error("closing a backend queue", "error", err)
		}
	}
	w.queues = nil
}

// MemoryAdded and MemoryRemoved tell the backends of memory that the client mapped, and of memory that it
// took back and that nothing uses any more.
func (c *Controller) MemoryAdded(b []byte)   { c.eachMedia(func(m *media) { m.q.AddMemory(b) }) }
func (c *Controller) MemoryRemoved(b []byte) { c.eachMedia(func(m *media) { m.q.RemoveMemory(b) }) }

func (c *Controller) eachMedia(f func(*media)) {
	for _, w := range c.cfg.Workers {
		w.Call(func() {
			for _, n := range c.ns {
				if n != nil && n.media[w.id] != nil {
					f(n.media[w.id])
				}
			}
		})
	}
}

// flushTimeout bounds how long a shutdown waits for the medium.
const flushTimeout = 30 * time.Second

// Flush makes all completed writes of all namespaces durable, past the workers.
func (c *Controller) Flush() error {
	var errs []error
	for _, n := range c.ns {
		if n != nil && n.info.VolatileCache && !n.info.ReadOnly {
			if err := Flush(n.backend); err != nil {
				errs = append(errs, fmt.Errorf("flush of %s: %w", n.info.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// Flush makes what was written to b durable and returns when it is.
func Flush(b backend.Backend) error {
	q, err := b.NewQueue()
	if err != nil {
		return err
	}
	r := &backend.Request{Op: backend.OpFlush}
	var done [1]*backend.Request
	n := q.Submit([]*backend.Request{r}, done[:])
	for end := time.Now().Add(flushTimeout); n == 0; {
		if n = q.Reap(done[:]); n > 0 {
			break
		}
		left := time.Until(end)
		if left <= 0 {
			return errors.Join(errors.New("timed out"), q.Close())
		}
		fds := []unix.PollFd{{Fd: int32(q.EventFD()), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
			return errors.Join(err, q.Close())
		}
	}
	return errors.Join(r.Status.Err(), q.Close())
}
