package suite

import (
	"bytes"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// SGLs of I/O commands. NVMe Base 2.0c 4.1.2.

var needSGLs = join(needNS, needSGL)

var sglCases = []Case{
	{
		ID: "io.sgl.one", Ref: "NVMe Base 2.0c 4.1.2", needs: needSGLs,
		Text: "one data block descriptor in the command says where the data goes",
		run: func(c *ctl) {
			d := c.data(8 * c.facts.lba)
			c.sglReads(d, nvme.MakeSGL(nvme.SGLDataBlock, d.prp1, uint32(d.n)))
		},
	},
	{
		ID: "io.sgl.last-segment", Ref: "NVMe Base 2.0c 4.1.2", needs: needSGLs,
		Text: "a last segment of many descriptors says where the pieces go, whatever their size",
		run: func(c *ctl) {
			d := c.shaped(8*pageSize, shape{offset: 1028, spread: true})
			c.sglReads(d, c.segment(nvme.SGLLastSegment, d.descriptors()...))
		},
	},
	{
		ID: "io.sgl.segments", Ref: "NVMe Base 2.0c 4.1.2", needs: needSGLs,
		Text: "segments lead to segments, the last one to none",
		run: func(c *ctl) {
			d := c.shaped(9*pageSize, shape{spread: true})
			all := d.descriptors()
			third := c.segment(nvme.SGLLastSegment, all[6:]...)
			second := c.segment(nvme.SGLSegment, append(all[3:6:6], third)...)
			c.sglReads(d, c.segment(nvme.SGLSegment, append(all[:3:3], second)...))
		},
	},
	{
		ID: "io.sgl.pieces", Ref: "NVMe Base 2.0c 4.1.2", needs: needSGLs,
		Text: "pieces of a few dwords each, that begin inside pages, are put together",
		run: func(c *ctl) {
			d := c.data(c.facts.lba)
			var list []nvme.SGLDescriptor
			for off := uint64(0); off < d.n; off += 16 {
				list = append(list, nvme.MakeSGL(nvme.SGLDataBlock, d.prp1+off, 16))
			}
			c.sglReads(d, c.segment(nvme.SGLLastSegment, list...))
		},
	},
	{
		ID: "io.sgl.write", Ref: "NVMe Base 2.0c 4.1.2", needs: needSGLs, does: writes,
		Text: "what an SGL write stores is what a PRP read returns",
		run: func(c *ctl) {
			d := c.shaped(8*pageSize, shape{offset: 516, spread: true})
			p := pattern(31, d.n)
			cmd := c.write(testLBA, d.n/c.facts.lba, d.set(p))
			cmd.SetSGL(c.segment(nvme.SGLLastSegment, d.descriptors()...))
			c.q().ok(cmd)
			c.check(bytes.Equal(c.load(testLBA, d.n/c.facts.lba), p), "it reads as something else")
		},
	},
	{
		ID: "io.sgl.bit-bucket", Ref: "NVMe Base 2.0c 4.1.2.1", needs: join(needSGLs, bitNeed("SGLS.Bit Bucket is 0", func(f *facts) bool { return f.id.SGLS&nvme.SGLSBitBucket != 0 })),
		Text: "what is read into a bit bucket goes nowhere, and the rest to its place",
		run: func(c *ctl) {
			n := c.facts.lba
			want := c.load(0, 3)
			d := c.data(2 * n)
			cmd := c.read(0, 3, nil)
			cmd.SetSGL(c.segment(nvme.SGLLastSegment,
				nvme.MakeSGL(nvme.SGLDataBlock, d.prp1, uint32(n)), nvme.MakeSGL(nvme.SGLBitBucket, 0, uint32(n)), nvme.MakeSGL(nvme.SGLDataBlock, d.prp1+n, uint32(n))))
			c.q().ok(cmd)
			c.check(bytes.Equal(d.get(), append(want[:n:n], want[2*n:]...)), "other data")
			c.check(d.guarded(), "bytes around the data were written")
		},
	},
	{
		ID: "io.sgl.too-short", Ref: "NVMe Base 2.0c 4.1.2, figure 101", needs: needSGLs,
		Text: "an SGL for less than the command's data is Data SGL Length Invalid",
		run: func(c *ctl) {
			d := c.data(4 * c.facts.lba)
			c.sglRefused(nvme.MakeSGL(nvme.SGLDataBlock, d.prp1, uint32(3*c.facts.lba)), nvme.StatusSGLDataLengthInvalid)
			list := d.descriptors()
			list[0].Length -= 4
			c.sglRefused(c.segment(nvme.SGLLastSegment, list...), nvme.StatusSGLDataLengthInvalid)
		},
	},
	{
		ID: "io.sgl.too-long", Ref: "NVMe Base 2.0c 4.1.2, figure 101", needs: needSGLs,
		Text: "an SGL for more than the command's data is Data SGL Length Invalid, or its rest is not used where SGLS says so",
		run: func(c *ctl) {
			d := c.data(8 * c.facts.lba)
			sgl := nvme.MakeSGL(nvme.SGLDataBlock, d.prp1, uint32(8*c.facts.lba))
			if c.facts.id.SGLS&nvme.SGLSExcess == 0 {
				c.sglRefused(sgl, nvme.StatusSGLDataLengthInvalid)
				return
			}
			cmd := c.read(0, 4, nil)
			cmd.SetSGL(sgl)
			c.q().ok(cmd)
		},
	},
	{
		ID: "io.sgl.type", Ref: "NVMe Base 2.0c 4.1.2, figure 101", needs: needSGLs,
		Text: "a descriptor of a type that PCIe does not have is SGL Descriptor Type Invalid",
		run: func(c *ctl) {
			d := c.data(4 * c.facts.lba)
			for _, t := range []nvme.SGLType{nvme.SGLKeyedData, nvme.SGLTransport, 0x9} {
				c.sglRefused(nvme.MakeSGL(t, d.prp1, uint32(d.n)), nvme.StatusSGLTypeInvalid)
				c.sglRefused(c.segment(nvme.SGLLastSegment, nvme.MakeSGL(t, d.prp1, uint32(d.n))), nvme.StatusSGLTypeInvalid)
			}
		},
	},
	{
		ID: "io.sgl.segment-length", Ref: "NVMe Base 2.0c 4.1.2, figure 101", needs: needSGLs,
		Text: "a segment whose length is 0 or no multiple of 16 is Invalid SGL Segment Descriptor",
		run: func(c *ctl) {
			d := c.data(4 * c.facts.lba)
			for _, n := range []uint32{0, 8, 17} {
				s := c.segment(nvme.SGLLastSegment, d.descriptors()...)
				s.Length = n
				c.sglRefused(s, nvme.StatusSGLSegmentInvalid)
			}
		},
	},
	{
		ID: "io.sgl.after-last", Ref: "NVMe Base 2.0c 4.1.2, figure 101", needs: needSGLs,
		Text: "a last segment that leads to another is an error",
		run: func(c *ctl) {
			d := c.data(4 * c.facts.lba)
			inner := c.segment(nvme.SGLLastSegment, d.descriptors()...)
			c.sglRefused(c.segment(nvme.SGLLastSegment, inner), nvme.StatusSGLCountInvalid, nvme.StatusSGLSegmentInvalid, nvme.StatusSGLTypeInvalid, nvme.StatusSGLDataLengthInvalid)
		},
	},
	{
		ID: "io.sgl.loop", Ref: "NVMe Base 2.0c 4.1.2", needs: needSGLs,
		Text: "segments that lead back to themselves end in an error, and harm nobody",
		run: func(c *ctl) {
			page := c.page()
			s := nvme.MakeSGL(nvme.SGLSegment, page.iova, 32)
			empty := nvme.MakeSGL(nvme.SGLDataBlock, page.iova, 0)
			page.write(0, empty.Bytes()[:])
			page.write(16, s.Bytes()[:])
			cmd := c.read(0, 4, nil)
			cmd.SetSGL(s)
			cpl := c.q().exec(cmd)
			c.check(!cpl.Status().OK(), "the command succeeded")
			c.q().ok(c.tick())
			c.alive()
		},
	},
	{
		ID: "io.sgl.mptr", Ref: "NVMe Base 2.0c 3.3.3.1, 5.17.2.1", needs: join(needSGLs, bitNeed("SGLS.MPTR is 1", func(f *facts) bool { return f.id.SGLS&nvme.SGLSMetadataSGL == 0 })),
		Text: "without SGLS bit 19, PSDT=10b is Invalid Field in Command",
		run: func(c *ctl) {
			d := c.data(4 * c.facts.lba)
			cmd := c.read(0, 4, nil)
			cmd.SetSGL(nvme.MakeSGL(nvme.SGLDataBlock, d.prp1, uint32(d.n)))
			cmd.Flags = 2 << 6
			c.q().refused(cmd, nvme.StatusInvalidField)
		},
	},
}

// descriptors returns a data block for each piece of the buffer.
func (d *data) descriptors() (list []nvme.SGLDescriptor) {
	for _, p := range d.pieces {
		list = append(list, nvme.MakeSGL(nvme.SGLDataBlock, p.iova, uint32(p.n)))
	}
	return list
}

// segment writes descriptors to memory and returns the one that leads to them.
func (c *ctl) segment(t nvme.SGLType, list ...nvme.SGLDescriptor) nvme.SGLDescriptor {
	b := c.alloc(uint64(len(list)) * nvme.SGLDescriptorSize)
	for i := range list {
		b.write(uint64(i)*nvme.SGLDescriptorSize, list[i].Bytes()[:])
	}
	return nvme.MakeSGL(t, b.iova, uint32(len(list)*nvme.SGLDescriptorSize))
}

// sglReads reads by an SGL that describes d, and compares with what PRPs say.
func (c *ctl) sglReads(d *data, sgl nvme.SGLDescriptor) {
	blocks := d.n / c.facts.lba
	if c.mayWrite() {
		c.store(0, pattern(d.n, d.n))
	}
	want := c.load(0, blocks)
	cmd := c.read(0, blocks, nil)
	cmd.SetSGL(sgl)
	c.q().ok(cmd)
	got := d.get()
	c.check(bytes.Equal(got, want), "other data from byte %d on", firstDifference(got, want))
	c.check(d.guarded(), "bytes around the data were written")
}

// sglRefused checks that a read of 4 blocks by an SGL fails.
func (c *ctl) sglRefused(sgl nvme.SGLDescriptor, statuses ...nvme.Status) {
	cmd := c.read(0, 4, nil)
	cmd.SetSGL(sgl)
	c.q().refused(cmd, statuses...)
}
