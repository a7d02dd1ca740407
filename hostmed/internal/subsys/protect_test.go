package subsys

import (
	"errors"
	"slices"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/internal/state"
)

func TestProtection(t *testing.T) {
	disk := openMem(t, "file:"+t.TempDir()+"/disk,size=1MiB")
	store := state.NewMemory()
	start := func(nsid uint32) (*Subsystem, *fakeWorkers, *Namespace) {
		w := &fakeWorkers{}
		s := New(Config{NQN: "nqn.test", Workers: w, Store: store})
		t.Cleanup(s.Close)
		return s, w, s.AddNamespace(NamespaceConfig{NSID: nsid, Backend: disk})
	}
	_, w, n := start(1)
	set := func(p Protection, want error) {
		t.Helper()
		if err := n.SetProtection(p); (err == nil) != (want == nil) {
			t.Errorf("to %d: %v", p, err)
		}
	}
	is := func(want Protection) {
		t.Helper()
		if p := n.Protection(); p != want || (n.Gate() != nil) != (want != Unprotected) {
			t.Errorf("state %d, gate %+v, want %d", p, n.Gate(), want)
		}
	}
	is(Unprotected)
	w.calls = nil
	set(Protected, nil)
	is(Protected)
	if !slices.Equal(w.calls, []string{"drain 1"}) {
		t.Errorf("workers %v: writes may be under way", w.calls)
	}
	var s *Subsystem
	s, _, n = start(1) // hostmed is started again
	a, b := s.AddController(1), s.AddController(2)
	is(Protected)
	_, _, other := start(2) // the same medium under another id
	if other.Protection() != Unprotected {
		t.Error("another namespace is protected")
	}
	set(Unprotected, nil)
	is(Unprotected)

	// Until power is off, which it is when no controller has a client.
	a.Connect(&fakeMember{c: a})
	set(ProtectedUntilPowerCycle, nil)
	set(Unprotected, errors.New("not before power is off"))
	set(ProtectedForEver, errors.New("nor to another state"))
	b.Connect(&fakeMember{c: b})
	a.Disconnect()
	a.Connect(&fakeMember{c: a})
	is(ProtectedUntilPowerCycle)
	a.Disconnect()
	b.Disconnect()
	b.Connect(&fakeMember{c: b})
	is(Unprotected)
	set(ProtectedUntilPowerCycle, nil)
	_, _, n = start(1)
	is(Unprotected)

	set(ProtectedForEver, nil)
	set(Unprotected, errors.New("for ever"))
	s, _, n = start(1)
	is(ProtectedForEver)
	c := s.AddController(1)
	c.Connect(&fakeMember{c: c})
	is(ProtectedForEver)
}

// failingStore is a store on a disk that is full.
type failingStore struct{ state.Store }

func (failingStore) Save(string, any) error         { return errors.New("no room") }
func (failingStore) Load(string, any) (bool, error) { return false, errors.New("unreadable") }

func TestProtectionThatCannotBeSaved(t *testing.T) {
	s := New(Config{NQN: "nqn.test", Workers: &fakeWorkers{}, Store: failingStore{}})
	defer s.Close()
	n := s.AddNamespace(NamespaceConfig{NSID: 1, Backend: openMem(t, "mem:size=1MiB")})
	if err := n.SetProtection(Protected); err == nil || n.Protection() != Protected {
		t.Errorf("%v, state %d: it holds until hostmed ends, and the host is told", err, n.Protection())
	}
}
