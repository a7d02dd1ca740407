package suite

import (
	"bytes"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// I/O commands that change user data. NVM Command Set 1.0c 3.2.

var (
	needWZ    = join(needNS, oncs(nvme.ONCSWriteZeroes, "Write Zeroes"))
	needDSM   = join(needNS, oncs(nvme.ONCSDSM, "Dataset Management"))
	needCopy  = join(needNS, oncs(nvme.ONCSCopy, "Copy"), bitNeed("MSSRL is 0: no range can be copied", func(f *facts) bool { return f.ns.MSSRL >= 2 }))
	needWU    = join(needNS, oncs(nvme.ONCSWriteUncorrectable, "Write Uncorrectable"))
	needAtoms = join(needNS, needFused, oncs(nvme.ONCSCompare, "Compare"))
)

// testLBA is where most cases write.
const testLBA = 1024

var writeCases = []Case{
	{
		ID: "io.write.shapes", Ref: "NVM Command Set 1.0c 3.2.6, NVMe Base 2.0c 4.1.1", needs: needNS, does: writes,
		Text: "what is written from memory of any shape is what is read into memory of any other",
		run: func(c *ctl) {
			shapes := []shape{{}, {offset: 4}, {offset: 1536, spread: true}, {list: 64, spread: true}, {offset: 4092, list: pageSize - 16, spread: true}}
			for i, a := range shapes {
				b := shapes[(i+2)%len(shapes)]
				for _, blocks := range []uint64{1, 2, 15, 64 * 512 / c.facts.lba} {
					n := blocks * c.facts.lba
					p := pattern(uint64(i)+blocks, n)
					c.q().ok(c.write(testLBA, blocks, c.shaped(n, a).set(p)))
					d := c.shaped(n, b)
					c.q().ok(c.read(testLBA, blocks, d))
					c.check(bytes.Equal(d.get(), p), "%d blocks from %+v to %+v differ from byte %d on", blocks, a, b, firstDifference(d.get(), p))
					c.check(d.guarded(), "bytes around the data were written")
				}
			}
		},
	},
	{
		ID: "io.write.neighbours", Ref: "NVM Command Set 1.0c 3.2.6", needs: needNS, does: writes,
		Text: "a write changes its own blocks only",
		run: func(c *ctl) {
			c.changesOnly(c.write(testLBA+1, 2, c.data(2*c.facts.lba).set(pattern(99, 2*c.facts.lba))), pattern(99, 2*c.facts.lba))
		},
	},
	{
		ID: "io.write.last", Ref: "NVM Command Set 1.0c 3.2.6", needs: needNS, does: writes,
		Text: "the last block can be written",
		run: func(c *ctl) {
			p := pattern(3, c.facts.lba)
			c.store(c.facts.blocks-1, p)
			c.check(bytes.Equal(c.load(c.facts.blocks-1, 1), p), "it reads as something else")
		},
	},
	{
		ID: "io.write.beyond", Ref: "NVM Command Set 1.0c 3.2.6, 2.1.3", needs: needNS, does: writes,
		Text: "a write that begins or ends beyond the last block is LBA Out of Range, and writes none of it",
		run: func(c *ctl) {
			p := pattern(4, c.facts.lba)
			c.store(c.facts.blocks-1, p)
			c.beyond(nvme.IOWrite)
			c.check(bytes.Equal(c.load(c.facts.blocks-1, 1), p), "the last block was written")
		},
	},
	{
		ID: "io.write.fua", Ref: "NVM Command Set 1.0c 3.2.6", needs: needNS, does: writes,
		Text: "writes and reads with Force Unit Access work, and so does a Flush after them",
		run: func(c *ctl) {
			p := pattern(5, 8*c.facts.lba)
			d := c.data(uint64(len(p)))
			w, r := c.write(testLBA, 8, d.set(p)), c.read(testLBA, 8, d)
			w.CDW12 |= nvme.RWForceUnit
			r.CDW12 |= nvme.RWForceUnit | nvme.RWLimitedRetry
			c.q().ok(w)
			c.q().ok(nvme.Command{Opcode: nvme.IOFlush, NSID: c.facts.nsid})
			d.set(make([]byte, len(p)))
			c.q().ok(r)
			c.check(bytes.Equal(d.get(), p), "it reads as something else")
		},
	},
	{
		ID: "io.write.depth", Ref: "NVMe Base 2.0c 3.3.1", needs: needNS, does: writes,
		Text: "many writes at once, then many reads at once, mix nothing up",
		run: func(c *ctl) {
			q := c.q()
			var all []*data
			for i := range uint64(60) {
				d := c.shaped(4*c.facts.lba, shape{offset: 4 * (i % 7)})
				all = append(all, d)
				q.push(c.write(testLBA+4*i, 4, d.set(pattern(i, d.n))))
			}
			q.ring()
			c.settled(q)
			for i, d := range all {
				d.set(make([]byte, d.n))
				q.push(c.read(testLBA+4*uint64(i), 4, d))
			}
			q.ring()
			c.settled(q)
			for i, d := range all {
				c.check(bytes.Equal(d.get(), pattern(uint64(i), d.n)), "the blocks of write %d read as something else", i)
			}
		},
	},
	{
		ID: "io.write.mdts", Ref: "NVMe Base 2.0c 5.17.2.1", needs: join(needNS, needMDTS, needRoom), does: writes,
		Text: "a write of exactly MDTS works, and one of a block more writes nothing",
		run: func(c *ctl) {
			n := c.mdts()
			p := pattern(6, n)
			c.q().ok(c.write(0, n/c.facts.lba, c.data(n).set(p)))
			d := c.data(n)
			c.q().ok(c.read(0, n/c.facts.lba, d))
			c.check(bytes.Equal(d.get(), p), "it reads as something else from byte %d on", firstDifference(d.get(), p))
			if n/c.facts.lba < 1<<16 {
				c.q().refused(c.write(0, n/c.facts.lba+1, d), nvme.StatusInvalidField)
				c.check(bytes.Equal(c.load(0, 1), p[:c.facts.lba]), "the first block was written")
			}
		},
	},
	{
		ID: "io.write-zeroes", Ref: "NVM Command Set 1.0c 3.2.8", needs: needWZ, does: writes,
		Text: "Write Zeroes makes its own blocks read as zeroes, and no others",
		run: func(c *ctl) {
			c.changesOnly(c.rw(nvme.IOWriteZeroes, testLBA+1, 2, nil), make([]byte, 2*c.facts.lba))
		},
	},
	{
		ID: "io.write-zeroes.deallocate", Ref: "NVM Command Set 1.0c 3.2.8", needs: needWZ, does: writes,
		Text: "Write Zeroes with DEAC makes its own blocks read as zeroes, and no others",
		run: func(c *ctl) {
			cmd := c.rw(nvme.IOWriteZeroes, testLBA+1, 2, nil)
			cmd.CDW12 |= nvme.RWDeallocate
			c.changesOnly(cmd, make([]byte, 2*c.facts.lba))
		},
	},
	{
		ID: "io.write-zeroes.beyond", Ref: "NVM Command Set 1.0c 3.2.8", needs: needWZ, does: writes,
		Text: "a Write Zeroes that begins or ends beyond the last block is LBA Out of Range",
		run:  func(c *ctl) { c.beyond(nvme.IOWriteZeroes) },
	},
	{
		ID: "io.write-zeroes.many", Ref: "NVM Command Set 1.0c 3.2.8", needs: needWZ, does: writes,
		Text: "Write Zeroes is not bound by MDTS, unless WZSL says so",
		run: func(c *ctl) {
			n := min(uint64(1<<16), c.facts.blocks)
			if id := c.nvmController(); id != nil && id.WZSL != 0 {
				n = min(n, 1<<(12+uint(id.WZSL))/c.facts.lba)
			}
			c.store(n-1, pattern(7, c.facts.lba))
			c.q().ok(c.rw(nvme.IOWriteZeroes, 0, n, nil))
			c.check(bytes.Count(c.load(n-1, 1), []byte{0}) == int(c.facts.lba), "block %d of %d is not zero", n-1, n)
		},
	},
	{
		ID: "io.dsm.deallocate", Ref: "NVM Command Set 1.0c 3.2.3", needs: needDSM, does: writes,
		Text: "deallocated blocks read as DLFEAT says, or as they were, and others as they were",
		run: func(c *ctl) {
			was := pattern(8, 4*c.facts.lba)
			c.store(testLBA, was)
			c.q().ok(c.dsm(nvme.DSMRange{SLBA: testLBA + 1, Length: 2}))
			got, n := c.load(testLBA, 4), c.facts.lba
			c.check(bytes.Equal(got[:n], was[:n]) && bytes.Equal(got[3*n:], was[3*n:]), "a block beside the range changed")
			for i := n; i < 3*n; i += n {
				b := got[i : i+n]
				same := bytes.Equal(b, was[i:i+n])
				switch c.facts.ns.DLFEAT & nvme.DLFEATReadMask {
				case nvme.DLFEATReadZeroes:
					c.check(same || bytes.Count(b, []byte{0}) == int(n), "DLFEAT says zeroes, a block reads as % x...", b[:8])
				case nvme.DLFEATReadOnes:
					c.check(same || bytes.Count(b, []byte{0xFF}) == int(n), "DLFEAT says ones, a block reads as % x...", b[:8])
				}
			}
		},
	},
	{
		ID: "io.dsm.most-ranges", Ref: "NVM Command Set 1.0c 3.2.3", needs: needDSM, does: writes,
		Text: "as many ranges as a command may have, some of them empty, work; what no range names is left alone",
		run: func(c *ctl) {
			most := uint64(nvme.DSMMaxRanges)
			if id := c.nvmController(); id != nil && id.DMRL != 0 {
				most = uint64(id.DMRL)
			}
			was := pattern(9, 512*c.facts.lba)
			for off := uint64(0); off < 512; off += 64 {
				c.store(testLBA+off, was[off*c.facts.lba:(off+64)*c.facts.lba])
			}
			var ranges []nvme.DSMRange
			for i := range most {
				ranges = append(ranges, nvme.DSMRange{SLBA: testLBA + 2*i, Length: uint32(1 - i%16/15)})
			}
			c.q().ok(c.dsm(ranges...))
			for off := uint64(1); off < 512; off += 62 {
				c.check(bytes.Equal(c.load(testLBA+off, 1), was[off*c.facts.lba:(off+1)*c.facts.lba]), "block %d was changed", testLBA+off)
			}
		},
	},
	{
		ID: "io.dsm.beyond", Ref: "NVM Command Set 1.0c 3.2.3, 2.1.3", needs: needDSM, does: writes,
		Text: "a range to be deallocated that ends beyond the last block is LBA Out of Range, or a hint that is not taken",
		run: func(c *ctl) {
			for _, r := range []nvme.DSMRange{{SLBA: c.facts.blocks - 1, Length: 2}, {SLBA: c.facts.blocks, Length: 1}, {SLBA: ^uint64(0), Length: 1}, {SLBA: 0, Length: ^uint32(0)}} {
				cmd := c.dsm(r)
				c.q().want(&cmd, c.q().exec(cmd), nvme.StatusLBAOutOfRange, nvme.StatusSuccess)
			}
			c.q().ok(c.tick())
		},
	},
	{
		ID: "io.dsm.hint", Ref: "NVM Command Set 1.0c 3.2.3", needs: needDSM, does: writes,
		Text: "Dataset Management without Deallocate changes no data",
		run: func(c *ctl) {
			was := pattern(10, 4*c.facts.lba)
			c.store(testLBA, was)
			cmd := c.dsm(nvme.DSMRange{SLBA: testLBA, Length: 4})
			cmd.CDW11 = nvme.DSMIntegralRead
			c.q().ok(cmd)
			c.check(bytes.Equal(c.load(testLBA, 4), was), "the data changed")
		},
	},
	{
		ID: "io.copy.one", Ref: "NVM Command Set 1.0c 3.2.2", needs: needCopy, does: writes,
		Text: "Copy of one range copies it, and changes no block beside it",
		run: func(c *ctl) {
			p := pattern(11, 2*c.facts.lba)
			c.store(testLBA+64, p)
			c.changesOnly(c.copyCmd(testLBA+1, copyRange{testLBA + 64, 2}), p)
		},
	},
	{
		ID: "io.copy.many", Ref: "NVM Command Set 1.0c 3.2.2", needs: needCopy, does: writes,
		Text: "Copy of several ranges puts them one after the other",
		run: func(c *ctl) {
			n := int(min(c.facts.ns.MSRC.Count(), 5))
			var ranges []copyRange
			var want []byte
			for i := range n {
				p := pattern(uint64(20+i), uint64(i%3+1)*c.facts.lba)
				if i%3+1 > int(c.facts.ns.MSSRL) {
					c.skipf("MSSRL is %d blocks", c.facts.ns.MSSRL)
				}
				lba := testLBA + 64 + 8*uint64(n-i)
				c.store(lba, p)
				ranges = append(ranges, copyRange{lba, uint64(i%3 + 1)})
				want = append(want, p...)
			}
			c.q().ok(c.copyCmd(testLBA, ranges...))
			c.check(bytes.Equal(c.load(testLBA, uint64(len(want))/c.facts.lba), want), "the destination reads as something else")
		},
	},
	{
		ID: "io.copy.limits", Ref: "NVM Command Set 1.0c 3.2.2", needs: needCopy, does: writes,
		Text: "more than MSSRL blocks in a range, or more ranges than MSRC, is Command Size Limit Exceeded",
		run: func(c *ctl) {
			if n := uint64(c.facts.ns.MSSRL) + 1; n <= 1<<16 && c.facts.ns.MSSRL != 0 {
				c.q().refused(c.copyCmd(0, copyRange{0, n}), nvme.StatusCommandSizeLimit)
			}
			n := c.facts.ns.MSRC.Count()
			if n >= 128 {
				return
			}
			c.q().refused(c.copyCmd(0, make([]copyRange, n+1)...), nvme.StatusCommandSizeLimit)
		},
	},
	{
		ID: "io.copy.beyond", Ref: "NVM Command Set 1.0c 3.2.2", needs: needCopy, does: writes,
		Text: "a Copy from or to beyond the last block is LBA Out of Range",
		run: func(c *ctl) {
			c.q().refused(c.copyCmd(testLBA, copyRange{c.facts.blocks - 1, 2}), nvme.StatusLBAOutOfRange)
			c.q().refused(c.copyCmd(c.facts.blocks-1, copyRange{testLBA, 2}), nvme.StatusLBAOutOfRange)
		},
	},
	{
		ID: "io.write-uncorrectable", Ref: "NVM Command Set 1.0c 3.2.7", needs: needWU, does: writes,
		Text: "after Write Uncorrectable the blocks are Unrecovered Read Error, until they are written again",
		run: func(c *ctl) {
			was := pattern(12, 4*c.facts.lba)
			c.store(testLBA, was)
			c.q().ok(c.rw(nvme.IOWriteUncorrectable, testLBA+1, 2, nil))
			c.q().refused(c.read(testLBA, 4, c.data(4*c.facts.lba)), nvme.StatusUnrecoveredRead)
			c.q().refused(c.read(testLBA+2, 1, c.data(c.facts.lba)), nvme.StatusUnrecoveredRead)
			c.check(bytes.Equal(c.load(testLBA, 1), was[:c.facts.lba]), "the block before was changed")
			c.load(testLBA+3, 1)
			c.store(testLBA, was)
			c.check(bytes.Equal(c.load(testLBA, 4), was), "it reads as something else after it was written again")
		},
	},
	{
		ID: "io.write-uncorrectable.beyond", Ref: "NVM Command Set 1.0c 3.2.7", needs: needWU, does: writes,
		Text: "a Write Uncorrectable that begins or ends beyond the last block is LBA Out of Range",
		run:  func(c *ctl) { c.beyond(nvme.IOWriteUncorrectable) },
	},
	{
		ID: "io.write-protect", Ref: "NVMe Base 2.0c 8.12, 5.27.1.29", does: writes,
		needs: join(needNS, bitNeed("NWPC is 0", func(f *facts) bool { return f.id.NWPC&1 != 0 })),
		Text:  "a write protected namespace refuses what would change it, is read as before, and can be written again after",
		run: func(c *ctl) {
			p := pattern(16, c.facts.lba)
			c.store(testLBA, p)
			c.setFeature(nvme.FeatureWriteProtect, c.facts.nsid, 1)
			w := c.q().exec(c.write(testLBA, 1, c.data(c.facts.lba)))
			attributes := c.identifyNamespace(c.facts.nsid).NSATTR
			got := c.load(testLBA, 1)
			c.setFeature(nvme.FeatureWriteProtect, c.facts.nsid, 0)
			c.check(w.Status().Code() == nvme.StatusNamespaceWriteProtected, "Write: %s", status(w.Status().Code()))
			c.check(attributes&nvme.NSATTRWriteProtected != 0, "NSATTR=%#x while protected", attributes)
			c.check(bytes.Equal(got, p), "the block was written")
			c.store(testLBA, p)
		},
	},
	{
		ID: "io.fused.same", Ref: "NVM Command Set 1.0c 2.1.4.3, NVMe Base 2.0c 3.4.2", needs: needAtoms, does: writes,
		Text: "fused Compare and Write writes when the Compare finds what it should",
		run: func(c *ctl) {
			old, new := pattern(13, c.facts.lba), pattern(14, c.facts.lba)
			c.store(testLBA, old)
			cmp, w := c.fused(old, new)
			c.check(cmp.Status().OK() && w.Status().OK(), "Compare: %s, Write: %s", status(cmp.Status().Code()), status(w.Status().Code()))
			c.check(bytes.Equal(c.load(testLBA, 1), new), "the block was not written")
		},
	},
	{
		ID: "io.fused.differs", Ref: "NVM Command Set 1.0c 2.1.4.3, NVMe Base 2.0c 3.4.2", needs: needAtoms, does: writes,
		Text: "when the Compare fails, the Write is Aborted due to Failed Fused Command and writes nothing",
		run: func(c *ctl) {
			old := pattern(13, c.facts.lba)
			c.store(testLBA, old)
			cmp, w := c.fused(pattern(15, c.facts.lba), pattern(14, c.facts.lba))
			c.check(cmp.Status().Code() == nvme.StatusCompareFailure, "Compare: %s", status(cmp.Status().Code()))
			c.check(w.Status().Code() == nvme.StatusAbortFailedFused, "Write: %s", status(w.Status().Code()))
			c.check(bytes.Equal(c.load(testLBA, 1), old), "the block was written")
		},
	},
	{
		ID: "io.fused.missing", Ref: "NVMe Base 2.0c 3.4.2", needs: needAtoms, does: writes,
		Text: "one half of a fused operation without the other is Aborted due to Missing Fused Command",
		run: func(c *ctl) {
			q, d := c.q(), c.data(c.facts.lba)
			first, second := c.rw(nvme.IOCompare, testLBA, 1, d), c.write(testLBA, 1, d)
			first.Flags, second.Flags = nvme.FuseFirst, nvme.FuseSecond
			q.refused(second, nvme.StatusAbortMissingFused)
			a, b := q.push(first), q.push(c.tick())
			q.ring()
			q.want(&first, q.wait(a), nvme.StatusAbortMissingFused)
			tick := c.tick()
			q.want(&tick, q.wait(b), nvme.StatusSuccess)
		},
	},
}

// changesOnly runs cmd, which makes the 2 blocks at testLBA+1 read as want, and checks their neighbours.
func (c *ctl) changesOnly(cmd nvme.Command, want []byte) {
	was, n := pattern(77, 4*c.facts.lba), c.facts.lba
	c.store(testLBA, was)
	c.q().ok(cmd)
	got := c.load(testLBA, 4)
	c.check(bytes.Equal(got[n:3*n], want), "the blocks read as something else from byte %d on", firstDifference(got[n:3*n], want))
	c.check(bytes.Equal(got[:n], was[:n]), "the block before was changed")
	c.check(bytes.Equal(got[3*n:], was[3*n:]), "the block after was changed")
}

// dsm returns a Dataset Management that deallocates ranges.
func (c *ctl) dsm(ranges ...nvme.DSMRange) nvme.Command {
	var p []byte
	for i := range ranges {
		p = append(p, ranges[i].Bytes()[:]...)
	}
	cmd := nvme.Command{Opcode: nvme.IODSM, NSID: c.facts.nsid, CDW10: uint32(len(ranges) - 1), CDW11: nvme.DSMDeallocate}
	return c.data(uint64(len(p))).set(p).on(cmd)
}

// copyRange is a source of Copy.
type copyRange struct{ lba, blocks uint64 }

// copyCmd returns a Copy with descriptors of format 0, 32 bytes each.
func (c *ctl) copyCmd(to uint64, from ...copyRange) nvme.Command {
	p := make([]byte, 32*len(from))
	for i, r := range from {
		le.PutUint64(p[32*i+8:], r.lba)
		le.PutUint16(p[32*i+16:], uint16(max(r.blocks, 1)-1))
	}
	cmd := nvme.Command{Opcode: nvme.IOCopy, NSID: c.facts.nsid, CDW12: uint32(len(from) - 1)}
	cmd.SetSLBA(to)
	return c.data(uint64(len(p))).set(p).on(cmd)
}

// fused runs a fused Compare and Write of one block.
func (c *ctl) fused(compare, write []byte) (cmp, w nvme.Completion) {
	first := c.rw(nvme.IOCompare, testLBA, 1, c.data(c.facts.lba).set(compare))
	second := c.write(testLBA, 1, c.data(c.facts.lba).set(write))
	first.Flags, second.Flags = nvme.FuseFirst, nvme.FuseSecond
	q := c.q()
	a, b := q.push(first), q.push(second)
	q.ring()
	return q.wait(a), q.wait(b)
}

// nvmController returns the NVM command set's own Identify Controller, nil if there is none.
func (c *ctl) nvmController() *nvme.IdentifyControllerNVM {
	cmd, page := c.identifyCmd(nvme.CNSCSIController, 0)
	if cpl := c.adm.exec(cmd); !cpl.Status().OK() {
		return nil
	}
	id := new(nvme.IdentifyControllerNVM)
	copy(id.Bytes()[:], page.all())
	return id
}
