package nvmetest

import (
	"bytes"
	"encoding/binary"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
)

func (d *Device) admin(cmd *nvme.Command) (nvme.Status, uint32) {
	switch cmd.Opcode {
	case nvme.AdminIdentify:
		return d.identify(cmd), 0
	case nvme.AdminSetFeatures:
		return d.setFeature(cmd)
	case nvme.AdminAbort:
		return nvme.StatusSuccess, d.abort(uint16(cmd.CDW10), uint16(cmd.CDW10>>16))
	case nvme.AdminGetFeatures:
		return nvme.StatusSuccess, 0
	case nvme.AdminGetLogPage:
		data := make([]byte, min(cmd.LogBytes(), 4096))
		if d.cfg.Log != nil {
			d.cfg.Log(cmd, data)
		}
		return d.toDriver(cmd, data), 0
	case nvme.AdminCreateCQ:
		return d.createCQ(cmd), 0
	case nvme.AdminCreateSQ:
		return d.createSQ(cmd), 0
	case nvme.AdminDeleteSQ:
		if cmd.QID() == 0 || d.sqs[cmd.QID()] == nil {
			return nvme.StatusInvalidQueueID, 0
		}
		delete(d.sqs, cmd.QID())
	case nvme.AdminDeleteCQ:
		if cmd.QID() == 0 || d.cqs[cmd.QID()] == nil {
			return nvme.StatusInvalidQueueID, 0
		}
		delete(d.cqs, cmd.QID())
	case nvme.AdminDoorbellBufferConfig, nvme.AdminDoorbellMemory2014:
		return d.shareDoorbells(cmd), 0
	default:
		return d.other(cmd)
	}
	return nvme.StatusSuccess, 0
}

// other executes an admin command by the hook.
func (d *Device) other(cmd *nvme.Command) (nvme.Status, uint32) {
	if d.cfg.Admin == nil {
		return nvme.StatusInvalidOpcode.WithDNR(), 0
	}
	var data []byte
	if cmd.Opcode >= 0xC0 && cmd.Opcode&3 != 0 {
		data = make([]byte, 4*uint64(min(cmd.CDW10, 1<<18)))
	}
	if cmd.Opcode&1 != 0 {
		if st := d.fromDriver(cmd, data); !st.OK() {
			return st, 0
		}
	}
	st, dw0 := d.cfg.Admin(cmd, data)
	if cmd.Opcode&2 != 0 && st.OK() {
		st = d.toDriver(cmd, data)
	}
	return st, dw0
}

func (d *Device) createCQ(cmd *nvme.Command) nvme.Status {
	size := cmd.QSize().Count()
	switch {
	case cmd.QID() == 0 || int(cmd.QID()) > d.queues || d.cqs[cmd.QID()] != nil:
		return nvme.StatusInvalidQueueID
	case size < 2 || size > d.cfg.CAP.MQES().Count():
		return nvme.StatusInvalidQueueSize
	case cmd.CQInterrupts() && int(cmd.CQVector()) >= len(d.vectors):
		return nvme.StatusInvalidVector
	case !d.openCQ(cmd.QID(), size, cmd.PRP1, cmd.CQVector(), cmd.CQInterrupts()):
		return nvme.StatusInvalidField
	}
	return nvme.StatusSuccess
}

func (d *Device) createSQ(cmd *nvme.Command) nvme.Status {
	size := cmd.QSize().Count()
	switch {
	case cmd.QID() == 0 || int(cmd.QID()) > d.queues || d.sqs[cmd.QID()] != nil:
		return nvme.StatusInvalidQueueID
	case size < 2 || size > d.cfg.CAP.MQES().Count():
		return nvme.StatusInvalidQueueSize
	case !d.openSQ(cmd.QID(), cmd.SQCQID(), size, cmd.PRP1):
		return nvme.StatusInvalidCQ
	}
	return nvme.StatusSuccess
}

func (d *Device) shareDoorbells(cmd *nvme.Command) nvme.Status {
	shadow, err := d.view(cmd.PRP1, 4096)
	if err != nil {
		return nvme.StatusInvalidField
	}
	ei, err := d.view(cmd.PRP2, 4096)
	if err != nil {
		return nvme.StatusInvalidField
	}
	d.shadow, d.ei = shadow, ei
	d.Configs.Add(1)
	return nvme.StatusSuccess
}

func (d *Device) setFeature(cmd *nvme.Command) (nvme.Status, uint32) {
	switch cmd.FID() {
	case nvme.FeatureQueues:
		z, _ := nvme.ToZeroBased16(uint32(d.queues))
		return nvme.StatusSuccess, uint32(nvme.MakeQueueCounts(z, z))
	case nvme.FeatureQuiet:
		d.quiet = cmd.CDW11&nvme.FeatureQuietOn != 0
	}
	return nvme.StatusSuccess, 0
}

func (d *Device) identify(cmd *nvme.Command) nvme.Status {
	data := make([]byte, nvme.IdentifySize)
	switch cmd.CNS() {
	case nvme.CNSController:
		id := d.identity()
		copy(data, id.Bytes()[:])
	case nvme.CNSActiveNamespaces:
		var list nvme.NamespaceList
		n := 0
		for i, ns := range d.cfg.Namespaces {
			if id := uint32(i + 1); !ns.Absent && id > cmd.NSID && n < len(list.ID) {
				list.ID[n] = id
				n++
			}
		}
		copy(data, list.Bytes()[:])
	case nvme.CNSNamespace:
		if !d.active(cmd.NSID) {
			return nvme.StatusInvalidNamespace.WithDNR()
		}
		ns := d.cfg.Namespaces[cmd.NSID-1]
		id := nvme.IdentifyNamespace{NSZE: ns.Blocks, NCAP: ns.Blocks, NUSE: ns.Blocks, DLFEAT: nvme.DLFEATReadZeroes}
		id.LBAF[0].LBADS, id.LBAF[0].MS = ns.LBADS, ns.MS
		for i := range id.NGUID {
			id.NGUID[i] = ns.GUID
		}
		copy(data, id.Bytes()[:])
	default:
		return nvme.StatusInvalidField.WithDNR()
	}
	if d.cfg.Identify != nil {
		d.cfg.Identify(cmd, data)
	}
	return d.toDriver(cmd, data)
}

func (d *Device) identity() *nvme.IdentifyController {
	id := &nvme.IdentifyController{
		VID: nvme.PCIVendorGoogle, MDTS: d.cfg.MDTS, VER: nvme.MakeVersion(1, 4, 0), CNTRLTYPE: nvme.ControllerTypeIO,
		SQES: 0x66, CQES: 0x44, NN: uint32(len(d.cfg.Namespaces)), AERL: 3, OAES: uint32(nvme.EventConfigNamespace),
		ONCS: nvme.ONCSCompare | nvme.ONCSDSM | nvme.ONCSWriteZeroes,
		SGLS: d.cfg.SGLS,
	}
	nvme.SetASCII(id.SN[:], "TEST")
	nvme.SetASCII(id.MN[:], "nvmetest")
	nvme.SetASCII(id.FR[:], "1")
	if !d.cfg.NoCache {
		id.VWC = nvme.VWCPresent
	}
	if !d.cfg.NoShadow {
		id.OACS |= nvme.OACSDoorbellBuf
	}
	if !d.cfg.NoQuiet {
		id.SetShadowbell(nvme.ShadowbellCaps{Version: nvme.ShadowbellVersion, Caps: nvme.ShadowbellQuiet})
	}
	return id
}

func (d *Device) active(nsid uint32) bool {
	return nsid != 0 && int(nsid) <= len(d.disks) && !d.cfg.Namespaces[nsid-1].Absent
}

// io executes an I/O command.
func (d *Device) io(cmd *nvme.Command) nvme.Status {
	if cmd.Opcode == nvme.IOFlush {
		d.Flushes.Add(1)
		return nvme.StatusSuccess
	}
	if !d.active(cmd.NSID) {
		return nvme.StatusInvalidNamespace.WithDNR()
	}
	disk, shift := d.disks[cmd.NSID-1], d.cfg.Namespaces[cmd.NSID-1].LBADS
	if cmd.Opcode == nvme.IODSM {
		return d.discard(cmd, disk, shift)
	}
	part, ok := slice(disk, shift, cmd.SLBA(), uint64(cmd.NLB().Count()))
	if !ok {
		return nvme.StatusLBAOutOfRange.WithDNR()
	}
	switch cmd.Opcode {
	case nvme.IORead:
		return d.toDriver(cmd, part)
	case nvme.IOWrite:
		return d.fromDriver(cmd, part)
	case nvme.IOCompare:
		got := make([]byte, len(part))
		if st := d.fromDriver(cmd, got); !st.OK() {
			return st
		}
		if !bytes.Equal(got, part) {
			return nvme.StatusCompareFailure.WithDNR()
		}
	case nvme.IOWriteZeroes:
		clear(part)
	default:
		return nvme.StatusInvalidOpcode.WithDNR()
	}
	return nvme.StatusSuccess
}

func (d *Device) discard(cmd *nvme.Command, disk []byte, shift uint8) nvme.Status {
	ranges := make([]byte, 16*cmd.DSMRanges().Count())
	if st := d.fromDriver(cmd, ranges); !st.OK() {
		return st
	}
	for ; len(ranges) > 0; ranges = ranges[16:] {
		part, ok := slice(disk, shift, binary.LittleEndian.Uint64(ranges[8:]), uint64(binary.LittleEndian.Uint32(ranges[4:])))
		if !ok {
			return nvme.StatusLBAOutOfRange.WithDNR()
		}
		clear(part)
	}
	return nvme.StatusSuccess
}

func slice(disk []byte, shift uint8, lba, blocks uint64) ([]byte, bool) {
	total := uint64(len(disk)) >> shift
	if lba > total || blocks > total-lba {
		return nil, false
	}
	return disk[lba<<shift : (lba+blocks)<<shift], true
}

func (d *Device) extents(cmd *nvme.Command, n int) ([]prp.Extent, nvme.Status) {
	if max := d.identity().MaxTransfer(0); max != 0 && uint64(n) > max {
		return nil, nvme.StatusInvalidField.WithDNR()
	}
	if cmd.PSDT() == nvme.PSDTSGL {
		var w prp.Walker
		return w.WalkSGL(cmd.SGL1(), uint32(n), cmd.Opcode == nvme.IORead, d, nil)
	}
	return prp.Walk(cmd.PRP1, cmd.PRP2, uint32(n), prp.PageSize, 1<<12, d, nil)
}

// toDriver copies data to where the command says.
func (d *Device) toDriver(cmd *nvme.Command, data []byte) nvme.Status {
	out, st := d.extents(cmd, len(data))
	for _, e := range out {
		if !d.WriteIOVA(e.IOVA, data[:e.Len]) {
			return nvme.StatusDataTransferError
		}
		data = data[e.Len:]
	}
	return st
}

// fromDriver fills data from where the command says.
func (d *Device) fromDriver(cmd *nvme.Command, data []byte) nvme.Status {
	out, st := d.extents(cmd, len(data))
	for _, e := range out {
		if !d.ReadIOVA(e.IOVA, data[:e.Len]) {
			return nvme.StatusDataTransferError
		}
		data = data[e.Len:]
	}
	return st
}
