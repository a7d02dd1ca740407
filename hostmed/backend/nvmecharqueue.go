package backend

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/uring"
)

// The way of a request through a queue of a character device:
//
//	1. Submit, begin    checked; cut into pieces that the device takes, each with a slot of its own, all at once
//	2. push             the slot becomes an entry of the ring: the guest's command, moved by where the slice begins, with the piece's data
//	3. submit           one io_uring_enter for the batch
//	4. Reap, advance    a completion: the device's status, or an errno of the kernel's; some of them are tried again
//	5. over             with its last piece the request is in line for the caller
//
// Request.Priv[0] is how many of its pieces are under way, Priv[1] how many of its bytes have been cut off.

const (
	charTries   = 8 // of a command that the kernel wants repeated
	resetTries  = 3 // of one that a reset of the device has ended: it may be what the device was reset for
	noMoreTries = 0xff
	statusField = nvme.Status(0x7fff)
)

// wideRing is what a queue needs of a uring.Ring with long entries.
type wideRing interface {
	bufferTable
	GetSQE() *uring.SQE
	Command(*uring.SQE) []byte
	Pending() int
	Submit() (int, error)
	SubmitAndWait(n int) (int, error)
	ReapWide(out []uring.WideCQE) int
	EventFD() (int, error)
	Close() error
}

// charSlot is a piece of a request: one command of the device's, or several one after another if they go through a bounce buffer.
type charSlot struct {
	req    *Request
	at, n  uint64 // the bytes of the request that the command is about
	end    uint64 // and where the piece ends
	vec    []Seg  // memory of the command's data, while the kernel has it
	bounce bounceIndex
	tries  uint8
	async  bool

	fixedVec bool // pieces of registered memory
}

type charQueue struct {
	b    *nvmeChar
	ring wideRing
	evfd int

	slots    slots[charSlot]
	waiting  fifo[*Request] // for slots
	stalled  fifo[uint32]   // slots that found the ring full and the kernel short of memory
	ready    fifo[*Request] // finished, not given back
	inflight int
	inRing   int

	fixed  registered
	ranges []byte // a nvme.DSMRange for each slot
	bounce bounceBuffers
	counts ringCounts
	cqes   [64]uring.WideCQE
}

func (b *nvmeChar) NewQueue() (Queue, error) {
	r, err := uring.New(uring.Config{Entries: sqEntries, CQEntries: cqEntries, SQE128: true, CQE32: true, IOPoll: b.spec.Poll, CoopTaskrun: true})
	if err != nil {
		return nil, fmt.Errorf("namespace %s: %w", b.info.Name, err)
	}
	q, err := b.newQueue(r)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("namespace %s: %w", b.info.Name, err), r.Close())
	}
	if err = r.RegisterFiles([]int{b.fd}); err != nil {
		return nil, errors.Join(fmt.Errorf("namespace %s: %w", b.info.Name, err), q.Close())
	}
	b.join(q, q.counts.get)
	return q, nil
}

func (b *nvmeChar) newQueue(r wideRing) (*charQueue, error) {
	evfd, err := r.EventFD()
	if err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(-1, 0, maxSlots*nvme.DSMRangeSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	return &charQueue{b: b, ring: r, evfd: evfd, ranges: mem, fixed: registered{ring: r, full: func() { b.limit.tell(b.info.Name) }}}, nil
}

func (q *charQueue) Inflight() int { return q.inflight }
func (q *charQueue) EventFD() int  { return q.evfd }
func (q *charQueue) Polled() bool  { return q.b.spec.Poll }

func (q *charQueue) AddMemory(b []byte) {
	if !q.b.spec.NoPin {
		q.fixed.add(b)
	}
}

func (q *charQueue) RemoveMemory(b []byte) { q.fixed.remove(b) }

func (q *charQueue) Submit(reqs, done []*Request) int {
	q.inflight += len(reqs)
	for _, r := range reqs {
		q.begin(r)
	}
	q.flush()
	n := q.Reap(done)
	if q.ready.n > 0 {
		q.kick()
	}
	return n
}

func (q *charQueue) Reap(done []*Request) int {
	n := 0
	for {
		for n < len(done) && q.ready.n > 0 {
			done[n] = q.ready.pop()
			n++
		}
		if n == len(done) || q.inRing+q.stalled.n == 0 {
			break
		}
		k := q.ring.ReapWide(q.cqes[:min(len(q.cqes), len(done)-n)])
		for i := range q.cqes[:k] {
			c := &q.cqes[i]
			q.inRing--
			q.advance(uint32(c.UserData), c.Res, uint32(c.Extra[0]))
		}
		for q.waiting.n > 0 && q.slots.room() {
			q.cutUp(q.waiting.pop())
		}
		if q.stalled.n > 0 || q.ring.Pending() > 0 {
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

// begin takes a request up to its entries in the ring, or to its end.
func (q *charQueue) begin(r *Request) {
	r.DW0, r.Priv = 0, [2]uint64{}
	if r.Status = q.b.check(r); !r.Status.OK() || q.b.nothingToDo(r) {
		q.ready.push(r)
		return
	}
	q.b.shiftList(r)
	q.cutUp(r)
}

// cutUp starts those pieces of r that there are slots for. It stays in line for the rest.
func (q *charQueue) cutUp(r *Request) {
	// The request may be over before the last piece was cut: it counts as one of them until then.
	r.Priv[0]++
	for {
		if !q.slots.room() {
			r.Priv[0]--
			q.counts.fresh.Waited++
			q.waiting.push(r)
			return
		}
		at := r.Priv[1]
		n, copied := q.b.piece(r, at)
		i := q.slots.take()
		s := &q.slots.all[i]
		*s = charSlot{req: r, at: at, n: n, end: at + n, vec: s.vec[:0], bounce: noBounce}
		r.Priv[0]++
		r.Priv[1] += n
		if copied {
			q.through(i)
		} else {
			q.push(i)
		}
		if !q.b.pieces(r) || r.Priv[1] >= r.Len {
			break
		}
	}
	q.over(r)
}

// over notes that a piece of r has ended.
func (q *charQueue) over(r *Request) {
	if r.Priv[0]--; r.Priv[0] == 0 {
		q.ready.push(r)
	}
}

// push makes an entry of what slot i has to do next.
func (q *charQueue) push(i uint32) {
	s := &q.slots.all[i]
	if s.bounce != noBounce {
		if s.req.Op == OpRead {
			clear(q.bounce.buffer(s.bounce)[:s.n]) // of other guests' data, should the device not move what it says that it has
		} else if !q.bounce.fill(s.bounce, s.memory()) {
			q.finish(i, nvme.StatusDataTransferError, 0)
			return
		}
	}
	e := q.ring.GetSQE()
	if e == nil {
		q.submit()
		if e = q.ring.GetSQE(); e == nil {
			q.stalled.push(i)
			return
		}
	}
	const file = 0 // index of the registered file
	c := passthruIn(q.ring.Command(e))
	e.PrepCommand(file, nvmeURingIO)
	q.b.command(c, s.req, s.at, s.n)
	q.data(e, c, i)
	e.Flags = uring.SQEFixedFile
	if s.async {
		e.Flags |= uring.SQEAsync
	}
	e.UserData = uint64(i)
	q.inRing++
	q.counts.gave(s.tries > 0)
	if s.req.Op == OpCommand && s.tries == 0 {
		q.counts.fresh.Native++
	}
}

// data gives command c of slot i its memory.
func (q *charQueue) data(e *uring.SQE, c *passthru, i uint32) {
	s := &q.slots.all[i]
	r := s.req
	switch {
	case r.Op == OpDiscard:
		one := Seg{Base: &q.ranges[i*nvme.DSMRangeSize], Len: nvme.DSMRangeSize}
		rangesOf(&one)[0] = nvme.DSMRange{SLBA: q.b.lba(r.Off + s.at), Length: uint32(s.n >> q.b.info.LBAShift)}
		q.one(e, c, &one)
	case r.Op == OpWriteZeroes && !q.b.dev.zeroes:
		q.one(e, c, &Seg{Base: &q.b.zeros[0], Len: s.n})
	case s.bounce != noBounce:
		q.one(e, c, &Seg{Base: &q.bounce.buffer(s.bounce)[0], Len: s.n})
	case r.Op == OpCommand && !q.b.pieces(r):
		if len(r.Vec) > 0 {
			q.one(e, c, &r.Vec[0])
		}
	case len(r.Vec) == 1:
		one := skipSeg(r.Vec[0], s.at)
		one.Len = s.n
		q.one(e, c, &one)
	case len(r.Vec) > 1:
		if s.memory(); len(s.vec) == 1 {
			q.one(e, c, &s.vec[0])
			return
		}
		e.Off = nvmeURingIOVec
		c.Addr, c.DataLen = addressOfPieces(s.vec), uint32(len(s.vec))
		if q.b.fixedVec.Load() {
			if index, ok := q.fixed.findAll(s.vec); ok {
				e.OpFlags, e.BufIndex = uring.URingCmdFixed, index
				s.fixedVec = true
			}
		}
	}
}

// one makes s the memory of c.
func (q *charQueue) one(e *uring.SQE, c *passthru, s *Seg) {
	c.Addr, c.DataLen = uint64(segAddress(s)), uint32(s.Len)
	if index, ok := q.fixed.find(s); ok {
		e.OpFlags, e.BufIndex = uring.URingCmdFixed, index
	}
}

// merged appends to out the n bytes of vec from at on, neighbours in memory as one piece.
func merged(out, vec []Seg, at, n uint64) []Seg {
	for i := range vec {
		if at >= vec[i].Len {
			at -= vec[i].Len
			continue
		}
		if n == 0 {
			break
		}
		s := skipSeg(vec[i], at)
		s.Len = min(s.Len, n)
		at, n = 0, n-s.Len
		if last := len(out) - 1; last >= 0 && segAddress(&out[last])+uintptr(out[last].Len) == segAddress(&s) {
			out[last].Len += s.Len
			continue
		}
		out = append(out, s)
	}
	return out
}

// advance takes the result of slot i's command: minus an errno, or the NVMe status, and DW0.
func (q *charQueue) advance(i uint32, res int32, dw0 uint32) {
	s := &q.slots.all[i]
	r := s.req
	if res >= 0 {
		st := nvme.Status(res) & statusField
		// What the kernel says in the place of the device, when it resets that one.
		if (st.Code() == nvme.StatusHostPathError || st.Code() == nvme.StatusAbortedByHost) && repeatable(r) && q.again(i, resetTries) {
			return
		}
		if st.OK() {
			st = nvme.StatusSuccess // whatever other bits it has
		}
		q.moved(i, st, dw0)
		return
	}
	e := unix.Errno(-res)
	switch e {
	case unix.EINTR: // a reset of the device has ended it
		if !repeatable(r) {
			q.finish(i, nvme.StatusInternalError, 0)
		} else if !q.again(i, resetTries) {
			q.finish(i, nvme.StatusInterrupted, 0)
		}
		return
	case unix.EAGAIN: // the kernel is short of something
		if !q.again(i, charTries) {
			q.finish(i, nvme.StatusInterrupted, 0)
		}
		return
	case unix.EINVAL, unix.EREMOTEIO: // memory that does not suit the device
		if s.fixedVec {
			// Or a kernel that has no pieces of registered memory, after all.
			s.fixedVec = false
			q.b.fixedVec.Store(false)
			q.push(i)
			return
		}
		if s.bounce == noBounce && q.b.pieces(r) && len(r.Vec) > 0 {
			q.through(i)
			return
		}
	}
	q.finish(i, charStatus(r, e), 0)
}

// repeatable says whether r may be done once more when it may have been done in part: a Copy may have written what it is to read.
func repeatable(r *Request) bool { return r.Op != OpCommand || r.Cmd.Opcode != nvme.IOCopy }

// again has slot i's command tried once more, unless that was done too often.
func (q *charQueue) again(i uint32, most uint8) bool {
	s := &q.slots.all[i]
	if s.tries >= most {
		return false
	}
	s.tries++
	s.async = true // where the kernel may wait until the device is back
	q.push(i)
	return true
}

// moved goes on after the command of slot i.
func (q *charQueue) moved(i uint32, st nvme.Status, dw0 uint32) {
	s := &q.slots.all[i]
	if st.OK() && q.b.movesData(s.req) {
		q.counts.moved(s.bounce != noBounce)
	}
	if st.OK() && s.bounce != noBounce && s.req.Op == OpRead && !q.bounce.empty(s.bounce, s.memory(), s.n) {
		st = nvme.StatusDataTransferError
	}
	if st.OK() && s.at+s.n < s.end {
		s.at += s.n
		s.n = q.buffered(s)
		s.tries = 0
		q.push(i)
		return
	}
	q.finish(i, st, dw0)
}

// finish ends slot i's piece. Of several that fail the first one counts.
func (q *charQueue) finish(i uint32, st nvme.Status, dw0 uint32) {
	s := &q.slots.all[i]
	r := s.req
	if r.Status == nvme.StatusSuccess {
		r.Status, r.DW0 = st, dw0
	}
	s.req = nil
	q.slots.give(i)
	if s.bounce != noBounce {
		if next, ok := q.bounce.put(&s.bounce); ok {
			q.through(next)
		}
	}
	q.over(r)
}

// GiveUp is Keeper's. Nothing is kept back; but what a reset of the device ends is not sent again for who does not wait for it any more, as after a reset
// of the guest's controller, which would last as long as the kernel's patience once more.
func (q *charQueue) GiveUp(aborted bool, which func(*Request) bool) int {
	for i := range q.slots.all {
		if s := &q.slots.all[i]; !aborted && s.req != nil && which(s.req) {
			s.tries = noMoreTries
		}
	}
	return 0
}

func (q *charQueue) flush() {
	q.submit()
	for n := q.stalled.n; n > 0; n-- {
		q.push(q.stalled.pop())
	}
	q.submit()
	if q.ring.Pending() > 0 || q.stalled.n > 0 {
		q.kick() // the kernel is short of memory; the caller must come again
	}
}

// submit leaves what the kernel does not take for the next time.
func (q *charQueue) submit() {
	if q.ring.Pending() > 0 {
		_, _ = q.ring.Submit()
	}
}

func (q *charQueue) kick() { _, _ = unix.Write(q.evfd, one[:]) }

// Close waits for what the kernel has: the device writes to guest memory until then.
func (q *charQueue) Close() error {
	var drop [32]*Request
	for q.inflight > 0 {
		if q.Reap(drop[:]) > 0 {
			continue
		}
		if q.Polled() { // the kernel would keep a core busy for it
			time.Sleep(closingPause)
			continue
		}
		if _, err := q.ring.SubmitAndWait(1); err != nil {
			time.Sleep(time.Millisecond) // short of memory
		}
	}
	q.b.leave(q)
	return errors.Join(q.ring.Close(), unix.Munmap(q.ranges))
}

// through sends the piece of slot i through a bounce buffer, in as many commands as it takes, since the kernel finds no way to hand its memory to the device: it copies
// most such memory itself.
func (q *charQueue) through(i uint32) {
	s := &q.slots.all[i]
	if !q.bounce.get(i, &s.bounce) {
		q.counts.fresh.Waited++
		return
	}
	s.n = q.buffered(s)
	q.push(i)
}

// buffered is how much of what is left of a piece goes through a buffer at a time.
func (q *charQueue) buffered(s *charSlot) uint64 {
	left := s.end - s.at
	if left <= bounceSize {
		return left
	}
	return q.b.info.whole(s.req.Off+s.at, bounceSize)
}

// memory is that of the slot's command, its neighbours in memory as one piece.
func (s *charSlot) memory() []Seg {
	s.vec = merged(s.vec[:0], s.req.Vec, s.at, s.n)
	return s.vec
}
