package backend

import (
	"testing"

	"pgregory.net/rapid"
)

// TestAllocated writes, zeroes and deallocates pages, and asks which are allocated: those that were written last. A page that was not touched may be
// allocated by a neighbour in its block of the file system, so pages are 4 KiB apart from each other only where that is one.
func TestAllocated(t *testing.T) {
	for _, f := range flavours {
		t.Run(f.name, func(t *testing.T) {
			const size, page, pages = 4 << 20, 4096, 1024
			b := f.open(t, size, 4096)
			if !b.Info().Maps {
				t.Fatal("this file system does not tell what is allocated: run the tests on ext4, xfs, btrfs or overlayfs")
			}
			m := b.(Mapper)
			q := newQueue(t, b)
			data := pattern(guestMemory(t, 64*page), 5)
			is := func(off, n uint64, want bool) {
				t.Helper()
				for end := off + n; off < end; {
					yes, run, err := m.Allocated(off, end-off)
					if err != nil || run == 0 || run > end-off {
						t.Fatalf("at %#x: run of %d, %v", off, run, err)
					}
					if yes != want {
						t.Fatalf("%#x is allocated: %v, want %v", off, yes, want)
					}
					off += run
				}
			}
			is(0, size, false)
			mustRun(t, q, write(16*page, data), write(size-page, data[:page]))
			is(0, 16*page, false)
			is(16*page, 64*page, true)
			is(80*page, size-81*page, false)
			is(size-page, page, true)
			mustRun(t, q, &Request{Op: OpDiscard, Off: 20 * page, Len: 4 * page})
			is(16*page, 4*page, true)
			is(20*page, 4*page, false)
			is(24*page, 56*page, true)
			// Reading allocates nothing.
			mustRun(t, q, read(20*page, data[:8*page]))
			is(20*page, 4*page, false)
			// Zeroes that are to stay do.
			mustRun(t, q, &Request{Op: OpWriteZeroes, Off: 18 * page, Len: 4 * page, Keep: true})
			is(16*page, 6*page, true)
			is(22*page, 2*page, false)
			mustRun(t, q, &Request{Op: OpWriteZeroes, Off: 30 * page, Len: 2 * page, Dealloc: true})
			is(30*page, 2*page, false)
			// A run ends where what is there changes, and where it was asked to.
			for _, x := range []struct {
				off, n uint64
				yes    bool
				run    uint64
			}{
				{0, size, false, 16 * page}, {page, 3 * page, false, 3 * page}, {16 * page, size, true, 6 * page}, {16 * page, page, true, page},
				{32 * page, size, true, 48 * page}, {80 * page, size - 80*page, false, size - 81*page}, {size - page, page, true, page},
			} {
				if yes, run, err := m.Allocated(x.off, min(x.n, size-x.off)); yes != x.yes || run != x.run || err != nil {
					t.Errorf("from %#x: %v for %#x, %v; want %v for %#x", x.off, yes, run, err, x.yes, x.run)
				}
			}
		})
	}
}

func TestPageSetRunModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const pages = 300
		set := newPageSet(pages << pageShift)
		var model [pages]bool
		for range rapid.IntRange(0, 6).Draw(t, "steps") {
			n := rapid.IntRange(1, pages).Draw(t, "pages")
			first := rapid.IntRange(0, pages-n).Draw(t, "first")
			in := rapid.Bool().Draw(t, "in")
			if in {
				set.set(uint64(first)<<pageShift, uint64(n)<<pageShift)
			} else {
				// A byte less at each end leaves the pages there.
				set.clearWhole(uint64(first)<<pageShift+1, uint64(n)<<pageShift-2)
				first, n = first+1, n-2
			}
			for i := first; i < first+n; i++ {
				model[i] = in
			}
		}
		for off := uint64(0); off < pages<<pageShift; {
			in, run := set.run(off, pages<<pageShift-off)
			for end := off + run; off < end; off += 4096 {
				if model[off>>pageShift] != in {
					t.Fatalf("page %d", off>>pageShift)
				}
			}
			if off < pages<<pageShift && model[off>>pageShift] == in {
				t.Fatalf("a run ends too early at page %d", off>>pageShift)
			}
		}
	})
}

func TestAllocatedBlocks(t *testing.T) {
	m := mapOf{false, false, true, false, false, false, true, true}
	i := Info{LBAShift: 13} // two pages
	for _, x := range []struct {
		first, n uint64
		yes      bool
		run      uint64
	}{{0, 4, false, 1}, {1, 3, true, 1}, {2, 2, false, 1}, {3, 1, true, 1}} {
		if yes, run, err := AllocatedBlocks(m, &i, x.first, x.n); yes != x.yes || run != x.run || err != nil {
			t.Errorf("%d blocks from %d: %v for %d, %v", x.n, x.first, yes, run, err)
		}
	}
	m = mapOf{false, true, false, true}
	for first := range uint64(2) {
		if yes, run, err := AllocatedBlocks(m, &i, first, 2-first); !yes || run != 1 || err != nil {
			t.Errorf("half a block is there, from %d: %v for %d, %v", first, yes, run, err)
		}
	}
}

// mapOf says which pages are allocated.
type mapOf []bool

func (m mapOf) Info() Info               { return Info{} }
func (m mapOf) NewQueue() (Queue, error) { return nil, nil }
func (m mapOf) Close() error             { return nil }

func (m mapOf) Allocated(off, n uint64) (bool, uint64, error) {
	i := off >> pageShift
	for k := i; k < (off+n)>>pageShift; k++ {
		if m[k] != m[i] {
			return m[i], k<<pageShift - off, nil
		}
	}
	return m[i], n, nil
}
