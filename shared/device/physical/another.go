package physical

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// view is a second mapping of memory.
type view struct {
	mem []byte // what was asked for
	raw []byte // whole pages of the file, which huge ones may make more
}

func (v *view) unmap() error { return unix.Munmap(v.raw) }

// another maps mem again. The file is found by the mapping that this process has of it: /proc/PID/map_files, proc_pid_map_files(5), which is as much
// root's as physical addresses are. (mremap would make a second mapping of shared memory too, but not of huge pages.)
func another(mem []byte) (*view, error) {
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return nil, err
	}
	defer maps.Close()
	a, err := areaOf(maps, uint64(addressOf(mem)), uint64(len(mem)))
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/map_files/%x-%x", a.begin, a.end), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("the file that the memory is of: %w (it takes root of the machine)", err)
	}
	defer unix.Close(fd)
	skip := uint64(addressOf(mem)) - a.begin
	align := uint64(unix.Getpagesize())
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && fs.Type == unix.HUGETLBFS_MAGIC {
		align = uint64(fs.Bsize)
	}
	begin := (a.offset + skip) &^ (align - 1)
	first := a.offset + skip - begin
	length := (first + uint64(len(mem)) + align - 1) &^ (align - 1)
	raw, err := unix.Mmap(fd, int64(begin), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping the memory again: %w", err)
	}
	// Nobody is to touch it, khugepaged neither. A kernel without transparent huge pages has none, and hugetlbfs does not know the advice.
	_ = unix.Madvise(raw, unix.MADV_NOHUGEPAGE)
	return &view{mem: raw[first : first+uint64(len(mem))], raw: raw}, nil
}

// area is a line of /proc/PID/maps: proc_pid_maps(5).
type area struct {
	begin, end, offset uint64
	access             string
}

var errNotShared = errors.New("only memory that is one shared mapping, which may be written to, has physical addresses that are of use")

// areaOf finds the mapping that has size bytes at the address at.
func areaOf(maps io.Reader, at, size uint64) (a area, err error) {
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s %x", &a.begin, &a.end, &a.access, &a.offset); err != nil {
			return a, fmt.Errorf("/proc/self/maps: %q: %w", lines.Text(), err)
		}
		if at < a.begin || at >= a.end {
			continue
		}
		if size > a.end-at || !strings.HasPrefix(a.access, "rw") || !strings.HasSuffix(a.access, "s") {
			return a, errNotShared
		}
		return a, nil
	}
	return a, errors.Join(lines.Err(), errNotShared)
}
