package subsys

import (
	"slices"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Class is how a command stands to reservations and to write protection. NVMe Base 2.0c 8.19, the figure of
// command behaviour in the presence of a reservation.
type Class uint8

// The classes. A command that is in none of the rows is Neutral: allowed, always.
const (
	Neutral Class = iota
	Reads
	Writes
	Flushes // Writes to a reservation, nothing to write protection
)

// classes is by I/O opcode. An opcode that is not here fails as such, whatever the gate says.
var classes = [256]Class{
	nvme.IORead:               Reads,
	nvme.IOCompare:            Reads,
	nvme.IOVerify:             Reads,
	nvme.IOFlush:              Flushes,
	nvme.IOWrite:              Writes,
	nvme.IOWriteUncorrectable: Writes,
	nvme.IOWriteZeroes:        Writes,
	nvme.IODSM:                Writes,
	nvme.IOCopy:               Writes,
}

// ClassOf returns the class of an I/O command.
func ClassOf(opcode uint8) Class { return classes[opcode] }

// Host is who is behind a controller: its Host Identifier, or, while that is 0, nobody but this controller
// since its last reset. NVMe Base 2.0c 5.27.1.25.
type Host struct {
	ID       [16]byte // of 64 bits: the first eight
	Extended bool     // ID is of 128 bits
	Anon     uint64   // not 0: ID is 0, and this number is given once
}

// Range is a range of logical blocks, both ends in it.
type Range struct{ First, Last uint64 }

// Reservation is what the data path has to know of a reservation that is held.
type Reservation struct {
	Type        nvme.ReservationType
	Holder      Host   // of the types with one holder
	Registrants []Host // few
}

// allows is the table of NVMe Base 2.0c 8.19.
func (r *Reservation) allows(class Class, h Host) bool {
	if class == Neutral {
		return true
	}
	if !r.Type.All() && h == r.Holder {
		return true
	}
	if class == Reads && r.Type.WriteExclusive() {
		return true
	}
	return r.Type.Registrants() && slices.Contains(r.Registrants, h)
}

// Gate is what stands between a command and a namespace. It does not change: another state is another Gate. The data
// path loads it once for each command, and it is nil while nothing special holds.
type Gate struct {
	// Hold keeps commands back, all but Neutral ones, until there is a gate without it.
	Hold bool
	// Fail, if it is not success, is how every command ends.
	Fail nvme.Status
	// Protected makes commands that write fail.
	Protected bool
	// Reserved is nil while there is no reservation.
	Reserved *Reservation
	// Bad are the blocks that Write Uncorrectable has marked: rising, not touching.
	Bad []Range
}

func (g *Gate) open() bool {
	return !g.Hold && g.Fail == nvme.StatusSuccess && !g.Protected && g.Reserved == nil && len(g.Bad) == 0
}

// Verdict is what a Gate says to a command.
type Verdict uint8

// The verdicts.
const (
	Pass   Verdict = iota
	Wait           // hold the command back, and ask again after Workers.Release
	Refuse         // complete it with the status
)

// Check says what becomes of a command of class from h. Bad ranges are not looked at.
func (g *Gate) Check(class Class, h Host) (Verdict, nvme.Status) {
	switch {
	case g.Hold && class != Neutral:
		return Wait, nvme.StatusSuccess
	case g.Fail != nvme.StatusSuccess:
		return Refuse, g.Fail
	case g.Reserved != nil && !g.Reserved.allows(class, h):
		return Refuse, nvme.StatusReservationConflict.WithDNR()
	case g.Protected && class == Writes:
		return Refuse, nvme.StatusNamespaceWriteProtected.WithDNR()
	}
	return Pass, nvme.StatusSuccess
}

// CheckHolder is Check for whoever holds the namespace, for whom Hold is not meant.
func (g *Gate) CheckHolder(class Class, h Host) (Verdict, nvme.Status) {
	mine := *g
	mine.Hold = false
	return mine.Check(class, h)
}

// Marked reports whether one of n blocks from first is in Bad. The last of them must be a block of the namespace.
func (g *Gate) Marked(first, n uint64) bool {
	i, _ := slices.BinarySearchFunc(g.Bad, first, func(r Range, at uint64) int {
		if r.Last < at {
			return -1
		}
		return 1
	})
	return i < len(g.Bad) && n > 0 && g.Bad[i].First <= first+(n-1)
}
