package nvme

import "fmt"

// Completion is a completion queue entry, 16 bytes. NVMe Base 2.0c 3.3.3.2.
type Completion struct {
	Result      uint32 // DW0, command specific
	Result1     uint32 // DW1, command specific
	SQHead      uint16
	SQID        uint16
	CID         uint16
	StatusPhase uint16 // phase in bit 0, Status in bits 15:1
}

// Status returns the status field without the phase.
func (c *Completion) Status() Status { return Status(c.StatusPhase >> 1) }

// Phase returns the phase tag.
func (c *Completion) Phase() bool { return c.StatusPhase&1 != 0 }

// SetStatus sets status and phase.
func (c *Completion) SetStatus(s Status, phase bool) {
	c.StatusPhase = uint16(s) << 1
	if phase {
		c.StatusPhase |= 1
	}
}

// Result64 returns DW1:DW0.
func (c *Completion) Result64() uint64 { return uint64(c.Result1)<<32 | uint64(c.Result) }

// Words returns the entry as two little-endian words; the high one holds the phase
// and is stored last, and read first (R5).
func (c *Completion) Words() (low, high uint64) {
	return c.Result64(), uint64(c.SQHead) | uint64(c.SQID)<<16 | uint64(c.CID)<<32 | uint64(c.StatusPhase)<<48
}

// CompletionOf is the inverse of Words.
func CompletionOf(low, high uint64) Completion {
	return Completion{
		Result: uint32(low), Result1: uint32(low >> 32),
		SQHead: uint16(high), SQID: uint16(high >> 16), CID: uint16(high >> 32), StatusPhase: uint16(high >> 48),
	}
}

func (c *Completion) String() string {
	return fmt.Sprintf("sqid=%d cid=%#x sqhd=%d dw0=%#x p=%d %v", c.SQID, c.CID, c.SQHead, c.Result, c.StatusPhase&1, c.Status())
}
