package ctrl

import (
	"errors"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Queue 0's doorbells, and the command that configures the doorbell pages.
//
// Drivers do not agree on queue 0 (R16): Linux and SPDK ring its registers and leave its slots alone; libvfn
// writes the slot and rings when the event index says so; some read the slot back. So, with a page:
//
//  1. A slot that holds anything but what was put there by this side was written by the driver. From then on the
//     slot is the one truth, and a register write is a kick without a value: it may be late, and would move the tail
//     back (R17).
//  2. Until then the register is the one truth, and each value of it is mirrored to the slot. The mirror is a
//     compare-and-swap, so that it cannot overwrite a driver that begins to use the slot.
//  3. Before AdminKick returns, both event indices are set to the values taken, and both doorbells
//     read once more. So a driver that looks at them rings for each value, and none is lost.
//
// Without a page, or while it is not mapped (R25), only step 2's first half is left.

// adminDoorbell is one doorbell of queue 0.
type adminDoorbell struct {
	value    uint32 // as last taken
	register uint32 // as last seen
	slot, ei *atomic.Uint32
	asked    uint32 // what ei was last set to
	mirrored uint32 // what the slot held when last seen or written
	owned    bool   // the driver writes the slot
}

// load returns the doorbell's value; it is not checked.
func (d *adminDoorbell) load(register *atomic.Uint32) uint32 {
	r := register.Load()
	moved := r != d.register
	d.register = r
	if d.slot != nil {
		if s := d.slot.Load(); s != d.mirrored {
			d.owned, d.mirrored, d.value = true, s, s
			return s
		}
		moved = moved && !d.owned
	}
	if moved {
		d.value = r
		if d.slot != nil && d.slot.CompareAndSwap(d.mirrored, r) {
			d.mirrored = r
		}
	}
	return d.value
}

// arm asks for a ring at the next value and reports whether there was none meanwhile. Pairs with the
// driver's store of the slot and load of the event index.
func (d *adminDoorbell) arm(register *atomic.Uint32) bool {
	taken := d.value
	if d.ei != nil {
		d.asked = taken
		d.ei.Store(taken)
	}
	return d.load(register) == taken
}

// attach puts the doorbell on a slot and seeds it (R23).
func (d *adminDoorbell) attach(slot, ei *atomic.Uint32) {
	d.slot, d.ei = slot, ei
	d.mirrored, d.owned, d.asked = d.value, false, d.value
	slot.Store(d.value)
	ei.Store(d.value)
}

// detach takes it off; the value stays.
func (d *adminDoorbell) detach() { d.slot, d.ei = nil, nil }

// reattach puts it back on a slot that was out of reach. What the driver stored there meanwhile counts.
func (d *adminDoorbell) reattach(slot, ei *atomic.Uint32) { d.slot, d.ei = slot, ei }

// doorbellPages are the pages in use; shadow is nil without.
type doorbellPages struct {
	shadow, ei         *shm.Region
	shadowIOVA, eiIOVA uint64
	away               bool // configured, but not mapped (parking.go)
}

// release gives the pages' memory back.
func (p *doorbellPages) release() {
	for _, m := range []*shm.Region{p.shadow, p.ei} {
		if m != nil {
			_ = m.Close() // munmap of what was mapped cannot fail
		}
	}
	p.shadow, p.ei = nil, nil
}

// doorbellBufferConfig is command 7Ch (NVMe Base 2.0c 5.8) and its forerunner C0h: PRP1 is the shadow doorbell
// page, PRP2 the event index page. Both are checked and mapped before anything changes, and a
// failure leaves the pages in use as they were (R24, R26).
func (c *Controller) doorbellBufferConfig(cmd *nvme.Command) result {
	bad := nvme.StatusInvalidField
	if cmd.Opcode == nvme.AdminDoorbellMemory2014 {
		bad = nvme.StatusDoorbellMemoryInvalid
	}
	size := uint64(c.pageSize)
	switch {
	case cmd.PRP1 == 0 || cmd.PRP1%size != 0:
		return fail(bad, inPRP1, "shadow page is 0 or not page aligned")
	case cmd.PRP2 == 0 || cmd.PRP2%size != 0:
		return fail(bad, inPRP2, "event index page is 0 or not page aligned")
	case cmd.PRP1 == cmd.PRP2:
		return fail(bad, inPRP2, "shadow and event index page are the same")
	}
	n := doorbellPages{shadowIOVA: cmd.PRP1, eiIOVA: cmd.PRP2}
	var err error
	if n.shadow, err = c.doorbellPage(cmd.PRP1); err != nil {
		return failErr(bad, inPRP1, "shadow page", err)
	}
	if n.ei, err = c.doorbellPage(cmd.PRP2); err != nil {
		n.release()
		return failErr(bad, inPRP2, "event index page", err)
	}
	shadowSQ, shadowCQ, err1 := dbbuf.Slots(n.shadow, 0, c.cfg.DSTRD)
	eiSQ, eiCQ, err2 := dbbuf.Slots(n.ei, 0, c.cfg.DSTRD)
	// The driver may be storing to a shadow page that is in use already: what it holds is not older than what would be put there.
	again := c.pages.shadowIOVA == cmd.PRP1
	move := c.dp.SetDoorbellPages
	if again {
		move = c.dp.ResumeDoorbellPages
	}
	if err := errors.Join(err1, err2, move(n.shadow, n.ei)); err != nil {
		n.release()
		return failErr(nvme.StatusInternalError, nowhere, "switching to the doorbell pages", err)
	}
	c.pages.release()
	c.pages = n
	c.history.configs++
	c.history.configEnable = c.history.enables
	if again {
		c.admin.tail.reattach(shadowSQ, eiSQ)
		c.admin.head.reattach(shadowCQ, eiCQ)
	} else {
		c.admin.tail.attach(shadowSQ, eiSQ)
		c.admin.head.attach(shadowCQ, eiCQ)
	}
	c.log.debug("doorbell pages configured", "command", nvme.AdminOpcodeName(cmd.Opcode))
	return result{}
}

// doorbellPage returns the page at iova, which must hold the slots of every queue there can be (R29).
func (c *Controller) doorbellPage(iova uint64) (*shm.Region, error) {
	page, err := c.mem.View(iova, uint64(c.pageSize))
	if err != nil {
		return nil, err
	}
	if _, _, err = dbbuf.Slots(page, c.cfg.MaxIOQueues, c.cfg.DSTRD); err != nil {
		return nil, errors.Join(err, page.Close())
	}
	return page, nil
}
