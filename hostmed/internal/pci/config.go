// Package pci is the PCI side of a virtual NVMe controller: its configuration space, with
// the capabilities a driver looks for, and its MSI-X table. It keeps bytes and write masks and says what a
// write asked for; it resets no controller, raises no interrupt and knows no BAR contents
// but the MSI-X table and PBA.
//
// PCI Local Bus 3.0 chapter 6, PCI Express Base 4.0 chapter 7, NVMe PCIe Transport 1.0c 3.8.
package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
)

// ConfigSize is the size of the configuration space in bytes. What lies above the first
// 256, the extended space, holds no capability and reads as zero.
const ConfigSize = 4096

// The BARs: registers and doorbells, 64 bit; MSI-X table; MSI-X pending bits.
const (
	BARRegisters = 0
	BARTable     = 4
	BARPBA       = 5
)

// Where the capabilities are.
const (
	CapPM   = 0x40
	CapMSIX = 0x50
	CapPCIe = 0x60
)

const (
	defaultVendor = 0x1ae0 // the 2014 doorbell driver looks for it
	defaultDevice = 0x001f
	defaultBAR0   = 16 << 10
	minBAR        = 4096
	maxVectors    = 2048
)

// Registers of the header and of the capabilities.
const (
	regCommand   = 0x04
	regStatus    = 0x06
	regRevision  = 0x08
	regClass     = 0x09
	regCacheLine = 0x0c
	regBAR0      = 0x10
	regSubVendor = 0x2c
	regCapPtr    = 0x34
	regIntLine   = 0x3c
	regIntPin    = 0x3d

	regPMCap   = CapPM + 2
	regPMCSR   = CapPM + 4
	regMSIXCtl = CapMSIX + 2
	regDevCtl  = CapPCIe + 8

	headerSpace = 256
)

const (
	cmdMemory      = 1 << 1
	cmdBusMaster   = 1 << 2
	cmdINTxDisable = 1 << 10
	cmdMask        = cmdMemory | cmdBusMaster | 1<<6 /* parity */ | 1<<8 /* SERR */ | cmdINTxDisable

	pmStateMask   = 3
	pmD3hot       = 3
	pmNoSoftReset = 1 << 3

	msixFunctionMask = 1 << 14
	msixEnable       = 1 << 15

	devCtlFLR = 1 << 15
)

// ErrAccess says that an access does not lie inside the space.
var ErrAccess = errors.New("outside the PCI space")

// Params are what distinguishes one function from another. Zero values take the defaults.
type Params struct {
	VendorID, DeviceID      uint16 // default 1AE0h, 001Fh
	SubVendorID, SubsysID   uint16 // default: the vendor and device id
	Revision                uint8
	BAR0Size                uint64 // bytes, a power of two of at least 4096; default 16 KiB
	Vectors                 uint16 // MSI-X, 1 to 2048; default 1
	LinkSpeed, LinkWidthLog uint8  // as reported; default 8 GT/s (3), x4 (2)
}

// Events says what a write, or a Reset, changed.
type Events struct {
	FLR     bool // Initiate Function Level Reset was written; the space has been reset
	Command bool // the command register changed
	BAR     bool // a base address register changed
	Power   bool // D0 to D3hot or back
	MSIX    bool // MSI-X enable or function mask changed
}

// ConfigSpace is one function's configuration space. It is not safe for concurrent use.
type ConfigSpace struct {
	params Params
	data   [headerSpace]byte
	mask   [headerSpace]byte // bits that a write changes
}

// New returns a function's configuration space as it is after reset.
func New(p Params) (*ConfigSpace, error) {
	setDefault(&p.VendorID, defaultVendor)
	setDefault(&p.DeviceID, defaultDevice)
	setDefault(&p.SubVendorID, p.VendorID)
	setDefault(&p.SubsysID, p.DeviceID)
	setDefault(&p.BAR0Size, defaultBAR0)
	setDefault(&p.Vectors, 1)
	setDefault(&p.LinkSpeed, 3)
	setDefault(&p.LinkWidthLog, 2)
	switch {
	case p.BAR0Size < minBAR || p.BAR0Size > 1<<31 || bits.OnesCount64(p.BAR0Size) != 1:
		return nil, fmt.Errorf("BAR0 of %#x bytes: not a power of two from 4 KiB to 2 GiB", p.BAR0Size)
	case p.Vectors > maxVectors:
		return nil, fmt.Errorf("%d MSI-X vectors: PCI has at most %d", p.Vectors, maxVectors)
	case p.LinkSpeed > 6 || p.LinkWidthLog > 5:
		return nil, fmt.Errorf("PCIe link speed %d, width 2^%d: not in PCIe", p.LinkSpeed, p.LinkWidthLog)
	}
	c := &ConfigSpace{params: p}
	c.Reset()
	return c, nil
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// BARSize returns the size of BAR i in bytes, 0 where there is none.
func (c *ConfigSpace) BARSize(i int) uint64 {
	switch i {
	case BARRegisters:
		return c.params.BAR0Size
	case BARTable:
		return max(minBAR, uint64(1)<<bits.Len64(uint64(c.params.Vectors)*tableEntry-1))
	case BARPBA:
		return minBAR // 2048 vectors need 256 bytes
	}
	return 0
}

// BAR0Size returns how large BAR0 is with the doorbells of queues 0 to n, 4 << dstrd bytes apart: at least 16 KiB.
func BAR0Size(n uint16, dstrd uint8) uint64 {
	const doorbells = 0x1000
	return max(defaultBAR0, uint64(1)<<bits.Len64(doorbells+2*(uint64(n)+1)*(4<<(dstrd&0xf))-1))
}

// HasStatus says whether n bytes from off have the byte of the Interrupt Status bit among them.
func HasStatus(off uint64, n int) bool { return off <= regStatus && regStatus < off+uint64(n) }

// SetInterruptStatus sets the bit that says that INTA# is asserted, or would be if it were not disabled.
func (c *ConfigSpace) SetInterruptStatus(on bool) {
	const interruptStatus = 1 << 3
	c.data[regStatus] &^= interruptStatus
	if on {
		c.data[regStatus] |= interruptStatus
	}
}

// Vectors returns the number of MSI-X vectors.
func (c *ConfigSpace) Vectors() uint16 { return c.params.Vectors }

// Command register and capability state, as the driver last wrote it.
func (c *ConfigSpace) BusMaster() bool    { return c.get16(regCommand)&cmdBusMaster != 0 }
func (c *ConfigSpace) MemoryOn() bool     { return c.get16(regCommand)&cmdMemory != 0 }
func (c *ConfigSpace) INTxDisabled() bool { return c.get16(regCommand)&cmdINTxDisable != 0 }
func (c *ConfigSpace) MSIXEnabled() bool  { return c.get16(regMSIXCtl)&msixEnable != 0 }
func (c *ConfigSpace) MSIXMasked() bool   { return c.get16(regMSIXCtl)&msixFunctionMask != 0 }
func (c *ConfigSpace) D3hot() bool        { return c.get16(regPMCSR)&pmStateMask == pmD3hot }

// Read copies len(p) bytes from off. Any span inside the 4096 bytes will do: QEMU reads the first
// 256 at once.
func (c *ConfigSpace) Read(off uint64, p []byte) error {
	if err := checkSpan(off, len(p), ConfigSize); err != nil {
		return err
	}
	n := 0
	if off < headerSpace {
		n = copy(p, c.data[off:])
	}
	clear(p[n:])
	return nil
}

// Write writes p to off. Read-only bits keep their value; so do those of the extended space. An FLR resets
// the space by itself, and is the caller's to carry out for the rest of the device.
func (c *ConfigSpace) Write(off uint64, p []byte) (Events, error) {
	if err := checkSpan(off, len(p), ConfigSize); err != nil {
		return Events{}, err
	}
	old := c.data
	for i, v := range p {
		at := off + uint64(i)
		if at >= headerSpace {
			break
		}
		c.data[at] = c.data[at]&^c.mask[at] | v&c.mask[at]
	}
	if c.get16(regDevCtl)&devCtlFLR != 0 {
		c.Reset()
		ev := c.changes(&old)
		ev.FLR = true
		return ev, nil
	}
	if state := c.get16(regPMCSR) & pmStateMask; state != 0 && state != pmD3hot {
		// D1 and D2 are not supported: such a write keeps the state (PCI PM 1.2, 3.2.4).
		c.data[regPMCSR] = c.data[regPMCSR]&^pmStateMask | old[regPMCSR]&pmStateMask
	}
	return c.changes(&old), nil
}

// Reset puts every register back, as a device reset and an FLR do.
func (c *ConfigSpace) Reset() {
	clear(c.data[:])
	clear(c.mask[:])
	c.layHeader()
	c.layPM()
	c.layMSIX()
	c.layPCIe()
}

func (c *ConfigSpace) changes(old *[headerSpace]byte) Events {
	differ := func(from, n int) bool {
		return string(old[from:from+n]) != string(c.data[from:from+n])
	}
	return Events{
		Command: differ(regCommand, 2),
		BAR:     differ(regBAR0, 6*4),
		Power:   differ(regPMCSR, 1),
		MSIX:    differ(regMSIXCtl, 2),
	}
}

func checkSpan(off uint64, n int, size uint64) error {
	if off > size || uint64(n) > size-off {
		return fmt.Errorf("%w: [%#x, +%#x) of %#x bytes", ErrAccess, off, n, size)
	}
	return nil
}

func (c *ConfigSpace) get16(off int) uint16 { return binary.LittleEndian.Uint16(c.data[off:]) }
