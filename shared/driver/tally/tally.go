// Package tally counts the commands of one queue as they end: how many of each kind, how many failed, how long they took. One goroutine
// at a time counts, and any may read meanwhile; neither waits for the other, and nothing is allocated.
package tally

import (
	"sync/atomic"

	"github.com/shadowbell/shadowbell/shared/latency"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Kind is what is told apart.
type Kind uint8

// The kinds. Other is every I/O command that has no kind of its own.
const (
	Read Kind = iota
	Write
	Flush
	Discard // Dataset Management
	WriteZeroes
	Compare
	Other
	Admin
	Kinds // how many there are
)

var kindOf = func() (k [256]Kind) {
	for i := range k {
		k[i] = Other
	}
	k[nvme.IORead], k[nvme.IOWrite], k[nvme.IOFlush], k[nvme.IODSM] = Read, Write, Flush, Discard
	k[nvme.IOWriteZeroes], k[nvme.IOCompare] = WriteZeroes, Compare
	return k
}()

// Tally is the counters of one queue.
type Tally struct {
	admin  bool
	times  [Kinds]latency.Recorder
	errors [Kinds]atomic.Uint64
}

// New returns the Tally of an admin queue or of an I/O queue.
func New(admin bool) *Tally { return &Tally{admin: admin} }

// Ended counts n commands that took ns each. Commands that were submitted together and ended together should be counted together.
func (t *Tally) Ended(opcode uint8, ns int64, n uint64) {
	t.times[t.kind(opcode)].Record(ns, n)
}

// Failed counts a command, which Ended counts too, as one that the controller ended with an error.
func (t *Tally) Failed(opcode uint8) {
	e := &t.errors[t.kind(opcode)]
	e.Store(e.Load() + 1) // there is one writer
}

func (t *Tally) kind(opcode uint8) Kind {
	if t.admin {
		return Admin
	}
	return kindOf[opcode]
}

// Counts is what Tallies have counted, by Kind.
type Counts [Kinds]struct {
	Errors uint64
	Times  latency.Histogram
}

// AddTo adds what has been counted to c. Any goroutine may call it.
func (t *Tally) AddTo(c *Counts) {
	for k := range c {
		c[k].Errors += t.errors[k].Load()
		t.times[k].AddTo(&c[k].Times)
	}
}

// Merge adds what other has.
func (c *Counts) Merge(other *Counts) {
	for k := range c {
		c[k].Errors += other[k].Errors
		c[k].Times.Merge(&other[k].Times)
	}
}
