package dbbuf

import "sync/atomic"

// Poller is the device's half of one doorbell. It belongs to the worker that owns the
// queue. The device writes event indices only; the doorbell is the driver's (R18).
type Poller struct {
	word *atomic.Uint32
	ei   *atomic.Uint32 // nil: there is no event index, every doorbell write is a message
	size uint32         // entries of the ring
	lap  uint32         // consumed index at which ei was last published
	seen uint32         // doorbell as last loaded
	put  uint32         // ei as last stored

	fence atomic.Uint32 // private: an operation on it is a full barrier

	// Armed counts Arm calls that said yes, and Lost those that said no.
	Armed, Lost uint64
	// Index is what the last Arm stored, and Saw the doorbell that it loaded then.
	Index, Saw uint32
}

// NewPoller returns a Poller of a ring of size entries over a doorbell word and, where the
// page is shared, its event index.
func NewPoller(word, ei *atomic.Uint32, size uint32) *Poller {
	return &Poller{word: word, ei: ei, size: size}
}

// Load returns the doorbell's value as it stands, unchecked. Entries below a tail may be read after it (R4).
func (p *Poller) Load() uint32 {
	p.seen = p.word.Load()
	return p.seen
}

// Peek is Load for somebody who only looks.
func (p *Poller) Peek() uint32 { return p.word.Load() }

// Move returns a Poller of the same ring over other words, which keeps the counts.
func (p *Poller) Move(word, ei *atomic.Uint32) *Poller {
	n := &Poller{word: word, ei: ei, size: p.size, Armed: p.Armed, Lost: p.Lost, Index: p.Index, Saw: p.Saw}
	if ei != nil {
		n.put = ei.Load()
	}
	return n
}

// Put returns what was last stored as event index, or, since Move, found as one.
func (p *Poller) Put() uint32 { return p.put }

// Asked returns the index for which the driver was last asked to ring, and false where there is no event index. It is for diagnosis.
func (p *Poller) Asked() (uint32, bool) {
	if p.ei == nil {
		return 0, false
	}
	return p.ei.Load(), true
}

// Behind keeps the driver from ringing while the device polls: it publishes one
// behind the consumed index, which the driver cannot reach before it laps the
// ring. It stores only when the driver has come a quarter of the ring further since the last time, so that the
// driver keeps the line of its event index; once a lap would be enough (R14). The device calls it after it has fetched
// and before it completes: a driver that keeps the ring full goes on only after that.
func (p *Poller) Behind(consumed uint32) {
	if p.ei == nil {
		return
	}
	seen := p.seen &^ QuietBit
	come := seen - p.lap
	if seen < p.lap {
		come += p.size
	}
	if come*4 >= p.size {
		p.BehindNow(consumed)
	}
}

// BehindNow is Behind without the quarter: for the moment when a queue begins to be polled.
func (p *Poller) BehindNow(consumed uint32) {
	if p.ei == nil {
		return
	}
	p.lap = consumed
	behind := consumed - 1
	if consumed == 0 {
		behind = p.size - 1
	}
	p.put = behind
	p.ei.Store(behind)
}

// Ask publishes an event index that is none of the others': for tests that break the rules.
func (p *Poller) Ask(index uint32) {
	if p.ei != nil {
		p.put = index
		p.ei.Store(index)
	}
}

// Arm asks the driver to ring for the next value and reports whether the doorbell
// still stood at consumed afterwards. Only on true may the device sleep (R2, R3);
// pairs with Publish in driver.go.
func (p *Poller) Arm(consumed uint32) bool {
	if p.ei != nil {
		p.put = consumed
		p.ei.Swap(consumed)
	}
	p.Index, p.Saw = consumed, p.word.Load()&^QuietBit
	if p.Saw == consumed {
		p.Armed++
		return true
	}
	p.Lost++
	return false
}

// Quiet reports whether the driver polls and wants no interrupt for the CQEs that have been stored
// before the call. Those stores are no barrier, so Quiet begins with one; pairs with
// SetQuiet in driver.go.
func (p *Poller) Quiet() bool {
	p.fence.Add(1)
	return p.word.Load()&QuietBit != 0
}
