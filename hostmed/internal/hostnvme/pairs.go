package hostnvme

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Pairs are the I/O queue pairs of a device, as many guests share them. A pair is opened when it is needed.
type Pairs struct {
	dev *Device
	mem *Memory
	log hclog.Logger
	sgl uint64 // alignment that SGLs must have, in bytes; 0: the controller has none

	mu     sync.Mutex // taken before that of a mux
	all    []*mux
	shared *Pool
}

// Pool is the pairs that some queues are spread over.
type Pool struct{ pairs []*mux }

// Pairs returns the device's queue pairs.
func (d *Device) Pairs() *Pairs {
	d.sharing.Do(func() { d.muxes = newPairs(d) })
	return d.muxes
}

func newPairs(d *Device) *Pairs {
	s := &Pairs{dev: d, log: d.log, shared: &Pool{}, mem: NewMemory(d, d.log)}
	switch sgls := d.Controller().SGLS; {
	case sgls&nvme.SGLSByteAligned != 0:
		s.sgl = 1
	case sgls&nvme.SGLSDwordAligned != 0:
		s.sgl = 4
	}
	for range d.granted {
		p := &mux{log: d.log}
		s.all = append(s.all, p)
		s.shared.pairs = append(s.shared.pairs, p)
	}
	return s
}

// Memory returns the guest memory that the device reaches.
func (s *Pairs) Memory() *Memory { return s.mem }

// Reserve takes n pairs that nobody uses out of those that are for all.
func (s *Pairs) Reserve(n int) (*Pool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var idle []*mux
	for _, p := range slices.Backward(s.shared.pairs) {
		if len(idle) < n && len(p.users) == 0 {
			idle = append(idle, p)
		}
	}
	if len(idle) < n || len(s.shared.pairs)-n < 1 {
		return nil, fmt.Errorf("queues=%d: the device has %d queue pairs, of which %d are reserved and %d in use, and one has to be left for all others: reserve fewer",
			n, len(s.all), len(s.all)-len(s.shared.pairs), s.used())
	}
	s.shared.pairs = slices.DeleteFunc(s.shared.pairs, func(p *mux) bool { return slices.Contains(idle, p) })
	return &Pool{idle}, nil
}

// Return puts the pairs of a pool that no queue uses any more back.
func (s *Pairs) Return(p *Pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shared.pairs = append(s.shared.pairs, p.pairs...)
	p.pairs = nil
}

// used is how many of the pairs for all are in use. mu is held.
func (s *Pairs) used() (n int) {
	for _, p := range s.shared.pairs {
		if len(p.users) > 0 {
			n++
		}
	}
	return n
}

// Attach says what a queue is to be like.
type Attach struct {
	Slice  Slice
	Pool   *Pool // nil: the pairs that are for all
	Polled bool
	Owner  any // whose goroutine it is; nil: anybody's
}

// NewQueue opens a queue over the pair that its owner has, or one that nobody has, or the one with the fewest users.
func (s *Pairs) NewQueue(a Attach) (*Queue, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	pool := a.Pool
	if pool == nil {
		pool = s.shared
	}
	p, err := s.pick(pool, a)
	if err != nil {
		return nil, err
	}
	if len(p.users) == 0 {
		if err := s.open(p, a.Polled); err != nil {
			return nil, err
		}
	}
	q := &Queue{
		pair: p, set: s, slice: a.Slice, owner: a.Owner, polled: a.Polled, fd: -1,
		pointers: pointers{finder: finder{m: s.mem}, page: devicePage, block: 1 << a.Slice.Shift, sgl: s.sgl},
	}
	if !a.Polled {
		if err := q.listen(); err != nil {
			return nil, err
		}
	}
	p.users = append(p.users, q)
	return q, nil
}

// pick chooses a pair. mu is held.
func (s *Pairs) pick(pool *Pool, a Attach) (*mux, error) {
	var best *mux
	rank := 0
	for _, p := range pool.pairs {
		r := 1000000 - len(p.users)
		same := p.polled == a.Polled
		switch {
		case len(p.users) == 0 && p.hw != nil && same:
			r += 3000000
		case len(p.users) == 0:
			r += 2000000
		case a.Owner != nil && same && slices.ContainsFunc(p.users, func(q *Queue) bool { return q.owner == a.Owner }):
			r += 4000000
		case same:
			r += 1000000
		case !a.Polled:
			continue // it has no interrupts
		}
		if r > rank {
			best, rank = p, r
		}
	}
	if best == nil {
		return nil, fmt.Errorf("all of %d queue pairs are polled: use the option poll here too, or queues= there", len(pool.pairs))
	}
	return best, nil
}

// openTimeout bounds how long a queue waits for its pair, and with it a reset that is under way.
const openTimeout = time.Minute

// open makes p a pair that the controller has. mu is held, and nobody is on p.
func (s *Pairs) open(p *mux, polled bool) error {
	if p.hw != nil && p.polled == polled {
		return nil
	}
	if err := p.shut(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
	defer cancel()
	hw, err := s.dev.NewPair(ctx, PairConfig{Depth: depth, Extra: extra, Poll: polled}, p)
	if err != nil {
		return err
	}
	if err = p.open(hw); err == nil && !polled && hw.EventFD < 0 {
		err = errors.New("the device has no interrupt for another queue pair: use the option poll")
	}
	p.polled = polled
	if err != nil {
		return errors.Join(err, p.shut())
	}
	return nil
}

// shut gives the pair back, if there is one. The Pairs' mu is held, and nobody is on p.
func (p *mux) shut() error {
	p.mu.Lock()
	hw := p.hw
	p.rang(&p.counts)
	p.hw, p.q = nil, nil
	p.mu.Unlock()
	if hw == nil {
		return nil
	}
	return hw.Close()
}

// listen gives q an eventfd: the one that the device signals if q's owner alone reads it, otherwise one of its own. The Pairs' mu is held.
func (q *Queue) listen() (err error) {
	p := q.pair
	sleepers := slices.ContainsFunc(p.users, func(x *Queue) bool { return !x.polled })
	q.home = !sleepers || slices.ContainsFunc(p.users, func(x *Queue) bool { return x.home && x.owner != nil && x.owner == q.owner })
	if q.home {
		q.fd, err = duplicate(p.hw.EventFD)
	} else {
		q.fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	return nil
}

func duplicate(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0) }

// closeNap bounds one sleep of a Close.
const closeNap = 10 * time.Millisecond

// Close waits for what is in flight, drops the results, and leaves the pair to others.
func (q *Queue) Close() error {
	for q.inflight > 0 {
		for _, r := range q.Reap(64) {
			q.Free(r)
		}
		if q.inflight > 0 {
			q.nap()
		}
	}
	for _, k := range q.memory {
		q.m.removeBlock(k)
	}
	q.memory = nil
	q.set.leave(q)
	if q.fd >= 0 {
		return unix.Close(q.fd)
	}
	return nil
}

// nap waits a while for something to reap.
func (q *Queue) nap() {
	if q.fd < 0 {
		time.Sleep(closeNap / 100)
		return
	}
	fds := []unix.PollFd{{Fd: int32(q.fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, int(closeNap.Milliseconds())); err == unix.EINTR || n <= 0 {
		return
	}
	var buf [8]byte
	_, _ = unix.Read(q.fd, buf[:])
}

// leave takes q off its pair.
func (s *Pairs) leave(q *Queue) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := q.pair
	p.users = slices.DeleteFunc(p.users, func(x *Queue) bool { return x == q })
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts.add(&q.counts)
	p.woken = slices.DeleteFunc(p.woken, func(x *Queue) bool { return x == q })
	listened := slices.ContainsFunc(p.users, func(x *Queue) bool { return x.home })
	sleepers := slices.ContainsFunc(p.users, func(x *Queue) bool { return !x.polled })
	switch {
	case !sleepers && p.usher != nil:
		_ = p.usher.Close()
		p.usher = nil
	case sleepers && !listened && p.usher == nil:
		s.usher(p)
	}
}

// usher starts a goroutine that listens to the device in place of the worker that did, for those that are left.
func (s *Pairs) usher(p *mux) {
	fd, err := duplicate(p.hw.EventFD)
	if err != nil {
		s.log.Error("a queue pair's interrupts are not listened to any more", "queue", p.hw.QID, "error", err)
		return
	}
	f := os.NewFile(uintptr(fd), "interrupt")
	p.usher = f
	go func() {
		var buf [8]byte
		for {
			p.look()
			if _, err := f.Read(buf[:]); err != nil {
				return
			}
		}
	}()
}

// look reaps for everybody.
func (p *mux) look() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reap()
	p.wakeOthers(nil, false)
}

// Counts returns what all pairs have done, and how many are in use.
func (s *Pairs) Counts() (c Counts, used int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.all {
		p.mu.Lock()
		p.rang(&p.counts)
		c.add(&p.counts)
		for _, q := range p.users {
			c.add(&q.counts)
		}
		p.mu.Unlock()
		if len(p.users) > 0 {
			used++
		}
	}
	return c, used
}

// Trim gives pairs back that nobody uses.
func (s *Pairs) Trim() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, p := range s.all {
		if len(p.users) == 0 {
			errs = append(errs, p.shut())
		}
	}
	return errors.Join(errs...)
}
