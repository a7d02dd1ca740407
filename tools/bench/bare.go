package main

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/tools/internal/cpus"
)

// The bare rings are the floor that everything else stands on: two pinned threads, an SQ, a CQ and a doorbell page in shared
// memory, entries that mean nothing. What a case loses against them is spent on commands: decoding, memory, slots,
// clocks, latencies.

const (
	bareEntries = 256
	bareBatch   = 16 // most entries that either side takes at a time, so that both work at once
	bareQID     = 1
)

// bareRings is one queue pair and its doorbell pages, both halves.
type bareRings struct {
	sqp  *ring.SQProducer
	sqc  *ring.SQConsumer
	cqp  *ring.CQProducer
	cqc  *ring.CQConsumer
	tail *dbbuf.Publisher
	head *dbbuf.Publisher
	poll *dbbuf.Poller // of the tail
	cqhd *dbbuf.Poller // of the CQ head
}

func newBareRings(mem *shm.Region) (*bareRings, error) {
	const sqBytes, cqBytes = bareEntries * ring.SQESize, bareEntries * ring.CQESize
	var errs []error
	view := func(off, n uint64) *shm.Region {
		v, err := mem.View(off, n)
		errs = append(errs, err)
		return v
	}
	sq, cq := view(0, sqBytes), view(sqBytes, cqBytes)
	shadow, ei := view(sqBytes+cqBytes, shm.PageSize), view(sqBytes+cqBytes+shm.PageSize, shm.PageSize)
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	tail, head, err1 := dbbuf.Slots(shadow, bareQID, 0)
	tailEI, headEI, err2 := dbbuf.Slots(ei, bareQID, 0)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	// A driver that is held up between its store and its load meets an event index that has gone past it meanwhile, and
	// rings for nothing: rare, and nobody is asleep here.
	noExit := func(uint32) error { return nil }
	b := &bareRings{
		tail: dbbuf.NewShadow(tail, tailEI, noExit), head: dbbuf.NewShadow(head, headEI, noExit),
		poll: dbbuf.NewPoller(tail, tailEI, bareEntries), cqhd: dbbuf.NewPoller(head, headEI, bareEntries),
	}
	b.poll.BehindNow(0)
	b.cqhd.BehindNow(0)
	errs = errs[:0]
	var err error
	b.sqp, err = ring.NewSQProducer(sq, bareEntries)
	errs = append(errs, err)
	b.sqc, err = ring.NewSQConsumer(sq, bareEntries)
	errs = append(errs, err)
	b.cqp, err = ring.NewCQProducer(cq, bareEntries)
	errs = append(errs, err)
	b.cqc, err = ring.NewCQConsumer(cq, bareEntries)
	return b, errors.Join(append(errs, err)...)
}

const bareBytes = bareEntries*(ring.SQESize+ring.CQESize) + 2*shm.PageSize

// bareRate returns how many entries a second go round at queue depth qd.
func bareRate(hostCPU, driverCPU, qd int, d time.Duration) (float64, error) {
	mem, err := shm.NewMemfd("shadowbell-bare", bareBytes)
	if err != nil {
		return 0, err
	}
	defer mem.Close()
	b, err := newBareRings(mem)
	if err != nil {
		return 0, err
	}
	var (
		stop  atomic.Bool
		both  sync.WaitGroup
		errs  [2]error
		count uint64
		took  time.Duration
	)
	both.Go(func() {
		if errs[0] = cpus.Pin(hostCPU); errs[0] == nil {
			errs[0] = b.device(&stop)
		}
		stop.Store(true)
	})
	both.Go(func() {
		if errs[1] = cpus.Pin(driverCPU); errs[1] == nil {
			begin := time.Now()
			count, errs[1] = b.driver(qd, &stop)
			took = time.Since(begin)
		}
		stop.Store(true)
	})
	timer := time.AfterFunc(d, func() { stop.Store(true) })
	defer timer.Stop()
	both.Wait()
	return float64(count) / took.Seconds(), errors.Join(errs[:]...)
}

// device fetches what is there, batch by batch, and posts a completion for each entry.
func (b *bareRings) device(stop *atomic.Bool) error {
	var cmd nvme.Command
	var out [bareBatch]ring.Entry
	for !stop.Load() {
		pending, err := b.sqc.Pending(b.poll.Load())
		if err != nil {
			return err
		}
		n := min(pending, bareBatch)
		if n == 0 {
			continue
		}
		if b.cqp.Free() < n {
			if err := b.cqp.Consumed(b.cqhd.Load()); err != nil {
				return err
			}
			b.cqhd.Behind(b.cqp.Head())
			if n = min(n, b.cqp.Free()); n == 0 {
				continue
			}
		}
		for i := range n {
			b.sqc.Fetch(&cmd)
			out[i] = ring.MakeEntry(0, b.sqc.Head(), bareQID, cmd.CID, nvme.StatusSuccess)
		}
		b.cqp.Post(out[:n])
		b.poll.Behind(b.sqc.Head())
	}
	return nil
}

// driver keeps qd entries under way and returns how many came back.
func (b *bareRings) driver(qd int, stop *atomic.Bool) (count uint64, err error) {
	cmd := nvme.Command{Opcode: nvme.IORead, NSID: 1}
	unpublished := 0
	push := func(n int) error {
		for range n {
			cmd.CID++
			b.sqp.Push(&cmd)
		}
		return b.tail.Publish(b.sqp.Tail())
	}
	for left := qd; left > 0; left -= bareBatch {
		if err := push(min(left, bareBatch)); err != nil {
			return 0, err
		}
	}
	for !stop.Load() {
		n := 0
		for n < bareBatch {
			e, ok := b.cqc.Next()
			if !ok {
				break
			}
			if err := b.sqp.Released(e.SQHead()); err != nil {
				return count, err
			}
			n++
		}
		if n == 0 {
			continue
		}
		count += uint64(n)
		if unpublished += n; unpublished >= bareEntries/4 {
			unpublished = 0
			if err := b.head.Publish(b.cqc.Head()); err != nil {
				return count, err
			}
		}
		if err := push(n); err != nil {
			return count, err
		}
	}
	return count, nil
}
