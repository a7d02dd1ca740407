package suite

import (
	"bytes"
	"slices"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Format, and namespaces that come and go. NVMe Base 2.0c 5.14 (Format NVM), 5.22, 5.23.

var (
	needFormat = join(needNS, oacs(nvme.OACSFormat, "Format NVM"))
	needManage = join(needNS, oacs(nvme.OACSNamespaces, "Namespace Management"))
	// needCapacity is for a new namespace. A controller that says no total capacity does not say what is left either.
	needCapacity = join(needManage, bitNeed("UNVMCAP leaves no room for a namespace", func(f *facts) bool {
		return f.id.UNVMCAP.Hi != 0 || f.id.UNVMCAP.Lo >= leastSize || f.id.TNVMCAP == nvme.Uint128{}
	}))
)

var manageCases = []Case{
	{
		ID: "format.same", Ref: "NVMe Base 2.0c 5.14", needs: needFormat, does: formats,
		Text: "Format NVM with the format in use keeps the namespace's size, and no old data can be read",
		run: func(c *ctl) {
			p := pattern(41, c.facts.lba)
			c.store(testLBA, p)
			before := c.identifyNamespace(c.facts.nsid)
			c.ok(c.formatCmd(before.FormatIndex(), 1))
			after := c.identifyNamespace(c.facts.nsid)
			c.check(after.NSZE == before.NSZE && after.FLBAS == before.FLBAS, "NSZE %d FLBAS %#x, before %d %#x", after.NSZE, after.FLBAS, before.NSZE, before.FLBAS)
			cpl := c.q().exec(c.read(testLBA, 1, c.data(c.facts.lba)))
			if cpl.Status().OK() {
				c.check(!bytes.Equal(c.load(testLBA, 1), p), "the data of before can be read")
			}
			c.store(testLBA, p)
			c.check(bytes.Equal(c.load(testLBA, 1), p), "a block that was written after the format reads as something else")
		},
	},
	{
		ID: "format.unknown", Ref: "NVMe Base 2.0c 5.14", needs: needFormat, does: formats,
		Text: "Format NVM with a format that is not listed is Invalid Format",
		run: func(c *ctl) {
			n := c.facts.ns.NLBAF.Count()
			if n > 15 {
				c.skipf("all formats of LBAFL are listed")
			}
			c.refused(c.formatCmd(uint8(n), 0), nvme.StatusInvalidFormat)
			c.refused(c.formatCmd(15, 0), nvme.StatusInvalidFormat)
		},
	},
	{
		ID: "format.each", Ref: "NVMe Base 2.0c 5.14, NVM Command Set 1.0c 4.1.5.1", needs: needFormat, does: formats,
		Text: "after Format NVM the namespace says the new format and has about the same bytes",
		run: func(c *ctl) {
			was := c.facts.ns.FormatIndex()
			bytesBefore := c.facts.blocks * c.facts.lba
			for i := range uint8(min(c.facts.ns.NLBAF.Count(), 16)) {
				f := c.facts.ns.LBAF[i]
				if f.LBADS == 0 || f.MS != 0 || f.LBADS > 12 {
					continue
				}
				c.ok(c.formatCmd(i, 0))
				ns := c.identifyNamespace(c.facts.nsid)
				c.check(ns.FormatIndex() == i, "format %d in use after %d", ns.FormatIndex(), i)
				size := ns.NSZE << f.LBADS
				c.check(size <= bytesBefore && size+4096 > bytesBefore, "%d bytes in format %d, before %d", size, i, bytesBefore)
			}
			c.ok(c.formatCmd(was, 0))
			c.check(c.identifyNamespace(c.facts.nsid).NSZE == c.facts.blocks, "NSZE=%d in the old format again, was %d", c.identifyNamespace(c.facts.nsid).NSZE, c.facts.blocks)
		},
	},
	{
		ID: "format.nsid", Ref: "NVMe Base 2.0c 5.14, 3.2.1.5", needs: needFormat, does: formats,
		Text: "Format NVM of a namespace id that is not valid fails",
		run: func(c *ctl) {
			cmd := c.formatCmd(0, 0)
			cmd.NSID = 0
			c.refused(cmd, nvme.StatusInvalidNamespace, nvme.StatusInvalidField)
			if c.facts.id.NN < nvme.NSIDAll-1 {
				cmd.NSID = c.facts.id.NN + 1
				c.refused(cmd, nvme.StatusInvalidNamespace)
			}
		},
	},
	{
		ID: "namespace.life", Ref: "NVMe Base 2.0c 5.22, 5.23", needs: needCapacity, does: formats,
		Text: "a namespace is created, attached, used, detached and deleted, and every list says so",
		run: func(c *ctl) {
			nsid := c.createNamespace()
			c.check(slices.Contains(c.rising(nvme.CNSAllocatedNamespaces), nsid), "namespace %d was created and is not allocated", nsid)
			c.check(!slices.Contains(c.activeAfter(0), nsid), "namespace %d is active before it was attached", nsid)
			c.ok(c.attachCmd(nsid, 0, c.facts.id.CNTLID))
			c.check(slices.Contains(c.activeAfter(0), nsid), "namespace %d was attached and is not active", nsid)
			ns := c.identifyNamespace(nsid)
			lba, _ := ns.BlockSize()
			d := c.data(uint64(lba)).set(pattern(nsidSeed, uint64(lba)))
			cmd := c.write(0, 1, d)
			cmd.NSID = nsid
			c.q().ok(cmd)
			c.refused(c.attachCmd(nsid, 0, c.facts.id.CNTLID), nvme.StatusNamespaceAlreadyAttached)
			c.ok(c.attachCmd(nsid, 1, c.facts.id.CNTLID))
			c.check(!slices.Contains(c.activeAfter(0), nsid), "namespace %d was detached and is active", nsid)
			c.q().refused(cmd, nvme.StatusInvalidField)
			c.refused(c.attachCmd(nsid, 1, c.facts.id.CNTLID), nvme.StatusNamespaceNotAttached)
			c.ok(nvme.Command{Opcode: nvme.AdminNamespaceManagement, NSID: nsid, CDW10: 1})
			c.check(!slices.Contains(c.rising(nvme.CNSAllocatedNamespaces), nsid), "namespace %d was deleted and is allocated", nsid)
		},
	},
	{
		ID: "namespace.event", Ref: "NVMe Base 2.0c 5.2.1, 5.16.1.5", needs: needCapacity, does: formats, peer: true,
		Text: "a namespace that is attached to a controller is an event there, and in its Changed Namespace List until that is read",
		run: func(c *ctl) {
			o := c.second()
			if nvme.EventConfig(o.facts.id.OAES)&nvme.EventConfigNamespace == 0 {
				c.skipf("OAES.Namespace Attribute Notices is 0")
			}
			o.clearLog(nvme.LogChangedNamespaces)
			o.setFeature(nvme.FeatureAsyncEvents, 0, uint32(nvme.EventConfigNamespace))
			o.aer()
			nsid := c.createNamespace()
			c.ok(c.attachCmd(nsid, 0, o.facts.id.CNTLID))
			o.wantEvent(nvme.EventNotice, nvme.EventNoticeNamespace, nvme.LogChangedNamespaces)
			first := le.Uint32(o.log(nvme.LogChangedNamespaces, 0, pageSize))
			active := slices.Contains(o.activeAfter(0), nsid)
			o.clearLog(nvme.LogChangedNamespaces)
			rest := le.Uint32(o.log(nvme.LogChangedNamespaces, 0, pageSize))
			o.aer()
			c.ok(nvme.Command{Opcode: nvme.AdminNamespaceManagement, NSID: nsid, CDW10: 1})
			o.wantEvent(nvme.EventNotice, nvme.EventNoticeNamespace, nvme.LogChangedNamespaces)
			c.check(first == nsid, "the list begins with %d, namespace %d was attached", first, nsid)
			c.check(active, "namespace %d is not active there", nsid)
			c.check(rest == 0, "the list begins with %d after it was read", rest)
		},
	},
	{
		ID: "namespace.reserved-select", Ref: "NVMe Base 2.0c 5.22, 5.23, 1.4", needs: needManage, does: formats,
		Text: "reserved values of SEL are Invalid Field in Command",
		run: func(c *ctl) {
			c.refused(c.page4k().on(nvme.Command{Opcode: nvme.AdminNamespaceManagement, NSID: c.facts.nsid, CDW10: 7}), nvme.StatusInvalidField)
			c.refused(c.attachCmd(c.facts.nsid, 7, c.facts.id.CNTLID), nvme.StatusInvalidField)
		},
	},
	{
		ID: "namespace.attach.controllers", Ref: "NVMe Base 2.0c 5.22", needs: needManage, does: formats,
		Text: "a controller list that is empty, or names a controller that is not there, is Controller List Invalid",
		run: func(c *ctl) {
			c.refused(c.attachCmd(c.facts.nsid, 1), nvme.StatusControllerListInvalid, nvme.StatusInvalidField)
			c.refused(c.attachCmd(c.facts.nsid, 1, 0xFFEF), nvme.StatusControllerListInvalid, nvme.StatusInvalidControllerID)
		},
	},
	{
		ID: "namespace.delete.absent", Ref: "NVMe Base 2.0c 5.23, 3.2.1.5", needs: needManage, does: formats,
		Text: "to delete a namespace that is not there fails",
		run: func(c *ctl) {
			for _, nsid := range []uint32{0, nvme.NSIDAll - 1} {
				c.refused(nvme.Command{Opcode: nvme.AdminNamespaceManagement, NSID: nsid, CDW10: 1}, nvme.StatusInvalidNamespace, nvme.StatusInvalidField)
			}
		},
	},
}

const nsidSeed = 42

// page4k is a buffer of one page.
func (c *ctl) page4k() *data { return c.data(pageSize) }

// formatCmd returns a Format NVM of the namespace under test; ses is Secure Erase Settings.
func (c *ctl) formatCmd(format, ses uint8) nvme.Command {
	return nvme.Command{Opcode: nvme.AdminFormatNVM, NSID: c.facts.nsid, CDW10: uint32(format&0xF) | uint32(ses)<<9}
}

// attachCmd returns a Namespace Attachment: sel 0 attaches, 1 detaches.
func (c *ctl) attachCmd(nsid, sel uint32, controllers ...uint16) nvme.Command {
	p := make([]byte, pageSize)
	le.PutUint16(p, uint16(len(controllers)))
	for i, id := range controllers {
		le.PutUint16(p[2+2*i:], id)
	}
	return c.page4k().set(p).on(nvme.Command{Opcode: nvme.AdminNamespaceAttachment, NSID: nsid, CDW10: sel})
}

// createNamespace creates a namespace of leastSize bytes in format 0 and returns its id.
func (c *ctl) createNamespace() uint32 {
	p := make([]byte, pageSize)
	blocks := uint64(leastSize) >> c.facts.ns.LBAF[0].LBADS
	le.PutUint64(p, blocks)
	le.PutUint64(p[8:], blocks)
	return c.ok(c.page4k().set(p).on(nvme.Command{Opcode: nvme.AdminNamespaceManagement})).Result
}
