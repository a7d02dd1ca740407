package dbbuf

import "sync/atomic"

// Publisher is the driver's half of one doorbell: the only way to move an SQ tail or a CQ
// head (R6). It belongs to the queue's goroutine.
type Publisher struct {
	word *atomic.Uint32           // shadow or mapped doorbell; nil: every value is an MMIO write
	ei   *atomic.Uint32           // event index; nil: the device polls word
	ring func(value uint32) error // MMIO write of the doorbell register
	old  uint32                   // value last published; private, never read back (R19)
	bits uint32                   // QuietBit or 0

	// Rings counts MMIO writes, and Stores the values published.
	Rings, Stores uint64
}

// NewShadow returns a Publisher over a slot of the doorbell page and its event index. Both have
// been zeroed by the driver (R22, R28).
func NewShadow(word, ei *atomic.Uint32, ring func(uint32) error) *Publisher {
	return &Publisher{word: word, ei: ei, ring: ring}
}

// NewMapped returns a Publisher over a doorbell register that is mapped and that the device polls.
func NewMapped(word *atomic.Uint32) *Publisher { return &Publisher{word: word} }

// NewMMIO returns a Publisher that rings for each value.
func NewMMIO(ring func(uint32) error) *Publisher { return &Publisher{ring: ring} }

// Published returns the value last published.
func (p *Publisher) Published() uint32 { return p.old }

// Resume says value, which another Publisher of the same queue had come to, once more: where doorbells move, the
// device may have missed what was said in the old place meanwhile. It rings in any case.
func (p *Publisher) Resume(value uint32) error {
	p.old = value
	if p.word != nil {
		p.word.Swap(value | p.bits)
	}
	if p.ring == nil {
		return nil
	}
	p.Rings++
	return p.ring(value)
}

// Publish makes value, an index of the ring, visible to the device, and rings the MMIO doorbell
// where the device asked to be woken. Everything written before it is
// visible with it. An error is the MMIO write's.
func (p *Publisher) Publish(value uint32) error {
	old := p.old
	if value == old {
		return nil
	}
	p.old = value
	p.Stores++
	if p.word != nil {
		p.word.Swap(value | p.bits) // pairs with Arm in device.go
		if p.ei == nil || !NeedEvent(p.ei.Load(), value, old) {
			return nil
		}
	}
	p.Rings++
	return p.ring(value)
}

// SetQuiet asks the device not to interrupt for this CQ, or to interrupt again. It is
// for CQ heads only, with FeatureQuiet on. After SetQuiet(false) the driver looks at the CQ
// once more before it sleeps; pairs with Quiet in device.go.
func (p *Publisher) SetQuiet(on bool) {
	bits := uint32(0)
	if on {
		bits = QuietBit
	}
	if p.word == nil || bits == p.bits {
		return
	}
	p.bits = bits
	p.word.Swap(p.old | bits)
}

// Quiet reports what SetQuiet last said.
func (p *Publisher) Quiet() bool { return p.bits != 0 }
