package physical

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const page = shm.PageSize

// missing ends a test that lacks what the machine cannot give: in CI, where it must, as a failure.
func missing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(err)
	}
	t.Skip(err)
}

// newTestPins returns Pins of this machine, which must tell addresses.
func newTestPins(t *testing.T) *Pins {
	t.Helper()
	if _, err := Addresses(file(t, page).touched(), page); errors.Is(err, unix.EPERM) {
		missing(t, err)
	}
	p, err := NewPins()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
		missing(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// memory is a file in memory, and a mapping of all of it.
type memory struct {
	fd  int
	mem []byte
}

func file(t *testing.T, size int) memory {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err == nil {
		err = unix.Ftruncate(fd, int64(size))
	}
	if err != nil {
		t.Fatal(err)
	}
	m := memory{fd: fd}
	if m.mem, err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		unix.Close(fd)
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Munmap(m.mem)
		unix.Close(fd)
	})
	return m
}

func (m memory) touched() []byte {
	for i := 0; i < len(m.mem); i += page {
		m.mem[i] = 1
	}
	return m.mem
}

// pinned is how many bytes the kernel counts as pinned for this process.
func pinned(t *testing.T) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmPin:")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatal(err)
	}
	return n << 10
}

func addresses(t *testing.T, b []byte) []uint64 {
	t.Helper()
	a, err := Addresses(b, page)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestPinnedMemoryIsWhereItIsSaidToBe pins a file with and without holes, and a part of it.
func TestPinnedMemoryIsWhereItIsSaidToBe(t *testing.T) {
	p := newTestPins(t)
	m := file(t, 64*page)
	m.mem[5*page] = 1 // the rest are holes
	for _, part := range [][]byte{m.mem[3*page : 9*page], m.mem} {
		got, err := p.Pin(part)
		if err != nil {
			t.Fatal(err)
		}
		m.touched()
		if want := addresses(t, part); !slices.Equal(got, want) {
			t.Errorf("%#x, and they are at %#x", got, want)
		}
		if _, err := p.Pin(part); err == nil {
			t.Error("pinned twice")
		}
	}
	if n := pinned(t); n < len(m.mem) {
		t.Errorf("%d bytes are pinned", n)
	}
	for _, part := range [][]byte{m.mem, m.mem[3*page : 9*page], m.mem} { // the last once too often
		if err := p.Unpin(part); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Pin(m.mem); err != nil {
		t.Errorf("again: %v", err)
	}
}

// hugePages maps n huge pages of 2 MiB, for which the kernel's pool is made larger if it has to be.
func hugePages(t *testing.T, n int) []byte {
	t.Helper()
	const pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	if err != nil {
		missing(t, fmt.Errorf("no huge pages in this kernel: %w", err))
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(n)<<21); err != nil {
		t.Fatal(err)
	}
	for try := 0; ; try++ { // other tests may use the pool at the same time
		mem, err := unix.Mmap(fd, 0, n<<21, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err == nil {
			t.Cleanup(func() { unix.Munmap(mem) })
			return mem
		}
		if try == 5 {
			missing(t, fmt.Errorf("%d huge pages: %w", n, err))
		}
		b, err := os.ReadFile(pool)
		had := 0
		if err == nil {
			_, err = fmt.Sscan(string(b), &had)
		}
		if err == nil {
			err = os.WriteFile(pool, []byte(strconv.Itoa(had+n)), 0)
		}
		if err != nil {
			missing(t, fmt.Errorf("the kernel's pool of huge pages: %w", err))
		}
		if try == 0 {
			t.Cleanup(func() { _ = os.WriteFile(pool, b, 0) })
		}
	}
}

func TestPinnedHugePages(t *testing.T) {
	p := newTestPins(t)
	const huge = 2 << 20
	mem := hugePages(t, 2)
	for _, part := range [][]byte{mem, mem[huge-page : huge+3*page]} {
		got, err := p.Pin(part)
		if err != nil {
			t.Fatal(err)
		}
		memory{mem: mem}.touched()
		if want := addresses(t, part); !slices.Equal(got, want) {
			t.Errorf("%#x, and they are at %#x", got, want)
		}
	}
	whole, err := Addresses(mem, huge)
	if all := addresses(t, mem); err != nil || !slices.Equal(whole, []uint64{all[0], all[huge/page]}) {
		t.Errorf("huge pages at %#x: %v", whole, err)
	}
}

// TestHoleInPinnedMemory: the file has another page there afterwards, and the one that is pinned is nobody else's.
func TestHoleInPinnedMemory(t *testing.T) {
	p := newTestPins(t)
	m := file(t, 8*page)
	was, err := p.Pin(m.touched())
	if err != nil {
		t.Fatal(err)
	}
	for range 64 {
		if err := unix.Fallocate(m.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, int64(len(m.mem))); err != nil {
			t.Fatal(err)
		}
		other := file(t, 64*page)
		for _, a := range append(addresses(t, other.touched()), addresses(t, m.touched())...) {
			if slices.Contains(was, a) {
				t.Fatalf("the page at %#x is in use elsewhere", a)
			}
		}
	}
}

// TestHolesWhileMemoryIsPinned: somebody punches holes and fills them all the time, through another mapping. What is said of an address is of the page that is pinned: never is it
// one that the file lets go of and another file gets.
func TestHolesWhileMemoryIsPinned(t *testing.T) {
	p := newTestPins(t)
	m := file(t, 32*page)
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; !stop.Load(); i++ {
			_ = unix.Fallocate(m.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(i%32*page), page)
			_ = shm.Guard(func() { m.mem[i%32*page] = 1 })
		}
	})
	defer wg.Wait()
	defer stop.Store(true)
	refused := 0
	for range 100 {
		got, err := p.Pin(m.mem)
		if err != nil {
			refused++
			continue
		}
		if err := unix.Fallocate(m.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, int64(len(m.mem))); err != nil {
			t.Fatal(err)
		}
		other := file(t, 64*page)
		for _, a := range addresses(t, other.touched()) {
			if slices.Contains(got, a) {
				t.Fatalf("%#x was given out as pinned, and is another file's", a)
			}
		}
		if err := p.Unpin(m.mem); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("refused %d times of 100", refused)
}

// TestMemoryThatIsNotPinned: each kind is refused, and leaves nothing behind.
func TestMemoryThatIsNotPinned(t *testing.T) {
	p := newTestPins(t)
	before := pinned(t)
	m := file(t, 8*page)
	private, err := unix.Mmap(-1, 0, 4*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(private)
	reading, err := unix.Mmap(m.fd, 0, 4*page, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(reading)
	short := file(t, 8*page)
	if err := unix.Ftruncate(short.fd, 4*page); err != nil {
		t.Fatal(err)
	}
	for what, mem := range map[string][]byte{
		"private": private, "to be read only": reading, "cut off": short.mem, "no pages": m.mem[512:][:page], "half a page": m.mem[:page/2], "nothing": nil,
	} {
		if _, err := p.Pin(mem); err == nil {
			t.Errorf("memory that is %s was pinned", what)
		} else {
			t.Logf("%s: %v", what, err)
		}
	}
	if n := pinned(t); n != before {
		t.Errorf("%d bytes are pinned, before %d", n, before)
	}
}

// TestFileKeepsPins: it holds what was pinned after it was made, and past Close.
func TestFileKeepsPins(t *testing.T) {
	p := newTestPins(t)
	before := pinned(t)
	f, err := p.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m := file(t, 8*page)
	was, err := p.Pin(m.touched())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if n := pinned(t); n != before+len(m.mem) {
		t.Errorf("%d bytes are pinned, before %d", n, before)
	}
	if err := unix.Ftruncate(m.fd, 0); err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses(t, file(t, 256*page).touched()) {
		if slices.Contains(was, a) {
			t.Fatalf("the page at %#x is in use elsewhere", a)
		}
	}
	if err := p.Unpin(m.mem); err != nil {
		t.Error(err)
	}
	if _, err := p.Pin(m.mem); err == nil {
		t.Error("pinned after Close")
	}
	if _, err := p.File(); err == nil {
		t.Error("a file after Close")
	}
}

// fakeTable refuses what fill says.
type fakeTable struct {
	held map[int]int // bytes by place
	fill func(n int) error
}

func (f *fakeTable) RegisterSparseBuffers(int) error { return nil }
func (f *fakeTable) FD() int                         { return -1 }
func (f *fakeTable) Close() error                    { return nil }

func (f *fakeTable) UpdateBuffers(at int, bufs [][]byte) error {
	if bufs[0] == nil {
		delete(f.held, at)
		return nil
	}
	if err := f.fill(len(f.held)); err != nil {
		return err
	}
	f.held[at] = len(bufs[0])
	return nil
}

// TestMemoryInPieces is larger than the kernel takes at once, and is all of it pinned, or nothing.
func TestMemoryInPieces(t *testing.T) {
	f := &fakeTable{held: map[int]int{}, fill: func(int) error { return nil }}
	p, err := newPins(f)
	if err != nil {
		t.Fatal(err)
	}
	big, err := unix.Mmap(-1, 0, 2*piece+page, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(big)
	taken, err := p.take(big)
	if err != nil || len(taken) != 3 || f.held[taken[0]] != piece || f.held[taken[2]] != page {
		t.Fatalf("%v, %v: %v", taken, f.held, err)
	}
	if err := p.release(taken); err != nil || len(f.held) != 0 {
		t.Fatalf("%v: %v", f.held, err)
	}
	f.fill = func(n int) error {
		if n == 2 {
			return unix.ENOMEM
		}
		return nil
	}
	if _, err := p.take(big); !errors.Is(err, unix.ENOMEM) || len(f.held) != 0 || len(p.free) != p.next {
		t.Fatalf("%v, %d of %d places are free: %v", f.held, len(p.free), p.next, err)
	}
	p.free, p.next = nil, places
	if _, err := p.take(big); err == nil || !strings.Contains(err.Error(), "16384") {
		t.Fatal(err)
	}
}

// TestAreaOf finds mappings in what the kernel says of them.
func TestAreaOf(t *testing.T) {
	const maps = `55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000400000 rw-s 00200000 00:01 1034                       /memfd:guest (deleted)
7f0000400000-7f0000500000 r--s 00000000 00:01 1035                       /memfd:guest (deleted)
`
	for _, c := range []struct {
		at, size uint64
		want     string
	}{
		{0x7f0000000000, 0x400000, "7f0000000000-7f0000400000 200000"},
		{0x7f0000100000, 0x1000, "7f0000000000-7f0000400000 200000"},
		{0x7f0000000000, 0x401000, ""}, {0x7f0000400000, 0x1000, ""}, {0x55d0c0a00000, 0x1000, ""}, {0x1000, 0x1000, ""},
	} {
		a, err := areaOf(strings.NewReader(maps), c.at, c.size)
		got := fmt.Sprintf("%x-%x %x", a.begin, a.end, a.offset)
		if (err == nil) != (c.want != "") || err == nil && got != c.want {
			t.Errorf("%#x, +%#x: %s, %v; want %q", c.at, c.size, got, err, c.want)
		}
	}
}
