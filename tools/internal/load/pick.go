package load

import (
	"fmt"
	"math/bits"
	"math/rand/v2"

	"github.com/shadowbell/shadowbell/tools/internal/size"
)

// geometry is what the load needs to know of controller and namespace; 0 for maxTransfer means no limit.
type geometry struct {
	blockSize, size, maxTransfer, maxEntries uint64 // bytes, bytes, bytes, ring entries
}

// plan is a Config fitted to a geometry: everything in blocks.
type plan struct {
	cfg       Config
	blockSize int
	span      uint64   // blocks in use, from 0
	perJob    uint64   // blocks of each job's region
	align     uint64   // blocks: addresses are multiples of it
	sizes     []uint32 // blocks
	slotSize  int      // bytes of buffer for each command
	ringDepth uint32   // commands that the ring has room for
	run       uint64   // names the run in patterns
}

func makePlan(c Config, g geometry) (*plan, error) {
	p := &plan{cfg: c, blockSize: int(g.blockSize), run: newRun()}
	smallest := c.Sizes[0]
	for _, s := range c.Sizes {
		switch {
		case uint64(s)%g.blockSize != 0:
			return nil, fmt.Errorf("block size %v: the namespace has blocks of %v; use a multiple of it", s, size.Bytes(g.blockSize))
		case g.maxTransfer != 0 && uint64(s) > g.maxTransfer:
			return nil, fmt.Errorf("block size %v: the controller moves at most %v in one command", s, size.Bytes(g.maxTransfer))
		case uint64(s)/g.blockSize > 1<<16:
			return nil, fmt.Errorf("block size %v: one command has at most 65536 blocks of %v", s, size.Bytes(g.blockSize))
		}
		p.sizes = append(p.sizes, uint32(uint64(s)/g.blockSize))
		smallest = min(smallest, s)
	}
	p.align = uint64(smallest) / g.blockSize
	p.slotSize = int(c.Sizes.Max()+4095) &^ 4095

	if uint64(c.Depth)+1 > g.maxEntries {
		return nil, fmt.Errorf("queue depth %d: the controller's queues take at most %d commands", c.Depth, g.maxEntries-1)
	}
	// A ring that is longer than the load is deep is wrapped, and its event index moved, less often.
	p.ringDepth = uint32(min(max(2*uint64(c.Depth), ringRoom), g.maxEntries-1))

	span := uint64(c.Span)
	if span == 0 {
		if span = g.size; c.Verify {
			span = min(span, defaultSpan)
		}
	}
	if span > g.size {
		return nil, fmt.Errorf("span %v: namespace %d has %v", c.Span, c.NSID, size.Bytes(g.size))
	}
	p.span = span / g.blockSize
	p.perJob = p.span / uint64(c.Jobs) / p.align * p.align
	need := uint64(c.Sizes.Max()) / g.blockSize
	if p.span < need || p.ownRegion() && p.perJob < need {
		return nil, fmt.Errorf("%d jobs with blocks of %v do not fit into %v: use fewer jobs, smaller blocks or a larger namespace",
			c.Jobs, c.Sizes.Max(), size.Bytes(span))
	}
	return p, nil
}

// ownRegion reports whether each job keeps to a part of the span: always with patterns, and when addresses rise, so that
// jobs do not run through the same blocks one after the other.
func (p *plan) ownRegion() bool { return p.cfg.Verify || !p.cfg.Kind.Random() }

// region returns where job i works, in blocks.
func (p *plan) region(i int) (start, blocks uint64) {
	if !p.ownRegion() {
		return 0, p.span
	}
	return uint64(i) * p.perJob, p.perJob
}

// share returns what job i fills: its region, or its part of one that all have in common. The last share ends with the span.
func (p *plan) share(i int) (start, blocks uint64) {
	start, blocks = uint64(i)*p.perJob, p.perJob
	if !p.ownRegion() && i == p.cfg.Jobs-1 {
		blocks = p.span - start
	}
	return start, blocks
}

// picker chooses the next transfer.
type picker struct {
	start, blocks uint64 // the region
	sizes         []uint32
	places        []uint64 // how many aligned places the region has for each of sizes
	align         uint64
	random        bool
	writes, mixed bool   // mixed: a draw decides
	sweep         bool   // rising, once: the last transfer ends with the region
	pos           uint64 // next address, rising
	state         uint64 // xorshift64*; never 0
}

func newPicker(kind Kind, sizes []uint32, align, start, blocks uint64) *picker {
	p := &picker{start: start, blocks: blocks, sizes: sizes, align: align, random: kind.Random(),
		writes: kind.writes(), mixed: kind.writes() && kind.reads(), pos: start, state: rand.Uint64() | 1}
	for _, s := range sizes {
		p.places = append(p.places, (blocks-uint64(s))/align+1)
	}
	return p
}

// newSweep passes over the region once; it also returns in how many transfers.
func newSweep(write bool, largest uint32, start, blocks uint64) (*picker, uint64) {
	p := &picker{start: start, blocks: blocks, sizes: []uint32{largest}, writes: write, sweep: true, pos: start, state: 1}
	return p, (blocks + uint64(largest) - 1) / uint64(largest)
}

func (p *picker) draw() uint64 {
	x := p.state
	x ^= x >> 12
	x ^= x << 25
	x ^= x >> 27
	p.state = x
	return x * 0x2545_F491_4F6C_DD1D
}

// pick returns a transfer that is drawn at random.
func (p *picker) pick() (write bool, lba uint64, blocks uint32) {
	which := uint64(0)
	if len(p.sizes) > 1 {
		which, _ = bits.Mul64(p.draw(), uint64(len(p.sizes)))
	}
	if write = p.writes; p.mixed {
		write = p.draw()>>63 != 0
	}
	place, _ := bits.Mul64(p.draw(), p.places[which])
	return write, p.start + place*p.align, p.sizes[which]
}

// peek returns the next transfer of rising addresses; advance goes on behind it.
func (p *picker) peek() (write bool, lba uint64, blocks uint32) {
	which := 0
	if len(p.sizes) > 1 {
		which = int(p.state % uint64(len(p.sizes)))
	}
	blocks = p.sizes[which]
	if p.sweep {
		return p.writes, p.pos, uint32(min(uint64(blocks), p.start+p.blocks-p.pos))
	}
	if p.pos+uint64(blocks) > p.start+p.blocks {
		p.pos = p.start
	}
	return p.writes, p.pos, blocks
}

func (p *picker) advance(blocks uint32) {
	p.pos += uint64(blocks)
	p.draw()
}
