package suite

import (
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Admin commands as such, and Abort. NVMe Base 2.0c 3.3.3.1, 5.1.

var adminCases = []Case{
	{
		ID: "admin.opcode.reserved", Ref: "NVMe Base 2.0c 5, figure 139",
		Text: "a reserved admin opcode is Invalid Command Opcode",
		run: func(c *ctl) {
			for _, op := range []uint8{0x03, 0x07, 0x0B, 0x2F, 0x7A} {
				c.refused(nvme.Command{Opcode: op}, nvme.StatusInvalidOpcode)
			}
		},
	},
	{
		ID: "admin.opcode.optional", Ref: "NVMe Base 2.0c 5, figure 139",
		Text: "an admin command that OACS does not offer is Invalid Command Opcode",
		run: func(c *ctl) {
			tried := 0
			for _, o := range []struct {
				bit uint16
				op  uint8
			}{
				{nvme.OACSSecurity, nvme.AdminSecurityReceive}, {nvme.OACSSelfTest, nvme.AdminDeviceSelfTest},
				{nvme.OACSDirectives, nvme.AdminDirectiveReceive}, {nvme.OACSMI, nvme.AdminMIReceive}, {nvme.OACSVirtual, nvme.AdminVirtualization},
				{nvme.OACSDoorbellBuf, nvme.AdminDoorbellBufferConfig}, {nvme.OACSLBAStatus, nvme.AdminGetLBAStatus},
			} {
				if c.facts.id.OACS&o.bit == 0 {
					tried++
					cmd := c.data(pageSize).on(nvme.Command{Opcode: o.op, NSID: c.facts.nsid})
					c.refused(cmd, nvme.StatusInvalidOpcode)
				}
			}
			if tried == 0 {
				c.skipf("OACS offers everything")
			}
		},
	},
	{
		ID: "admin.fuse", Ref: "NVMe Base 2.0c 3.3.3.1, 3.4.2",
		Text: "a fused admin command, or a reserved value of FUSE, is Invalid Field in Command",
		run: func(c *ctl) {
			for _, fuse := range []uint8{1, 2, 3} {
				cmd, _ := c.identifyCmd(nvme.CNSController, 0)
				cmd.Flags = fuse
				c.refused(cmd, nvme.StatusInvalidField)
			}
		},
	},
	{
		ID: "admin.psdt", Ref: "NVMe Base 2.0c 3.3.3.1",
		Text: "admin commands over PCIe use PRPs: PSDT other than 00b is Invalid Field in Command",
		run: func(c *ctl) {
			for _, psdt := range []uint8{1, 2, 3} {
				cmd, _ := c.identifyCmd(nvme.CNSController, 0)
				cmd.Flags = psdt << 6
				c.refused(cmd, nvme.StatusInvalidField)
			}
		},
	},
	{
		ID: "admin.reserved-fields", Ref: "NVMe Base 2.0c 1.4",
		Text: "reserved dwords of a command are not looked at, or are Invalid Field in Command",
		run: func(c *ctl) {
			cmd, page := c.identifyCmd(nvme.CNSController, 0)
			cmd.CDW2, cmd.CDW3, cmd.CDW12, cmd.CDW13, cmd.CDW15 = 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF
			cpl := c.adm.exec(cmd)
			c.adm.want(&cmd, cpl, nvme.StatusSuccess, nvme.StatusInvalidField)
			c.check(!cpl.Status().OK() || [4096]byte(page.all()) == *c.facts.id.Bytes(), "other data than without them")
		},
	},
	{
		ID: "admin.order", Ref: "NVMe Base 2.0c 3.3.1",
		Text: "many admin commands at once all complete",
		run: func(c *ctl) {
			for range 5 {
				for range 60 {
					cmd, _ := c.identifyCmd(nvme.CNSController, 0)
					c.adm.push(cmd)
				}
				c.adm.ring()
				c.settled(c.adm)
			}
		},
	},
	{
		ID: "admin.no-dma", Ref: "NVMe Base 2.0c 5.17.1",
		Text: "a command that fails writes no data",
		run: func(c *ctl) {
			cmd, page := c.identifyCmd(0xBF, 0)
			page.fill(guardByte)
			c.refused(cmd, nvme.StatusInvalidField)
			c.check(page.is(0, page.n, guardByte), "data was written")
		},
	},
	{
		ID: "admin.abort.unknown-cid", Ref: "NVMe Base 2.0c 5.1",
		Text: "Abort of a command that is not there succeeds, and says in DW0 that nothing was aborted",
		run: func(c *ctl) {
			c.q()
			for _, sqid := range []uint16{0, 1} {
				cpl := c.ok(abort(sqid, 0x7777))
				c.check(cpl.Result&1 == 1, "SQ %d: DW0=%#x, want bit 0 set", sqid, cpl.Result)
			}
		},
	},
	{
		ID: "admin.abort.unknown-sq", Ref: "NVMe Base 2.0c 5.1",
		Text: "Abort in an SQ that is not there fails, or says that nothing was aborted",
		run: func(c *ctl) {
			cmd := abort(9, 1)
			cpl := c.adm.exec(cmd)
			c.adm.want(&cmd, cpl, nvme.StatusSuccess, nvme.StatusInvalidField, nvme.StatusInvalidQueueID)
			c.check(!cpl.Status().OK() || cpl.Result&1 == 1, "DW0=%#x, want bit 0 set", cpl.Result)
		},
	},
	{
		ID: "admin.abort.event-request", Ref: "NVMe Base 2.0c 5.1, 5.2",
		Text: "an aborted Asynchronous Event Request completes with Command Abort Requested, one that was not stays",
		run: func(c *ctl) {
			cid := c.adm.submit(nvme.Command{Opcode: nvme.AdminAsyncEventRequest})
			cpl := c.ok(abort(0, cid))
			if cpl.Result&1 == 1 {
				c.never("the request completed, and Abort had said that it was not aborted", func() bool { c.adm.cq.reap(); return len(c.adm.out) == 0 })
				return
			}
			cmd := c.adm.out[cid]
			c.adm.want(&cmd, c.adm.wait(cid), nvme.StatusAbortRequested)
		},
	},
	{
		ID: "admin.abort.io", Ref: "NVMe Base 2.0c 5.1", needs: needNS,
		Text: "Abort of I/O commands in flight: each completes once, successfully or with Command Abort Requested",
		run: func(c *ctl) {
			q := c.q()
			var cids []uint16
			for range 50 {
				cids = append(cids, q.push(c.tick()))
			}
			q.ring()
			n := int(c.facts.id.ACL.Count())
			for i := 0; i < len(cids); i += n {
				for _, cid := range cids[i:min(i+n, len(cids))] {
					c.adm.push(abort(1, cid))
				}
				c.adm.ring()
				c.settled(c.adm)
			}
			for _, cid := range cids {
				cmd := c.tick()
				q.want(&cmd, q.wait(cid), nvme.StatusSuccess, nvme.StatusAbortRequested)
			}
		},
	},
	{
		ID: "admin.keep-alive", Ref: "NVMe Base 2.0c 5.18, 5.27.1.12",
		Text:  "Keep Alive succeeds, and its timer can be set and read",
		needs: bitNeed("KAS is 0", func(f *facts) bool { return f.id.KAS != 0 }),
		run: func(c *ctl) {
			c.ok(nvme.Command{Opcode: nvme.AdminKeepAlive})
			c.setFeature(nvme.FeatureKeepAlive, 0, 60_000)
			got := c.getFeature(nvme.FeatureKeepAlive, 0, nvme.FeatureCurrent, 0)
			c.check(got >= 60_000, "KATO is %d ms after 60000 were set", got)
			c.ok(nvme.Command{Opcode: nvme.AdminKeepAlive})
			c.setFeature(nvme.FeatureKeepAlive, 0, 0)
		},
	},
}

func abort(sqid, cid uint16) (cmd nvme.Command) {
	cmd.SetAbort(sqid, cid)
	return cmd
}
