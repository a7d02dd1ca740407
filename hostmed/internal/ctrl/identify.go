package ctrl

import (
	"math/bits"
	"slices"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Identify. NVMe Base 2.0c 5.17, NVM Command Set 1.0c 4.1.5.

const (
	warningTemperature  = 343 // kelvin
	criticalTemperature = 353
	shutdownMicros      = 30_000_000 // RTD3E: how long a shutdown's flush may take
	resumeMicros        = 1_000_000  // RTD3R: how long hostmed may take to answer after power-on
	supportedEvents     = nvme.EventConfigNamespace | nvme.EventConfigTelemetry | nvme.SMARTWarningSpare | nvme.SMARTWarningTemperature | nvme.SMARTWarningReliability |
		nvme.SMARTWarningReadOnly | nvme.SMARTWarningBackup
)

// ouiLocal is IEEE, least significant byte first. The project has no number of its own: this is one of those that
// anybody may use locally (02-53-42h).
var ouiLocal = [3]byte{0x42, 0x53, 0x02}

func (c *Controller) identify(cmd *nvme.Command) result {
	switch cmd.CNS() {
	case nvme.CNSCSINamespace, nvme.CNSCSIController, nvme.CNSCSIActiveNamespaces, nvme.CNSCSIAllocated, nvme.CNSCSIAllocatedNamespace:
		if cmd.IdentifyCSI() != nvme.CSINVM {
			return fail(nvme.StatusInvalidField, dword(11, 24), "only the NVM command set is there")
		}
	}
	switch cmd.CNS() {
	case nvme.CNSNamespace:
		if cmd.NSID == nvme.NSIDAll && c.manages() {
			return c.toHost(cmd, commonNamespaceData().Bytes()[:])
		}
		return c.identifyNamespace(cmd, func(n *Namespace) *[nvme.IdentifySize]byte { return c.namespaceData(n).Bytes() })
	case nvme.CNSCSINamespace: // no storage tags and no protection information: all zero
		return c.identifyNamespace(cmd, func(*Namespace) *[nvme.IdentifySize]byte { return new([nvme.IdentifySize]byte) })
	case nvme.CNSIndependentNamespace:
		return c.identifyNamespace(cmd, func(n *Namespace) *[nvme.IdentifySize]byte { return independentData(n).Bytes() })
	case nvme.CNSNamespaceDescriptors:
		return c.identifyDescriptors(cmd)
	case nvme.CNSController:
		return c.toHost(cmd, c.controllerData().Bytes()[:])
	case nvme.CNSCSIController:
		return c.toHost(cmd, ioLimits().Bytes()[:])
	case nvme.CNSCommandSets:
		return c.identifyCommandSets(cmd)
	case nvme.CNSActiveNamespaces, nvme.CNSCSIActiveNamespaces:
		return c.identifyActive(cmd)
	}
	return c.identifyManaged(cmd)
}

// identifyNamespace answers with data of the namespace, or zeroes for one that could be and is not.
func (c *Controller) identifyNamespace(cmd *nvme.Command, data func(*Namespace) *[nvme.IdentifySize]byte) result {
	if cmd.NSID == 0 || cmd.NSID > c.highestNSID() {
		return fail(nvme.StatusInvalidNamespace, inNSID, "no such namespace")
	}
	if n := c.namespace(cmd.NSID); n != nil {
		return c.toHost(cmd, data(n)[:])
	}
	return c.toHost(cmd, make([]byte, nvme.IdentifySize))
}

// notAttached is what becomes of a command for nsid, which is no active namespace: an id up to NN is valid, and merely inactive. NVMe
// Base 2.0c 3.2.1.5.
func (c *Controller) notAttached(nsid uint32) result {
	if nsid-1 < c.highestNSID() {
		return fail(nvme.StatusInvalidField, inNSID, "nothing is attached as this namespace")
	}
	return fail(nvme.StatusInvalidNamespace, inNSID, "no such namespace")
}

func (c *Controller) identifyActive(cmd *nvme.Command) result {
	if cmd.NSID >= nvme.NSIDAll-1 {
		return fail(nvme.StatusInvalidNamespace, inNSID, "no namespace id is larger")
	}
	var list nvme.NamespaceList
	n := 0
	for i := range c.cfg.Namespaces {
		if id := c.cfg.Namespaces[i].NSID; id > cmd.NSID && n < len(list.ID) {
			list.ID[n] = id
			n++
		}
	}
	return c.toHost(cmd, list.Bytes()[:])
}

func (c *Controller) identifyDescriptors(cmd *nvme.Command) result {
	n := c.namespace(cmd.NSID)
	if n == nil {
		return c.notAttached(cmd.NSID)
	}
	var zero [16]byte
	d := nvme.NamespaceDescriptors{
		NGUID: n.Info.NGUID, HasNGUID: n.Info.NGUID != zero,
		UUID: n.Info.UUID, HasUUID: n.Info.UUID != zero,
		CSI: nvme.CSINVM, HasCSI: true,
	}
	data := new([nvme.IdentifySize]byte)
	d.Encode(data)
	return c.toHost(cmd, data[:])
}

// identifyCommandSets lists the combinations of command sets that Set Features can choose: there is one, of one.
func (c *Controller) identifyCommandSets(cmd *nvme.Command) result {
	const thisController = 0xffff
	if id := cmd.IdentifyCNTID(); id != thisController && id != c.cfg.CNTLID {
		return fail(nvme.StatusInvalidField, dword(10, 16), "another controller's command sets")
	}
	var sets nvme.CommandSets
	sets.Vectors[0] = 1 << nvme.CSINVM
	return c.toHost(cmd, sets.Bytes()[:])
}

func (c *Controller) controllerData() *nvme.IdentifyController {
	id := &nvme.IdentifyController{
		VID:       c.cfg.VID,
		SSVID:     c.cfg.SSVID,
		RAB:       6,
		IEEE:      ouiLocal,
		MDTS:      uint8(bits.TrailingZeros32(c.cfg.MDTSBytes / minPageSize)),
		CNTLID:    c.cfg.CNTLID,
		VER:       version,
		RTD3R:     resumeMicros,
		RTD3E:     shutdownMicros,
		OAES:      uint32(nvme.EventConfigNamespace),
		CNTRLTYPE: nvme.ControllerTypeIO,
		ACL:       abortLimit - 1,
		AERL:      aerLimit - 1,
		FRMW:      nvme.FRMWSlot1ReadOnly | 1<<nvme.FRMWSlotsShift,
		LPA:       nvme.LPACommandEffects | nvme.LPAExtended | nvme.LPATelemetry | nvme.LPAPersistentEvent | nvme.LPASupportedPages,
		ELPE:      errorLogSize - 1,
		AVSCC:     1, // C0h has the usual format
		NPSS:      nvme.ZeroBased8(len(powerStates) - 1),
		APSTA:     1,
		KAS:       keepAliveUnit,
		PELS:      1, // 64 KiB
		WCTEMP:    warningTemperature,
		CCTEMP:    criticalTemperature,
		SQES:      0x66,
		CQES:      0x44,
		NN:        c.highestNSID(),
		ONCS:      nvme.ONCSSaveSelect | nvme.ONCSTimestamp,
		VWC:       nvme.VWCFlushAllNo,
	}
	if c.writeCache() {
		id.VWC |= nvme.VWCPresent
	}
	if self := c.cfg.Self; self != nil && len(self.Subsystem().Controllers()) > 1 {
		id.CMIC = nvme.CMICMultiPort | nvme.CMICMultiController
	}
	if c.cfg.Self != nil {
		id.NWPC = nvme.NWPCProtect | nvme.NWPCUntilPowerCycle | nvme.NWPCForEver
	}
	if c.cfg.Mode == Shadow {
		id.OACS = nvme.OACSDoorbellBuf
	}
	c.identifyIO(id)
	if c.cfg.Self != nil {
		id.CTRATT |= nvme.CTRATTHostID128
	}
	if c.reserves() {
		id.ONCS |= nvme.ONCSReservations
	}
	if c.canFormat() {
		id.OACS |= nvme.OACSFormat
	}
	if c.manages() {
		id.OACS |= nvme.OACSNamespaces
		total, left := c.cfg.Self.Subsystem().Capacity()
		id.TNVMCAP, id.UNVMCAP = nvme.Uint128{Lo: total}, nvme.Uint128{Lo: left}
		id.CTRATT |= nvme.CTRATTGranularity
	}
	if c.passes(nvme.AdminDeviceSelfTest) {
		id.OACS |= nvme.OACSSelfTest
		dev := &c.device().Device().Controller
		id.EDSTT, id.DSTO = dev.EDSTT, dev.DSTO
	}
	nvme.SetASCII(id.SN[:], c.cfg.Serial)
	nvme.SetASCII(id.MN[:], c.cfg.Model)
	nvme.SetASCII(id.FR[:], c.cfg.Firmware)
	copy(id.SUBNQN[:len(id.SUBNQN)-1], c.cfg.SubNQN)
	copy(id.PSD[:], powerStates[:])
	caps := nvme.ShadowbellCaps{Version: nvme.ShadowbellVersion}
	if c.quietSupported() {
		caps.Caps |= nvme.ShadowbellQuiet
	}
	id.SetShadowbell(caps)
	return id
}

func (c *Controller) namespaceData(n *Namespace) *nvme.IdentifyNamespace {
	info := &n.Info
	id := &nvme.IdentifyNamespace{
		NSZE:   info.Blocks,
		NCAP:   info.Blocks,
		NUSE:   info.Blocks,
		DLFEAT: deallocateFeatures(info),
		NMIC:   n.sharing(),
		RESCAP: n.reservations(),
		NSATTR: n.attributes(),
		NGUID:  info.NGUID,
		NVMCAP: nvme.Uint128{Lo: info.Size()},
	}
	setFormats(id, formats(info), info.LBAShift)
	id.FPI = n.progress()
	c.identifyNamespaceIO(id, info)
	if info.OptimalBlocks > 0 {
		id.NSFEAT |= nvme.NSFEATOptPerf
		id.NPDG = zeroBased(info.OptimalBlocks)
		id.NPDA = id.NPDG
		// Writes go to a page cache or to memory, in pages.
		id.NPWG = zeroBased(uint32(max(minPageSize>>info.LBAShift, 1)))
		id.NPWA = id.NPWG
		id.NOWS = id.NPWG
	}
	if info.WriteBlocks > 0 {
		id.NSFEAT |= nvme.NSFEATOptPerf
		id.NPWG = zeroBased(info.WriteBlocks)
		id.NPWA = id.NPWG
		id.NOWS = zeroBased(max(info.OptimalWrite, info.WriteBlocks))
	}
	id.NOIOB = uint16(min(info.Boundary, 1<<16-1))
	return id
}

// progress is FPI: what percentage of a format is left to do. Nothing says how far the host's file system is, so it is all until it is nothing.
func (n *Namespace) progress() uint8 {
	switch {
	case n.Of == nil:
		return 0
	case n.Of.Formatting():
		return nvme.FPISupported | 100
	}
	return nvme.FPISupported
}

// blockSizes are the LBA formats that a namespace can be formatted with, as powers of two.
var blockSizes = [...]uint8{9, 12}

// setFormats fills in the LBA formats, of which that with shift is in use.
func setFormats(id *nvme.IdentifyNamespace, list []uint8, shift uint8) {
	for i, f := range list {
		id.LBAF[i].LBADS = f
		id.NLBAF = nvme.ZeroBased8(i)
		if f == shift {
			id.FLBAS = uint8(i)
		}
	}
}

// formats lists the LBA formats of a namespace with this medium. One that the operator has chosen is the last; where the block size is the medium's own it is
// the only one.
func formats(info *backend.Info) []uint8 {
	if info.FixedLBA {
		return []uint8{info.LBAShift}
	}
	list := slices.Clone(blockSizes[:])
	if !slices.Contains(list, info.LBAShift) {
		list = append(list, info.LBAShift)
	}
	return list
}

func independentData(n *Namespace) *nvme.IdentifyIndependentNamespace {
	info := &n.Info
	id := &nvme.IdentifyIndependentNamespace{NMIC: n.sharing(), RESCAP: n.reservations(), NSATTR: n.attributes(), NSTAT: nvme.NSTATReady}
	if info.OptimalBlocks > 0 || info.WriteBlocks > 0 {
		id.NSFEAT = nvme.NSFEATOptPerf
	}
	id.FPI = n.progress()
	return id
}

// sharing is NMIC.
func (n *Namespace) sharing() uint8 {
	if n.Of != nil && n.Of.Shared {
		return nvme.NMICShared
	}
	return 0
}

// attributes is NSATTR.
func (n *Namespace) attributes() uint8 {
	if n.Info.ReadOnly || n.Protection != subsys.Unprotected {
		return nvme.NSATTRWriteProtected
	}
	return 0
}

func deallocateFeatures(info *backend.Info) uint8 {
	v := uint8(nvme.DLFEATReadUnknown)
	if info.DiscardZeroes {
		v = nvme.DLFEATReadZeroes
	}
	if info.Discard && info.WriteZeroes && !info.ZeroesStay {
		v |= nvme.DLFEATWZDealloc
	}
	return v
}

// zeroBased stores count as one less, cut to what the field holds.
func zeroBased(count uint32) nvme.ZeroBased16 {
	z, _ := nvme.ToZeroBased16(min(count, 1<<16))
	return z
}
