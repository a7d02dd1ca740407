package ioq

import (
	"bytes"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
)

const sglOff = 0x80000 // of segments in the guest's memory

// list returns where the n-th segment of a test is.
func (r *rig) list(n int) prp.ListPage {
	off := uint64(sglOff + n*0x4000)
	return prp.ListPage{Mem: r.view(off, 0x4000), IOVA: base + off}
}

// sgl makes extents the data of c.
func (r *rig) sgl(c nvme.Command, extents ...prp.Extent) nvme.Command {
	r.t.Helper()
	if err := prp.BuildSGL(&c, extents, r.list(0)); err != nil {
		r.t.Fatal(err)
	}
	return c
}

func (r *rig) put(off uint64, b []byte) {
	r.t.Helper()
	if err := r.guest.Write(off, b); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) get(off uint64, n int) []byte {
	r.t.Helper()
	b := make([]byte, n)
	if err := r.guest.Read(off, b); err != nil {
		r.t.Fatal(err)
	}
	return b
}

func TestSGL(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		r := newRig(t, c)
		p := r.pair(1, 16, false)
		want := make([]byte, 64<<10)
		fill(want, 9)
		r.put(dataOff, want)
		const d = base + dataOff
		// In pieces of any length from anywhere, and a bucket, which a write ignores.
		w := r.sgl(rw(nvme.IOWrite, 8, 128, 0), prp.Extent{IOVA: d, Len: 1}, prp.Extent{IOVA: d + 1, Len: 4998}, prp.Extent{IOVA: prp.BitBucket, Len: 77},
			prp.Extent{IOVA: d + 4999, Len: 64<<10 - 4999})
		if st := p.do(w); st != nvme.StatusSuccess {
			t.Fatalf("write: %v", st)
		}
		// One descriptor, in the command.
		const to = dataOff + 0x40000
		if st := p.do(r.sgl(rw(nvme.IORead, 8, 128, 0), prp.Extent{IOVA: base + to + 3, Len: 64 << 10})); st != nvme.StatusSuccess {
			t.Fatalf("read: %v", st)
		}
		if !bytes.Equal(r.get(to+3, 64<<10), want) {
			t.Fatal("read other data than was written")
		}
		// The pieces in another order, in three segments, with 8 KiB in the middle that nobody wants.
		r.put(to, make([]byte, 128<<10))
		segs := []nvme.SGLDescriptor{
			nvme.MakeSGL(nvme.SGLDataBlock, base+to+0x10000, 20<<10), nvme.MakeSGL(nvme.SGLSegment, base+sglOff+0x4000, 48),
			nvme.MakeSGL(nvme.SGLDataBlock, 0, 0), nvme.MakeSGL(nvme.SGLBitBucket, 1, 8<<10), nvme.MakeSGL(nvme.SGLLastSegment, base+sglOff+0x8000, 16),
			nvme.MakeSGL(nvme.SGLDataBlock, base+to, 36<<10),
		}
		for i, at := range []uint64{0, 16, 0x4000, 0x4010, 0x4020, 0x8000} {
			r.put(sglOff+at, segs[i].Bytes()[:])
		}
		rd := rw(nvme.IORead, 8, 128, 0)
		rd.SetSGL(nvme.MakeSGL(nvme.SGLSegment, base+sglOff, 32))
		rd.MPTR = 3 // there is no metadata
		if st := p.do(rd); st != nvme.StatusSuccess {
			t.Fatalf("read by three segments: %v", st)
		}
		if !bytes.Equal(r.get(to+0x10000, 20<<10), want[:20<<10]) || !bytes.Equal(r.get(to, 36<<10), want[28<<10:]) {
			t.Fatal("three segments: other data")
		}
		rd.Flags = nvme.PSDTSGLMPTR << 6
		if st := p.do(rd); st != nvme.StatusSuccess {
			t.Errorf("PSDT 10b: %v", st)
		}
		// More in the bucket than the memory for it, and MDTS at once.
		big := r.sgl(rw(nvme.IORead, 0, 2048, 0), prp.Extent{IOVA: prp.BitBucket, Len: 512<<10 + 1}, prp.Extent{IOVA: d, Len: 512<<10 - 1})
		if st := p.do(big); st != nvme.StatusSuccess {
			t.Errorf("a large bucket: %v", st)
		}
		cmp := r.sgl(rw(nvme.IOCompare, 8, 128, 0), prp.Extent{IOVA: base + to + 0x10000, Len: 20 << 10}, prp.Extent{IOVA: base + to, Len: 44 << 10})
		if st := p.do(cmp); st.Code() != nvme.StatusCompareFailure {
			t.Errorf("compare: %v", st)
		}
		r.put(to+0x20000, want)
		cmp = r.sgl(cmp, prp.Extent{IOVA: base + to + 0x20000, Len: 5}, prp.Extent{IOVA: base + to + 0x20005, Len: 64<<10 - 5})
		if st := p.do(cmp); st != nvme.StatusSuccess {
			t.Errorf("compare of equal data: %v", st)
		}
		if st := p.do(nvme.Command{Opcode: nvme.IOFlush, NSID: 1, Flags: nvme.PSDTSGL << 6}); st != nvme.StatusSuccess {
			t.Errorf("flush: %v", st)
		}
		r.noError()
	})
}

func TestBadSGLs(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	read := func(d nvme.SGLDescriptor) nvme.Command {
		c := rw(nvme.IORead, 0, 8, 0)
		c.SetSGL(d)
		return c
	}
	const d = base + dataOff
	self := nvme.MakeSGL(nvme.SGLSegment, base+sglOff, 16)
	r.put(sglOff, self.Bytes()[:])
	for name, x := range map[string]struct {
		c    nvme.Command
		want nvme.Status
	}{
		"too short":          {read(nvme.MakeSGL(nvme.SGLDataBlock, d, 4095)), nvme.StatusSGLDataLengthInvalid},
		"too long":           {read(nvme.MakeSGL(nvme.SGLDataBlock, d, 4097)), nvme.StatusSGLDataLengthInvalid},
		"not mapped":         {read(nvme.MakeSGL(nvme.SGLDataBlock, 0x1000, 4096)), nvme.StatusDataTransferError},
		"past the end":       {read(nvme.MakeSGL(nvme.SGLDataBlock, base+guestSize-4095, 4096)), nvme.StatusDataTransferError},
		"segment not mapped": {read(nvme.MakeSGL(nvme.SGLLastSegment, 0x1000, 16)), nvme.StatusDataTransferError},
		"its own next":       {read(self), nvme.StatusSGLCountInvalid},
		"misaligned segment": {read(nvme.MakeSGL(nvme.SGLLastSegment, base+sglOff+4, 16)), nvme.StatusSGLSegmentInvalid},
		"keyed":              {read(nvme.MakeSGL(nvme.SGLKeyedData, d, 4096)), nvme.StatusSGLTypeInvalid},
		"a write of a bucket": {func() nvme.Command {
			c := read(nvme.MakeSGL(nvme.SGLBitBucket, 0, 4096))
			c.Opcode = nvme.IOWrite
			return c
		}(), nvme.StatusSGLDataLengthInvalid},
		"over MDTS": {func() nvme.Command { c := read(nvme.MakeSGL(nvme.SGLDataBlock, d, 2<<20)); c.SetNLB(4095); return c }(), nvme.StatusInvalidField},
	} {
		if st := p.do(x.c); st.Code() != x.want || !st.DNR() {
			t.Errorf("%s: %v, want %v with DNR", name, st, x.want)
		}
	}
	if st := p.do(read(nvme.MakeSGL(nvme.SGLDataBlock, d, 4096))); st != nvme.StatusSuccess {
		t.Errorf("a good command after the bad ones: %v", st)
	}
	r.noError()
}
