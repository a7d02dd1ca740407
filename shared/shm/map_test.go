package shm_test

import (
	"bytes"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestMapOffset(t *testing.T) {
	notHeldMore(t)
	fd := memfd(t, 64<<10)
	content := make([]byte, 64<<10)
	for i := range content {
		content[i] = byte(i>>8) ^ byte(i*7)
	}
	if _, err := unix.Pwrite(fd, content, 0); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		off  int64
		size uint64
	}{
		{0, 64 << 10}, {0, 1}, {4096, 4096}, {4095, 2}, {1, 4096}, {100, 50000}, {64<<10 - 1, 1}, {61440, 4096},
	} {
		r, err := shm.Map(fd, c.off, c.size, true)
		if err != nil {
			t.Fatalf("offset %d, size %d: %v", c.off, c.size, err)
		}
		got := make([]byte, c.size)
		if err := r.Read(0, got); err != nil || r.Len() != c.size || r.FD() != -1 {
			t.Errorf("length %d, descriptor %d: %v", r.Len(), r.FD(), err)
		}
		if want := content[c.off:][:c.size]; !bytes.Equal(got, want) {
			t.Errorf("offset %d, size %d: not the file's bytes", c.off, c.size)
		}
		// Shared, not a copy.
		if err := r.Write(c.size-1, []byte{content[c.off+int64(c.size)-1]}); err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestMapRefuses(t *testing.T) {
	notHeldMore(t)
	fd := memfd(t, 8192)
	for _, c := range []struct {
		name string
		off  int64
		size uint64
	}{
		{"empty", 0, 0},
		{"negative offset", -1, 1},
		{"most negative offset", math.MinInt64, 4096},
		{"one byte past the end", 0, 8193},
		{"last byte past the end", 8192, 1},
		{"page past the end", 4096, 8192},
		{"far past the end", 1 << 40, 4096},
		{"size past 2^63", 0, 1 << 63},
		{"size 2^64-1", 0, math.MaxUint64},
		{"sum past 2^63", math.MaxInt64, 1},
		{"sum wraps to small", math.MaxInt64, math.MaxInt64 + 2},
		{"aligned sum wraps", math.MaxInt64 - 4095, 4096},
	} {
		if r, err := shm.Map(fd, c.off, c.size, true); !errors.Is(err, shm.ErrRange) {
			t.Errorf("%s: %v, %v", c.name, r, err)
		}
	}
	for _, bad := range []int{-1, 1 << 30} {
		if _, err := shm.Map(bad, 0, 4096, true); !errors.Is(err, unix.EBADF) {
			t.Errorf("descriptor %d: %v", bad, err)
		}
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	if _, err := shm.Map(p[0], 0, 4096, false); !errors.Is(err, unix.ENODEV) {
		t.Errorf("a pipe: %v", err)
	}
}

// A file of 2^63-1 bytes: rounding its size up to pages must not wrap.
func TestMapOfTheLargestFile(t *testing.T) {
	notHeldMore(t)
	fd := memfd(t, math.MaxInt64)
	if _, err := shm.Map(fd, 0, math.MaxInt64, true); err == nil {
		t.Error("2^63-1 bytes were mapped")
	}
	// Kernels differ in whether they map a file's last page below 2^63.
	r, err := shm.Map(fd, math.MaxInt64-100, 100, true)
	if err != nil {
		if !errors.Is(err, unix.EOVERFLOW) {
			t.Error(err)
		}
		return
	}
	if r.Len() != 100 {
		t.Errorf("length %d", r.Len())
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

func TestMapReadOnly(t *testing.T) {
	notHeldMore(t)
	path := filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(path, bytes.Repeat([]byte("x"), 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := shm.Map(int(f.Fd()), 0, 4096, true); !errors.Is(err, unix.EACCES) {
		t.Errorf("writable mapping of a read-only descriptor: %v", err)
	}
	r, err := shm.Map(int(f.Fd()), 0, 4096, false)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := make([]byte, 1)
	if err := r.Read(4095, p); err != nil || p[0] != 'x' {
		t.Errorf("%q, %v", p, err)
	}
	// A write is a fault, and a fault is an error (R36).
	var fault *shm.FaultError
	if err := shm.Guard(func() { _ = r.Write(0, p) }); !errors.As(err, &fault) {
		t.Errorf("write to read-only memory: %v", err)
	}
}

func TestMemfdSeals(t *testing.T) {
	notHeldMore(t)
	r, err := shm.NewMemfd("shm-test", 5000)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if r.Len() != 8192 {
		t.Errorf("5000 bytes rounded up to %d", r.Len())
	}
	if flags, err := unix.FcntlInt(uintptr(r.FD()), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("not close-on-exec: %#x, %v", flags, err)
	}
	for _, size := range []int64{0, 4096, 8191, 8193, 1 << 20} {
		if err := unix.Ftruncate(r.FD(), size); !errors.Is(err, unix.EPERM) {
			t.Errorf("resizing to %d: %v", size, err)
		}
	}
	if _, err := unix.FcntlInt(uintptr(r.FD()), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); !errors.Is(err, unix.EPERM) {
		t.Errorf("adding a seal: %v", err)
	}
	if shm.CanShrink(r.FD()) {
		t.Error("CanShrink of a sealed memfd")
	}
	peer, err := shm.Map(r.FD(), 0, r.Len(), true)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	mine, _ := r.Word32(4096)
	theirs, _ := peer.Word32(4096)
	mine.Store(7)
	if theirs.Load() != 7 {
		t.Error("the peer's mapping is not the same memory")
	}
	if r.Overlaps(peer) {
		t.Error("two mappings of one file overlap in host addresses")
	}
}

func TestMemfdRefuses(t *testing.T) {
	notHeldMore(t)
	for _, size := range []uint64{0, math.MaxUint64, math.MaxUint64 - 4094, 1 << 63, 1<<63 - 1} {
		if r, err := shm.NewMemfd("shm-test", size); err == nil {
			r.Close()
			t.Errorf("a memfd of %#x bytes", size)
		}
	}
	if _, err := shm.NewMemfd(strings.Repeat("n", 300), 4096); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a name of 300 bytes: %v", err)
	}
}

func TestCanShrink(t *testing.T) {
	notHeldMore(t)
	fd := memfd(t, 4096)
	if !shm.CanShrink(fd) {
		t.Error("an unsealed memfd can shrink")
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_GROW); err != nil {
		t.Fatal(err)
	}
	if !shm.CanShrink(fd) {
		t.Error("a memfd sealed against growing only can shrink")
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
		t.Fatal(err)
	}
	if shm.CanShrink(fd) {
		t.Error("a memfd sealed against shrinking cannot shrink")
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !shm.CanShrink(int(f.Fd())) {
		t.Error("an ordinary file can shrink")
	}
	if !shm.CanShrink(-1) {
		t.Error("nothing is known of no descriptor")
	}
}

func TestCloseTwice(t *testing.T) {
	notHeldMore(t)
	_, before := held(t)
	r, err := shm.NewMemfd("shm-test", 4096)
	if err != nil {
		t.Fatal(err)
	}
	fd := r.FD()
	if _, maps := held(t); maps != before+1 {
		t.Errorf("%d mappings with one region more than %d", maps, before)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if _, maps := held(t); maps != before {
		t.Errorf("%d mappings after Close, %d before", maps, before)
	}
	if err := r.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	// The second Close must not close whoever has the number by now.
	again, err := unix.MemfdCreate("shm-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(again)
	if again == fd {
		_ = r.Close()
		if _, err := unix.FcntlInt(uintptr(again), unix.F_GETFD, 0); err != nil {
			t.Errorf("Close closed another's descriptor: %v", err)
		}
	}
}

// Huge pages: QEMU names offsets in such files that are not aligned to them.
func TestMapHugetlb(t *testing.T) {
	notHeldMore(t)
	const huge = 2 << 20
	reserveHugePages(t, 2)
	fd, err := unix.MemfdCreate("shm-test", unix.MFD_CLOEXEC|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 2*huge); err != nil {
		t.Fatal(err)
	}
	whole, err := shm.Map(fd, 0, 2*huge, true)
	if err != nil {
		t.Fatal(err)
	}
	defer whole.Close()
	for _, c := range []struct {
		off  int64
		size uint64
	}{{0, huge}, {4096, 8192}, {huge - 4096, 8192}, {huge, huge}, {2*huge - 4096, 4096}, {12345, 100}} {
		r, err := shm.Map(fd, c.off, c.size, true)
		if err != nil {
			t.Errorf("offset %#x, size %#x: %v", c.off, c.size, err)
			continue
		}
		if err := r.Write(c.size-4, []byte("last")); err != nil {
			t.Error(err)
		}
		got := make([]byte, 4)
		if err := whole.Read(uint64(c.off)+c.size-4, got); err != nil || string(got) != "last" {
			t.Errorf("offset %#x, size %#x: the file holds %q, %v", c.off, c.size, got, err)
		}
		if err := whole.Zero(uint64(c.off)+c.size-4, 4); err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Errorf("offset %#x, size %#x: %v", c.off, c.size, err)
		}
	}
}

// without ends a test that lacks what the machine cannot give: in CI, where it must, as a failure.
func without(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// reserveHugePages lends n free 2 MiB pages to the test, from the kernel's pool if it
// has them, otherwise by enlarging the pool until the test ends.
func reserveHugePages(t *testing.T, n int) {
	t.Helper()
	const dir = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
	count := func(file string) int {
		b, err := os.ReadFile(dir + file)
		if err != nil {
			without(t, "the kernel has no 2 MiB pages: %v", err)
		}
		v, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if count("free_hugepages") >= n {
		return
	}
	had := count("nr_hugepages")
	set := func(v int) error {
		return os.WriteFile(dir+"nr_hugepages", []byte(strconv.Itoa(v)), 0o644)
	}
	if err := set(had + n); err != nil {
		without(t, "no %d free huge pages, and more cannot be reserved: %v", n, err)
	}
	t.Cleanup(func() {
		if err := set(had); err != nil {
			t.Errorf("giving the huge pages back: %v", err)
		}
	})
	if count("free_hugepages") < n {
		without(t, "the kernel found only %d of %d huge pages", count("free_hugepages"), n)
	}
}

// Who is given the descriptor reads, and whoever made it goes on writing.
func TestMemfdForReaders(t *testing.T) {
	notHeldMore(t)
	r, err := shm.NewMemfdForReaders("shm-test", 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if m, err := shm.Map(r.FD(), 0, 4096, true); !errors.Is(err, unix.EPERM) {
		t.Errorf("mapped for writing: %v, %v", m, err)
	}
	if _, err := unix.Pwrite(r.FD(), []byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("written: %v", err)
	}
	m, err := shm.Map(r.FD(), 0, 4096, false)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := r.Write(100, []byte("seen")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if err := m.Read(100, got); err != nil || string(got) != "seen" {
		t.Errorf("%q, %v", got, err)
	}
	if shm.CanShrink(r.FD()) {
		t.Error("it can shrink")
	}
}
