package main

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

const (
	maxRing = 4096
	qid     = 1
)

// Where things lie in the memfd, in bytes.
const (
	controlAt = 0
	shadowAt  = 1 * shm.PageSize
	eventsAt  = 2 * shm.PageSize
	sqAt      = 3 * shm.PageSize
	cqAt      = sqAt + maxRing*ring.SQESize
	memSize   = cqAt + maxRing*ring.CQESize
)

// What a side tells of itself, one 64-bit word each. It writes them when it goes to sleep, so that it is
// not slowed down otherwise; while it sleeps they are exact.
const (
	sideState    = iota // a state
	sideEpoch           // how often the state has changed
	sideCommands        // completed (driver), fetched (device)
	sideBatches         // Publish calls (driver), Post calls (device)
	sideSleeps
	sideSpurious // wake-ups that found nothing
	sideRings    // doorbell writes (driver), interrupts (device)
	sideArmed
	sideArmLost
	sideFull // sleeps for lack of CQ room
	sideSQ   // tail (driver), head (device)
	sideCQ   // head (driver), tail (device)
	sideLeft // outstanding (driver), 1 if asleep for lack of CQ room (device)
	sideWords
)

// States of a side.
const (
	running = iota
	asleep
	ended
)

// shared is the memory and the descriptors of one case, as one side sees them.
type shared struct {
	mem       *shm.Region
	sq, cq    uint32 // entries
	kick, irq int    // eventfds: doorbell and interrupt
	stop      *atomic.Uint32
	driver    side
	device    side
}

// side is one side's words in the control page.
type side [sideWords]*atomic.Uint64

func newShared(mem *shm.Region, sq, cq uint32, kick, irq int) (*shared, error) {
	s := &shared{mem: mem, sq: sq, cq: cq, kick: kick, irq: irq}
	var err error
	if s.stop, err = mem.Word32(controlAt); err != nil {
		return nil, err
	}
	for i := range uint64(sideWords) {
		var err1, err2 error
		s.driver[i], err1 = mem.Word64(controlAt + 1024 + 8*i)
		s.device[i], err2 = mem.Word64(controlAt + 2048 + 8*i)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (s *shared) stopped() bool { return s.stop.Load() != 0 }

// rings returns views of the SQ and the CQ, and slots the four doorbell words.
func (s *shared) rings() (sq, cq *shm.Region, err error) {
	if sq, err = s.mem.View(sqAt, uint64(s.sq)*ring.SQESize); err == nil {
		cq, err = s.mem.View(cqAt, uint64(s.cq)*ring.CQESize)
	}
	return sq, cq, err
}

func (s *shared) slots() (tail, head, tailEI, headEI *atomic.Uint32, err error) {
	shadow, err1 := s.mem.View(shadowAt, shm.PageSize)
	events, err2 := s.mem.View(eventsAt, shm.PageSize)
	if err := errors.Join(err1, err2); err != nil {
		return nil, nil, nil, nil, err
	}
	tail, head, err1 = dbbuf.Slots(shadow, qid, 0)
	tailEI, headEI, err2 = dbbuf.Slots(events, qid, 0)
	return tail, head, tailEI, headEI, errors.Join(err1, err2)
}

// sleeper is a side that can go to sleep on its eventfd.
type sleeper struct {
	side *side
	fd   int
	stop func() bool
	fds  [1]unix.PollFd
	buf  [8]byte
}

// sleep returns when the eventfd was written, or the run is over. A timeout of poll is for
// the latter only: nothing is looked at, so that a lost wake-up stays lost. The event is taken here, which is
// before the caller looks at its queue again (R10), and only once poll has said that it is there (R34).
func (s *sleeper) sleep() error {
	s.side[sideState].Store(asleep)
	s.side[sideEpoch].Add(1)
	defer func() {
		s.side[sideState].Store(running)
		s.side[sideEpoch].Add(1)
	}()
	for {
		s.fds[0] = unix.PollFd{Fd: int32(s.fd), Events: unix.POLLIN}
		n, err := unix.Poll(s.fds[:], 100)
		switch {
		case err != nil && err != unix.EINTR:
			return fmt.Errorf("poll of an eventfd: %w", err)
		case n > 0:
			_, err := unix.Read(s.fd, s.buf[:])
			return err
		case s.stop():
			return nil
		}
	}
}

var one = [8]byte{1}

func signal(fd int) error {
	_, err := unix.Write(fd, one[:])
	return err
}

// random is xorshift64*: quick, and good enough for delays.
type random uint64

func newRandom(seed, stream uint64) random {
	r := random((seed+stream)*0x9e3779b97f4a7c15 | 1)
	for range 8 {
		r.next()
	}
	return r
}

func (r *random) next() uint32 {
	x := *r
	x ^= x >> 12
	x ^= x << 25
	x ^= x >> 27
	*r = x
	return uint32((uint64(x) * 0x2545f4914f6cdd1d) >> 32)
}

// below returns a number in [0, n).
func (r *random) below(n uint32) uint32 { return uint32(uint64(r.next()) * uint64(n) >> 32) }

// looks returns a number of polling rounds: often none, mostly about as long as the other side needs for its
// part. For some dozens of waits at a time a side is patient instead and polls on, because a race between one
// side that goes to sleep and one that acts at once needs the latter awake.
func (r *random) looks(patient *bool) uint32 {
	if r.below(64) == 0 {
		*patient = !*patient
	}
	if *patient {
		return 20_000 + r.below(20_000)
	}
	if r.below(4) == 0 {
		return 0
	}
	return r.below(1000)
}

// pause passes up to about a microsecond.
func (r *random) pause() {
	if r.below(2) == 0 {
		return
	}
	var here atomic.Uint32
	for range r.below(1000) {
		here.Load()
	}
}

// mix makes the words of a command out of its number, so that a torn one shows.
func mix(n uint64) uint64 { return n*0x9e3779b97f4a7c15 ^ n>>7 }
