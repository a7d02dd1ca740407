package ctrl

import (
	"errors"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Memory that the client takes from under an enabled controller, and gives back.
//
// QEMU unmaps all of a guest's memory and maps nearly the same again whenever the guest changes how its memory looks, for
// instance when SeaBIOS write-protects itself, with its NVMe driver at work. So the admin queue is parked: it keeps heads, tails
// and phase, and nothing touches its memory, until all of it is there again. Doorbells fall back to the registers meanwhile
// (R25). The data path does the same for the I/O queues. A driver whose memory never comes back has a controller
// that does nothing, until it resets it.

// MemoryLost says that the client is unmapping [iova, iova+size); a size of 0, or an end beyond 2^64, means
// all above iova. When it returns nothing here refers to that memory.
func (c *Controller) MemoryLost(iova, size uint64) {
	last := iova + size - 1
	if size == 0 || last < iova {
		last = ^uint64(0)
	}
	lost := func(at, n uint64) bool { return at <= last && at+n-1 >= iova }
	if c.pages.shadow != nil && (lost(c.pages.shadowIOVA, uint64(c.pageSize)) || lost(c.pages.eiIOVA, uint64(c.pageSize))) {
		c.dropDoorbellPages()
	}
	if a := &c.admin; c.ready && !a.parked && (lost(c.regs.asq, a.sqBytes()) || lost(c.regs.acq, a.cqBytes())) {
		a.park()
		c.log.debug("admin queue parked: the client unmapped its memory")
	}
}

// MemoryGained says that the client has mapped something: what was parked for lack of it goes on.
func (c *Controller) MemoryGained() {
	if c.pages.away {
		c.resumeDoorbellPages()
	}
	if !c.ready || !c.admin.parked {
		return
	}
	switch err := c.unparkAdmin(); {
	case err == nil:
		c.log.debug("admin queue goes on")
		c.cfg.Wake() // R27: what was rung meanwhile
	case !errors.Is(err, errAdminMemory): // which is still to come
		c.fatal("admin queue", err)
	}
}

// Hold keeps the controller from touching guest memory of its own accord, as it must when it is not bus master or not in D0; without
// on it goes on with what was rung meanwhile. The data path is held by itself.
func (c *Controller) Hold(on bool) {
	if c.held = on; !on {
		c.cfg.Wake()
	}
}

func (a *adminQueue) sqBytes() uint64 { return uint64(a.sq.Size()) * ring.SQESize }
func (a *adminQueue) cqBytes() uint64 { return uint64(a.cq.Size()) * ring.CQESize }

// park lets go of the queue's memory.
func (a *adminQueue) park() {
	a.sq.Detach()
	a.cq.Detach()
	a.release()
	a.parked = true
}

// release gives the queue's memory back.
func (a *adminQueue) release() {
	for _, m := range []*shm.Region{a.sqMem, a.cqMem} {
		if m != nil {
			_ = m.Close() // munmap of what was mapped cannot fail
		}
	}
	a.sqMem, a.cqMem = nil, nil
}

var errAdminMemory = errors.New("its memory is not all there")

func (c *Controller) unparkAdmin() (err error) {
	a := &c.admin
	sqMem, err := c.mem.View(c.regs.asq, a.sqBytes())
	if err != nil {
		return errors.Join(errAdminMemory, err)
	}
	cqMem, err := c.mem.View(c.regs.acq, a.cqBytes())
	if err != nil {
		return errors.Join(errAdminMemory, err, sqMem.Close())
	}
	a.sqMem, a.cqMem = sqMem, cqMem
	if err := errors.Join(a.sq.Attach(sqMem), a.cq.Attach(cqMem)); err != nil {
		return err
	}
	a.parked = false
	return nil
}

// dropDoorbellPages goes back to the registers because the pages are about to go.
func (c *Controller) dropDoorbellPages() {
	c.detachDoorbellPages()
	c.pages.away = true
	c.log.debug("doorbells back to registers: the client unmapped their pages")
}

// forgetDoorbellPages goes back to the registers for good, as if there had never been pages.
func (c *Controller) forgetDoorbellPages() {
	if c.pages.shadow != nil {
		c.detachDoorbellPages()
	}
	c.pages = doorbellPages{}
}

func (c *Controller) detachDoorbellPages() {
	if err := c.dp.SetDoorbellPages(nil, nil); err != nil {
		c.fatal("doorbell pages cannot be dropped", err)
	}
	c.pages.release()
	c.admin.tail.detach()
	c.admin.head.detach()
}

// resumeDoorbellPages goes back to pages that were dropped, if both are there again. The driver has used them all the time: they are
// read, not seeded.
func (c *Controller) resumeDoorbellPages() {
	p := &c.pages
	shadow, err := c.doorbellPage(p.shadowIOVA)
	if err != nil {
		return
	}
	ei, err := c.doorbellPage(p.eiIOVA)
	if err != nil {
		_ = shadow.Close()
		return
	}
	shadowSQ, shadowCQ, err1 := dbbuf.Slots(shadow, 0, c.cfg.DSTRD)
	eiSQ, eiCQ, err2 := dbbuf.Slots(ei, 0, c.cfg.DSTRD)
	if err := errors.Join(err1, err2, c.dp.ResumeDoorbellPages(shadow, ei)); err != nil {
		c.log.warn("doorbell pages cannot be used again", "error", err)
		_ = errors.Join(shadow.Close(), ei.Close())
		return
	}
	p.shadow, p.ei, p.away = shadow, ei, false
	c.admin.tail.reattach(shadowSQ, eiSQ)
	c.admin.head.reattach(shadowCQ, eiCQ)
	c.log.debug("doorbell pages in use again")
	c.cfg.Wake()
}
