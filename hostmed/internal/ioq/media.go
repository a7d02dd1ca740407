package ioq

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/gmem"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// media is a worker's way into a backend.
type media struct {
	backend backend.Backend
	q       backend.Queue // closedQueue while it is suspended
	polled  bool          // backend.Poller
	w       *Worker
	memory  [][]byte // that q was told of

	// Of polled ones, see countVain:
	vain int64 // since when it has had nothing; 0: it had, or nobody has looked
	nap  int64 // ns from one look to the next
	next int64 // when that is; 0: now

	traced traced
}

// Ready is called when the backend's eventfd is readable: the loop reaps anyway, what is in flight here. Where there is nothing it may be about other
// queues of the same medium.
func (m *media) Ready(uint32) {
	var buf [8]byte
	_, _ = unix.Read(m.q.EventFD(), buf[:])
	m.next = 0
	if m.q.Inflight() == 0 {
		m.q.Reap(nil)
	}
}

// addMemory and removeMemory tell the backend of guest memory. What it was told of is kept: a queue that is opened again knows nothing.
func (m *media) addMemory(b []byte) {
	if m.knows(b) < 0 {
		m.memory = append(m.memory, b)
		m.q.AddMemory(b)
	}
}

func (m *media) removeMemory(b []byte) {
	if i := m.knows(b); i >= 0 {
		m.memory = slices.Delete(m.memory, i, i+1)
		m.q.RemoveMemory(b)
	}
}

func (m *media) knows(b []byte) int {
	return slices.IndexFunc(m.memory, func(x []byte) bool { return &x[0] == &b[0] && len(x) == len(b) })
}

// media returns the worker's way into n, opened at the first CreateCQ on the worker.
func (w *Worker) media(n *namespace) *media { return n.media[w.id] }

// openMedia opens what is not open yet. It runs on the worker's thread.
func (w *Worker) openMedia(table []*namespace, mem *gmem.Memory) error {
	for _, n := range table {
		if n == nil || n.media[w.id] != nil {
			continue
		}
		m := w.find(n.backend)
		if m == nil {
			m = &media{backend: n.backend, w: w}
			if err := m.open(); err != nil {
				return fmt.Errorf("namespace %s: %w", n.info.Name, err)
			}
			w.queues = append(w.queues, m)
		}
		n.media[w.id] = m
		mem.Files(m.addMemory)
	}
	return nil
}

func (m *media) open() error {
	q, err := backend.NewQueue(m.backend, m.w)
	if err != nil {
		return err
	}
	if fd := q.EventFD(); fd >= 0 {
		if err := m.w.Add(fd, m); err != nil {
			return errors.Join(err, q.Close())
		}
	}
	m.q, m.polled = q, polled(q)
	for _, b := range m.memory {
		q.AddMemory(b)
	}
	return nil
}

func polled(q backend.Queue) bool {
	p, ok := q.(backend.Poller)
	return ok && p.Polled()
}

// Polled media that have had nothing for vainFor are no longer looked at all the time: a device that hangs would have the core for itself until the
// deadline, and what takes so long is not noticeably later for it. The looks become rarer, from firstLook to lastLook. With something new to do, or
// something done, they begin anew.
const (
	vainFor   = int64(5 * time.Millisecond)
	firstLook = int64(20 * time.Microsecond)
	lastLook  = int64(time.Millisecond)
)

// countVain is called each tick while something is in flight.
func (w *Worker) countVain() {
	for _, m := range w.queues {
		switch {
		case !m.polled || m.q.Inflight() == 0 || w.now < m.next:
		case m.vain == 0:
			m.vain, m.nap = w.now, firstLook
		case w.now-m.vain >= vainFor:
			m.next = w.now + m.nap
			m.nap = min(m.nap+m.nap/4, lastLook)
		}
	}
}

// nextLook is how long it is until something is to be polled, in ns; -1: everything that is in flight tells of its end.
func (w *Worker) nextLook() int64 {
	first := int64(-1)
	for _, m := range w.queues {
		if m.polled && m.q.Inflight() > 0 {
			if left := max(m.next-w.now, 0); first < 0 || left < first {
				first = left
			}
		}
	}
	return first
}

// close leaves the media with a queue that does nothing.
func (m *media) close() {
	if fd := m.q.EventFD(); fd >= 0 {
		m.w.Remove(fd)
	}
	if err := m.q.Close(); err != nil {
		m.w.log.Error("closing a backend queue", "error", err)
	}
	m.q = closedQueue{}
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
		m.close()
	}
	w.queues = nil
}

// closedQueue is in place of a queue that is suspended, or that could not be opened again.
type closedQueue struct{}

func (closedQueue) Submit(reqs, done []*backend.Request) int {
	for _, r := range reqs {
		r.Status = nvme.StatusInternalError
	}
	return copy(done, reqs)
}

func (closedQueue) Reap([]*backend.Request) int { return 0 }
func (closedQueue) Inflight() int               { return 0 }
func (closedQueue) EventFD() int                { return -1 }
func (closedQueue) AddMemory([]byte)            {}
func (closedQueue) RemoveMemory([]byte)         {}
func (closedQueue) Close() error                { return nil }

// MemoryAdded and MemoryRemoved tell the backends of memory that the client mapped, and of memory that it
// took back and that nothing uses any more.
func (c *Controller) MemoryAdded(b []byte) {
	c.eachMedia(func(m *media) { m.addMemory(b) })
	c.awaitMemory()
}

// awaitMemory gives media the time that they need to get at memory that they were told of, all at once: only this client waits, and that not for long.
func (c *Controller) awaitMemory() {
	var all sync.WaitGroup
	for _, n := range *c.ns.Load() {
		if n == nil {
			continue
		}
		if p, ok := n.backend.(backend.Pinner); ok {
			all.Go(p.AwaitMemory)
		}
	}
	all.Wait()
}

// MemoryRemoved goes to all that know of b: a namespace may have been detached since.
func (c *Controller) MemoryRemoved(b []byte) {
	for _, w := range c.cfg.Workers {
		w.Call(func() {
			for _, m := range w.queues {
				m.removeMemory(b)
			}
		})
	}
}

func (c *Controller) eachMedia(f func(*media)) {
	for _, w := range c.cfg.Workers {
		w.Call(func() {
			for _, n := range *c.ns.Load() {
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
	for _, n := range *c.ns.Load() {
		if n == nil {
			continue
		}
		errs = append(errs, n.of.Use(func(m *subsys.Medium) error {
			if !m.Info.VolatileCache || m.Info.ReadOnly {
				return nil
			}
			if err := Flush(m.Backend); err != nil {
				return fmt.Errorf("flush of %s: %w", m.Info.Name, err)
			}
			return nil
		}))
	}
	return errors.Join(errs...)
}

// Flush makes what was written to b durable and returns when it is. Faults of b are for its guests and not for this.
func Flush(b backend.Backend) error {
	q, err := backend.Plain(b).NewQueue()
	if err != nil {
		return err
	}
	r := &backend.Request{Op: backend.OpFlush}
	var done [1]*backend.Request
	n := q.Submit([]*backend.Request{r}, done[:])
	begin := time.Now()
	for end := begin.Add(flushTimeout); n == 0; {
		if n = q.Reap(done[:]); n > 0 {
			break
		}
		left := time.Until(end)
		if left <= 0 {
			return errors.Join(errors.New("timed out"), q.Close())
		}
		if polled(q) {
			if time.Since(begin) < time.Duration(vainFor) {
				schedYield()
			} else {
				time.Sleep(time.Duration(lastLook))
			}
			continue
		}
		fds := []unix.PollFd{{Fd: int32(q.EventFD()), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
			return errors.Join(err, q.Close())
		}
	}
	return errors.Join(r.Status.Err(), q.Close())
}
