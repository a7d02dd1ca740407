package nvme

import "strings"

// IdentifySize is the size in bytes of what every Identify returns.
const IdentifySize = 4096

// CNS chooses what Identify returns. NVMe Base 2.0c 5.17.1, figure 273.
type CNS uint8

// Values of CNS.
const (
	CNSNamespace             CNS = 0x00
	CNSController            CNS = 0x01
	CNSActiveNamespaces      CNS = 0x02
	CNSNamespaceDescriptors  CNS = 0x03
	CNSNVMSetList            CNS = 0x04
	CNSCSINamespace          CNS = 0x05
	CNSCSIController         CNS = 0x06
	CNSCSIActiveNamespaces   CNS = 0x07
	CNSIndependentNamespace  CNS = 0x08
	CNSAllocatedNamespaces   CNS = 0x10
	CNSAllocatedNamespace    CNS = 0x11
	CNSNamespaceControllers  CNS = 0x12
	CNSControllers           CNS = 0x13
	CNSPrimaryCapabilities   CNS = 0x14
	CNSSecondaryControllers  CNS = 0x15
	CNSNamespaceGranularity  CNS = 0x16
	CNSUUIDList              CNS = 0x17
	CNSDomainList            CNS = 0x18
	CNSEnduranceGroups       CNS = 0x19
	CNSCSIAllocated          CNS = 0x1A
	CNSCSIAllocatedNamespace CNS = 0x1B
	CNSCommandSets           CNS = 0x1C
)

var cnsNames = map[CNS]string{
	CNSNamespace: "Namespace", CNSController: "Controller", CNSActiveNamespaces: "Active Namespace List",
	CNSNamespaceDescriptors: "Namespace Identification Descriptors", CNSNVMSetList: "NVM Set List",
	CNSCSINamespace: "Command Set Namespace", CNSCSIController: "Command Set Controller",
	CNSCSIActiveNamespaces: "Command Set Active Namespace List", CNSIndependentNamespace: "Command Set Independent Namespace",
	CNSAllocatedNamespaces: "Allocated Namespace List", CNSAllocatedNamespace: "Allocated Namespace",
	CNSNamespaceControllers: "Controllers of Namespace", CNSControllers: "Controller List",
	CNSPrimaryCapabilities: "Primary Controller Capabilities", CNSSecondaryControllers: "Secondary Controller List",
	CNSNamespaceGranularity: "Namespace Granularity List", CNSUUIDList: "UUID List", CNSDomainList: "Domain List",
	CNSEnduranceGroups: "Endurance Group List", CNSCSIAllocated: "Command Set Allocated Namespace List",
	CNSCSIAllocatedNamespace: "Command Set Allocated Namespace", CNSCommandSets: "I/O Command Sets",
}

func (c CNS) String() string {
	if n, ok := cnsNames[c]; ok {
		return n
	}
	return "CNS " + hex8(uint8(c))
}

// CSI is a command set identifier. NVMe Base 2.0c figure 274.
type CSI uint8

// Values of CSI.
const (
	CSINVM   CSI = 0
	CSIKV    CSI = 1
	CSIZoned CSI = 2
)

func (c CSI) String() string {
	switch c {
	case CSINVM:
		return "NVM"
	case CSIKV:
		return "Key Value"
	case CSIZoned:
		return "Zoned Namespace"
	}
	return "CSI " + hex8(uint8(c))
}

// Uint128 is a 128-bit little-endian count.
type Uint128 struct{ Lo, Hi uint64 }

// IdentifyController is the Identify Controller structure, 4096 bytes. NVMe Base 2.0c 5.17.2.1,
// figure 275. Strings are ASCII, padded with spaces (SUBNQN: with zeroes).
type IdentifyController struct {
	VID       uint16
	SSVID     uint16
	SN        [20]byte
	MN        [40]byte
	FR        [8]byte
	RAB       uint8 // 2^RAB commands
	IEEE      [3]byte
	CMIC      uint8
	MDTS      uint8 // 2^MDTS pages of CAP.MPSMIN; 0: no limit
	CNTLID    uint16
	VER       Version
	RTD3R     uint32 // microseconds
	RTD3E     uint32 // microseconds
	OAES      uint32 // EventConfig bits
	CTRATT    uint32
	RRLS      uint16
	_         [9]byte
	CNTRLTYPE uint8
	FGUID     [16]byte
	CRDT1     uint16 // 100 ms
	CRDT2     uint16 // 100 ms
	CRDT3     uint16 // 100 ms
	_         [119]byte
	NVMSR     uint8
	VWCI      uint8
	MEC       uint8

	OACS      uint16
	ACL       ZeroBased8
	AERL      ZeroBased8
	FRMW      uint8
	LPA       uint8
	ELPE      ZeroBased8
	NPSS      ZeroBased8
	AVSCC     uint8
	APSTA     uint8
	WCTEMP    uint16 // kelvin
	CCTEMP    uint16 // kelvin
	MTFA      uint16 // 100 ms
	HMPRE     uint32 // 4 KiB
	HMMIN     uint32 // 4 KiB
	TNVMCAP   Uint128
	UNVMCAP   Uint128
	RPMBS     uint32
	EDSTT     uint16 // minutes
	DSTO      uint8
	FWUG      uint8  // 4 KiB
	KAS       uint16 // 100 ms
	HCTMA     uint16
	MNTMT     uint16 // kelvin
	MXTMT     uint16 // kelvin
	SANICAP   uint32
	HMMINDS   uint32 // 4 KiB
	HMMAXD    uint16
	NSETIDMAX uint16
	ENDGIDMAX uint16
	ANATT     uint8 // seconds
	ANACAP    uint8
	ANAGRPMAX uint32
	NANAGRPID uint32
	PELS      uint32 // 64 KiB
	DOMAINID  uint16
	_         [10]byte
	MEGCAP    Uint128
	_         [128]byte

	SQES    uint8 // minimum in bits 3:0, maximum in bits 7:4, both powers of two
	CQES    uint8
	MAXCMD  uint16
	NN      uint32
	ONCS    uint16
	FUSES   uint16
	FNA     uint8
	VWC     uint8
	AWUN    ZeroBased16 // logical blocks
	AWUPF   ZeroBased16 // logical blocks
	ICSVSCC uint8
	NWPC    uint8
	ACWU    ZeroBased16 // logical blocks
	OCFS    uint16
	SGLS    uint32
	MNAN    uint32
	MAXDNA  Uint128
	MAXCNA  uint32
	_       [204]byte
	SUBNQN  [256]byte
	_       [768]byte

	IOCCSZ uint32 // fabrics, as are the next five
	IORCSZ uint32
	ICDOFF uint16
	FCATT  uint8
	MSDBD  uint8
	OFCS   uint16
	_      [242]byte

	PSD            [32]PowerState
	VendorSpecific [1024]byte
}

// Bits of IdentifyController.CMIC.
const (
	CMICMultiPort       = 1 << 0
	CMICMultiController = 1 << 1
	CMICVirtual         = 1 << 2
	CMICANA             = 1 << 3
)

// Bits of IdentifyController.OACS.
const (
	OACSSecurity    = 1 << 0
	OACSFormat      = 1 << 1
	OACSFirmware    = 1 << 2
	OACSNamespaces  = 1 << 3
	OACSSelfTest    = 1 << 4
	OACSDirectives  = 1 << 5
	OACSMI          = 1 << 6
	OACSVirtual     = 1 << 7
	OACSDoorbellBuf = 1 << 8
	OACSLBAStatus   = 1 << 9
	OACSLockdown    = 1 << 10
)

// Bits of IdentifyController.ONCS.
const (
	ONCSCompare            = 1 << 0
	ONCSWriteUncorrectable = 1 << 1
	ONCSDSM                = 1 << 2
	ONCSWriteZeroes        = 1 << 3
	ONCSSaveSelect         = 1 << 4
	ONCSReservations       = 1 << 5
	ONCSTimestamp          = 1 << 6
	ONCSVerify             = 1 << 7
	ONCSCopy               = 1 << 8
)

// FUSESCompareWrite is the bit of IdentifyController.FUSES that says Compare and Write may be fused.
const FUSESCompareWrite = 1 << 0

// OCFSFormat0 is the bit of IdentifyController.OCFS that says Copy takes source ranges in format 0 (CopyRange).
const OCFSFormat0 = 1 << 0

// Bits of IdentifyController.VWC.
const (
	VWCPresent         = 1 << 0
	VWCFlushAllUnknown = 0 << 1 // Flush of NSIDAll: not said
	VWCFlushAllNo      = 2 << 1 // Flush of NSIDAll fails
	VWCFlushAll        = 3 << 1 // Flush of NSIDAll flushes all
)

// Bits of IdentifyController.NWPC: the states of feature 84h beside unprotected.
const (
	NWPCProtect         = 1 << 0
	NWPCUntilPowerCycle = 1 << 1
	NWPCForEver         = 1 << 2
)

// Bits of IdentifyController.LPA.
const (
	LPASmartPerNamespace = 1 << 0
	LPACommandEffects    = 1 << 1
	LPAExtended          = 1 << 2 // NUMDU and LPO of Get Log Page
	LPATelemetry         = 1 << 3
	LPAPersistentEvent   = 1 << 4
	LPASupportedPages    = 1 << 5
	LPATelemetryArea4    = 1 << 6
)

// Bits of IdentifyController.FRMW; the number of slots is in bits 3:1.
const (
	FRMWSlot1ReadOnly   = 1 << 0
	FRMWSlotsShift      = 1
	FRMWActivateNoReset = 1 << 4
)

// Values of IdentifyController.CNTRLTYPE.
const (
	ControllerTypeIO        = 1
	ControllerTypeDiscovery = 2
	ControllerTypeAdmin     = 3
)

// Bits of IdentifyController.CTRATT.
const (
	CTRATTHostID128    = 1 << 0
	CTRATTNonOpPerm    = 1 << 1
	CTRATTNVMSets      = 1 << 2
	CTRATTReadRecovery = 1 << 3
	CTRATTEndurance    = 1 << 4
	CTRATTTBKAS        = 1 << 6
	CTRATTGranularity  = 1 << 7
	CTRATTUUIDList     = 1 << 9
	CTRATTFixedCap     = 1 << 11
	CTRATTELBAS        = 1 << 15
)

// PowerState is a power state descriptor, 32 bytes. NVMe Base 2.0c figure 276.
type PowerState struct {
	MP    uint16 // 0.01 W, or 0.0001 W with PowerStateMXPS
	_     uint8
	Flags uint8
	ENLAT uint32 // microseconds
	EXLAT uint32 // microseconds
	RRT   uint8
	RRL   uint8
	RWT   uint8
	RWL   uint8
	IDLP  uint16
	IPS   uint8 // in bits 7:6
	_     uint8
	ACTP  uint16
	APWS  uint8 // APW in bits 2:0, APS in bits 7:6
	_     [9]byte
}

// Bits of PowerState.Flags.
const (
	PowerStateMXPS = 1 << 0 // MP is in 0.0001 W
	PowerStateNOPS = 1 << 1 // non-operational
)

// MaxPowerMilliwatts is MP in thousandths of a watt, rounded down.
func (p *PowerState) MaxPowerMilliwatts() uint32 {
	if p.Flags&PowerStateMXPS != 0 {
		return uint32(p.MP) / 10
	}
	return uint32(p.MP) * 10
}

// MaxTransfer returns the most bytes of data that one command may move, given CAP.MPSMIN; 0: no limit.
// A value too large for an int64 counts as no limit.
func (c *IdentifyController) MaxTransfer(mpsmin uint8) uint64 {
	shift := 12 + uint(mpsmin&0xF) + uint(c.MDTS)
	if c.MDTS == 0 || shift > 62 {
		return 0
	}
	return 1 << shift
}

// Serial returns SN without its padding.
func (c *IdentifyController) Serial() string { return ASCII(c.SN[:]) }

// Model returns MN without its padding.
func (c *IdentifyController) Model() string { return ASCII(c.MN[:]) }

// Firmware returns FR without its padding.
func (c *IdentifyController) Firmware() string { return ASCII(c.FR[:]) }

// Subsystem returns SUBNQN without its padding.
func (c *IdentifyController) Subsystem() string { return ASCII(c.SUBNQN[:]) }

// ASCII returns the text in field up to the first zero, without spaces at its ends. What is
// not printable ASCII becomes '?', so that a device cannot write escape sequences to a terminal.
func ASCII(field []byte) string {
	var sb strings.Builder
	for _, c := range field {
		if c == 0 {
			break
		}
		if c < ' ' || c > '~' {
			c = '?'
		}
		sb.WriteByte(c)
	}
	return strings.TrimSpace(sb.String())
}

// SetASCII stores s in field, cut to its length, the rest filled with spaces.
func SetASCII(field []byte, s string) {
	n := copy(field, s)
	for i := range field[n:] {
		field[n+i] = ' '
	}
}

// IdentifyControllerNVM is the NVM command set's own Identify Controller (CNS 06h, CSI 0), 4096 bytes. NVM
// Command Set 1.0c 4.1.5.3. Zero means "no limit said".
type IdentifyControllerNVM struct {
	VSL   uint8  // Verify: 2^VSL pages of CAP.MPSMIN
	WZSL  uint8  // Write Zeroes: 2^WZSL pages of CAP.MPSMIN
	WUSL  uint8  // Write Uncorrectable: 2^WUSL pages of CAP.MPSMIN
	DMRL  uint8  // Dataset Management: ranges
	DMRSL uint32 // logical blocks of one range
	DMSL  uint64 // logical blocks of all ranges
	_     [4080]byte
}

// CommandSets is what Identify CNS 1Ch returns: up to 512 combinations of command sets, each a bit mask by CSI.
// NVMe Base 2.0c 5.17.2.22.
type CommandSets struct {
	Vectors [512]uint64
}
