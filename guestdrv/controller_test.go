package guestdrv_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

func withLog(o guestdrv.Options) (guestdrv.Options, *testrig.Buffer) {
	log := &testrig.Buffer{}
	o.Logger = hclog.New(&hclog.LoggerOptions{Output: log, Level: hclog.Debug})
	return o, log
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in %v", what, patience)
		}
	}
}

func TestIdentity(t *testing.T) {
	forAll(t, func(t *testing.T, v variant) {
		c := v.open(t, v.cfg, testOptions())
		if c.Identify().Model() != "nvmetest" || c.Version() != nvme.MakeVersion(1, 4, 0) || c.Capabilities().MQES().Count() != 1024 {
			t.Errorf("%q, %v, %v", c.Identify().Model(), c.Version(), c.Capabilities())
		}
		if pid := c.PeerPID(); strings.HasPrefix(v.name, "socket") && pid != os.Getpid() {
			t.Errorf("peer is process %d", pid)
		}
		if len(c.Namespaces()) != 1 || c.Namespaces()[0].Identify().NSZE != 16384 {
			t.Error("namespaces")
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if c.dev.Shutdowns.Load() != 1 || c.dev.Resets.Load() == 0 {
			t.Errorf("%d shutdowns, %d resets", c.dev.Shutdowns.Load(), c.dev.Resets.Load())
		}
	})
}

func TestAdminCommands(t *testing.T) {
	c := openInProc(t, nvmetest.Config{}, testOptions())
	var wg sync.WaitGroup
	for range 50 { // more than the queue holds
		wg.Go(func() {
			var id nvme.IdentifyController
			var cmd nvme.Command
			cmd.SetIdentify(nvme.CNSController, 0, 0)
			if _, err := c.Admin(ctx, &cmd, id.Bytes()[:]); err != nil || id.Model() != "nvmetest" {
				t.Errorf("%q, %v", id.Model(), err)
			}
		})
	}
	wg.Wait()
	dw0, err := c.Admin(ctx, &nvme.Command{Opcode: nvme.AdminSetFeatures, CDW10: uint32(nvme.FeatureQueues)}, nil)
	if err != nil || nvme.QueueCounts(dw0).SQs().Count() != 16 {
		t.Errorf("%#x, %v", dw0, err)
	}
	_, err = c.Admin(ctx, &nvme.Command{Opcode: 0x7F}, nil)
	var se *guestdrv.StatusError
	if !errors.As(err, &se) || !se.Admin || nvme.StatusOf(err).Code() != nvme.StatusInvalidOpcode {
		t.Errorf("unknown command: %v", err)
	}
	if _, err := c.Admin(ctx, &nvme.Command{}, make([]byte, 2<<20)); err == nil {
		t.Error("2 MiB of data")
	}
}

func TestAdminCancelled(t *testing.T) {
	var hold atomic.Bool
	cfg := nvmetest.Config{}
	cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		if qid == 0 && hold.Load() && cmd.Opcode == nvme.AdminIdentify {
			return nvmetest.Verdict{Action: nvmetest.Hold}
		}
		return nvmetest.Verdict{}
	}
	c := openInProc(t, cfg, testOptions())
	hold.Store(true)
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	var cmd nvme.Command
	cmd.SetIdentify(nvme.CNSController, 0, 0)
	if _, err := c.Admin(short, &cmd, make([]byte, 64<<10)); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	hold.Store(false)
	c.dev.Release()
	if _, err := c.Admin(ctx, &cmd, make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
}

func TestEventsAreLoggedAndAskedForAgain(t *testing.T) {
	o, log := withLog(testOptions())
	c := openInProc(t, nvmetest.Config{}, o)
	for i := range 3 {
		eventually(t, "request", func() bool {
			return c.dev.Event(nvme.MakeAsyncEvent(nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError))
		})
		eventually(t, "log", func() bool { return strings.Count(log.String(), "Invalid Doorbell Write Value") > i })
	}
	if err := namespaceRead(c); err != nil {
		t.Error(err)
	}
}

func namespaceRead(c opened) error {
	ns, err := c.Namespace(1)
	if err == nil {
		_, err = ns.ReadAt(make([]byte, 4096), 0)
	}
	return err
}

// TestIdleCostsNothing checks that nobody is woken, and no doorbell rung, while there is nothing to do.
func TestIdleCostsNothing(t *testing.T) {
	c := openInProc(t, nvmetest.Config{}, testOptions())
	if err := namespaceRead(c); err != nil {
		t.Fatal(err)
	}
	settle(t, c)
}

// settle waits until nothing goes on any more: the events are configured behind Open's back.
func settle(t *testing.T, c opened) {
	t.Helper()
	eventually(t, "quiet for 50 ms", func() bool {
		before, rings := c.Stats(), c.dev.Rings.Load()
		time.Sleep(50 * time.Millisecond)
		return fmt.Sprint(c.Stats()) == fmt.Sprint(before) && c.dev.Rings.Load() == rings
	})
}

// TestFewDoorbellsWhileBusy counts MMIO writes of a busy queue with shared pages.
func TestFewDoorbellsWhileBusy(t *testing.T) {
	c := openInProc(t, nvmetest.Config{}, testOptions())
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 32})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ios := make([]guestdrv.IO, 32)
	for i := range ios {
		ios[i] = guestdrv.IO{Op: nvme.IOFlush, NSID: 1}
	}
	for range 50 {
		if n, err := p.Submit(ios); n != 32 || err != nil {
			t.Fatal(n, err)
		}
		drain(t, p, ok(t))
	}
	if st := p.Stats(); st.Commands != 1600 || st.MMIOWrites > 100 {
		t.Errorf("%+v", st)
	}
}

func TestDoorbellModes(t *testing.T) {
	for _, tc := range []struct {
		cfg  nvmetest.Config
		mode guestdrv.DoorbellMode
		want string
	}{
		{nvmetest.Config{}, guestdrv.DoorbellsMMIO, "mmio"},
		{nvmetest.Config{Mapped: true}, guestdrv.DoorbellsMMIO, "mmap"},
		{nvmetest.Config{Mapped: true}, guestdrv.DoorbellsAuto, "shadow"},
		{nvmetest.Config{Mapped: true, Unsealed: true}, guestdrv.DoorbellsMMIO, "mmio"},
	} {
		o, log := withLog(testOptions())
		o.Doorbells = tc.mode
		c := openSocket(t, tc.cfg, o)
		if c.Doorbells() != tc.want {
			t.Errorf("%+v, %v: %q", tc.cfg, tc.mode, c.Doorbells())
		}
		if tc.mode == guestdrv.DoorbellsMMIO && c.dev.Configs.Load() != 0 {
			t.Errorf("%+v, %v: doorbell pages were shared", tc.cfg, tc.mode)
		}
		if tc.cfg.Unsealed {
			if !strings.Contains(log.String(), "F_SEAL_SHRINK") {
				t.Errorf("log: %s", log)
			}
		}
		if err := namespaceRead(c); err != nil {
			t.Errorf("%+v, %v: %v", tc.cfg, tc.mode, err)
		}
	}
}

// TestNothingIsLeftBehind counts descriptors and mappings around opening, using and closing, in good order and after the device's death.
func TestNothingIsLeftBehind(t *testing.T) {
	dev := nvmetest.New(nvmetest.Config{Mapped: true, NoShadow: true})
	defer dev.Close()
	path, remove, err := nvmetest.TempSocket()
	if err != nil {
		t.Fatal(err)
	}
	defer remove()
	srv, err := dev.Serve(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	round := func(die bool) {
		c, err := guestdrv.Open(ctx, "vfio-user:"+path, testOptions())
		if err != nil {
			t.Fatal(err)
		}
		buf, err := c.Alloc(4096)
		if err != nil {
			t.Fatal(err)
		}
		p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := namespaceRead(opened{Controller: c}); err != nil {
			t.Fatal(err)
		}
		if die {
			srv.Hangup()
		}
		c.Close()
		buf.Free()
		p.Close()
	}
	count := func() (fds, maps int) {
		dir, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return len(dir), bytes.Count(b, []byte("memfd:"))
	}
	round(false)
	round(true)
	var fds, maps int
	eventually(t, "the server has let go", func() bool { fds, maps = count(); return maps == 1 }) // its own doorbell page
	for i := range 6 {
		round(i%2 == 0)
	}
	eventually(t, fmt.Sprintf("back to %d descriptors and %d mappings", fds, maps), func() bool {
		f, m := count()
		return f <= fds && m <= maps
	})
}

// TestStress runs the plain API and a pair side by side and checks every block that is read.
func TestStress(t *testing.T) {
	forAll(t, func(t *testing.T, v variant) {
		c := v.open(t, v.cfg, testOptions())
		ns := namespace(t, c, 1)
		var wg sync.WaitGroup
		for g := range 6 {
			wg.Go(func() {
				base := int64(g) << 20
				block := make([]byte, 4096)
				for i := range int64(150) {
					off := base + i%64*4096
					binary.LittleEndian.PutUint64(block, uint64(off))
					binary.LittleEndian.PutUint64(block[4088:], uint64(i))
					if _, err := ns.WriteAt(block, off); err != nil {
						t.Error(err)
						return
					}
					clear(block)
					if _, err := ns.ReadAt(block, off); err != nil {
						t.Error(err)
						return
					}
					if binary.LittleEndian.Uint64(block) != uint64(off) || binary.LittleEndian.Uint64(block[4088:]) != uint64(i) {
						t.Errorf("offset %d generation %d: % x … % x", off, i, block[:8], block[4088:])
						return
					}
				}
			})
		}
		wg.Go(func() { runPair(t, c) })
		wg.Wait()
	})
}

func runPair(t *testing.T, c opened) {
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
	if err != nil {
		return // a device without vectors for it
	}
	defer p.Close()
	buf, err := c.Alloc(64 << 10)
	if err != nil {
		t.Error(err)
		return
	}
	defer buf.Free()
	var out [16]guestdrv.Result
	left := 400
	for left > 0 || p.Outstanding() > 0 {
		for left > 0 && p.Free() > 0 && p.Outstanding() < 16 {
			io := guestdrv.IO{Op: nvme.IORead, NSID: 1, LBA: uint64(left), Blocks: 8, IOVA: buf.IOVA() + uint64(left%16)*4096}
			if _, err := p.Submit([]guestdrv.IO{io}); err != nil {
				t.Error(err)
				return
			}
			left--
		}
		if err := p.Publish(); err != nil {
			t.Error(err)
			return
		}
		if err := p.Wait(ctx); err != nil {
			t.Error(err)
			return
		}
		if _, err := p.Reap(out[:]); err != nil {
			t.Error(err)
			return
		}
	}
}

func BenchmarkReadAt(b *testing.B) {
	for _, bytes := range []int{4096, 128 << 10} {
		for _, buffer := range []bool{true, false} {
			b.Run(fmt.Sprintf("%dk/buffer=%v", bytes>>10, buffer), func(b *testing.B) {
				c := openInProc(b, nvmetest.Config{}, testOptions())
				ns := namespace(b, c, 1)
				p := make([]byte, bytes)
				if buffer {
					buf, err := c.Alloc(bytes)
					if err != nil {
						b.Fatal(err)
					}
					defer buf.Free()
					p = buf.Bytes()
				}
				b.ReportAllocs()
				for b.Loop() {
					if _, err := ns.ReadAt(p, 0); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
