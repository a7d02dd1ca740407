package prp

import (
	"encoding/binary"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// ListPage is memory for a PRP list: Mem as this process sees it, IOVA as the device does. IOVA is qword aligned;
// a list that crosses into a further page is chained there, so Mem may be of several contiguous pages.
type ListPage struct {
	Mem  *shm.Region
	IOVA uint64
}

// Build sets PRP1 and PRP2 of cmd for the length bytes from iova, contiguous in IOVA space. list is
// touched only if they lie in more than two pages, and then belongs to the command until it
// completes. It does not allocate. NVMe Base 2.0c 4.1.1.
func Build(cmd *nvme.Command, iova uint64, length, pageSize uint32, list ListPage) error {
	if fitsOnePage(iova, length, pageSize) {
		cmd.PRP1, cmd.PRP2 = iova, 0
		return nil
	}
	switch {
	case badPageSize(pageSize):
		return ErrPageSize
	case length == 0:
		cmd.PRP1, cmd.PRP2 = 0, 0
		return nil
	case iova&3 != 0:
		return ErrAlign
	case iova+uint64(length)-1 < iova:
		return ErrRange
	}
	next := iova&^uint64(pageSize-1) + uint64(pageSize)
	rest := Pages(iova, length, pageSize) - 1
	if rest == 1 {
		cmd.PRP1, cmd.PRP2 = iova, next
		return nil
	}
	if err := buildList(list, next, rest, uint64(pageSize)); err != nil {
		return err
	}
	cmd.PRP1, cmd.PRP2 = iova, list.IOVA
	return nil
}

// batch is how many entries are gathered on the stack before they are copied to the list.
const batch = 64

// buildList writes the addresses of n consecutive pages from page. At the last slot of a list page, with more than one
// entry still to come, it puts the pointer to the next list page.
func buildList(list ListPage, page, n, pageSize uint64) error {
	if list.Mem == nil {
		return ErrList
	}
	if list.IOVA%EntrySize != 0 {
		return ErrAlign
	}
	var buf [batch * EntrySize]byte
	off, fill := uint64(0), uint64(0)
	for n > 0 {
		at := list.IOVA + off + fill
		entry := page
		if n > 1 && (at+EntrySize)&(pageSize-1) == 0 {
			entry = at + EntrySize
		} else {
			page += pageSize
			n--
		}
		binary.LittleEndian.PutUint64(buf[fill:], entry)
		fill += EntrySize
		if fill == uint64(len(buf)) || n == 0 {
			if err := list.Mem.Write(off, buf[:fill]); err != nil {
				return ErrList
			}
			off, fill = off+fill, 0
		}
	}
	return nil
}
