package load

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

const (
	emptyLooks   = 32        // Reaps in vain before Wait, which knows when to sleep
	tellEvery    = 64        // rounds between two looks that others can take at a job's counters,
	tellSlow     = 100_000   // ns: unless commands take so long that it costs nothing in each
	maxLatency   = 100 << 30 // ns
	sharpness    = 3         // significant figures of a latency
	keptProblems = 8         // messages that a job keeps
)

// slot is the place of one command: its buffer, and what is under way in it.
type slot struct {
	mem    []byte
	iova   uint64
	lba    uint64
	blocks uint32
	write  bool
}

// job is one thread of the load. All its fields but seen belong to that thread while a phase runs.
type job struct {
	plan  *plan
	index int
	q     Queue
	pick  *picker
	check *ledger // nil: no patterns

	slots   []slot
	idle    []uint16 // stack of the slots with nothing under way
	ios     [maxBatch]guestdrv.IO
	results [maxBatch]guestdrv.Result

	pace     *pace  // nil: none
	left     uint64 // transfers still to be started: a pass over the region, or no end
	inflight int
	count    counters
	latency  *hdrhistogram.Histogram
	lastLat  int64 // ns; commands of one batch mostly have the same
	lastN    int64

	problems []string
	seen     struct {
		ios, bytes, errors, verify atomic.Uint64
	}
}

type counters struct {
	ios, bytes, errors, verifyErrors uint64
}

const noEnd = ^uint64(0)

func newJob(p *plan, i int, q Queue, slots []slot) *job {
	j := &job{plan: p, index: i, q: q, slots: slots, latency: hdrhistogram.New(1, maxLatency, sharpness)}
	start, blocks := p.region(i)
	j.pick = newPicker(p.cfg.Kind, p.sizes, p.align, start, blocks)
	if p.cfg.Rate > 0 {
		j.pace = newPace(p.cfg.Rate)
	}
	if p.cfg.Verify {
		j.check = newLedger(start, blocks, p.blockSize, p.run)
	}
	// What is written without patterns is random, so that nothing below makes it small.
	for s := range slots {
		mem := slots[s].mem
		for at := 0; at+p.blockSize <= len(mem); at += p.blockSize {
			fillBlock(mem[at:at+p.blockSize], uint64(s*p.slotSize+at), uint64(i), p.run)
		}
		j.idle = append(j.idle, uint16(p.cfg.Depth-1-s))
	}
	return j
}

// loop keeps the queue full until stop is set or left is used up, then takes what is under way back. The
// error is the queue's: after it nothing more can be done with it.
func (j *job) loop(stop *atomic.Bool) error {
	defer j.tell()
	defer j.flushLatency()
	if err := j.refill(); err != nil {
		return err
	}
	for empty, rounds := 0, 0; ; {
		if j.inflight == 0 {
			if !j.paced() || stop.Load() {
				return nil
			}
			j.tell()
			j.pace.sleep()
			if err := j.refill(); err != nil {
				return err
			}
			continue
		}
		n, err := j.q.Reap(j.results[:j.plan.cfg.Batch])
		if err != nil {
			return err
		}
		if n == 0 {
			if empty++; empty < emptyLooks {
				continue
			}
			empty = 0
			// Not the caller's context: what is under way is waited for, and its deadline bounds that.
			if err := j.q.Wait(context.Background()); err != nil {
				return err
			}
			continue
		}
		empty = 0
		if err := j.account(j.results[:n]); err != nil {
			return err
		}
		if rounds++; rounds%tellEvery == 0 || j.lastLat > tellSlow {
			j.tell()
		}
		if stop.Load() {
			continue
		}
		if err := j.refill(); err != nil {
			return err
		}
	}
}

// paced reports whether commands are started by the clock. Filling and reading back are not.
func (j *job) paced() bool { return j.pace != nil && j.left == noEnd }

// account takes completions back.
func (j *job) account(results []guestdrv.Result) error {
	for i := range results {
		r := &results[i]
		if r.Tag >= uint64(len(j.slots)) {
			return fmt.Errorf("completion with tag %d, which was never submitted", r.Tag)
		}
		s := &j.slots[r.Tag]
		j.idle = append(j.idle, uint16(r.Tag))
		if lat := int64(r.Latency); lat == j.lastLat {
			j.lastN++
		} else {
			j.flushLatency()
			j.lastLat, j.lastN = lat, 1
		}
		if !r.Status.OK() {
			j.failed(s, r)
		} else {
			j.count.bytes += uint64(s.blocks) * uint64(j.plan.blockSize)
			if j.check != nil && !s.write {
				j.check.check(s.mem, s.lba, s.blocks, j.mismatch)
			}
		}
		if j.check != nil {
			j.check.release(s.write, s.lba, s.blocks)
		}
	}
	j.inflight -= len(results)
	j.count.ios += uint64(len(results))
	return nil
}

func (j *job) flushLatency() {
	if j.lastN > 0 {
		// Out of range is the only error; what is longer counts as the longest.
		_ = j.latency.RecordValues(min(max(j.lastLat, 1), maxLatency), j.lastN)
	}
	j.lastN = 0
}

func (j *job) failed(s *slot, r *guestdrv.Result) {
	j.count.errors++
	if j.check != nil && s.write {
		j.check.failedWrite(s.lba, s.blocks)
	}
	op := "read"
	if s.write {
		op = "write"
	}
	j.problem(fmt.Sprintf("%s of %d blocks at lba %#x: %v", op, s.blocks, s.lba, r.Status))
}

func (j *job) mismatch(m *Mismatch) {
	j.count.verifyErrors++
	j.problem(m.Error())
}

func (j *job) problem(s string) {
	if len(j.problems) < keptProblems {
		j.problems = append(j.problems, s)
	}
}

// refill starts commands in all idle slots, batch by batch, as far as the queue and the ledger take them.
func (j *job) refill() error {
	for len(j.idle) > 0 {
		n := 0
		for n < j.plan.cfg.Batch && len(j.idle) > 0 {
			tag := j.idle[len(j.idle)-1]
			if !j.next(&j.slots[tag]) {
				break
			}
			j.idle = j.idle[:len(j.idle)-1]
			s, io := &j.slots[tag], &j.ios[n]
			io.Op = nvme.IORead
			if s.write {
				io.Op = nvme.IOWrite
			}
			io.NSID, io.LBA, io.Blocks, io.IOVA, io.Tag = j.plan.cfg.NSID, s.lba, s.blocks, s.iova, uint64(tag)
			n++
		}
		if n == 0 {
			return nil
		}
		taken, err := j.q.Submit(j.ios[:n])
		if err != nil {
			return err
		}
		j.inflight += taken
		if err := j.q.Publish(); err != nil {
			return err
		}
		if taken < n {
			// The rings are made for the whole depth, so this is a driver that keeps less than it said.
			return errors.New("the queue took fewer commands than it has room for")
		}
	}
	return nil
}

// next puts a transfer into s, or returns false if none can be started now.
func (j *job) next(s *slot) bool {
	if j.left == 0 || j.paced() && !j.pace.due() {
		return false
	}
	if !j.pick.random {
		s.write, s.lba, s.blocks = j.pick.peek()
		if j.check != nil && !j.claim(s) {
			return false
		}
		j.pick.advance(s.blocks)
	} else {
		s.write, s.lba, s.blocks = j.pick.pick()
		if j.check != nil {
			for tries := 0; !j.claim(s); tries++ {
				if tries == 16 {
					return false // the region is full of transfers; the next completion makes room
				}
				s.write, s.lba, s.blocks = j.pick.pick()
			}
		}
	}
	if j.left != noEnd {
		j.left--
	}
	return true
}

func (j *job) claim(s *slot) bool {
	if !j.check.claim(s.write, s.lba, s.blocks) {
		return false
	}
	if s.write {
		j.check.prepareWrite(s.mem, s.lba, s.blocks)
	} else {
		j.check.prepareRead(s.mem, s.blocks)
	}
	return true
}

// tell lets others see the counters.
func (j *job) tell() {
	j.seen.ios.Store(j.count.ios)
	j.seen.bytes.Store(j.count.bytes)
	j.seen.errors.Store(j.count.errors)
	j.seen.verify.Store(j.count.verifyErrors)
}
