package gmem

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestMapAndUnmap(t *testing.T) {
	m := newMemory(t)
	m.mustMap(t, 0x10000, 4*page, 2*page, memfd(t, 8), true)
	for i := range uint64(4) {
		if got := pageAt(t, m.Table(), 0x10000+i*page); got != int(2+i) {
			t.Errorf("page %d of the range is page %d of the file", i, got)
		}
	}
	for _, iova := range []uint64{0, 0xf000, 0x10000 - 1, 0x14000, 1 << 40, math.MaxUint64} {
		if pageAt(t, m.Table(), iova) != -1 {
			t.Errorf("%#x can be read", iova)
		}
	}
	m.mustUnmap(t, 0x10000, 4*page)
	if pageAt(t, m.Table(), 0x10000) != -1 || mappings(t) != 0 {
		t.Errorf("still mapped; %d mappings", mappings(t))
	}
}

func TestMapRefuses(t *testing.T) {
	m := newMemory(t)
	for _, c := range []struct {
		name               string
		iova, size, offset uint64
		want               error
	}{
		{"empty", 0, 0, 0, unix.EINVAL},
		{"odd address", 1, page, 0, unix.EINVAL},
		{"odd size", 0, page + 1, 0, unix.EINVAL},
		{"size below a page", 0, 512, 0, unix.EINVAL},
		{"odd offset", 0, page, 512, unix.EINVAL},
		{"end at 2^64", math.MaxUint64 - page + 1, page, 0, unix.EINVAL},
		{"end past 2^64", math.MaxUint64 - page + 1, 2 * page, 0, unix.EINVAL},
		{"everything", 0, math.MaxUint64 - page + 1, 0, shm.ErrRange},
		{"size 2^63", 0, 1 << 63, 0, shm.ErrRange},
		{"offset past 2^63", 0, page, 1 << 63, unix.EINVAL},
		{"offset plus size past 2^63", 0, 2 * page, 1<<63 - page, unix.EINVAL},
		{"offset plus size past 2^64", 0, 2 * page, math.MaxUint64 - page + 1, unix.EINVAL},
		{"offset past the file", 0, page, 4 * page, shm.ErrRange},
		{"size past the file", 0, 5 * page, 0, shm.ErrRange},
	} {
		err := m.Map(c.iova, c.size, c.offset, memfd(t, 4), true)
		if !errors.Is(err, c.want) && !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if n := len(m.Table().all()); n != 0 || len(m.files) != 0 {
		t.Errorf("%d ranges and %d files of refused maps", n, len(m.files))
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[1])
	if err := m.Map(0, page, 0, p[0], true); err == nil {
		t.Error("a pipe was mapped")
	}
	if err := m.Map(0, page, 0, 1<<30, true); !errors.Is(err, unix.EBADF) {
		t.Errorf("no descriptor: %v", err)
	}
}

// Ranges may end anywhere below 2^64; the host never computes past it.
func TestRangesNearTheTop(t *testing.T) {
	m := newMemory(t)
	const top = math.MaxUint64 - 2*page + 1 // the last page but one
	m.mustMap(t, top, page, 0, memfd(t, 1), true)
	if pageAt(t, m.Table(), top) != 0 {
		t.Error("the page cannot be read")
	}
	if m.Table().ReadIOVA(top+page-1, make([]byte, 2)) {
		t.Error("read past the end of the range")
	}
	if m.Table().ReadIOVA(math.MaxUint64, make([]byte, 2)) || m.Table().WriteIOVA(math.MaxUint64-1, make([]byte, page)) {
		t.Error("access around 2^64")
	}
	if vec, ok := m.Table().Translate(nil, top, 2*page, false); ok {
		t.Errorf("%d elements past the range", len(vec))
	}
	if vec, ok := m.Table().Translate(nil, top, math.MaxUint32, false); ok {
		t.Errorf("%d elements around 2^64", len(vec))
	}
	if err := m.Map(top-page, 2*page, 0, memfd(t, 2), true); !errors.Is(err, unix.EEXIST) {
		t.Errorf("overlap at the top: %v", err)
	}
	m.mustUnmap(t, top, 2*page) // the end is 2^64
	if len(m.Table().all()) != 0 {
		t.Error("still mapped")
	}
}

func TestOverlap(t *testing.T) {
	m := newMemory(t)
	m.mustMap(t, 0x10000, 4*page, 0, memfd(t, 4), true)
	m.mustMap(t, 0x18000, 4*page, 0, -1, true)
	for _, c := range []struct{ iova, size uint64 }{
		{0x10000, 4 * page}, {0x10000, page}, {0x13000, page}, {0xf000, 2 * page}, {0x13000, 2 * page},
		{0x8000, 0x10000}, {0x14000, 5 * page}, {0, 1 << 40}, {0x18000, page}, {0x1b000, page},
	} {
		for _, fd := range []int{memfd(t, 4), -1} {
			err := m.Map(c.iova, c.size, 0, fd, true)
			if !errors.Is(err, ErrOverlap) || !errors.Is(err, unix.EEXIST) {
				t.Errorf("%#x, +%#x: %v", c.iova, c.size, err)
			}
		}
	}
	// Neighbours are none.
	m.mustMap(t, 0xf000, page, 0, memfd(t, 1), true)
	m.mustMap(t, 0x14000, 4*page, 0, memfd(t, 4), true)
	m.mustMap(t, 0x1c000, page, 0, memfd(t, 1), true)
	if n := len(m.Table().all()); n != 5 {
		t.Errorf("%d ranges", n)
	}
	if !slices.IsSortedFunc(m.Table().all(), func(a, b Range) int { return int(int64(a.IOVA) - int64(b.IOVA)) }) {
		t.Error("the ranges are not in order")
	}
}

// QEMU names one file at many offsets, and does so without waiting for each answer: the file is mapped once.
func TestOneFileAtManyOffsets(t *testing.T) {
	m := newMemory(t)
	const n = 500
	fd := memfd(t, n)
	order := make([]int, n)
	for i := range order {
		order[i] = (i*211 + 17) % n
	}
	for _, i := range order {
		m.mustMap(t, uint64(i)*2*page, page, uint64(i)*page, dup(t, fd), true)
	}
	if got := mappings(t); got != 1 {
		t.Errorf("%d mappings of one file", got)
	}
	for i := range n {
		if got := pageAt(t, m.Table(), uint64(i)*2*page); got != i {
			t.Fatalf("page %d of the file at the place of %d", got, i)
		}
		if pageAt(t, m.Table(), (uint64(i)*2+1)*page) != -1 {
			t.Fatalf("the gap behind %d can be read", i)
		}
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	for k, i := range order {
		m.mustUnmap(t, uint64(i)*2*page, page)
		if got, want := mappings(t), 1; k < n-1 && k%50 == 0 && got != want {
			t.Fatalf("%d mappings after %d of %d were unmapped", got, k+1, n)
		}
	}
	if got := mappings(t); got != 0 {
		t.Errorf("%d mappings when all ranges are gone", got)
	}
}

// A file may be mapped again when it has grown; what was mapped before stays as it was.
func TestFileThatGrew(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 2)
	m.mustMap(t, 0, 2*page, 0, dup(t, fd), true)
	old := m.Table()
	if err := unix.Ftruncate(fd, 8*page); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pwrite(fd, []byte{77}, 7*page); err != nil {
		t.Fatal(err)
	}
	m.mustMap(t, 0x10000, page, 7*page, dup(t, fd), true)
	m.mustMap(t, 0x20000, page, page, dup(t, fd), true)
	if got := mappings(t); got != 2 {
		t.Errorf("%d mappings of a file that grew once", got)
	}
	if pageAt(t, m.Table(), 0x10000) != 77 || pageAt(t, m.Table(), page) != 1 || pageAt(t, old, page) != 1 || pageAt(t, m.Table(), 0x20000) != 1 {
		t.Error("not the file's pages")
	}
	unix.Close(fd)
	m.mustUnmap(t, 0x10000, page)
	m.mustUnmap(t, 0x20000, page)
	if got := mappings(t); got != 1 {
		t.Errorf("%d mappings when the later one is not used any more", got)
	}
	if pageAt(t, m.Table(), page) != 1 {
		t.Error("the earlier mapping is gone")
	}
}

// Files tells of every mapped file, also of one whose mapping was superseded when it grew.
func TestFilesTellsOfAll(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 2)
	m.mustMap(t, 0, page, 0, dup(t, fd), true)
	if err := unix.Ftruncate(fd, 4*page); err != nil {
		t.Fatal(err)
	}
	m.mustMap(t, 0x10000, page, 3*page, fd, true)
	var lens []int
	m.Files(func(b []byte) { lens = append(lens, len(b)) })
	slices.Sort(lens)
	if !slices.Equal(lens, []int{2 * page, 4 * page}) {
		t.Errorf("files of %v bytes; both mappings are in use", lens)
	}
}

// A refused Map leaves the file's earlier mapping shared.
func TestRefusedMapKeepsTheFile(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 2)
	m.mustMap(t, 0, page, 0, dup(t, fd), true)
	if err := m.Map(0x10000, page, 6*page, dup(t, fd), true); err == nil {
		t.Fatal("a range past the file was mapped")
	}
	m.mustMap(t, 0x10000, page, page, fd, true)
	if got := mappings(t); got != 1 {
		t.Errorf("%d mappings of one file", got)
	}
}

func TestReadOnlyRanges(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 4)
	m.mustMap(t, 0, 2*page, 0, dup(t, fd), false)
	m.mustMap(t, 2*page, 2*page, 2*page, fd, true)
	tab := m.Table()
	if pageAt(t, tab, page) != 1 || pageAt(t, tab, 3*page) != 3 {
		t.Error("a page cannot be read")
	}
	for _, c := range []struct {
		iova, n uint64
		ok      bool
	}{{0, 1, false}, {2*page - 1, 1, false}, {2*page - 1, 2, false}, {2 * page, page, true}, {4*page - 1, 1, true}, {4*page - 1, 2, false}} {
		if tab.WriteIOVA(c.iova, make([]byte, c.n)) != c.ok {
			t.Errorf("write to %#x, +%d", c.iova, c.n)
		}
		if _, ok := tab.Translate(nil, c.iova, uint32(c.n), true); ok != c.ok {
			t.Errorf("translation of %#x, +%d for writing: %v", c.iova, c.n, ok)
		}
	}
	if vec, ok := tab.Translate(nil, 0, 4*page, false); !ok {
		t.Errorf("translation for reading: %d elements", len(vec))
	}
	if _, err := tab.View(0, page); err == nil {
		t.Error("a view of read-only memory")
	}
	// A descriptor that was opened for reading cannot be mapped for writing.
	rw, err := unix.MemfdCreate("memory", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(rw)
	if err := unix.Ftruncate(rw, page); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/self/fd/%d", rw)
	for _, writable := range []bool{true, false} {
		ro, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Map(0x10000, page, 0, ro, writable); (err == nil) == writable {
			t.Errorf("writable %v: %v", writable, err)
		}
	}
}

// A range without a file holds its addresses and cannot be reached.
func TestRangesWithoutAFile(t *testing.T) {
	m := newMemory(t)
	m.mustMap(t, 0x10000, 1<<40, 0, -1, true)
	m.mustMap(t, 0, page, 0, memfd(t, 1), true)
	tab := m.Table()
	if pageAt(t, tab, 0x10000) != -1 || tab.WriteIOVA(0x10000, []byte{1}) {
		t.Error("memory without a file can be reached")
	}
	if _, ok := tab.Translate(nil, 0x10000, 1, false); ok {
		t.Error("memory without a file was translated")
	}
	if _, err := tab.View(0x10000, page); err == nil {
		t.Error("a view of memory without a file")
	}
	m.mustUnmap(t, 0x10000, 1<<40)
}

// Memory of this process is reached like a client's and stays its owner's.
func TestMapRegion(t *testing.T) {
	m := newMemory(t)
	mem, err := shm.NewMemfd("gmem-test", 2*page)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if err := m.MapRegion(0x10000, mem, true); err != nil {
		t.Fatal(err)
	}
	if err := m.MapRegion(0x11000, mem, true); !errors.Is(err, ErrOverlap) {
		t.Errorf("overlap: %v", err)
	}
	if err := m.MapRegion(0x20000, mem, false); err != nil {
		t.Fatal(err)
	}
	if !m.Table().WriteIOVA(0x11000, []byte{9}) || pageAt(t, m.Table(), 0x21000) != 9 {
		t.Error("the two ranges are not the same memory")
	}
	if m.Table().WriteIOVA(0x20000, []byte{9}) {
		t.Error("a read-only range was written")
	}
	m.mustUnmap(t, 0, 0)
	if err := mem.Write(0, []byte{1}); err != nil || mappings(t) != 1 {
		t.Errorf("the region is gone with its range: %v, %d mappings", err, mappings(t))
	}
}

func TestUnmapSemantics(t *testing.T) {
	type span struct{ iova, size uint64 }
	three := []span{{0x10000, 2 * page}, {0x12000, page}, {0x20000, page}}
	for _, c := range []struct {
		name string
		span
		left int // -1: refused
	}{
		{"exactly one", span{0x10000, 2 * page}, 2},
		{"two neighbours", span{0x10000, 3 * page}, 1},
		{"covering with gaps", span{0x8000, 0x20000}, 0},
		{"everything, as QEMU says it", span{0, 0}, 0},
		{"everything, by size", span{0, math.MaxUint64}, 0},
		{"from the second on", span{0x12000, 0}, 1},
		{"to 2^64", span{0x12000, 1<<64 - 0x12000}, 1},
		{"past 2^64", span{0x12000, math.MaxUint64}, 1},
		{"never mapped", span{0x14000, page}, 3},
		{"never mapped, above", span{1 << 50, 1 << 20}, 3},
		{"never mapped, at the top", span{math.MaxUint64 - page + 1, page}, 3},
		{"first half", span{0x10000, page}, -1},
		{"second half", span{0x11000, page}, -1},
		{"one and a half", span{0x11000, 2 * page}, -1},
		{"half and another", span{0x12000 - page, 0x20000}, -1},
		{"inside", span{0x20800, 16}, -1},
		{"up to the first byte", span{0, 0x10001}, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMemory(t)
			for _, s := range three {
				m.mustMap(t, s.iova, s.size, 0, memfd(t, 2), true)
			}
			before := m.Table()
			gone, err := m.Unmap(c.iova, c.size)
			if c.left < 0 {
				if !errors.Is(err, unix.EINVAL) || gone != nil || m.Table() != before {
					t.Errorf("%v; %d ranges taken out", err, len(gone))
				}
				return
			}
			if err != nil || len(gone) != 3-c.left || len(m.Table().all()) != c.left {
				t.Fatalf("%d ranges taken out, %d left: %v", len(gone), len(m.Table().all()), err)
			}
			for _, r := range gone {
				if pageAt(t, m.Table(), r.IOVA) != -1 {
					t.Errorf("%#x can still be read", r.IOVA)
				}
			}
			if err := m.Release(gone); err != nil {
				t.Error(err)
			}
			if got := mappings(t); got != c.left {
				t.Errorf("%d mappings for %d ranges", got, c.left)
			}
		})
	}
}

func TestTooManyMaps(t *testing.T) {
	m := newMemory(t)
	// One by one this would copy the table 65535 times; the last steps are enough.
	ranges := make([]Range, MaxMaps-1)
	for i := range ranges {
		ranges[i] = Range{IOVA: uint64(i+1) * 2 * page, Size: page}
	}
	m.table.Store(tableOf(ranges))
	m.mustMap(t, 0, page, 0, memfd(t, 1), true)
	err := m.Map(page, page, 0, memfd(t, 1), true)
	if !errors.Is(err, ErrTooMany) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("range %d: %v", MaxMaps+1, err)
	}
	m.mustUnmap(t, 2*page, page)
	m.mustMap(t, page, page, 0, memfd(t, 1), true)
}

// R35: what Unmap took out can be used through older tables until Release.
func TestRule35_OldTableUsableUntilRelease(t *testing.T) {
	m := newMemory(t)
	fd := memfd(t, 4)
	m.mustMap(t, 0x10000, 4*page, 0, dup(t, fd), true)
	old := m.Table()
	vec, ok := old.Translate(nil, 0x10000, 4*page, true)
	if !ok || len(vec) != 1 {
		t.Fatal("not translated")
	}
	view, err := old.View(0x10000, page)
	if err != nil {
		t.Fatal(err)
	}
	gone, err := m.Unmap(0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if pageAt(t, m.Table(), 0x10000) != -1 {
		t.Error("the new table still has the range")
	}
	if pageAt(t, old, 0x13000) != 3 {
		t.Error("the old table lost it before Release")
	}
	if !old.WriteIOVA(0x10100, []byte("late")) {
		t.Error("the old table cannot write before Release")
	}
	got := make([]byte, 4)
	if err := view.Read(0x100, got); err != nil || string(got) != "late" {
		t.Errorf("through a view of the old table: %q, %v", got, err)
	}
	if _, err := unix.Pread(fd, got, 0x100); err != nil || string(got) != "late" {
		t.Errorf("in the file: %q, %v", got, err)
	}
	// The client may map the same addresses anew meanwhile; the two tables stay apart.
	m.mustMap(t, 0x10000, page, 3*page, fd, true)
	if pageAt(t, m.Table(), 0x10000) != 3 || pageAt(t, old, 0x10000) != 0 {
		t.Error("the tables are mixed up")
	}
	if err := m.Release(gone); err != nil {
		t.Fatal(err)
	}
	if pageAt(t, m.Table(), 0x10000) != 3 || mappings(t) != 1 {
		t.Errorf("Release took the new range's memory; %d mappings", mappings(t))
	}
}

func TestOpenedAndClosing(t *testing.T) {
	m := newMemory(t)
	var log []string
	live := map[*byte]bool{}
	m.Opened = func(b []byte) {
		log = append(log, "open")
		live[&b[0]] = true
		_ = b[len(b)-1] // mapped
	}
	m.Closing = func(b []byte) {
		log = append(log, "close")
		if !live[&b[0]] {
			t.Error("Closing of what was not opened")
		}
		delete(live, &b[0])
		_ = bytes.Clone(b) // still mapped
	}
	fd := memfd(t, 4)
	m.mustMap(t, 0, page, 0, dup(t, fd), true)
	m.mustMap(t, page, page, page, dup(t, fd), true)
	m.mustMap(t, 4*page, page, 0, dup(t, fd), false) // read-only: a mapping of its own
	m.mustMap(t, 8*page, page, 0, -1, true)
	if !slices.Equal(log, []string{"open", "open"}) {
		t.Errorf("%q after four maps of one file", log)
	}
	m.mustUnmap(t, 0, page)
	if len(log) != 2 {
		t.Errorf("%q while a range is left", log)
	}
	gone, err := m.Unmap(page, page)
	if err != nil || len(log) != 2 {
		t.Errorf("%q before Release: %v", log, err)
	}
	if err := m.Release(gone); err != nil || !slices.Equal(log, []string{"open", "open", "close"}) {
		t.Errorf("%q after Release: %v", log, err)
	}
	// A map that fails after the file was mapped tells of both.
	if err := m.Map(0, page, 10*page, fd, true); err == nil {
		t.Error("a range past the file was mapped")
	}
	opens := 0
	for _, s := range log {
		if s == "open" {
			opens++
		} else {
			opens--
		}
	}
	if opens != 1 || len(live) != 1 {
		t.Errorf("%q: %d files open", log, opens)
	}
}

// A client whose memory is huge and sparse, and who maps a page of it, takes a page's worth of this
// process's addresses and not all that it can have.
func TestSparseGiantTakesNoAddressSpace(t *testing.T) {
	m := newMemory(t)
	const giant = 48 << 40 // three of them exceed what a process can address
	for i := range uint64(3) {
		fd, err := unix.MemfdCreate("gmem-test", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Ftruncate(fd, giant); err != nil {
			t.Fatal(err)
		}
		if err := m.Map(i<<40, page, i<<30, fd, true); err != nil {
			t.Errorf("one page of a file of 48 TiB, number %d: %v", i, err)
		}
	}
}

func TestFileThatIsNotMemoryIsRefused(t *testing.T) {
	for _, path := range []string{"/proc/self/status", "gmem.go"} {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := New().Map(0, shm.PageSize, 0, fd, false); !errors.Is(err, ErrNotMemory) || !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: %v, want ErrNotMemory", path, err)
		}
	}
}

func TestAddressSpaceOfOneClientIsBounded(t *testing.T) {
	m := New()
	defer m.Close()
	var err error
	for i := range uint64(100) {
		fd, e := unix.MemfdCreate("big", unix.MFD_CLOEXEC)
		if e != nil {
			t.Fatal(e)
		}
		if e := unix.Ftruncate(fd, 1<<40); e != nil {
			t.Fatal(e)
		}
		if err = m.Map(i<<40, 1<<40, 0, fd, true); err != nil {
			if i != MaxMapped>>40 {
				t.Errorf("refused after %d TiB, want %d: %v", i, MaxMapped>>40, err)
			}
			break
		}
	}
	if !errors.Is(err, ErrTooMuch) || !errors.Is(err, unix.ENOMEM) {
		t.Errorf("%v, want ErrTooMuch", err)
	}
}
