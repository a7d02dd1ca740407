package gmem

import (
	"bufio"
	"os"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const page = shm.PageSize

// memfd returns a memfd of size bytes in which each page begins with its number. Map takes it over.
func memfd(t testing.TB, pages int) int {
	t.Helper()
	fd, err := unix.MemfdCreate("gmem-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, int64(pages)*page); err != nil {
		t.Fatal(err)
	}
	for i := range pages {
		if _, err := unix.Pwrite(fd, []byte{byte(i), byte(i >> 8)}, int64(i)*page); err != nil {
			t.Fatal(err)
		}
	}
	return fd
}

func dup(t testing.TB, fd int) int {
	t.Helper()
	d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// held counts this process's descriptors and its mappings of the memfds of these tests.
func held(t testing.TB) (fds, maps int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries), mappings(t)
}

func mappings(t testing.TB) (n int) {
	t.Helper()
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if strings.Contains(lines.Text(), "memfd:gmem-test") {
			n++
		}
	}
	return n
}

// newMemory returns an empty Memory that is closed at the end, after which nothing may be left of it.
func newMemory(t testing.TB) *Memory {
	t.Helper()
	fds, maps := held(t)
	m := New()
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if len(m.files) != 0 || len(m.Table().all()) != 0 {
			t.Errorf("%d files and %d ranges after Close", len(m.files), len(m.Table().all()))
		}
		if f, mp := held(t); f > fds || mp > maps {
			t.Errorf("leak: %d descriptors and %d mappings at first, %d and %d at the end", fds, maps, f, mp)
		}
	})
	return m
}

func (m *Memory) mustMap(t testing.TB, iova, size, offset uint64, fd int, writable bool) {
	t.Helper()
	if err := m.Map(iova, size, offset, fd, writable); err != nil {
		t.Fatal(err)
	}
}

func (m *Memory) mustUnmap(t testing.TB, iova, size uint64) {
	t.Helper()
	gone, err := m.Unmap(iova, size)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Release(gone); err != nil {
		t.Fatal(err)
	}
}

// pageAt returns the number of the file page that lies at iova, or -1.
func pageAt(t testing.TB, tab *Table, iova uint64) int {
	t.Helper()
	var b [2]byte
	if !tab.ReadIOVA(iova, b[:]) {
		return -1
	}
	return int(b[0]) | int(b[1])<<8
}

// all returns the ranges of t in one piece.
func (t *Table) all() (ranges []Range) {
	for _, c := range t.chunks {
		ranges = append(ranges, c.ranges...)
	}
	return ranges
}

// tableOf returns a table of sorted ranges.
func tableOf(ranges []Range) *Table {
	var chunks []chunk
	for c := range slices.Chunk(ranges, maxChunk) {
		chunks = append(chunks, newChunk(c))
	}
	return newTable(chunks, len(ranges))
}
