package ctrl

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestIdentifyController(t *testing.T) {
	h := newEnabled(t, testConfig())
	var id nvme.IdentifyController
	copy(id.Bytes()[:], h.identify(nvme.CNSController, 0))
	if id.Serial() != "SB0001" || id.Model() != "shadowbell" || id.Firmware() != "1.0" || id.Subsystem() != "nqn.2026-11.io.shadowbell:test" {
		t.Errorf("names %q %q %q %q", id.Serial(), id.Model(), id.Firmware(), id.Subsystem())
	}
	if id.VID != 0x1ae0 || id.CNTLID != 7 || id.VER != version || id.CNTRLTYPE != nvme.ControllerTypeIO {
		t.Errorf("VID %#x CNTLID %d VER %v CNTRLTYPE %d", id.VID, id.CNTLID, id.VER, id.CNTRLTYPE)
	}
	if id.MaxTransfer(0) != 1<<20 || id.SQES != 0x66 || id.CQES != 0x44 || id.NN != 3 || id.SGLS != 0x90001 {
		t.Errorf("MDTS %d SQES %#x CQES %#x NN %d SGLS %#x", id.MDTS, id.SQES, id.CQES, id.NN, id.SGLS)
	}
	if id.OACS != nvme.OACSDoorbellBuf|nvme.OACSLBAStatus || id.ONCS != ioCommands|nvme.ONCSSaveSelect|nvme.ONCSTimestamp || id.OCFS != 1 || id.FUSES != 1 || id.ACWU.Count() != 16 || id.AWUN != 0 || id.AWUPF != 0 {
		t.Errorf("OACS %#x ONCS %#x", id.OACS, id.ONCS)
	}
	if id.ACL.Count() != 4 || id.AERL.Count() != 16 || id.ELPE.Count() != 64 || id.FRMW != 3 || id.VWC&nvme.VWCPresent == 0 {
		t.Errorf("ACL %v AERL %v ELPE %v FRMW %#x VWC %#x", id.ACL, id.AERL, id.ELPE, id.FRMW, id.VWC)
	}
	if s, ok := id.Shadowbell(); !ok || s.Caps != nvme.ShadowbellQuiet {
		t.Errorf("shadowbell caps %+v %v", s, ok)
	}
}

func TestIdentifyControllerModes(t *testing.T) {
	for _, mode := range []DoorbellMode{Shadow, Trap, Mmap} {
		cfg := testConfig()
		cfg.Mode = mode
		cfg.Namespaces = nil
		h := newEnabled(t, cfg)
		var id nvme.IdentifyController
		copy(id.Bytes()[:], h.identify(nvme.CNSController, 0))
		if dbc := id.OACS&nvme.OACSDoorbellBuf != 0; dbc != (mode == Shadow) {
			t.Errorf("%v: OACS %#x", mode, id.OACS)
		}
		if s, ok := id.Shadowbell(); !ok || (s.Caps&nvme.ShadowbellQuiet != 0) != (mode != Trap) {
			t.Errorf("%v: shadowbell caps %+v", mode, s)
		}
		if id.VWC&nvme.VWCPresent != 0 || id.NN != 1 {
			t.Errorf("%v, no namespaces: VWC %#x NN %d", mode, id.VWC, id.NN)
		}
	}
}

func TestIdentifyNamespace(t *testing.T) {
	h := newEnabled(t, testConfig())
	var id nvme.IdentifyNamespace
	copy(id.Bytes()[:], h.identify(nvme.CNSNamespace, 1))
	if size, ok := id.BlockSize(); !ok || size != 512 || id.NSZE != 1<<21 || id.NCAP != 1<<21 || id.NUSE != 1<<21 || id.NLBAF.Count() != 2 {
		t.Errorf("size %d NSZE %d", size, id.NSZE)
	}
	if id.NSATTR != 0 || id.DLFEAT != nvme.DLFEATReadZeroes|nvme.DLFEATWZDealloc || id.NSFEAT != nvme.NSFEATOptPerf|nvme.NSFEATAtomics || id.NACWU.Count() != 2048 || id.NAWUN != 0 || id.NAWUPF != 0 || id.NPDG.Count() != 8 || id.NPWG.Count() != 8 {
		t.Errorf("NSATTR %d DLFEAT %d NSFEAT %d NPDG %v NPWG %v", id.NSATTR, id.DLFEAT, id.NSFEAT, id.NPDG, id.NPWG)
	}
	if id.MSSRL != 16384 || id.MCL != 65536 || id.MSRC.Count() != 128 {
		t.Errorf("MSSRL %d MCL %d MSRC %v", id.MSSRL, id.MCL, id.MSRC)
	}
	if id.NGUID != [16]byte{1, 2, 3} {
		t.Errorf("NGUID %x", id.NGUID)
	}
	copy(id.Bytes()[:], h.identify(nvme.CNSNamespace, 3))
	if size, ok := id.BlockSize(); !ok || size != 4096 || id.NSATTR != nvme.NSATTRWriteProtected || id.DLFEAT != 0 || id.NSFEAT != nvme.NSFEATAtomics || id.NACWU.Count() != 256 {
		t.Errorf("namespace 3: size %d NSATTR %d", size, id.NSATTR)
	}
	if zero := make([]byte, nvme.IdentifySize); !bytes.Equal(h.identify(nvme.CNSNamespace, 2), zero) {
		t.Error("an inactive namespace is not all zero")
	}
	for _, nsid := range []uint32{0, 4, nvme.NSIDAll, nvme.NSIDAll - 1} {
		h.fails(identifyCmd(nvme.CNSNamespace, nsid), nvme.StatusInvalidNamespace)
	}
	var ind nvme.IdentifyIndependentNamespace
	copy(ind.Bytes()[:], h.identify(nvme.CNSIndependentNamespace, 3))
	if ind.NSTAT != nvme.NSTATReady || ind.NSATTR != nvme.NSATTRWriteProtected {
		t.Errorf("independent: NSTAT %d NSATTR %d", ind.NSTAT, ind.NSATTR)
	}
}

func TestIdentifyLists(t *testing.T) {
	h := newEnabled(t, testConfig())
	for _, cns := range []nvme.CNS{nvme.CNSActiveNamespaces, nvme.CNSCSIActiveNamespaces} {
		for nsid, want := range map[uint32][]uint32{0: {1, 3}, 1: {3}, 2: {3}, 3: nil, nvme.NSIDAll - 2: nil} {
			var l nvme.NamespaceList
			copy(l.Bytes()[:], h.identify(cns, nsid))
			if l.Len() != len(want) || (len(want) > 0 && l.ID[0] != want[0]) {
				t.Errorf("%v above %d: %v, want %v", cns, nsid, l.ID[:l.Len()], want)
			}
		}
		h.fails(identifyCmd(cns, nvme.NSIDAll), nvme.StatusInvalidNamespace)
		h.fails(identifyCmd(cns, nvme.NSIDAll-1), nvme.StatusInvalidNamespace)
	}
	var d nvme.NamespaceDescriptors
	d.Decode((*[nvme.IdentifySize]byte)(h.identify(nvme.CNSNamespaceDescriptors, 1)))
	if !d.HasNGUID || !d.HasUUID || !d.HasCSI || d.UUID != [16]byte{4, 5, 6} || d.CSI != nvme.CSINVM {
		t.Errorf("descriptors %+v", d)
	}
	for _, nsid := range []uint32{0, 9, nvme.NSIDAll} {
		h.fails(identifyCmd(nvme.CNSNamespaceDescriptors, nsid), nvme.StatusInvalidNamespace)
	}
	h.fails(identifyCmd(nvme.CNSNamespaceDescriptors, 2), nvme.StatusInvalidField) // inactive
}

func TestIdentifyCommandSet(t *testing.T) {
	h := newEnabled(t, testConfig())
	zero := make([]byte, nvme.IdentifySize)
	for _, cns := range []nvme.CNS{nvme.CNSCSINamespace, nvme.CNSCSIController} {
		got := h.identify(cns, 1)
		if cns == nvme.CNSCSIController {
			if got[0] != 12 { // 2^12 pages of 4 KiB
				t.Errorf("VSL %d", got[0])
			}
			got[0] = 0
		}
		if !bytes.Equal(got, zero) {
			t.Errorf("%v says something", cns)
		}
		cmd := identifyCmd(cns, 1)
		cmd.CDW11 = uint32(nvme.CSIZoned) << 24
		h.fails(cmd, nvme.StatusInvalidField)
	}
	for _, cns := range []nvme.CNS{nvme.CNSNVMSetList, nvme.CNSAllocatedNamespaces, nvme.CNSControllers, nvme.CNSCommandSets, 0xff} {
		h.fails(identifyCmd(cns, 1), nvme.StatusInvalidField)
	}
}

func TestDataPointer(t *testing.T) {
	h := newEnabled(t, testConfig())
	split := identifyCmd(nvme.CNSController, 0)
	split.PRP1, split.PRP2 = dataIOVA+0x800, dataIOVA+0x3000
	whole := h.identify(nvme.CNSController, 0)
	h.ok(split)
	got := h.data(dataBytes)
	if !bytes.Equal(got[0x800:0x1000], whole[:0x800]) || !bytes.Equal(got[0x3000:0x3800], whole[0x800:]) {
		t.Error("data over two pages")
	}
	for _, bad := range []struct {
		name       string
		prp1, prp2 uint64
		want       nvme.Status
	}{
		{"PRP1 not dword aligned", dataIOVA + 2, 0, nvme.StatusPRPOffsetInvalid},
		{"PRP2 with an offset", dataIOVA + 0x800, dataIOVA + 0x1004, nvme.StatusPRPOffsetInvalid},
		{"PRP1 outside", 0x5000, 0, nvme.StatusDataTransferError},
		{"PRP2 outside", dataIOVA + 0x800, 1 << 40, nvme.StatusDataTransferError},
		{"PRP1 at the end of all", ^uint64(0xfff), 0, nvme.StatusDataTransferError},
	} {
		cmd := identifyCmd(nvme.CNSController, 0)
		cmd.PRP1, cmd.PRP2 = bad.prp1, bad.prp2
		t.Log(bad.name)
		h.fails(cmd, bad.want)
	}
	for _, flags := range []uint8{0x40, 0x80, 0x01, 0x02} {
		cmd := identifyCmd(nvme.CNSController, 0)
		cmd.Flags = flags
		h.fails(cmd, nvme.StatusInvalidField)
	}
}

// A log read of 64 KiB goes through a PRP list; one whose list lies outside of memory fails.
func TestDataPointerList(t *testing.T) {
	h := newEnabled(t, testConfig())
	for i := range uint64(15) {
		var e [8]byte
		binary.LittleEndian.PutUint64(e[:], ioIOVA+i*0x1000)
		h.mem.WriteIOVA(listIOVA+8*i, e[:])
	}
	var cmd nvme.Command
	if err := cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, 0, 16*4096, false); err != nil {
		t.Fatal(err)
	}
	cmd.PRP1, cmd.PRP2 = dataIOVA, listIOVA
	h.ok(cmd)
	cmd.PRP2 = 0x7000
	h.fails(cmd, nvme.StatusDataTransferError)
	cmd.PRP2 = listIOVA + 4
	h.fails(cmd, nvme.StatusPRPOffsetInvalid)
}

func TestUnknownOpcodes(t *testing.T) {
	h := newEnabled(t, testConfig())
	known := map[uint8]bool{}
	for _, op := range h.c.adminOpcodes() {
		known[op] = true
	}
	for op := range 256 {
		if !known[uint8(op)] {
			h.fails(nvme.Command{Opcode: uint8(op)}, nvme.StatusInvalidOpcode)
		}
	}
}

func TestIdentifyCommandSets(t *testing.T) {
	h := newEnabled(t, testConfig())
	cmd := identifyCmd(nvme.CNSCommandSets, 0)
	for _, cntid := range []uint32{0xffff, 7} {
		cmd.CDW10 = uint32(nvme.CNSCommandSets) | cntid<<16
		h.ok(cmd)
		if p := h.data(16); p[0] != 1<<nvme.CSINVM || !bytes.Equal(p[1:], make([]byte, 15)) {
			t.Errorf("% x, want one combination, of the NVM command set", p)
		}
	}
	cmd.CDW10 = uint32(nvme.CNSCommandSets) | 8<<16
	h.fails(cmd, nvme.StatusInvalidField)
}

// TestFixedLBA: a medium whose block size is its own shows that one, and no other can be asked for.
func TestFixedLBA(t *testing.T) {
	for _, shift := range []uint8{9, 12, 16} {
		n := &Namespace{NSID: 1, Info: backend.Info{Blocks: 100, LBAShift: shift, FixedLBA: true}}
		cfg := testConfig()
		cfg.Namespaces = []Namespace{*n}
		id := newEnabled(t, cfg).c.namespaceData(n)
		if id.NLBAF != 0 || id.FLBAS != 0 || id.LBAF[0].LBADS != shift || id.LBAF[1].LBADS != 0 {
			t.Errorf("2^%d: %d formats, FLBAS %d, %v", shift, id.NLBAF.Count(), id.FLBAS, id.LBAF[:3])
		}
	}
}

// TestIdentifyShowsTheDevice: what a medium says of how it is best written to is the guest's to know.
func TestIdentifyShowsTheDevice(t *testing.T) {
	for _, c := range []struct {
		write, optimal, boundary uint32
		npwg, nows               uint32
		noiob                    uint16
	}{
		{16, 128, 256, 16, 128, 256},
		{8, 0, 0, 8, 8, 0},
		{1, 4, 1 << 20, 1, 4, 0xffff},
	} {
		cfg := testConfig()
		for i := range cfg.Namespaces {
			info := &cfg.Namespaces[i].Info
			info.WriteBlocks, info.OptimalWrite, info.Boundary = c.write, c.optimal, c.boundary
		}
		h := newEnabled(t, cfg)
		var id nvme.IdentifyNamespace
		copy(id.Bytes()[:], h.identify(nvme.CNSNamespace, 1))
		if id.NSFEAT&nvme.NSFEATOptPerf == 0 || id.NPWG.Count() != c.npwg || id.NPWA != id.NPWG || id.NOWS.Count() != c.nows || id.NOIOB != c.noiob || id.NPDG.Count() != 8 {
			t.Errorf("%+v: NSFEAT %#x NPWG %v NPWA %v NOWS %v NOIOB %d NPDG %v", c, id.NSFEAT, id.NPWG, id.NPWA, id.NOWS, id.NOIOB, id.NPDG)
		}
	}
}

// TestIdentifyAtomics: what a medium writes as a whole is a namespace's to promise; the controller promises what all keep.
func TestIdentifyAtomics(t *testing.T) {
	h := newEnabled(t, testConfig())
	for _, c := range []struct{ write, fails, nawun, nawupf, nabsn, nabspf uint32 }{
		{0, 0, 0, 0, 0, 0}, {1, 1, 0, 0, 0, 0}, {64, 1, 63, 0, 63, 0}, {128, 16, 127, 15, 127, 15}, {65536, 65536, 65535, 65535, 65535, 65535},
	} {
		n := Namespace{NSID: 1, Info: backend.Info{Blocks: 1 << 20, LBAShift: 9, AtomicWrite: c.write, AtomicPowerFail: c.fails}}
		id := h.c.namespaceData(&n)
		got := [4]uint32{uint32(id.NAWUN), uint32(id.NAWUPF), uint32(id.NABSN), uint32(id.NABSPF)}
		if got != [4]uint32{c.nawun, c.nawupf, c.nabsn, c.nabspf} || id.NABO != 0 || id.NSFEAT&nvme.NSFEATAtomics == 0 {
			t.Errorf("%+v: %v, NABO %d, NSFEAT %#x", c, got, id.NABO, id.NSFEAT)
		}
	}
	if id := h.c.controllerData(); id.AWUN != 0 || id.AWUPF != 0 {
		t.Errorf("the controller's: %d, %d", id.AWUN, id.AWUPF)
	}
	stays := Namespace{NSID: 1, Info: backend.Info{Blocks: 8, LBAShift: 9, Discard: true, WriteZeroes: true, ZeroesStay: true}}
	if id := h.c.namespaceData(&stays); id.DLFEAT&nvme.DLFEATWZDealloc != 0 {
		t.Errorf("DLFEAT %#x of a medium whose zeroes stay", id.DLFEAT)
	}
}
