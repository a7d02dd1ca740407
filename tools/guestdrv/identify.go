package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"strings"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/size"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type identifyCmd struct {
	deviceFlags `embed:""`

	JSON bool `name:"json" help:"Print one JSON object, with the field names of nvme-cli."`
}

// Help is what stands below the arguments.
func (identifyCmd) Help() string {
	return `Prints a summary, then what "nvme id-ctrl" and "nvme id-ns" print.`
}

// Run prints what the controller says of itself.
func (i *identifyCmd) Run(ctx context.Context, out *cli.Output) error {
	i.separate(out)
	c, err := i.open(ctx, out, guestdrv.Options{Queues: 1})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := i.lock(out, c); err != nil {
		return err
	}
	d := described{device: i.Device, doorbells: c.Doorbells(), capabilities: c.Capabilities(), controller: c.Identify()}
	for _, ns := range c.Namespaces() {
		d.namespaces = append(d.namespaces, describedNamespace{ns.NSID(), ns.Identify()})
	}
	if i.JSON {
		return d.json(out.Stdout)
	}
	return d.text(out.Stdout)
}

// described is everything that identify prints.
type described struct {
	device, doorbells string
	capabilities      nvme.CAP
	controller        *nvme.IdentifyController
	namespaces        []describedNamespace
}

type describedNamespace struct {
	nsid uint32
	id   *nvme.IdentifyNamespace
}

func (d *described) text(w io.Writer) error {
	var b strings.Builder
	id := d.controller
	fmt.Fprintf(&b, "%s: %s, serial %s, firmware %s\n", d.device, id.Model(), id.Serial(), id.Firmware())
	transfer := "no limit"
	if m := id.MaxTransfer(d.capabilities.MPSMIN()); m != 0 {
		transfer = size.Bytes(m).String()
	}
	fmt.Fprintf(&b, "NVMe %v, queues of %d entries, transfers of %s, doorbells: %s\n\n",
		id.VER, d.capabilities.MQES().Count(), transfer, d.doorbells)
	t := text.Table{Head: []string{"namespace", "size", "block", "blocks", "nguid"}}
	for _, ns := range d.namespaces {
		bs, _ := ns.id.BlockSize()
		t.Add(fmt.Sprint(ns.nsid), size.Bytes(ns.id.NSZE*uint64(bs)).Human(), size.Bytes(bs).String(), text.Count(float64(ns.id.NSZE)),
			hex.EncodeToString(ns.id.NGUID[:]))
	}
	b.WriteString(t.String())
	b.WriteString("\nNVME Identify Controller:\n")
	writeFields(&b, controllerFields(id), 9)
	for _, ns := range d.namespaces {
		fmt.Fprintf(&b, "\nNVME Identify Namespace %d:\n", ns.nsid)
		writeFields(&b, namespaceFields(ns.id), 7)
		for i := range ns.id.NLBAF.Count() {
			f, use := ns.id.LBAF[i&63], ""
			if uint8(i) == ns.id.FormatIndex() {
				use = " (in use)"
			}
			fmt.Fprintf(&b, "lbaf %2d : ms:%-3d lbads:%-2d rp:%#x%s\n", i, f.MS, f.LBADS, f.RP&3, use)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (d *described) json(w io.Writer) error {
	type lbaf struct {
		MS    uint16 `json:"ms"`
		LBADS uint8  `json:"ds"`
		RP    uint8  `json:"rp"`
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"device":%s,"doorbells":%s,"controller":%s,"namespaces":[`, quote(d.device), quote(d.doorbells), controllerFields(d.controller).json())
	for i, ns := range d.namespaces {
		lbafs := []lbaf{}
		for k := range ns.id.NLBAF.Count() {
			f := ns.id.LBAF[k&63]
			lbafs = append(lbafs, lbaf{f.MS, f.LBADS, f.RP & 3})
		}
		formats, err := json.Marshal(lbafs)
		if err != nil {
			return err
		}
		if i > 0 {
			b.WriteByte(',')
		}
		all := append(fields{{name: "nsid", value: ns.nsid}}, namespaceFields(ns.id)...)
		all = append(all, field{name: "lbafs", value: json.RawMessage(formats)})
		b.WriteString(all.json())
	}
	b.WriteString("]}")
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, b.Bytes(), "", "  "); err != nil {
		return err
	}
	pretty.WriteByte('\n')
	_, err := pretty.WriteTo(w)
	return err
}

// field is one line of nvme-cli's output. Its text is that of value, or hexadecimal.
type field struct {
	name  string
	value any
	hex   bool
}

type fields []field

func (f field) text() string {
	if f.hex {
		return fmt.Sprintf("%#x", f.value)
	}
	return fmt.Sprint(f.value)
}

func writeFields(b *strings.Builder, all fields, width int) {
	for _, f := range all {
		fmt.Fprintf(b, "%-*s : %s\n", width, f.name, f.text())
	}
}

// json keeps the order of the fields, which a map would not.
func (all fields) json() string {
	parts := make([]string, len(all))
	for i, f := range all {
		v, err := json.Marshal(f.value)
		if err != nil {
			v = []byte("null")
		}
		parts[i] = quote(f.name) + ":" + string(v)
	}
	return "{" + strings.Join(parts, ",") + "}"
}

func quote(s string) string {
	b, err := json.Marshal(s)
	if err != nil { // a string always marshals
		return `""`
	}
	return string(b)
}

func big128(u nvme.Uint128) *big.Int {
	n := new(big.Int).SetUint64(u.Hi)
	return n.Or(n.Lsh(n, 64), new(big.Int).SetUint64(u.Lo))
}

// controllerFields are those of "nvme id-ctrl", in its order.
func controllerFields(c *nvme.IdentifyController) fields {
	num := func(name string, v any) field { return field{name: name, value: v} }
	hexa := func(name string, v any) field { return field{name: name, value: v, hex: true} }
	return fields{
		hexa("vid", c.VID), hexa("ssvid", c.SSVID), num("sn", c.Serial()), num("mn", c.Model()), num("fr", c.Firmware()),
		num("rab", c.RAB), num("ieee", fmt.Sprintf("%02x%02x%02x", c.IEEE[2], c.IEEE[1], c.IEEE[0])), hexa("cmic", c.CMIC), num("mdts", c.MDTS),
		hexa("cntlid", c.CNTLID), hexa("ver", uint32(c.VER)), hexa("rtd3r", c.RTD3R), hexa("rtd3e", c.RTD3E), hexa("oaes", c.OAES),
		hexa("ctratt", c.CTRATT), hexa("rrls", c.RRLS), num("cntrltype", c.CNTRLTYPE), num("fguid", nvme.FormatUUID(c.FGUID)),
		num("crdt1", c.CRDT1), num("crdt2", c.CRDT2), num("crdt3", c.CRDT3), num("nvmsr", c.NVMSR), num("vwci", c.VWCI), num("mec", c.MEC),
		hexa("oacs", c.OACS), num("acl", uint8(c.ACL)), num("aerl", uint8(c.AERL)), hexa("frmw", c.FRMW), hexa("lpa", c.LPA), num("elpe", uint8(c.ELPE)),
		num("npss", uint8(c.NPSS)), hexa("avscc", c.AVSCC), hexa("apsta", c.APSTA), num("wctemp", c.WCTEMP), num("cctemp", c.CCTEMP), num("mtfa", c.MTFA),
		num("hmpre", c.HMPRE), num("hmmin", c.HMMIN), num("tnvmcap", big128(c.TNVMCAP)), num("unvmcap", big128(c.UNVMCAP)), hexa("rpmbs", c.RPMBS),
		num("edstt", c.EDSTT), num("dsto", c.DSTO), num("fwug", c.FWUG), num("kas", c.KAS), hexa("hctma", c.HCTMA), num("mntmt", c.MNTMT), num("mxtmt", c.MXTMT),
		hexa("sanicap", c.SANICAP), num("hmminds", c.HMMINDS), num("hmmaxd", c.HMMAXD), num("nsetidmax", c.NSETIDMAX), num("endgidmax", c.ENDGIDMAX),
		num("anatt", c.ANATT), num("anacap", c.ANACAP), num("anagrpmax", c.ANAGRPMAX), num("nanagrpid", c.NANAGRPID), num("pels", c.PELS), num("domainid", c.DOMAINID),
		num("megcap", big128(c.MEGCAP)), hexa("sqes", c.SQES), hexa("cqes", c.CQES), num("maxcmd", c.MAXCMD), num("nn", c.NN), hexa("oncs", c.ONCS), hexa("fuses", c.FUSES),
		hexa("fna", c.FNA), hexa("vwc", c.VWC), num("awun", uint16(c.AWUN)), num("awupf", uint16(c.AWUPF)), num("icsvscc", c.ICSVSCC), num("nwpc", c.NWPC),
		num("acwu", uint16(c.ACWU)), hexa("ocfs", c.OCFS), hexa("sgls", c.SGLS), num("mnan", c.MNAN), num("maxdna", big128(c.MAXDNA)), num("maxcna", c.MAXCNA),
		num("subnqn", c.Subsystem()), num("ioccsz", c.IOCCSZ), num("iorcsz", c.IORCSZ), num("icdoff", c.ICDOFF), hexa("fcatt", c.FCATT), num("msdbd", c.MSDBD), num("ofcs", c.OFCS),
	}
}

// namespaceFields are those of "nvme id-ns", in its order, without the formats.
func namespaceFields(n *nvme.IdentifyNamespace) fields {
	num := func(name string, v any) field { return field{name: name, value: v} }
	hexa := func(name string, v any) field { return field{name: name, value: v, hex: true} }
	return fields{
		hexa("nsze", n.NSZE), hexa("ncap", n.NCAP), hexa("nuse", n.NUSE), hexa("nsfeat", n.NSFEAT), num("nlbaf", uint8(n.NLBAF)), hexa("flbas", n.FLBAS),
		hexa("mc", n.MC), hexa("dpc", n.DPC), hexa("dps", n.DPS), hexa("nmic", n.NMIC), hexa("rescap", n.RESCAP), hexa("fpi", n.FPI), num("dlfeat", n.DLFEAT),
		num("nawun", uint16(n.NAWUN)), num("nawupf", uint16(n.NAWUPF)), num("nacwu", uint16(n.NACWU)), num("nabsn", uint16(n.NABSN)), num("nabo", n.NABO),
		num("nabspf", uint16(n.NABSPF)), num("noiob", n.NOIOB), num("nvmcap", big128(n.NVMCAP)), num("npwg", uint16(n.NPWG)), num("npwa", uint16(n.NPWA)),
		num("npdg", uint16(n.NPDG)), num("npda", uint16(n.NPDA)), num("nows", uint16(n.NOWS)), num("mssrl", n.MSSRL), num("mcl", n.MCL), num("msrc", uint8(n.MSRC)),
		num("anagrpid", n.ANAGRPID), hexa("nsattr", n.NSATTR), num("nvmsetid", n.NVMSETID), num("endgid", n.ENDGID),
		num("nguid", hex.EncodeToString(n.NGUID[:])), num("eui64", hex.EncodeToString(n.EUI64[:])),
	}
}
