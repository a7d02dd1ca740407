package subsys

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
)

var testInfo = backend.Info{Name: "test", Blocks: 1000, LBAShift: 9}

// fakeWorkers writes down what it is told.
type fakeWorkers struct {
	mu    sync.Mutex
	calls []string
}

func (w *fakeWorkers) note(format string, a ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, fmt.Sprintf(format, a...))
}

func (w *fakeWorkers) Drain(n *Namespace)           { w.note("drain %d", n.NSID) }
func (w *fakeWorkers) Release(n *Namespace)         { w.note("release %d", n.NSID) }
func (w *fakeWorkers) Suspend(backend.Backend)      { w.note("suspend") }
func (w *fakeWorkers) Resume(backend.Backend) error { w.note("resume"); return nil }
func (w *fakeWorkers) Forget(backend.Backend)       { w.note("forget") }

// fakeMember is a client whose session answers on a goroutine of its own.
type fakeMember struct {
	c        *Controller
	mu       sync.Mutex
	shown    []uint32 // what Identify shows
	told     int
	resets   int
	notes    []uint8 // notifications of reservations
	warnings int
}

func (m *fakeMember) Changed(done func()) {
	go func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.told++
		m.shown = nil
		for _, n := range m.c.Namespaces() {
			m.shown = append(m.shown, n.NSID)
		}
		done()
	}()
}

func (m *fakeMember) Reset()                      { m.resets++ }
func (m *fakeMember) Warned()                     { m.warnings++ }
func (m *fakeMember) Notice(_ uint32, kind uint8) { m.notes = append(m.notes, kind) }

func (m *fakeMember) shows(t *testing.T, want ...uint32) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !slices.Equal(m.shown, want) {
		t.Errorf("controller %d shows %v, want %v", m.c.ID, m.shown, want)
	}
}

func newSubsystem(t *testing.T, controllers int) (*Subsystem, *fakeWorkers, []*fakeMember) {
	w := &fakeWorkers{}
	s := New(Config{NQN: "nqn.test", Serial: "S", Model: "M", Workers: w})
	t.Cleanup(s.Close)
	var ms []*fakeMember
	for i := range controllers {
		c := s.AddController(uint16(i + 1))
		m := &fakeMember{c: c}
		c.Connect(m)
		ms = append(ms, m)
	}
	return s, w, ms
}

func openMem(t *testing.T, spec string) backend.Backend {
	t.Helper()
	b, err := backend.Open(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func TestAttachAndRemove(t *testing.T) {
	s, w, m := newSubsystem(t, 3)
	m[2].c.Disconnect() // a controller without a client holds up nobody
	b := openMem(t, "mem:size=1MiB")
	n := s.AddNamespace(NamespaceConfig{NSID: 7, Backend: b, Shared: true})
	s.SetAttached(n, []uint16{1, 2, 3})
	m[0].shows(t, 7)
	m[1].shows(t, 7)
	if m[0].told != 1 || m[2].told != 0 {
		t.Errorf("told %d and %d times", m[0].told, m[2].told)
	}
	w.calls = nil
	s.SetAttached(n, []uint16{1, 3})
	m[0].shows(t, 7)
	m[1].shows(t)
	if m[0].told != 1 || m[1].told != 2 || !slices.Equal(w.calls, []string{"drain 7"}) {
		t.Errorf("told %d and %d times, workers %v", m[0].told, m[1].told, w.calls)
	}
	if ids := s.AttachedTo(n); !slices.Equal(ids, []uint16{1, 3}) {
		t.Errorf("attached to %v", ids)
	}
	s.RemoveNamespace(n)
	m[0].shows(t)
	if s.Namespace(7) != nil || !slices.Equal(w.calls, []string{"drain 7", "drain 7", "forget"}) {
		t.Errorf("workers %v", w.calls)
	}
}

func TestAlter(t *testing.T) {
	s, w, m := newSubsystem(t, 1)
	n := s.AddNamespace(NamespaceConfig{NSID: 1, Backend: openMem(t, "mem:size=1MiB"), Controllers: []uint16{1}})
	err := s.Alter(n, func(b backend.Backend) error {
		if g := n.Gate(); g == nil || !g.Hold {
			t.Errorf("gate %+v", g)
		}
		return fmt.Errorf("no")
	})
	if err == nil || err.Error() != "no" {
		t.Errorf("error %v", err)
	}
	if want := []string{"drain 1", "suspend", "resume", "release 1"}; !slices.Equal(w.calls, want) {
		t.Errorf("workers %v, want %v", w.calls, want)
	}
	m[0].shows(t, 1)
	if n.Gate() != nil {
		t.Error("the gate stays closed")
	}
}

func TestExclusiveIsForOne(t *testing.T) {
	s, _, _ := newSubsystem(t, 0)
	n := s.AddNamespace(NamespaceConfig{NSID: 1, Backend: openMem(t, "mem:size=1MiB")})
	inside := 0
	for range 20 {
		s.Go(func() {
			n.Exclusive(func() {
				if inside++; inside != 1 {
					t.Error("two have the namespace for themselves")
				}
				inside--
			})
		})
	}
	s.Close()
	if n.Gate() != nil {
		t.Error("the gate stays closed")
	}
}

func TestSubsystemReset(t *testing.T) {
	_, _, m := newSubsystem(t, 3)
	m[1].c.Disconnect()
	m[0].c.ResetSubsystem()
	if m[0].resets != 0 || m[1].resets != 0 || m[2].resets != 1 {
		t.Errorf("resets %d %d %d", m[0].resets, m[1].resets, m[2].resets)
	}
}

func TestHostsWithoutIdentifierAreDistinct(t *testing.T) {
	_, _, m := newSubsystem(t, 2)
	a, b := m[0].c.Host(), m[1].c.Host()
	m[0].c.Disconnect()
	if again := m[0].c.Host(); a == b || a == again {
		t.Errorf("%v, %v, %v", a, b, again)
	}
}
