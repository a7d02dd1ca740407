package nvme

// LBAStatusAction is what Get LBA Status looks for. NVM Command Set 1.0c 4.2.1.
type LBAStatusAction uint8

// Values of LBAStatusAction.
const (
	LBAStatusAllocated LBAStatusAction = 0x02 // blocks that are allocated; later than 1.0c
	LBAStatusScan      LBAStatusAction = 0x10 // blocks that may be unreadable, also those that a scan finds
	LBAStatusTracked   LBAStatusAction = 0x11 // blocks that may be unreadable, as far as they are known
)

// LBAStatusAction returns ATYPE of Get LBA Status, CDW13 bits 31:24.
func (c *Command) LBAStatusAction() LBAStatusAction { return LBAStatusAction(c.CDW13 >> 24) }

// LBAStatusBytes returns how many bytes of list Get LBA Status asks for (MNDW): 4 to 2^34.
func (c *Command) LBAStatusBytes() uint64 { return (uint64(c.CDW12) + 1) * 4 }

// LBAStatusRange returns how many blocks from SLBA Get LBA Status is about (RL); 0: all up to the end.
func (c *Command) LBAStatusRange() uint16 { return uint16(c.CDW13) }

// SetGetLBAStatus makes c a Get LBA Status of n bytes, a multiple of 4 and not 0; it clears everything but the data pointer.
func (c *Command) SetGetLBAStatus(nsid uint32, action LBAStatusAction, lba uint64, blocks uint16, n uint32) {
	*c = Command{
		Opcode: AdminGetLBAStatus, NSID: nsid, PRP1: c.PRP1, PRP2: c.PRP2,
		CDW10: uint32(lba), CDW11: uint32(lba >> 32), CDW12: n/4 - 1, CDW13: uint32(blocks) | uint32(action)<<24,
	}
}

// LBAStatusHeader begins the list that Get LBA Status returns, 8 bytes; LBAStatus descriptors follow.
type LBAStatusHeader struct {
	NLSD uint32 // descriptors
	CMPC uint8  // LBAStatusIncomplete or LBAStatusComplete
	_    [3]byte
}

// Values of LBAStatusHeader.CMPC.
const (
	LBAStatusIncomplete = 1 // there are more than fit
	LBAStatusComplete   = 2
)

// LBAStatus is some adjacent blocks, 16 bytes.
type LBAStatus struct {
	SLBA uint64
	NLB  uint32 // logical blocks, not zero-based
	_    uint8
	Kind uint8
	_    [2]byte
}

// Sizes in bytes.
const (
	LBAStatusHeaderSize = 8
	LBAStatusSize       = 16
)
