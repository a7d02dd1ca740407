package prp

import (
	"encoding/binary"
	"math/bits"
	"sync"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// chunk is how many list entries are read from the peer at a time.
const chunk = 512

// Walker is Walk with list memory of its own, for a thread that walks many. It is not safe for concurrent use.
type Walker struct {
	buf [chunk * EntrySize]byte
}

// walkers serves Walk: the buffer passes through an interface and so cannot be on the stack.
var walkers = sync.Pool{New: func() any { return new(Walker) }}

// Walk is the function Walk.
func (w *Walker) Walk(prp1, prp2 uint64, length, pageSize uint32, maxPages int, mem Reader, out []Extent) ([]Extent, nvme.Status) {
	if fitsOnePage(prp1, length, pageSize) && maxPages > 0 {
		return append(out, Extent{prp1, length}), nvme.StatusSuccess
	}
	return walkPages(w, prp1, prp2, length, pageSize, maxPages, mem, out)
}

// walkPages does the transfers that are not one well-formed page. A nil w is taken from the
// pool if there is a list.
func walkPages(w *Walker, prp1, prp2 uint64, length, pageSize uint32, maxPages int, mem Reader, out []Extent) ([]Extent, nvme.Status) {
	switch {
	case badPageSize(pageSize):
		return out, nvme.StatusInternalError
	case length == 0:
		return out, nvme.StatusSuccess
	case maxPages < 0 || Pages(prp1, length, pageSize) > uint64(maxPages):
		return out, nvme.StatusInvalidField
	case prp1&3 != 0:
		return out, nvme.StatusPRPOffsetInvalid
	}
	ps := uint64(pageSize)
	first := ps - prp1&(ps-1)
	rest := uint64(length) - first
	switch {
	case rest > ps:
		return walkList(w, prp1, prp2, length, pageSize, mem, out)
	case prp2&(ps-1) != 0:
		return out, nvme.StatusPRPOffsetInvalid
	case prp1+first == prp2 && prp2 != 0:
		return append(out, Extent{prp1, length}), nvme.StatusSuccess
	}
	return append(out, Extent{prp1, uint32(first)}, Extent{prp2, uint32(rest)}), nvme.StatusSuccess
}

func walkList(w *Walker, prp1, prp2 uint64, length, pageSize uint32, mem Reader, out []Extent) ([]Extent, nvme.Status) {
	if w == nil {
		w = walkers.Get().(*Walker)
		defer walkers.Put(w)
	}
	ps := uint64(pageSize)
	first := ps - prp1&(ps-1)
	c := collector{out: append(out, Extent{prp1, uint32(first)}), rest: uint64(length) - first, pageSize: ps}
	if status := w.list(&c, prp2, mem); status != nvme.StatusSuccess {
		return out, status
	}
	return c.out, nvme.StatusSuccess
}

// list follows the list at iova, and those chained to it, until c has all. Each list page but the first
// gives at least one page of data for each entry but one, so the pages left bound the loop.
func (w *Walker) list(c *collector, iova uint64, mem Reader) nvme.Status {
	if iova&(EntrySize-1) != 0 {
		return nvme.StatusPRPOffsetInvalid
	}
	for {
		want := c.pages()
		slots := (c.pageSize - iova&(c.pageSize-1)) / EntrySize
		chained := want > slots
		data := want
		if chained {
			data = slots - 1
		}
		if status := w.listPage(c, iova, data, mem); status != nvme.StatusSuccess {
			return status
		}
		if !chained {
			return nvme.StatusSuccess
		}
		pointer := w.buf[:EntrySize]
		if !mem.ReadIOVA(iova+data*EntrySize, pointer) {
			return nvme.StatusDataTransferError
		}
		iova = binary.LittleEndian.Uint64(pointer)
		if iova&(c.pageSize-1) != 0 {
			return nvme.StatusPRPOffsetInvalid
		}
	}
}

// listPage takes n data entries from iova; all lie in one list page.
func (w *Walker) listPage(c *collector, iova, n uint64, mem Reader) nvme.Status {
	for n > 0 {
		entries := w.buf[:min(n, chunk)*EntrySize]
		if !mem.ReadIOVA(iova, entries) {
			return nvme.StatusDataTransferError
		}
		iova += uint64(len(entries))
		n -= uint64(len(entries)) / EntrySize
		for ; len(entries) > 0; entries = entries[EntrySize:] {
			page := binary.LittleEndian.Uint64(entries)
			if page&(c.pageSize-1) != 0 {
				return nvme.StatusPRPOffsetInvalid
			}
			c.page(page)
		}
	}
	return nvme.StatusSuccess
}

// collector gathers pages into extents; out ends with the extent of PRP1 at least.
type collector struct {
	out      []Extent
	rest     uint64 // bytes still to be placed
	pageSize uint64
}

// pages is how many pages are still to come.
func (c *collector) pages() uint64 {
	return (c.rest + c.pageSize - 1) >> (bits.TrailingZeros64(c.pageSize) & 63)
}

// page adds the next page of the transfer, or the part of it that is still needed.
func (c *collector) page(iova uint64) {
	n := min(c.rest, c.pageSize)
	c.rest -= n
	last := &c.out[len(c.out)-1]
	// The page after the top of the address space is page 0, which is no neighbour.
	if iova != 0 && last.IOVA+uint64(last.Len) == iova {
		last.Len += uint32(n)
		return
	}
	c.out = append(c.out, Extent{iova, uint32(n)})
}
