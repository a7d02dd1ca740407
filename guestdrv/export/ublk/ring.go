package ublk

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/uring"
)

// ringPort is a queue's port over its io_uring. After openRing the ring can send commands to the one character device and watch the
// interrupts, and nothing else.
type ringPort struct {
	ring  *uring.Ring
	queue uint16
	fds   []int // registered: the character device, then the interrupts
	out   [batchSize]uring.CQE
}

const watchMark = 1 << 32 // in UserData, above the tag

// openRing makes the ring of a queue; the calling thread is its only user.
func openRing(queue uint16, depth int, char int, interrupts []int) (*ringPort, error) {
	r, err := uring.New(uring.Config{
		Entries: uint32(depth + 1), Disabled: true, SingleIssuer: true, CoopTaskrun: true, DeferTaskrun: true,
	})
	if err != nil {
		return nil, err
	}
	p := &ringPort{ring: r, queue: queue, fds: append([]int{char}, interrupts...)}
	if r.Features()&uring.FeatExtArg == 0 {
		err = fmt.Errorf("io_uring: waiting with a limit needs Linux 5.11: %w", unix.ENOSYS)
	} else {
		err = restrict(r, p.fds, uring.OpURingCmd, uring.OpPollAdd)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return p, nil
}

func (p *ringPort) close() error { return p.ring.Close() }

func (p *ringPort) fetch(tag uint16, addr uint64) { p.command(ioFetch, tag, 0, addr) }

func (p *ringPort) commit(tag uint16, result int32, addr uint64) {
	p.command(ioCommitAndFetch, tag, result, addr)
}

// command prepares an I/O command. There is room: a tag has one entry at a time, and the ring has as many and one for the watch.
func (p *ringPort) command(op uint32, tag uint16, result int32, addr uint64) {
	s := p.ring.GetSQE()
	s.PrepCommand(0, op)
	s.Flags = uring.SQEFixedFile
	s.UserData = uint64(tag)
	putIO(p.ring.Command(s), p.queue, tag, result, addr)
}

func (p *ringPort) watch(fd int) bool {
	i := slices.Index(p.fds, fd)
	if i < 0 {
		return false
	}
	s := p.ring.GetSQE()
	s.PrepPoll(i, unix.POLLIN)
	s.Flags = uring.SQEFixedFile
	s.UserData = watchMark
	return true
}

func (p *ringPort) pending() bool { return p.ring.Pending() > 0 }

func (p *ringPort) held() bool { return p.ring.Held() }

func (p *ringPort) ready() bool { return p.ring.Ready() > 0 || p.ring.Held() }

func (p *ringPort) flush() error {
	_, err := p.ring.SubmitAndFetch()
	return p.entered(err)
}

func (p *ringPort) wait(d time.Duration) error {
	var err error
	if d == 0 {
		_, err = p.ring.SubmitAndWait(1)
	} else {
		_, err = p.ring.SubmitAndWaitFor(1, d)
	}
	return p.entered(err)
}

// entered is about the error of an io_uring_enter. What the kernel did not take, short of memory or of room for completions, stays pending.
func (p *ringPort) entered(err error) error {
	if err != nil && err != unix.EAGAIN && err != unix.EBUSY {
		return fmt.Errorf("ublk queue %d: io_uring_enter: %w", p.queue, err)
	}
	return nil
}

func (p *ringPort) reap(out []event) int {
	n := p.ring.Reap(p.out[:min(len(out), len(p.out))])
	for i := range p.out[:n] {
		c := &p.out[i]
		out[i] = event{tag: uint16(c.UserData), watch: c.UserData&watchMark != 0, result: c.Res}
	}
	return n
}
