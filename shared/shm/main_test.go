package shm_test

import (
	"bufio"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/shm"
)

// roleEnv makes this test binary play a part in another process.
const roleEnv = "SHM_TEST_ROLE"

func TestMain(m *testing.M) {
	if os.Getenv(roleEnv) == "unguarded" {
		faultUnguarded()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// kinds are the two sorts of memory that the same tests run on: the race detector sees only the heap.
var kinds = []struct {
	name string
	make func(t testing.TB, size uint64) *shm.Region
}{
	{"heap", func(_ testing.TB, size uint64) *shm.Region { return shm.NewHeap(int(size)) }},
	{"memfd", func(t testing.TB, size uint64) *shm.Region {
		t.Helper()
		r, err := shm.NewMemfd("shm-test", size)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		})
		return r
	}},
}

func onEachKind(t *testing.T, f func(t *testing.T, open func(size uint64) *shm.Region)) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			f(t, func(size uint64) *shm.Region { return k.make(t, size) })
		})
	}
}

// memfd returns an unsealed memfd of size bytes, as a peer would pass it, closed by the test's cleanup.
func memfd(t testing.TB, size int64) int {
	t.Helper()
	fd, err := unix.MemfdCreate("shm-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	return fd
}

// held counts this process's descriptors and its mappings of the memfds of these tests.
func held(t testing.TB) (fds, maps int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if strings.Contains(lines.Text(), "memfd:shm-test") {
			maps++
		}
	}
	return len(entries), maps
}

// notHeldMore fails the test if it ends with more descriptors or mappings than it began with. It is
// called first, so that its check runs after every other cleanup.
func notHeldMore(t testing.TB) {
	t.Helper()
	fds, maps := held(t)
	t.Cleanup(func() {
		if f, m := held(t); f > fds || m > maps {
			t.Errorf("leak: %d descriptors and %d mappings at first, %d and %d at the end", fds, maps, f, m)
		}
	})
}
