package ctrl

import (
	"math/bits"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// What Identify says of the I/O commands that package ioq runs.

const (
	// MaxVerify is how many bytes one Verify may be about.
	MaxVerify = 16 << 20
	// MaxCopyRanges is how many source ranges a Copy may have (MSRC + 1).
	MaxCopyRanges = 128

	maxCopyRange = 8 << 20  // bytes of one source range
	maxCopy      = 32 << 20 // bytes of all
)

// CopyLimits returns how many blocks one source range of a Copy may have (MSSRL), and all together (MCL).
func CopyLimits(info *backend.Info) (perRange uint16, all uint32) {
	return uint16(min(maxCopyRange>>info.LBAShift, 0xffff)), maxCopy >> info.LBAShift
}

// ioCommands are the bits of ONCS.
const ioCommands = nvme.ONCSCompare | nvme.ONCSDSM | nvme.ONCSWriteZeroes | nvme.ONCSVerify |
	nvme.ONCSCopy | nvme.ONCSWriteUncorrectable

// identifyIO adds to Identify Controller what is said of I/O commands.
func (c *Controller) identifyIO(id *nvme.IdentifyController) {
	id.ONCS |= ioCommands
	id.OACS |= nvme.OACSLBAStatus
	id.OCFS = nvme.OCFSFormat0
	id.FUSES = nvme.FUSESCompareWrite
	// A fused pair is atomic whatever its length: ACWU is MDTS in the largest blocks there can be, NACWU in those of the namespace. Other
	// writes are so for one block (AWUN and AWUPF are 0), which is what files promise; of a namespace it may be more.
	id.ACWU = zeroBased(c.cfg.MDTSBytes >> backend.MaxLBAShift)
	id.SGLS = nvme.SGLSByteAligned | nvme.SGLSBitBucket | nvme.SGLSMetadataSGL
}

// identifyNamespaceIO is identifyIO for Identify Namespace.
func (c *Controller) identifyNamespaceIO(id *nvme.IdentifyNamespace, info *backend.Info) {
	id.NSFEAT |= nvme.NSFEATAtomics
	if info.Maps {
		id.NSFEAT |= nvme.NSFEATDeallocError
	}
	id.NACWU = zeroBased(c.cfg.MDTSBytes >> info.LBAShift)
	identifyAtomics(id, info)
	id.MSSRL, id.MCL = CopyLimits(info)
	id.MSRC = MaxCopyRanges - 1
}

// identifyAtomics says what the medium writes as a whole. A boundary of one block there cannot be, and a unit of one crosses none.
func identifyAtomics(id *nvme.IdentifyNamespace, info *backend.Info) {
	if n := info.AtomicWrite; n > 1 {
		id.NAWUN, id.NABSN = zeroBased(n), zeroBased(n)
	}
	if n := info.AtomicPowerFail; n > 1 {
		id.NAWUPF, id.NABSPF = zeroBased(n), zeroBased(n)
	}
}

// ioLimits is Identify Controller of the NVM command set: beside MDTS only Verify has a limit.
func ioLimits() *nvme.IdentifyControllerNVM {
	return &nvme.IdentifyControllerNVM{VSL: uint8(bits.TrailingZeros32(MaxVerify / minPageSize))}
}
