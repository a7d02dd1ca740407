package prp

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

const listBase = 0x7000_0000

// listMemory returns size bytes of list memory at IOVA listBase+off.
func listMemory(off uint64, size int) ListPage {
	return ListPage{Mem: shm.NewHeap(size), IOVA: listBase + off}
}

// ReadIOVA lets a ListPage be walked as the device would.
func (l ListPage) ReadIOVA(iova uint64, dst []byte) bool {
	return iova >= l.IOVA && l.Mem.Read(iova-l.IOVA, dst) == nil
}

func (l ListPage) entries(t testing.TB, n int) []uint64 {
	t.Helper()
	b := make([]byte, n*EntrySize)
	if err := l.Mem.Read(0, b); err != nil {
		t.Fatal(err)
	}
	out := make([]uint64, n)
	for i := range out {
		out[i] = binary.LittleEndian.Uint64(b[i*EntrySize:])
	}
	return out
}

func TestBuild(t *testing.T) {
	tests := []struct {
		name       string
		iova       uint64
		length     uint32
		pageSize   uint32
		prp1, prp2 uint64
		entries    []uint64
		err        error
	}{
		{name: "nothing", iova: 0x1234_5000, length: 0},
		{name: "one sector", iova: 0x1000, length: 512, prp1: 0x1000},
		{name: "one page", iova: 0x1000, length: 4096, prp1: 0x1000},
		{name: "end of a page", iova: 0x1FFC, length: 4, prp1: 0x1FFC},
		{name: "two pages", iova: 0x1000, length: 8192, prp1: 0x1000, prp2: 0x2000},
		{name: "two pages by offset", iova: 0x1FFC, length: 8, prp1: 0x1FFC, prp2: 0x2000},
		{name: "two pages to the last byte", iova: 0x1004, length: 8192 - 4, prp1: 0x1004, prp2: 0x2000},
		{name: "three pages", iova: 0x1000, length: 8193, prp1: 0x1000, prp2: listBase, entries: []uint64{0x2000, 0x3000}},
		{name: "three pages by offset", iova: 0x1800, length: 8192, prp1: 0x1800, prp2: listBase, entries: []uint64{0x2000, 0x3000}},
		{name: "64 KiB pages", iova: 0x1F000, length: 0x21000, pageSize: 65536, prp1: 0x1F000, prp2: listBase, entries: []uint64{0x20000, 0x30000}},
		{name: "top of the address space", iova: 0xFFFF_FFFF_FFFF_E000, length: 8192, prp1: 0xFFFF_FFFF_FFFF_E000, prp2: 0xFFFF_FFFF_FFFF_F000},
		{name: "over the top", iova: 0xFFFF_FFFF_FFFF_E000, length: 8193, err: ErrRange},
		{name: "misaligned", iova: 0x1002, length: 512, err: ErrAlign},
		{name: "page size 0", iova: 0x1000, length: 512, pageSize: 1, err: ErrPageSize},
		{name: "page size 3000", iova: 0x1000, length: 512, pageSize: 3000, err: ErrPageSize},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.pageSize == 0 {
				tt.pageSize = PageSize
			}
			list := listMemory(0, PageSize)
			cmd := nvme.Command{PRP1: 0xDEAD, PRP2: 0xDEAD}
			if err := Build(&cmd, tt.iova, tt.length, tt.pageSize, list); !errors.Is(err, tt.err) {
				t.Fatalf("Build: %v, want %v", err, tt.err)
			}
			if tt.err != nil {
				return
			}
			if cmd.PRP1 != tt.prp1 || cmd.PRP2 != tt.prp2 {
				t.Errorf("PRP1 %#x PRP2 %#x, want %#x %#x", cmd.PRP1, cmd.PRP2, tt.prp1, tt.prp2)
			}
			got := list.entries(t, len(tt.entries)+1)
			if want := append(slices.Clone(tt.entries), 0); !slices.Equal(got, want) {
				t.Errorf("list %#x, want %#x", got, want)
			}
		})
	}
}

func TestBuildListErrors(t *testing.T) {
	const length = 16 * PageSize
	tests := []struct {
		name string
		list ListPage
		err  error
	}{
		{"none", ListPage{}, ErrList},
		{"too small", listMemory(0, 14*EntrySize), ErrList},
		{"misaligned", listMemory(4, PageSize), ErrAlign},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cmd := nvme.Command{PRP1: 1, PRP2: 2}
			if err := Build(&cmd, 0x10000, length, PageSize, tt.list); !errors.Is(err, tt.err) {
				t.Errorf("Build: %v, want %v", err, tt.err)
			}
			if cmd.PRP1 != 1 || cmd.PRP2 != 2 {
				t.Error("a failed Build changed the command")
			}
		})
	}
}

func TestBuildChains(t *testing.T) {
	// Two slots are left in the first list page: one entry, one chain pointer.
	list := listMemory(PageSize-2*EntrySize, 2*PageSize)
	var cmd nvme.Command
	if err := Build(&cmd, 0x10000, 5*PageSize, PageSize, list); err != nil {
		t.Fatal(err)
	}
	want := []uint64{0x11000, listBase + PageSize, 0x12000, 0x13000, 0x14000, 0}
	if got := list.entries(t, len(want)); !slices.Equal(got, want) {
		t.Errorf("list %#x, want %#x", got, want)
	}
}

func TestListBytes(t *testing.T) {
	for _, pages := range []uint32{0, 1, 2, 3, 256, 511, 512, 513, 514, 1022, 1023, 1024, 1025, 1026, 5000} {
		length := pages * PageSize
		n := ListBytes(length, PageSize)
		list := listMemory(0, int(n))
		var cmd nvme.Command
		if err := Build(&cmd, 0x100_0FFC, length, PageSize, list); err != nil {
			t.Errorf("%d pages: %d bytes are too few: %v", pages, n, err)
		}
		if n < EntrySize || pages < 2 {
			continue
		}
		short := listMemory(0, int(n)-EntrySize)
		if err := Build(&cmd, 0x100_0FFC, length, PageSize, short); !errors.Is(err, ErrList) {
			t.Errorf("%d pages: %d bytes would have done (%v)", pages, n-EntrySize, err)
		}
	}
}

// drawLength draws bytes around the page counts at which something changes; a plain range would draw mostly small ones.
func drawLength(t *rapid.T, pageSize uint32) uint32 {
	pages := rapid.SampledFrom([]uint32{0, 1, 2, 3, 17, 256, 510, 511, 512, 513, 1022, 1023, 1024, 1100}).Draw(t, "pages")
	return pages*pageSize + rapid.Uint32Range(0, pageSize-1).Draw(t, "bytes more")
}

// TestWalkOfBuild: what the driver builds, the device finds, and a literal reading of the specification agrees.
func TestWalkOfBuild(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pageSize := uint32(1) << rapid.IntRange(12, 16).Draw(t, "page shift")
		length := drawLength(t, pageSize)
		iova := rapid.Uint64Range(0, 1<<40).Draw(t, "dword") * 4
		slot := rapid.Uint64Range(0, uint64(pageSize)/EntrySize-1).Draw(t, "list slot")

		list := listMemory(slot*EntrySize, int(ListBytes(length, pageSize))+3*EntrySize)
		var cmd nvme.Command
		if err := Build(&cmd, iova, length, pageSize, list); err != nil {
			t.Fatal(err)
		}
		want := []Extent{{iova, length}}
		if length == 0 {
			want = nil
		}
		got, status := Walk(cmd.PRP1, cmd.PRP2, length, pageSize, many, list, nil)
		if !status.OK() || !slices.Equal(got, want) {
			t.Fatalf("Walk = %#x, %v; want %#x", got, status, want)
		}
		if model, status := modelWalk(cmd.PRP1, cmd.PRP2, length, pageSize, list); !status.OK() || !slices.Equal(model, want) {
			t.Fatalf("model = %#x, %v; want %#x", model, status, want)
		}
	})
}

// TestWalkAgainstModel: scattered and partly wrong lists.
func TestWalkAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const pageSize = PageSize
		length := drawLength(t, pageSize)
		pages := rapid.SampledFrom([]uint64{0x10000, 0x11000, 0x12000, 0x20000, 0, 0xFFFF_FFFF_FFFF_F000})
		bad := rapid.SampledFrom([]uint64{0x10008, 0x11800, 0x12001})
		prp := func(name string, badIn int) uint64 {
			if rapid.IntRange(0, badIn).Draw(t, name+" kind") == badIn {
				return bad.Draw(t, name)
			}
			return pages.Draw(t, name)
		}
		seed := rapid.Uint64().Draw(t, "seed")
		rarity := rapid.Uint64Range(1, 5000).Draw(t, "rarity of wrong entries")
		mem := readFunc(func(iova uint64, dst []byte) bool {
			for o := 0; o < len(dst); o += EntrySize {
				slot := iova + uint64(o)
				h := (slot ^ seed) * 0x9E37_79B9_7F4A_7C15
				h ^= h >> 29
				entry := h % 8 << 12
				if h%rarity == 0 {
					entry |= 0x10
				}
				binary.LittleEndian.PutUint64(dst[o:], entry)
			}
			return true
		})
		prp1, prp2 := prp("prp1", 8)|rapid.Uint64Range(0, 1023).Draw(t, "offset")<<2, prp("prp2", 4)
		got, status := Walk(prp1, prp2, length, pageSize, many, mem, nil)
		want, wantStatus := modelWalk(prp1, prp2, length, pageSize, mem)
		if status != wantStatus || !slices.Equal(got, want) {
			t.Fatalf("Walk(%#x, %#x, %d) = %#x, %v; model %#x, %v", prp1, prp2, length, got, status, want, wantStatus)
		}
	})
}
