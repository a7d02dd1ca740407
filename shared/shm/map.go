package shm

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// mapping owns what a Region has to give back.
type mapping struct {
	once  sync.Once
	raw   []byte // as mmap returned it
	fd    int    // -1: none, or not ours
	parts int64  // of a stitched region
	err   error
}

// Map maps size bytes of fd from byte offset off, shared, for reading and, if
// writable, writing. off need not be aligned: the mapping begins at the page, or at the
// file system's block for huge pages, before it. The fd stays the caller's.
//
// A file shorter than off+size is refused: touching what lies beyond would fault.
func Map(fd int, off int64, size uint64, writable bool) (*Region, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat of shared memory: %w", err)
	}
	if size == 0 || off < 0 || int64(size) < 0 || off+int64(size) < 0 {
		return nil, fmt.Errorf("shared memory range offset %#x size %#x: %w", off, size, ErrRange)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG && off+int64(size) > st.Size {
		return nil, fmt.Errorf("shared memory range [%#x, +%#x) of a file of %#x bytes: %w", off, size, st.Size, ErrRange)
	}
	align := int64(PageSize)
	if int64(st.Blksize) > align && isHugetlb(fd) {
		align = int64(st.Blksize)
	}
	begin := off &^ (align - 1)
	length := (off + int64(size) - begin + align - 1) &^ (align - 1)
	prot := unix.PROT_READ
	if writable {
		prot |= unix.PROT_WRITE
	}
	raw, err := unix.Mmap(fd, begin, int(length), prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap of %#x bytes of shared memory: %w", length, err)
	}
	skip := off - begin
	return &Region{
		mem:     raw[skip : skip+int64(size) : skip+int64(size)],
		mapping: &mapping{raw: raw, fd: -1},
	}, nil
}

func isHugetlb(fd int) bool {
	var fs unix.Statfs_t
	return unix.Fstatfs(fd, &fs) == nil && fs.Type == unix.HUGETLBFS_MAGIC
}

// NewMemfd returns size bytes, rounded up to pages, of zeroed memory in a memfd that can be passed to a
// peer. It is sealed against shrinking and growing, so that neither side can take
// it from the other (R36).
func NewMemfd(name string, size uint64) (*Region, error) { return newMemfd(name, size, 0) }

// NewMemfdForReaders is NewMemfd for memory that a peer may read: only this process's mapping, which exists already, can be written through.
func NewMemfdForReaders(name string, size uint64) (*Region, error) {
	return newMemfd(name, size, unix.F_SEAL_FUTURE_WRITE)
}

// newMemfd adds the seals in more once the memory is mapped.
func newMemfd(name string, size uint64, more int) (*Region, error) {
	size = (size + PageSize - 1) &^ (PageSize - 1)
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd_create %q: %w", name, err)
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("memfd %q of %#x bytes: %w", name, size, err)
	}
	r, err := Map(fd, 0, size, true)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	r.mapping.fd = fd
	seals := unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL | more
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return nil, errors.Join(fmt.Errorf("sealing memfd %q: %w", name, err), r.Close())
	}
	return r, nil
}

// FD returns the region's own memfd, or -1. It stays the region's.
func (r *Region) FD() int {
	if r.mapping == nil {
		return -1
	}
	return r.mapping.fd
}

// CanShrink reports whether the memory behind fd can be taken away by whoever holds it: true
// unless it carries F_SEAL_SHRINK or cannot be truncated at all.
func CanShrink(fd int) bool {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	return err != nil || seals&unix.F_SEAL_SHRINK == 0
}

// Close unmaps the region and closes its memfd. On a view and on heap memory it
// does nothing. It may be called more than once.
func (r *Region) Close() error {
	m := r.mapping
	if m == nil {
		return nil
	}
	m.once.Do(func() {
		m.err = unix.Munmap(m.raw)
		stitched.Add(-m.parts)
		if m.fd >= 0 {
			m.err = errors.Join(m.err, unix.Close(m.fd))
		}
	})
	return m.err
}
