package gmem

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestView(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 8)
	m.mustMap(t, 0x10000, 4*page, 0, dup(t, fd), true)
	m.mustMap(t, 0x14000, 4*page, 4*page, fd, true)
	tab := m.Table()
	for _, c := range []struct {
		iova, n uint64
		ok      bool
	}{
		{0x10000, 4 * page, true}, {0x10000, 0, true}, {0x13fff, 1, true}, {0x14000, 4 * page, true}, {0x12345, 100, true},
		{0x10000, 4*page + 1, true}, {0x13fff, 2, true}, // goes on in the next range, which goes on in the file
		{0xffff, 1, false}, {0x18000, 1, false}, {0x17fff, 2, false},
		{0x10000, 1<<64 - 1, false}, {0x10000, 1<<64 - 0x10000, false}, {1<<64 - 1, 1, false},
	} {
		v, err := tab.View(c.iova, c.n)
		if (err == nil) != c.ok {
			t.Errorf("%#x, +%#x: %v", c.iova, c.n, err)
			continue
		}
		if err != nil || c.n == 0 {
			continue
		}
		if err := v.Write(c.n-1, []byte{0x5a}); err != nil {
			t.Error(err)
		}
		b := []byte{0}
		if !tab.ReadIOVA(c.iova+c.n-1, b) || b[0] != 0x5a || v.Len() != c.n {
			t.Errorf("%#x, +%#x: the view is of other memory", c.iova, c.n)
		}
		if maps := mappings(t); maps != 1 {
			t.Errorf("%#x, +%#x: %d mappings for memory that is contiguous", c.iova, c.n, maps)
		}
	}
}

// Behind a vIOMMU each page of a queue is a mapping of its own, with a descriptor of its own.
func TestViewOfScatteredPages(t *testing.T) {
	m := newMemory(t)
	fd, other := memfd(t, 64), memfd(t, 4)
	defer unix.Close(fd)
	defer unix.Close(other)
	const at = 0xffff_0000_0000
	order := []uint64{17, 3, 4, 5, 60, 0, 59, 18}
	for i, p := range order {
		m.mustMap(t, at+uint64(i)*page, page, p*page, dup(t, fd), true)
	}
	m.mustMap(t, at+uint64(len(order))*page, 2*page, page, dup(t, other), true)
	const n = 9*page + 100
	before := mappings(t)
	v, err := m.Table().View(at, n)
	if err != nil {
		t.Fatal(err)
	}
	if v.Len() != n {
		t.Errorf("%d bytes", v.Len())
	}
	want := append(order[:len(order):len(order)], 1, 2)
	for i, p := range want {
		b := make([]byte, 2)
		if err := v.Read(uint64(i)*page, b); err != nil || uint64(b[0]) != p {
			t.Errorf("page %d of the view is page %d of the file, want %d; %v", i, b[0], p, err)
		}
		// It is the same memory, not a copy: what either side stores the other reads.
		if err := v.Write(uint64(i)*page+8, []byte{0xa0 + byte(i)}); err != nil {
			t.Error(err)
		}
		got := make([]byte, 1)
		if !m.Table().ReadIOVA(at+uint64(i)*page+8, got) || got[0] != 0xa0+byte(i) {
			t.Errorf("page %d: the guest reads %#x", i, got[0])
		}
	}
	if maps := mappings(t); maps != before+7 { // 3, 4, 5 are one piece, and so are the two of the other file
		t.Errorf("%d mappings more", maps-before)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if maps := mappings(t); maps != before {
		t.Errorf("%d mappings left behind", maps-before)
	}
}

// The view is memory of its own: the ranges may be released before it, though nobody does.
func TestRule35_StitchedViewOutlivesTheRanges(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 8)
	defer unix.Close(fd)
	m.mustMap(t, 0, page, 5*page, dup(t, fd), true)
	m.mustMap(t, page, page, 2*page, dup(t, fd), true)
	v, err := m.Table().View(0, 2*page)
	if err != nil {
		t.Fatal(err)
	}
	m.mustUnmap(t, 0, 0)
	b := make([]byte, 2)
	if err := shm.Guard(func() { err = v.Read(page, b) }); err != nil || b[0] != 2 {
		t.Errorf("page %d: %v", b[0], err)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if maps := mappings(t); maps != 0 {
		t.Errorf("%d mappings left", maps)
	}
}

// R36 for stitched memory: the client shrinks its file.
func TestRule36_StitchedViewOfShrunkMemory(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 8)
	defer unix.Close(fd)
	m.mustMap(t, 0, page, 5*page, dup(t, fd), true)
	m.mustMap(t, page, page, 0, dup(t, fd), true)
	v, err := m.Table().View(0, 2*page)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if err := unix.Ftruncate(fd, page); err != nil {
		t.Fatal(err)
	}
	if err := shm.Guard(func() { _ = v.Read(page, make([]byte, 8)) }); err != nil {
		t.Errorf("the page that is left: %v", err)
	}
	if err := shm.Guard(func() { _ = v.Read(0, make([]byte, 8)) }); err == nil {
		t.Error("read of memory that is gone")
	}
}

func TestViewSaysWhatIsMissing(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 4)
	m.mustMap(t, 0, page, 2*page, dup(t, fd), true)
	m.mustMap(t, page, page, 0, dup(t, fd), true)
	m.mustMap(t, 2*page, page, 0, -1, true)
	m.mustMap(t, 4*page, page, page, fd, false)
	tab := m.Table()
	if _, err := tab.View(0, 3*page); !errors.Is(err, ErrNotShared) {
		t.Errorf("memory without a file: %v", err)
	}
	for _, iova := range []uint64{3 * page, 4 * page} {
		if v, err := tab.View(iova, page); err == nil {
			t.Errorf("%#x: a view of %d bytes", iova, v.Len())
		}
	}
	if maps := mappings(t); maps != 2 {
		t.Errorf("%d mappings after views that failed", maps)
	}
}

// Less than a huge page cannot be mapped, and to try would map too much.
func TestViewRefusesScatteredHugePages(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 8)
	m.mustMap(t, 0, page, 4*page, dup(t, fd), true)
	m.mustMap(t, page, page, 2*page, dup(t, fd), true)
	m.mustMap(t, 2*page, page, 3*page, fd, true)
	for _, files := range m.files { // as if it were of huge pages, which not every machine has
		files[0].huge = true
	}
	if v, err := m.Table().View(0, 2*page); !errors.Is(err, ErrHugePages) || v != nil {
		t.Errorf("scattered: %v", err)
	}
	v, err := m.Table().View(page, 2*page)
	if err != nil || v.Len() != 2*page {
		t.Errorf("two ranges that are contiguous in their file: %v", err)
	}
}

// Any pages in any order, against the naive way through ReadIOVA.
func TestViewAgainstNaiveModel(t *testing.T) {
	fd := memfd(t, 32)
	defer unix.Close(fd)
	rapid.Check(t, func(rt *rapid.T) {
		m := New()
		defer m.Close()
		pages := rapid.SliceOfN(rapid.Uint64Range(0, 31), 1, 20).Draw(rt, "file pages")
		hole := rapid.IntRange(-1, 2*len(pages)).Draw(rt, "hole")
		for i, p := range pages {
			if i != hole {
				m.mustMap(t, uint64(i)*page, page, p*page, dup(t, fd), true)
			}
		}
		first := rapid.IntRange(0, len(pages)-1).Draw(rt, "first")
		n := rapid.Uint64Range(1, uint64(len(pages)-first)*page).Draw(rt, "bytes")
		v, err := m.Table().View(uint64(first)*page, n)
		last := first + int((n-1)/page)
		if ok := hole < first || hole > last; ok != (err == nil) {
			rt.Fatalf("pages %d to %d without %d: %v", first, last, hole, err)
		}
		if err != nil {
			return
		}
		for i := first; i <= last; i++ {
			b := []byte{0xff}
			if err := v.Read(uint64(i-first)*page, b); err != nil || uint64(b[0]) != pages[i] {
				rt.Fatalf("page %d of the file in place %d, want %d: %v", b[0], i, pages[i], err)
			}
		}
		if err := v.Close(); err != nil {
			rt.Fatal(err)
		}
	})
}
