package nvme

// SGLDescriptor is one descriptor of a scatter gather list, 16 bytes. NVMe Base 2.0c 4.1.2, figure 92.
type SGLDescriptor struct {
	Address uint64 // of the data, or of the next segment, which is qword aligned; a bit bucket has none
	Length  uint32 // bytes; of a segment a multiple of 16
	_       [3]byte
	ID      uint8 // type in bits 7:4, subtype in bits 3:0
}

// SGLDescriptorSize is the size of a descriptor in bytes.
const SGLDescriptorSize = 16

// SGLType is what a descriptor describes.
type SGLType uint8

// Values of SGLType.
const (
	SGLDataBlock   SGLType = 0x0
	SGLBitBucket   SGLType = 0x1 // data read from the medium that nobody wants
	SGLSegment     SGLType = 0x2 // the next segment, after which there is another
	SGLLastSegment SGLType = 0x3
	SGLKeyedData   SGLType = 0x4 // fabrics
	SGLTransport   SGLType = 0x5 // fabrics
	SGLVendor      SGLType = 0xF
)

// SGLSubtypeAddress is the only subtype that is not of fabrics: Address is a memory address.
const SGLSubtypeAddress = 0

// MakeSGL returns a descriptor of length bytes at address.
func MakeSGL(t SGLType, address uint64, length uint32) SGLDescriptor {
	return SGLDescriptor{Address: address, Length: length, ID: uint8(t) << 4}
}

// Type returns the type, and Subtype the subtype.
func (d *SGLDescriptor) Type() SGLType  { return SGLType(d.ID >> 4) }
func (d *SGLDescriptor) Subtype() uint8 { return d.ID & 0xF }

// SGL1 returns the descriptor that the data pointer holds when PSDT is not PSDTPRP.
func (c *Command) SGL1() SGLDescriptor {
	return SGLDescriptor{Address: c.PRP1, Length: uint32(c.PRP2), ID: uint8(c.PRP2 >> 56)}
}

// SetSGL makes d the data pointer.
func (c *Command) SetSGL(d SGLDescriptor) {
	c.Flags = c.Flags&^(3<<psdtShift) | PSDTSGL<<psdtShift
	c.PRP1, c.PRP2 = d.Address, uint64(d.Length)|uint64(d.ID)<<56
}

// Bits of IdentifyController.SGLS. NVMe Base 2.0c figure 275.
const (
	SGLSByteAligned  = 1 << 0 // data blocks of any alignment and length
	SGLSDwordAligned = 2 << 0 // data blocks are aligned to dwords, and as long
	SGLSKeyed        = 1 << 2
	SGLSBitBucket    = 1 << 16
	SGLSMetadata     = 1 << 17 // a contiguous metadata buffer may be byte aligned
	SGLSExcess       = 1 << 18 // an SGL may describe more than is transferred
	SGLSMetadataSGL  = 1 << 19 // MPTR may be the address of a descriptor (PSDTSGLMPTR)
	SGLSOffset       = 1 << 20 // fabrics
	SGLSTransport    = 1 << 21 // fabrics
)
