package shm_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// spans are offset and length pairs against a region of 8192 bytes.
var spans = []struct {
	off, n uint64
	ok     bool
}{
	{0, 0, true},
	{0, 8192, true},
	{8192, 0, true},
	{8191, 1, true},
	{4095, 2, true},
	{0, 8193, false},
	{1, 8192, false},
	{8192, 1, false},
	{8193, 0, false},
	{math.MaxUint64, 0, false},
	{math.MaxUint64, 1, false},
	{math.MaxUint64, 2, false}, // the sum wraps to 1
	{1, math.MaxUint64, false}, // the sum wraps to 0
	{8, math.MaxUint64 - 7, false},
	{math.MaxInt64, 1, false},
	{1 << 63, 1 << 63, false},
	{1 << 32, 1, false},
}

func TestBounds(t *testing.T) {
	notHeldMore(t)
	onEachKind(t, func(t *testing.T, open func(uint64) *shm.Region) {
		r := open(8192)
		if r.Len() != 8192 {
			t.Fatalf("length %d", r.Len())
		}
		for _, s := range spans {
			check := func(what string, err error) {
				t.Helper()
				if s.ok && err != nil || !s.ok && !errors.Is(err, shm.ErrRange) {
					t.Errorf("%s at %#x, +%#x: %v", what, s.off, s.n, err)
				}
			}
			v, err := r.View(s.off, s.n)
			check("View", err)
			if err == nil && v.Len() != s.n {
				t.Errorf("view of %d bytes has %d", s.n, v.Len())
			}
			b, err := r.Bytes(s.off, s.n)
			check("Bytes", err)
			if err == nil && (uint64(len(b)) != s.n || cap(b) != len(b)) {
				t.Errorf("Bytes of %d has length %d and capacity %d", s.n, len(b), cap(b))
			}
			check("Zero", r.Zero(s.off, s.n))
			if s.n <= 1<<20 {
				p := make([]byte, s.n)
				check("Read", r.Read(s.off, p))
				check("Write", r.Write(s.off, p))
			}
		}
	})
}

func TestWords(t *testing.T) {
	onEachKind(t, func(t *testing.T, open func(uint64) *shm.Region) {
		r := open(4096)
		for off := uint64(0); off <= 4100; off++ {
			w, err := r.Word32(off)
			switch {
			case off > 4092:
				if !errors.Is(err, shm.ErrRange) {
					t.Fatalf("Word32 at %d: %v", off, err)
				}
			case off%4 != 0:
				if !errors.Is(err, shm.ErrAlign) {
					t.Fatalf("Word32 at %d: %v", off, err)
				}
			case err != nil:
				t.Fatal(err)
			default:
				w.Store(uint32(off))
			}
			d, err := r.Word64(off)
			switch {
			case off > 4088:
				if !errors.Is(err, shm.ErrRange) {
					t.Fatalf("Word64 at %d: %v", off, err)
				}
			case off%8 != 0:
				if !errors.Is(err, shm.ErrAlign) {
					t.Fatalf("Word64 at %d: %v", off, err)
				}
			case err != nil:
				t.Fatal(err)
			default:
				_ = d.Load()
			}
		}
		for _, off := range []uint64{math.MaxUint64, math.MaxUint64 - 3, math.MaxUint64 - 7, 1 << 63} {
			if _, err := r.Word32(off); !errors.Is(err, shm.ErrRange) {
				t.Errorf("Word32 at %#x: %v", off, err)
			}
			if _, err := r.Word64(off); !errors.Is(err, shm.ErrRange) {
				t.Errorf("Word64 at %#x: %v", off, err)
			}
		}
		for off := uint64(0); off < 4096; off += 4 {
			if w, _ := r.Word32(off); uint64(w.Load()) != off {
				t.Fatalf("the word at %d holds %d", off, w.Load())
			}
		}
	})
}

// Alignment is that of the host address: a view may begin anywhere.
func TestAlignmentOfViews(t *testing.T) {
	onEachKind(t, func(t *testing.T, open func(uint64) *shm.Region) {
		r := open(4096)
		for begin := range uint64(9) {
			v, err := r.View(begin, 64)
			if err != nil {
				t.Fatal(err)
			}
			for off := range uint64(16) {
				_, err := v.Word64(off)
				if aligned := (begin+off)%8 == 0; aligned != (err == nil) || !aligned && !errors.Is(err, shm.ErrAlign) {
					t.Errorf("view at %d, Word64 at %d: %v", begin, off, err)
				}
			}
		}
	})
}

func TestHeapIsPageAligned(t *testing.T) {
	for _, size := range []int{0, 1, 64, 4095, 4096, 4097, 1 << 20} {
		r := shm.NewHeap(size)
		if r.Len() != uint64(size) || size > 0 && uintptr(r.Base())%shm.PageSize != 0 {
			t.Errorf("heap of %d bytes: length %d at %p", size, r.Len(), r.Base())
		}
		if r.FD() != -1 {
			t.Errorf("heap memory has the descriptor %d", r.FD())
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := r.Zero(0, uint64(size)); err != nil {
			t.Errorf("heap memory after Close: %v", err)
		}
	}
}

func TestZeroRegionIsEmpty(t *testing.T) {
	var r shm.Region
	if r.Len() != 0 || r.FD() != -1 || r.Overlaps(&r) {
		t.Errorf("length %d, descriptor %d", r.Len(), r.FD())
	}
	if _, err := r.Word32(0); !errors.Is(err, shm.ErrRange) {
		t.Error(err)
	}
	if err := errors.Join(r.Read(0, nil), r.Write(0, nil), r.Zero(0, 0), r.Close()); err != nil {
		t.Error(err)
	}
}

func TestReadWriteZero(t *testing.T) {
	onEachKind(t, func(t *testing.T, open func(uint64) *shm.Region) {
		r := open(8192)
		model := make([]byte, 8192)
		put := func(off int, p []byte) {
			copy(model[off:], p)
			if err := r.Write(uint64(off), p); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 200 {
			put(i*37, fmt.Appendf(nil, "entry %d", i))
		}
		clear(model[4000:4200])
		if err := r.Zero(4000, 200); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 8192)
		if err := r.Read(0, got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, model) {
			t.Error("memory differs from the model")
		}
		// A refused write changes nothing.
		if err := r.Write(8000, make([]byte, 193)); !errors.Is(err, shm.ErrRange) {
			t.Error(err)
		}
		if b, _ := r.Bytes(0, 8192); !bytes.Equal(b, model) {
			t.Error("a refused write wrote")
		}
	})
}

// A view shares the memory, cannot leave it, and does not own it.
func TestViewLifetime(t *testing.T) {
	onEachKind(t, func(t *testing.T, open func(uint64) *shm.Region) {
		r := open(8192)
		v, err := r.View(4096, 64)
		if err != nil {
			t.Fatal(err)
		}
		if v.FD() != -1 {
			t.Errorf("a view has the descriptor %d", v.FD())
		}
		vv, err := v.View(32, 32)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.View(32, 33); !errors.Is(err, shm.ErrRange) {
			t.Errorf("view past its parent: %v", err)
		}
		if _, err := vv.Word32(32); !errors.Is(err, shm.ErrRange) {
			t.Errorf("word past a view: %v", err)
		}
		for range 2 {
			if err := errors.Join(v.Close(), vv.Close()); err != nil {
				t.Fatal(err)
			}
		}
		if err := vv.Write(0, []byte("shared")); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 6)
		if err := r.Read(4096+32, got); err != nil || string(got) != "shared" {
			t.Errorf("through the parent: %q, %v", got, err)
		}
	})
}

func TestOverlaps(t *testing.T) {
	onEachKind(t, func(t *testing.T, open func(uint64) *shm.Region) {
		r, other := open(8192), open(8192)
		view := func(off, n uint64) *shm.Region {
			v, err := r.View(off, n)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
		for _, c := range []struct {
			a, b *shm.Region
			want bool
		}{
			{r, r, true},
			{r, other, false},
			{r, view(0, 1), true},
			{r, view(8191, 1), true},
			{view(0, 4096), view(4096, 4096), false},
			{view(0, 4097), view(4096, 4096), true},
			{view(0, 16), view(8, 4), true},
			{view(0, 16), view(16, 16), false},
			{view(15, 1), view(0, 16), true},
			{view(4, 0), view(4, 0), false},
			{r, &shm.Region{}, false},
		} {
			if c.a.Overlaps(c.b) != c.want || c.b.Overlaps(c.a) != c.want {
				t.Errorf("%p+%d and %p+%d: overlap should be %v", c.a.Base(), c.a.Len(), c.b.Base(), c.b.Len(), c.want)
			}
		}
	})
}

// R20: words are little-endian and 32 or 64 bits wide, wherever they lie.
func TestRule20_LittleEndianWords(t *testing.T) {
	onEachKind(t, func(t *testing.T, open func(uint64) *shm.Region) {
		r := open(4096)
		w, err := r.Word32(8)
		if err != nil {
			t.Fatal(err)
		}
		w.Store(0x44332211)
		d, err := r.Word64(16)
		if err != nil {
			t.Fatal(err)
		}
		d.Store(0xccbbaa9988776655)
		got := make([]byte, 32)
		if err := r.Read(0, got); err != nil {
			t.Fatal(err)
		}
		want := []byte{8: 0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 31: 0}
		if !bytes.Equal(got, want) {
			t.Errorf("memory % x, want % x", got, want)
		}
		if err := r.Write(8, []byte{0xef, 0xbe, 0xad, 0xde}); err != nil {
			t.Fatal(err)
		}
		if got := w.Load(); got != 0xdeadbeef {
			t.Errorf("the word reads %#x", got)
		}
		// A 32-bit store leaves its neighbours alone.
		if next, _ := r.Word32(12); next.Load() != 0 {
			t.Errorf("the neighbour holds %#x", next.Load())
		}
	})
}

func TestAccessAllocatesNothing(t *testing.T) {
	onEachKind(t, func(t *testing.T, open func(uint64) *shm.Region) {
		r := open(4096)
		p := make([]byte, 64)
		if n := testing.AllocsPerRun(100, func() {
			w, _ := r.Word32(128)
			w.Add(1)
			d, _ := r.Word64(128)
			d.Load()
			_ = r.Read(64, p)
			_ = r.Write(64, p)
			_, _ = r.Bytes(64, 64)
		}); n != 0 {
			t.Errorf("%v allocations", n)
		}
	})
}
