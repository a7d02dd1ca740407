package backend

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// faulty is a medium with faults over another, whose Info it has but for the name. hostmed's own flushes go past it, see Plain.
type faulty struct {
	Alterable
	spec  Spec
	rules *faultRules
}

// mappedFaulty is one over a Mapper.
type mappedFaulty struct {
	*faulty
	Mapper
}

func (b mappedFaulty) Info() Info               { return b.faulty.Info() }
func (b mappedFaulty) NewQueue() (Queue, error) { return b.faulty.NewQueue() }
func (b mappedFaulty) Close() error             { return b.faulty.Close() }

func (b mappedFaulty) NewQueueFor(owner any) (Queue, error) { return b.faulty.NewQueueFor(owner) }

func openFaulty(s Spec, log hclog.Logger) (Backend, error) {
	rules, err := parseFaults(s.Faults)
	if err != nil {
		return nil, fmt.Errorf("namespace %s: %w", s, err)
	}
	plain := s
	plain.Faults = ""
	b, err := OpenSpec(plain, log)
	if err != nil {
		return nil, err
	}
	return withFaults(b.(Alterable), s, rules), nil
}

// withFaults lays faults over b.
func withFaults(b Alterable, s Spec, rules *faultRules) Backend {
	f := &faulty{Alterable: b, spec: s, rules: rules}
	if m, ok := b.(Mapper); ok {
		return mappedFaulty{f, m}
	}
	return f
}

// Plain is b without its faults: what is asked of it never fails or hangs on purpose.
func Plain(b Backend) Backend {
	switch f := b.(type) {
	case *faulty:
		return f.Alterable
	case mappedFaulty:
		return f.Alterable
	}
	return b
}

func (b *faulty) Info() Info {
	i := b.Alterable.Info()
	i.Name = b.spec.String()
	if b.rules.tear() {
		i.AtomicWrite, i.AtomicPowerFail = 0, 0
	}
	return i
}

func (b *faulty) NewQueue() (Queue, error) { return b.NewQueueFor(nil) }

// AwaitMemory is Pinner's.
func (b *faulty) AwaitMemory() {
	if p, ok := b.Alterable.(Pinner); ok {
		p.AwaitMemory()
	}
}

// NewQueueFor is Sharer's.
func (b *faulty) NewQueueFor(owner any) (Queue, error) {
	inner, err := NewQueue(b.Alterable, owner)
	if err != nil {
		return nil, err
	}
	q := &faultQueue{Queue: inner, b: b, shift: b.Alterable.Info().LBAShift, wait: turnWait, fd: inner.EventFD(), late: map[*Request]time.Duration{}, torn: map[*Request]whole{}}
	if q.fd < 0 {
		if q.fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
			return nil, errors.Join(fmt.Errorf("eventfd: %w", err), inner.Close())
		}
		q.ownFD = true
	}
	q.timer = time.AfterFunc(time.Hour, q.ring)
	q.timer.Stop()
	return q, nil
}

// faultQueue holds back what its rules say.
type faultQueue struct {
	Queue // of the medium
	b     *faulty
	shift uint8
	fd    int // the medium's, or a queue's own
	ownFD bool

	pass    []*Request
	late    map[*Request]time.Duration // with the medium, to be held back for that long; givenUp: not any more; below: reorder's number, negative
	torn    map[*Request]whole         // with the medium, shortened
	waiting []delayed                  // done, and held back
	turned  []*Request                 // done, and held back until there are as many as reorder turns round, or turnDue
	turnDue time.Time
	wait    time.Duration // turnWait, but for tests
	kept    []kept        // never done
	stuck   []delayed     // not handed on yet, nor given up
	ready   []*Request    // for Reap

	timer *time.Timer
	mu    sync.Mutex // guards closed, for the timer's goroutine
	gone  bool       // fd may not be written any more
}

type whole struct {
	len uint64
	vec []Seg
}

type delayed struct {
	r   *Request
	due time.Time
}

type kept struct {
	r     *Request
	abort bool // Abort ends it
}

// Submit hands on what meets no fault, and what meets one that comes later.
func (q *faultQueue) Submit(reqs, done []*Request) int {
	q.pass = q.pass[:0]
	n := 0
	for _, r := range reqs {
		rule := q.b.rules.find(r, q.shift)
		if rule == nil {
			q.pass = append(q.pass, r)
			continue
		}
		switch rule.action {
		case faultStatus:
			r.Status = rule.status
			done[n] = r
			n++
		case faultDrop, faultHold:
			q.kept = append(q.kept, kept{r, rule.action == faultHold})
		case faultDelay:
			q.late[r] = rule.delay
			q.pass = append(q.pass, r)
		case faultStuck:
			q.stuck = append(q.stuck, delayed{r, time.Now().Add(rule.delay)})
			q.setTimer()
		case faultReorder:
			q.late[r] = time.Duration(-rule.turn)
			q.pass = append(q.pass, r)
		case faultTorn:
			if r.Len>>q.shift < 2 { // half of it is nothing
				r.Status = nvme.StatusWriteFault
				done[n] = r
				n++
				continue
			}
			q.tear(r)
			q.pass = append(q.pass, r)
		}
	}
	if len(q.pass) == 0 {
		return n
	}
	k := q.Queue.Submit(q.pass, done[n:])
	return n + q.keepLate(done[n:n+k])
}

// tear leaves the first half of r's blocks in it.
func (q *faultQueue) tear(r *Request) {
	q.torn[r] = whole{r.Len, r.Vec}
	r.Len = r.Len >> q.shift / 2 << q.shift
	r.Vec = nil
	for left, vec := r.Len, q.torn[r].vec; left > 0; vec = vec[1:] {
		s := vec[0]
		s.Len = min(s.Len, left)
		left -= s.Len
		r.Vec = append(r.Vec, s)
	}
}

// keepLate takes those out of done that are to be late, and returns how many are left.
func (q *faultQueue) keepLate(done []*Request) int {
	n := 0
	for _, r := range done {
		if w, ok := q.torn[r]; ok {
			delete(q.torn, r)
			r.Len, r.Vec = w.len, w.vec
			if r.Status.OK() {
				r.Status = nvme.StatusWriteFault
			}
		}
		if by, ok := q.late[r]; ok && by == givenUp {
			delete(q.late, r)
			r.Status = nvme.StatusAbortSQDeleted
		} else if ok && by < givenUp {
			delete(q.late, r)
			q.turn(r, int(-by))
			continue
		} else if ok {
			delete(q.late, r)
			q.waiting = append(q.waiting, delayed{r, time.Now().Add(by)})
			continue
		}
		done[n] = r
		n++
	}
	q.setTimer()
	return n
}

// turn keeps r until there are n of its kind, which then end the last one first.
func (q *faultQueue) turn(r *Request, n int) {
	if len(q.turned) == 0 {
		q.turnDue = time.Now().Add(q.wait)
	}
	if q.turned = append(q.turned, r); len(q.turned) >= n {
		q.endTurn()
		q.ring()
	}
}

// endTurn makes those that are turned round ready.
func (q *faultQueue) endTurn() {
	slices.Reverse(q.turned)
	q.ready = append(q.ready, q.turned...)
	clear(q.turned)
	q.turned = q.turned[:0]
}

// setTimer rings for the first of those that wait.
func (q *faultQueue) setTimer() {
	first := time.Time{}
	if len(q.turned) > 0 {
		first = q.turnDue
	}
	for _, list := range [...][]delayed{q.waiting, q.stuck} {
		for _, d := range list {
			if first.IsZero() || d.due.Before(first) {
				first = d.due
			}
		}
	}
	if !first.IsZero() {
		q.timer.Reset(max(time.Until(first), 0))
	}
}

// ring makes the worker call Reap. It runs on the timer's goroutine.
func (q *faultQueue) ring() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.gone {
		one := [8]byte{1}
		_, _ = unix.Write(q.fd, one[:]) // full: it is readable already
	}
}

func (q *faultQueue) Reap(done []*Request) int {
	n := 0
	if q.Queue.Inflight() > 0 {
		n = q.keepLate(done[:q.Queue.Reap(done)])
	}
	if len(q.waiting)+len(q.turned)+len(q.stuck) > 0 {
		q.endWaiting(time.Now())
	}
	k := copy(done[n:], q.ready)
	q.ready = append(q.ready[:0], q.ready[k:]...)
	return n + k
}

// endWaiting makes those ready that are due at now, and hands those on that are not stuck any more.
func (q *faultQueue) endWaiting(now time.Time) {
	q.pass = q.pass[:0]
	q.stuck = slices.DeleteFunc(q.stuck, func(d delayed) bool {
		if d.due.After(now) {
			return false
		}
		q.pass = append(q.pass, d.r)
		return true
	})
	if len(q.pass) > 0 {
		at := len(q.ready)
		q.ready = append(q.ready, make([]*Request, len(q.pass))...)
		q.ready = q.ready[:at+q.Queue.Submit(q.pass, q.ready[at:])]
	}
	still := q.waiting[:0]
	for _, d := range q.waiting {
		if d.due.After(now) {
			still = append(still, d)
		} else {
			q.ready = append(q.ready, d.r)
		}
	}
	clear(q.waiting[len(still):])
	q.waiting = still
	if len(q.turned) > 0 && !q.turnDue.After(now) {
		q.endTurn()
	}
	q.setTimer()
}

// givenUp is the delay of a request that GiveUp met while the medium had it.
const givenUp = -1

// GiveUp is Keeper's. What comes late or never ends with StatusAbortRequested or StatusAbortSQDeleted: a completion that comes after a reset does not
// come at all.
func (q *faultQueue) GiveUp(aborted bool, which func(*Request) bool) (n int) {
	inner := 0
	if k, ok := q.Queue.(Keeper); ok {
		inner = k.GiveUp(aborted, which)
	}
	keep := q.kept[:0]
	for _, k := range q.kept {
		switch {
		case !which(k.r) || aborted && !k.abort:
			keep = append(keep, k)
			continue
		case aborted:
			k.r.Status = nvme.StatusAbortRequested
		default:
			k.r.Status = nvme.StatusAbortSQDeleted
		}
		q.ready = append(q.ready, k.r)
		n++
	}
	clear(q.kept[len(keep):])
	q.kept = keep
	if aborted {
		if n > 0 {
			q.ring()
		}
		return n + inner
	}
	for r := range q.late { // with the medium still
		if which(r) {
			q.late[r] = givenUp
			n++
		}
	}
	still := q.waiting[:0]
	for _, d := range q.waiting {
		if which(d.r) {
			d.r.Status = nvme.StatusAbortSQDeleted
			q.ready = append(q.ready, d.r)
			n++
		} else {
			still = append(still, d)
		}
	}
	clear(q.waiting[len(still):])
	q.waiting = still
	q.turned = slices.DeleteFunc(q.turned, func(r *Request) bool {
		if !which(r) {
			return false
		}
		r.Status = nvme.StatusAbortSQDeleted
		q.ready = append(q.ready, r)
		n++
		return true
	})
	if n > 0 {
		q.ring()
	}
	return n + inner
}

// Polled is Poller's: what the medium does is to be polled for as it wants it.
func (q *faultQueue) Polled() bool {
	p, ok := q.Queue.(Poller)
	return ok && p.Polled()
}

func (q *faultQueue) Inflight() int {
	return q.Queue.Inflight() + len(q.waiting) + len(q.turned) + len(q.kept) + len(q.stuck) + len(q.ready)
}

func (q *faultQueue) EventFD() int { return q.fd }

// Close drops what is held back.
func (q *faultQueue) Close() error {
	q.timer.Stop()
	q.mu.Lock()
	q.gone = true
	q.mu.Unlock()
	err := q.Queue.Close()
	if q.ownFD {
		err = errors.Join(err, unix.Close(q.fd))
	}
	return err
}
