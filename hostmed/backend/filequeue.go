package backend

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/uring"
)

// The way of a request through a queue:
//
//	1. Submit, begin      checked, given a slot and a stage (or a place in line for a slot)
//	2. push               the slot's stage becomes an entry of the ring
//	3. flush              one io_uring_enter for the batch
//	4. Submit or Reap, advance   a completion: more of the same (short transfer), the next stage, or
//	5. finish, deliver    the slot is free, the request in line for the caller
//
// A stage is one operation of the kernel. Write zeroes tries up to three ways and may sync after.

const (
	maxVec       = 1024    // UIO_MAXIOV
	maxOp        = 1 << 30 // bytes in one operation; the rest goes on as after a short transfer
	closingPause = 100 * time.Microsecond
	maxTries     = 8 // of an operation that the kernel wants repeated
)

// ring is what a queue needs of a uring.Ring.
type ring interface {
	GetSQE() *uring.SQE
	Pending() int
	Submit() (int, error)
	SubmitAndWait(n int) (int, error)
	Reap(out []uring.CQE) int
	EventFD() (int, error)
	Close() error
}

type stage uint8

const (
	stageTransfer stage = iota
	stagePunch
	stageZeroRange
	stageZeroes // writing them
	stageSync
	stageDiscard // of a block device
)

// slot is a request that the kernel has, or is about to get.
type slot struct {
	req    *Request
	moved  uint64 // bytes of it that are done
	vec    []Seg  // what is left of req.Vec after a short transfer
	bounce bounceIndex
	stage  stage
	tries  uint8
	async  bool // skip the attempt without waiting
}

type fileQueue struct {
	b    *file
	ring ring
	aux  ring // nil, but where ring is polled, which is for reads and writes only: the rest
	evfd int

	slots    slots[slot]
	waiting  fifo[*Request] // for a slot
	stalled  fifo[uint32]   // slots that found the ring full and the kernel short of memory
	ready    fifo[*Request] // finished, not given back
	inflight int            // taken and not given back
	inRing   int            // entries whose completion is to come

	fixed  registered // block devices only
	bounce bounceBuffers
	counts ringCounts
	cqes   [64]uring.CQE
}

func (b *file) NewQueue() (Queue, error) {
	r, err := uring.New(uring.Config{Entries: sqEntries, CQEntries: cqEntries, CoopTaskrun: true})
	if err != nil {
		return nil, fmt.Errorf("namespace %s: %w", b.info.Name, err)
	}
	q, err := b.newQueue(r)
	if err == nil {
		err = r.RegisterFiles([]int{b.fd})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("namespace %s: %w", b.info.Name, err), r.Close())
	}
	if b.pages != nil {
		return &pageQueue{fileQueue: q}, nil
	}
	return q, nil
}

func (b *file) newQueue(r ring) (*fileQueue, error) {
	evfd, err := r.EventFD()
	return &fileQueue{b: b, ring: r, evfd: evfd}, err
}

func (q *fileQueue) Inflight() int { return q.inflight }
func (q *fileQueue) EventFD() int  { return q.evfd }

func (q *fileQueue) AddMemory(b []byte) {
	if q.fixed.ring != nil {
		q.fixed.add(b)
	}
}

func (q *fileQueue) RemoveMemory(b []byte) {
	if q.fixed.ring != nil {
		q.fixed.remove(b)
	}
}

// Polled reports whether completions have to be looked for.
func (q *fileQueue) Polled() bool { return q.aux != nil }

func (q *fileQueue) Submit(reqs, done []*Request) int {
	q.inflight += len(reqs)
	for _, r := range reqs {
		q.begin(r)
	}
	return q.collect(done)
}

// collect ends a Submit: it passes on what was prepared and takes what completed within that.
func (q *fileQueue) collect(done []*Request) int {
	q.flush()
	n := q.Reap(done)
	if q.ready.n > 0 {
		q.kick() // no completion will say so
	}
	return n
}

func (q *fileQueue) Reap(done []*Request) int {
	n := 0
	for {
		for n < len(done) && q.ready.n > 0 {
			done[n] = q.ready.pop()
			n++
		}
		if n == len(done) || q.inRing+q.stalled.n == 0 {
			break
		}
		k := 0
		if q.aux != nil { // first: the other one may never run dry
			k = q.aux.Reap(q.cqes[:min(len(q.cqes), len(done)-n)])
		}
		if k == 0 {
			k = q.ring.Reap(q.cqes[:min(len(q.cqes), len(done)-n)])
		}
		for i := range q.cqes[:k] {
			q.inRing--
			q.advance(uint32(q.cqes[i].UserData), q.cqes[i].Res)
		}
		for ; q.waiting.n > 0 && q.slots.room(); k++ {
			q.begin(q.waiting.pop())
		}
		if q.stalled.n > 0 || q.pending() > 0 {
			q.flush()
		}
		if k == 0 {
			break
		}
	}
	q.inflight -= n
	q.counts.publish()
	return n
}

// begin takes a request up to its first entry in the ring, or to its end.
func (q *fileQueue) begin(r *Request) {
	if r.Status = q.b.info.check(r); !r.Status.OK() {
		q.ready.push(r)
		return
	}
	st := stageTransfer
	switch r.Op {
	case OpFlush:
		if !q.b.info.VolatileCache {
			q.ready.push(r)
			return
		}
		st = stageSync
	case OpDiscard:
		if st = q.b.discardStage(); st == stageTransfer {
			q.ready.push(r) // only a hint
			return
		}
	case OpWriteZeroes:
		st = q.b.zeroStage(r, 0)
	}
	if r.Op != OpFlush && r.Len == 0 {
		q.ready.push(r)
		return
	}
	if q.b.syncFailed.Load() && (r.Op == OpFlush || r.FUA) {
		r.Status = nvme.StatusWriteFault
		q.ready.push(r)
		return
	}
	if !q.slots.room() {
		q.counts.fresh.Waited++
		q.waiting.push(r)
		return
	}
	i := q.slots.take()
	s := &q.slots.all[i]
	*s = slot{req: r, vec: s.vec[:0], bounce: noBounce, stage: st}
	if st == stageTransfer && q.b.direct && !q.b.fits(r.Vec) && !q.bounce.get(i, &s.bounce) {
		q.counts.fresh.Waited++
		return // in line for a buffer
	}
	q.push(i)
}

// zeroStage is the way to zero r that comes after the ones in tried (bits by stage), and that the
// file system is not known to lack.
func (b *file) zeroStage(r *Request, tried uint8) stage {
	if r.Keep {
		return stageZeroes // a zeroed range is one that was never written, to those who ask
	}
	order := [...]stage{stageZeroRange, stagePunch}
	if r.Dealloc {
		order = [...]stage{stagePunch, stageZeroRange}
	}
	for _, st := range order {
		lacks := st == stagePunch && b.noPunch.Load() || st == stageZeroRange && b.noZero.Load()
		if !lacks && tried&(1<<st) == 0 {
			return st
		}
	}
	return stageZeroes
}

// discardStage is how blocks are given back; stageTransfer: in no way.
func (b *file) discardStage() stage {
	switch {
	case !b.noDiscard.Load():
		return stageDiscard
	case !b.noPunch.Load():
		return stagePunch
	}
	return stageTransfer
}

// push makes an entry of what slot i has to do next.
func (q *fileQueue) push(i uint32) {
	s := &q.slots.all[i]
	if s.bounce != noBounce && s.stage == stageTransfer && s.req.Op == OpWrite {
		s.vec = rest(s.vec[:0], s.req.Vec, s.moved)
		if !q.bounce.fill(s.bounce, s.vec) {
			q.finish(i, nvme.StatusDataTransferError)
			return
		}
	}
	ring := q.ring
	if q.aux != nil && (s.stage != stageTransfer && s.stage != stageZeroes || s.req.FUA) {
		ring = q.aux
	}
	e := ring.GetSQE()
	if e == nil {
		q.submit()
		if e = ring.GetSQE(); e == nil {
			q.stalled.push(i)
			return
		}
	}
	r := s.req
	off, left := r.Off+s.moved, r.Len-s.moved
	const file = 0 // index of the registered file
	switch s.stage {
	case stageTransfer:
		q.transfer(e, s, off, left)
		if r.FUA && r.Op == OpWrite && q.b.info.VolatileCache {
			e.OpFlags = uring.ReadWriteDsync
		}
	case stagePunch:
		e.PrepFallocate(file, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, left)
	case stageZeroRange:
		e.PrepFallocate(file, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, left)
	case stageZeroes:
		e.PrepWrite(file, &q.b.zeros[0], uint32(min(left, zeroChunk)), off)
	case stageSync:
		e.PrepFsync(file, uring.FsyncDatasync)
	case stageDiscard:
		e.PrepCommand(file, uring.BlockDiscard)
		e.Addr, e.Addr3 = off, left
	}
	e.Flags = uring.SQEFixedFile
	if s.async {
		e.Flags |= uring.SQEAsync
	}
	e.UserData = uint64(i)
	q.inRing++
	q.counts.gave(s.tries > 0)
}

func (q *fileQueue) transfer(e *uring.SQE, s *slot, off, left uint64) {
	const file = 0
	r := s.req
	write := r.Op == OpWrite
	if s.bounce != noBounce {
		p := q.bounce.buffer(s.bounce)
		if write {
			e.PrepWrite(file, &p[0], uint32(min(left, uint64(len(p)))), off)
		} else {
			e.PrepRead(file, &p[0], uint32(min(left, uint64(len(p)))), off)
		}
		return
	}
	vec := r.Vec
	if s.moved > 0 {
		s.vec = rest(s.vec[:0], r.Vec, s.moved)
		vec = s.vec
	}
	if len(vec) == 1 && !(q.aux != nil && r.FUA) { // the table is that of the first ring
		if buf, ok := q.fixed.find(&vec[0]); ok {
			if write {
				e.PrepWriteFixed(file, vec[0].Base, uint32(min(vec[0].Len, maxOp)), off, buf)
			} else {
				e.PrepReadFixed(file, vec[0].Base, uint32(min(vec[0].Len, maxOp)), off, buf)
			}
			return
		}
	}
	switch {
	case len(vec) == 1 && write:
		e.PrepWrite(file, vec[0].Base, uint32(min(vec[0].Len, maxOp)), off)
	case len(vec) == 1:
		e.PrepRead(file, vec[0].Base, uint32(min(vec[0].Len, maxOp)), off)
	case write:
		e.PrepWritev(file, vec[:min(len(vec), maxVec)], off)
	default:
		e.PrepReadv(file, vec[:min(len(vec), maxVec)], off)
	}
}

// rest appends to out what is left of vec after n bytes.
func rest(out, vec []Seg, n uint64) []Seg {
	for i := range vec {
		if n >= vec[i].Len {
			n -= vec[i].Len
			continue
		}
		out = append(out, skipSeg(vec[i], n))
		n = 0
	}
	return out
}

// advance takes the result of slot i's entry: bytes or minus an errno.
func (q *fileQueue) advance(i uint32, res int32) {
	s := &q.slots.all[i]
	r := s.req
	var e unix.Errno
	if res < 0 {
		e = unix.Errno(-res)
	}
	if (e == unix.EAGAIN || e == unix.EINTR) && s.tries < maxTries {
		s.tries++
		s.async = true
		q.push(i)
		return
	}
	switch s.stage {
	case stageTransfer:
		if e == unix.EINVAL && q.b.direct && s.bounce == noBounce {
			// The file system has rules that it did not tell.
			if q.bounce.get(i, &s.bounce) {
				q.push(i)
			}
			return
		}
		q.moved(i, e, uint64(max(res, 0)))
	case stageZeroes:
		q.moved(i, e, uint64(max(res, 0)))
	case stagePunch, stageZeroRange, stageDiscard:
		if e == unix.EOPNOTSUPP || e == unix.ENOSYS || e == unix.EINVAL && s.stage != stagePunch {
			q.lacks(i)
			return
		}
		q.ended(i, e)
	case stageSync:
		q.finish(i, q.b.syncStatus(r.Op, e))
	}
}

// lacks goes on after the file system refused the kind of fallocate that slot i tried.
func (q *fileQueue) lacks(i uint32) {
	s := &q.slots.all[i]
	switch s.stage {
	case stagePunch:
		q.b.noPunch.Store(true)
	case stageZeroRange:
		q.b.noZero.Store(true)
	case stageDiscard:
		q.b.noDiscard.Store(true)
	}
	if s.req.Op == OpDiscard {
		if s.stage = q.b.discardStage(); s.stage == stageTransfer {
			q.finish(i, nvme.StatusSuccess) // only a hint
			return
		}
		q.push(i)
		return
	}
	s.stage = q.b.zeroStage(s.req, 1<<s.stage)
	q.push(i)
}

// moved goes on after n bytes were transferred, or none because of e.
func (q *fileQueue) moved(i uint32, e unix.Errno, n uint64) {
	s := &q.slots.all[i]
	r := s.req
	if e == 0 && s.bounce != noBounce && s.stage == stageTransfer && r.Op == OpRead {
		s.vec = rest(s.vec[:0], s.req.Vec, s.moved)
		if !q.bounce.empty(s.bounce, s.vec, n) {
			e = unix.EFAULT
		}
	}
	if e == 0 && q.b.direct && s.moved+n < r.Len {
		n &^= q.b.info.LBASize() - 1 // the next one must begin at a block again
	}
	if e == 0 && n == 0 {
		e = unix.EIO // the file has become shorter
	}
	if e != 0 {
		if e == unix.EIO && r.FUA && !q.b.device {
			q.b.syncFailed.Store(true) // it may be about an earlier write, and is not said again
		}
		q.ended(i, e)
		return
	}
	if s.stage == stageTransfer {
		q.counts.moved(s.bounce != noBounce)
	}
	s.moved += min(n, r.Len-s.moved)
	if s.moved < r.Len {
		s.tries = 0
		q.push(i)
		return
	}
	q.ended(i, 0)
}

// ended goes on after the last stage but syncing.
func (q *fileQueue) ended(i uint32, e unix.Errno) {
	s := &q.slots.all[i]
	r := s.req
	if e == 0 && r.Op == OpWriteZeroes && r.FUA && q.b.info.VolatileCache {
		s.stage, s.tries = stageSync, 0
		q.push(i)
		return
	}
	q.finish(i, q.b.status(r.Op, e))
}

func (q *fileQueue) finish(i uint32, st nvme.Status) {
	s := &q.slots.all[i]
	s.req.Status = st
	q.ready.push(s.req)
	s.req = nil
	q.slots.give(i)
	if s.bounce != noBounce {
		if next, ok := q.bounce.put(&s.bounce); ok {
			q.bounce.get(next, &q.slots.all[next].bounce)
			q.push(next)
		}
	}
}

// flush submits what is prepared, and what found no room before.
func (q *fileQueue) flush() {
	q.submit()
	for n := q.stalled.n; n > 0; n-- {
		q.push(q.stalled.pop())
	}
	if q.pending() > 0 {
		q.submit()
	}
	if q.pending() > 0 || q.stalled.n > 0 {
		q.kick() // the kernel is short of memory; the caller must come again
	}
}

// submit leaves what the kernel does not take for the next time.
func (q *fileQueue) submit() {
	if q.ring.Pending() > 0 {
		_, _ = q.ring.Submit()
	}
	if q.aux != nil && q.aux.Pending() > 0 {
		_, _ = q.aux.Submit()
	}
}

func (q *fileQueue) pending() int {
	n := q.ring.Pending()
	if q.aux != nil {
		n += q.aux.Pending()
	}
	return n
}

var one = [8]byte{1}

// kick makes the eventfd readable although nothing completed.
func (q *fileQueue) kick() { _, _ = unix.Write(q.evfd, one[:]) }

// Close waits for what the kernel has: it writes to guest memory until then.
func (q *fileQueue) Close() error {
	var drop [32]*Request
	for q.inflight > 0 {
		if q.Reap(drop[:]) > 0 {
			continue
		}
		if q.aux != nil {
			q.submit()
			time.Sleep(closingPause) // neither ring tells of the other
			continue
		}
		if _, err := q.ring.SubmitAndWait(1); err != nil {
			time.Sleep(time.Millisecond) // short of memory
		}
	}
	q.b.tally.leave(q)
	if q.aux != nil {
		return errors.Join(q.aux.Close(), q.ring.Close())
	}
	return q.ring.Close()
}
