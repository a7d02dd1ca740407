package faulty_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/device/faulty"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var ctx = context.Background()

// open drives a simple controller through a wrapper, until the test ends.
func open(t *testing.T, o guestdrv.Options) (*faulty.Device, *guestdrv.Controller, *nvmetest.Device) {
	t.Helper()
	dev := nvmetest.New(nvmetest.Config{})
	t.Cleanup(dev.Close)
	f := faulty.Wrap(dev.InProc())
	o.DMASize, o.Queues, o.Doorbells = 8<<20, 1, guestdrv.DoorbellsMMIO
	c, err := guestdrv.OpenDevice(ctx, f, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return f, c, dev
}

func read(c *guestdrv.Controller) error {
	ns, err := c.Namespace(1)
	if err == nil {
		_, err = ns.ReadAt(make([]byte, 4096), 0)
	}
	return err
}

func TestNoFault(t *testing.T) {
	f, c, dev := open(t, guestdrv.Options{})
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	want, got := bytes.Repeat([]byte("0123456789abcdef"), 8192), make([]byte, 128<<10)
	if _, err := ns.WriteAt(want, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.ReadAt(got, 4096); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read other data than was written: %v", err)
	}
	if dev.Interrupts.Load() == 0 || f.Err() != nil {
		t.Errorf("%d interrupts, %v", dev.Interrupts.Load(), f.Err())
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := f.Read32(nvme.RegCSTS); !errors.Is(err, device.ErrGone) {
		t.Errorf("read after Close: %v", err)
	}
	select {
	case <-f.Done():
	default:
		t.Error("Done is open after Close")
	}
}

func csts(t *testing.T, f *faulty.Device) nvme.CSTS {
	t.Helper()
	v, err := f.Read32(nvme.RegCSTS)
	if err != nil {
		t.Fatal(err)
	}
	return nvme.CSTS(v)
}

func TestStatus(t *testing.T) {
	dev := nvmetest.New(nvmetest.Config{})
	defer dev.Close()
	f := faulty.Wrap(dev.InProc())
	defer f.Close()
	steps := []func(){
		func() { _ = f.Write32(nvme.RegCC, 0) },
		func() { _ = f.Reset() },
		f.Repair,
	}
	for until := faulty.Disabled; until <= faulty.Repaired; until++ {
		f.Fail(until)
		if err := f.FreezeReady(until); err != nil {
			t.Fatal(err)
		}
		for i, step := range steps {
			_ = f.Write32(nvme.RegCC, uint32(nvme.CC(0).WithEN(true))) // without queues: a fatal error, until it is disabled
			want := i < int(until)
			if s := csts(t, f); want && !s.CFS() || s.RDY() {
				t.Errorf("until %d, before step %d: %v", until, i, s)
			}
			step()
			_ = f.Write32(nvme.RegCC, 0)
			if s := csts(t, f); s.CFS() != (i+1 < int(until)) {
				t.Errorf("until %d, after step %d: %v", until, i, s)
			}
		}
	}
}

func TestUnplug(t *testing.T) {
	f, c, _ := open(t, guestdrv.Options{})
	f.Unplug()
	if v, err := f.Read64(nvme.RegCAP); v != 1<<64-1 || err != nil {
		t.Errorf("CAP %#x, %v", v, err)
	}
	if err := read(c); !errors.Is(err, guestdrv.ErrGone) {
		t.Errorf("got %v", err)
	}
	select {
	case <-f.Done():
		t.Error("Done is closed")
	default:
	}
}

func TestEnd(t *testing.T) {
	f, c, _ := open(t, guestdrv.Options{})
	why := errors.New("somebody stumbled over the cable")
	f.End(why)
	for c.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	if err := read(c); !errors.Is(err, guestdrv.ErrGone) || !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}

// under is a device on which a write is under way when the cable is pulled.
type under struct {
	device.Device
	pull func()
}

func (u under) Write32(uint32, uint32) error {
	u.pull()
	return errors.New("the connection is closed")
}

// TestMeanwhile: what was under way when the device ended fails as everything does afterwards.
func TestMeanwhile(t *testing.T) {
	why := errors.New("somebody stumbled over the cable")
	for name, strike := range map[string]func(f *faulty.Device){
		"ended":     func(f *faulty.Device) { f.End(why) },
		"unplugged": (*faulty.Device).Unplug,
	} {
		dev := nvmetest.New(nvmetest.Config{})
		t.Cleanup(dev.Close)
		var f *faulty.Device
		f = faulty.Wrap(under{dev.InProc(), func() { strike(f) }})
		t.Cleanup(func() { f.Close() })
		err := f.Write32(nvme.RegAQA, 1)
		if ended := name == "ended"; errors.Is(err, why) != ended || errors.Is(err, device.ErrGone) != ended || !ended && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestHooks has each hook see what it is for.
func TestHooks(t *testing.T) {
	f, c, _ := open(t, guestdrv.Options{})
	var rings, commands, interrupts, reads, resets atomic.Int32
	var opcode atomic.Uint32
	f.SetHooks(faulty.Hooks{
		Read:      func(_ uint32, v uint64) (uint64, error) { reads.Add(1); return v, nil },
		Write:     func(off uint32, _ uint64) bool { return off != nvme.RegAQA },
		Ring:      func(off, _ uint32) bool { rings.Add(1); return true },
		Interrupt: func(int) bool { interrupts.Add(1); return true },
		Command: func(qid uint16, cmd *nvme.Command) {
			if qid != 0 {
				commands.Add(1)
				opcode.Store(uint32(cmd.Opcode))
			}
		},
		Reset: func() error { resets.Add(1); return errors.New("no") },
	})
	if err := read(c); err != nil {
		t.Fatal(err)
	}
	if rings.Load() == 0 || commands.Load() != 1 || opcode.Load() != nvme.IORead {
		t.Errorf("%d doorbells, %d commands, opcode %#x", rings.Load(), commands.Load(), opcode.Load())
	}
	if csts(t, f); reads.Load() == 0 {
		t.Error("no register was seen")
	}
	if err := f.Write32(nvme.RegAQA, 7); err != nil {
		t.Error(err)
	}
	if v, err := f.Read32(nvme.RegAQA); v == 7 || err != nil {
		t.Errorf("a write that the hook dropped was done: %#x, %v", v, err)
	}
	if err := f.Reset(); err == nil || resets.Load() != 1 {
		t.Errorf("reset: %v", err)
	}
	f.Repair()
	if err := read(c); err != nil {
		t.Error(err)
	}
	if commands.Load() != 1 {
		t.Error("a hook was called after Repair")
	}
}

// TestLostInterrupts has the driver find completions by looking.
func TestLostInterrupts(t *testing.T) {
	f, c, _ := open(t, guestdrv.Options{Timeout: 4 * time.Second}) // it looks eight times as often
	f.SetHooks(faulty.Hooks{Interrupt: func(int) bool { return false }})
	for range 4 { // half a second each
		if err := read(c); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAlteredIdentifier has the controller complete a command that nobody sent.
func TestAlteredIdentifier(t *testing.T) {
	f, c, _ := open(t, guestdrv.Options{})
	f.SetHooks(faulty.Hooks{Command: func(qid uint16, cmd *nvme.Command) {
		if qid != 0 {
			cmd.CID ^= 0x4000
		}
	}})
	if err := read(c); !errors.Is(err, guestdrv.ErrProtocol) {
		t.Errorf("got %v", err)
	}
}
