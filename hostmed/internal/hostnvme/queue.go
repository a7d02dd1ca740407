package hostnvme

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Queue is one worker's way to a Slice. Its methods are called by one goroutine at a time.
//
// A batch is Begin, for each request Take and Put, and Commit. What is done comes out of Reap, whoever took its completion from
// the pair.
type Queue struct {
	pointers // mu of the pair

	pair  *mux
	set   *Pairs
	slice Slice
	owner any // who runs it; nil: nobody in particular

	polled bool
	fd     int  // readable when Reap may have something; -1: it is polled
	home   bool // fd is signalled by the device, otherwise by who finds something for this queue

	inflight int      // put and not reaped
	free     requests // its own
	reaped   []*Request
	memory   []block // that Memory was told of

	// mu of the pair:
	line   requests // wait for room in the pair
	ready  requests // done
	wake   bool     // it is in woken
	counts Counts

	// some says, to who only looks, that something was left ready when mu was last let go of.
	some atomic.Bool
}

// requests is a list of them, oldest first.
type requests struct{ first, last *Request }

func (l *requests) push(r *Request) {
	r.next = nil
	if l.last == nil {
		l.first = r
	} else {
		l.last.next = r
	}
	l.last = r
}

// pop takes the oldest out; nil: there is none.
func (l *requests) pop() *Request {
	r := l.first
	if r == nil {
		return nil
	}
	if l.first = r.next; l.first == nil {
		l.last = nil
	}
	r.next = nil
	return r
}

// Take returns a request to be filled in and put.
func (q *Queue) Take() *Request {
	r := q.free.pop()
	if r == nil {
		r = &Request{q: q}
	}
	return r
}

// Free takes back a request that Reap gave.
func (q *Queue) Free(r *Request) {
	r.Vec, r.Cmd, r.Owner = nil, nil, nil
	q.free.push(r)
}

// Begin begins a batch, which Commit ends. Nothing in between waits.
func (q *Queue) Begin() {
	q.pair.mu.Lock()
	q.refresh()
}

// Put begins r.
func (q *Queue) Put(r *Request) {
	p := q.pair
	q.inflight++
	r.at, r.left, r.begun, r.out, r.waits = position{}, r.Len, false, 0, false
	r.DW0, r.RealQID, r.RealCID = 0, 0, 0
	if r.Status = q.slice.check(r); !r.Status.OK() {
		p.finish(r)
		return
	}
	switch {
	case p.failed != nvme.StatusSuccess:
		q.counts.Failed++
		r.Status = p.failed
		p.finish(r)
		return
	case r.Op == Flush, r.Op == Command && (r.Cmd.Opcode == nvme.IODSM || r.Cmd.Opcode == nvme.IOCopy):
		r.left = 0 // one command, whatever its range
	case r.Len == 0, r.Op == Discard && !q.slice.Discard: // which is only a hint
		p.finish(r)
		return
	}
	if !p.paused && len(p.waiting) == 0 && p.issue(r) {
		return
	}
	q.counts.Full++
	r.waits = true
	if q.line.push(r); q.line.first == r {
		p.waiting = append(p.waiting, q)
	}
}

// Commit shows the device the batch.
func (q *Queue) Commit() {
	p := q.pair
	if !p.paused {
		if len(p.waiting) > 0 {
			p.pump()
		}
		p.publish(&q.counts)
	}
	p.wakeOthers(q, true)
	p.mu.Unlock()
}

// Do does x and returns its status. Nothing else is in flight. It is for what is rarely done.
func (q *Queue) Do(x Request) nvme.Status {
	r := q.Take()
	x.q = q
	*r = x
	q.Begin()
	q.Put(r)
	q.Commit()
	for len(q.Reap(1)) == 0 {
		q.nap()
	}
	st := r.Status
	q.Free(r)
	return st
}

// Counts is what was done for q so far. Any goroutine may ask.
func (q *Queue) Counts() Counts {
	q.pair.mu.Lock()
	defer q.pair.mu.Unlock()
	return q.counts
}

// Inflight is how many requests were put and not reaped.
func (q *Queue) Inflight() int { return q.inflight }

// EventFD is a non-blocking eventfd that becomes readable when Reap may have something, or -1. Who has read it calls Reap, also with
// nothing in flight: what it was signalled for may be others' on the same pair.
func (q *Queue) EventFD() int { return q.fd }

// Polled says that Reap has to be called as long as something is in flight.
func (q *Queue) Polled() bool { return q.polled }

// Collect returns up to most requests of a batch that ended within Put, and others that are done already. It does not look at the device.
func (q *Queue) Collect(most int) []*Request {
	if !q.some.Load() {
		return nil
	}
	q.pair.mu.Lock()
	q.take(most)
	if q.ready.first != nil && q.fd >= 0 {
		signal(q.fd)
	}
	q.pair.mu.Unlock()
	return q.reaped
}

// take moves up to most requests that are done to reaped. mu of the pair is held.
func (q *Queue) take(most int) {
	q.reaped = q.reaped[:0]
	for len(q.reaped) < most && q.ready.first != nil {
		q.reaped = append(q.reaped, q.ready.pop())
	}
	q.inflight -= len(q.reaped)
	if q.ready.first == nil && q.some.Load() {
		q.some.Store(false)
	}
}

// Reap returns up to most requests that are done; they go back by Free. The slice is valid until the next call. With nothing done it
// costs some loads.
func (q *Queue) Reap(most int) []*Request {
	p := q.pair
	if !q.some.Load() && !p.ready() {
		return nil
	}
	p.mu.Lock()
	if p.ready() {
		p.reap()
	}
	q.take(most)
	p.wakeOthers(q, len(q.reaped) > 0)
	p.mu.Unlock()
	return q.reaped
}

// wakeOthers tells the queues that have something ready, and is called before mu is let go of. by is whose worker is here, and comes back to reap its queues; nil: nobody is.
// mu is held.
func (p *mux) wakeOthers(by *Queue, back bool) {
	for i, q := range p.woken {
		q.wake, p.woken[i] = false, nil
		if q.ready.first == nil {
			continue
		}
		q.some.Store(true)
		if by != nil && back && (q == by || q.owner != nil && q.owner == by.owner) {
			continue
		}
		if q.fd >= 0 {
			q.counts.Kicks++
			signal(q.fd)
		}
	}
	p.woken = p.woken[:0]
}

var one = [8]byte{1}

// signal makes an eventfd readable. It is non-blocking; a full one is readable already.
func signal(fd int) {
	for {
		if _, err := unix.Write(fd, one[:]); err != unix.EINTR {
			return
		}
	}
}

// AddMemory says that b, a whole mapping, is about to be used in requests; RemoveMemory that it is not any more.
func (q *Queue) AddMemory(b []byte) {
	k := blockOf(b)
	for _, x := range q.memory {
		if x == k {
			return
		}
	}
	q.memory = append(q.memory, k)
	q.m.add(b)
}

// RemoveMemory takes back AddMemory.
func (q *Queue) RemoveMemory(b []byte) {
	k := blockOf(b)
	for i, x := range q.memory {
		if x == k {
			q.memory = append(q.memory[:i], q.memory[i+1:]...)
			q.m.removeBlock(k)
			return
		}
	}
}
