package hostnvme

import (
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

var _ User = (*mux)(nil)

// A command that is sent again too often after resets is taken for what makes the device need them, and ends with an error. A reset that comes
// when the device has had time for it counts more than one of a series.
const (
	maxTries  = 40
	slowTry   = 16
	slowAfter = 100 * time.Millisecond
)

// failure is what guests get of a device that has failed: it will be no better if they ask again.
var failure = nvme.StatusInternalError.WithDNR()

// Pause is of User.
func (p *mux) Pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = true
}

// Stopped is of User.
func (p *mux) Stopped() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.q == nil {
		return
	}
	p.takeLast()
	p.q.Drop(func(uint64) {})
	for i := range p.slots {
		// A Copy that has been done in part may not be done again: it may have written what it is to read.
		if s := &p.slots[i]; s.req != nil && p.cmds[i].Opcode == nvme.IOCopy {
			p.drop(s, nvme.StatusInternalError)
		}
	}
	p.wakeOthers(nil, false)
}

// takeLast takes what the device has completed before it was stopped. mu is held.
func (p *mux) takeLast() {
	for p.q.Err() == nil {
		n, err := p.q.Reap(p.out[:])
		for i := range p.out[:n] {
			p.complete(&p.out[i])
		}
		if n == 0 || err != nil {
			return
		}
	}
}

// Resume is of User. What is sent again keeps its slot, which its lists belong to.
func (p *mux) Resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = false
	if p.q == nil {
		return
	}
	p.next.Store(1)
	p.q.Stamp()
	try := uint8(1)
	if time.Since(p.resumed) > slowAfter {
		try = slowTry
	}
	p.resumed = time.Now()
	for range p.slots {
		p.q.Take(0)
	}
	for i := len(p.slots) - 1; i >= 0; i-- {
		s := &p.slots[i]
		if s.req != nil {
			s.tries += try
			switch {
			case s.req.q.slice.Is.gone():
				p.drop(s, elsewhere)
			case s.tries > maxTries:
				p.drop(s, nvme.StatusInternalError)
			default:
				p.q.Push(uint16(i), &p.cmds[i])
				s.req.RealQID, s.req.RealCID = p.hw.QID, p.cmds[i].CID
				s.req.q.counts.Reissued++
				continue
			}
		}
		p.q.Cancel(uint16(i))
	}
	p.pump()
	p.publish(&p.counts)
	p.wakeOthers(nil, false)
}

// drop ends the command of s without the device. mu is held.
func (p *mux) drop(s *slot, st nvme.Status) {
	r := s.req
	if s.bounce != nil {
		p.bounce = append(p.bounce, s.bounce)
		s.bounce = nil
	}
	s.req = nil
	p.ended(r, st, 0)
}

// Fail is of User.
func (p *mux) Fail(error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rang(&p.counts)
	p.failed, p.paused, p.q = failure, true, nil
	p.posted.Store(nil)
	for i := range p.slots {
		if s := &p.slots[i]; s.req != nil {
			s.req.q.counts.Failed++
			p.drop(s, failure)
		}
	}
	for _, q := range p.waiting {
		for r := q.line.pop(); r != nil; r = q.line.pop() {
			q.counts.Failed++
			r.waits = false
			r.fail(failure)
			p.finish(r)
		}
	}
	p.waiting = p.waiting[:0]
	p.wakeOthers(nil, false)
}

// Check is of User.
func (p *mux) Check() (ended uint64, busy bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.q == nil {
		return p.counts.Ended, false
	}
	if err := p.q.Err(); err != nil {
		p.hw.Trouble(err) // once more, if it has not been heard
	}
	if p.paused {
		return p.counts.Ended, false
	}
	if p.q.Outstanding() > 0 {
		p.reap()
		p.wakeOthers(nil, false)
	}
	if p.paused {
		return p.counts.Ended, false
	}
	if err := p.q.Check(); err != nil {
		p.broken(err)
	}
	return p.counts.Ended, p.q.Outstanding() > 0
}
