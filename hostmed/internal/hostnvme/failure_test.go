package hostnvme

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/pcifn"
	"github.com/shadowbell/shadowbell/shared/driver/admin"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// gate makes hooks do something else from some time on.
type gate struct{ n atomic.Int64 }

// after arms the gate: it is open from the n-th pass on.
func (g *gate) after(n int64) { g.n.Store(n + 1) }

// shut makes everything as it was.
func (g *gate) shut() { g.n.Store(0) }

// pass says whether the gate is open.
func (g *gate) pass() bool {
	switch n := g.n.Load(); n {
	case 0:
		return false
	case 1:
		return true
	default:
		g.n.CompareAndSwap(n, n-1)
		return false
	}
}

// ends watches namespace 1 and counts what it is told.
func ends(d *Device) (gone *atomic.Int32, cancel func()) {
	gone = new(atomic.Int32)
	return gone, d.Watch(1, func(e Event) {
		if e == Gone {
			gone.Add(1)
		}
	})
}

// TestFailures goes through what no reset helps against. Everything ends, the device is let go, and the address can be opened again.
func TestFailures(t *testing.T) {
	type fault struct{ ones, unready, silent gate }
	for name, c := range map[string]struct {
		cause func(m *slot0, f *fault)
		why   error
		says  string
	}{
		"connection ends":                    {cause: func(m *slot0, _ *fault) { m.last().Gone() }, why: device.ErrGone},
		"the kernel's wish":                  {cause: func(m *slot0, _ *fault) { m.last().Wanted() }, why: device.ErrGone, says: "the kernel wants it back"},
		"all ones":                           {cause: func(_ *slot0, f *fault) { f.ones.after(0) }, why: device.ErrGone},
		"never ready again":                  {cause: func(m *slot0, f *fault) { f.unready.after(0); m.ctl.Fault() }, why: queue.ErrTimeout, says: "it was reset because of"},
		"admin commands are lost in a reset": {cause: func(m *slot0, f *fault) { f.silent.after(2); m.ctl.Fault() }, why: queue.ErrTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			var f fault
			m := plug(t, nvmetest.Config{Hooks: nvmetest.Hooks{
				Read: func(off uint32, v uint64) uint64 {
					switch {
					case f.ones.pass():
						return ^uint64(0)
					case off == nvme.RegCSTS && f.unready.n.Load() != 0:
						return uint64(nvme.CSTS(v).WithRDY(false))
					}
					return v
				},
				Command: func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
					if qid == 0 && f.silent.pass() {
						return nvmetest.Verdict{Action: nvmetest.Drop}
					}
					return nvmetest.Verdict{}
				},
			}})
			d, err := OpenOn(context.Background(), m, "01:00.0", quick())
			if err != nil {
				t.Fatal(err)
			}
			gone, cancel := ends(d)
			u := newUser(t, d, 8)
			u.moves()
			c.cause(m, &f)
			u.lost(c.why)
			await(t, "the event", func() bool { return gone.Load() == 1 })
			if err := d.Err(); !errors.Is(err, c.why) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("failed with %v", err)
			}
			if _, _, err := d.Exec(context.Background(), nvme.Command{Opcode: nvme.AdminAbort}, nil); !errors.Is(err, c.why) {
				t.Errorf("an admin command: %v", err)
			}
			if _, err := d.NewPair(context.Background(), PairConfig{Depth: 3}, u); !errors.Is(err, c.why) {
				t.Errorf("a queue pair: %v", err)
			}
			if err := d.Reset(context.Background()); !errors.Is(err, c.why) {
				t.Errorf("a reset: %v", err)
			}
			late := false
			d.Watch(1, func(e Event) { late = e == Gone })()
			if !late {
				t.Error("who watches what has failed is not told")
			}
			if n := m.ctl.Reached(); n != 0 {
				t.Errorf("the device still has %d pieces of memory", n)
			}
			f.ones.shut()
			f.unready.shut()
			f.silent.shut()
			// While the failed one is not closed yet.
			again := opened(t, m, quick())
			if again == d {
				t.Fatal("the one that has failed")
			}
			next := newUser(t, again, 8)
			next.moves()
			next.stop()
			cancel()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			if gone.Load() != 1 {
				t.Errorf("told %d times", gone.Load())
			}
		})
	}
}

// TestAllOnesAnywhere takes the device away at each read of a register, in Open and in a reset.
func TestAllOnesAnywhere(t *testing.T) {
	var ones gate
	m := plug(t, nvmetest.Config{Hooks: nvmetest.Hooks{Read: func(_ uint32, v uint64) uint64 {
		if ones.pass() {
			return ^uint64(0)
		}
		return v
	}}})
	o := quick()
	o.Timeout = time.Second // looks are rare
	opens := int64(0)
	for ; ; opens++ {
		ones.after(opens)
		d, err := OpenOn(context.Background(), m, "01:00.0", o)
		ones.shut()
		if err == nil {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			break
		}
		if !errors.Is(err, device.ErrGone) || !strings.HasPrefix(err.Error(), "0000:01:00.0: ") {
			t.Fatalf("after %d reads: %v", opens, err)
		}
		if n := m.ctl.Reached(); n != 0 {
			t.Fatalf("after %d reads: the device still has %d pieces of memory", opens, n)
		}
	}
	if opens < 4 {
		t.Errorf("only %d reads in Open", opens)
	}
	resets := int64(0)
	for ; ; resets++ {
		d, err := OpenOn(context.Background(), m, "01:00.0", o)
		if err != nil {
			t.Fatal(err)
		}
		u := newUser(t, d, 8)
		u.moves()
		ones.after(resets)
		err = d.Reset(context.Background())
		ones.shut()
		if err == nil {
			u.moves()
			u.stop()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			break
		}
		u.lost(device.ErrGone)
		if err := d.Close(); err != nil || m.ctl.Reached() != 0 {
			t.Fatalf("after %d reads: %v, the device still has %d pieces of memory", resets, err, m.ctl.Reached())
		}
	}
	if resets < 4 {
		t.Errorf("only %d reads in a reset", resets)
	}
	goleakAll(t)
}

// goleakAll finds goroutines that a Device has left.
func goleakAll(t *testing.T) {
	t.Helper()
	if err := goleak.Find(goleak.IgnoreCurrent()); err != nil {
		t.Error(err)
	}
}

// TestResetsThatDoNotHelp ends a device that completes nothing.
func TestResetsThatDoNotHelp(t *testing.T) {
	var dead atomic.Bool
	m := plug(t, nvmetest.Config{Hooks: nvmetest.Hooks{Command: func(qid uint16, _ *nvme.Command) nvmetest.Verdict {
		if qid != 0 && dead.Load() {
			return nvmetest.Verdict{Action: nvmetest.Drop}
		}
		return nvmetest.Verdict{}
	}}})
	o := quick()
	o.Timeout = 50 * time.Millisecond
	d := opened(t, m, o)
	u := newUser(t, d, 8)
	u.moves()
	dead.Store(true)
	u.lost(queue.ErrTimeout)
	if s := d.Stats(); s.Resets < admin.MaxFutile || s.Resets > admin.MaxFutile+1 || !strings.Contains(d.Err().Error(), "resets in a row") {
		t.Errorf("%+v: %v", s, d.Err())
	}
}

// TestDeviceThatBreaksTheProtocol has some resets, and is then not believed any more.
func TestDeviceThatBreaksTheProtocol(t *testing.T) {
	m := plug(t, nvmetest.Config{})
	d := opened(t, m, quick())
	u := newUser(t, d, 8)
	for n := uint64(1); n <= maxBroken; n++ {
		u.moves()
		m.ctl.PostRaw(1, ring.MakeEntry(0, 0, 1, 0xFFF0, nvme.StatusSuccess))
		await(t, "a reset", func() bool { s := d.Stats(); return s.Resets == n && s.State == "live" })
	}
	u.moves()
	m.ctl.PostRaw(1, ring.MakeEntry(0, 0, 1, 0xFFF0, nvme.StatusSuccess))
	u.lost(queue.ErrProtocol)
}

// TestAnotherControllerAfterAReset is refused: it has other blocks.
func TestAnotherControllerAfterAReset(t *testing.T) {
	var other atomic.Bool
	m := plug(t, nvmetest.Config{Hooks: nvmetest.Hooks{Identify: func(cmd *nvme.Command, data []byte) {
		if other.Load() && uint8(cmd.CDW10) == uint8(nvme.CNSController) {
			data[4] = 'X' // of the serial number
		}
	}}})
	d := opened(t, m, quick())
	u := newUser(t, d, 8)
	u.moves()
	other.Store(true)
	if err := d.Reset(context.Background()); !errors.Is(err, admin.ErrChanged) {
		t.Errorf("got %v", err)
	}
	u.lost(admin.ErrChanged)
}

// TestNamespacesComeAndGo has the controller tell of changes, and a reset find some.
func TestNamespacesComeAndGo(t *testing.T) {
	all := func(blocks uint64, guid byte) []nvmetest.Namespace {
		return []nvmetest.Namespace{{Blocks: blocks, LBADS: 9, GUID: 1}, {Blocks: 100, LBADS: 9, GUID: guid}, {Blocks: 100, LBADS: 9, GUID: 9}}
	}
	m := plug(t, nvmetest.Config{Namespaces: all(1000, 2)})
	d := opened(t, m, quick())
	events := make(chan string, 16)
	for nsid := range uint32(4) {
		defer d.Watch(nsid, func(e Event) { events <- fmt.Sprint(nsid, []string{" changed", " gone"}[e]) })()
	}
	told := func(want ...string) {
		t.Helper()
		for _, w := range want {
			select {
			case e := <-events:
				if e != w {
					t.Errorf("%s, want %s", e, w)
				}
			case <-time.After(patience):
				t.Fatalf("nobody was told: %s", w)
			}
		}
	}
	m.ctl.SetNamespaces(all(2000, 2)...)
	notice := nvme.MakeAsyncEvent(nvme.EventNotice, nvme.EventNoticeNamespace, nvme.LogChangedNamespaces)
	await(t, "a request for events", func() bool { return m.ctl.Event(notice) })
	told("1 changed")
	if id, err := d.Namespace(1); err != nil || id.NSZE != 2000 {
		t.Errorf("%v", err)
	}
	m.ctl.SetNamespaces(all(2000, 3)...) // another in the place of 2
	if err := d.Reset(context.Background()); err != nil {
		t.Fatal(err)
	}
	told("2 gone")
	gone := all(3000, 4)
	gone[1].Absent = true
	m.ctl.SetNamespaces(gone...)
	if err := d.Reset(context.Background()); err != nil {
		t.Fatal(err)
	}
	told("1 changed")
	if n := len(d.Namespaces()); n != 2 {
		t.Errorf("%d namespaces", n)
	}
	select {
	case e := <-events:
		t.Errorf("too much: %s", e)
	default:
	}
}

// TestPairsComeAndGoUnderResets makes and closes pairs while the controller is reset all the time.
func TestPairsComeAndGoUnderResets(t *testing.T) {
	m := plug(t, nvmetest.Config{})
	o := quick()
	o.Timeout = patience
	d := opened(t, m, o)
	var wg sync.WaitGroup
	end := make(chan struct{})
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				u := newUser(t, d, 4)
				u.await("some commands", func() bool { return u.ended > 10 })
				u.stop()
			}
		})
	}
	for range 30 {
		if err := d.Reset(context.Background()); err != nil {
			t.Error(err)
			break
		}
	}
	close(end)
	wg.Wait()
	if s := d.Stats(); s.Pairs != 0 || s.State != "live" {
		t.Errorf("%+v", s)
	}
	// All of them are there again.
	var us []*user
	for range d.Stats().MaxPairs {
		us = append(us, newUser(t, d, 1))
	}
	if _, err := d.NewPair(context.Background(), PairConfig{Depth: 1}, us[0]); !errors.Is(err, ErrNoPairs) {
		t.Errorf("one too many: %v", err)
	}
	for _, u := range us {
		u.moves()
		u.stop()
	}
}

// TestRemovalUnderLoad takes the device away under several users, again and again.
func TestRemovalUnderLoad(t *testing.T) {
	m := plug(t, nvmetest.Config{})
	for range 10 {
		d, err := OpenOn(context.Background(), m, "01:00.0", quick())
		if err != nil {
			t.Fatal(err)
		}
		us := []*user{newUser(t, d, 16), newUser(t, d, 16), newUser(t, d, 1)}
		for _, u := range us {
			u.moves()
		}
		m.last().Gone()
		for _, u := range us {
			u.lost(device.ErrGone)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if n := m.ctl.Reached(); n != 0 {
			t.Fatalf("the device still has %d pieces of memory", n)
		}
	}
}

// TestIsolation refuses functions that nothing keeps from memory, and says what to do, unless it is insisted on them.
func TestIsolation(t *testing.T) {
	for _, m := range []host{{}, {unsafeNoIOMMU: true}} {
		if w, err := m.choose(&pcifn.Function{Group: "7", GroupType: "DMA"}); w != vfio || err != nil {
			t.Errorf("behind an IOMMU: way %d, %v", w, err)
		}
	}
	for _, c := range []struct {
		f   pcifn.Function
		way way
		is  error
	}{
		{pcifn.Function{}, sysfs, nil},
		{pcifn.Function{Group: "0", NoIOMMU: true, Driver: "vfio-pci"}, vfioNoIOMMU, nil},
		{pcifn.Function{Address: "0000:01:00.0", Driver: "nvme"}, 0, unix.EBUSY},
	} {
		if _, err := (host{}).choose(&c.f); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "intel_iommu=on") || !strings.Contains(err.Error(), "--unsafe-no-iommu") {
			t.Errorf("%+v: %v", c.f, err)
		}
		if w, err := (host{unsafeNoIOMMU: true}).choose(&c.f); w != c.way || !errors.Is(err, c.is) {
			t.Errorf("%+v, insisted on: way %d, %v", c.f, w, err)
		}
	}
}

// TestWhatCannotBeOpened says so, and the next try is not held up.
func TestWhatCannotBeOpened(t *testing.T) {
	m := plug(t, nvmetest.Config{})
	m.away = errors.New("no such function")
	if _, err := OpenOn(context.Background(), m, "01:00.0", quick()); err == nil || err.Error() != "0000:01:00.0: no such function" {
		t.Errorf("got %v", err)
	}
	m.away = nil
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := OpenOn(ctx, m, "01:00.0", quick()); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	d := opened(t, m, quick())
	u := newUser(t, d, 1)
	u.moves()
	u.stop()
}
