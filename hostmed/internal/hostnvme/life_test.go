package hostnvme

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// patience is longer than anything takes that works, on a busy machine.
const patience = time.Minute

// slot0 is a machine with one function, which is a test's controller. It is plugged in or not.
type slot0 struct {
	ctl *nvmetest.Device

	mu    sync.Mutex
	fn    *testFunction // that was opened last
	away  error
	opens int
}

func (m *slot0) Lookup(address string) (string, error) {
	return "0000:" + strings.TrimPrefix(address, "0000:"), nil
}

func (m *slot0) Open(_ string, h Hooks) (Function, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.away != nil {
		return nil, m.away
	}
	m.opens++
	m.fn = &testFunction{inProc: m.ctl.InProc(), Hooks: h}
	return m.fn, nil
}

func (m *slot0) last() *testFunction {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fn
}

type inProc interface {
	device.Device
	Gone()
}

type testFunction struct {
	inProc
	Hooks
}

func (f *testFunction) Sever() { f.Close() }

func (*testFunction) MapDMA([]byte) (Place, error) { return Place{}, errors.ErrUnsupported }
func (*testFunction) UnmapDMA([]byte, Place) error { return errors.ErrUnsupported }

// user is a User that has commands under way all the time.
type user struct {
	t *testing.T
	p *Pair

	mu     sync.Mutex
	q      *queue.Queue
	paused bool
	failed error
	cmds   map[uint64]nvme.Command // that are under way or kept, by tag
	ended  uint64
	bad    map[nvme.Status]int // ends that are no success
	next   uint64
	most   int // commands at a time; 0: nothing new is sent
	end    chan struct{}
	done   chan struct{}
}

func newUser(t *testing.T, d *Device, most int) *user {
	t.Helper()
	u := &user{t: t, cmds: map[uint64]nvme.Command{}, bad: map[nvme.Status]int{}, most: most, end: make(chan struct{}), done: make(chan struct{})}
	p, err := d.NewPair(context.Background(), PairConfig{Depth: 31, Extra: 4096}, u)
	if err != nil {
		t.Fatal(err)
	}
	u.mu.Lock()
	u.p, u.q = p, p.Q
	u.mu.Unlock()
	go u.run()
	return u
}

// run sends and reaps, as a worker does.
func (u *user) run() {
	defer close(u.done)
	for {
		select {
		case <-u.end:
			return
		default:
		}
		u.mu.Lock()
		idle := u.paused || u.failed != nil || !u.step()
		u.mu.Unlock()
		if idle {
			time.Sleep(50 * time.Microsecond)
		}
	}
}

func (u *user) step() bool {
	u.q.Stamp()
	sent := false
	for len(u.cmds) < u.most && u.q.Free() > 0 {
		u.next++
		u.cmds[u.next] = nvme.Command{Opcode: nvme.IOFlush, NSID: 1}
		u.send(u.next)
		sent = true
	}
	if sent {
		u.publish()
	}
	return u.reap() || sent
}

func (u *user) send(tag uint64) {
	i, ok := u.q.Take(tag)
	if !ok {
		u.t.Error("no slot")
		return
	}
	cmd := u.cmds[tag]
	u.q.Push(i, &cmd)
}

func (u *user) publish() {
	if err := u.q.Publish(); err != nil {
		u.p.Trouble(err)
	}
}

func (u *user) reap() bool {
	var out [8]queue.Completion
	n, err := u.q.Reap(out[:])
	for _, c := range out[:n] {
		if _, has := u.cmds[c.Tag]; !has {
			u.t.Errorf("command %d ends twice", c.Tag)
		}
		delete(u.cmds, c.Tag)
		u.ended++
		if !c.Status.OK() {
			u.bad[c.Status]++
		}
	}
	if err != nil && u.p != nil && !u.paused {
		u.p.Trouble(err)
	}
	return n > 0
}

func (u *user) Pause() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.paused = true
}

func (u *user) Stopped() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.q == nil {
		return
	}
	for u.reap() {
	}
	u.q.Drop(func(tag uint64) {
		if _, has := u.cmds[tag]; !has {
			u.t.Errorf("command %d is dropped and was not there", tag)
		}
	})
}

func (u *user) Resume() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.paused = false
	if u.q == nil {
		return
	}
	if u.q.Outstanding() != 0 {
		u.t.Errorf("%d commands in a queue that is new", u.q.Outstanding())
	}
	u.q.Stamp()
	for tag := range u.cmds {
		u.send(tag)
	}
	u.publish()
}

func (u *user) Fail(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.paused {
		u.t.Error("Fail without Pause")
	}
	u.failed = err
	clear(u.cmds)
}

func (u *user) Check() (uint64, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.q == nil || u.paused {
		return u.ended, false
	}
	if err := u.q.Check(); err != nil {
		u.p.Trouble(err)
	}
	return u.ended, u.q.Outstanding() > 0
}

// stop lets what is under way end, and closes the pair.
func (u *user) stop() {
	u.t.Helper()
	u.setMost(0)
	u.await("nothing under way", func() bool { return len(u.cmds) == 0 })
	close(u.end)
	<-u.done
	if err := u.p.Close(); err != nil {
		u.t.Error(err)
	}
}

// lost waits for the device's failure and closes the pair.
func (u *user) lost(why error) {
	u.t.Helper()
	u.await("the failure of the device", func() bool { return u.failed != nil })
	close(u.end)
	<-u.done
	if err := u.p.Close(); err != nil {
		u.t.Error(err)
	}
	if !errors.Is(u.failed, why) {
		u.t.Errorf("failed with %v", u.failed)
	}
}

func (u *user) setMost(n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.most = n
}

// await waits for something, which is looked for under the lock.
func (u *user) await(what string, is func() bool) {
	u.t.Helper()
	await(u.t, what, func() bool {
		u.mu.Lock()
		defer u.mu.Unlock()
		return is()
	})
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited for: %s", what)
		}
	}
}

// moves waits for commands to end.
func (u *user) moves() {
	u.t.Helper()
	u.mu.Lock()
	from := u.ended
	u.mu.Unlock()
	u.await("commands that end", func() bool { return u.ended > from+100 })
}

func quick() Options {
	return Options{Queues: 4, Timeout: 200 * time.Millisecond, ResetTimeout: patience}
}

// unhurried is for tests in which no command is late: on a busy machine one may take as long as quick allows.
func unhurried() Options {
	o := quick()
	o.Timeout = patience
	return o
}

// plug returns a machine whose controller is made of c.
func plug(t *testing.T, c nvmetest.Config) *slot0 {
	t.Helper()
	ctl := nvmetest.New(c)
	t.Cleanup(ctl.Close)
	return &slot0{ctl: ctl}
}

func opened(t *testing.T, m *slot0, o Options) *Device {
	t.Helper()
	d, err := OpenOn(context.Background(), m, "01:00.0", o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if n := m.ctl.Reached(); n != 0 {
			t.Errorf("the device still has %d pieces of memory", n)
		}
	})
	return d
}

// TestAddressIsOpenedOnce has two users of one device.
func TestAddressIsOpenedOnce(t *testing.T) {
	m := plug(t, nvmetest.Config{})
	d := opened(t, m, unhurried())
	again, err := OpenOn(context.Background(), m, "0000:01:00.0", unhurried())
	if err != nil || again != d || m.opens != 1 {
		t.Fatalf("another device: %v, %d opens", err, m.opens)
	}
	other := unhurried()
	other.Timeout += time.Second
	if _, err := OpenOn(context.Background(), m, "0000:01:00.0", other); err == nil || !strings.Contains(err.Error(), "say the same for all") {
		t.Errorf("another timeout: %v", err)
	}
	if err := again.Close(); err != nil || d.Err() != nil {
		t.Fatalf("%v, %v", err, d.Err())
	}
	if s := d.Stats(); s.State != "live" || !s.Shadow || s.MaxPairs != 4 {
		t.Errorf("%+v", s)
	}
	u := newUser(t, d, 8)
	u.moves()
	u.stop()
	if id, err := d.Namespace(1); err != nil || id.NSZE != 16384 {
		t.Errorf("%v", err)
	}
	if _, err := d.Namespace(2); err == nil || !strings.Contains(err.Error(), "no active namespace 2; there are [1]") {
		t.Errorf("%v", err)
	}
}

// TestControllerThatWasLeftEnabled opens one that another process had, with its queues, and was killed.
func TestControllerThatWasLeftEnabled(t *testing.T) {
	m := plug(t, nvmetest.Config{})
	d, err := OpenOn(context.Background(), m, "01:00.0", unhurried())
	if err != nil {
		t.Fatal(err)
	}
	old := newUser(t, d, 8)
	old.moves()
	killed := m.last()
	devices.mu.Lock()
	delete(devices.open, d.address)
	devices.mu.Unlock()

	next := opened(t, m, unhurried())
	if m.ctl.Resets.Load() == 0 {
		t.Error("it was not disabled")
	}
	u := newUser(t, next, 8)
	u.moves()
	u.stop()

	killed.Gone()
	old.lost(device.ErrGone)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// TestResets goes through what a controller comes back from. No command is lost, and none ends twice.
func TestResets(t *testing.T) {
	for name, c := range map[string]struct {
		config nvmetest.Config
		cause  func(t *testing.T, m *slot0, d *Device)
	}{
		"fatal status": {cause: func(t *testing.T, m *slot0, _ *Device) { m.ctl.Fault() }},
		"asked for": {cause: func(t *testing.T, _ *slot0, d *Device) {
			if err := d.Reset(context.Background()); err != nil {
				t.Error(err)
			}
		}},
		"PCI error": {cause: func(t *testing.T, m *slot0, _ *Device) { m.last().Faulted() }},
		"a completion of nothing": {cause: func(t *testing.T, m *slot0, _ *Device) {
			m.ctl.PostRaw(1, ring.MakeEntry(0, 0, 1, 0xFFF0, nvme.StatusSuccess))
		}},
		"without shadow doorbells": {
			config: nvmetest.Config{NoShadow: true},
			cause:  func(t *testing.T, m *slot0, _ *Device) { m.ctl.Fault() },
		},
		"without interrupts": {
			config: nvmetest.Config{Vectors: -1},
			cause:  func(t *testing.T, m *slot0, _ *Device) { m.ctl.Fault() },
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := plug(t, c.config)
			d := opened(t, m, quick())
			users := []*user{newUser(t, d, 20), newUser(t, d, 3)}
			for n := uint64(1); n <= 3; n++ {
				for _, u := range users {
					u.moves()
				}
				c.cause(t, m, d)
				await(t, "a reset", func() bool { s := d.Stats(); return s.Resets >= n && s.State == "live" })
			}
			for _, u := range users {
				u.moves()
				u.stop()
				if len(u.bad) != 0 {
					t.Errorf("commands ended with %v", u.bad)
				}
			}
			if !c.config.NoShadow && m.ctl.Configs.Load() != d.Stats().Resets+1 {
				t.Errorf("%d Doorbell Buffer Configs, %d resets", m.ctl.Configs.Load(), d.Stats().Resets)
			}
		})
	}
}

// TestLateCommands are aborted first; when that does not end them the controller is reset, and they are sent again.
func TestLateCommands(t *testing.T) {
	for name, c := range map[string]struct {
		action nvmetest.Action
		resets uint64
	}{"aborted": {nvmetest.Hold, 0}, "lost": {nvmetest.Drop, 1}} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			armed := false
			m := plug(t, nvmetest.Config{Hooks: nvmetest.Hooks{Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
				mu.Lock()
				defer mu.Unlock()
				if qid == 0 || !armed {
					return nvmetest.Verdict{}
				}
				armed = false
				return nvmetest.Verdict{Action: c.action}
			}}})
			d := opened(t, m, quick())
			u := newUser(t, d, 4)
			u.moves()
			mu.Lock()
			armed = true
			mu.Unlock()
			await(t, "an Abort", func() bool { return d.Stats().Aborts > 0 })
			await(t, "the end of it", func() bool {
				u.mu.Lock()
				defer u.mu.Unlock()
				s := d.Stats()
				return s.State == "live" && s.Resets == c.resets && u.bad[nvme.StatusAbortRequested] == 1-int(c.resets)
			})
			u.moves()
			u.stop()
			if s := d.Stats(); s.Timeouts == 0 || s.Resets != c.resets {
				t.Errorf("%+v", s)
			}
		})
	}
}

// stalled is a machine one of whose functions the kernel does not hand out.
type stalled struct {
	Machine
	dead    string
	begun   chan bool
	release chan bool
}

func (m stalled) Open(address string, h Hooks) (Function, error) {
	if address == m.dead {
		m.begun <- true
		<-m.release
		return nil, device.ErrGone
	}
	return m.Machine.Open(address, h)
}

// A device that does not open keeps no other from it, nor from its end.
func TestOpenBesideOneThatHangs(t *testing.T) {
	well := plug(t, nvmetest.Config{})
	m := stalled{well, "0000:02:00.0", make(chan bool), make(chan bool)}
	failed := make(chan error)
	go func() {
		_, err := OpenOn(context.Background(), m, m.dead, quick())
		failed <- err
	}()
	<-m.begun
	d, err := OpenOn(context.Background(), m, "0000:03:00.0", quick())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	close(m.release)
	if err := <-failed; !errors.Is(err, device.ErrGone) {
		t.Error(err)
	}
}
