// Package vfiouser speaks the vfio-user protocol, version 0.0, over unix stream
// sockets, for both directions: a driver uses [Client]; a device uses [Receiver],
// [Dispatcher] and [SendMessage] from its own event loop.
//
// The wire format is that of "vfio-user Protocol Specification" (QEMU,
// docs/interop/vfio-user.rst), cited here as "vfio-user 0.9.1" after the revision
// whose text it is. Clients that are known to talk to the device side: QEMU's
// vfio-user-pci, SPDK's user-space driver, and Client; what Cloud Hypervisor's sends is
// held by a test.
//
// What it does: message framing with partial reads, file descriptors passed and
// never leaked, limits on every size that the other side names, version
// negotiation, the device messages that a PCI function needs, and posted writes.
//
// What it does not do: it owns no goroutine and no socket on the device side; it
// does not map memory, signal interrupts or know what a region means. Migration,
// dirty page tracking, twin sockets, REGION_WRITE_MULTI, GET_REGION_IO_FDS and
// DMA_READ/DMA_WRITE are answered with ENOTSUP and never offered.
//
// Neither side trusts the other: whatever arrives is copied out of the kernel
// once, checked, then used.
package vfiouser

import (
	"encoding/binary"
	"fmt"
)

// Sizes in bytes and counts.
const (
	HeaderSize = 16

	// MaxFDs is how many file descriptors one message may carry: what is sent and
	// what is named in VERSION. QEMU refuses a server that names more.
	MaxFDs = 16

	// MaxFDsTaken is how many are taken all the same, the most that Linux passes
	// (SCM_MAX_FD): Cloud Hypervisor sends the eventfds of all MSI-X vectors at once,
	// whatever VERSION said.
	MaxFDsTaken = 253

	// MaxDataXfer is the largest count of a region access: the protocol's default
	// for max_data_xfer_size.
	MaxDataXfer = 1 << 20

	// MaxMsg is the largest message that either side of this package accepts: a
	// region access of MaxDataXfer bytes, and slack for what may be added to it.
	MaxMsg = MaxDataXfer + 4096
)

// Command is the number of a message's command; vfio-user 0.9.1 "Commands".
type Command uint16

// The commands. Number 14 was DIRTY_PAGES in older revisions.
const (
	CmdVersion              Command = 1
	CmdDMAMap               Command = 2
	CmdDMAUnmap             Command = 3
	CmdDeviceGetInfo        Command = 4
	CmdDeviceGetRegionInfo  Command = 5
	CmdDeviceGetRegionIOFDs Command = 6
	CmdDeviceGetIRQInfo     Command = 7
	CmdDeviceSetIRQs        Command = 8
	CmdRegionRead           Command = 9
	CmdRegionWrite          Command = 10
	CmdDMARead              Command = 11
	CmdDMAWrite             Command = 12
	CmdDeviceReset          Command = 13
	CmdDirtyPages           Command = 14
	CmdRegionWriteMulti     Command = 15
	CmdDeviceFeature        Command = 16
	CmdMigDataRead          Command = 17
	CmdMigDataWrite         Command = 18
)

var commandNames = [...]string{
	CmdVersion:              "VERSION",
	CmdDMAMap:               "DMA_MAP",
	CmdDMAUnmap:             "DMA_UNMAP",
	CmdDeviceGetInfo:        "DEVICE_GET_INFO",
	CmdDeviceGetRegionInfo:  "DEVICE_GET_REGION_INFO",
	CmdDeviceGetRegionIOFDs: "DEVICE_GET_REGION_IO_FDS",
	CmdDeviceGetIRQInfo:     "DEVICE_GET_IRQ_INFO",
	CmdDeviceSetIRQs:        "DEVICE_SET_IRQS",
	CmdRegionRead:           "REGION_READ",
	CmdRegionWrite:          "REGION_WRITE",
	CmdDMARead:              "DMA_READ",
	CmdDMAWrite:             "DMA_WRITE",
	CmdDeviceReset:          "DEVICE_RESET",
	CmdDirtyPages:           "DIRTY_PAGES",
	CmdRegionWriteMulti:     "REGION_WRITE_MULTI",
	CmdDeviceFeature:        "DEVICE_FEATURE",
	CmdMigDataRead:          "MIG_DATA_READ",
	CmdMigDataWrite:         "MIG_DATA_WRITE",
}

// String returns the specification's name, or "command N".
func (c Command) String() string {
	if int(c) < len(commandNames) && commandNames[c] != "" {
		return commandNames[c]
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// Header flags; vfio-user 0.9.1 "Header".
const (
	FlagTypeMask uint32 = 0x0f
	FlagCommand  uint32 = 0x00
	FlagReply    uint32 = 0x01
	FlagNoReply  uint32 = 0x10 // in a command: it must not be answered
	FlagError    uint32 = 0x20 // in a reply: Errno holds an errno, or 0
)

// Header precedes every message; vfio-user 0.9.1 "Header".
type Header struct {
	ID    uint16 // chosen by the sender of the command, echoed in its reply
	Cmd   Command
	Size  uint32 // of the whole message, header included
	Flags uint32
	Errno uint32
}

// IsReply reports whether the message answers a command.
func (h *Header) IsReply() bool { return h.Flags&FlagTypeMask == FlagReply }

// IsCommand reports whether the message is a command.
func (h *Header) IsCommand() bool { return h.Flags&FlagTypeMask == FlagCommand }

// Append appends the 16 bytes of h to b.
func (h *Header) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint16(b, h.ID)
	b = binary.LittleEndian.AppendUint16(b, uint16(h.Cmd))
	b = binary.LittleEndian.AppendUint32(b, h.Size)
	b = binary.LittleEndian.AppendUint32(b, h.Flags)
	return binary.LittleEndian.AppendUint32(b, h.Errno)
}

// ParseHeader reads the header at the start of b; false if b is too short. The
// size in it is not checked.
func ParseHeader(b []byte) (Header, bool) {
	if len(b) < HeaderSize {
		return Header{}, false
	}
	return Header{
		ID:    binary.LittleEndian.Uint16(b[0:]),
		Cmd:   Command(binary.LittleEndian.Uint16(b[2:])),
		Size:  binary.LittleEndian.Uint32(b[4:]),
		Flags: binary.LittleEndian.Uint32(b[8:]),
		Errno: binary.LittleEndian.Uint32(b[12:]),
	}, true
}

// String prints the header for logs: "REGION_WRITE id=7 size=36 flags=0x10 errno=0".
func (h Header) String() string {
	return fmt.Sprintf("%s id=%d size=%d flags=%#x errno=%d", h.Cmd, h.ID, h.Size, h.Flags, h.Errno)
}

// Message is one message as a Receiver hands it out.
type Message struct {
	Header
	Payload []byte // what follows the header; valid until the Receiver's next Fill
	FDs     []int  // owned by whoever took the message
}

// Reply is what a Dispatcher wants sent. Its header's Size is left to SendMessage.
type Reply struct {
	Header
	Payload []byte // valid until the next Handle, or the Receiver's next Fill
	FDs     []int  // borrowed from the device: sent, not closed
}
