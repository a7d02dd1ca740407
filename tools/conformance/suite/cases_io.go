package suite

import (
	"bytes"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// I/O commands that change nothing: Read, Compare, Verify, Flush, and what is refused. NVM Command Set 1.0c 3.2.

var ioCases = []Case{
	{
		ID: "io.read.last", Ref: "NVM Command Set 1.0c 3.2.4", needs: needNS,
		Text: "the last block can be read",
		run:  func(c *ctl) { c.load(c.facts.blocks-1, 1) },
	},
	{
		ID: "io.read.beyond", Ref: "NVM Command Set 1.0c 3.2.4, 2.1.3", needs: needNS,
		Text: "a read that begins or ends beyond the last block is LBA Out of Range",
		run:  func(c *ctl) { c.beyond(nvme.IORead) },
	},
	{
		ID: "io.nsid.0", Ref: "NVMe Base 2.0c 3.2.1.5", needs: needNS,
		Text: "an I/O command with NSID 0 is Invalid Namespace or Format",
		run:  func(c *ctl) { c.ioNSID(0, nvme.StatusInvalidNamespace) },
	},
	{
		ID: "io.nsid.all", Ref: "NVMe Base 2.0c 3.2.1.5", needs: needNS,
		Text: "a read of NSID FFFFFFFFh is Invalid Namespace or Format, or Invalid Field in Command",
		run:  func(c *ctl) { c.ioNSID(nvme.NSIDAll, nvme.StatusInvalidNamespace, nvme.StatusInvalidField) },
	},
	{
		ID: "io.nsid.beyond-nn", Ref: "NVMe Base 2.0c 3.2.1.5",
		Text:  "an I/O command with an NSID above NN is Invalid Namespace or Format",
		needs: join(needNS, bitNeed("NN leaves no namespace id", func(f *facts) bool { return f.id.NN < nvme.NSIDAll-1 })),
		run:   func(c *ctl) { c.ioNSID(c.facts.id.NN+1, nvme.StatusInvalidNamespace) },
	},
	{
		ID: "io.nsid.inactive", Ref: "NVMe Base 2.0c 3.2.1.5", needs: join(needNS, needHole),
		Text: "an I/O command with an inactive NSID is Invalid Field in Command",
		run:  func(c *ctl) { c.ioNSID(c.facts.inactive(), nvme.StatusInvalidField) },
	},
	{
		ID: "io.opcode.reserved", Ref: "NVMe Base 2.0c 7", needs: needNS,
		Text: "a reserved I/O opcode is Invalid Command Opcode",
		run: func(c *ctl) {
			for _, op := range []uint8{0x03, 0x07, 0x13, 0x7B} {
				c.q().refused(nvme.Command{Opcode: op, NSID: c.facts.nsid}, nvme.StatusInvalidOpcode)
			}
		},
	},
	{
		ID: "io.opcode.optional", Ref: "NVMe Base 2.0c 5.17.2.1", needs: needNS,
		Text: "an I/O command that ONCS does not offer is Invalid Command Opcode",
		run: func(c *ctl) {
			tried := 0
			for _, o := range optionalIO {
				// The others would write, if they were there after all.
				harmless := o.op == nvme.IOCompare || o.op == nvme.IOVerify || o.op == nvme.IOReservationReport
				if c.facts.id.ONCS&o.bit == 0 && (harmless || c.mayWrite()) {
					tried++
					c.q().refused(c.rw(o.op, 0, 1, c.data(pageSize)), nvme.StatusInvalidOpcode)
				}
			}
			if tried == 0 {
				c.skipf("ONCS offers everything that can be tried")
			}
		},
	},
	{
		ID: "io.fuse.reserved", Ref: "NVMe Base 2.0c 3.3.3.1", needs: needNS,
		Text: "the reserved value of FUSE is Invalid Field in Command",
		run: func(c *ctl) {
			cmd := c.tick()
			cmd.Flags = 3
			c.q().refused(cmd, nvme.StatusInvalidField)
		},
	},
	{
		ID: "io.fuse.unsupported", Ref: "NVMe Base 2.0c 3.4.2", needs: join(needNS, bitNeed("FUSES is not 0", func(f *facts) bool { return f.id.FUSES == 0 })),
		Text: "without fused operations, FUSE other than 00b is Invalid Field in Command",
		run: func(c *ctl) {
			for _, fuse := range []uint8{1, 2} {
				cmd := c.tick()
				cmd.Flags = fuse
				c.q().refused(cmd, nvme.StatusInvalidField)
			}
		},
	},
	{
		ID: "io.psdt.reserved", Ref: "NVMe Base 2.0c 3.3.3.1", needs: needNS,
		Text: "the reserved value of PSDT is Invalid Field in Command",
		run: func(c *ctl) {
			cmd := c.tick()
			cmd.Flags = 3 << 6
			c.q().refused(cmd, nvme.StatusInvalidField)
		},
	},
	{
		ID: "io.psdt.no-sgl", Ref: "NVMe Base 2.0c 3.3.3.1, 4.1.2", needs: join(needNS, needNoSGL),
		Text: "without SGLs, PSDT other than 00b is Invalid Field in Command",
		run: func(c *ctl) {
			for _, psdt := range []uint8{1, 2} {
				cmd := c.tick()
				cmd.Flags = psdt << 6
				c.q().refused(cmd, nvme.StatusInvalidField)
			}
		},
	},
	{
		ID: "io.mdts.exact", Ref: "NVMe Base 2.0c 5.17.2.1", needs: join(needNS, needMDTS, needRoom),
		Text: "a transfer of exactly MDTS works",
		run: func(c *ctl) {
			d := c.data(c.mdts())
			c.q().ok(c.read(0, c.mdts()/c.facts.lba, d))
			c.check(d.guarded(), "bytes around the data were written")
		},
	},
	{
		ID: "io.mdts.beyond", Ref: "NVMe Base 2.0c 5.17.2.1", needs: join(needNS, needMDTS, needRoom),
		Text: "a transfer of one block more than MDTS is Invalid Field in Command, and writes nothing",
		run: func(c *ctl) {
			n := c.mdts()/c.facts.lba + 1
			if n > 1<<16 {
				c.skipf("no command can ask for more than MDTS")
			}
			d := c.data(n * c.facts.lba)
			for _, p := range d.pages {
				p.fill(guardByte)
			}
			c.q().refused(c.read(0, n, d), nvme.StatusInvalidField)
			c.check(d.pages[0].is(0, pageSize, guardByte), "data was written")
		},
	},
	{
		ID: "io.mdts.most-blocks", Ref: "NVMe Base 2.0c 5.17.2.1",
		Text:  "65536 blocks, where that is more than MDTS, are Invalid Field in Command",
		needs: join(needNS, needMDTS, bitNeed("MDTS allows 65536 blocks", func(f *facts) bool { return f.id.MaxTransfer(0) < f.lba<<16 && f.blocks >= 1<<16 })),
		run: func(c *ctl) {
			c.q().refused(c.read(0, 1<<16, c.data(pageSize*4)), nvme.StatusInvalidField)
		},
	},
	{
		ID: "io.flush", Ref: "NVMe Base 2.0c 7.1", needs: needNS,
		Text: "Flush of a namespace succeeds",
		run:  func(c *ctl) { c.q().ok(nvme.Command{Opcode: nvme.IOFlush, NSID: c.facts.nsid}) },
	},
	{
		ID: "io.flush.all", Ref: "NVMe Base 2.0c 7.1, 5.17.2.1", needs: needNS,
		Text: "Flush of NSID FFFFFFFFh succeeds or is refused as VWC bits 2:1 say",
		run: func(c *ctl) {
			cmd := nvme.Command{Opcode: nvme.IOFlush, NSID: nvme.NSIDAll}
			switch c.facts.id.VWC & (3 << 1) {
			case nvme.VWCFlushAll:
				c.q().ok(cmd)
			case nvme.VWCFlushAllNo:
				c.q().refused(cmd, nvme.StatusInvalidNamespace, nvme.StatusInvalidField)
			default:
				c.skipf("VWC bits 2:1 do not say")
			}
		},
	},
	{
		ID: "io.flush.nsid-0", Ref: "NVMe Base 2.0c 7.1, 3.2.1.5", needs: needNS,
		Text: "Flush of NSID 0 is Invalid Namespace or Format",
		run: func(c *ctl) {
			c.q().refused(nvme.Command{Opcode: nvme.IOFlush}, nvme.StatusInvalidNamespace)
		},
	},
	{
		ID: "io.compare.same", Ref: "NVM Command Set 1.0c 3.2.1", needs: join(needNS, oncs(nvme.ONCSCompare, "Compare")),
		Text: "Compare with what is there succeeds",
		run: func(c *ctl) {
			p := c.load(0, 16)
			c.q().ok(c.rw(nvme.IOCompare, 0, 16, c.data(uint64(len(p))).set(p)))
		},
	},
	{
		ID: "io.compare.differs", Ref: "NVM Command Set 1.0c 3.2.1", needs: join(needNS, oncs(nvme.ONCSCompare, "Compare")),
		Text: "Compare with data that differs in one bit, anywhere, is Compare Failure",
		run: func(c *ctl) {
			p := c.load(0, 16)
			for _, at := range []int{0, 511, 512, len(p) / 2, len(p) - 1} {
				p[at] ^= 0x40
				c.q().refused(c.rw(nvme.IOCompare, 0, 16, c.data(uint64(len(p))).set(p)), nvme.StatusCompareFailure)
				p[at] ^= 0x40
			}
		},
	},
	{
		ID: "io.compare.beyond", Ref: "NVM Command Set 1.0c 3.2.1", needs: join(needNS, oncs(nvme.ONCSCompare, "Compare")),
		Text: "a Compare that begins or ends beyond the last block is LBA Out of Range",
		run:  func(c *ctl) { c.beyond(nvme.IOCompare) },
	},
	{
		ID: "io.verify", Ref: "NVM Command Set 1.0c 3.2.5", needs: join(needNS, oncs(nvme.ONCSVerify, "Verify")),
		Text: "Verify of good blocks succeeds, and moves no data",
		run: func(c *ctl) {
			c.q().ok(c.rw(nvme.IOVerify, 0, 64, nil))
			c.q().ok(c.rw(nvme.IOVerify, c.facts.blocks-1, 1, nil))
		},
	},
	{
		ID: "io.verify.beyond", Ref: "NVM Command Set 1.0c 3.2.5", needs: join(needNS, oncs(nvme.ONCSVerify, "Verify")),
		Text: "a Verify that begins or ends beyond the last block is LBA Out of Range",
		run:  func(c *ctl) { c.beyond(nvme.IOVerify) },
	},
	{
		ID: "io.lba-status", Ref: "NVM Command Set 1.0c 4.2.1", needs: join(needNS, oacs(nvme.OACSLBAStatus, "Get LBA Status")),
		Text: "Get LBA Status answers with descriptors that rise and lie in the range",
		run: func(c *ctl) {
			const n = 4096
			d := c.data(n)
			cmd := d.on(nvme.Command{Opcode: nvme.AdminGetLBAStatus, NSID: c.facts.nsid, CDW12: n/4 - 1, CDW13: 0x11 << 24})
			c.ok(cmd)
			p := d.get()
			count, end := int(le.Uint32(p)), uint64(0)
			c.check(count <= (n-8)/16, "%d descriptors in %d bytes", count, n)
			for i := range count {
				at := p[8+16*i:]
				lba, blocks := le.Uint64(at), uint64(le.Uint32(at[8:]))
				c.check(lba >= end && lba < c.facts.blocks && blocks <= c.facts.blocks-lba, "descriptor %d: %d blocks from %d, the one before ends at %d", i, blocks, lba, end)
				end = lba + blocks
			}
		},
	},
	prpCase("one-page", "in one page", func(c *ctl) (uint64, shape) { return c.facts.lba, shape{} }),
	prpCase("offset", "that begin inside a page", func(c *ctl) (uint64, shape) { return 512 * (pageSize / 512) / 2, shape{offset: 1024} }),
	prpCase("dword-offset", "that begin at any dword", func(c *ctl) (uint64, shape) { return pageSize, shape{offset: 4, spread: true} }),
	prpCase("two-pages", "in two pages that do not follow each other", func(c *ctl) (uint64, shape) { return 2 * pageSize, shape{spread: true} }),
	prpCase("list", "in a list of pages", func(c *ctl) (uint64, shape) { return 16 * pageSize, shape{spread: true} }),
	prpCase("list-offset", "in a list of pages, from inside the first to inside the last", func(c *ctl) (uint64, shape) { return 8 * pageSize, shape{offset: 2052, spread: true} }),
	prpCase("list-inside", "in a list that begins inside a page", func(c *ctl) (uint64, shape) { return 9 * pageSize, shape{list: 256, spread: true} }),
	prpCase("list-ends", "in a list whose last entry is the last of its page", func(c *ctl) (uint64, shape) { return 9 * pageSize, shape{list: pageSize - 8*8} }),
	prpCase("list-chained", "in a list that goes on in a second page", func(c *ctl) (uint64, shape) { return 20 * pageSize, shape{list: pageSize - 5*8, spread: true} }),
	prpCase("list-chained-first", "in a list whose first entry is a pointer to the next page", func(c *ctl) (uint64, shape) { return 7 * pageSize, shape{list: pageSize - 8} }),
	{
		ID: "io.prp.list-unaligned", Ref: "NVMe Base 2.0c 4.1.1", needs: needNS,
		Text: "a list pointer whose bits 1:0 are not 0 is PRP Offset Invalid, or they are ignored",
		run: func(c *ctl) {
			d := c.data(4 * pageSize)
			cmd := c.read(0, 4*pageSize/c.facts.lba, d)
			cmd.PRP2 |= 3
			cpl := c.q().exec(cmd)
			c.q().want(&cmd, cpl, nvme.StatusSuccess, nvme.StatusPRPOffsetInvalid)
			if cpl.Status().OK() {
				c.check(bytes.Equal(d.get(), c.load(0, 4*pageSize/c.facts.lba)), "it succeeded, and the data is not where the list without the low bits says")
			}
		},
	},
	{
		ID: "io.prp.entry-offset", Ref: "NVMe Base 2.0c 4.1.1", needs: needNS,
		Text: "a list entry that is not page aligned is PRP Offset Invalid",
		run: func(c *ctl) {
			d := c.data(4 * pageSize)
			pages := []buf{d.pages[1], d.pages[2], d.pages[3]}
			pages[1].iova += 512
			d.prp2 = c.prpList(pages, 0)
			c.q().refused(c.read(0, 4*pageSize/c.facts.lba, d), nvme.StatusPRPOffsetInvalid)
		},
	},
	{
		ID: "io.prp.unaligned", Ref: "NVMe Base 2.0c 4.1.1", needs: needNS,
		Text: "a PRP1 that is not dword aligned is PRP Offset Invalid, or its low bits are ignored",
		run: func(c *ctl) {
			d := c.data(c.facts.lba)
			cmd := c.read(0, 1, d)
			cmd.PRP1 |= 1
			cpl := c.q().exec(cmd)
			c.q().want(&cmd, cpl, nvme.StatusSuccess, nvme.StatusPRPOffsetInvalid)
			if cpl.Status().OK() {
				c.check(bytes.Equal(d.get(), c.load(0, 1)), "it succeeded, and the data is not at PRP1 without its low bits")
			}
		},
	},
	{
		ID: "io.prp.unused", Ref: "NVMe Base 2.0c 4.1.1", needs: needNS,
		Text: "PRP2 is not looked at when PRP1 covers the transfer",
		run: func(c *ctl) {
			cmd := c.read(0, 1, c.data(c.facts.lba))
			cmd.PRP2 = ^uint64(0)
			c.q().ok(cmd)
		},
	},
	{
		ID: "io.prp.unmapped", Ref: "NVMe Base 2.0c 4.1.1, figure 101", needs: join(needNS, needIOVA),
		Text: "memory that the controller cannot reach is Data Transfer Error, in the data and in the list",
		run: func(c *ctl) {
			d := c.data(4 * pageSize)
			data, list := c.read(0, 1, d), c.read(0, 4*pageSize/c.facts.lba, d)
			data.PRP1, list.PRP2 = nowhere, nowhere
			c.q().refused(data, nvme.StatusDataTransferError)
			c.q().refused(list, nvme.StatusDataTransferError)
			c.q().ok(c.tick())
			c.alive()
		},
	},
}

// needRoom is for transfers of MDTS, which must fit the suite's memory and the namespace.
var needRoom = bitNeed("MDTS is beyond what the suite transfers", func(f *facts) bool { return f.id.MaxTransfer(0) <= leastSize/2 })

// needIOVA is for addresses of no memory: a device behind no IOMMU would go to the machine's bus with them.
var needIOVA = bitNeed("addresses are the machine's own: one of no memory is not safe to use", func(f *facts) bool { return f.isolated })

// nowhere is an address of no memory.
const nowhere = 1 << 50

func (c *ctl) mayWrite() bool { return c.cfg.Destructive || c.cfg.NSID != 0 }

// ioNSID checks that a read of a namespace fails.
func (c *ctl) ioNSID(nsid uint32, statuses ...nvme.Status) {
	cmd := c.tick()
	cmd.NSID = nsid
	c.q().refused(cmd, statuses...)
}

// beyond checks that a command at and over the end of the namespace is LBA Out of Range.
func (c *ctl) beyond(opcode uint8) {
	end := c.facts.blocks
	d := c.data(16 * c.facts.lba)
	if opcode == nvme.IOWriteZeroes || opcode == nvme.IOVerify || opcode == nvme.IOWriteUncorrectable {
		d = nil
	}
	for _, r := range []struct{ lba, blocks uint64 }{{end, 1}, {end - 1, 2}, {end - 7, 16}, {1 << 62, 1}, {^uint64(0), 1}, {^uint64(0) - 3, 16}} {
		cmd := c.rw(opcode, r.lba, r.blocks, d)
		c.q().refused(cmd, nvme.StatusLBAOutOfRange)
	}
	c.q().ok(c.tick())
}

// prpCase reads into memory of a shape and compares it with what plain reads say.
func prpCase(name, where string, how func(c *ctl) (n uint64, s shape)) Case {
	return Case{
		ID: "io.prp." + name, Ref: "NVMe Base 2.0c 4.1.1", needs: needNS,
		Text: fmt.Sprintf("data %s arrives there, and nothing around it is written", where),
		run: func(c *ctl) {
			n, s := how(c)
			n = max(n, c.facts.lba)
			if limit := c.mdts(); limit != 0 && n > limit {
				c.skipf("%d bytes are more than MDTS", n)
			}
			if c.mayWrite() {
				for off := uint64(0); off < n; off += c.facts.lba {
					c.store(off/c.facts.lba, pattern(off+n, c.facts.lba))
				}
			}
			var want []byte
			for off := uint64(0); off < n; off += c.facts.lba {
				want = append(want, c.load(off/c.facts.lba, 1)...)
			}
			d := c.shaped(n, s)
			c.q().ok(c.read(0, n/c.facts.lba, d))
			c.check(d.guarded(), "bytes around the data were written")
			got := d.get()
			c.check(bytes.Equal(got, want), "other data from byte %d on", firstDifference(got, want))
		},
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
