package gmem

import (
	"errors"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// What View cannot do anything about; each names what the user has to change.
var (
	// ErrNotShared is guest memory that came without a file descriptor.
	ErrNotShared = errors.New("guest memory came without a file descriptor; give QEMU -object memory-backend-memfd,id=mem,size=SIZE,share=on and -machine memory-backend=mem")
	// ErrHugePages is a queue scattered over huge pages, of which less than a whole one cannot be mapped.
	ErrHugePages = errors.New("a queue scattered over huge pages, as behind a vIOMMU, cannot be mapped; give the guest's memory backend no hugetlb=on")
)

// View returns the writable guest memory [iova, iova+n) as one Region, which the caller closes before the ranges in it
// are released. Where it is scattered over several mappings, which begin and end at pages, the pages are mapped once
// more, one after the other, and what uses them need not know.
func (t *Table) View(iova, n uint64) (*shm.Region, error) {
	parts, err := t.parts(iova, n)
	if err != nil {
		return nil, err
	}
	if len(parts) == 1 {
		return parts[0].mem, nil
	}
	regions := make([]*shm.Region, len(parts))
	for i, p := range parts {
		if p.huge {
			return nil, fmt.Errorf("guest memory at %#x: %w", iova, ErrHugePages)
		}
		regions[i] = p.mem
	}
	r, err := shm.Stitch(regions)
	if err != nil {
		return nil, fmt.Errorf("guest memory at %#x, +%#x: %w", iova, n, err)
	}
	return r, nil
}

// part is a piece of guest memory that is contiguous in host memory.
type part struct {
	mem  *shm.Region
	huge bool
}

// parts returns the pieces of [iova, iova+n), of which there is at least one; ranges that touch in their file are one
// piece.
func (t *Table) parts(iova, n uint64) (parts []part, err error) {
	var last *Range     // of the piece that is being put together
	var begin, k uint64 // where it begins in last's file, and its length
	for at, left := iova, n; ; {
		r, err := t.writable(at)
		if err != nil {
			return nil, err
		}
		step := min(left, r.end()-at)
		off := at - r.IOVA
		if last != nil && r.file != nil && r.file == last.file && r.off+off == begin+k {
			k += step
			if parts[len(parts)-1].mem, err = r.file.mem.View(begin, k); err != nil {
				return nil, err
			}
		} else {
			mem, err := r.Mem.View(off, step)
			if err != nil {
				return nil, err
			}
			parts = append(parts, part{mem, r.file != nil && r.file.huge})
			begin, k = r.off+off, step
		}
		last = r
		at += step
		if left -= step; left == 0 {
			return parts, nil
		}
	}
}

// writable returns the range that holds iova, if the device can write there.
func (t *Table) writable(iova uint64) (*Range, error) {
	switch r := t.rangeAt(iova); {
	case r == nil:
		return nil, fmt.Errorf("guest address %#x is not mapped", iova)
	case r.Mem == nil:
		return nil, fmt.Errorf("guest address %#x: %w", iova, ErrNotShared)
	case !r.Writable:
		return nil, fmt.Errorf("guest memory at %#x is read-only", iova)
	default:
		return r, nil
	}
}
