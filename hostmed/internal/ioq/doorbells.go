package ioq

import (
	"errors"
	"fmt"

	"github.com/shadowbell/shadowbell/hostmed/internal/broken"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// SetDoorbellPages moves every doorbell to the pages, or, with nil, back to the registers. Each queue is switched on
// its worker's thread, between two rounds: seeded from its current value, then
// polled (R23, R25).
func (c *Controller) SetDoorbellPages(shadow, ei *shm.Region) error {
	return c.moveDoorbells(shadow, ei, true)
}

// ResumeDoorbellPages puts the doorbells back on pages that were taken away and that the driver has gone on using: only the
// slots of queues that are newer are seeded.
func (c *Controller) ResumeDoorbellPages(shadow, ei *shm.Region) error {
	return c.moveDoorbells(shadow, ei, false)
}

func (c *Controller) moveDoorbells(shadow, ei *shm.Region, seed bool) error {
	if shadow != nil {
		if _, _, _, _, err := c.words(shadow, ei, c.cfg.MaxQueues); err != nil {
			return err // R29: before anything has changed (R26)
		}
	}
	var errs []error
	c.each(func(w *Worker, g *group) {
		for _, s := range g.sqs {
			tail, _, tailEI, _, err := c.words(shadow, ei, s.qid)
			if err != nil {
				errs = append(errs, err)
				return
			}
			if seed || s.fresh {
				tail.Store(s.tail.Load())
			}
			s.fresh = false
			s.tail = s.tail.Move(tail, tailEI)
		}
		_, head, _, headEI, err := c.words(shadow, ei, g.qid)
		if err != nil {
			errs = append(errs, err)
			return
		}
		if seed || g.fresh {
			head.Store(g.head.Load())
		}
		g.fresh = false
		g.head = g.head.Move(head, headEI)
		if g.state == Armed || g.state == Polling {
			w.resume(g)
		}
	})
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	c.away = shadow == nil && c.shadow != nil
	c.shadow, c.ei = shadow, ei
	c.shared.Store(shadow != nil)
	return nil
}

// Doorbell takes a write of value to the doorbell registers at byte off from their start. It is called on the home
// worker's thread w. With a shared page the write is only a kick, whose value does not count (R15, R17).
func (c *Controller) Doorbell(w *Worker, off uint64, value uint32) {
	stride := uint64(4) << (c.cfg.DSTRD & 0xf)
	index := off / stride
	qid := index / 2
	if off%stride != 0 || qid >= uint64(len(c.sqs)) {
		c.cfg.OnError(QueueError{QID: uint16(min(qid, 0xffff)), Kind: NoQueue, Err: fmt.Errorf("doorbell write at offset %#x", nvme.DoorbellBase+off)})
		return
	}
	cq := index%2 == 1
	if cq && c.pin.on.Load() {
		c.pin.rang()
	}
	if qid == 0 {
		c.adminKicks[index].Add(1)
		c.adminRung[index].Store(value)
		c.admin[index].Store(value)
		c.cfg.OnAdmin()
		return
	}
	g := c.cqs[qid].Load()
	s := c.sqs[qid].Load()
	if !cq {
		if g = nil; s != nil {
			g = s.g
		}
	}
	if g == nil {
		c.cfg.OnError(QueueError{QID: uint16(qid), Kind: NoQueue, Err: fmt.Errorf("doorbell write for queue %d, which does not exist", qid)})
		return
	}
	c.rung[index%2].Add(1)
	if !c.shared.Load() {
		if cq && value >= g.prod.Size() {
			// A head is looked at when the CQ has no room, which may be never; this one is to be reported (R30).
			g.w.post(func() { g.w.badHead(g, value) })
			return
		}
		if x, err := c.bells.Word32(off); err == nil {
			x.Store(value)
		}
	}
	if cq {
		g.kicks.Add(1)
		g.rung.Store(value)
	} else {
		s.kicks.Add(1)
		s.rung.Store(value)
		s.rang.Store(true)
	}
	if w.trace != nil {
		w.traceKick(g, uint16(qid), cq, value)
	}
	if !cq && broken.On(broken.DropKick) {
		return
	}
	if g.w == w {
		w.rung(g)
	} else {
		g.kick()
	}
}
