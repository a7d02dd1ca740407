package guestdrv_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// moody is a device whose mood a test changes while it runs.
type moody struct {
	cfg  nvmetest.Config
	drop atomic.Int64 // so many I/O commands are never completed
	hold atomic.Bool  // I/O commands are held, and can be aborted
	mute atomic.Bool  // admin commands are never completed

	stuck  atomic.Bool // CSTS.RDY stays 1, whatever CC says, until the function is reset
	dead   atomic.Bool // and a reset of the function fails
	asleep atomic.Bool // CSTS.RDY stays 0
	other  atomic.Bool // another serial number
}

func newMoody(cfg nvmetest.Config) *moody {
	m := &moody{cfg: cfg}
	if m.cfg.CAP == 0 {
		m.cfg.CAP = nvme.CAP(0).WithMQES(1023).WithTO(1).WithCSS(nvme.CAPCSSNVM)
	}
	m.cfg.Command = func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
		switch {
		case qid == 0 && m.mute.Load(), qid != 0 && m.drop.Add(-1) >= 0:
			return nvmetest.Verdict{Action: nvmetest.Drop}
		case qid != 0 && m.hold.Load():
			return nvmetest.Verdict{Action: nvmetest.Hold}
		}
		return nvmetest.Verdict{}
	}
	m.cfg.Read = func(off uint32, v uint64) uint64 {
		switch {
		case off == nvme.RegCSTS && m.stuck.Load():
			return v | 1
		case off == nvme.RegCSTS && m.asleep.Load():
			return v &^ 1
		}
		return v
	}
	m.cfg.Reset = func() error {
		if m.dead.Load() {
			return errors.New("no reset today")
		}
		m.stuck.Store(false)
		return nil
	}
	m.cfg.Identify = identifyController(func(id *nvme.IdentifyController) {
		if m.other.Load() {
			nvme.SetASCII(id.SN[:], "OTHER")
		}
	})
	return m
}

// TestReset gives the controller a fault, and looks at what the reader of that moment gets and whether the controller lives on.
func TestReset(t *testing.T) {
	t.Parallel()
	for row, tc := range []struct {
		name   string
		fault  func(m *moody, c opened)
		replay bool
		// The reader's command is late and can be aborted.
		aborted bool

		is     []error  // of the reader's error; none: it succeeds
		isNot  error    // what it is not
		says   []string // in it
		fails  error    // the controller, for good; nil: it lives on
		why    string   // in that error
		resets uint64
	}{
		{
			name: "a completion is lost", fault: func(m *moody, _ opened) { m.drop.Store(1) },
			is: []error{guestdrv.ErrReset, guestdrv.ErrTimeout}, says: []string{"READ nsid=1", "timed out after"}, resets: 1,
		},
		{
			name: "a completion is lost, replayed", fault: func(m *moody, _ opened) { m.drop.Store(1) }, replay: true, resets: 1,
		},
		{
			name: "it is lost twice", fault: func(m *moody, _ opened) { m.drop.Store(2) }, replay: true,
			is: []error{guestdrv.ErrReset, guestdrv.ErrTimeout}, says: []string{"READ nsid=1"}, resets: 2,
		},
		{
			name: "a late command can be aborted", fault: func(m *moody, _ opened) { m.hold.Store(true) }, aborted: true,
			is: []error{guestdrv.ErrTimeout}, isNot: guestdrv.ErrReset, says: []string{"READ nsid=1", "was aborted"},
		},
		{
			name: "CSTS.CFS", fault: func(_ *moody, c opened) { c.dev.Fault() },
			is: []error{guestdrv.ErrReset, guestdrv.ErrFatal}, says: []string{"READ nsid=1", "CFS"}, resets: 1,
		},
		{
			name: "CSTS.CFS, replayed", fault: func(_ *moody, c opened) { c.dev.Fault() }, replay: true, resets: 1,
		},
		{
			name: "it cannot be disabled", fault: func(m *moody, _ opened) { m.drop.Store(1); m.stuck.Store(true) },
			is: []error{guestdrv.ErrReset, guestdrv.ErrTimeout}, resets: 1,
		},
		{
			name: "nor can its function be reset", fault: func(m *moody, _ opened) { m.drop.Store(1); m.stuck.Store(true); m.dead.Store(true) },
			is: []error{guestdrv.ErrTimeout}, fails: guestdrv.ErrTimeout, why: "not disabled: CSTS=0x1", resets: 1,
		},
		{
			name: "it does not become ready", fault: func(m *moody, _ opened) { m.drop.Store(1); m.asleep.Store(true) },
			is: []error{guestdrv.ErrReset, guestdrv.ErrTimeout}, fails: guestdrv.ErrTimeout, why: "not ready: CSTS=0x0", resets: 3,
		},
		{
			name: "it comes back as another", fault: func(m *moody, _ opened) { m.drop.Store(1); m.other.Store(true) },
			is: []error{guestdrv.ErrReset, guestdrv.ErrTimeout}, fails: guestdrv.ErrTimeout, why: `serial number "OTHER"`, resets: 1,
		},
	} {
		for i, v := range variants {
			if tc.fails != nil && i > 0 {
				break // these take seconds, and nothing in them depends on the doorbells
			}
			if tc.fails == nil && testing.Short() && (i-row)%7 != 0 {
				continue // short: each row with a variant or two, and each variant
			}
			t.Run(tc.name+"/"+v.name, func(t *testing.T) {
				t.Parallel()
				m := newMoody(v.cfg)
				o := quickOptions()
				if tc.aborted {
					o.Timeout *= 2 // and with it the time to abort it
				}
				if tc.replay {
					o.OnReset = guestdrv.ResetReplay
				}
				c := v.open(t, m.cfg, o)
				ns := namespace(t, c, 1)
				want := randomBytes(4096)
				c.dev.Fill(1, want)
				before, configs := c.dev.Resets.Load(), c.dev.Configs.Load()
				tc.fault(m, c)
				got := make([]byte, len(want))
				begin := time.Now()
				_, err := ns.ReadAt(got, 0)
				if d := time.Since(begin); d > patience {
					t.Errorf("took %v", d)
				}
				if len(tc.is) == 0 {
					if err != nil {
						t.Fatal(err)
					}
					mustEqual(t, got, want)
				} else {
					if err == nil {
						t.Fatal("it succeeded")
					}
					for _, is := range tc.is {
						mustMention(t, err, is, tc.says...)
					}
					if tc.isNot != nil && errors.Is(err, tc.isNot) {
						t.Errorf("got %v, which is %v", err, tc.isNot)
					}
				}
				m.hold.Store(false)
				if tc.fails != nil {
					eventually(t, "the controller fails", func() bool { return c.Err() != nil })
					mustMention(t, c.Err(), tc.fails, tc.why)
					_, err := ns.ReadAt(got, 0)
					mustMention(t, err, tc.fails, tc.why)
					m.stuck.Store(false)
					return
				}
				if _, err := ns.ReadAt(got, 0); err != nil {
					t.Fatalf("afterwards: %v", err)
				}
				mustEqual(t, got, want)
				if n := c.dev.Resets.Load() - before; n != tc.resets && c.dev.FLRs.Load() == 0 {
					t.Errorf("%d resets", n)
				}
				// R28: the pages are shared again after each.
				if n := c.dev.Configs.Load() - configs; v.want == "shadow" && n != tc.resets {
					t.Errorf("doorbell pages were shared %d times again", n)
				}
				if c.Err() != nil || c.Doorbells() != v.want {
					t.Errorf("%v, doorbells %q", c.Err(), c.Doorbells())
				}
			})
		}
	}
}

// TestResetsThatDoNoGood is a controller that comes back each time and never executes an I/O command.
func TestResetsThatDoNoGood(t *testing.T) {
	t.Parallel()
	m := newMoody(nvmetest.Config{})
	c := openInProc(t, m.cfg, quickOptions())
	ns := namespace(t, c, 1)
	m.drop.Store(1 << 40)
	for i := 1; i <= 4; i++ {
		if _, err := ns.ReadAt(make([]byte, 512), 0); !errors.Is(err, guestdrv.ErrReset) || c.Err() != nil {
			t.Fatalf("reset %d: %v, %v", i, err, c.Err())
		}
	}
	_, err := ns.ReadAt(make([]byte, 512), 0)
	mustMention(t, err, guestdrv.ErrTimeout, "4 resets in a row")
	mustMention(t, c.Err(), guestdrv.ErrTimeout, "4 resets in a row")
}

func TestLateAdminCommandResets(t *testing.T) {
	t.Parallel()
	m := newMoody(nvmetest.Config{})
	c := openInProc(t, m.cfg, quickOptions())
	ns := namespace(t, c, 1)
	m.mute.Store(true)
	go func() {
		for c.dev.Resets.Load() < 1 {
			time.Sleep(time.Millisecond)
		}
		m.mute.Store(false)
	}()
	var cmd nvme.Command
	cmd.SetIdentify(nvme.CNSController, 0, 0)
	_, err := c.Admin(ctx, &cmd, make([]byte, 4096))
	mustMention(t, err, guestdrv.ErrReset, "IDENTIFY", "timed out")
	mustMention(t, err, guestdrv.ErrTimeout)
	if _, err := c.Admin(ctx, &cmd, make([]byte, 4096)); err != nil {
		t.Error(err)
	}
	if _, err := ns.ReadAt(make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
}

// patientOptions are for a reset that takes its time, of a controller whose CAP.TO allows for that.
func patientOptions() guestdrv.Options {
	o := testOptions()
	o.ResetTimeout = patience
	return o
}

// beginReset loses the next I/O command, which do is to send, and returns when the controller has been disabled for it. It stays so.
func beginReset(t *testing.T, m *moody, c opened, do func()) {
	t.Helper()
	resets := c.dev.Resets.Load()
	m.asleep.Store(true)
	m.drop.Store(1)
	do()
	eventually(t, "the device has fetched it", func() bool { return m.drop.Load() == 0 })
	c.ForceReset(errors.New("the test wants it"))
	eventually(t, "a reset", func() bool { return c.dev.Resets.Load() > resets })
}

// TestOthersWaitDuringReset starts every kind of call while the controller takes its time to come back.
func TestOthersWaitDuringReset(t *testing.T) {
	m := newMoody(nvmetest.Config{CAP: nvme.CAP(0).WithMQES(1023).WithTO(120).WithCSS(1)})
	c := openInProc(t, m.cfg, patientOptions())
	ns := namespace(t, c, 1)
	old, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	beginReset(t, m, c, func() {
		wg.Go(func() {
			if _, err := ns.ReadAt(make([]byte, 512), 0); !errors.Is(err, guestdrv.ErrReset) {
				t.Errorf("the one that was lost: %v", err)
			}
		})
	})
	var ended atomic.Int64
	call := func(what string, f func() error) {
		wg.Go(func() {
			if err := f(); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			ended.Add(1)
		})
	}
	for range 100 { // more than there are slots for
		call("read", func() error { _, err := ns.ReadAt(make([]byte, 8192), 0); return err })
	}
	call("flush", func() error { return ns.Flush(ctx) })
	call("admin", func() error {
		var cmd nvme.Command
		cmd.SetIdentify(nvme.CNSController, 0, 0)
		_, err := c.Admin(ctx, &cmd, make([]byte, 4096))
		return err
	})
	call("new pair", func() error {
		p, err := c.NewQueuePair(guestdrv.QueuePairOptions{})
		if err != nil {
			return err
		}
		return p.Close()
	})
	call("old pair", func() error {
		if _, err := old.Submit([]guestdrv.IO{{Op: nvme.IOFlush, NSID: 1}}); !errors.Is(err, guestdrv.ErrReset) {
			return fmt.Errorf("submit: %w", err)
		}
		return old.Close()
	})
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := ns.ReadAtContext(short, make([]byte, 512), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := c.NewQueuePairContext(short, guestdrv.QueuePairOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("new pair, cancelled: %v", err)
	}
	if n := ended.Load(); n != 0 {
		t.Errorf("%d calls did not wait", n)
	}
	if c.Err() != nil {
		t.Error(c.Err())
	}
	m.asleep.Store(false)
	wg.Wait()
}

func TestCloseDuringReset(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			m := newMoody(v.cfg)
			m.cfg.CAP = m.cfg.CAP.WithTO(240)
			o := patientOptions()
			o.ResetTimeout *= 2
			c := v.open(t, m.cfg, o)
			ns := namespace(t, c, 1)
			done := make(chan error, 2)
			read := func() {
				go func() {
					_, err := ns.ReadAt(make([]byte, 512), 0)
					done <- err
				}()
			}
			beginReset(t, m, c, read)
			read()
			time.Sleep(5 * time.Millisecond) // it may wait by then
			begin := time.Now()
			c.Close()
			if d := time.Since(begin); d > patience {
				t.Errorf("Close took %v", d)
			}
			for range 2 {
				if err := <-done; !errors.Is(err, guestdrv.ErrClosed) && !errors.Is(err, guestdrv.ErrReset) {
					t.Error(err)
				}
			}
		})
	}
}

// TestDeviceGoneDuringReset must not wait for registers that nobody answers for.
func TestDeviceGoneDuringReset(t *testing.T) {
	m := newMoody(nvmetest.Config{CAP: nvme.CAP(0).WithMQES(1023).WithTO(120).WithCSS(1)})
	c := openSocket(t, m.cfg, patientOptions())
	ns := namespace(t, c, 1)
	done := make(chan error, 1)
	beginReset(t, m, c, func() {
		go func() {
			_, err := ns.ReadAt(make([]byte, 512), 0)
			done <- err
		}()
	})
	c.gone()
	if err := <-done; !errors.Is(err, guestdrv.ErrReset) && !errors.Is(err, guestdrv.ErrGone) {
		t.Errorf("got %v", err)
	}
	if _, err := ns.ReadAt(make([]byte, 512), 0); !errors.Is(err, guestdrv.ErrGone) {
		t.Errorf("afterwards: %v", err)
	}
}
