package gmem

import (
	"bytes"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/prp"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// scattered returns a Memory with n ranges of one to four pages, in one file, with and without gaps, some
// read-only and some without memory, and a model of it by pages: the file page at each guest page.
func scattered(t testing.TB, n int) (m *Memory, model map[uint64]guestPage) {
	t.Helper()
	m, model = newMemory(t), map[uint64]guestPage{}
	fd := memfd(t, 4*n)
	iova, filePage := uint64(0x100000), 0
	for i := range n {
		pages := 1 + i*7%4
		iova += uint64(i*5%3) * page // 0: touches the range before
		writable := i%5 != 4
		withFD := i%11 != 10
		d := -1
		if withFD {
			d = dup(t, fd)
		}
		if i%6 == 5 {
			filePage = (filePage + 3) % (4*n - 4) // does not continue the range before in host memory
		}
		m.mustMap(t, iova, uint64(pages)*page, uint64(filePage)*page, d, writable)
		for range pages {
			if withFD {
				model[iova/page] = guestPage{filePage, writable}
			}
			iova += page
			filePage++
		}
		filePage %= 4*n - 3
	}
	unix.Close(fd)
	return m, model
}

type guestPage struct {
	filePage int
	writable bool
}

// wantVec is what Translate has to return, joined, or false.
func wantVec(model map[uint64]guestPage, iova uint64, n uint32, write bool) (lens []uint64, ok bool) {
	var last guestPage
	for left := uint64(n); left > 0; {
		g, mapped := model[iova/page]
		if !mapped || write && !g.writable {
			return nil, false
		}
		step := min(left, page-iova%page)
		if len(lens) > 0 && g.writable == last.writable && g.filePage == last.filePage+1 && iova%page == 0 {
			lens[len(lens)-1] += step
		} else {
			lens = append(lens, step)
		}
		last = g
		iova += step
		left -= step
	}
	return lens, true
}

// Look-ups against a model by pages, with as many ranges as take each way through find.
func TestTranslateAgainstNaiveModel(t *testing.T) {
	for _, n := range []int{1, 4, 5, 1000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			m, model := scattered(t, n)
			tab := m.Table()
			first, last := tab.all()[0].IOVA, tab.all()[tab.n-1].end()
			rapid.Check(t, func(t *rapid.T) {
				iova := rapid.Uint64Range(first-2*page, last+2*page).Draw(t, "iova")
				if rapid.Bool().Draw(t, "page aligned") {
					iova &^= page - 1
				}
				length := rapid.OneOf(rapid.Uint32Range(0, 3*page), rapid.Uint32Range(0, 64*page)).Draw(t, "length")
				write := rapid.Bool().Draw(t, "write")
				want, ok := wantVec(model, iova, length, write)
				got, gotOK := tab.Translate(nil, iova, length, write)
				if gotOK != ok {
					t.Fatalf("%#x, +%#x, write %v: %v, want %v", iova, length, write, gotOK, ok)
				}
				var lens []uint64
				for _, v := range got {
					lens = append(lens, v.Len)
				}
				if !slices.Equal(lens, want) {
					t.Fatalf("%#x, +%#x: elements of %v bytes, want %v", iova, length, lens, want)
				}
				one := slices.ContainsFunc(tab.all(), func(r Range) bool {
					return r.IOVA <= iova && iova+uint64(length) <= r.end() && r.Mem != nil && (r.Writable || !write)
				})
				if seg, ok := tab.Within(iova, uint64(length), write); length > 0 && (ok != one || ok && seg != got[0]) {
					t.Fatalf("Within %#x, +%#x, write %v: %v, %v, want %v, %v", iova, length, write, seg, ok, got, one)
				}
				// The bytes themselves: each page begins with its number in the file.
				p := make([]byte, length)
				if readOK := tab.ReadIOVA(iova, p); readOK != ok && !write {
					t.Fatalf("ReadIOVA says %v", readOK)
				} else if !readOK {
					return
				}
				for at := (iova + page - 1) &^ (page - 1); at+2 <= iova+uint64(length); at += page {
					b := p[at-iova:]
					if got := int(b[0]) | int(b[1])<<8; got != model[at/page].filePage {
						t.Fatalf("page %d of the file at %#x, want %d", got, at, model[at/page].filePage)
					}
				}
				if flat := flatten(got); ok && !bytes.Equal(flat, p) {
					t.Fatalf("the elements of %#x, +%#x hold something else than ReadIOVA", iova, length)
				}
			})
		})
	}
}

func TestTranslateKeepsWhatIsThere(t *testing.T) {
	m := newMemory(t)
	m.mustMap(t, 0, 4*page, 0, memfd(t, 4), true)
	m.mustMap(t, 8*page, page, 0, memfd(t, 1), true)
	tab := m.Table()
	vec, ok := tab.Translate(nil, 0, page, false)
	if !ok || len(vec) != 1 {
		t.Fatal("not translated")
	}
	first := vec[0]
	// Touching host memory is joined, also across calls.
	vec, ok = tab.Translate(vec, page, page, false)
	if !ok || len(vec) != 1 || vec[0].Len != 2*page || vec[0].Base != first.Base {
		t.Errorf("%d elements, the first of %d bytes", len(vec), vec[0].Len)
	}
	vec, ok = tab.Translate(vec, 8*page, page, false)
	if !ok || len(vec) != 2 {
		t.Errorf("%d elements", len(vec))
	}
	// A failure leaves the number of elements as it was.
	for _, iova := range []uint64{9 * page, 8*page + 1, 4 * page} {
		got, ok := tab.Translate(vec, iova, page, false)
		if ok || len(got) != 2 {
			t.Errorf("%#x: %v, %d elements", iova, ok, len(got))
		}
	}
	if got, ok := tab.Translate(vec, 1<<50, 0, true); !ok || len(got) != 2 {
		t.Errorf("nothing at nowhere: %v, %d elements", ok, len(got))
	}
}

// A translation that fails half-way must not lengthen what the caller had.
func TestFailedTranslateJoinsNothing(t *testing.T) {
	m := newMemory(t)
	m.mustMap(t, 0, 2*page, 0, memfd(t, 2), true)
	tab := m.Table()
	vec, ok := tab.Translate(nil, 0, page, false)
	if !ok {
		t.Fatal("not translated")
	}
	got, ok := tab.Translate(vec, page, 2*page, false) // the second page is there, the third is not
	if ok || len(got) != 1 || got[0].Len != page {
		t.Errorf("%v, %d elements, the first of %d bytes, which was %d", ok, len(got), got[0].Len, page)
	}
}

func TestTranslateAll(t *testing.T) {
	m := newMemory(t)
	m.mustMap(t, 0, 4*page, 0, memfd(t, 4), true)
	tab := m.Table()
	vec, ok := tab.TranslateAll(nil, []prp.Extent{{IOVA: 100, Len: page}, {IOVA: 2 * page, Len: 2 * page}}, true)
	if !ok || len(vec) != 2 || vec[0].Len != page || vec[1].Len != 2*page {
		t.Errorf("%v, %d elements", ok, len(vec))
	}
	if vec, ok := tab.TranslateAll(nil, []prp.Extent{{IOVA: 100, Len: page}, {IOVA: 4 * page, Len: 1}}, true); ok {
		t.Errorf("%d elements of memory that is not there", len(vec))
	}
	if vec, ok := tab.TranslateAll(nil, nil, true); !ok || len(vec) != 0 {
		t.Error("no extents are no failure")
	}
}

// TranslateAll is Translate for one extent after the other.
func TestTranslateAllAgainstTranslate(t *testing.T) {
	for _, n := range []int{1, 4, 5, 100} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			m, _ := scattered(t, n)
			tab := m.Table()
			first, last := tab.all()[0].IOVA, tab.all()[tab.n-1].end()
			extent := rapid.Custom(func(t *rapid.T) prp.Extent {
				iova := rapid.Uint64Range(first, last).Draw(t, "iova") &^ 3
				return prp.Extent{IOVA: iova, Len: rapid.OneOf(rapid.Just(uint32(page)), rapid.Uint32Range(1, 3*page)).Draw(t, "length")}
			})
			rapid.Check(t, func(t *rapid.T) {
				extents := rapid.SliceOfN(extent, 0, 8).Draw(t, "extents")
				write := rapid.Bool().Draw(t, "write")
				var want []unix.Iovec
				wantOK := true
				for _, e := range extents {
					if want, wantOK = tab.Translate(want, e.IOVA, e.Len, write); !wantOK {
						break
					}
				}
				got, ok := tab.TranslateAll(nil, extents, write)
				if ok != wantOK || ok && !slices.Equal(got, want) {
					t.Fatalf("%v, write %v: %v, %v, want %v, %v", extents, write, got, ok, want, wantOK)
				}
			})
		})
	}
}

func TestTranslateAllocatesNothing(t *testing.T) {
	for _, n := range []int{1, 4, 5, 1000} {
		m, _ := scattered(t, n)
		tab := m.Table()
		at := tab.all()[0].IOVA
		vec := make([]unix.Iovec, 0, 64)
		buf := make([]byte, 64)
		ok := true
		if allocs := testing.AllocsPerRun(100, func() {
			var a, b bool
			vec, a = tab.Translate(vec[:0], at, page, false)
			_, b = tab.Translate(vec, 1<<60, page, false)
			ok = ok && a && !b && tab.ReadIOVA(at, buf)
		}); allocs != 0 || !ok {
			t.Errorf("%d ranges: %v allocations, %v", n, allocs, ok)
		}
	}
}

func TestReadWriteAcrossRanges(t *testing.T) {
	m := newMemory(t)
	m.mustMap(t, 0, page, 0, memfd(t, 1), true)
	m.mustMap(t, page, 2*page, 0, memfd(t, 2), true)
	m.mustMap(t, 3*page, page, 0, memfd(t, 1), true)
	tab := m.Table()
	want := make([]byte, 4*page-200)
	for i := range want {
		want[i] = byte(i * 13)
	}
	if !tab.WriteIOVA(100, want) {
		t.Fatal("write across three ranges")
	}
	got := make([]byte, len(want))
	if !tab.ReadIOVA(100, got) || !bytes.Equal(got, want) {
		t.Error("not what was written")
	}
	if tab.ReadIOVA(100, make([]byte, 4*page)) || tab.WriteIOVA(3*page+1, make([]byte, page)) {
		t.Error("access past the last range")
	}
	if !tab.ReadIOVA(1<<60, nil) || !tab.WriteIOVA(1<<60, nil) {
		t.Error("nothing at nowhere is no failure")
	}
}

// R36 here: the client shrinks its memory under a look-up that went well.
func TestRule36_ShrunkGuestMemory(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 4)
	m.mustMap(t, 0, 4*page, 0, dup(t, fd), true)
	defer unix.Close(fd)
	tab := m.Table()
	if err := unix.Ftruncate(fd, page); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(){
		"read":  func() { tab.ReadIOVA(0, make([]byte, 4*page)) },
		"write": func() { tab.WriteIOVA(0, make([]byte, 4*page)) },
	} {
		if err := shm.Guard(f); err == nil {
			t.Errorf("%s of memory that is gone", name)
		}
	}
	// And maps what it no longer has.
	if err := m.Map(0x10000, page, 5*page, dup(t, fd), true); err == nil {
		t.Error("a range past the shrunken file was mapped")
	}
}

// Readers take snapshots while the client maps and unmaps.
func TestSnapshotsUnderChange(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 16)
	m.mustMap(t, 0, page, 0, dup(t, fd), true)
	var stop atomic.Bool
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			vec := make([]unix.Iovec, 0, 16)
			for !stop.Load() {
				tab := m.Table()
				var ok bool
				if vec, ok = tab.Translate(vec[:0], 0, page, true); !ok || len(vec) != 1 {
					t.Error("the range that stays is gone")
					return
				}
				if _, err := tab.View(0, page); err != nil {
					t.Error(err)
					return
				}
				tab.Translate(vec, 5*page, page, true)
			}
		})
	}
	for i := range uint64(300) {
		at := (1 + i%15) * page
		m.mustMap(t, at, page, at, dup(t, fd), true)
		gone, err := m.Unmap(at, page)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Release(gone); err != nil { // the file stays: the first range has it
			t.Fatal(err)
		}
	}
	stop.Store(true)
	wg.Wait()
	unix.Close(fd)
}

func BenchmarkTranslate(b *testing.B) {
	for _, n := range []int{1, 4, 5, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			m, _ := scattered(b, n)
			tab := m.Table()
			ranges := tab.all()
			vec := make([]unix.Iovec, 0, 4)
			b.ReportAllocs()
			for i := range b.N {
				vec, _ = tab.Translate(vec[:0], ranges[i%n].IOVA, page, false)
			}
		})
	}
}

// The chunks of a table against a sorted slice, through maps and unmaps of one range and of many.
func TestTableAgainstNaiveModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tab := &Table{}
		model := map[uint64]Range{} // by page
		for range rapid.IntRange(1, 300).Draw(t, "steps") {
			iova := rapid.Uint64Range(0, 400).Draw(t, "page") * page
			size := rapid.OneOf(rapid.Just(uint64(1)), rapid.Uint64Range(1, 3), rapid.Uint64Range(1, 400)).Draw(t, "pages") * page
			if size <= 3*page && rapid.IntRange(0, 9).Draw(t, "map") < 7 {
				free := true
				for p := iova; p < iova+size; p += page {
					_, used := model[p]
					free = free && !used
				}
				if !free {
					continue
				}
				r := Range{IOVA: iova, Size: size}
				tab = tab.with(r)
				for p := iova; p < iova+size; p += page {
					model[p] = r
				}
			} else {
				last := iova + size - 1
				var want []Range
				whole := true
				for p := iova; p < iova+size; p += page {
					r, used := model[p]
					if !used {
						continue
					}
					if r.IOVA < iova || r.end()-1 > last {
						whole = false
					} else if r.IOVA == p {
						want = append(want, r)
					}
				}
				n, gone, split := tab.without(iova, last)
				if (split == nil) != whole || whole && len(gone) != len(want) || (n == nil) != (len(gone) == 0) {
					t.Fatalf("unmap %#x, +%#x: %d ranges, split %v; want %d, whole %v", iova, size, len(gone), split, len(want), whole)
				}
				if n == nil {
					continue
				}
				for i, r := range gone {
					if r.IOVA != want[i].IOVA || r.Size != want[i].Size {
						t.Fatalf("range %#x taken out, want %#x", r.IOVA, want[i].IOVA)
					}
					for p := r.IOVA; p < r.end(); p += page {
						delete(model, p)
					}
				}
				tab = n
			}
			count := 0
			for i, c := range tab.chunks {
				if len(c.ranges) == 0 || len(c.ranges) > maxChunk || c.end != c.ranges[len(c.ranges)-1].end() {
					t.Fatalf("chunk %d of %d ranges ends at %#x", i, len(c.ranges), c.end)
				}
				count += len(c.ranges)
			}
			if count != tab.n {
				t.Fatalf("%d ranges, the table says %d", count, tab.n)
			}
			for p := uint64(0); p < 404*page; p += page {
				r := tab.rangeAt(p + page/2)
				if want, ok := model[p]; ok != (r != nil) || ok && r.IOVA != want.IOVA {
					t.Fatalf("range %v at %#x, want %v", r, p, want)
				}
			}
		}
	})
}

// One map and one unmap of a guest behind a vIOMMU.
func BenchmarkMapUnmap(b *testing.B) {
	for _, n := range []int{4, 1000, 30000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ranges := make([]Range, n)
			for i := range ranges {
				ranges[i] = Range{IOVA: uint64(i) * 2 * page, Size: page}
			}
			tab := tableOf(ranges)
			b.ReportAllocs()
			for i := range b.N {
				r := Range{IOVA: uint64(i*7919%n)*2*page + page, Size: page}
				t := tab.with(r)
				if _, gone, _ := t.without(r.IOVA, r.end()-1); len(gone) != 1 {
					b.Fatal("not found")
				}
			}
		})
	}
}
