package prp

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// segment puts descriptors in s.
func (s *sparse) segment(iova uint64, ds ...nvme.SGLDescriptor) *sparse {
	for i := range ds {
		b := ds[i].Bytes()
		for k := 0; k < len(b); k += 8 {
			v := uint64(0)
			for j := range 8 {
				v |= uint64(b[k+j]) << (8 * j)
			}
			s.put(iova+uint64(i)*nvme.SGLDescriptorSize+uint64(k), v)
		}
	}
	return s
}

func none() *sparse { return &sparse{qwords: map[uint64]uint64{}} }

func data(iova uint64, n uint32) nvme.SGLDescriptor { return nvme.MakeSGL(nvme.SGLDataBlock, iova, n) }
func bucket(n uint32) nvme.SGLDescriptor            { return nvme.MakeSGL(nvme.SGLBitBucket, 0x77, n) }
func segment(iova uint64, n uint32) nvme.SGLDescriptor {
	return nvme.MakeSGL(nvme.SGLSegment, iova, n*nvme.SGLDescriptorSize)
}
func lastSegment(iova uint64, n uint32) nvme.SGLDescriptor {
	return nvme.MakeSGL(nvme.SGLLastSegment, iova, n*nvme.SGLDescriptorSize)
}

func TestWalkSGL(t *testing.T) {
	const a, b = 0x10000, 0x20008
	withSubtype := func(d nvme.SGLDescriptor) nvme.SGLDescriptor { d.ID |= 1; return d }
	withLength := func(d nvme.SGLDescriptor, n uint32) nvme.SGLDescriptor { d.Length = n; return d }
	full := make([]nvme.SGLDescriptor, MaxDescriptors+1)
	for i := range full {
		full[i] = data(uint64(i)*0x1000, 4)
	}
	tests := []struct {
		name    string
		sgl1    nvme.SGLDescriptor
		length  uint32
		toMedia bool
		mem     *sparse
		want    []Extent
		status  nvme.Status
	}{
		{name: "one data block", sgl1: data(0x1003, 4096), length: 4096, want: []Extent{{0x1003, 4096}}},
		{name: "nothing", sgl1: data(0x1003, 0), length: 0},
		{name: "empty, and something is wanted", sgl1: data(0x1003, 0), length: 1, status: nvme.StatusSGLDataLengthInvalid},
		{name: "too short", sgl1: data(0x1000, 511), length: 512, status: nvme.StatusSGLDataLengthInvalid},
		{name: "too long", sgl1: data(0x1000, 513), length: 512, status: nvme.StatusSGLDataLengthInvalid},
		{name: "to the end of the address space", sgl1: data(^uint64(0)-511, 512), length: 512, status: nvme.StatusSGLDataLengthInvalid},
		{name: "the byte before it", sgl1: data(^uint64(0)-512, 512), length: 512, want: []Extent{{^uint64(0) - 512, 512}}},
		{name: "around it", sgl1: data(^uint64(0)-255, 512), length: 512, status: nvme.StatusSGLDataLengthInvalid},
		{name: "an address that would be a bit bucket", sgl1: data(BitBucket, 1), length: 1, status: nvme.StatusSGLDataLengthInvalid},
		{name: "data block with an offset", sgl1: withSubtype(data(0, 512)), length: 512, status: nvme.StatusSGLTypeInvalid},
		{name: "keyed data block", sgl1: nvme.MakeSGL(nvme.SGLKeyedData, 0, 512), length: 512, status: nvme.StatusSGLTypeInvalid},
		{name: "transport", sgl1: nvme.MakeSGL(nvme.SGLTransport, 0, 512), length: 512, status: nvme.StatusSGLTypeInvalid},
		{name: "vendor", sgl1: nvme.MakeSGL(nvme.SGLVendor, 0, 512), length: 512, status: nvme.StatusSGLTypeInvalid},
		{name: "reserved type", sgl1: nvme.MakeSGL(9, 0, 512), length: 512, status: nvme.StatusSGLTypeInvalid},
		{name: "a bucket takes it all", sgl1: bucket(512), length: 512, want: []Extent{{BitBucket, 512}}},
		{name: "a bucket gives nothing", sgl1: bucket(512), length: 512, toMedia: true, status: nvme.StatusSGLDataLengthInvalid},

		{name: "last segment", sgl1: lastSegment(a, 2), length: 1000, mem: none().segment(a, data(0x5000, 400), data(0x9000, 600)),
			want: []Extent{{0x5000, 400}, {0x9000, 600}}},
		{name: "neighbours", sgl1: lastSegment(a, 2), length: 1000, mem: none().segment(a, data(0x5000, 400), data(0x5190, 600)), want: []Extent{{0x5000, 1000}}},
		{name: "empty blocks anywhere, of any address", sgl1: lastSegment(a, 4), length: 1000,
			mem: none().segment(a, data(^uint64(0), 0), data(0x5000, 400), data(7, 0), data(0x9000, 600)), want: []Extent{{0x5000, 400}, {0x9000, 600}}},
		{name: "empty blocks after all is there", sgl1: lastSegment(a, 2), length: 400, mem: none().segment(a, data(0x5000, 400), data(0, 0)), want: []Extent{{0x5000, 400}}},
		{name: "buckets between", sgl1: lastSegment(a, 4), length: 1200, mem: none().segment(a, bucket(100), data(0x5000, 400), bucket(50), bucket(650)),
			want: []Extent{{BitBucket, 100}, {0x5000, 400}, {BitBucket, 700}}},
		{name: "data where a bucket would end if it had an address", sgl1: lastSegment(a, 2), length: 1401, mem: none().segment(a, bucket(1001), data(1000, 400)),
			want: []Extent{{BitBucket, 1001}, {1000, 400}}},
		{name: "buckets in a write", sgl1: lastSegment(a, 3), length: 400, toMedia: true, mem: none().segment(a, bucket(100), data(0x5000, 400), bucket(^uint32(0))),
			want: []Extent{{0x5000, 400}}},
		{name: "two segments", sgl1: segment(a, 2), length: 1000, mem: none().segment(a, data(0x5000, 400), lastSegment(b, 1)).segment(b, data(0x9000, 600)),
			want: []Extent{{0x5000, 400}, {0x9000, 600}}},
		{name: "three segments, one of nothing but the next", sgl1: segment(a, 1), length: 1000,
			mem:  none().segment(a, segment(b, 2)).segment(b, data(0x5000, 400), lastSegment(a+64, 1)).segment(a+64, data(0x9000, 600)),
			want: []Extent{{0x5000, 400}, {0x9000, 600}}},
		{name: "too short in the end", sgl1: segment(a, 2), length: 1001, mem: none().segment(a, data(0x5000, 400), lastSegment(b, 1)).segment(b, data(0x9000, 600)),
			status: nvme.StatusSGLDataLengthInvalid},
		{name: "too long in the end", sgl1: lastSegment(a, 3), length: 1000, mem: none().segment(a, data(0x5000, 400), data(0x9000, 600), data(0, 1)),
			status: nvme.StatusSGLDataLengthInvalid},
		{name: "sum wraps 32 bits", sgl1: lastSegment(a, 2), length: 512, mem: none().segment(a, data(0x5000, 1024), data(0x9000, ^uint32(0)-511)),
			status: nvme.StatusSGLDataLengthInvalid},

		{name: "segment of nothing", sgl1: lastSegment(a, 0), length: 512, status: nvme.StatusSGLSegmentInvalid},
		{name: "segment of a descriptor and a half", sgl1: withLength(lastSegment(a, 2), 24), length: 512, status: nvme.StatusSGLSegmentInvalid},
		{name: "segment of half a descriptor", sgl1: withLength(lastSegment(a, 2), 8), length: 512, status: nvme.StatusSGLSegmentInvalid},
		{name: "misaligned segment", sgl1: lastSegment(a+4, 1), length: 512, status: nvme.StatusSGLSegmentInvalid},
		{name: "segment around the end of the address space", sgl1: lastSegment(^uint64(7), 2), length: 512, status: nvme.StatusSGLSegmentInvalid},
		{name: "segment with an offset", sgl1: withSubtype(lastSegment(a, 1)), length: 512, status: nvme.StatusSGLTypeInvalid},
		{name: "second segment with an offset", sgl1: segment(a, 1), length: 512, mem: none().segment(a, withSubtype(lastSegment(b, 1))), status: nvme.StatusSGLTypeInvalid},
		{name: "last segment that goes on", sgl1: lastSegment(a, 2), length: 512, mem: none().segment(a, data(0x5000, 512), lastSegment(b, 1)), status: nvme.StatusSGLSegmentInvalid},
		{name: "segment that does not", sgl1: segment(a, 1), length: 512, mem: none().segment(a, data(0x5000, 512)), status: nvme.StatusSGLSegmentInvalid},
		{name: "next segment in the middle", sgl1: segment(a, 2), length: 512, mem: none().segment(a, lastSegment(b, 1), data(0x5000, 512)), status: nvme.StatusSGLCountInvalid},
		{name: "unknown type in a segment", sgl1: lastSegment(a, 2), length: 512, mem: none().segment(a, data(0x5000, 256), nvme.MakeSGL(6, 0, 256)), status: nvme.StatusSGLTypeInvalid},
		{name: "unreadable", sgl1: lastSegment(a, 1), length: 512, status: nvme.StatusDataTransferError},
		{name: "half readable", sgl1: lastSegment(a, 2), length: 512, mem: none().segment(a, data(0x5000, 256)), status: nvme.StatusDataTransferError},
		{name: "second unreadable", sgl1: segment(a, 1), length: 512, mem: none().segment(a, lastSegment(b, 1)), status: nvme.StatusDataTransferError},

		{name: "as many as there may be", sgl1: lastSegment(a, MaxDescriptors), length: 4 * MaxDescriptors, mem: none().segment(a, full[:MaxDescriptors]...), want: extents(full[:MaxDescriptors])},
		{name: "one more", sgl1: lastSegment(a, MaxDescriptors+1), length: 4 * (MaxDescriptors + 1), mem: none().segment(a, full...), status: nvme.StatusSGLCountInvalid},
		{name: "an enormous segment", sgl1: withLength(lastSegment(a, 1), ^uint32(15)), length: 512, status: nvme.StatusSGLCountInvalid},
		{name: "a segment that is its own next", sgl1: segment(a, 1), length: 512, mem: none().segment(a, segment(a, 1)), status: nvme.StatusSGLCountInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.mem == nil {
				tt.mem = none()
			}
			before := []Extent{{0x42, 1}}
			var w Walker
			out, status := w.WalkSGL(tt.sgl1, tt.length, !tt.toMedia, tt.mem, before)
			if status != tt.status {
				t.Fatalf("%v, want %v", status, tt.status)
			}
			if out[0] != before[0] || !slices.Equal(out[1:], tt.want) {
				t.Errorf("%#x, want %#x", out[1:], tt.want)
			}
			if tt.mem.reads > MaxDescriptors {
				t.Errorf("%d reads", tt.mem.reads)
			}
		})
	}
}

func extents(ds []nvme.SGLDescriptor) (out []Extent) {
	for _, d := range ds {
		out = append(out, Extent{d.Address, d.Length})
	}
	return out
}

// TestSGLModel cuts random transfers into random segments, and expects the data blocks, in order.
func TestSGLModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mem := none()
		toHost := rapid.Bool().Draw(t, "to host")
		var ds []nvme.SGLDescriptor
		var want []Extent
		length := uint32(0)
		for range rapid.IntRange(1, 600).Draw(t, "descriptors") {
			n := rapid.Uint32Range(0, 600).Draw(t, "length")
			if rapid.IntRange(0, 4).Draw(t, "kind") == 0 {
				ds = append(ds, bucket(n))
				if n > 0 && toHost {
					length += n
					if k := len(want) - 1; k >= 0 && want[k].IOVA == BitBucket {
						want[k].Len += n
					} else {
						want = append(want, Extent{BitBucket, n})
					}
				}
				continue
			}
			iova := rapid.Uint64Range(0, 1<<40).Draw(t, "iova")
			if k := len(want) - 1; k >= 0 && rapid.Bool().Draw(t, "adjacent") && want[k].IOVA != BitBucket {
				iova = want[k].IOVA + uint64(want[k].Len)
			}
			ds = append(ds, data(iova, n))
			if n > 0 {
				length += n
				if k := len(want) - 1; k >= 0 && want[k].IOVA != BitBucket && want[k].IOVA+uint64(want[k].Len) == iova {
					want[k].Len += n
				} else {
					want = append(want, Extent{iova, n})
				}
			}
		}
		// From the back: the last segment, then others that each point to the one before.
		cut := rapid.IntRange(0, len(ds)-1).Draw(t, "cut")
		at := uint64(1) << 41
		mem.segment(at, ds[cut:]...)
		sgl1 := lastSegment(at, uint32(len(ds)-cut))
		for rest := ds[:cut]; len(rest) > 0; {
			k := rapid.IntRange(0, len(rest)-1).Draw(t, "segment")
			at += 1 << 20
			mem.segment(at, append(slices.Clone(rest[k:]), sgl1)...)
			sgl1 = segment(at, uint32(len(rest)-k)+1)
			rest = rest[:k]
		}
		var w Walker
		out, status := w.WalkSGL(sgl1, length, toHost, mem, nil)
		if status != nvme.StatusSuccess || !slices.Equal(out, want) {
			t.Fatalf("%v\n%#x, want\n%#x", status, out, want)
		}
		if length > 0 {
			if out, status := w.WalkSGL(sgl1, length-1, toHost, mem, nil); status != nvme.StatusSGLDataLengthInvalid || len(out) != 0 {
				t.Fatalf("one byte too long: %v", status)
			}
		}
		if _, status := w.WalkSGL(sgl1, length+1, toHost, mem, nil); status != nvme.StatusSGLDataLengthInvalid {
			t.Fatalf("one byte too short: %v", status)
		}
	})
}

func TestBuildSGL(t *testing.T) {
	list := listMemory(0, 4096)
	for name, x := range map[string]struct {
		extents []Extent
		list    ListPage
		err     error
	}{
		"nothing":           {nil, ListPage{}, nil},
		"one":               {[]Extent{{0x1001, 77}}, ListPage{}, nil},
		"a bucket":          {[]Extent{{BitBucket, 512}}, ListPage{}, nil},
		"three":             {[]Extent{{0x1001, 77}, {BitBucket, 5}, {0x5000, 4096}}, list, nil},
		"no list":           {[]Extent{{0x1001, 77}, {0x5000, 4096}}, ListPage{}, ErrList},
		"list too small":    {make([]Extent, 257), list, ErrList},
		"list misaligned":   {make([]Extent, 2), ListPage{Mem: list.Mem, IOVA: listBase + 4}, ErrAlign},
		"around the end":    {[]Extent{{^uint64(0) - 5, 6}}, list, ErrRange},
		"more than 32 bits": {[]Extent{{0, ^uint32(0)}, {1 << 32, 1}}, list, ErrRange},
	} {
		cmd := nvme.Command{Flags: nvme.FuseFirst}
		if err := BuildSGL(&cmd, x.extents, x.list); err != x.err {
			t.Errorf("%s: %v, want %v", name, err, x.err)
		}
		if x.err != nil {
			continue
		}
		if cmd.PSDT() != nvme.PSDTSGL || cmd.FUSE() != nvme.FuseFirst {
			t.Errorf("%s: flags %#x", name, cmd.Flags)
		}
		n := uint32(0)
		for _, e := range x.extents {
			n += e.Len
		}
		var w Walker
		out, status := w.WalkSGL(cmd.SGL1(), n, true, list, nil)
		if !status.OK() || !slices.Equal(out, x.extents) {
			t.Errorf("%s: walks to %#x, %v", name, out, status)
		}
	}
}

func TestNoAllocationSGL(t *testing.T) {
	list := listMemory(0, 4096)
	many := make([]Extent, 256)
	for i := range many {
		many[i] = Extent{uint64(i) << 13, 4096}
	}
	var cmd nvme.Command
	var w Walker
	var mem Reader = list
	out := make([]Extent, 0, len(many))
	if n := testing.AllocsPerRun(100, func() {
		_ = BuildSGL(&cmd, many, list)
		out, _ = w.WalkSGL(cmd.SGL1(), 1<<20, true, mem, out[:0])
	}); n != 0 || len(out) != len(many) {
		t.Errorf("%v allocations, %d extents", n, len(out))
	}
}

func FuzzWalkSGL(f *testing.F) {
	seed := func(d nvme.SGLDescriptor, length uint32, toHost bool, script []byte) {
		f.Add(d.Address, d.Length, d.ID, length, toHost, script)
	}
	seed(data(0x1000, 4096), 4096, true, nil)
	seed(lastSegment(0x1000, 4), 4096, false, []byte{0, 0x10, 0, 0})
	seed(segment(0x1000, 300), 1<<20, true, []byte{0x20, 0x30, 0x10})
	f.Fuzz(func(t *testing.T, address uint64, descLen uint32, id uint8, length uint32, toHost bool, script []byte) {
		mem := &hostile{script: append([]byte(nil), script...)}
		d := nvme.SGLDescriptor{Address: address, Length: descLen, ID: id}
		var w Walker
		out, status := w.WalkSGL(d, length, toHost, mem, nil)
		if !status.OK() {
			if len(out) != 0 {
				t.Fatalf("%v and yet %d extents", status, len(out))
			}
		} else {
			sum := uint64(0)
			for _, e := range out {
				if e.Len == 0 || e.IOVA == BitBucket && !toHost || e.IOVA != BitBucket && e.IOVA+uint64(e.Len) < e.IOVA {
					t.Fatalf("impossible extent %#x", e)
				}
				sum += uint64(e.Len)
			}
			if sum != uint64(length) || len(out) > MaxDescriptors {
				t.Fatalf("%d extents of %d bytes, asked for %d", len(out), sum, length)
			}
		}
		if mem.bytes > MaxDescriptors*nvme.SGLDescriptorSize {
			t.Fatalf("%d bytes of segments read", mem.bytes)
		}
	})
}
