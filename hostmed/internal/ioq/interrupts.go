package ioq

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// How an interrupt reaches the client: an eventfd for each MSI-X vector, or one for the pin (INTx), as VFIO has them.
//
// An MSI-X vector is an edge. The pin is a level, which an eventfd is not: it is written once when the level rises, and then
// the pin masks itself, until the client says UNMASK; if the level still stands then, it is written again. The level
// stands while a CQ with interrupts on has completions that the driver has not given back (NVMe PCIe Transport 1.0c
// 3.5.1.1), which is looked up when somebody asks, and never kept.

// Vector is one MSI-X interrupt of a controller. It latches an interrupt that comes while there is no eventfd, because QEMU
// takes all eventfds away and gives them again each time the guest unmasks a vector, and while it is masked.
type Vector struct {
	fd      atomic.Int32 // -1: none, or masked
	pending atomic.Bool
	direct  atomic.Bool // not coalesced (feature 09h)
	held    held        // completions without an interrupt yet

	// The session's:
	given  int32 // the client's eventfd, -1: none
	masked Mask
}

// Mask is why a vector is masked.
type Mask uint8

// Who can mask a vector.
const (
	MaskClient   Mask = 1 << iota // SET_IRQS
	MaskTable                     // the vector's bit in the MSI-X table
	MaskFunction                  // the function's bit in the MSI-X capability
)

func (v *Vector) init() {
	v.fd.Store(-1)
	v.given = -1
}

// fire raises the interrupt, and otherwise latches it and returns false.
func (v *Vector) fire() bool {
	if fd := v.fd.Load(); fd >= 0 {
		writeEventFD(int(fd))
		return true
	}
	v.pending.Swap(true) // pairs with set, which stores the eventfd and then looks here
	if fd := v.fd.Load(); fd >= 0 && v.pending.CompareAndSwap(true, false) {
		writeEventFD(int(fd))
		return true
	}
	return false
}

// update puts the eventfd in force, or takes it out of force.
func (v *Vector) update() {
	fd := v.given
	if v.masked != 0 {
		fd = -1
	}
	v.fd.Swap(fd)
	if fd >= 0 && v.pending.CompareAndSwap(true, false) {
		writeEventFD(int(fd))
	}
}

// SetVectors gives the vectors from start the eventfds fds, and takes theirs from the rest of
// the n vectors from start. The controller owns the fds.
func (c *Controller) SetVectors(start int, fds []int, n int) {
	var old []int
	for i := range n {
		fd := -1
		if i < len(fds) {
			fd = fds[i]
		}
		if start+i >= len(c.vectors) {
			if fd >= 0 {
				old = append(old, fd)
			}
			continue
		}
		v := &c.vectors[start+i]
		if v.given >= 0 {
			old = append(old, int(v.given))
		}
		v.given = int32(fd)
		v.update()
	}
	c.retire(old...)
}

// retire closes eventfds that are in force no more.
func (c *Controller) retire(old ...int) {
	if len(old) == 0 {
		return
	}
	for _, w := range c.cfg.Workers {
		w.Call(func() {}) // after this no worker is writing to them
	}
	for _, fd := range old {
		unix.Close(fd)
	}
}

// MaskVectors masks n vectors from start, or unmasks them as far as why goes. What comes meanwhile is latched.
func (c *Controller) MaskVectors(start, n int, why Mask, on bool) {
	for i := start; i < min(start+n, len(c.vectors)); i++ {
		v := &c.vectors[i]
		if v.masked &^= why; on {
			v.masked |= why
		}
		v.update()
	}
}

// Pending says whether an interrupt of the vector is latched: its bit in the PBA.
func (c *Controller) Pending(vector int) bool {
	return vector < len(c.vectors) && c.vectors[vector].pending.Load()
}

// AnyVector says whether the client has given any vector an eventfd.
func (c *Controller) AnyVector() bool {
	for i := range c.vectors {
		if c.vectors[i].given >= 0 {
			return true
		}
	}
	return false
}

// Interrupt raises a vector, or the pin in its place.
func (c *Controller) Interrupt(vector uint16) {
	if int(vector) < len(c.vectors) && !c.vectors[vector].fire() && c.pin.on.Load() && c.unmasked(vector) {
		c.tryPin()
	}
}

// pin is INTx.
//
// QEMU (without KVM) takes any touch of the device for the end of the interrupt: it lowers its line and unmasks. That may be
// a submission by another CPU, while the interrupt handler is about to take the completions. If the pin were raised again for
// them, QEMU's line would go up for nothing just after the handler has rung the CQ head, and stay up until somebody
// touches the device: a storm, which ends with Linux switching the line off. So the pin is raised a second time only after a CQ
// head was rung, and otherwise a while later (OnPin), if none was rung until then.
type pin struct {
	fd     atomic.Int32 // -1: none
	on     atomic.Bool  // the function uses it: MSI-X is off, and INTx is not disabled
	masked atomic.Bool  // because it was raised, or by the client, until the client unmasks it
	raised atomic.Bool  // and no CQ head was rung since

	rung  atomic.Uint32 // CQ heads
	asked atomic.Uint64 // rung, and bit 32, when OnPin was called; 0: it was not, or is over
}

const askedBit = 1 << 32

// PinDelay is how long the pin waits for the driver to give completions back before it is raised for them once more: longer
// than an interrupt handler takes, also under emulation. Only an interrupt that was lost waits for so long.
const PinDelay = 20 * time.Millisecond

// raise raises the pin; false: not now, see above.
func (p *pin) raise(force bool) bool {
	fd := p.fd.Load()
	if fd < 0 || p.masked.Load() {
		return true // the client's unmasking asks again
	}
	if p.raised.Load() && !force {
		return false
	}
	if p.masked.CompareAndSwap(false, true) {
		p.raised.Store(true)
		writeEventFD(int(fd))
	}
	return true
}

// tryPin raises the pin now or later.
func (c *Controller) tryPin() {
	if c.pin.raise(c.cfg.OnPin == nil) {
		return
	}
	rung := c.pin.rung.Load()
	if now := askedBit | uint64(rung); c.pin.asked.Swap(now) != now {
		c.cfg.OnPin(rung, PinDelay)
	}
}

// unmasked says whether the vector's CQs may assert the pin. INTMS has a bit for each of the first 32.
func (c *Controller) unmasked(vector uint16) bool {
	return vector > 31 || c.cfg.InterruptMask == nil || c.cfg.InterruptMask()>>vector&1 == 0
}

// raisePin raises the pin for g, whose vector has no eventfd, if that is what the function uses.
func (w *Worker) raisePin(g *group) {
	if c := g.ctl; c.pin.on.Load() && c.unmasked(g.index) && w.unconsumed(g) {
		c.tryPin()
	}
}

// unconsumed reports whether g asserts the pin. A driver that takes the completions after this rings its CQ head, whatever the page
// says otherwise: QEMU holds the pin up until the guest touches the device.
func (w *Worker) unconsumed(g *group) bool {
	if !g.ien || uint32(g.vector.held.v.Load()) != 0 { // coalesced: not yet
		return false
	}
	w.current = g
	for range armTries { // the head may move while it is armed
		head := g.headDoorbell()
		if head == g.prod.Tail() {
			return false
		}
		if g.head.Arm(head) {
			return true
		}
	}
	return true
}

// armTries is far more than an honest driver moves its head while a store goes on.
const armTries = 64

// SetPin gives the pin its eventfd, -1 for none, and unmasks it. The controller owns the fd.
func (c *Controller) SetPin(fd int) {
	old := c.pin.fd.Swap(int32(fd))
	c.pin.masked.Store(false)
	c.pin.raised.Store(false)
	if old >= 0 {
		c.retire(int(old))
	}
}

// rang takes note of a CQ head doorbell.
func (p *pin) rang() {
	p.rung.Add(1)
	p.raised.Store(false)
}

// RaisePin raises the pin for no reason but the client's: a test of the wiring.
func (c *Controller) RaisePin() { c.pin.raise(true) }

// MaskPin masks the pin. CheckPin(true) unmasks it.
func (c *Controller) MaskPin() { c.pin.masked.Store(true) }

// UsePin says whether the function uses the pin. What it then latches for vectors may become one MSI-X interrupt too many, later.
func (c *Controller) UsePin(on bool) {
	if c.pin.on.Swap(on); on {
		for i := range c.vectors {
			c.vectors[i].pending.Store(false) // the level says it
		}
	}
}

// CheckPin raises the pin if its level stands; admin says whether queue 0 asserts it. It is called when anything
// else than a completion may have let it rise.
func (c *Controller) CheckPin(admin, unmask bool) {
	if unmask {
		// Before the queues are looked at: a completion that is posted after that finds it unmasked.
		c.pin.masked.Swap(false)
	}
	if c.pin.on.Load() && c.PinLevel(admin) {
		c.tryPin()
	}
}

// PinOverdue is CheckPin as OnPin asked for it. Without a CQ head rung since, the pin is raised again.
func (c *Controller) PinOverdue(admin bool, rung uint32) {
	c.pin.asked.CompareAndSwap(askedBit|uint64(rung), 0)
	if !c.pin.on.Load() || !c.PinLevel(admin) {
		return
	}
	if c.pin.rung.Load() == rung {
		c.pin.raise(true)
	} else {
		c.tryPin()
	}
}

// PinLevel returns the pin's level, whether the function uses it or not.
func (c *Controller) PinLevel(admin bool) bool {
	level := admin && c.unmasked(0)
	c.each(func(w *Worker, g *group) {
		if g.state != Failed && c.unmasked(g.index) && w.unconsumed(g) {
			level = true
		}
	})
	return level
}
