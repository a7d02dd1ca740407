package load

import "math/rand/v2"

// ledger knows what each block of a job's own region must hold, and which blocks are under way. A job never
// reads a block that it is writing, nor writes one that it is reading or writing, so that every block
// has exactly one right content when it is read. Between jobs there is nothing to know: their regions
// are disjoint, and a block that ends up in another job's region carries its address with it.
type ledger struct {
	start     uint64 // first LBA of the region
	blockSize int    // bytes
	run       uint64
	gen       []uint32 // last generation written, with unknown if the block may hold something else
	busy      []uint16 // reads under way, or writing
}

const (
	unknown = 1 << 31    // in a generation: never written in this run, or the last write failed
	writing = ^uint16(0) // a busy count
)

func newLedger(start, blocks uint64, blockSize int, run uint64) *ledger {
	l := &ledger{start: start, blockSize: blockSize, run: run, gen: make([]uint32, blocks), busy: make([]uint16, blocks)}
	for i := range l.gen {
		l.gen[i] = unknown
	}
	return l
}

// newRun returns the number that tells this run's data from all other.
func newRun() uint64 { return rand.Uint64() }

// claim reserves blocks for a read or a write, or returns false if one of them is under way in a
// way that would make its content ambiguous.
func (l *ledger) claim(write bool, lba uint64, blocks uint32) bool {
	busy := l.busy[lba-l.start:][:blocks]
	for _, n := range busy {
		if n != 0 && (write || n >= writing-1) {
			return false
		}
	}
	for i := range busy {
		if write {
			busy[i] = writing
		} else {
			busy[i]++
		}
	}
	return true
}

// release ends a claim.
func (l *ledger) release(write bool, lba uint64, blocks uint32) {
	busy := l.busy[lba-l.start:][:blocks]
	for i := range busy {
		if write {
			busy[i] = 0
		} else {
			busy[i]--
		}
	}
}

// prepareWrite puts the next generation of the claimed blocks into data.
func (l *ledger) prepareWrite(data []byte, lba uint64, blocks uint32) {
	for i := range uint64(blocks) {
		g := &l.gen[lba+i-l.start]
		// A failed write counts too: what it may have left must not pass for the next one's.
		*g = (*g&^unknown + 1) &^ unknown
		fillBlock(data[int(i)*l.blockSize:][:l.blockSize], lba+i, uint64(*g), l.run)
	}
}

// prepareRead makes data unfit to be taken for what the read brings.
func (l *ledger) prepareRead(data []byte, blocks uint32) {
	for i := range int(blocks) {
		poisonBlock(data[i*l.blockSize:][:l.blockSize])
	}
}

// failedWrite records that nobody knows what the blocks hold.
func (l *ledger) failedWrite(lba uint64, blocks uint32) {
	for i := range uint64(blocks) {
		l.gen[lba+i-l.start] |= unknown
	}
}

// check compares what was read with what it must be, and calls bad for each block that differs.
func (l *ledger) check(data []byte, lba uint64, blocks uint32, bad func(*Mismatch)) {
	for i := range uint64(blocks) {
		gen := l.gen[lba+i-l.start]
		if gen&unknown != 0 {
			continue
		}
		if m := checkBlock(data[int(i)*l.blockSize:][:l.blockSize], lba+i, uint64(gen), l.run); m != nil {
			bad(m)
		}
	}
}
