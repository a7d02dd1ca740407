package vfiouser

import (
	"fmt"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	// The runtime's poller has descriptors of its own from its first use on: now, so that
	// checkFDs does not see them come.
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	r.Close()
	w.Close()
	goleak.VerifyTestMain(m)
}

// patience is how long a test waits for what must come, however busy the machine is.
const patience = 30 * time.Second

// checkFDs fails the test if it ends with another number of open descriptors than it
// has now. Call it first: cleanups run in reverse.
func checkFDs(t testing.TB) {
	t.Helper()
	before := openFDs(t)
	t.Cleanup(func() {
		if after := openFDs(t); after != before {
			t.Errorf("%d descriptors open, %d at the start", after, before)
		}
	})
}

func openFDs(t testing.TB) int {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(dir)
}

// socketPair returns the two ends of a connection, both non-blocking.
func socketPair(t testing.TB) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fds[0], fds[1]
}

func closeFD(t testing.TB, fd int) {
	t.Helper()
	if err := unix.Close(fd); err != nil {
		t.Errorf("close %d: %v", fd, err)
	}
}

// memFDs returns n new memory files, closed by the test's cleanup.
func memFDs(t testing.TB, n int) []int {
	t.Helper()
	fds := make([]int, n)
	for i := range fds {
		fd, err := unix.MemfdCreate("vfiouser-test", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { closeFD(t, fd) })
		fds[i] = fd
	}
	return fds
}

func inode(t testing.TB, fd int) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatalf("fstat %d: %v", fd, err)
	}
	return st.Ino
}

func sameFiles(t testing.TB, got, want []int) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d descriptors, want %d", len(got), len(want))
	}
	for i := range got {
		if inode(t, got[i]) != inode(t, want[i]) {
			t.Fatalf("descriptor %d is another file", i)
		}
	}
}

// fakeDevice is a PCI function with two BARs and a configuration space, backed by
// bytes. It writes down every call that changes something.
type fakeDevice struct {
	mu      sync.Mutex
	log     []string
	mem     map[uint32][]byte
	regions map[uint32]RegionInfo
	irqs    map[uint32]IRQInfo
	info    DeviceInfo
	held    []int             // descriptors it was given
	vectors map[[2]uint32]int // eventfds by index and vector
	fail    error             // returned by everything while set
	stuck   chan struct{}     // a region read waits until it is closed; nil: it does not
}

func newFakeDevice() *fakeDevice {
	d := &fakeDevice{
		mem:     map[uint32][]byte{0: make([]byte, 0x4000), 7: make([]byte, 4096), 4: make([]byte, 0x1000)},
		regions: map[uint32]RegionInfo{},
		irqs: map[uint32]IRQInfo{
			IRQINTx: {Flags: IRQEventFD | IRQMaskable | IRQAutomasked, Count: 1},
			IRQMSIX: {Flags: IRQEventFD | IRQNoResize, Count: 33},
			IRQErr:  {Flags: IRQEventFD, Count: 1},
		},
		info:    DeviceInfo{Flags: DeviceReset | DevicePCI, NumRegions: NumRegions, NumIRQs: NumIRQs},
		vectors: map[[2]uint32]int{},
	}
	for i, m := range d.mem {
		d.regions[i] = RegionInfo{Flags: RegionRead | RegionWrite, Size: uint64(len(m)), FD: -1}
	}
	return d
}

// mapDoorbells makes page 1 of BAR0 mappable in fd.
func (d *fakeDevice) mapDoorbells(fd int) {
	r := d.regions[0]
	r.Flags |= RegionMmap
	r.Areas = []MmapArea{{Offset: 0x1000, Size: 0x1000}}
	r.FD = fd
	d.regions[0] = r
}

func (d *fakeDevice) note(format string, args ...any) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log = append(d.log, fmt.Sprintf(format, args...))
	return d.fail
}

func (d *fakeDevice) calls() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	log := d.log
	d.log = nil
	return log
}

func (d *fakeDevice) setFail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = err
}

func (d *fakeDevice) hold(fds ...int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.held = append(d.held, fds...)
}

func (d *fakeDevice) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	closeAll(d.held)
	d.held = nil
}

func (d *fakeDevice) Info() DeviceInfo { return d.info }

func (d *fakeDevice) RegionInfo(i uint32) (RegionInfo, bool) {
	r, ok := d.regions[i]
	return r, ok
}

func (d *fakeDevice) IRQInfo(i uint32) (IRQInfo, bool) {
	r, ok := d.irqs[i]
	return r, ok
}

func (d *fakeDevice) SetIRQs(s SetIRQs, fds []int) error {
	d.hold(fds...)
	d.mu.Lock()
	for i, fd := range fds {
		d.vectors[[2]uint32{s.Index, s.Start + uint32(i)}] = fd
	}
	d.mu.Unlock()
	if s.DisableAll() {
		return d.note("irq %d disable", s.Index)
	}
	return d.note("irq %d flags %#x [%d,+%d) fds %d bools %x", s.Index, s.Flags, s.Start, s.Count, len(fds), s.Bools)
}

func (d *fakeDevice) DMAMap(m DMAMap, fd int) error {
	kind := "fd"
	if fd < 0 {
		kind = "none"
	} else {
		d.hold(fd)
	}
	return d.note("map %#x+%#x @%#x flags %d %s", m.IOVA, m.Size, m.Offset, m.Flags, kind)
}

func (d *fakeDevice) DMAUnmap(iova, size uint64, flags uint32) error {
	return d.note("unmap %#x+%#x flags %d", iova, size, flags)
}

func (d *fakeDevice) RegionRead(i uint32, off uint64, p []byte) error {
	d.mu.Lock()
	stuck := d.stuck
	d.mu.Unlock()
	if stuck != nil {
		<-stuck
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		return d.fail
	}
	copy(p, d.mem[i][off:])
	return nil
}

func (d *fakeDevice) RegionWrite(i uint32, off uint64, p []byte) error {
	d.mu.Lock()
	copy(d.mem[i][off:], p)
	d.mu.Unlock()
	return d.note("write %d %#x %x", i, off, p)
}

func (d *fakeDevice) Reset() error { return d.note("reset") }

// serve is a server's loop for one client: it ends when the client leaves or breaks the
// protocol, and closes fd.
func serve(fd int, dev Device) error {
	defer unix.Close(fd)
	r := NewReceiver(fd, 0)
	defer r.Close()
	d := NewDispatcher(dev, DefaultCapabilities())
	readable := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		eof, err := r.Fill()
		if err == unix.EAGAIN {
			if _, err := unix.Poll(readable, -1); err != nil && err != unix.EINTR {
				return err
			}
			continue
		}
		if eof || err != nil {
			return err
		}
		for {
			m, ok, err := r.Next()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			reply, send, err := d.Handle(m)
			if err != nil {
				return err
			}
			if send {
				if err := SendMessage(fd, reply.Header, reply.Payload, reply.FDs); err != nil {
					return err
				}
			}
		}
	}
}

// testDevice is a device and the end of it.
type testDevice interface {
	Device
	close()
}

// startServer runs serve in a goroutine and returns the client's end. The cleanup waits
// for the server, and so needs the client's end closed before.
func startServer(t testing.TB, dev testDevice) (fd int, result <-chan error) {
	t.Helper()
	a, b := socketPair(t)
	ended, out := make(chan struct{}), make(chan error, 1)
	go func() {
		defer close(ended)
		out <- serve(b, dev)
	}()
	t.Cleanup(func() {
		<-ended
		dev.close()
	})
	return a, out
}

// unixConn makes a net.UnixConn of fd.
func unixConn(t testing.TB, fd int) *net.UnixConn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return conn.(*net.UnixConn)
}

func newTestClient(t testing.TB, fd int, cfg ClientConfig) *Client {
	t.Helper()
	c, err := NewClient(unixConn(t, fd), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
