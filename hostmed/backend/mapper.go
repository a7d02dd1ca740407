package backend

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Mapper is a Backend that knows which of its blocks are allocated: those that were written and not deallocated since. It counts in
// pages or in blocks of the file system, so that one which was never written can be allocated by its neighbour.
type Mapper interface {
	Backend
	// Allocated says whether the block at byte off is, and for how many bytes from there on, at most n, that is so. n is not 0 and the range
	// lies in the medium. Any goroutine may call it; it may wait for metadata of the medium.
	Allocated(off, n uint64) (allocated bool, run uint64, err error)
}

var (
	_ Mapper = (*mem)(nil)
	_ Mapper = (*file)(nil)
)

// AllocatedBlocks is m.Allocated in blocks of i, m's Info: one is allocated if any part of it is.
func AllocatedBlocks(m Mapper, i *Info, first, n uint64) (allocated bool, run uint64, err error) {
	yes, bytes, err := m.Allocated(first<<i.LBAShift, n<<i.LBAShift)
	switch whole := bytes >> i.LBAShift; {
	case err != nil:
		return false, 0, err
	case !yes && whole > 0:
		return false, whole, nil
	}
	return true, min(max((bytes+i.LBASize()-1)>>i.LBAShift, 1), n), nil
}

func (b *mem) Allocated(off, n uint64) (bool, uint64, error) {
	in, run := b.written.run(off, n)
	return in, run, nil
}

// Allocated asks the file system. What was preallocated and never written is a hole.
func (b *file) Allocated(off, n uint64) (bool, uint64, error) {
	at, err := unix.Seek(b.fd, int64(off), unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data up to the end
		return false, n, nil
	case err != nil:
		return false, 0, err
	case uint64(at) > off:
		return false, min(uint64(at)-off, n), nil
	}
	at, err = unix.Seek(b.fd, int64(off), unix.SEEK_HOLE)
	if err != nil {
		return false, 0, err
	}
	// A hole may have been made between the two.
	return true, min(max(uint64(at), off+b.info.LBASize())-off, n), nil
}
