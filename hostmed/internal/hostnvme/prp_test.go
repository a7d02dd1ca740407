package hostnvme

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const page = 4096

// heap returns n bytes of page-aligned memory.
func heap(tb testing.TB, n int) []byte {
	tb.Helper()
	b, err := shm.NewHeap(n).Bytes(0, uint64(n))
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// scattered is a Mapper that puts memory wherever the test says.
type scattered struct {
	place func(mem []byte) (uint64, error)
	unmap func(iova, size uint64) error
}

func (s *scattered) Map(mem []byte) (Place, error) {
	iova, err := s.place(mem)
	return Place{IOVA: iova}, err
}

func (s *scattered) Unmap(mem []byte, at Place) error {
	if s.unmap != nil {
		return s.unmap(at.IOVA, uint64(len(mem)))
	}
	return nil
}

// newPointers returns pointers over mem, of which each piece of size bytes, but for those in holes, is at a place of its own.
func newPointers(tb testing.TB, mem []byte, size int, holes ...int) *pointers {
	tb.Helper()
	n := 0
	m := NewMemory(&scattered{place: func([]byte) (uint64, error) {
		n++
		return 1<<40 - uint64(n)<<24, nil // downwards: no two of them touch
	}}, hclog.NewNullLogger())
	for i := 0; i*size < len(mem); i++ {
		if !slices.Contains(holes, i) {
			m.add(mem[i*size : (i+1)*size])
		}
	}
	m.Settle(patience)
	p := &pointers{finder: finder{m: m}, page: page, block: 512}
	p.refresh()
	return p
}

func seg(b []byte) Seg { return Seg{Base: &b[0], Len: uint64(len(b))} }

// where is the IOVA of each byte of vec from at on; 0: none.
func (p *pointers) where(vec []Seg, at position, n uint64) []uint64 {
	out := make([]uint64, n)
	for i := range out {
		out[i], _ = p.run(vec, at, 1)
		at.advance(vec, 1)
	}
	return out
}

// oneList is a list as the device reads it.
type oneList list

func (l *oneList) ReadIOVA(iova uint64, dst []byte) bool {
	off := iova - l.iova
	if off > uint64(len(l.mem)) || uint64(len(dst)) > uint64(len(l.mem))-off {
		return false
	}
	copy(dst, l.mem[off:])
	return true
}

// decode is where the device moves n bytes of cmd.
func decode(cmd *nvme.Command, n uint64, l list) ([]uint64, error) {
	var ext []prp.Extent
	var st nvme.Status
	if cmd.PSDT() == nvme.PSDTPRP {
		ext, st = prp.Walk(cmd.PRP1, cmd.PRP2, uint32(n), page, 1<<20, (*oneList)(&l), nil)
	} else {
		ext, st = new(prp.Walker).WalkSGL(cmd.SGL1(), uint32(n), true, (*oneList)(&l), nil)
	}
	if !st.OK() {
		return nil, fmt.Errorf("%v", st)
	}
	out := make([]uint64, 0, n)
	for _, e := range ext {
		for i := range uint64(e.Len) {
			out = append(out, e.IOVA+i)
		}
	}
	return out, nil
}

func newList(tb testing.TB) list { return list{mem: heap(tb, page), iova: 7 << 50} }

// TestPointerShapes goes through the shapes of data, and says what becomes of each.
func TestPointerShapes(t *testing.T) {
	mem := heap(t, 64*page)
	for _, c := range []struct {
		name string
		vec  []Seg
		size int // of what is mapped in one piece
		hole []int
		sgl  uint64
		n    uint64 // 0: all
		want uint64 // bytes that the command moves
		psdt uint8
		list bool
	}{
		{name: "a block", vec: []Seg{seg(mem[512:1024])}, size: 64 * page, want: 512},
		{name: "a block over a page's end", vec: []Seg{seg(mem[page-512+4 : page+4])}, size: 64 * page, want: 512},
		{name: "two pages", vec: []Seg{seg(mem[:2*page])}, size: 64 * page, want: 2 * page},
		{name: "two pages, apart", vec: []Seg{seg(mem[:page]), seg(mem[3*page : 4*page])}, size: 64 * page, want: 2 * page},
		{name: "two pages, mapped apart", vec: []Seg{seg(mem[:2*page])}, size: page, want: 2 * page},
		{name: "offset and three pages", vec: []Seg{seg(mem[1024 : 3*page+1024])}, size: 64 * page, want: 3 * page, list: true},
		{name: "many pages backwards", vec: []Seg{seg(mem[9*page : 10*page]), seg(mem[8*page : 9*page]), seg(mem[7*page : 8*page])}, size: 64 * page, want: 3 * page, list: true},
		{name: "all", vec: []Seg{seg(mem)}, size: 4 * page, want: 64 * page, list: true},
		{name: "a part of it", vec: []Seg{seg(mem)}, size: 64 * page, n: 8192, want: 8192},
		{name: "not even dwords", vec: []Seg{seg(mem[2:514])}, size: 64 * page, want: 0},
		{name: "not even dwords, by SGL", vec: []Seg{seg(mem[2:514])}, size: 64 * page, sgl: 1, want: 512, psdt: nvme.PSDTSGL},
		{name: "not even dwords, by a coarse SGL", vec: []Seg{seg(mem[2:514])}, size: 64 * page, sgl: 4, want: 0},
		{name: "a gap in the middle", vec: []Seg{seg(mem[:1024]), seg(mem[4096:5120])}, size: 64 * page, want: 1024},
		{name: "a gap in the middle, by SGL", vec: []Seg{seg(mem[:1024]), seg(mem[4096:5120])}, size: 64 * page, sgl: 4, want: 2048, psdt: nvme.PSDTSGL, list: true},
		{name: "a gap in a block", vec: []Seg{seg(mem[:256]), seg(mem[4096:4352])}, size: 64 * page, want: 0},
		{name: "a gap in a block, by SGL", vec: []Seg{seg(mem[:256]), seg(mem[4096:4352])}, size: 64 * page, sgl: 4, want: 512, psdt: nvme.PSDTSGL, list: true},
		{name: "a gap in the second block", vec: []Seg{seg(mem[:768]), seg(mem[4096:4352])}, size: 64 * page, want: 512},
		{name: "unknown", vec: []Seg{seg(mem[:page])}, size: page, hole: []int{0}, sgl: 1, want: 0},
		{name: "unknown from the third page on", vec: []Seg{seg(mem[:4*page])}, size: page, hole: []int{2}, want: 2 * page},
		{name: "unknown from the third page on, by SGL", vec: []Seg{seg(mem[:4*page])}, size: page, hole: []int{2}, sgl: 1, want: 2 * page},
		{name: "ends below a page that is unknown", vec: []Seg{seg(mem[:page+512])}, size: page, hole: []int{1}, want: page},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, l := newPointers(t, mem, c.size, c.hole...), newList(t)
			p.sgl = c.sgl
			var cmd nvme.Command
			n := c.n
			for i := range c.vec {
				if c.n == 0 {
					n += c.vec[i].Len
				}
			}
			got := p.point(&cmd, c.vec, position{}, n, l)
			if got != c.want || cmd.PSDT() != c.psdt {
				t.Fatalf("%d bytes, PSDT %d", got, cmd.PSDT())
			}
			if used := cmd.PRP2 == l.iova || cmd.PSDT() != 0 && cmd.PRP1 == l.iova; used != c.list {
				t.Fatalf("list used: %v", used)
			}
			checkPointers(t, p, &cmd, c.vec, position{}, got, l)
		})
	}
}

func checkPointers(t *testing.T, p *pointers, cmd *nvme.Command, vec []Seg, at position, n uint64, l list) {
	t.Helper()
	if n == 0 {
		return
	}
	is, err := decode(cmd, n, l)
	if err != nil {
		t.Fatalf("the device says %v", err)
	}
	if want := p.where(vec, at, n); !slices.Equal(is, want) {
		t.Fatal("the device moves other bytes than those of the request")
	}
}

// TestPointersOfAnything cuts random data into commands, and has the device look where they point. What comes out as 0
// is a block that no command can move without a copy.
func TestPointersOfAnything(t *testing.T) {
	mem := heap(t, 128*page)
	rnd := rand.New(rand.NewPCG(1, 2))
	rounds := 400
	if testing.Short() {
		rounds = 40
	}
	for range rounds {
		var holes []int
		for range rnd.IntN(4) {
			holes = append(holes, rnd.IntN(64))
		}
		p, l := newPointers(t, mem, 2*page, holes...), newList(t)
		p.sgl = []uint64{0, 1, 4}[rnd.IntN(3)]
		var vec []Seg
		total, grain := 0, []int{4, 512, page, page, page}[rnd.IntN(5)]
		for len(vec) < 1+rnd.IntN(20) || total%512 != 0 {
			off := rnd.IntN(64*page/grain) * grain
			n := min((1+rnd.IntN(4*page/grain))*grain, 64*page)
			if len(vec) > 20 {
				n = 512 - total%512
			}
			vec = append(vec, seg(mem[off:off+n]))
			total += n
		}
		if rnd.IntN(3) == 0 { // begins in a page
			cut := rnd.IntN(8) * 512
			if int(vec[0].Len) > cut {
				vec[0] = seg(segBytes(&vec[0], uint64(cut), vec[0].Len-uint64(cut)))
				total -= cut
			}
		}
		at, left := position{}, uint64(total)
		for left > 0 {
			var cmd nvme.Command
			n := p.point(&cmd, vec, at, min(left, 256<<10), l)
			if n%512 != 0 || n > left {
				t.Fatalf("%d of %d bytes", n, left)
			}
			checkPointers(t, p, &cmd, vec, at, n, l)
			if n == 0 {
				if !slices.Contains(p.where(vec, at, 512), 0) && p.sgl == 1 {
					t.Fatal("an SGL can move anything that the device reaches")
				}
				n = 512
			}
			at.advance(vec, n)
			left -= n
		}
	}
}

// TestListsStayInTheirPage asks for more than a list has room for.
func TestListsStayInTheirPage(t *testing.T) {
	mem := heap(t, 1024*page)
	p, l := newPointers(t, mem, 1024*page), newList(t)
	l.mem = l.mem[:64:64]
	var cmd nvme.Command
	if n := p.point(&cmd, []Seg{seg(mem)}, position{}, 1024*page, l); n != 9*page {
		t.Fatalf("%d pages", n/page)
	}
	p.sgl = 1
	vec := make([]Seg, 100)
	for i := range vec {
		vec[i] = seg(mem[i*page+4 : i*page+4+512])
	}
	if n := p.point(&cmd, vec, position{}, 100*512, l); n != 4*512 {
		t.Fatalf("%d blocks", n/512)
	}
	checkPointers(t, p, &cmd, vec, position{}, 4*512, l)
}

func TestPointAt(t *testing.T) {
	l := newList(t)
	pages := []uint64{5 * page, 9 * page, 2 * page}
	for _, c := range []struct {
		n    uint64
		prp2 uint64
	}{{512, 0}, {page, 0}, {page + 512, 9 * page}, {2 * page, 9 * page}, {2*page + 512, l.iova}, {3 * page, l.iova}} {
		var cmd nvme.Command
		pointAt(&cmd, pages, page, c.n, l)
		if cmd.PRP1 != 5*page || cmd.PRP2 != c.prp2 {
			t.Errorf("%d bytes: %#x, %#x", c.n, cmd.PRP1, cmd.PRP2)
		}
		if where, err := decode(&cmd, c.n, l); err != nil || where[c.n-1] != pages[(c.n-1)/page]+(c.n-1)%page {
			t.Errorf("%d bytes: %v", c.n, err)
		}
	}
}

func BenchmarkPointers(b *testing.B) {
	mem := heap(b, 64*page)
	for _, c := range []struct {
		name string
		vec  []Seg
	}{
		{"4k", []Seg{seg(mem[page : 2*page])}},
		{"8k", []Seg{seg(mem[page : 3*page])}},
		{"64k", []Seg{seg(mem[page : 17*page])}},
		{"4x4k", []Seg{seg(mem[page : 2*page]), seg(mem[4*page : 5*page]), seg(mem[9*page : 10*page]), seg(mem[7*page : 8*page])}},
	} {
		b.Run(c.name, func(b *testing.B) {
			p, l := newPointers(b, mem, 64*page), newList(b)
			n := uint64(0)
			for i := range c.vec {
				n += c.vec[i].Len
			}
			var cmd nvme.Command
			b.ReportAllocs()
			for b.Loop() {
				if p.point(&cmd, c.vec, position{}, n, l) != n {
					b.Fatal("short")
				}
			}
		})
	}
}
