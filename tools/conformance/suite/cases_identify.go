package suite

import (
	"bytes"
	"slices"
	"strings"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Identify. NVMe Base 2.0c 5.17, NVM Command Set 1.0c 4.1.5.

var identifyCases = []Case{
	{
		ID: "admin.identify.cns-01.version", Ref: "NVMe Base 2.0c 5.17.2.1",
		Text: "VER of Identify Controller is VS",
		run: func(c *ctl) {
			id := c.identifyController()
			c.check(id.VER == c.facts.vs, "VER is %v, VS is %v", id.VER, c.facts.vs)
		},
	},
	{
		ID: "admin.identify.cns-01.strings", Ref: "NVMe Base 2.0c 5.17.2.1, 1.4.2",
		Text: "SN, MN and FR are ASCII, left justified, padded with spaces",
		run: func(c *ctl) {
			id := c.identifyController()
			for _, f := range []struct {
				name  string
				bytes []byte
			}{{"SN", id.SN[:]}, {"MN", id.MN[:]}, {"FR", id.FR[:]}} {
				c.check(!bytes.ContainsFunc(f.bytes, func(r rune) bool { return r < ' ' || r > '~' }), "%s is %q", f.name, f.bytes)
				c.check(f.bytes[0] != ' ', "%s is %q: empty or not left justified", f.name, f.bytes)
			}
		},
	},
	{
		ID: "admin.identify.cns-01.entry-sizes", Ref: "NVMe Base 2.0c 5.17.2.1",
		Text: "SQES and CQES say that entries of 64 and 16 bytes are needed, and not more than are possible",
		run: func(c *ctl) {
			id := c.identifyController()
			c.check(id.SQES&0xF == 6 && id.SQES>>4 >= 6, "SQES=%#x", id.SQES)
			c.check(id.CQES&0xF == 4 && id.CQES>>4 >= 4, "CQES=%#x", id.CQES)
		},
	},
	{
		ID: "admin.identify.cns-01.type", Ref: "NVMe Base 2.0c 5.17.2.1", needs: version(1, 4),
		Text: "CNTRLTYPE says I/O controller",
		run: func(c *ctl) {
			c.check(c.identifyController().CNTRLTYPE == nvme.ControllerTypeIO, "CNTRLTYPE=%d", c.identifyController().CNTRLTYPE)
		},
	},
	{
		ID: "admin.identify.cns-01.nqn", Ref: "NVMe Base 2.0c 5.17.2.1, 4.5", needs: version(1, 3),
		Text: "SUBNQN is an NQN, ended by zeroes",
		run: func(c *ctl) {
			id := c.identifyController()
			name, rest, found := bytes.Cut(id.SUBNQN[:], []byte{0})
			c.check(found && len(name) <= 223 && strings.HasPrefix(string(name), "nqn."), "SUBNQN is %q", name)
			c.check(len(bytes.Trim(rest, "\x00")) == 0, "SUBNQN has bytes after its end: %q", rest)
		},
	},
	{
		ID: "admin.identify.cns-01.nn", Ref: "NVMe Base 2.0c 5.17.2.1",
		Text: "NN is not 0, and no active namespace id is above it",
		run: func(c *ctl) {
			id := c.identifyController()
			c.check(id.NN > 0, "NN=0")
			for _, nsid := range c.facts.active {
				c.check(nsid <= id.NN, "namespace %d is active, NN=%d", nsid, id.NN)
			}
		},
	},
	{
		ID: "admin.identify.cns-01.temperatures", Ref: "NVMe Base 2.0c 5.17.2.1", needs: version(1, 2),
		Text: "WCTEMP and CCTEMP are said, and the critical one is the higher",
		run: func(c *ctl) {
			id := c.identifyController()
			c.check(id.WCTEMP != 0 && id.CCTEMP > id.WCTEMP || id.CCTEMP == 0, "WCTEMP=%d CCTEMP=%d", id.WCTEMP, id.CCTEMP)
			c.check(id.WCTEMP != 0, "WCTEMP=0")
		},
	},
	{
		ID: "admin.identify.cns-01.firmware-slots", Ref: "NVMe Base 2.0c 5.17.2.1",
		Text: "FRMW says 1 to 7 firmware slots",
		run: func(c *ctl) {
			n := c.identifyController().FRMW >> nvme.FRMWSlotsShift & 7
			c.check(n >= 1, "FRMW=%#x: no firmware slot", c.identifyController().FRMW)
		},
	},
	{
		ID: "admin.identify.cns-00.sizes", Ref: "NVM Command Set 1.0c 4.1.5.1", needs: needNS,
		Text: "NSZE >= NCAP >= NUSE, and the format in use is one of those listed",
		run: func(c *ctl) {
			for _, nsid := range c.facts.active {
				ns := c.identifyNamespace(nsid)
				c.check(ns.NSZE > 0 && ns.NSZE >= ns.NCAP && ns.NCAP >= ns.NUSE, "namespace %d: NSZE=%d NCAP=%d NUSE=%d", nsid, ns.NSZE, ns.NCAP, ns.NUSE)
				c.check(uint32(ns.FormatIndex()) < ns.NLBAF.Count(), "namespace %d: format %d of %d", nsid, ns.FormatIndex(), ns.NLBAF.Count())
				c.check(ns.Format().LBADS >= 9, "namespace %d: LBADS=%d", nsid, ns.Format().LBADS)
			}
		},
	},
	{
		ID: "admin.identify.cns-00.formats", Ref: "NVM Command Set 1.0c 4.1.5.1", needs: needNS,
		Text: "each LBA format listed has blocks of at least 512 bytes or is not available, and those beyond NLBAF are 0",
		run: func(c *ctl) {
			for i, f := range c.facts.ns.LBAF {
				if uint32(i) >= c.facts.ns.NLBAF.Count() {
					c.check(f == nvme.LBAFormat{}, "format %d beyond NLBAF is %v", i, f)
				} else {
					c.check(f.LBADS == 0 || f.LBADS >= 9, "format %d is %v", i, f)
				}
			}
		},
	},
	{
		ID: "admin.identify.cns-00.atomics", Ref: "NVM Command Set 1.0c 2.1.4", needs: needNS,
		Text: "no more is atomic when power fails than otherwise, a namespace promises no less than the controller, and atomic boundaries are no closer than what is atomic is long",
		run: func(c *ctl) {
			id := c.identifyController()
			c.check(id.AWUPF <= id.AWUN, "AWUPF=%d AWUN=%d", id.AWUPF, id.AWUN)
			for _, nsid := range c.facts.active {
				ns := c.identifyNamespace(nsid)
				normal, fail := id.AWUN, id.AWUPF
				if ns.NSFEAT&nvme.NSFEATAtomics != 0 {
					c.check(ns.NAWUN == 0 || ns.NAWUN >= id.AWUN, "namespace %d: NAWUN=%d AWUN=%d", nsid, ns.NAWUN, id.AWUN)
					c.check(ns.NAWUPF == 0 || ns.NAWUPF >= id.AWUPF, "namespace %d: NAWUPF=%d AWUPF=%d", nsid, ns.NAWUPF, id.AWUPF)
					normal, fail = max(normal, ns.NAWUN), max(fail, ns.NAWUPF)
				}
				c.check(fail <= normal, "namespace %d: %d blocks when power fails, %d otherwise", nsid, fail.Count(), normal.Count())
				c.check(ns.NABSN == 0 || ns.NABSN >= normal, "namespace %d: NABSN=%d for %d blocks", nsid, ns.NABSN, normal.Count())
				c.check(ns.NABSPF == 0 || ns.NABSPF >= fail, "namespace %d: NABSPF=%d for %d blocks", nsid, ns.NABSPF, fail.Count())
				c.check(ns.NABO == 0 || ns.NABO <= uint16(max(ns.NABSN, ns.NABSPF)), "namespace %d: NABO=%d NABSN=%d NABSPF=%d", nsid, ns.NABO, ns.NABSN, ns.NABSPF)
			}
		},
	},
	{
		ID: "admin.identify.cns-00.copy-limits", Ref: "NVM Command Set 1.0c 4.1.5.1", needs: join(needNS, oncs(nvme.ONCSCopy, "Copy")),
		Text: "with Copy, MSSRL and MCL are not 0",
		run: func(c *ctl) {
			c.check(c.facts.ns.MSSRL != 0 && c.facts.ns.MCL != 0, "MSSRL=%d MCL=%d", c.facts.ns.MSSRL, c.facts.ns.MCL)
		},
	},
	{
		ID: "admin.identify.cns-00.nsid-0", Ref: "NVMe Base 2.0c 3.2.1.5",
		Text: "NSID 0 is Invalid Namespace or Format",
		run:  func(c *ctl) { c.identifyRefused(nvme.CNSNamespace, 0, nvme.StatusInvalidNamespace) },
	},
	{
		ID: "admin.identify.cns-00.nsid-beyond-nn", Ref: "NVMe Base 2.0c 3.2.1.5",
		Text:  "an NSID above NN is Invalid Namespace or Format",
		needs: bitNeed("NN leaves no namespace id", func(f *facts) bool { return f.id.NN < nvme.NSIDAll-1 }),
		run: func(c *ctl) {
			c.identifyRefused(nvme.CNSNamespace, c.facts.id.NN+1, nvme.StatusInvalidNamespace)
			c.identifyRefused(nvme.CNSNamespace, nvme.NSIDAll-1, nvme.StatusInvalidNamespace)
		},
	},
	{
		ID: "admin.identify.cns-00.nsid-all", Ref: "NVM Command Set 1.0c 4.1.5.1",
		Text:  "NSID FFFFFFFFh gives what is common to all namespaces",
		needs: oacs(nvme.OACSNamespaces, "Namespace Management"),
		run: func(c *ctl) {
			ns := c.identifyNamespace(nvme.NSIDAll)
			c.check(ns.NSZE == 0 && ns.NCAP == 0 && ns.NUSE == 0, "NSZE=%d NCAP=%d NUSE=%d, want 0", ns.NSZE, ns.NCAP, ns.NUSE)
			c.check(ns.LBAF[0].LBADS >= 9, "format 0 is %v", ns.LBAF[0])
		},
	},
	{
		ID: "admin.identify.cns-00.inactive", Ref: "NVMe Base 2.0c 5.17.2.1, 3.2.1.5", needs: needHole,
		Text: "an inactive NSID gives a structure of zeroes",
		run: func(c *ctl) {
			p := c.identify(nvme.CNSNamespace, c.facts.inactive())
			c.check(*p == [nvme.IdentifySize]byte{}, "namespace %d is inactive and its data is not zero", c.facts.inactive())
		},
	},
	{
		ID: "admin.identify.cns-02.rising", Ref: "NVMe Base 2.0c 5.17.2.2",
		Text: "the Active Namespace List is rising and ended by 0, and each of it can be identified",
		run: func(c *ctl) {
			c.rising(nvme.CNSActiveNamespaces)
			for _, nsid := range c.facts.active {
				c.check(c.identifyNamespace(nsid).NSZE > 0, "namespace %d is active and has no blocks", nsid)
			}
		},
	},
	{
		ID: "admin.identify.cns-02.paging", Ref: "NVMe Base 2.0c 5.17.2.2", needs: needNS,
		Text: "the Active Namespace List holds ids above CDW1.NSID only",
		run: func(c *ctl) {
			all := c.facts.active
			for i, nsid := range all[:min(len(all), 20)] {
				c.check(slices.Equal(c.activeAfter(nsid), all[i+1:]), "above %d: %v, want %v", nsid, c.activeAfter(nsid), all[i+1:])
				c.check(slices.Equal(c.activeAfter(nsid-1), all[i:]), "above %d: %v, want %v", nsid-1, c.activeAfter(nsid-1), all[i:])
			}
		},
	},
	{
		ID: "admin.identify.cns-02.nsid-all", Ref: "NVMe Base 2.0c 5.17.2.2",
		Text: "NSID FFFFFFFEh or FFFFFFFFh is Invalid Namespace or Format",
		run: func(c *ctl) {
			c.identifyRefused(nvme.CNSActiveNamespaces, nvme.NSIDAll-1, nvme.StatusInvalidNamespace)
			c.identifyRefused(nvme.CNSActiveNamespaces, nvme.NSIDAll, nvme.StatusInvalidNamespace)
		},
	},
	{
		ID: "admin.identify.cns-03.descriptors", Ref: "NVMe Base 2.0c 5.17.2.3", needs: join(version(1, 3), needNS),
		Text: "each active namespace has an identifier, the same as in CNS 00h",
		run: func(c *ctl) {
			for _, nsid := range c.facts.active {
				var d nvme.NamespaceDescriptors
				d.Decode(c.identify(nvme.CNSNamespaceDescriptors, nsid))
				c.check(d.HasEUI64 || d.HasNGUID || d.HasUUID, "namespace %d has no EUI64, NGUID or UUID", nsid)
				ns := c.identifyNamespace(nsid)
				c.check(!d.HasNGUID || d.NGUID == ns.NGUID, "namespace %d: NGUID %x, in CNS 00h %x", nsid, d.NGUID, ns.NGUID)
				c.check(!d.HasEUI64 || d.EUI64 == ns.EUI64, "namespace %d: EUI64 %x, in CNS 00h %x", nsid, d.EUI64, ns.EUI64)
			}
		},
	},
	{
		ID: "admin.identify.cns-03.command-set", Ref: "NVMe Base 2.0c 5.17.2.3", needs: join(needIOCS, needNS),
		Text: "with CAP.CSS bit 6, each namespace says its command set",
		run: func(c *ctl) {
			var d nvme.NamespaceDescriptors
			d.Decode(c.identify(nvme.CNSNamespaceDescriptors, c.facts.nsid))
			c.check(d.HasCSI, "namespace %d has no CSI descriptor", c.facts.nsid)
		},
	},
	{
		ID: "admin.identify.cns-03.nsid-0", Ref: "NVMe Base 2.0c 5.17.2.3, 3.2.1.5", needs: version(1, 3),
		Text: "no descriptors of NSID 0 or FFFFFFFFh: Invalid Namespace or Format",
		run: func(c *ctl) {
			c.identifyRefused(nvme.CNSNamespaceDescriptors, 0, nvme.StatusInvalidNamespace)
			c.identifyRefused(nvme.CNSNamespaceDescriptors, nvme.NSIDAll, nvme.StatusInvalidNamespace)
		},
	},
	{
		ID: "admin.identify.cns-03.inactive", Ref: "NVMe Base 2.0c 5.17.2.3, 3.2.1.5", needs: join(version(1, 3), needHole),
		Text: "no descriptors of an inactive NSID: Invalid Field in Command",
		run: func(c *ctl) {
			c.identifyRefused(nvme.CNSNamespaceDescriptors, c.facts.inactive(), nvme.StatusInvalidField)
		},
	},
	{
		ID: "admin.identify.cns-05", Ref: "NVMe Base 2.0c 5.17.2.4", needs: join(needIOCS, needNS),
		Text: "the NVM command set's own Identify Namespace can be read",
		run:  func(c *ctl) { c.identify(nvme.CNSCSINamespace, c.facts.nsid) },
	},
	{
		ID: "admin.identify.cns-06", Ref: "NVMe Base 2.0c 5.17.2.5", needs: needIOCS,
		Text: "the NVM command set's own Identify Controller can be read",
		run:  func(c *ctl) { c.identify(nvme.CNSCSIController, 0) },
	},
	{
		ID: "admin.identify.cns-07", Ref: "NVMe Base 2.0c 5.17.2.6", needs: needIOCS,
		Text: "the active namespaces of the NVM command set are among all active ones",
		run: func(c *ctl) {
			for _, nsid := range c.rising(nvme.CNSCSIActiveNamespaces) {
				c.check(slices.Contains(c.facts.active, nsid), "namespace %d is not in CNS 02h", nsid)
			}
		},
	},
	{
		ID: "admin.identify.csi-unknown", Ref: "NVMe Base 2.0c 5.17.1", needs: needIOCS,
		Text: "Identify for a command set that does not exist fails",
		run: func(c *ctl) {
			cmd, _ := c.identifyCmd(nvme.CNSCSIController, 0)
			cmd.CDW11 = 0x2F << 24
			c.refused(cmd, nvme.StatusInvalidField, nvme.StatusCommandSetNotSupported, nvme.StatusInvalidCommandSet)
		},
	},
	{
		ID: "admin.identify.cns-08", Ref: "NVMe Base 2.0c 5.17.2.8", needs: join(needIOCS, version(2, 0), needNS),
		Text: "what CNS 08h says of a namespace is what CNS 00h says",
		run: func(c *ctl) {
			ind := new(nvme.IdentifyIndependentNamespace)
			*ind.Bytes() = *c.identify(nvme.CNSIndependentNamespace, c.facts.nsid)
			ns := c.facts.ns
			c.check(ind.NMIC == ns.NMIC && ind.RESCAP == ns.RESCAP && ind.NSATTR == ns.NSATTR, "NMIC %#x RESCAP %#x NSATTR %#x, in CNS 00h %#x %#x %#x",
				ind.NMIC, ind.RESCAP, ind.NSATTR, ns.NMIC, ns.RESCAP, ns.NSATTR)
			c.check(ind.NSTAT&nvme.NSTATReady != 0, "NSTAT=%#x: not ready", ind.NSTAT)
		},
	},
	{
		ID: "admin.identify.cns-10", Ref: "NVMe Base 2.0c 5.17.2.9", needs: oacs(nvme.OACSNamespaces, "Namespace Management"),
		Text: "every active namespace is allocated",
		run: func(c *ctl) {
			allocated := c.rising(nvme.CNSAllocatedNamespaces)
			for _, nsid := range c.facts.active {
				c.check(slices.Contains(allocated, nsid), "namespace %d is active and not allocated", nsid)
			}
		},
	},
	{
		ID: "admin.identify.cns-11", Ref: "NVMe Base 2.0c 5.17.2.10", needs: join(oacs(nvme.OACSNamespaces, "Namespace Management"), needNS),
		Text: "an active namespace reads the same as an allocated one",
		run: func(c *ctl) {
			a, b := c.identify(nvme.CNSNamespace, c.facts.nsid), c.identify(nvme.CNSAllocatedNamespace, c.facts.nsid)
			c.check(*a == *b, "CNS 00h and CNS 11h differ for namespace %d", c.facts.nsid)
		},
	},
	{
		ID: "admin.identify.cns-12", Ref: "NVMe Base 2.0c 5.17.2.11", needs: join(oacs(nvme.OACSNamespaces, "Namespace Management"), needNS),
		Text: "this controller is among those that an active namespace is attached to",
		run: func(c *ctl) {
			ids := controllers(c.identify(nvme.CNSNamespaceControllers, c.facts.nsid))
			c.check(slices.Contains(ids, c.facts.id.CNTLID), "controllers %v, CNTLID=%d", ids, c.facts.id.CNTLID)
		},
	},
	{
		ID: "admin.identify.cns-13", Ref: "NVMe Base 2.0c 5.17.2.12", needs: oacs(nvme.OACSNamespaces, "Namespace Management"),
		Text: "this controller is in the Controller List",
		run: func(c *ctl) {
			ids := controllers(c.identify(nvme.CNSControllers, 0))
			c.check(slices.Contains(ids, c.facts.id.CNTLID), "controllers %v, CNTLID=%d", ids, c.facts.id.CNTLID)
		},
	},
	{
		ID: "admin.identify.cns-1c", Ref: "NVMe Base 2.0c 5.17.2.22", needs: needIOCS,
		Text: "one of the command set combinations has the NVM command set",
		run: func(c *ctl) {
			sets := new(nvme.CommandSets)
			cmd, page := c.identifyCmd(nvme.CNSCommandSets, 0)
			cmd.CDW10 |= 0xFFFF << 16 // of this controller
			c.ok(cmd)
			*sets.Bytes() = [nvme.IdentifySize]byte(page.all())
			c.check(slices.ContainsFunc(sets.Vectors[:], func(v uint64) bool { return v&1 != 0 }), "no combination has it")
		},
	},
	{
		ID: "admin.identify.cns-reserved", Ref: "NVMe Base 2.0c 5.17.1",
		Text: "a reserved CNS is Invalid Field in Command",
		run: func(c *ctl) {
			for _, cns := range []nvme.CNS{0x0F, 0x3F, 0xBF} {
				c.identifyRefused(cns, 0, nvme.StatusInvalidField)
			}
		},
	},
	{
		ID: "admin.identify.prp.offset", Ref: "NVMe Base 2.0c 4.1.1, 5.17.1",
		Text: "Identify's data may begin inside a page and go on in that of PRP2",
		run: func(c *ctl) {
			for _, offset := range []uint64{4, 2048, 4092} {
				d := c.shaped(nvme.IdentifySize, shape{offset: offset, spread: true})
				cmd, _ := c.identifyCmd(nvme.CNSController, 0)
				c.ok(d.on(cmd))
				c.check(bytes.Equal(d.get(), c.facts.id.Bytes()[:]), "other data at offset %d", offset)
				c.check(d.guarded(), "bytes around the data were written, offset %d", offset)
			}
		},
	},
	{
		ID: "admin.identify.prp.unaligned", Ref: "NVMe Base 2.0c 4.1.1",
		Text: "a PRP1 that is not dword aligned is PRP Offset Invalid, or its low bits are ignored",
		run: func(c *ctl) {
			cmd, page := c.identifyCmd(nvme.CNSController, 0)
			cmd.PRP1 |= 2
			cpl := c.adm.exec(cmd)
			if cpl.Status().OK() {
				c.check(bytes.Equal(page.all(), c.facts.id.Bytes()[:]), "it succeeded, and the data is not at PRP1 without its low bits")
				return
			}
			c.adm.want(&cmd, cpl, nvme.StatusPRPOffsetInvalid, nvme.StatusInvalidField)
		},
	},
	{
		ID: "admin.identify.prp.second-offset", Ref: "NVMe Base 2.0c 4.1.1",
		Text: "a PRP2 that is not page aligned is PRP Offset Invalid",
		run: func(c *ctl) {
			d := c.shaped(nvme.IdentifySize, shape{offset: 2048})
			cmd, _ := c.identifyCmd(nvme.CNSController, 0)
			cmd = d.on(cmd)
			cmd.PRP2 += 512
			c.refused(cmd, nvme.StatusPRPOffsetInvalid)
		},
	},
}

// identifyRefused checks that Identify fails.
func (c *ctl) identifyRefused(cns nvme.CNS, nsid uint32, statuses ...nvme.Status) {
	cmd, _ := c.identifyCmd(cns, nsid)
	c.refused(cmd, statuses...)
}

// rising reads a namespace list and checks its order.
func (c *ctl) rising(cns nvme.CNS) []uint32 {
	l := new(nvme.NamespaceList)
	*l.Bytes() = *c.identify(cns, 0)
	ids := l.ID[:l.Len()]
	for i := range ids {
		c.check(i == 0 || ids[i] > ids[i-1], "%v: %d after %d", cns, ids[i], ids[max(i-1, 0)])
	}
	for _, id := range l.ID[l.Len():] {
		c.check(id == 0, "%v: %d after the end of the list", cns, id)
	}
	return ids
}

// controllers decodes a Controller List.
func controllers(p *[nvme.IdentifySize]byte) (ids []uint16) {
	n := int(p[0]) | int(p[1])<<8
	for i := range min(n, 2047) {
		ids = append(ids, uint16(p[2+2*i])|uint16(p[3+2*i])<<8)
	}
	return ids
}
