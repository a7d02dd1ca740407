// Package prp builds and walks the two ways in which an NVMe command says where its data is:
// physical region pages, PRPs, which are lists of memory pages (NVMe Base 2.0c 4.1.1), and scatter gather
// lists, SGLs (4.1.2).
//
// Build and BuildSGL are the driver's half; Build knows only buffers that are contiguous in IOVA
// space. Walk and WalkSGL are the device's: they trust nothing, are bounded before they begin, and read each
// list entry once. None allocates, touches the data, or knows what an IOVA maps to.
package prp

import (
	"errors"
	"math/bits"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// PageSize is the smallest memory page (CC.MPS 0) and the usual one.
const PageSize = 4096

// EntrySize is the size of a PRP in bytes.
const EntrySize = 8

var (
	// ErrAlign says that a buffer does not begin at a multiple of 4, or a list not at one of 8.
	ErrAlign = errors.New("prp: buffer or list is not aligned")
	// ErrRange says that a buffer runs over the end of the address space.
	ErrRange = errors.New("prp: buffer wraps around the address space")
	// ErrList says that there is no list memory, or too little of it.
	ErrList = errors.New("prp: list memory too small")
	// ErrPageSize says that a page size is not a power of two of at least 4096.
	ErrPageSize = errors.New("prp: impossible memory page size")
)

// Extent is a run of IOVA space.
type Extent struct {
	IOVA uint64
	Len  uint32 // bytes
}

// Reader copies len(dst) bytes from an IOVA. It returns false, with dst in any state, unless all of them
// could be read.
type Reader interface {
	ReadIOVA(iova uint64, dst []byte) bool
}

// Pages returns how many memory pages the length bytes from iova touch. pageSize is a power of two.
func Pages(iova uint64, length, pageSize uint32) uint64 {
	last := uint64(pageSize - 1)
	return (iova&last + uint64(length) + last) >> (bits.TrailingZeros32(pageSize) & 31)
}

// ListBytes returns how much list memory, beginning at a page, Build needs at most for any buffer of length
// bytes.
func ListBytes(length, pageSize uint32) uint64 {
	// A buffer that begins 4 bytes before a page touches the most pages; the first is PRP1's.
	entries := Pages(uint64(pageSize)-4, length, pageSize) - 1
	perPage := uint64(pageSize) / EntrySize
	if entries <= perPage {
		return entries * EntrySize
	}
	// All pages but the last give one entry to the chain.
	chained := (entries - 2) / (perPage - 1)
	return (entries + chained) * EntrySize
}

func badPageSize(pageSize uint32) bool {
	return pageSize < PageSize || pageSize&(pageSize-1) != 0
}

// Walk appends to out where the length bytes of a command's data are, adjacent pages put together, and
// returns it; on any status but success out comes back as it was. It allocates only when out is too small.
//
// maxPages bounds the pages that the transfer may touch, and so the list entries that are
// read; a transfer of more fails with Invalid Field in Command before any is. A misaligned
// PRP gives PRP Offset Invalid, a list that mem cannot read gives Data Transfer Error. The
// caller adds DNR. The extents themselves are not checked against mem.
//
// NVMe Base 2.0c 4.1.1: PRP1 is dword aligned, a list pointer in PRP2 qword aligned, every other entry
// and every later list page aligned; PRP2 is not looked at when PRP1 covers all.
func Walk(prp1, prp2 uint64, length, pageSize uint32, maxPages int, mem Reader, out []Extent) ([]Extent, nvme.Status) {
	if fitsOnePage(prp1, length, pageSize) && maxPages > 0 {
		return append(out, Extent{prp1, length}), nvme.StatusSuccess
	}
	return walkPages(nil, prp1, prp2, length, pageSize, maxPages, mem, out)
}

// fitsOnePage says that PRP1 is all there is, and is well formed.
func fitsOnePage(prp1 uint64, length, pageSize uint32) bool {
	return prp1&3 == 0 && length != 0 && !badPageSize(pageSize) && uint64(length) <= uint64(pageSize)-prp1&uint64(pageSize-1)
}
