package backend

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(childWithoutURing())
	}
	goleak.VerifyTestMain(m)
}

// diskDir returns a directory that is not in memory.
func diskDir(t testing.TB) string {
	t.Helper()
	for _, base := range []string{os.TempDir(), "."} {
		var sfs unix.Statfs_t
		if unix.Statfs(base, &sfs) == nil && sfs.Type != unix.TMPFS_MAGIC {
			return tempDir(t, base)
		}
	}
	t.Fatal("neither the temporary directory nor this one is on a disk")
	return ""
}

func shmDir(t testing.TB) string { return tempDir(t, "/dev/shm") }

func tempDir(t testing.TB, base string) string {
	t.Helper()
	dir, err := os.MkdirTemp(base, "shadowbell-test-")
	if err != nil {
		t.Fatal(err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// flavour is one way to keep a namespace of a given size.
type flavour struct {
	name string
	open func(t testing.TB, size uint64, lba uint32) Backend
}

// flavours are all that store what they are given.
var flavours = []flavour{
	{"mem", func(t testing.TB, size uint64, lba uint32) Backend {
		return opened(t)(OpenSpec(Spec{Kind: KindMem, Size: size, LBA: lba}, nil))
	}},
	{"direct", func(t testing.TB, size uint64, lba uint32) Backend {
		return opened(t)(OpenSpec(fileSpec(diskDir(t), size, lba), nil))
	}},
	{"buffered", func(t testing.TB, size uint64, lba uint32) Backend {
		return opened(t)(openFile(fileSpec(diskDir(t), size, lba), false))
	}},
	{"tmpfs", func(t testing.TB, size uint64, lba uint32) Backend {
		return opened(t)(OpenSpec(fileSpec(shmDir(t), size, lba), nil))
	}},
	{"tmpfs unmapped", func(t testing.TB, size uint64, lba uint32) Backend {
		b := opened(t)(OpenSpec(fileSpec(shmDir(t), size, lba), nil))
		if err := b.(*file).pages.close(); err != nil {
			t.Fatal(err)
		}
		return b
	}},
}

// devices are those of the host's, over files.
var devices = []flavour{
	{"block", func(t testing.TB, size uint64, lba uint32) Backend {
		return opened(t)(blockOverFile(t, size, Spec{Kind: KindBlock, LBA: lba}, plainFacts))
	}},
}

// spared are media with faults that nobody meets.
var spared = []flavour{
	{"faulty mem", func(t testing.TB, size uint64, lba uint32) Backend {
		return opened(t)(OpenSpec(Spec{Kind: KindMem, Size: size, LBA: lba, Faults: "drop@lba=0xffffffffffffffff"}, nil))
	}},
	{"faulty file", func(t testing.TB, size uint64, lba uint32) Backend {
		s := fileSpec(diskDir(t), size, lba)
		s.Faults = "delay=1us" // which is no fault
		return opened(t)(OpenSpec(s, nil))
	}},
}

func fileSpec(dir string, size uint64, lba uint32) Spec {
	return Spec{Kind: KindFile, Path: filepath.Join(dir, "disk.img"), Size: size, LBA: lba}
}

func opened(t testing.TB) func(Backend, error) Backend {
	t.Helper()
	return func(b Backend, err error) Backend {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		})
		return b
	}
}

func newQueue(t testing.TB, b Backend) Queue {
	t.Helper()
	q, err := b.NewQueue()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	})
	return q
}

// heapMemory, if it is set, is where guestMemory has memory from.
var heapMemory func(n int) []byte

// guestMemory returns n bytes of mapped memory, as a guest's is.
func guestMemory(t testing.TB, n int) []byte {
	t.Helper()
	if heapMemory != nil {
		return heapMemory(n)
	}
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

func seg(b []byte) Seg { return Seg{Base: &b[0], Len: uint64(len(b))} }

func read(off uint64, into ...[]byte) *Request  { return transferOf(OpRead, off, into) }
func write(off uint64, from ...[]byte) *Request { return transferOf(OpWrite, off, from) }

func transferOf(op Op, off uint64, pieces [][]byte) *Request {
	r := &Request{Op: op, Off: off, Owner: 42, Status: 0x7fff}
	for _, p := range pieces {
		r.Vec = append(r.Vec, seg(p))
		r.Len += uint64(len(p))
	}
	return r
}

// run submits reqs as one batch and waits for all of them, sleeping on the eventfd as a worker does.
func run(t testing.TB, q Queue, reqs ...*Request) {
	t.Helper()
	done := make([]*Request, len(reqs))
	n := q.Submit(reqs, done)
	deadline := time.Now().Add(30 * time.Second)
	for n < len(reqs) {
		k := q.Reap(done[n:])
		n += k
		if k > 0 {
			continue
		}
		if p, ok := q.(Poller); ok && p.Polled() {
			runtime.Gosched()
			continue
		}
		if q.EventFD() < 0 {
			t.Fatalf("%d of %d done, none to come", n, len(reqs))
		}
		p := []unix.PollFd{{Fd: int32(q.EventFD()), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, 1000); err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
		var eight [8]byte
		unix.Read(q.EventFD(), eight[:])
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d done after 30 s", n, len(reqs))
		}
	}
	seen := map[*Request]bool{}
	for _, r := range done {
		if seen[r] {
			t.Fatal("a request was given back twice")
		}
		seen[r] = true
	}
	if q.Inflight() != 0 {
		t.Fatalf("%d in flight when all are done", q.Inflight())
	}
}

func mustRun(t testing.TB, q Queue, reqs ...*Request) {
	t.Helper()
	run(t, q, reqs...)
	for _, r := range reqs {
		if r.Status != nvme.StatusSuccess {
			t.Fatalf("%v at %#x: %v", r.Op, r.Off, r.Status)
		}
		if r.Owner != 42 && r.Owner != 0 {
			t.Fatalf("the owner's field was changed")
		}
	}
}

func pattern(b []byte, seed uint64) []byte {
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1})
	src.Read(b)
	return b
}

func expect(t testing.TB, got, want []byte, what string) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %#x of %#x is %#02x, want %#02x", what, i, len(got), got[i], want[i])
		}
	}
}
