package main

import (
	"sync/atomic"
	"unsafe"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
)

// The mutations: dbbuf's operations with one barrier taken out. On x86-64 a plain store waits in the
// store buffer while the load after it is already done, which is the one reordering that this
// architecture has, and the one that the handshake must not have.
//
// What differs from shared/dbbuf is marked MUTATED.

func newPublisher(mutate string, word, ei *atomic.Uint32, ring func(uint32) error) publisher {
	switch mutate {
	case "driver", "quiet-driver":
		return &mutatedPublisher{word: word, ei: ei, ring: ring, tail: mutate == "driver", quiet: mutate == "quiet-driver"}
	}
	return dbbuf.NewShadow(word, ei, ring)
}

func newPoller(mutate string, word, ei *atomic.Uint32, size uint32) poller {
	p := dbbuf.NewPoller(word, ei, size)
	switch mutate {
	case "device":
		return &mutatedArm{p, word, ei}
	case "quiet-device":
		return &mutatedQuiet{p, word}
	}
	return p
}

// plainStore is a store and nothing else.
func plainStore(w *atomic.Uint32, v uint32) { *(*uint32)(unsafe.Pointer(w)) = v }

// mutatedPublisher is dbbuf.Publisher.
type mutatedPublisher struct {
	word, ei    *atomic.Uint32
	ring        func(uint32) error
	old, bits   uint32
	tail, quiet bool // which store is plain
}

func (p *mutatedPublisher) Publish(value uint32) error {
	old := p.old
	if value == old {
		return nil
	}
	p.old = value
	if p.tail {
		plainStore(p.word, value|p.bits) // MUTATED (R1)
	} else {
		p.word.Store(value | p.bits)
	}
	if !dbbuf.NeedEvent(p.ei.Load(), value, old) {
		return nil
	}
	return p.ring(value)
}

func (p *mutatedPublisher) SetQuiet(on bool) {
	bits := uint32(0)
	if on {
		bits = dbbuf.QuietBit
	}
	if bits == p.bits {
		return
	}
	p.bits = bits
	if p.quiet {
		plainStore(p.word, p.old|bits) // MUTATED
	} else {
		p.word.Store(p.old | bits)
	}
}

// mutatedArm is dbbuf.Poller with a plain store in Arm.
type mutatedArm struct {
	*dbbuf.Poller
	word, ei *atomic.Uint32
}

func (p *mutatedArm) Arm(consumed uint32) bool {
	plainStore(p.ei, consumed) // MUTATED (R2)
	return p.word.Load()&^dbbuf.QuietBit == consumed
}

// mutatedQuiet is dbbuf.Poller without the fence between the CQEs and the look at the quiet bit.
type mutatedQuiet struct {
	*dbbuf.Poller
	word *atomic.Uint32
}

func (p *mutatedQuiet) Quiet() bool {
	return p.word.Load()&dbbuf.QuietBit != 0 // MUTATED
}
