package hostnvme

import (
	"slices"
	"testing"

	"github.com/hashicorp/go-hclog"
	"pgregory.net/rapid"
)

// paged is a Mapper that puts memory where the test says, page by page.
type paged struct{ addresses [][]uint64 }

func (p *paged) Map([]byte) (Place, error) {
	a := p.addresses[0]
	p.addresses = p.addresses[1:]
	return Place{Pages: joinPages(slices.Clone(a))}, nil
}

func (p *paged) Unmap([]byte, Place) error { return nil }

// TestPagesAreFound compares what is found with where each page is, from anywhere in any order.
func TestPagesAreFound(t *testing.T) {
	mem := heap(t, 96*page)
	rapid.Check(t, func(t *rapid.T) {
		at := make([]uint64, 96)
		for i := range at {
			if at[i] = uint64(rapid.IntRange(1, 1<<30).Draw(t, "page")) * page; i > 0 && rapid.Bool().Draw(t, "follows") {
				at[i] = at[i-1] + page
			}
		}
		cut := rapid.IntRange(1, 95).Draw(t, "cut") // two mappings, and what ends the first is not followed
		m := NewMemory(&paged{[][]uint64{at[:cut], at[cut:]}}, hclog.NewNullLogger())
		m.add(mem[:cut*page])
		m.Settle(patience)
		m.add(mem[cut*page:])
		m.Settle(patience)
		f := finder{m: m}
		f.refresh()
		base := blockOf(mem).base
		for range 40 {
			off := rapid.IntRange(0, len(mem)-1).Draw(t, "off")
			i := off / page
			want := uint64(page - off%page)
			for j := i + 1; j < len(at) && j != cut && at[j] == at[j-1]+page; j++ {
				want += page
			}
			if iova, left := f.find(base + uint64(off)); iova != at[i]+uint64(off%page) || left != want {
				t.Fatalf("byte %d: %#x, +%d; it is at %#x, +%d", off, iova, left, at[i]+uint64(off%page), want)
			}
		}
		if _, left := f.find(base + uint64(len(mem))); left != 0 {
			t.Fatal("found behind the end")
		}
		m.remove(mem[:cut*page])
		f.refresh()
		if _, left := f.find(base); left != 0 {
			t.Fatal("found after it was taken back")
		}
		if _, left := f.find(base + uint64(cut*page)); left == 0 {
			t.Fatal("the other mapping is gone too")
		}
		m.Settle(patience)
	})
}

// TestLongRuns: more pages that follow than there is room to say.
func TestLongRuns(t *testing.T) {
	const n = 3*followers + 7
	at := make([]uint64, n)
	for i := range at {
		at[i] = 1<<40 + uint64(i)*page
	}
	s := span{stretch: stretch{base: 1 << 20, size: n * page}, pages: joinPages(slices.Clone(at))}
	for _, i := range []uint64{0, 1, n - followers - 2, n - followers - 1, n - 1} {
		x := s.around(1<<20 + i*page + 5)
		want := min(followers+1, n-i)
		if x.base != 1<<20+i*page || x.base+x.delta != at[i] || x.size != want*page {
			t.Errorf("page %d: %+v, want %d pages", i, x, want)
		}
	}
}
