package load

import (
	"encoding/binary"
	"fmt"
)

// A pattern fills one block (LBA) so that a reader can tell where it belongs and when it was written:
//
//	 0  magic
//	 8  block address (LBA)
//	16  generation: 1 for the first write of this block in this run, then rising
//	24  run: a random number, so that data of an earlier run is never taken for ours
//	32  words that follow from the three, each different, to the end
//
// Every 8-byte word of a block depends on all three, so a block that is mixed from two writes
// (torn) shows, at whatever word the cut is.
const (
	patternMagic  = 0x0059_4652_5645_4253 // "SBEVRFY" and a zero
	poison        = ^uint64(patternMagic)
	patternHeader = 32
	wordStep      = 0x9E37_79B9_7F4A_7C15 // odd, so that words repeat after 2^64 only
)

// mix spreads every bit of x over the result (the finisher of SplitMix64).
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xBF58_476D_1CE4_E5B9
	x = (x ^ x>>27) * 0x94D0_49BB_1331_11EB
	return x ^ x>>31
}

func patternSeed(lba, gen, run uint64) uint64 {
	return mix(mix(mix(lba+wordStep)^gen) ^ run)
}

// fillBlock writes the pattern to block, whose length is that of an LBA.
func fillBlock(block []byte, lba, gen, run uint64) {
	binary.LittleEndian.PutUint64(block[0:], patternMagic)
	binary.LittleEndian.PutUint64(block[8:], lba)
	binary.LittleEndian.PutUint64(block[16:], gen)
	binary.LittleEndian.PutUint64(block[24:], run)
	word := patternSeed(lba, gen, run)
	for body := block[patternHeader:]; len(body) >= 8; body = body[8:] {
		binary.LittleEndian.PutUint64(body, word)
		word += wordStep
	}
}

// poisonBlock makes sure that what block holds now cannot pass for what a read is to bring.
func poisonBlock(block []byte) {
	binary.LittleEndian.PutUint64(block[0:], poison)
}

// bodyDiffers returns the offset of the first word of block's body that does not follow from the
// three, or -1.
func bodyDiffers(block []byte, lba, gen, run uint64) int {
	word := patternSeed(lba, gen, run)
	for at := patternHeader; at+8 <= len(block); at += 8 {
		if binary.LittleEndian.Uint64(block[at:]) != word {
			return at
		}
		word += wordStep
	}
	return -1
}

// Fault is what is wrong with a block that was read.
type Fault uint8

// The faults, from the one that says least about where the data came from.
const (
	FaultNothing   Fault = iota // the read was reported as done and brought nothing
	FaultForeign                // not written in this run: the write never happened, or the data is older
	FaultMisplaced              // a whole block of this run, but of another address
	FaultStale                  // the right block, but an earlier write of it
	FaultFuture                 // the right block, but a write that was not done yet
	FaultTorn                   // parts of different writes, or damaged
)

func (f Fault) String() string {
	return [...]string{"the read brought nothing", "not written in this run", "misplaced", "stale", "ahead of its time", "torn"}[f]
}

// Mismatch describes one block that was not what it had to be. It is an error.
type Mismatch struct {
	Fault    Fault
	LBA, Gen uint64 // as expected
	GotLBA   uint64 // as the block itself says (not for FaultForeign)
	GotGen   uint64
	At       int // offset in the block of the first wrong byte's word (FaultTorn)
}

func (m *Mismatch) Error() string {
	s := fmt.Sprintf("lba %#x, generation %d: %v", m.LBA, m.Gen, m.Fault)
	switch m.Fault {
	case FaultMisplaced:
		return fmt.Sprintf("%s, it is lba %#x generation %d", s, m.GotLBA, m.GotGen)
	case FaultStale, FaultFuture:
		return fmt.Sprintf("%s, it is generation %d", s, m.GotGen)
	case FaultTorn:
		return fmt.Sprintf("%s from byte %d on, its header says lba %#x generation %d", s, m.At, m.GotLBA, m.GotGen)
	}
	return s
}

// checkBlock returns nil if block is what fillBlock wrote for the same three values.
func checkBlock(block []byte, lba, gen, run uint64) *Mismatch {
	magic, gotLBA := binary.LittleEndian.Uint64(block[0:]), binary.LittleEndian.Uint64(block[8:])
	gotGen, gotRun := binary.LittleEndian.Uint64(block[16:]), binary.LittleEndian.Uint64(block[24:])
	m := &Mismatch{LBA: lba, Gen: gen, GotLBA: gotLBA, GotGen: gotGen}
	if magic == poison {
		m.Fault = FaultNothing
		return m
	}
	if magic != patternMagic || gotRun != run {
		m.Fault = FaultForeign
		// The rest may be ours all the same: then the block is half there.
		if at := bodyDiffers(block, lba, gen, run); at != patternHeader {
			m.Fault, m.At = FaultTorn, 0
		}
		return m
	}
	// What a block says of itself must be true of all of it.
	at := bodyDiffers(block, gotLBA, gotGen, run)
	switch {
	case at >= 0:
		m.Fault, m.At = FaultTorn, at
	case gotLBA != lba:
		m.Fault = FaultMisplaced
	case gotGen < gen:
		m.Fault = FaultStale
	case gotGen > gen:
		m.Fault = FaultFuture
	default:
		return nil
	}
	return m
}
