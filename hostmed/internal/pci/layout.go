package pci

import "encoding/binary"

// The registers in the order of their offsets; put16 and put32 take the value after reset and the bits
// that can be written.

func (c *ConfigSpace) layHeader() {
	const (
		statusCapList = 1 << 4
		bar64         = 2 << 1 // memory, 64 bit, not prefetchable
	)
	c.put16(0x00, c.params.VendorID, 0)
	c.put16(0x02, c.params.DeviceID, 0)
	c.put16(regCommand, 0, cmdMask)
	c.put16(regStatus, statusCapList, 0)
	c.data[regRevision] = c.params.Revision
	c.data[regClass], c.data[regClass+1], c.data[regClass+2] = 0x02, 0x08, 0x01 // NVM Express I/O controller
	c.mask[regCacheLine] = 0xff
	c.put32(regBAR0, bar64, ^uint32(c.params.BAR0Size-1))
	c.put32(regBAR0+4, 0, ^uint32(0)) // high half; no BAR is 4 GiB
	c.put32(regBAR0+4*BARTable, 0, ^uint32(c.BARSize(BARTable)-1))
	c.put32(regBAR0+4*BARPBA, 0, ^uint32(c.BARSize(BARPBA)-1))
	c.put16(regSubVendor, c.params.SubVendorID, 0)
	c.put16(regSubVendor+2, c.params.SubsysID, 0)
	c.data[regCapPtr] = CapPM
	c.mask[regIntLine] = 0xff
	c.data[regIntPin] = 1 // INTA#
}

func (c *ConfigSpace) layPM() {
	const version3 = 3
	c.capability(CapPM, 0x01, CapMSIX)
	c.put16(regPMCap, version3, 0)
	c.put16(regPMCSR, pmNoSoftReset, pmStateMask)
}

func (c *ConfigSpace) layMSIX() {
	c.capability(CapMSIX, 0x11, CapPCIe)
	c.put16(regMSIXCtl, c.params.Vectors-1, msixEnable|msixFunctionMask)
	c.put32(CapMSIX+4, BARTable, 0) // offset 0
	c.put32(CapMSIX+8, BARPBA, 0)
}

func (c *ConfigSpace) layPCIe() {
	const (
		version2Endpoint = 0x0002
		devCapRoleError  = 1 << 15
		devCapFLR        = 1 << 28
		// Error reporting enables, relaxed ordering, payload size, extended tag, no snoop, read request size.
		devCtlMask = 0x7fff &^ (1<<9 | 1<<10)
		// Relaxed ordering and no snoop on, 512 byte read requests: the values after reset.
		devCtlReset    = 0x2810
		lnkCapASPMOpt  = 1 << 22 // ASPM optionality is complied with
		lnkStaClock    = 1 << 12 // the slot's reference clock is used
		lnkCtlMask     = 0x00cb  // ASPM, RCB, common clock, extended synch
		devCap2Timeout = 1 << 4  // completion timeout can be disabled
		devCtl2Mask    = 0x001f
		lnkCtl2Mask    = 0x000f
	)
	link := uint16(c.params.LinkSpeed) | 1<<(4+c.params.LinkWidthLog)
	c.capability(CapPCIe, 0x10, 0)
	c.put16(CapPCIe+0x02, version2Endpoint, 0)
	c.put32(CapPCIe+0x04, devCapRoleError|devCapFLR, 0)
	c.put16(regDevCtl, devCtlReset, devCtlMask|devCtlFLR)
	c.put32(CapPCIe+0x0c, uint32(link)|lnkCapASPMOpt, 0)
	c.put16(CapPCIe+0x10, 0, lnkCtlMask)
	c.put16(CapPCIe+0x12, link|lnkStaClock, 0)
	c.put32(CapPCIe+0x24, devCap2Timeout, 0)
	c.put16(CapPCIe+0x28, 0, devCtl2Mask)
	c.put32(CapPCIe+0x2c, (1<<(c.params.LinkSpeed+1))-2, 0) // the speeds up to this one
	c.put16(CapPCIe+0x30, uint16(c.params.LinkSpeed), lnkCtl2Mask)
}

func (c *ConfigSpace) capability(at int, id, next byte) {
	c.data[at], c.data[at+1] = id, next
}

func (c *ConfigSpace) put16(off int, reset, writable uint16) {
	binary.LittleEndian.PutUint16(c.data[off:], reset)
	binary.LittleEndian.PutUint16(c.mask[off:], writable)
}

func (c *ConfigSpace) put32(off int, reset, writable uint32) {
	binary.LittleEndian.PutUint32(c.data[off:], reset)
	binary.LittleEndian.PutUint32(c.mask[off:], writable)
}
