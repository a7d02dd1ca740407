package ublk

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/spin"
)

// port is the kernel's side of a queue: the ring, or a test.
type port interface {
	fetch(tag uint16, addr uint64)
	commit(tag uint16, result int32, addr uint64)
	// watch completes, once, when fd is readable; false: fd cannot be watched.
	watch(fd int) bool
	// flush hands over what was prepared and brings what the kernel holds back; wait does that and waits for an event, d at the most if d is not 0.
	// Each is one system call.
	flush() error
	wait(d time.Duration) error
	pending() bool // something is prepared
	held() bool    // the kernel holds events back
	ready() bool   // there are events, or held
	reap(out []event) int
}

// event is the end of a fetch, a commit, or a watch.
type event struct {
	tag    uint16
	watch  bool
	result int32
}

const (
	batchSize = 64
	// retries is how often a command is sent again that the controller refused without "do not retry".
	retries = 5
	// nap bounds a sleep with commands under way, so that deadlines are kept; pollNap one without an interrupt.
	nap        = 50 * time.Millisecond
	minPollNap = 20 * time.Microsecond
	maxPollNap = time.Millisecond
	// remakeWithin is how long the controller may take to come back after a reset.
	remakeWithin = 2 * time.Minute
	remakeNap    = 5 * time.Millisecond
	spinsPerLook = 64
)

// slot is what is known of a tag.
type slot struct {
	state slotState
	tries uint8
	cmd   export.Command
}

// buffer is a tag's memory, of the disk.
type buffer struct {
	mem  []byte
	addr uint64 // of mem in this process
	free func()
}

type slotState uint8

// idle -> queued -> started -> idle       a request, its command, its commit
// idle -> gone                            the kernel has taken the tag back: the device stops
// started -> queued                       a reset went over it, or it is tried again
const (
	idle slotState = iota
	queued
	started
	gone
)

// Counts are what a queue has done so far.
type Counts struct {
	Requests, Errors, Sleeps, Enters, Remade atomic.Uint64
}

// queue is one hardware queue of the device and the queue pair that serves it. All of it belongs to one OS thread.
type queue struct {
	id     int
	port   port
	desc   []byte // descriptors, written by the kernel before the tag's event
	disk   export.Queued
	nvme   export.Queue
	bufs   []buffer // by tag
	shift  uint8    // log2 of sectors in a block
	failed func(error)
	keep   bool // on failure requests wait for the next server

	slots  []slot
	todo   []uint16 // ring of tags whose command waits for room; as long as slots
	head   int
	count  int
	live   int
	watch  bool // a watch is under way
	err    error
	budget spin.Budget
	naps   time.Duration
	counts Counts

	events  [batchSize]event
	cmds    [batchSize]export.Command
	tags    [batchSize]uint16
	results [batchSize]export.Result
}

// begin makes every tag ready for its first request.
func (q *queue) begin() error {
	n := len(q.bufs)
	q.slots, q.todo, q.live = make([]slot, n), make([]uint16, n), n
	for tag := range n {
		q.port.fetch(uint16(tag), q.bufs[tag].addr)
	}
	return q.flush()
}

// run serves until the kernel has taken all tags back.
func (q *queue) run() error {
	for q.live > 0 {
		worked, err := q.step()
		if err != nil {
			return err
		}
		if worked || q.live == 0 {
			continue
		}
		if err := q.rest(); err != nil {
			return err
		}
	}
	return nil
}

// step does what there is to do, without waiting, and reports whether that was anything. What has ended is handed over at once while the controller is at
// work, whose time passes meanwhile. Otherwise the call that sleeps does it, which comes next: so a request that comes alone takes one system call, for
// its end and the wait for the next request, and not two.
func (q *queue) step() (bool, error) {
	if q.port.held() {
		if err := q.flush(); err != nil {
			return true, err
		}
	}
	n := q.port.reap(q.events[:])
	for i := range q.events[:n] {
		if err := q.take(&q.events[i]); err != nil {
			return true, err
		}
	}
	worked := n > 0
	if q.err == nil {
		did, err := q.drive()
		worked = worked || did
		if err != nil {
			if err := q.recover(err); err != nil {
				return true, err
			}
			worked = true
		}
	}
	if q.err != nil {
		q.refuse()
	}
	if q.busy() && q.port.pending() {
		return true, q.flush()
	}
	return worked, nil
}

// busy tells whether the controller is at work.
func (q *queue) busy() bool { return q.err == nil && q.nvme.Outstanding() > 0 }

func (q *queue) flush() error {
	q.counts.Enters.Add(1)
	return q.port.flush()
}

// drive moves commands to the controller and results back.
func (q *queue) drive() (worked bool, err error) {
	for q.count > 0 {
		n := min(q.count, batchSize)
		for i := range n {
			tag := q.todo[(q.head+i)%len(q.todo)]
			q.tags[i], q.cmds[i] = tag, q.slots[tag].cmd
		}
		took, err := q.nvme.Submit(q.cmds[:n])
		for _, tag := range q.tags[:took] {
			q.slots[tag].state = started
		}
		q.head, q.count = (q.head+took)%len(q.todo), q.count-took
		if err != nil {
			return true, err
		}
		if took > 0 {
			worked = true
			if err := q.nvme.Publish(); err != nil {
				return true, err
			}
		}
		if took < n {
			break
		}
	}
	for {
		n, err := q.nvme.Reap(q.results[:])
		for i := range q.results[:n] {
			q.finish(&q.results[i])
		}
		if n > 0 {
			worked, q.naps = true, 0
		}
		if err != nil || n < len(q.results) {
			return worked, err
		}
	}
}

// take handles an event of the kernel's.
func (q *queue) take(e *event) error {
	if e.watch {
		q.watch = false
		return nil
	}
	if int(e.tag) >= len(q.slots) || q.slots[e.tag].state != idle {
		return fmt.Errorf("ublk queue %d: the kernel gives tag %d, which it has given before or does not have", q.id, e.tag)
	}
	s := &q.slots[e.tag]
	switch errno := unix.Errno(-e.result); {
	case e.result == 0:
	case errno == unix.ENODEV:
		s.state = gone
		q.live--
		return nil
	default:
		return fmt.Errorf("ublk queue %d: the kernel refuses tag %d: %w", q.id, e.tag, errno)
	}
	q.counts.Requests.Add(1)
	cmd, errno := q.command(e.tag)
	if errno != 0 {
		q.commit(e.tag, -int32(errno))
		return nil
	}
	s.cmd, s.tries = cmd, 0
	q.push(e.tag)
	return nil
}

func (q *queue) push(tag uint16) {
	q.slots[tag].state = queued
	q.todo[(q.head+q.count)%len(q.todo)] = tag
	q.count++
}

// command makes the command of a tag's request.
func (q *queue) command(tag uint16) (export.Command, unix.Errno) {
	d := parseDesc(q.desc[int(tag)*ioDescSize:])
	c := export.Command{Tag: uint64(tag), FUA: d.fua}
	if d.op == opFlush {
		c.Op, c.FUA = nvme.IOFlush, false
		return c, 0
	}
	if mask := uint64(1)<<q.shift - 1; d.sectors == 0 || (d.start|uint64(d.sectors))&mask != 0 {
		return c, unix.EINVAL
	}
	c.LBA, c.Blocks = d.start>>q.shift, d.sectors>>q.shift
	mem := q.bufs[tag].mem
	switch d.op {
	case opRead, opWrite:
		n := uint64(d.sectors) * sectorSize
		if n > uint64(len(mem)) {
			return c, unix.EINVAL
		}
		c.Op, c.Data = nvme.IORead, mem[:n]
		if d.op == opWrite {
			c.Op = nvme.IOWrite
		}
	case opWriteZeroes:
		if c.Blocks > 1<<16 {
			return c, unix.EINVAL
		}
		c.Op = nvme.IOWriteZeroes
	case opDiscard:
		// A request without data has the buffer for its one range.
		c.Op, c.FUA, c.Data = nvme.IODSM, false, mem[:nvme.DSMRangeSize]
	default:
		return c, unix.EOPNOTSUPP
	}
	return c, 0
}

// finish commits the end of a command, or sends it again.
func (q *queue) finish(r *export.Result) {
	tag := uint16(r.Tag)
	s := &q.slots[tag]
	if r.Status.OK() {
		q.commit(tag, q.bytes(tag))
		return
	}
	if !r.Status.DNR() && s.tries < retries {
		s.tries++
		q.push(tag)
		return
	}
	q.commit(tag, -int32(errnoOf(r.Status)))
}

// bytes is the result of a request that has ended well.
func (q *queue) bytes(tag uint16) int32 {
	switch c := &q.slots[tag].cmd; c.Op {
	case nvme.IORead, nvme.IOWrite:
		return int32(len(c.Data))
	}
	return 0
}

// commit gives a request's result to the kernel and waits for the tag's next one.
func (q *queue) commit(tag uint16, result int32) {
	if result < 0 {
		q.counts.Errors.Add(1)
	}
	q.slots[tag].state = idle
	q.port.commit(tag, result, q.bufs[tag].addr)
}

// recover makes the queue pair again if a reset went over it; otherwise the queue fails. What was under way goes first, in the order of tags: the
// block layer orders nothing that is under way together.
func (q *queue) recover(err error) error {
	if q.disk.Again(err) {
		if err = q.remake(err); err == nil {
			return nil
		}
	}
	err = fmt.Errorf("ublk queue %d: %w", q.id, err)
	q.err = err
	q.failed(err)
	if q.keep {
		return err
	}
	return nil
}

func (q *queue) remake(why error) error {
	if q.port.pending() {
		if err := q.flush(); err != nil { // what has ended does not wait
			return err
		}
	}
	if err := q.nvme.Close(); err != nil && !q.disk.Again(err) {
		return err
	}
	for deadline := time.Now().Add(remakeWithin); ; time.Sleep(remakeNap) {
		fresh, err := q.disk.NewQueue(len(q.slots))
		if err == nil {
			q.nvme = fresh
			break
		}
		if !q.disk.Again(err) || time.Now().After(deadline) {
			return fmt.Errorf("%w, after: %w", err, why)
		}
	}
	q.head, q.count, q.budget = 0, 0, spin.Budget{}
	for tag := range q.slots {
		if s := &q.slots[tag]; s.state == started || s.state == queued {
			q.push(uint16(tag))
		}
	}
	q.counts.Remade.Add(1)
	return nil
}

// refuse ends all requests of a queue that has failed.
func (q *queue) refuse() {
	q.head, q.count = 0, 0
	for tag := range q.slots {
		if s := &q.slots[tag]; s.state == started || s.state == queued {
			q.commit(uint16(tag), -int32(unix.EIO))
		}
	}
}

// rest waits for something to do: it polls for as long as that pays, but only while the controller is at work, and then sleeps on both sides.
func (q *queue) rest() error {
	if !q.busy() {
		q.naps = 0
		return q.sleep(0)
	}
	if limit := q.budget.Limit(); limit > 0 {
		begin := time.Now()
		for {
			for range spinsPerLook {
				if q.port.ready() {
					q.budget.Earned(time.Since(begin))
					return nil
				}
				n, err := q.nvme.Reap(q.results[:])
				for i := range q.results[:n] {
					q.finish(&q.results[i])
				}
				if err != nil {
					return q.recover(err)
				}
				if n > 0 {
					q.naps = 0
					q.budget.Earned(time.Since(begin))
					return nil
				}
			}
			if time.Since(begin) > limit {
				break
			}
		}
		q.budget.Failed()
	}
	fd := q.nvme.EventFD()
	asleep, err := q.nvme.Arm()
	switch {
	case err != nil:
		return q.recover(err)
	case !asleep:
		return nil
	case fd >= 0 && (q.watch || q.port.watch(fd)):
		q.watch = true
		return q.sleep(nap)
	}
	q.naps = min(max(2*q.naps, minPollNap), maxPollNap)
	return q.sleep(q.naps)
}

func (q *queue) sleep(d time.Duration) error {
	q.counts.Sleeps.Add(1)
	q.counts.Enters.Add(1)
	return q.port.wait(d)
}

// errnoOf is what the block layer makes the right error of.
func errnoOf(s nvme.Status) unix.Errno {
	switch s.Code() {
	case nvme.StatusCapacityExceeded:
		return unix.ENOSPC
	case nvme.StatusWriteFault, nvme.StatusUnrecoveredRead, nvme.StatusUnrecoveredError:
		return unix.ENODATA // a medium error
	case nvme.StatusInvalidOpcode:
		return unix.EOPNOTSUPP
	}
	return unix.EIO
}

// thread runs f on an OS thread of its own, which ends with it: for ublk a tag belongs to the thread that first fetched it.
func thread(f func()) {
	go func() {
		runtime.LockOSThread()
		f()
	}()
}
