package nvmecli

import (
	"encoding/hex"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// seen is what our own driver has read of a controller.
type seen struct {
	caps        nvme.CAP
	version     nvme.Version
	ctrl        nvme.IdentifyController
	limits      nvme.IdentifyControllerNVM
	ns          map[int]nvme.IdentifyNamespace
	descriptors map[int]nvme.NamespaceDescriptors
}

// look reads what the stock driver and its tools will have to find too.
func look(t *testing.T, sub hostmed.SubsystemConfig) (list []seen) {
	t.Helper()
	for _, cc := range sub.Controllers {
		c, err := guestdrv.Open(t.Context(), "vfio-user:"+cc.Socket, guestdrv.Options{})
		if err != nil {
			t.Fatal(err)
		}
		s := seen{
			caps: c.Capabilities(), version: c.Version(), ctrl: *c.Identify(),
			ns: map[int]nvme.IdentifyNamespace{}, descriptors: map[int]nvme.NamespaceDescriptors{},
		}
		identify := func(cns nvme.CNS, nsid uint32) *[nvme.IdentifySize]byte {
			page := new([nvme.IdentifySize]byte)
			if _, err := c.Admin(t.Context(), &nvme.Command{Opcode: nvme.AdminIdentify, NSID: nsid, CDW10: uint32(cns)}, page[:]); err != nil {
				t.Fatal(err)
			}
			return page
		}
		*s.limits.Bytes() = *identify(nvme.CNSCSIController, 0)
		for _, n := range c.Namespaces() {
			id := int(n.NSID())
			s.ns[id] = *n.Identify()
			var d nvme.NamespaceDescriptors
			d.Decode(identify(nvme.CNSNamespaceDescriptors, n.NSID()))
			s.descriptors[id] = d
		}
		list = append(list, s)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	return list
}

// sameFields compares every field of a wire structure with the JSON key of its name, except those named in but.
func sameFields(t *testing.T, what string, v any, got map[string]any, but ...string) {
	t.Helper()
	s := reflect.ValueOf(v).Elem()
	for i := range s.NumField() {
		name := s.Type().Field(i).Name
		if name == "_" || slices.Contains(but, name) {
			continue
		}
		x, ok := got[strings.ToLower(name)]
		if !ok {
			t.Errorf("%s does not say %s", what, name)
			continue
		}
		if got, want := fmt.Sprint(x), printed(s.Field(i)); strings.TrimRight(got, " ") != want {
			t.Errorf("%s: %s is %q, want %q", what, name, got, want)
		}
	}
}

// printed is how nvme-cli prints a field.
func printed(f reflect.Value) string {
	switch f.Kind() {
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return fmt.Sprint(f.Uint())
	case reflect.Struct:
		return fmt.Sprint(f.Interface().(nvme.Uint128).Lo)
	}
	b := make([]byte, f.Len())
	reflect.Copy(reflect.ValueOf(b), f)
	switch len(b) {
	case 3: // IEEE
		return fmt.Sprint(uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16)
	case 8, 20, 40, 256: // FR, SN, MN, SUBNQN
		return nvme.ASCII(b)
	}
	return hex.EncodeToString(b)
}

// identify is everything that describes: list, list-subsys, id-ctrl, id-ns, list-ns, list-ctrl, ns-descs, cmdset-ind-id-ns, nvm-id-ctrl,
// nvm-id-ns, id-iocs, get-ns-id, show-regs, show-topology.
func identify(t *testing.T, b *bench) {
	list(t, b)
	identifyController(t, b)
	for nsid := range b.seen[0].ns {
		identifyNamespace(t, b, nsid)
	}
	registers(t, b)
}

func list(t *testing.T, b *bench) {
	type listed struct {
		NameSpace                                                    int
		DevicePath, GenericPath, Firmware, ModelNumber, SerialNumber string
		UsedBytes, MaximumLBA, PhysicalSize, SectorSize              uint64
	}
	name := b.disks[0].Name
	id := b.seen[0].ctrl
	var want []listed
	for _, nsid := range []int{1, 2} {
		n := b.seen[0].ns[nsid]
		block, _ := n.BlockSize()
		size := n.NSZE * uint64(block)
		want = append(want, listed{
			NameSpace: nsid, DevicePath: b.block(nsid), GenericPath: strings.Replace(b.block(nsid), "nvme", "ng", 1),
			Firmware: id.Firmware(), ModelNumber: b.sub.Model, SerialNumber: b.sub.Serial,
			UsedBytes: size, MaximumLBA: n.NSZE, PhysicalSize: size, SectorSize: uint64(block),
		})
	}
	var got struct{ Devices []listed }
	b.json(t, &got, "nvme list")
	slices.SortFunc(got.Devices, func(x, y listed) int { return x.NameSpace - y.NameSpace })
	if !slices.Equal(got.Devices, want) {
		t.Errorf("nvme list: %+v, want %+v", got.Devices, want)
	}
	if want[0].PhysicalSize != 64<<20 || want[0].SectorSize != 512 || want[1].PhysicalSize != 32<<20 || want[1].SectorSize != 4096 {
		t.Errorf("%+v: hostmed was told of 64 MiB in blocks of 512 bytes and of 32 MiB in blocks of 4096", want)
	}
	b.says(t, "nvme list", b.sub.Serial, b.sub.Model, b.block(1), b.block(2), "67.11  MB /  67.11  MB    512   B +  0 B", "4 KiB +  0 B")

	type path struct{ Name, Transport, Address, State string }
	want1 := path{name, "pcie", b.disks[0].PCI, "live"}
	var hosts []struct {
		Subsystems []struct {
			NQN   string
			Paths []path
		}
	}
	b.json(t, &hosts, "nvme list-subsys")
	if len(hosts) != 1 || len(hosts[0].Subsystems) != 1 || hosts[0].Subsystems[0].NQN != b.sub.NQN || !slices.Equal(hosts[0].Subsystems[0].Paths, []path{want1}) {
		t.Errorf("nvme list-subsys: %+v, want %s by way of %+v", hosts, b.sub.NQN, want1)
	}
	b.says(t, "nvme list-subsys", "NQN="+b.sub.NQN, fmt.Sprintf("+- %s pcie %s live", name, b.disks[0].PCI))
	b.says(t, "nvme show-topology", b.sub.NQN, name, "live")
	for nsid := range b.seen[0].ns {
		b.says(t, fmt.Sprintf("nvme get-ns-id %s", b.block(nsid)), fmt.Sprintf("namespace-id:%d", nsid))
	}
}

func identifyController(t *testing.T, b *bench) {
	id := b.seen[0].ctrl
	got := b.object(t, "nvme id-ctrl "+b.ctrl())
	sameFields(t, "id-ctrl", &id, got, "PSD", "VendorSpecific", "FGUID")
	if id.Serial() != b.sub.Serial || id.Model() != b.sub.Model || id.Subsystem() != b.sub.NQN {
		t.Errorf("%s, %s, %s: hostmed was told %+v", id.Serial(), id.Model(), id.Subsystem(), b.sub)
	}
	states, _ := got["psds"].([]any)
	if len(states) != int(id.NPSS.Count()) {
		t.Errorf("id-ctrl: %d power states, want %d", len(states), id.NPSS.Count())
	}
	for i, s := range states {
		s := s.(map[string]any)
		if p := id.PSD[i]; number(t, s["max_power"]) != uint64(p.MP) || number(t, s["entry_lat"]) != uint64(p.ENLAT) || number(t, s["exit_lat"]) != uint64(p.EXLAT) {
			t.Errorf("id-ctrl: power state %d is %v, want %+v", i, s, p)
		}
	}
	b.says(t, "nvme id-ctrl -H "+b.ctrl(),
		"I/O Controller", "Doorbell Buffer Config Supported", "Compare Supported", "Data Set Management Supported", "Write Zeroes Supported",
		"Save and Select Supported", "Timestamp Supported", "Volatile Write Cache Present", "Max SQ Entry Size (64)", "Max CQ Entry Size (16)",
		"70 °C (343 K)", "non-operational")

	var ids struct {
		List []struct{ NSID int } `json:"nsid_list"`
	}
	if b.json(t, &ids, "nvme list-ns "+b.ctrl()); len(ids.List) != 2 || ids.List[0].NSID != 1 || ids.List[1].NSID != 2 {
		t.Errorf("list-ns: %+v, want 1 and 2", ids)
	}
	sameFields(t, "nvm-id-ctrl", &b.seen[0].limits, b.object(t, "nvme nvm-id-ctrl "+b.ctrl()))
	b.says(t, "nvme id-iocs "+b.ctrl(), "I/O Command Set Combination[0]:1")
}

func identifyNamespace(t *testing.T, b *bench, nsid int) {
	dev, id, d := b.block(nsid), b.seen[0].ns[nsid], b.seen[0].descriptors[nsid]
	got := b.object(t, "nvme id-ns "+dev)
	sameFields(t, "id-ns "+dev, &id, got, "LBAF", "EUI64", "VendorSpecific")
	formats, _ := got["lbafs"].([]any)
	if len(formats) != int(id.NLBAF.Count()) {
		t.Errorf("id-ns %s: %d formats, want %d", dev, len(formats), id.NLBAF.Count())
	}
	for i, f := range formats {
		f := f.(map[string]any)
		if want := id.LBAF[i]; number(t, f["ds"]) != uint64(want.LBADS) || number(t, f["ms"]) != 0 || number(t, f["rp"]) != uint64(want.RP) {
			t.Errorf("id-ns %s: format %d is %v, want %v", dev, i, f, want)
		}
	}
	b.says(t, "nvme id-ns -H "+dev, fmt.Sprintf("Data Size: %d", 1<<id.Format().LBADS), "(in use)", "Bytes Read From a Deallocated Logical Block and its Metadata are 0x00")

	var descs struct {
		List []struct{ Type, NGUID, UUID, CSI string } `json:"ns-descs"`
	}
	b.json(t, &descs, "nvme ns-descs "+dev)
	uuid := fmt.Sprintf("%x-%x-%x-%x-%x", d.UUID[:4], d.UUID[4:6], d.UUID[6:8], d.UUID[8:10], d.UUID[10:])
	found := map[string]string{}
	for _, x := range descs.List {
		found[x.Type] = x.NGUID + x.UUID + x.CSI
	}
	if want := map[string]string{"nguid": hex.EncodeToString(id.NGUID[:]), "uuid": uuid, "csi": "0"}; !maps.Equal(found, want) || d.NGUID != id.NGUID {
		t.Errorf("ns-descs %s: %v, want %v", dev, found, want)
	}
	// The kernel calls the disk by them.
	sysfs := "cat /sys/block/" + strings.TrimPrefix(dev, "/dev/")
	if got := b.Run(t, sysfs+"/wwid"); got != "uuid."+uuid {
		t.Errorf("the kernel calls %s %s, want uuid.%s", dev, got, uuid)
	}

	independent := b.object(t, "nvme cmdset-ind-id-ns "+dev)
	want := nvme.IdentifyIndependentNamespace{NSFEAT: id.NSFEAT & nvme.NSFEATOptPerf, NMIC: id.NMIC, RESCAP: id.RESCAP, FPI: id.FPI, NSATTR: id.NSATTR, NSTAT: nvme.NSTATReady}
	sameFields(t, "cmdset-ind-id-ns "+dev, &want, independent)
	nvm := b.object(t, "nvme nvm-id-ns "+dev)
	for _, k := range []string{"lbstm", "pic", "pifa"} {
		if number(t, nvm[k]) != 0 {
			t.Errorf("nvm-id-ns %s: %s is %v: there is no protection information", dev, k, nvm[k])
		}
	}

	// What the block layer makes of it.
	block := 1 << id.Format().LBADS
	minimal, optimal, physical := block, 0, block
	if id.NSFEAT&nvme.NSFEATOptPerf != 0 {
		minimal = block * int(id.NPWG.Count())
		physical = min(minimal, block*int(b.seen[0].ctrl.AWUPF.Count()))
		if id.NOWS != 0 {
			optimal = block * int(id.NOWS.Count())
		}
	}
	for file, want := range map[string]any{
		"queue/logical_block_size": block, "queue/physical_block_size": physical, "queue/minimum_io_size": minimal,
		"queue/optimal_io_size": optimal, "queue/discard_granularity": block, "queue/max_hw_sectors_kb": 1024, "size": int(id.NSZE) * block / 512,
		"queue/write_cache": map[bool]string{true: "write back", false: "write through"}[b.seen[0].ctrl.VWC&nvme.VWCPresent != 0],
		"queue/fua":         1, "queue/rotational": 0, "queue/nr_zones": 0, "ro": 0,
	} {
		if got := b.Run(t, sysfs+"/"+file); got != fmt.Sprint(want) {
			t.Errorf("%s of %s is %s, want %v", file, dev, got, want)
		}
	}
}

// registers: show-regs says the same as the fields of CAP that our driver read, and the state of an enabled controller.
func registers(t *testing.T, b *bench) {
	for name, v := range b.object(t, "nvme show-regs "+b.ctrl()) {
		want, ok := map[string]uint64{
			"cap": uint64(b.seen[0].caps), "vs": uint64(b.seen[0].version), "cc": 0x460061, "csts": 1, "aqa": 0x1f001f, "crto": uint64(b.seen[0].caps.TO()),
		}[name]
		if name == "asq" || name == "acq" {
			if number(t, v)&0xfff != 0 || number(t, v) == 0 {
				t.Errorf("show-regs: %s is %v", name, v)
			}
		} else if n := number(t, v); n != want {
			t.Errorf("show-regs: %s is %#x, want %#x (known: %v)", name, n, want, ok)
		}
	}
	b.says(t, "nvme show-regs -H "+b.ctrl()+" | tr -s ' '",
		"NVM Subsystem Reset Supported (NSSRS): Yes", "Doorbell Stride (DSTRD): 4 bytes", "Contiguous Queues Required (CQR): Yes",
		"Maximum Queue Entries Supported (MQES): 4096", "Ready (RDY): Yes", "Controller Fatal Status (CFS): False")
}
