package inproc_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/inproc"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

var ctx = context.Background()

// patience is longer than anything takes that works, under the race detector on a busy machine.
const patience = time.Minute

// name is the controller's, in place of a socket.
const name = "a"

// serve starts a mediator without sockets, until the test ends.
func serve(t testing.TB, c hostmed.Config) *hostmed.Mediator {
	t.Helper()
	c.NoSockets, c.Logger = true, testrig.Log(t)
	m, err := hostmed.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("shutdown: %v", err)
		}
	})
	return m
}

// one is the configuration of a single controller.
func one(c hostmed.ControllerConfig) hostmed.Config {
	c.Socket = name
	if c.Namespaces == nil {
		c.Namespaces = []string{"mem:size=32MiB"}
	}
	return hostmed.Config{Controllers: []hostmed.ControllerConfig{c}}
}

// small are options for tests: little memory, since the race detector keeps several times as much of its own.
func small() guestdrv.Options {
	return guestdrv.Options{DMASize: 8 << 20, Queues: 2, MaxQueuePairs: 4, QueueDepth: 32, Timeout: patience}
}

// open drives the controller behind socket until the test ends.
func open(t testing.TB, m *hostmed.Mediator, socket string, o guestdrv.Options, wrap ...func(device.Device) device.Device) *guestdrv.Controller {
	t.Helper()
	d, err := inproc.Open(m, socket)
	if err != nil {
		t.Fatal(err)
	}
	var dev device.Device = d
	for _, w := range wrap {
		dev = w(dev)
	}
	c, err := guestdrv.OpenDevice(ctx, dev, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func namespace(t testing.TB, c *guestdrv.Controller, nsid uint32) *guestdrv.Namespace {
	t.Helper()
	ns, err := c.Namespace(nsid)
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// randomBytes returns n bytes that only seed has.
func randomBytes(seed uint64, n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(n), byte(n >> 8), byte(n >> 16)}).Read(p)
	return p
}

// silent is a device without interrupts.
type silent struct{ device.Device }

func (silent) MaxInterrupts() int { return 0 }

// variant is one way in which driver and controller can meet.
type variant struct {
	name      string
	hostmed   hostmed.ControllerConfig
	workers   int // 0: one
	guestdrv  func(*guestdrv.Options)
	wrap      func(device.Device) device.Device
	doorbells string // as the driver calls them
}

// driven is an open controller, and how it was opened.
type driven struct {
	*guestdrv.Controller
	variant
}

func variants() []variant {
	mmio := func(o *guestdrv.Options) { o.Doorbells = guestdrv.DoorbellsMMIO }
	poll := func(d device.Device) device.Device { return silent{d} }
	return []variant{
		{name: "shadow", doorbells: "shadow"},
		{name: "shadow, two workers", workers: 2, doorbells: "shadow"},
		{name: "shadow of 2014", guestdrv: func(o *guestdrv.Options) { o.Vendor2014 = true }, doorbells: "shadow"},
		{name: "shadow, not used", guestdrv: mmio, doorbells: "mmio"},
		{name: "shadow, polled", wrap: poll, doorbells: "shadow"},
		{name: "shadow, stride 64", hostmed: hostmed.ControllerConfig{DSTRD: 4}, doorbells: "shadow"},
		{name: "shadow, SGL", guestdrv: func(o *guestdrv.Options) { o.SGL = true }, doorbells: "shadow"},
		{name: "shadow, 4 KiB blocks", hostmed: hostmed.ControllerConfig{Namespaces: []string{"mem:size=32MiB,lba=4096"}}, doorbells: "shadow"},
		{name: "shadow, queues of 2", hostmed: hostmed.ControllerConfig{Depth: 2}, doorbells: "shadow"},
		{name: "shadow, one queue", hostmed: hostmed.ControllerConfig{Queues: 1}, doorbells: "shadow"},
		{name: "shadow, MDTS 8 KiB", hostmed: hostmed.ControllerConfig{MDTS: 8 << 10}, doorbells: "shadow"},
		{name: "trap", hostmed: hostmed.ControllerConfig{Doorbells: hostmed.Trap}, doorbells: "mmio"},
		{name: "trap, polled", hostmed: hostmed.ControllerConfig{Doorbells: hostmed.Trap}, wrap: poll, doorbells: "mmio"},
		{name: "trap, stride 64", hostmed: hostmed.ControllerConfig{Doorbells: hostmed.Trap, DSTRD: 4}, doorbells: "mmio"},
		{name: "mmap", hostmed: hostmed.ControllerConfig{Doorbells: hostmed.Mmap}, doorbells: "mmap"},
	}
}

func (v variant) open(t *testing.T) *guestdrv.Controller {
	t.Helper()
	cfg := one(v.hostmed)
	for range v.workers {
		cfg.CPUs = append(cfg.CPUs, -1)
	}
	o := small()
	if v.guestdrv != nil {
		v.guestdrv(&o)
	}
	var wraps []func(device.Device) device.Device
	if v.wrap != nil {
		wraps = append(wraps, v.wrap)
	}
	c := open(t, serve(t, cfg), name, o, wraps...)
	if c.Doorbells() != v.doorbells {
		t.Errorf("doorbells %q, want %q", c.Doorbells(), v.doorbells)
	}
	return c
}

// TestDriverOnController is every behaviour in every way in which the two can meet.
func TestDriverOnController(t *testing.T) {
	behaviours := []struct {
		name string
		test func(*testing.T, driven)
	}{
		{"identify", identify},
		{"many goroutines", manyGoroutines},
		{"discard and zeroes", discardAndZeroes},
		{"compare", compare},
		{"pairs", pairs},
		{"status errors", statusErrors},
		{"cancel", cancelled},
		{"close under load", closeUnderLoad}, // the last
	}
	for _, v := range variants() {
		t.Run(v.name, func(t *testing.T) {
			c := driven{v.open(t), v}
			for _, b := range behaviours {
				t.Run(b.name, func(t *testing.T) { b.test(t, c) })
			}
		})
	}
}

func TestAttachIsExclusive(t *testing.T) {
	m := serve(t, one(hostmed.ControllerConfig{}))
	if _, err := inproc.Open(m, "b"); err == nil {
		t.Error("attached to nothing")
	}
	for range 3 {
		d, err := inproc.Open(m, name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := inproc.Open(m, name); err == nil {
			t.Error("two clients")
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if _, err := d.Read32(nvme.RegCSTS); !errors.Is(err, guestdrv.ErrGone) {
			t.Errorf("read after Close: %v", err)
		}
	}
}

// TestSocketAndAttach has a client on the socket and wants one in the process, and the other way round.
func TestSocketAndAttach(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	m, err := hostmed.New(hostmed.Config{Logger: testrig.Log(t), Controllers: []hostmed.ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=1MiB"}}}})
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, m.Run)
	c, err := guestdrv.Open(ctx, "vfio-user:"+socket, small())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := inproc.Open(m, socket); err == nil {
		t.Error("attached beside a client on the socket")
	}
	c.Close()
	// The mediator comes to see that the connection has ended.
	d, err := inproc.Open(m, socket)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if c, err := guestdrv.Open(ctx, "vfio-user:"+socket, small()); err == nil {
		c.Close()
		t.Error("a client on the socket beside one in the process")
	}
}

// TestMediatorEnds closes hostmed under a driver that works.
func TestMediatorEnds(t *testing.T) {
	m := serve(t, one(hostmed.ControllerConfig{}))
	c := open(t, m, name, small())
	ns := namespace(t, c, 1)
	failed := make(chan error, 4)
	for i := range cap(failed) {
		go func() {
			p := make([]byte, 64<<10)
			for {
				if _, err := ns.WriteAt(p, int64(i)<<20); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	time.Sleep(20 * time.Millisecond)
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	for range cap(failed) {
		if err := <-failed; !errors.Is(err, guestdrv.ErrGone) {
			t.Errorf("got %v", err)
		}
	}
}
