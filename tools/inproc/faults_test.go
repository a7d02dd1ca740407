package inproc_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/device/faulty"
	"github.com/shadowbell/shadowbell/guestdrv/device/vfiouser"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// faultOptions are for rows in which a deadline has to pass. All commands beside the one that misses it have to keep it, and a reset its own: on a
// busy machine too.
func faultOptions() guestdrv.Options {
	o := small()
	o.Timeout, o.ResetTimeout = 2*time.Second, 10*time.Second
	return o
}

// bound is how long one command may take at the most, as Options.ResetTimeout documents it, and what a busy machine adds.
func bound(o guestdrv.Options) time.Duration {
	d := o.Timeout + o.Timeout/4 + o.ResetTimeout
	if o.OnReset == guestdrv.ResetReplay {
		d *= 2
	}
	return d + patience/3
}

// fault is a row of the table: what goes wrong under load, and what the driver makes of it.
type fault struct {
	name   string
	rules  string               // of the medium
	strike func(*faulty.Device) // when the load is on
	mmio   bool                 // only with doorbells that are seen
	replay bool                 // only with ResetReplay; as a rule both are tried
	one    []error              // some error is all of these; none: there are no errors, with ResetReplay
	none   []error              // no error is any of these
	status nvme.Status          // some error is a *StatusError with it, DNR included
	fails  error                // the controller, for good; nil: it lives on, and was reset or not:
	resets func(n uint64) bool  // how often it was reset
	says   string               // in the error that one is about
	few    bool                 // what goes on is slow: a dozen commands afterwards are enough

	timeout time.Duration // Options.Timeout, if not that of faultOptions: patience where no deadline has to pass
}

func none(n uint64) bool { return n == 0 }
func some(n uint64) bool { return n > 0 }

// duplicate makes one command have the identifier of the one before it.
func duplicate() func(uint16, *nvme.Command) {
	var last atomic.Uint32
	var done atomic.Bool
	return func(qid uint16, cmd *nvme.Command) {
		if qid != 1 {
			return
		}
		if was := last.Swap(1<<16 | uint32(cmd.CID)); was != 0 && uint16(was) != cmd.CID && done.CompareAndSwap(false, true) {
			cmd.CID = uint16(was)
		}
	}
}

// once changes one command of a queue of the plain API.
func once(change func(*nvme.Command)) faulty.Hooks {
	var done atomic.Bool
	return faulty.Hooks{Command: func(qid uint16, cmd *nvme.Command) {
		if qid == 1 && done.CompareAndSwap(false, true) {
			change(cmd)
		}
	}}
}

func faults() []fault {
	var (
		late     = []error{guestdrv.ErrReset, guestdrv.ErrTimeout}
		noReset  = []error{guestdrv.ErrReset}
		protocol = []error{guestdrv.ErrProtocol}
	)
	return []fault{
		{name: "a read is dropped", rules: "drop@read@after=20@first=1", one: late, resets: some},
		{name: "a write is dropped", rules: "drop@write@after=20@first=1", one: late, resets: some},
		{name: "several are dropped", rules: "drop@after=50@first=3", one: late, resets: some},
		{name: "a command is dropped twice", rules: "drop@read@lba=0-127@after=10@first=12", replay: true, one: late, resets: some},
		{name: "a command can be aborted", rules: "hold@write@after=20@first=1", one: []error{guestdrv.ErrTimeout}, none: noReset, resets: none, says: "was aborted", timeout: 4 * time.Second},
		{name: "a read is late", rules: "delay=4s@read@after=20@first=1", one: late, resets: some},
		{name: "a write is late", rules: "delay=4s@write@after=20@first=1", one: late, resets: some},
		{name: "late, within the deadline", rules: "delay=50ms@rate=1/50", resets: none, timeout: patience},
		{name: "a status without DNR", rules: "status=unrecovered-read-error@read@after=20@first=1", status: nvme.StatusUnrecoveredRead, none: noReset, resets: none, timeout: patience},
		{name: "a status with DNR", rules: "status=write-fault+dnr@write@after=20@first=1", status: nvme.StatusWriteFault.WithDNR(), none: noReset, resets: none, timeout: patience},
		{name: "a status of a path", rules: "status=3/70@after=20@first=1", status: nvme.StatusHostPathError, none: noReset, resets: none, timeout: patience},
		{name: "a torn write", rules: "torn@write@after=20@first=1", status: nvme.StatusWriteFault, none: noReset, resets: none, timeout: patience},
		{
			name: "an identifier that nobody used", mmio: true, timeout: patience, one: protocol, fails: guestdrv.ErrProtocol, says: "not outstanding",
			strike: func(d *faulty.Device) { d.SetHooks(once(func(cmd *nvme.Command) { cmd.CID ^= 0x4000 })) },
		},
		{
			name: "an identifier of another generation", mmio: true, timeout: patience, one: protocol, fails: guestdrv.ErrProtocol,
			strike: func(d *faulty.Device) { d.SetHooks(once(func(cmd *nvme.Command) { cmd.CID -= 0x40 })) },
		},
		{
			name: "one identifier twice", mmio: true, timeout: patience, one: protocol, fails: guestdrv.ErrProtocol,
			strike: func(d *faulty.Device) { d.SetHooks(faulty.Hooks{Command: duplicate()}) },
		},
		{
			// The first read is outstanding when the error comes, whatever the others do.
			name: "CFS until it is disabled", timeout: patience, rules: "drop@read@first=1", one: []error{guestdrv.ErrReset, guestdrv.ErrFatal}, resets: some, says: "CFS",
			strike: func(d *faulty.Device) { d.Fail(faulty.Disabled) },
		},
		{
			name: "CFS for good", timeout: patience, strike: func(d *faulty.Device) { d.Fail(faulty.Repaired) },
			one: []error{guestdrv.ErrFatal}, fails: guestdrv.ErrFatal, says: "CFS",
		},
		{
			name: "unplugged, without a word", timeout: patience, strike: (*faulty.Device).Unplug,
			one: []error{guestdrv.ErrGone}, fails: guestdrv.ErrGone, says: "all ones",
		},
		{
			// As QEMU has it.
			name: "unplugged, and zeroes are read", timeout: patience, rules: "drop@read@after=100@first=1",
			strike: func(d *faulty.Device) {
				d.SetHooks(faulty.Hooks{Read: func(uint32, uint64) (uint64, error) { return 0, nil }})
			},
			one: []error{guestdrv.ErrGone}, fails: guestdrv.ErrGone, says: "read as zeroes",
		},
		{
			name: "unplugged, with notice", timeout: patience, strike: func(d *faulty.Device) { d.End(errCable) },
			one: []error{guestdrv.ErrGone, errCable}, fails: guestdrv.ErrGone,
		},
		{
			name: "RDY does not fall, a function reset helps", rules: "drop@read@after=100@first=1", one: late, resets: some,
			strike: func(d *faulty.Device) { _ = d.FreezeReady(faulty.Reset) },
		},
		{
			name: "RDY never falls", rules: "drop@read@after=100@first=1",
			strike: func(d *faulty.Device) { _ = d.FreezeReady(faulty.Repaired) },
			one:    []error{guestdrv.ErrTimeout}, fails: guestdrv.ErrTimeout, says: "not disabled", resets: some,
		},
		{
			name: "RDY never falls, and the reset fails", rules: "drop@read@after=100@first=1",
			strike: func(d *faulty.Device) {
				_ = d.FreezeReady(faulty.Repaired)
				d.SetHooks(faulty.Hooks{Reset: func() error { return errCable }})
			},
			one: []error{guestdrv.ErrTimeout, errCable}, fails: guestdrv.ErrTimeout, resets: some,
		},
		{
			name: "RDY never falls, and the reset never ends", rules: "drop@read@after=100@first=1",
			strike: func(d *faulty.Device) {
				_ = d.FreezeReady(faulty.Repaired)
				d.SetHooks(faulty.Hooks{Reset: func() error {
					<-d.Done()
					return errCable
				}})
			},
			one: []error{guestdrv.ErrTimeout}, fails: guestdrv.ErrTimeout, resets: some,
		},
		{
			// One by itself is made up for by the next.
			name: "doorbells of a queue are lost until a reset", mmio: true, one: late, resets: some,
			strike: func(d *faulty.Device) {
				var lost, found atomic.Bool
				d.SetHooks(faulty.Hooks{
					Ring: func(off, _ uint32) bool {
						if off != nvme.SQTailDoorbell(1, 0) || found.Load() {
							return true
						}
						lost.Store(true)
						return false
					},
					Write: func(off uint32, v uint64) bool {
						if lost.Load() && off == nvme.RegCC && !nvme.CC(v).EN() {
							found.Store(true)
						}
						return true
					},
				})
			},
		},
		{
			// The driver looks eight times in a Timeout.
			name: "interrupts are lost", resets: none, few: true,
			strike: func(d *faulty.Device) { d.SetHooks(faulty.Hooks{Interrupt: func(int) bool { return false }}) },
		},
	}
}

var errCable = errors.New("somebody stumbled over the cable")

// TestFaults is the table of device faults and driver behaviour: under load, each call ends in time and with the right error; data is
// right afterwards where the controller lives on; and nothing is left. Short, each row in one way, and all ways in some row.
func TestFaults(t *testing.T) {
	for n, f := range faults() {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			for _, replay := range []bool{false, true} {
				for _, mmio := range []bool{false, true} {
					if f.replay && !replay || f.mmio && !mmio {
						continue
					}
					if f.fails != nil && !f.mmio && replay != mmio {
						continue // what ends so makes no difference, and takes long
					}
					if r, m := f.way(n); testing.Short() && (replay != r || mmio != m) {
						continue
					}
					t.Run(fmt.Sprintf("replay=%v,mmio=%v", replay, mmio), func(t *testing.T) { f.run(t, replay, mmio, false) })
				}
			}
		})
	}
}

// way is how row n runs where it does once.
func (f *fault) way(n int) (replay, mmio bool) {
	if f.fails == guestdrv.ErrTimeout {
		return true, true // Close is quicker then
	}
	replay = f.replay || n%2 == 1
	if f.fails != nil && !f.mmio {
		return replay, replay
	}
	return replay, f.mmio || n/2%2 == 1
}

// TestFaultsOverSocket is some of the table with a mediator on the other side of a socket, and real shared memory.
func TestFaultsOverSocket(t *testing.T) {
	over := []string{
		"a read is dropped", "a write is late", "a status with DNR", "an identifier that nobody used", "CFS until it is disabled",
		"unplugged, without a word", "unplugged, with notice", "RDY does not fall, a function reset helps",
	}
	n := 0
	for _, f := range faults() {
		if slices.Contains(over, f.name) {
			n++
			t.Run(f.name, func(t *testing.T) {
				t.Parallel()
				f.run(t, false, f.mmio, true)
			})
		}
	}
	if n != len(over) {
		t.Errorf("%d rows of %d", n, len(over))
	}
}

// openSocket is open by a socket, which stops serving when the test ends.
func openSocket(t *testing.T, cfg hostmed.Config, o guestdrv.Options, wrap func(device.Device) device.Device) (*hostmed.Mediator, *guestdrv.Controller) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	cfg.Controllers[0].Socket, cfg.Logger = socket, testrig.Log(t)
	m, err := hostmed.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, m.Run)
	dev, err := vfiouser.Open(ctx, socket)
	if err != nil {
		t.Fatal(err)
	}
	c, err := guestdrv.OpenDevice(ctx, wrap(dev), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return m, c
}

func (f *fault) run(t *testing.T, replay, mmio, socket bool) {
	o := faultOptions()
	if f.fails == guestdrv.ErrTimeout {
		o.ResetTimeout = time.Second // nothing that works has to be done by then
	}
	if f.timeout != 0 {
		o.Timeout = f.timeout
	}
	if replay {
		o.OnReset = guestdrv.ResetReplay
	}
	if mmio {
		o.Doorbells = guestdrv.DoorbellsMMIO
	}
	spec := "mem:size=64MiB"
	if f.rules != "" {
		spec = "fault:" + f.rules + ",over=" + spec
	}
	cfg := one(hostmed.ControllerConfig{Namespaces: []string{spec}})
	var bad *faulty.Device
	wrap := func(d device.Device) device.Device {
		bad = faulty.Wrap(d)
		return bad
	}
	var m *hostmed.Mediator
	var c *guestdrv.Controller
	if socket {
		m, c = openSocket(t, cfg, o, wrap)
	} else {
		m = serve(t, cfg)
		c = open(t, m, name, o, wrap)
	}
	l := startLoad(t, c, 4)
	l.until("the load to begin", func() bool { return l.good.Load() > 8 })
	if f.strike != nil {
		f.strike(bad)
	}
	if f.fails != nil {
		l.until("the controller to fail", func() bool { return c.Err() != nil })
	} else {
		f.lives(t, l, replay)
	}
	if d := l.stop(); d > bound(o) {
		t.Errorf("the load ended after %v", d)
	}
	f.check(t, l, o)
	if f.fails == guestdrv.ErrTimeout && replay {
		bad.Repair() // Close waits 5 s for one that cannot be stopped: once is enough
	}
	begin := time.Now()
	err := c.Close()
	if d := time.Since(begin); d > patience {
		t.Errorf("Close took %v", d)
	}
	if err != nil && f.fails == nil {
		t.Errorf("Close: %v", err)
	}
	begin = time.Now()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(begin); d > patience {
		t.Errorf("hostmed took %v to end", d)
	}
}

// lives waits for what the fault does, and for the controller to work as before.
func (f *fault) lives(t *testing.T, l *load, replay bool) {
	t.Helper()
	quiet := replay && f.status == 0 && (f.resets == nil || f.resets(1)) && !f.replay
	switch {
	case f.resets != nil && f.resets(1):
		l.until("a reset", func() bool { return l.c.Stats().Resets > 0 })
	case f.status != 0, len(f.one) > 0:
		l.until("an error", func() bool { return len(l.noted()) > 0 })
	}
	at, want := l.good.Load(), uint64(300)
	if f.few {
		want = 12
	}
	l.until("commands that succeed afterwards", func() bool { return l.good.Load() > at+want })
	if err := l.c.Err(); err != nil {
		t.Errorf("the controller has failed: %v", err)
	}
	if !quiet {
		return
	}
	for _, n := range l.noted() {
		if !strings.HasPrefix(n.what, "pair") && n.what != "closing a pair" {
			t.Errorf("with replay, %s: %v", n.what, n.err)
		}
	}
}

// check looks at what was noted.
func (f *fault) check(t *testing.T, l *load, o guestdrv.Options) {
	t.Helper()
	limit := bound(o)
	found := len(f.one) == 0 && f.status == 0 || o.OnReset == guestdrv.ResetReplay && f.fails == nil && f.status == 0 && !f.replay && f.resets(1)
	for _, n := range l.noted() {
		if n.took > limit {
			t.Errorf("%s took %v, at most %v were promised: %v", n.what, n.took, limit, n.err)
		}
		for _, not := range f.none {
			if errors.Is(n.err, not) {
				t.Errorf("%s: %v", n.what, n.err)
			}
		}
		if all(n.err, f.one) && f.hasStatus(n.err) && strings.Contains(n.err.Error(), f.says) {
			found = true
		}
		if !f.expected(n.err) {
			t.Errorf("%s: %v", n.what, n.err)
		}
	}
	if !found {
		t.Errorf("no error is %v and says %q: %v", f.one, f.says, l.noted())
	}
	if n := l.c.Stats().Resets; f.resets != nil && !f.resets(n) {
		t.Errorf("%d resets", n)
	}
	if err := l.c.Err(); f.fails != nil && !errors.Is(err, f.fails) {
		t.Errorf("the controller failed of %v", err)
	}
}

func all(err error, is []error) bool {
	for _, e := range is {
		if !errors.Is(err, e) {
			return false
		}
	}
	return true
}

func (f *fault) hasStatus(err error) bool {
	var se *guestdrv.StatusError
	return f.status == 0 || errors.As(err, &se) && se.Status.Code() == f.status.Code() && se.DNR() == f.status.DNR()
}

// expected reports whether err may come up at all in this row: those who are beside a fault get ErrReset, or why the controller has failed.
func (f *fault) expected(err error) bool {
	switch {
	case f.fails != nil && errors.Is(err, f.fails), f.resets != nil && f.resets(1) && errors.Is(err, guestdrv.ErrReset):
		return true
	case f.status != 0:
		return f.hasStatus(err)
	}
	return len(f.one) > 0 && errors.Is(err, f.one[0])
}
