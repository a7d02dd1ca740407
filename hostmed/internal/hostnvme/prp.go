package hostnvme

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
)

// Seg is a piece of memory of this process that data moves to or from.
type Seg = unix.Iovec

// position is a place in the data of a request: byte off of piece seg.
type position struct {
	seg int
	off uint64
}

// advance moves p on by n bytes. It stays within vec, or at its end.
func (p *position) advance(vec []Seg, n uint64) {
	p.off += n
	for p.seg < len(vec) && p.off >= vec[p.seg].Len {
		p.off -= vec[p.seg].Len
		p.seg++
	}
}

// list is DMA memory for a PRP list, an SGL segment or a list of ranges: at most one page, and within one.
type list struct {
	mem  []byte
	iova uint64
}

// pointers makes data pointers for a device.
type pointers struct {
	finder
	page  uint64 // CC.MPS in bytes
	block uint64 // LBA size in bytes: commands end at multiples
	sgl   uint64 // what SGLs must be aligned to, in bytes; 0: the device has none
}

// point makes up to n bytes of vec, from at on, the data of cmd, without a copy, and returns how many: fewer where the device
// does not reach what comes then, or its rules need another command for that. 0 says that the first block cannot be reached
// in any way.
//
// PRPs are tried first. NVMe Base 2.0c 4.1.1: only the first may have an offset, in dwords, and only the last may end
// before its page does.
func (p *pointers) point(cmd *nvme.Command, vec []Seg, at position, n uint64, l list) uint64 {
	got := p.prps(cmd, vec, at, n, l)
	if got == n || p.sgl == 0 {
		return got
	}
	if more := p.sgls(cmd, vec, at, n, l); more > got {
		return more
	}
	cmd.Flags = 0
	return p.prps(cmd, vec, at, got, l)
}

// run returns where the device finds what is at at, and how many bytes follow in one piece for it, n at the most; 0 if it does not
// reach it.
func (p *pointers) run(vec []Seg, at position, n uint64) (iova, length uint64) {
	if at.seg >= len(vec) {
		return 0, 0
	}
	s := &vec[at.seg]
	iova, reach := p.find(segAddress(s) + at.off)
	return iova, min(s.Len-at.off, reach, n)
}

func (p *pointers) prps(cmd *nvme.Command, vec []Seg, at position, n uint64, l list) uint64 {
	iova, run := p.run(vec, at, n)
	if run == 0 || iova&3 != 0 {
		return 0
	}
	last := p.page - 1
	first := p.page - iova&last // bytes of the first page
	cmd.PRP1, cmd.PRP2 = iova, 0
	if run == n && n <= first {
		return n
	}
	got := min(run, first)
	step := got
	second, entries := uint64(0), l.mem
	for passed := run; ; {
		iova, run = iova+step, run-step
		if got == n {
			break
		}
		if run == 0 {
			at.advance(vec, passed)
			end := iova
			if iova, run = p.run(vec, at, n-got); run == 0 || (end|iova)&last != 0 {
				break
			}
			passed = run
		}
		if len(entries) < prp.EntrySize {
			break
		}
		if second == 0 {
			second = iova
		}
		binary.LittleEndian.PutUint64(entries, iova)
		entries = entries[prp.EntrySize:]
		step = min(run, p.page)
		got += step
	}
	got &^= p.block - 1
	switch {
	case got <= first:
	case got <= first+p.page:
		cmd.PRP2 = second
	default:
		cmd.PRP2 = l.iova
	}
	return got
}

func (p *pointers) sgls(cmd *nvme.Command, vec []Seg, at position, n uint64, l list) uint64 {
	start, got, entries := at, uint64(0), l.mem
	var first nvme.SGLDescriptor
	for got < n && len(entries) >= nvme.SGLDescriptorSize {
		iova, run := p.run(vec, at, n-got)
		if run == 0 || (iova|run)&(p.sgl-1) != 0 {
			break
		}
		d := nvme.MakeSGL(nvme.SGLDataBlock, iova, uint32(run)) // n is less than 4 GiB
		if got == 0 {
			first = d
		}
		copy(entries, d.Bytes()[:])
		entries = entries[nvme.SGLDescriptorSize:]
		got += run
		at.advance(vec, run)
	}
	if whole := got &^ (p.block - 1); whole != got {
		if whole == 0 {
			return 0
		}
		return p.sgls(cmd, vec, start, whole, l) // the same runs, of which the last is shorter
	}
	switch used := len(l.mem) - len(entries); used {
	case 0:
	case nvme.SGLDescriptorSize:
		cmd.SetSGL(first)
	default:
		cmd.SetSGL(nvme.MakeSGL(nvme.SGLLastSegment, l.iova, uint32(used)))
	}
	return got
}

// pointAt makes the n bytes that lie in pages, one after the other, the data of cmd. l has room for all pages but one.
func pointAt(cmd *nvme.Command, pages []uint64, pageSize, n uint64, l list) {
	cmd.PRP1, cmd.PRP2 = pages[0], 0
	switch pages = pages[1 : (n+pageSize-1)/pageSize]; len(pages) {
	case 0:
	case 1:
		cmd.PRP2 = pages[0]
	default:
		cmd.PRP2 = l.iova
		for i, iova := range pages {
			binary.LittleEndian.PutUint64(l.mem[i*prp.EntrySize:], iova)
		}
	}
}
