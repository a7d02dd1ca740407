package nvme

import "iter"

// Admin opcodes. NVMe Base 2.0c 5, figure 139.
const (
	AdminDeleteSQ             = 0x00
	AdminCreateSQ             = 0x01
	AdminGetLogPage           = 0x02
	AdminDeleteCQ             = 0x04
	AdminCreateCQ             = 0x05
	AdminIdentify             = 0x06
	AdminAbort                = 0x08
	AdminSetFeatures          = 0x09
	AdminGetFeatures          = 0x0A
	AdminAsyncEventRequest    = 0x0C
	AdminNamespaceManagement  = 0x0D
	AdminFirmwareCommit       = 0x10
	AdminFirmwareDownload     = 0x11
	AdminDeviceSelfTest       = 0x14
	AdminNamespaceAttachment  = 0x15
	AdminKeepAlive            = 0x18
	AdminDirectiveSend        = 0x19
	AdminDirectiveReceive     = 0x1A
	AdminVirtualization       = 0x1C
	AdminMISend               = 0x1D
	AdminMIReceive            = 0x1E
	AdminCapacityManagement   = 0x20
	AdminLockdown             = 0x24
	AdminDoorbellBufferConfig = 0x7C
	AdminFabrics              = 0x7F
	AdminFormatNVM            = 0x80
	AdminSecuritySend         = 0x81
	AdminSecurityReceive      = 0x82
	AdminSanitize             = 0x84
	AdminGetLBAStatus         = 0x86

	// AdminDoorbellMemory2014 is the vendor command that came before Doorbell Buffer Config; same
	// operands, offered by controllers of vendor PCIVendorGoogle.
	AdminDoorbellMemory2014 = 0xC0
)

// I/O opcodes of the NVM command set, and those every command set shares. NVM Command Set 1.0c 3.
const (
	IOFlush               = 0x00
	IOWrite               = 0x01
	IORead                = 0x02
	IOWriteUncorrectable  = 0x04
	IOCompare             = 0x05
	IOWriteZeroes         = 0x08
	IODSM                 = 0x09
	IOVerify              = 0x0C
	IOReservationRegister = 0x0D
	IOReservationReport   = 0x0E
	IOReservationAcquire  = 0x11
	IOReservationRelease  = 0x15
	IOCopy                = 0x19
)

// I/O opcodes of zoned namespaces. Zoned Namespace Command Set 1.1c 3.4.
const (
	IOZoneManagementSend    = 0x79
	IOZoneManagementReceive = 0x7A
	IOZoneAppend            = 0x7D
)

// PCIVendorGoogle is the PCI vendor id of the controllers whose 2014 doorbell
// command drivers look for.
const PCIVendorGoogle = 0x1AE0

var adminOpcodeNames = [256]string{
	AdminDeleteSQ:             "Delete I/O Submission Queue",
	AdminCreateSQ:             "Create I/O Submission Queue",
	AdminGetLogPage:           "Get Log Page",
	AdminDeleteCQ:             "Delete I/O Completion Queue",
	AdminCreateCQ:             "Create I/O Completion Queue",
	AdminIdentify:             "Identify",
	AdminAbort:                "Abort",
	AdminSetFeatures:          "Set Features",
	AdminGetFeatures:          "Get Features",
	AdminAsyncEventRequest:    "Asynchronous Event Request",
	AdminNamespaceManagement:  "Namespace Management",
	AdminFirmwareCommit:       "Firmware Commit",
	AdminFirmwareDownload:     "Firmware Image Download",
	AdminDeviceSelfTest:       "Device Self-test",
	AdminNamespaceAttachment:  "Namespace Attachment",
	AdminKeepAlive:            "Keep Alive",
	AdminDirectiveSend:        "Directive Send",
	AdminDirectiveReceive:     "Directive Receive",
	AdminVirtualization:       "Virtualization Management",
	AdminMISend:               "NVMe-MI Send",
	AdminMIReceive:            "NVMe-MI Receive",
	AdminCapacityManagement:   "Capacity Management",
	AdminLockdown:             "Lockdown",
	AdminDoorbellBufferConfig: "Doorbell Buffer Config",
	AdminFabrics:              "Fabrics Commands",
	AdminFormatNVM:            "Format NVM",
	AdminSecuritySend:         "Security Send",
	AdminSecurityReceive:      "Security Receive",
	AdminSanitize:             "Sanitize",
	AdminGetLBAStatus:         "Get LBA Status",
	AdminDoorbellMemory2014:   "Set Doorbell Memory (2014)",
}

var ioOpcodeNames = [256]string{
	IOFlush:               "Flush",
	IOWrite:               "Write",
	IORead:                "Read",
	IOWriteUncorrectable:  "Write Uncorrectable",
	IOCompare:             "Compare",
	IOWriteZeroes:         "Write Zeroes",
	IODSM:                 "Dataset Management",
	IOVerify:              "Verify",
	IOReservationRegister: "Reservation Register",
	IOReservationReport:   "Reservation Report",
	IOReservationAcquire:  "Reservation Acquire",
	IOReservationRelease:  "Reservation Release",
	IOCopy:                "Copy",

	IOZoneManagementSend:    "Zone Management Send",
	IOZoneManagementReceive: "Zone Management Receive",
	IOZoneAppend:            "Zone Append",
}

// AdminOpcodes yields the admin opcodes that have a name, by rising opcode, with what AdminOpcodeName returns.
func AdminOpcodes() iter.Seq2[uint8, string] { return named(&adminOpcodeNames) }

// IOOpcodes is AdminOpcodes for I/O opcodes.
func IOOpcodes() iter.Seq2[uint8, string] { return named(&ioOpcodeNames) }

func named(names *[256]string) iter.Seq2[uint8, string] {
	return func(yield func(uint8, string) bool) {
		for op, name := range names {
			if name != "" && !yield(uint8(op), name) {
				return
			}
		}
	}
}

// AdminOpcodeName returns the specification's name of an admin opcode, or, for
// one that it does not name, "Admin Opcode XXh".
func AdminOpcodeName(op uint8) string {
	if n := adminOpcodeNames[op]; n != "" {
		return n
	}
	return "Admin Opcode " + hex8(op)
}

// IOOpcodeName returns the specification's name of an I/O opcode, or "I/O Opcode XXh".
func IOOpcodeName(op uint8) string {
	if n := ioOpcodeNames[op]; n != "" {
		return n
	}
	return "I/O Opcode " + hex8(op)
}

// hex8 prints v as the specification writes a byte: "0Bh".
func hex8(v uint8) string {
	const digits = "0123456789ABCDEF"
	return string([]byte{digits[v>>4], digits[v&15], 'h'})
}
