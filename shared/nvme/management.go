package nvme

// Values of SEL of Namespace Management (5.23) and Namespace Attachment (5.22), CDW10 bits 3:0. NVMe Base 2.0c.
const (
	NamespaceCreate = 0
	NamespaceDelete = 1
	NamespaceAttach = 0
	NamespaceDetach = 1
)

// NamespaceSelect returns SEL of Namespace Management and of Namespace Attachment.
func (c *Command) NamespaceSelect() uint8 { return uint8(c.CDW10) & 0xF }

// ControllerListMax is how many ids a ControllerList has room for.
const ControllerListMax = 2047

// ControllerList is a list of controller ids in rising order: Identify CNS 12h and 13h, and the data of Namespace Attachment.
// 4096 bytes. NVMe Base 2.0c 4.4.1.
type ControllerList struct {
	Count uint16
	ID    [ControllerListMax]uint16
}

// NamespaceGranularity is Identify CNS 16h, 4096 bytes: sizes that suit the controller, by LBA format. NVM Command Set 1.0c 4.1.5.6.
type NamespaceGranularity struct {
	Attributes uint32 // bit 0: each format has its own descriptor, otherwise the first is for all
	Count      ZeroBased8
	_          [27]byte
	Descriptor [16]struct{ Size, Capacity uint64 } // bytes; 0: none said
	_          [3808]byte
}

// FPISupported is the bit of IdentifyNamespace.FPI that says bits 6:0 are the percentage of a format that is left to do.
const FPISupported = 1 << 7

// Values of SES of Format NVM.
const (
	EraseNone     = 0
	EraseUserData = 1
	EraseCrypto   = 2
)

// FormatIndex returns the LBA format that Format NVM asks for, LBAFU and LBAFL. NVMe Base 2.0c 5.14.
func (c *Command) FormatIndex() uint8 { return uint8(c.CDW10&0xF) | uint8(c.CDW10>>12&3)<<4 }

// FormatProtection returns PI of Format NVM, the type of protection information.
func (c *Command) FormatProtection() uint8 { return uint8(c.CDW10>>5) & 7 }

// FormatErase returns SES of Format NVM.
func (c *Command) FormatErase() uint8 { return uint8(c.CDW10>>9) & 7 }

// SetFormat makes c a Format NVM.
func (c *Command) SetFormat(nsid uint32, index, erase uint8) {
	*c = Command{Opcode: AdminFormatNVM, NSID: nsid, CDW10: uint32(index&0xF) | uint32(index>>4&3)<<12 | uint32(erase&7)<<9}
}
