package guestdrv_test

import (
	"bytes"
	"context"
	"flag"
	"math/rand/v2"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
)

func TestMain(m *testing.M) {
	// Parallel tests are those that wait for deadlines to pass: that takes no cores.
	_ = flag.Set("test.parallel", "24")
	goleak.VerifyTestMain(m)
}

var ctx = context.Background()

// patience is longer than anything takes that works, under the race detector on a busy machine.
const patience = time.Minute

// testOptions have a small pool, and a deadline that no command misses which a device executes.
func testOptions() guestdrv.Options {
	return guestdrv.Options{DMASize: 8 << 20, Queues: 2, MaxQueuePairs: 4, QueueDepth: 32, Timeout: patience}
}

// quickOptions are for commands that do miss it. All others have to keep it on a busy machine, and those that set the controller up; who is
// aborted has a quarter of it.
func quickOptions() guestdrv.Options {
	o := testOptions()
	o.Timeout = 2 * time.Second
	o.ResetTimeout = 20 * time.Second
	return o
}

// opened is a controller and the device behind it.
type opened struct {
	*guestdrv.Controller
	dev  *nvmetest.Device
	gone func() // the device's process dies
}

// openInProc opens a device on heap memory, which the race detector sees.
func openInProc(t testing.TB, cfg nvmetest.Config, o guestdrv.Options) opened {
	t.Helper()
	dev := nvmetest.New(cfg)
	in := dev.InProc()
	c, err := guestdrv.OpenDevice(ctx, in, o)
	if err != nil {
		dev.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		dev.Close()
	})
	return opened{c, dev, in.Gone}
}

// openSocket opens a device behind a vfio-user socket, on real shared memory.
func openSocket(t testing.TB, cfg nvmetest.Config, o guestdrv.Options) opened {
	t.Helper()
	dev := nvmetest.New(cfg)
	path, remove, err := nvmetest.TempSocket()
	if err != nil {
		t.Fatal(err)
	}
	srv, err := dev.Serve(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		srv.Close()
		dev.Close()
		remove()
	})
	c, err := guestdrv.Open(ctx, "vfio-user:"+path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return opened{c, dev, srv.Hangup}
}

type opener func(testing.TB, nvmetest.Config, guestdrv.Options) opened

// variant is one way in which the two sides can meet.
type variant struct {
	name string
	open opener
	cfg  nvmetest.Config
	want string // Doorbells
}

var variants = []variant{
	{"heap/shadow", openInProc, nvmetest.Config{}, "shadow"},
	{"heap/shadow-noquiet", openInProc, nvmetest.Config{NoQuiet: true}, "shadow"},
	{"heap/mmio", openInProc, nvmetest.Config{NoShadow: true}, "mmio"},
	{"heap/mmap", openInProc, nvmetest.Config{NoShadow: true, Mapped: true}, "mmap"},
	{"heap/no-interrupts", openInProc, nvmetest.Config{Vectors: -1}, "shadow"},
	{"heap/one-vector", openInProc, nvmetest.Config{Vectors: 1}, "shadow"},
	{"socket/shadow", openSocket, nvmetest.Config{}, "shadow"},
	{"socket/mmio", openSocket, nvmetest.Config{NoShadow: true}, "mmio"},
	{"socket/mmap", openSocket, nvmetest.Config{NoShadow: true, Mapped: true}, "mmap"},
}

// forAll runs a test for each variant.
func forAll(t *testing.T, test func(t *testing.T, v variant)) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) { test(t, v) })
	}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{byte(n)})
	rng.Read(b)
	return b
}

func mustEqual(t testing.TB, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Fatal("data differs")
	}
}

func namespace(t testing.TB, c opened, nsid uint32) *guestdrv.Namespace {
	t.Helper()
	ns, err := c.Namespace(nsid)
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// spy keeps its own copies of what passes between driver and device.
type spy struct {
	device.Device
	fds []int
}

func (s *spy) Interrupts(n int) ([]int, error) {
	fds, err := s.Device.Interrupts(n)
	for _, fd := range fds {
		dup, dupErr := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if dupErr != nil {
			return nil, dupErr
		}
		s.fds = append(s.fds, dup)
	}
	return fds, err
}

func (s *spy) Unmap() error {
	for _, fd := range s.fds {
		unix.Close(fd)
	}
	s.fds = nil
	return s.Device.Unmap()
}
