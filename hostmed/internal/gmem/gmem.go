// Package gmem is one guest's memory: the table from I/O virtual addresses (IOVA) to
// host memory that a vfio-user client builds with DMA_MAP and DMA_UNMAP.
//
// Readers take a [Table], a snapshot, and look up in it without a lock. Map and Unmap
// make a new one. What Unmap took out stays mapped in this process until Release, which the
// caller calls when no worker and no request can use an older table any more (R35).
//
// Each file is mapped once, whole, however many ranges of it the client
// names: QEMU's ranges of huge-page memory begin where mmap would refuse, and a
// vIOMMU makes thousands of small ones. Of a file that is larger than MaxWhole only what a
// range needs is mapped: a sparse file costs a hostile client nothing, and the
// addresses of this process are all clients' in common.
package gmem

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// MaxMaps is how many ranges a client may have mapped at once: what VERSION announces as max_dma_maps.
const MaxMaps = 65535

const (
	// MaxWhole is the largest file in bytes that is mapped whole.
	MaxWhole = 1 << 40
	// MaxMapped is how many bytes of address space one client's files may take.
	MaxMapped = 4 << 40
)

var (
	// ErrOverlap is a DMA_MAP of addresses that are mapped already.
	ErrOverlap = fmt.Errorf("range overlaps one that is mapped: %w", unix.EEXIST)
	// ErrTooMuch is a DMA_MAP beyond MaxMapped.
	ErrTooMuch = fmt.Errorf("more than %d TiB of files mapped: %w", MaxMapped>>40, unix.ENOMEM)
	// ErrNotMemory is a DMA_MAP of a file that is not memory: a page fault on a network's or a user's file system may
	// last for ever, and with it a worker.
	ErrNotMemory = fmt.Errorf("guest memory must be a memfd or a file on tmpfs or hugetlbfs; give QEMU -object memory-backend-memfd, or a mem-path below /dev/shm or /dev/hugepages: %w", unix.EINVAL)
	// ErrTooMany is a DMA_MAP beyond MaxMaps.
	ErrTooMany = fmt.Errorf("more than %d ranges mapped: %w", MaxMaps, unix.ENOSPC)
)

// file is one mapping of a file, shared by all ranges in it.
type file struct {
	key   fileKey
	begin uint64 // offset in the file
	mem   *shm.Region
	huge  bool // of huge pages
	refs  int
	fd    int // -1: not kept, see handover.go
}

func (f *file) holds(offset, size uint64) bool {
	return offset >= f.begin && offset+size-f.begin <= f.mem.Len()
}

type fileKey struct {
	dev, ino uint64
	writable bool
}

// Range is one mapped range of IOVAs.
type Range struct {
	IOVA, Size uint64
	Writable   bool
	// Mem is nil when the client gave no file for the range: its memory
	// cannot be reached from here.
	Mem *shm.Region

	mem  []byte // of Mem, for the hot path
	file *file
	off  uint64 // where Mem begins in file.mem
}

func (r *Range) end() uint64 { return r.IOVA + r.Size } // never wraps: Map refuses

// Memory is one client's table and the files behind it.
type Memory struct {
	// Opened and Closing, if set, are told of each file's memory after it was mapped and before
	// it is unmapped. They are called with mu held.
	Opened, Closing func(mem []byte)

	mu     sync.Mutex          // guards files and orders writers of table
	files  map[fileKey][]*file // more than one if it grew, or is larger than MaxWhole
	mapped uint64              // bytes of all files
	kept   int                 // descriptors
	table  atomic.Pointer[Table]
}

// New returns an empty Memory.
func New() *Memory {
	m := &Memory{files: map[fileKey][]*file{}}
	m.table.Store(&Table{})
	return m
}

// Table returns the current snapshot.
func (m *Memory) Table() *Table { return m.table.Load() }

// Map adds [iova, iova+size), which is [offset, offset+size) of the file fd, or no
// reachable memory if fd is -1. It takes fd over and closes it.
func (m *Memory) Map(iova, size, offset uint64, fd int, writable bool) error {
	if fd >= 0 {
		defer unix.Close(fd)
	}
	if size == 0 || iova+size < iova || iova+size == 0 || offset+size < offset || int64(offset+size) < 0 {
		return fmt.Errorf("DMA range %#x, +%#x at offset %#x: %w", iova, size, offset, unix.EINVAL)
	}
	if (iova|size|offset)%shm.PageSize != 0 {
		return fmt.Errorf("DMA range %#x, +%#x at offset %#x is not page aligned: %w", iova, size, offset, unix.EINVAL)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	r := Range{IOVA: iova, Size: size, Writable: writable}
	if err := m.fits(r); err != nil {
		return err
	}
	if fd >= 0 {
		f, err := m.open(fd, offset, size, writable)
		if err != nil {
			return err
		}
		r.file, r.off = f, offset-f.begin
		if r.Mem, err = f.mem.View(r.off, size); err != nil {
			return errors.Join(err, m.put(f))
		}
	}
	return m.insert(r)
}

// MapRegion adds memory of this process: a driver's that lives in it, or a test's. It stays the
// caller's, and must outlive the range.
func (m *Memory) MapRegion(iova uint64, mem *shm.Region, writable bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := Range{IOVA: iova, Size: mem.Len(), Writable: writable, Mem: mem}
	if err := m.fits(r); err != nil {
		return err
	}
	return m.insert(r)
}

// fits says whether r can be in the table.
func (m *Memory) fits(r Range) error {
	t := m.table.Load()
	if t.n >= MaxMaps {
		return ErrTooMany
	}
	if i, j := t.seek(r.IOVA); i < len(t.chunks) && t.chunks[i].ranges[j].IOVA < r.end() {
		return fmt.Errorf("DMA range %#x, +%#x: %w", r.IOVA, r.Size, ErrOverlap)
	}
	return nil
}

func (m *Memory) insert(r Range) (err error) {
	if r.Mem != nil {
		if r.mem, err = r.Mem.Bytes(0, r.Size); err != nil {
			return err
		}
	}
	m.table.Store(m.table.Load().with(r))
	return nil
}

// open returns a mapping of fd's file that holds [offset, offset+size).
func (m *Memory) open(fd int, offset, size uint64, writable bool) (*file, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat of DMA memory: %w", err)
	}
	memory, huge := isMemory(fd)
	if !memory {
		return nil, ErrNotMemory
	}
	key := fileKey{dev: uint64(st.Dev), ino: st.Ino, writable: writable}
	for _, f := range m.files[key] {
		if f.holds(offset, size) {
			f.refs++
			return f, nil
		}
	}
	f := &file{key: key, begin: offset, huge: huge, refs: 1, fd: -1}
	if whole := uint64(st.Size); whole >= offset+size && whole <= MaxWhole {
		f.begin, size = 0, whole
	}
	if size > MaxMapped-m.mapped {
		return nil, ErrTooMuch
	}
	var err error
	if f.mem, err = shm.Map(fd, int64(f.begin), size, writable); err != nil {
		return nil, fmt.Errorf("DMA memory: %w", err)
	}
	m.mapped += f.mem.Len()
	m.keep(f, fd)
	if m.Opened != nil {
		m.Opened(f.bytes())
	}
	m.files[key] = append(m.files[key], f)
	return f, nil
}

func (m *Memory) put(f *file) error {
	if f.refs--; f.refs > 0 {
		return nil
	}
	rest := slices.DeleteFunc(m.files[f.key], func(x *file) bool { return x == f })
	if len(rest) > 0 {
		m.files[f.key] = rest
	} else {
		delete(m.files, f.key)
	}
	if m.Closing != nil {
		m.Closing(f.bytes())
	}
	m.mapped -= f.mem.Len()
	m.unkeep(f)
	return f.mem.Close()
}

func isMemory(fd int) (memory, huge bool) {
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) != nil {
		return false, false
	}
	huge = fs.Type == unix.HUGETLBFS_MAGIC
	return huge || fs.Type == unix.TMPFS_MAGIC, huge
}

func (f *file) bytes() []byte {
	b, _ := f.mem.Bytes(0, f.mem.Len())
	return b
}

// Files calls f with the memory of each file that is mapped.
func (m *Memory) Files(f func(mem []byte)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, files := range m.files {
		for _, x := range files {
			f(x.bytes())
		}
	}
}

// Unmap takes out every range inside [iova, iova+size); size 2^64-iova is written as 0 with all
// of the rest meant, and the end may be 2^64. Ranges that are only partly inside stay, with an error: vfio-user
// cannot split a mapping. Nothing inside is no error, since QEMU unmaps what it never
// mapped. The removed ranges go to Release.
func (m *Memory) Unmap(iova, size uint64) ([]Range, error) {
	last := iova + size - 1
	if size == 0 || last < iova {
		last = ^uint64(0)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	t, gone, split := m.table.Load().without(iova, last)
	if split != nil {
		return nil, fmt.Errorf("DMA_UNMAP %#x, +%#x would split the range %#x, +%#x: %w", iova, size, split.IOVA, split.Size, unix.EINVAL)
	}
	if t != nil {
		m.table.Store(t)
	}
	return gone, nil
}

// Release unmaps the files that only the ranges of an Unmap had used.
func (m *Memory) Release(gone []Range) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for _, r := range gone {
		if r.file != nil {
			errs = append(errs, m.put(r.file))
		}
	}
	return errors.Join(errs...)
}

// Close unmaps everything. Nobody may use a table of this Memory any more.
func (m *Memory) Close() error {
	gone, err := m.Unmap(0, 0)
	return errors.Join(err, m.Release(gone))
}
