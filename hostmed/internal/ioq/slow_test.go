package ioq

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// slow is a backend that finishes nothing before it is told to.
type slow struct {
	info   backend.Info
	status nvme.Status  // of what finishes
	polled bool         // its queues have no eventfd: see backend.Poller
	looks  atomic.Int64 // calls of Reap

	mu     sync.Mutex
	queues []*slowQueue
}

func (s *slow) Info() backend.Info { return s.info }
func (s *slow) Close() error       { return nil }

func (s *slow) NewQueue() (backend.Queue, error) {
	q := &slowQueue{fd: -1, looks: &s.looks}
	if !s.polled {
		var err error
		if q.fd, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	s.queues = append(s.queues, q)
	s.mu.Unlock()
	return q, nil
}

// finish finishes up to n requests and returns how many.
func (s *slow) finish(n int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	done := 0
	for _, q := range s.queues {
		q.mu.Lock()
		for len(q.held) > 0 && done < n {
			q.held[0].Status = s.status
			q.done = append(q.done, q.held[0])
			q.held = q.held[1:]
			done++
		}
		q.mu.Unlock()
		if done > 0 && q.fd >= 0 {
			writeEventFD(q.fd)
		}
	}
	return done
}

// ops returns what is held.
func (s *slow) ops() (ops []backend.Op) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, q := range s.queues {
		q.mu.Lock()
		for _, r := range q.held {
			ops = append(ops, r.Op)
		}
		q.mu.Unlock()
	}
	return ops
}

func (s *slow) held() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, q := range s.queues {
		q.mu.Lock()
		n += len(q.held)
		q.mu.Unlock()
	}
	return n
}

type slowQueue struct {
	looks      *atomic.Int64
	fd         int
	mu         sync.Mutex
	held, done []*backend.Request
	inflight   int // the worker's
}

func (q *slowQueue) Submit(reqs, done []*backend.Request) int {
	q.mu.Lock()
	q.held = append(q.held, reqs...)
	q.mu.Unlock()
	q.inflight += len(reqs)
	return 0
}

func (q *slowQueue) Reap(done []*backend.Request) int {
	q.looks.Add(1)
	q.mu.Lock()
	defer q.mu.Unlock()
	n := copy(done, q.done)
	q.done = q.done[n:]
	q.inflight -= n
	return n
}

func (q *slowQueue) Inflight() int       { return q.inflight }
func (q *slowQueue) EventFD() int        { return q.fd }
func (q *slowQueue) AddMemory([]byte)    {}
func (q *slowQueue) RemoveMemory([]byte) {}
func (q *slowQueue) Polled() bool        { return q.fd < 0 }

func (q *slowQueue) Close() error {
	if q.fd < 0 {
		return nil
	}
	return unix.Close(q.fd)
}
