package prp

import (
	"slices"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

const many = 1 << 20

func TestWalk(t *testing.T) {
	const list = 0x80000
	// A list whose first page has room for two slots only, so that the second is a chain pointer.
	const nearEnd = list + PageSize - 2*EntrySize
	const lastSlot = list + PageSize - EntrySize
	tests := []struct {
		name       string
		prp1, prp2 uint64
		length     uint32
		pageSize   uint32
		maxPages   int
		mem        *sparse
		want       []Extent
		status     nvme.Status
	}{
		{name: "nothing", prp1: 3, prp2: 5, length: 0},
		{name: "one byte", prp1: 0x1000, length: 1, want: []Extent{{0x1000, 1}}},
		{name: "one page", prp1: 0x1000, length: 4096, want: []Extent{{0x1000, 4096}}},
		{name: "one page ignores PRP2", prp1: 0x1000, prp2: 0x123, length: 4096, want: []Extent{{0x1000, 4096}}},
		{name: "to the end of the page", prp1: 0x1FFC, length: 4, want: []Extent{{0x1FFC, 4}}},
		{name: "one page, misaligned", prp1: 0x1002, length: 512, status: nvme.StatusPRPOffsetInvalid},
		{name: "one page, odd", prp1: 0x1001, length: 1, status: nvme.StatusPRPOffsetInvalid},
		{name: "top of the address space", prp1: 0xFFFF_FFFF_FFFF_F000, length: 4096, want: []Extent{{0xFFFF_FFFF_FFFF_F000, 4096}}},

		{name: "two pages apart", prp1: 0x1000, prp2: 0x9000, length: 8192, want: []Extent{{0x1000, 4096}, {0x9000, 4096}}},
		{name: "two pages together", prp1: 0x1000, prp2: 0x2000, length: 8192, want: []Extent{{0x1000, 8192}}},
		{name: "two pages, offset", prp1: 0x1E00, prp2: 0x9000, length: 4096, want: []Extent{{0x1E00, 512}, {0x9000, 3584}}},
		{name: "two pages, one byte over", prp1: 0x1FFC, prp2: 0x9000, length: 5, want: []Extent{{0x1FFC, 4}, {0x9000, 1}}},
		{name: "two pages the wrong way round", prp1: 0x2000, prp2: 0x1000, length: 8192, want: []Extent{{0x2000, 4096}, {0x1000, 4096}}},
		{name: "two pages, the same", prp1: 0x1000, prp2: 0x1000, length: 8192, want: []Extent{{0x1000, 4096}, {0x1000, 4096}}},
		{name: "PRP2 as a page has an offset", prp1: 0x1000, prp2: 0x9008, length: 8192, status: nvme.StatusPRPOffsetInvalid},
		{name: "PRP1 misaligned, two pages", prp1: 0x1002, prp2: 0x9000, length: 8192 - 2, status: nvme.StatusPRPOffsetInvalid},
		{name: "around the top of the address space", prp1: 0xFFFF_FFFF_FFFF_F000, prp2: 0, length: 8192, want: []Extent{{0xFFFF_FFFF_FFFF_F000, 4096}, {0, 4096}}},

		{name: "three pages", prp1: 0x1000, prp2: list, length: 3 * 4096, mem: at(list, 0x5000, 0x9000), want: []Extent{{0x1000, 4096}, {0x5000, 4096}, {0x9000, 4096}}},
		{name: "three pages together", prp1: 0x1010, prp2: list, length: 3*4096 - 16, mem: at(list, 0x2000, 0x3000), want: []Extent{{0x1010, 3*4096 - 16}}},
		{name: "list with an offset", prp1: 0x1000, prp2: list + 24, length: 3 * 4096, mem: at(list+24, 0x5000, 0x9000), want: []Extent{{0x1000, 4096}, {0x5000, 4096}, {0x9000, 4096}}},
		{name: "last page in part", prp1: 0x1800, prp2: list, length: 3 * 4096, mem: at(list, 0x5000, 0x6000, 0x9000), want: []Extent{{0x1800, 2048}, {0x5000, 8192}, {0x9000, 2048}}},
		{name: "a list around the top of the address space", prp1: 0x1000, prp2: list, length: 3 * 4096, mem: at(list, 0xFFFF_FFFF_FFFF_F000, 0), want: []Extent{{0x1000, 4096}, {0xFFFF_FFFF_FFFF_F000, 4096}, {0, 4096}}},
		{name: "list pointer misaligned", prp1: 0x1000, prp2: list + 4, length: 3 * 4096, mem: at(list, 0x5000, 0x9000), status: nvme.StatusPRPOffsetInvalid},
		{name: "first entry has an offset", prp1: 0x1000, prp2: list, length: 3 * 4096, mem: at(list, 0x5004, 0x9000), status: nvme.StatusPRPOffsetInvalid},
		{name: "last entry has an offset", prp1: 0x1000, prp2: list, length: 3 * 4096, mem: at(list, 0x5000, 0x9800), status: nvme.StatusPRPOffsetInvalid},
		{name: "list unreadable", prp1: 0x1000, prp2: list, length: 3 * 4096, mem: at(0), status: nvme.StatusDataTransferError},
		{name: "list half readable", prp1: 0x1000, prp2: list, length: 3 * 4096, mem: at(list, 0x5000), status: nvme.StatusDataTransferError},

		{name: "the last slot of a page is data when it ends the list", prp1: 0x1000, prp2: nearEnd, length: 3 * 4096,
			mem: at(nearEnd, 0x5000, 0x9000), want: []Extent{{0x1000, 4096}, {0x5000, 4096}, {0x9000, 4096}}},
		{name: "the last slot of a page is a chain otherwise", prp1: 0x1000, prp2: nearEnd, length: 4 * 4096,
			mem: at(nearEnd, 0x5000, 0x40000).put(0x40000, 0x9000, 0xB000), want: []Extent{{0x1000, 4096}, {0x5000, 4096}, {0x9000, 4096}, {0xB000, 4096}}},
		{name: "the first slot is already a chain", prp1: 0x1000, prp2: lastSlot, length: 3 * 4096,
			mem: at(lastSlot, 0x40000).put(0x40000, 0x5000, 0x9000), want: []Extent{{0x1000, 4096}, {0x5000, 4096}, {0x9000, 4096}}},
		{name: "chain pointer with an offset", prp1: 0x1000, prp2: lastSlot, length: 3 * 4096,
			mem: at(lastSlot, 0x40008).put(0x40008, 0x5000, 0x9000), status: nvme.StatusPRPOffsetInvalid},
		{name: "chain pointer unreadable", prp1: 0x1000, prp2: nearEnd, length: 4 * 4096, mem: at(nearEnd, 0x5000), status: nvme.StatusDataTransferError},
		{name: "chained list unreadable", prp1: 0x1000, prp2: nearEnd, length: 4 * 4096, mem: at(nearEnd, 0x5000, 0x40000), status: nvme.StatusDataTransferError},
		{name: "chain onto itself ends by length", prp1: 0x1000, prp2: lastSlot, length: 3 * 4096,
			mem: at(lastSlot, list).put(list, 0x5000, 0x9000), want: []Extent{{0x1000, 4096}, {0x5000, 4096}, {0x9000, 4096}}},

		{name: "64 KiB pages", prp1: 0x1F000, prp2: 0x30000, length: 0x2000, pageSize: 65536, want: []Extent{{0x1F000, 0x1000}, {0x30000, 0x1000}}},
		{name: "64 KiB pages, 4 KiB aligned PRP2", prp1: 0x1F000, prp2: 0x31000, length: 0x2000, pageSize: 65536, status: nvme.StatusPRPOffsetInvalid},
		{name: "page size not a power of two", prp1: 0x1000, length: 512, pageSize: 5000, status: nvme.StatusInternalError},
		{name: "page size too small", prp1: 0x1000, length: 512, pageSize: 2048, status: nvme.StatusInternalError},

		{name: "at the limit", prp1: 0x1800, prp2: 0x9000, length: 4096, maxPages: 2, want: []Extent{{0x1800, 2048}, {0x9000, 2048}}},
		{name: "over the limit by its offset", prp1: 0x1800, prp2: list, length: 8192, maxPages: 2, mem: at(list, 0x5000, 0x9000), status: nvme.StatusInvalidField},
		{name: "far over the limit", prp1: 0x1000, prp2: list, length: 0xFFFFFFFF, maxPages: 256, mem: at(list), status: nvme.StatusInvalidField},
		{name: "no page allowed", prp1: 0x1000, length: 512, maxPages: -1, status: nvme.StatusInvalidField},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.pageSize == 0 {
				tt.pageSize = PageSize
			}
			if tt.maxPages == 0 {
				tt.maxPages = many
			}
			if tt.mem == nil {
				tt.mem = at(0)
			}
			before := []Extent{{0x7000, 7}} // it ends nowhere near anything: must stay as it is
			want := append(slices.Clone(before), tt.want...)
			got, status := Walk(tt.prp1, tt.prp2, tt.length, tt.pageSize, tt.maxPages, tt.mem, before)
			if status != tt.status || !slices.Equal(got, want) {
				t.Errorf("Walk = %#x, %v; want %#x, %v", got, status, want, tt.status)
			}
			if status == nvme.StatusInvalidField && tt.mem.reads != 0 {
				t.Errorf("%d list reads in a transfer that is over the limit", tt.mem.reads)
			}
			var w Walker
			if got, status := w.Walk(tt.prp1, tt.prp2, tt.length, tt.pageSize, tt.maxPages, tt.mem, before); status != tt.status || !slices.Equal(got, want) {
				t.Errorf("Walker.Walk = %#x, %v; want %#x, %v", got, status, want, tt.status)
			}
		})
	}
}

// The first extent of a walk is never joined to what the caller already had.
func TestWalkKeepsWhatWasThere(t *testing.T) {
	got, _ := Walk(0x2000, 0x3000, 8192, PageSize, many, &noMemory{}, []Extent{{0x1000, 4096}})
	if want := []Extent{{0x1000, 4096}, {0x2000, 8192}}; !slices.Equal(got, want) {
		t.Errorf("got %#x, want %#x", got, want)
	}
}

// TestRule31_ListReadOnce: each entry is copied once, so that what was checked is what is used.
func TestRule31_ListReadOnce(t *testing.T) {
	const list, next, pages = 0x80000, 0x90000, 1200
	seen := map[uint64]int{}
	mem := readFunc(func(iova uint64, dst []byte) bool {
		for i := range dst {
			dst[i] = 0
		}
		for o := uint64(0); o < uint64(len(dst)); o += EntrySize {
			seen[iova+o]++
			switch slot := iova + o; {
			case slot == list+PageSize-EntrySize:
				dst[o+2] = next >> 16
			case slot == next+PageSize-EntrySize:
				dst[o+2] = (next + 0x10000) >> 16
			}
		}
		return true
	})
	out, status := Walk(0x1000, list, pages*PageSize, PageSize, pages, mem, nil)
	if !status.OK() || len(out) != pages {
		t.Fatalf("Walk = %d extents, %v", len(out), status)
	}
	if want := pages - 1 + 2; len(seen) != want {
		t.Errorf("%d slots read, want %d", len(seen), want)
	}
	for slot, n := range seen {
		if n != 1 {
			t.Errorf("slot %#x read %d times", slot, n)
		}
	}
}

// TestRule30_WalkIsBounded: a reader that chains for ever cannot make a walk longer than its length.
func TestRule30_WalkIsBounded(t *testing.T) {
	reads := 0
	mem := readFunc(func(_ uint64, dst []byte) bool {
		reads++
		clear(dst)
		return true
	})
	const pages = 4096
	if _, status := Walk(0, PageSize-EntrySize, pages*PageSize, PageSize, pages, mem, nil); !status.OK() {
		t.Fatal(status)
	}
	if limit := 2*pages/511 + 4; reads > limit {
		t.Errorf("%d reads for %d pages, want at most %d", reads, pages, limit)
	}
}

type readFunc func(iova uint64, dst []byte) bool

func (f readFunc) ReadIOVA(iova uint64, dst []byte) bool { return f(iova, dst) }
