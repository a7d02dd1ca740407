package suite

import (
	"encoding/binary"
	"math/rand/v2"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Data buffers in every shape that PRPs can have. NVMe Base 2.0c 4.1.1.

// shape is how a buffer lies in memory.
type shape struct {
	offset uint64 // of PRP1 in its page
	list   uint64 // of the PRP list in its page
	spread bool   // pages in falling order, with gaps
}

// data is a buffer and the PRPs that say where it is. What lies around it in its pages is guarded.
type data struct {
	pieces     []buf // in the order of the data
	pages      []buf
	prp1, prp2 uint64
	n          uint64
	first      uint64 // offset of the data in the first page
}

const guardByte = 0xA5

// data returns n bytes in pages that follow each other.
func (c *ctl) data(n uint64) *data { return c.shaped(n, shape{}) }

// shaped returns n bytes in a shape.
func (c *ctl) shaped(n uint64, s shape) *data {
	d := &data{n: n, first: s.offset}
	count := int((s.offset + n + pageSize - 1) / pageSize)
	for range count {
		if s.spread {
			c.page() // the gap
		}
		d.pages = append(d.pages, c.page().fill(guardByte))
	}
	if s.spread {
		for i, j := 0, count-1; i < j; i, j = i+1, j-1 {
			d.pages[i], d.pages[j] = d.pages[j], d.pages[i]
		}
	}
	off := s.offset
	for _, p := range d.pages {
		take := min(n, pageSize-off)
		d.pieces = append(d.pieces, p.part(off, take))
		n -= take
		off = 0
	}
	d.prp1 = d.pieces[0].iova
	switch {
	case count == 1:
		d.prp2 = 0
	case count == 2:
		d.prp2 = d.pages[1].iova
	default:
		d.prp2 = c.prpList(d.pages[1:], s.list)
	}
	return d
}

// prpList writes a list of pages that begins at byte off of a page, chained where it must be, and returns its address.
func (c *ctl) prpList(pages []buf, off uint64) (iova uint64) {
	list := c.page()
	iova = list.iova + off
	for i, p := range pages {
		if off == pageSize-8 && i < len(pages)-1 {
			next := c.page()
			list.put64(off, next.iova)
			list, off = next, 0
		}
		list.put64(off, p.iova)
		off += 8
	}
	return iova
}

func (b buf) part(off, n uint64) buf {
	v, err := b.mem.View(off, n)
	if err != nil {
		panic(err)
	}
	return buf{mem: v, iova: b.iova + off, n: n}
}

func (b buf) put64(off, v uint64) {
	var p [8]byte
	binary.LittleEndian.PutUint64(p[:], v)
	b.write(off, p[:])
}

// set copies p into the buffer.
func (d *data) set(p []byte) *data {
	for _, b := range d.pieces {
		n := copy(p[:min(uint64(len(p)), b.n)], p)
		b.write(0, p[:n])
		p = p[n:]
	}
	return d
}

// get returns a copy of what is in it.
func (d *data) get() (p []byte) {
	for _, b := range d.pieces {
		p = append(p, b.all()...)
	}
	return p
}

// guarded reports whether nothing was written around the data.
func (d *data) guarded() bool {
	last := len(d.pages) - 1
	end := d.pieces[last].n
	if last == 0 {
		end += d.first
	}
	return d.pages[0].is(0, d.first, guardByte) && d.pages[last].is(end, pageSize-end, guardByte)
}

// on points cmd at the buffer.
func (d *data) on(cmd nvme.Command) nvme.Command {
	cmd.PRP1, cmd.PRP2 = d.prp1, d.prp2
	return cmd
}

// pattern returns n bytes that depend on seed and differ everywhere.
func pattern(seed, n uint64) []byte {
	r := rand.New(rand.NewPCG(seed, n))
	p := make([]byte, n)
	for i := uint64(0); i < n; i += 8 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], r.Uint64())
		copy(p[i:], w[:])
	}
	return p
}

// rw returns a command over blocks of the namespace under test, with d as its data; nil: none.
func (c *ctl) rw(opcode uint8, lba, blocks uint64, d *data) (cmd nvme.Command) {
	cmd.SetRW(opcode, c.facts.nsid, lba, nvme.ZeroBased16(blocks-1))
	if d != nil {
		cmd = d.on(cmd)
	}
	return cmd
}

func (c *ctl) read(lba, blocks uint64, d *data) nvme.Command {
	return c.rw(nvme.IORead, lba, blocks, d)
}
func (c *ctl) write(lba, blocks uint64, d *data) nvme.Command {
	return c.rw(nvme.IOWrite, lba, blocks, d)
}

// store writes p at lba, and load reads it; both must succeed.
func (c *ctl) store(lba uint64, p []byte) {
	n := uint64(len(p))
	c.q().ok(c.write(lba, n/c.facts.lba, c.data(n).set(p)))
}

func (c *ctl) load(lba, blocks uint64) []byte {
	d := c.data(blocks * c.facts.lba)
	c.q().ok(c.read(lba, blocks, d))
	return d.get()
}
