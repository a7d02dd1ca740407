package hostnvme

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// mux has many queues on one pair of the device. Usually one worker uses it; where there are fewer pairs than workers several do, and take
// turns by a lock that is held for a batch. It is the pair's User.
type mux struct {
	log hclog.Logger

	// Changed with the Pairs' mu held too:
	hw     *Pair    // nil: it is not open
	polled bool     // it has no interrupts
	users  []*Queue // those that are on it
	usher  *os.File // the eventfd of the interrupt, which a goroutine reads; nil: a worker does

	posted atomic.Pointer[phases]
	// next is where the next CQE comes, and its phase in bit 0: what who only looks needs.
	next atomic.Uint32

	mu      sync.Mutex
	q       *queue.Queue   // nil: it is not open
	cmds    []nvme.Command // by slot: what is sent again after a reset
	slots   []slot
	zeroes  []uint64        // pages of zeroes: the same one again and again
	bounce  []*bounceBuffer // those that are free
	waiting []*Queue        // have requests that found no slot or no buffer, in turn
	woken   []*Queue        // have something ready, and have to be told
	paused  bool            // nobody touches the queue
	failed  nvme.Status     // of all requests, once the device is gone for good
	resumed time.Time       // when it last was
	out     [32]queue.Completion
	rings   uint64 // MMIO writes of q that have been counted
	counts  Counts // of no queue in particular, and of those that are closed
}

// phases are, for each CQE, the word that has its phase.
type phases []*atomic.Uint64

// slot is a device command that is under way.
type slot struct {
	req    *Request
	bounce *bounceBuffer // nil: no copy
	at     position      // of its data in req.Vec
	n      uint64        // bytes of it
	tries  uint8         // see maxTries
}

// Counts are what was done for one queue, or for all.
type Counts struct {
	Commands  uint64 // device commands submitted
	Native    uint64 // of those, the guest's own, that the device does itself (Command)
	Mapped    uint64 // of those with data, those whose data the device moves to or from guest memory
	Bounced   uint64 // those whose data is copied
	Full      uint64 // requests that had to wait for a slot or a buffer
	Reissued  uint64 // commands submitted again after a reset
	Doorbells uint64 // MMIO writes
	Batches   uint64 // shown to the device
	Kicks     uint64 // workers woken by another
	Wrong     uint64 // completions that no conforming device posts
	Ended     uint64 // device commands that have ended
	Failed    uint64 // requests that ended with the failure of the device
}

func (c *Counts) add(o *Counts) {
	c.Commands += o.Commands
	c.Native += o.Native
	c.Mapped += o.Mapped
	c.Bounced += o.Bounced
	c.Full += o.Full
	c.Reissued += o.Reissued
	c.Doorbells += o.Doorbells
	c.Batches += o.Batches
	c.Kicks += o.Kicks
	c.Wrong += o.Wrong
	c.Ended += o.Ended
	c.Failed += o.Failed
}

const (
	// depth is how many commands a pair has under way at the most.
	depth = 255
	// devicePage is CC.MPS in bytes.
	devicePage = shm.PageSize
	// extra is the memory of a pair beside its rings: a page for each slot, one of zeroes, and buffers for copies.
	listBytes = (depth + 1) * devicePage
	extra     = listBytes + bounceCount*bounceSize
)

// open takes the pair that p is on from now on. The Pairs' mu is held.
func (p *mux) open(hw *Pair) error {
	var err error
	posted := make(phases, hw.Size)
	for i := range posted {
		if posted[i], err = hw.cq.Word64(uint64(i)*ring.CQESize + 8); err != nil {
			return err
		}
	}
	n := hw.Size - 1
	bounce := make([]*bounceBuffer, bounceCount)
	for i := range bounce {
		if bounce[i], err = newBounceBuffer(hw.Mem, hw.ExtraAt+listBytes+uint64(i)*bounceSize); err != nil {
			return err
		}
	}
	zeroes := make([]uint64, devicePage/8)
	for i := range zeroes {
		zeroes[i] = hw.Mem.IOVAOf(hw.ExtraAt + depth*devicePage)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hw, p.q, p.rings = hw, hw.Q, 0
	p.cmds, p.slots = make([]nvme.Command, n), make([]slot, n)
	p.zeroes, p.bounce = zeroes, bounce
	p.posted.Store(&posted)
	p.next.Store(1)
	return nil
}

func (p *mux) list(slot uint16) list {
	off := p.hw.ExtraAt + uint64(slot)*devicePage
	mem, _ := p.hw.Mem.Bytes(off, devicePage) // it has a page for each slot
	return list{mem, p.hw.Mem.IOVAOf(off)}
}

// ready says whether a CQE has been posted. It takes no lock and may be wrong about a pair that others use.
func (p *mux) ready() bool {
	n := p.next.Load()
	const phaseBit = 48
	w := p.posted.Load()
	return w != nil && uint32((*w)[n>>1].Load()>>phaseBit)&1 == n&1
}

// passed notes that n CQEs were taken.
func (p *mux) passed(n int) {
	at := p.next.Load()
	i, phase := at>>1+uint32(n), at&1
	if i >= uint32(len(p.slots))+1 {
		i, phase = i-uint32(len(p.slots))-1, phase^1
	}
	p.next.Store(i<<1 | phase)
}

// issue makes device commands of r until it has all or there is no room. It returns false if there is more to do. mu is held.
func (p *mux) issue(r *Request) bool {
	if r.q.slice.Is.gone() {
		r.fail(elsewhere)
	}
	for r.Status.OK() && (r.left > 0 || !r.begun) {
		i, ok := p.q.Take(0)
		if !ok {
			return false
		}
		s := &p.slots[i]
		n, st := p.build(r, i, s)
		if n == 0 || !st.OK() {
			p.q.Cancel(i)
			if st.OK() {
				return false
			}
			r.fail(st)
			break
		}
		s.req, s.tries = r, 0
		p.q.Push(i, &p.cmds[i])
		r.RealQID, r.RealCID = p.hw.QID, p.cmds[i].CID
		r.q.counts.Commands++
		if r.Op == Command {
			r.q.counts.Native++
		}
		r.out++
		r.begun = true
		if r.left > 0 {
			r.left -= n
			r.at.advance(r.Vec, n)
		}
	}
	if r.out == 0 && !r.waits { // otherwise it is still in the line
		p.finish(r)
	}
	return true
}

// build makes p.cmds[i] the next command of r, and returns how many bytes it is about, at least 1. 0 without a status says that there is no buffer
// for a copy.
func (p *mux) build(r *Request, i uint16, s *slot) (n uint64, st nvme.Status) {
	sl, cmd := &r.q.slice, &p.cmds[i]
	*cmd = nvme.Command{NSID: sl.NSID}
	switch r.Op {
	case Read:
		cmd.Opcode = nvme.IORead
		return p.transfer(r, i, s)
	case Write:
		cmd.Opcode = nvme.IOWrite
		return p.transfer(r, i, s)
	case Flush:
		cmd.Opcode = nvme.IOFlush
		return 1, nvme.StatusSuccess
	case WriteZeroes:
		n = p.writeZeroes(r, i)
		return n, nvme.StatusSuccess
	case Discard:
		n = min(r.left, sl.MaxDiscard)
		sl.discard(cmd, r, n, p.list(i))
		return n, nvme.StatusSuccess
	}
	cmd.Opcode = r.Cmd.Opcode
	switch cmd.Opcode {
	case nvme.IOCompare:
		return p.transfer(r, i, s)
	case nvme.IODSM:
		return max(r.left, 1), sl.ranges(cmd, r, p.list(i))
	case nvme.IOCopy:
		return max(r.left, 1), sl.copy(cmd, r, p.list(i))
	case nvme.IOVerify, nvme.IOWriteUncorrectable:
		n = sl.piece(r, r.left)
		hints(cmd, r)
		if cmd.CDW13 = 0; cmd.Opcode == nvme.IOWriteUncorrectable {
			cmd.CDW12 = 0
		}
		sl.blocks(cmd, r, n)
		return n, nvme.StatusSuccess
	}
	return 0, nvme.StatusInvalidOpcode.WithDNR()
}

// transfer is build for commands that move data.
func (p *mux) transfer(r *Request, i uint16, s *slot) (uint64, nvme.Status) {
	sl, cmd := &r.q.slice, &p.cmds[i]
	hints(cmd, r)
	n := sl.piece(r, sl.MaxTransfer)
	got := r.q.point(cmd, r.Vec, r.at, n, p.list(i))
	if got < n && got > 0 {
		if w := sl.whole(r, got); w < got { // through a buffer if it is within the first unit
			cmd.Flags, got = 0, w
			if w > 0 {
				got = r.q.point(cmd, r.Vec, r.at, w, p.list(i))
			}
		}
	}
	if got > 0 {
		r.q.counts.Mapped++
		sl.blocks(cmd, r, got)
		return got, nvme.StatusSuccess
	}
	last := len(p.bounce) - 1
	if last < 0 {
		return 0, nvme.StatusSuccess
	}
	b := p.bounce[last]
	if n > bounceSize {
		n = sl.whole(r, bounceSize)
	}
	if r.Op == Read {
		clear(b.mem[:n]) // of other guests' data, should the device not move what it says that it has
	} else if st := b.fill(r.Vec, r.at, n); !st.OK() {
		return 0, st
	}
	p.bounce = p.bounce[:last]
	s.bounce, s.at, s.n = b, r.at, n
	pointAt(cmd, b.pages, devicePage, n, p.list(i))
	r.q.counts.Bounced++
	sl.blocks(cmd, r, n)
	return n, nvme.StatusSuccess
}

// writeZeroes is build for write zeroes: the device's own, or writes of zeroes.
func (p *mux) writeZeroes(r *Request, i uint16) (n uint64) {
	sl, cmd := &r.q.slice, &p.cmds[i]
	if sl.Zeroes {
		cmd.Opcode = nvme.IOWriteZeroes
		hints(cmd, r)
		cmd.CDW13 = 0
		if r.Dealloc && sl.Dealloc {
			cmd.CDW12 |= nvme.RWDeallocate
		}
		n = sl.piece(r, sl.MaxZeroes)
	} else {
		cmd.Opcode = nvme.IOWrite
		hints(cmd, r)
		n = sl.piece(r, min(sl.MaxTransfer, uint64(len(p.zeroes))*devicePage))
		pointAt(cmd, p.zeroes, devicePage, n, p.list(i))
	}
	sl.blocks(cmd, r, n)
	return n
}

// fail keeps the first error of a request.
func (r *Request) fail(st nvme.Status) {
	if r.Status.OK() {
		r.Status = st
	}
}

// finish hands r to its queue. mu is held.
func (p *mux) finish(r *Request) {
	q := r.q
	q.ready.push(r)
	if !q.wake {
		q.wake = true
		p.woken = append(p.woken, q)
	}
}

// visible are the bits of a device's status that mean something to a guest: it has neither the device's error log nor its retry times.
const visible = ^(nvme.Status(1)<<13 | nvme.Status(3)<<11)

// complete takes a completion. mu is held.
func (p *mux) complete(c *queue.Completion) {
	s := &p.slots[c.Slot]
	r, st := s.req, c.Status&visible
	if st.OK() {
		st = nvme.StatusSuccess // whatever other bits it has
	}
	if s.bounce != nil {
		if r.Op == Read && st.OK() {
			st = s.bounce.empty(r.Vec, s.at, s.n)
		}
		p.bounce = append(p.bounce, s.bounce)
		s.bounce = nil
	}
	s.req = nil
	p.counts.Ended++
	p.ended(r, st, c.Result)
}

// ended takes the end of a device command of r.
func (p *mux) ended(r *Request, st nvme.Status, result uint32) {
	r.fail(st)
	r.DW0 = result
	if r.out--; r.out == 0 && !r.waits {
		p.finish(r)
	}
}

// reap takes what the device has completed, and goes on with what waited for that. mu is held.
func (p *mux) reap() {
	if p.paused || p.q == nil {
		return
	}
	for {
		n, err := p.q.Reap(p.out[:])
		for i := range p.out[:n] {
			p.complete(&p.out[i])
		}
		if n > 0 {
			p.passed(n)
		}
		if err != nil {
			p.broken(err)
			return
		}
		if n < len(p.out) {
			break
		}
	}
	if len(p.waiting) > 0 {
		p.pump()
		p.publish(&p.counts)
	}
}

// pump lets those that wait take turns, a request each, until there is no room. mu is held.
func (p *mux) pump() {
	for stuck := 0; stuck < len(p.waiting) && p.q.Free() > 0; {
		q := p.waiting[0]
		copy(p.waiting, p.waiting[1:])
		p.waiting = p.waiting[:len(p.waiting)-1]
		r := q.line.first
		before := r.left
		if p.issue(r) {
			q.line.pop()
			if r.waits = false; r.out == 0 {
				p.finish(r)
			}
			stuck = 0
		} else if r.left == before {
			stuck++ // there is no buffer
		}
		if q.line.first != nil {
			p.waiting = append(p.waiting, q)
		}
	}
}

// publish shows the device what was issued, and counts that in c. mu is held.
func (p *mux) publish(c *Counts) {
	c.Batches++
	if err := p.q.Publish(); err != nil {
		p.broken(err)
	}
	p.rang(c)
}

// rang counts the MMIO writes that have not been counted yet. mu is held.
func (p *mux) rang(c *Counts) {
	if p.q == nil {
		return
	}
	n := p.q.Rings()
	c.Doorbells += n - p.rings
	p.rings = n
}

// broken stops the pair until its device was reset. mu is held.
func (p *mux) broken(err error) {
	if errors.Is(err, queue.ErrProtocol) {
		p.counts.Wrong++
	}
	p.paused = true
	p.hw.Trouble(err)
}
