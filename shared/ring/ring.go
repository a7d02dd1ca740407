// Package ring has the four halves of NVMe's two rings: submission queue (SQ) producer
// and consumer, completion queue (CQ) producer and consumer (NVMe Base 2.0c 3.3.1). Entries lie
// in shared memory; heads, tails and phases are private to the half that owns
// them, and move only through methods that refuse what cannot be. The device's halves can
// be detached from their memory and attached to where it is later: a client unmaps and maps again what it pleases.
//
// Nothing here writes a doorbell: an entry becomes visible to the other side by
// package dbbuf's Publish (SQ) or by its phase tag (CQ). Each half belongs to one goroutine.
package ring

import (
	"errors"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/shm"
)

const (
	SQESize = 64 // bytes of a submission queue entry
	CQESize = 16 // bytes of a completion queue entry

	MinSize = 2     // entries; one is always left empty
	MaxSize = 65536 // entries, NVMe Base 2.0c 3.3.3.1
)

// ErrDoorbell says that a doorbell value cannot be: out of the ring, or moving backwards or
// past the other end (rule R30).
var ErrDoorbell = errors.New("invalid doorbell value")

func checkSize(mem *shm.Region, size uint32, entry uint64) error {
	if size < MinSize || size > MaxSize {
		return fmt.Errorf("queue of %d entries: NVMe has %d to %d", size, MinSize, MaxSize)
	}
	if need := uint64(size) * entry; mem.Len() < need {
		return fmt.Errorf("queue of %d entries needs %d bytes, its memory has %d", size, need, mem.Len())
	}
	// An entry must not straddle what the accessors treat as one word.
	if _, err := mem.Word64(0); err != nil {
		return err
	}
	return nil
}

// distance returns how many steps lead from a to b in a ring of size entries.
func distance(a, b, size uint32) uint32 {
	if b >= a {
		return b - a
	}
	return b + size - a
}
