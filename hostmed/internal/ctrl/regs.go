package ctrl

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// ErrAccess is a register access that is not 1, 2, 4 or 8 bytes, not naturally aligned, or not below the doorbells. The spec wants
// 4 or 8 bytes, and says nothing of others; firmware makes them.
var ErrAccess = errors.New("invalid register access")

const (
	// CAP.TO and CRTO.CRWMT: 127.5 s, the longest that CAP can say. After a reset a driver waits for as long as the slowest medium takes with what
	// was in flight (Controller.Settle), and the kernel's NVMe driver gives a command nvme_core.io_timeout, 30 s, twice.
	capTimeout = 255
	maxMPS     = 4 // CAP.MPSMAX: 64 KiB
	ccWritable = 0x00fffff1
	aqaBits    = 0x0fff0fff
	queueBase  = ^uint64(0xfff) // ASQ and ACQ are page aligned
)

// version is what VS and Identify say.
var version = nvme.MakeVersion(2, 0, 0)

// registers are those that hold something. NVMe Base 2.0c 3.1.3.
type registers struct {
	cap  nvme.CAP
	cc   nvme.CC
	csts nvme.CSTS
	aqa  nvme.AQA
	asq  uint64
	acq  uint64
}

func newRegisters(cfg *Config) registers {
	mqes, _ := nvme.ToZeroBased16(cfg.MaxDepth)
	return registers{cap: nvme.CAP(0).
		WithMQES(mqes).WithAMS(nvme.CAPAMSWeighted).
		WithCQR(true).
		WithTO(capTimeout).
		WithDSTRD(cfg.DSTRD).
		WithNSSRS(true).
		WithCSS(nvme.CAPCSSNVM | nvme.CAPCSSIOCS).
		WithMPSMAX(maxMPS).
		WithCRMS(nvme.CAPCRMSMedia)}
}

// ReadReg reads len(p) bytes at off, below nvme.DoorbellBase.
func (c *Controller) ReadReg(off uint64, p []byte) error {
	if err := checkAccess(off, len(p)); err != nil {
		return err
	}
	for i := 0; i < len(p); i += 4 {
		at := off + uint64(i)
		var word [4]byte
		binary.LittleEndian.PutUint32(word[:], c.readWord(uint32(at)&^3))
		copy(p[i:], word[at&3:])
	}
	return nil
}

// WriteReg writes p at off, below nvme.DoorbellBase. A 64-bit register may be written in two halves, in either
// order, and a 32-bit one in parts. What is read-only or reserved keeps its value.
func (c *Controller) WriteReg(off uint64, p []byte) error {
	if err := checkAccess(off, len(p)); err != nil {
		return err
	}
	for i := 0; i < len(p); i += 4 {
		at := off + uint64(i)
		var word, lanes [4]byte
		n := copy(word[at&3:], p[i:])
		for j := range n {
			lanes[int(at&3)+j] = 0xff
		}
		c.writeWord(uint32(at)&^3, binary.LittleEndian.Uint32(word[:]), binary.LittleEndian.Uint32(lanes[:]))
	}
	return nil
}

func checkAccess(off uint64, n int) error {
	switch n {
	case 1, 2, 4, 8:
	default:
		return fmt.Errorf("%w: %d bytes", ErrAccess, n)
	}
	if off%uint64(n) != 0 || off > nvme.DoorbellBase-uint64(n) {
		return fmt.Errorf("%w: %d bytes at %#x", ErrAccess, n, off)
	}
	return nil
}

// readWord returns the 32-bit register, or half of one, at off. Reserved ones read as zero.
func (c *Controller) readWord(off uint32) uint32 {
	r := &c.regs
	switch off {
	case nvme.RegCAP:
		return uint32(r.cap)
	case nvme.RegCAP + 4:
		return uint32(r.cap >> 32)
	case nvme.RegVS:
		return uint32(version)
	case nvme.RegINTMS, nvme.RegINTMC:
		return c.intMask.Load()
	case nvme.RegCC:
		return uint32(r.cc)
	case nvme.RegCSTS:
		return uint32(c.status())
	case nvme.RegAQA:
		return uint32(r.aqa)
	case nvme.RegASQ:
		return uint32(r.asq)
	case nvme.RegASQ + 4:
		return uint32(r.asq >> 32)
	case nvme.RegACQ:
		return uint32(r.acq)
	case nvme.RegACQ + 4:
		return uint32(r.acq >> 32)
	case nvme.RegCRTO:
		return capTimeout
	}
	return 0
}

// writeWord writes the bytes of v that lanes selects, all others being zero.
func (c *Controller) writeWord(off, v, lanes uint32) {
	r := &c.regs
	switch off {
	case nvme.RegINTMS:
		c.intMask.Or(v)
	case nvme.RegINTMC:
		c.intMask.And(^v)
	case nvme.RegCC:
		c.writeCC(nvme.CC((uint32(r.cc)&^lanes | v) & ccWritable))
	case nvme.RegCSTS:
		if nvme.CSTS(v).NSSRO() { // write 1 to clear
			r.csts = r.csts.WithNSSRO(false)
		}
	case nvme.RegNSSR:
		if v == nvme.NSSRReset {
			c.subsystemReset()
		}
	case nvme.RegAQA:
		if c.adminUnlocked(off) {
			r.aqa = nvme.AQA((uint32(r.aqa)&^lanes | v) & aqaBits)
		}
	case nvme.RegASQ, nvme.RegASQ + 4:
		if c.adminUnlocked(off) {
			r.asq = mergeHalf(r.asq, off-nvme.RegASQ, v, lanes)
		}
	case nvme.RegACQ, nvme.RegACQ + 4:
		if c.adminUnlocked(off) {
			r.acq = mergeHalf(r.acq, off-nvme.RegACQ, v, lanes)
		}
	}
}

// adminUnlocked says that the admin queue registers may change: they say where the queues are
// while CC.EN is set.
func (c *Controller) adminUnlocked(off uint32) bool {
	if !c.regs.cc.EN() {
		return true
	}
	c.log.debug("register write ignored while enabled", "register", nvme.RegisterName(off))
	return false
}

func mergeHalf(old uint64, half, v, lanes uint32) uint64 {
	shift := half * 8
	return (old&^(uint64(lanes)<<shift) | uint64(v)<<shift) & queueBase
}
