package shm

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxStitched is how many parts all stitched regions of this process may have together. The kernel gives a process
// 65530 mappings, and one that has used them up dies of its next allocation.
const MaxStitched = 1 << 15

// ErrTooManyParts says that MaxStitched is reached.
var ErrTooManyParts = errors.New("too many scattered pieces of shared memory are in use")

var stitched atomic.Int64

// Stitch returns a Region in which parts follow one another: the same memory, mapped a second time. Each part is
// (part of) a shared mapping of base pages, begins at a page and, but for the last, ends at one. The parts may be unmapped
// before the Region, which is closed by Close.
//
// mremap with an old size of zero makes the second mapping, so that nobody has to keep the files' descriptors.
func Stitch(parts []*Region) (_ *Region, err error) {
	var size uint64
	for i, p := range parts {
		if uint64(address(p.mem))%PageSize != 0 || p.Len() == 0 || p.Len()%PageSize != 0 && i != len(parts)-1 {
			return nil, fmt.Errorf("part %d of stitched memory, %d bytes: %w", i, p.Len(), ErrAlign)
		}
		size += p.Len()
	}
	if size == 0 {
		return nil, fmt.Errorf("stitched memory of no bytes: %w", ErrRange)
	}
	n := int64(len(parts))
	if stitched.Add(n) > MaxStitched {
		stitched.Add(-n)
		return nil, ErrTooManyParts
	}
	raw, err := unix.Mmap(-1, 0, int(pages(size)), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		stitched.Add(-n)
		return nil, fmt.Errorf("reserving %#x bytes: %w", size, err)
	}
	r := &Region{mem: raw[:size:size], mapping: &mapping{raw: raw, fd: -1, parts: n}}
	at := address(raw)
	for _, p := range parts {
		length := uintptr(pages(p.Len()))
		_, _, e := unix.Syscall6(unix.SYS_MREMAP, uintptr(unsafe.Pointer(unsafe.SliceData(p.mem))), 0, length,
			unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, at, 0)
		if e != 0 {
			return nil, errors.Join(fmt.Errorf("mapping %#x bytes of shared memory again: %w", length, e), r.Close())
		}
		at += length
	}
	return r, nil
}

func pages(n uint64) uint64 { return (n + PageSize - 1) &^ (PageSize - 1) }
