package ctrl

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// noWorkers is a data path that has nothing under way.
type noWorkers struct{}

func (noWorkers) Drain(*subsys.Namespace)      {}
func (noWorkers) Release(*subsys.Namespace)    {}
func (noWorkers) Suspend(backend.Backend)      {}
func (noWorkers) Resume(backend.Backend) error { return nil }
func (noWorkers) Forget(backend.Backend)       {}

// showing is a client that shows changes at once.
type showing struct {
	self *subsys.Controller
	c    *Controller
}

func (m *showing) list() []Namespace {
	var list []Namespace
	for _, n := range m.self.Namespaces() {
		list = append(list, Namespace{NSID: n.NSID, Info: n.Medium().Info, Backend: n.Medium().Backend, Of: n, Protection: n.Protection()})
	}
	return list
}

func (m *showing) Changed(done func()) {
	m.c.Post(func() {
		m.c.UpdateNamespaces(m.list())
		done()
	})
}

func (m *showing) Reset() {}

func (m *showing) Notice(uint32, uint8) {}
func (m *showing) Warned()              {}

func TestWriteProtect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sub := subsys.New(subsys.Config{NQN: "nqn.test", Workers: noWorkers{}})
		defer sub.Close()
		for nsid := uint32(1); nsid <= 2; nsid++ {
			b, err := backend.Open("mem:size=1MiB")
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			sub.AddNamespace(subsys.NamespaceConfig{NSID: nsid, Backend: b, Controllers: []uint16{7}})
		}
		m := &showing{self: sub.AddController(7)}
		cfg := testConfig()
		cfg.Self, cfg.Namespaces = m.self, m.list()
		h := newEnabled(t, cfg)
		m.c = h.c
		m.self.Connect(m)
		// later runs a command that completes in the background.
		later := func(cmd nvme.Command) nvme.Status {
			t.Helper()
			cid := h.push(cmd)
			h.ring()
			for range 4 { // there and back through the subsystem
				synctest.Wait()
				h.c.AdminKick()
			}
			es := h.reap()
			if len(es) == 0 || es[len(es)-1].CID() != cid {
				t.Fatalf("%+v", es)
			}
			return es[len(es)-1].Status()
		}
		set := func(nsid, state uint32) nvme.Command { return setFeature(nvme.FeatureWriteProtect, nsid, state) }
		get := func(nsid uint32) uint32 { return h.ok(getFeature(nvme.FeatureWriteProtect, nsid, 0, 0)) }
		attributes := func(nsid uint32) uint8 {
			var id nvme.IdentifyNamespace
			copy(id.Bytes()[:], h.identify(nvme.CNSNamespace, nsid))
			return id.NSATTR
		}
		if id := h.controller(); id.NWPC != 7 {
			t.Errorf("NWPC %#x", id.NWPC)
		}
		if caps := h.ok(getFeature(nvme.FeatureWriteProtect, 1, nvme.FeatureSupported, 0)); caps != nvme.FeatureCapChangeable|nvme.FeatureCapNamespace {
			t.Errorf("capabilities %#x", caps)
		}
		h.ok(setFeature(nvme.FeatureAsyncEvents, 0, uint32(nvme.EventConfigNamespace)))
		h.push(aer())
		h.ring()
		flushes := errors.New("not flushed")
		h.dp.flushErr = flushes
		if st := later(set(1, 1)); st.Code() != nvme.StatusInternalError {
			t.Errorf("protected without a flush: %v", st)
		}
		h.dp.flushErr = nil
		if st := later(set(1, 1)); !st.OK() {
			t.Fatal(st)
		}
		if get(1) != 1 || get(2) != 0 || attributes(1) != nvme.NSATTRWriteProtected || attributes(2) != 0 {
			t.Errorf("states %d and %d, attributes %d and %d", get(1), get(2), attributes(1), attributes(2))
		}
		var l nvme.ChangedNamespaceList
		copy(l.Bytes()[:], h.log(nvme.LogChangedNamespaces, 4096, false))
		if l.Len() != 1 || l.ID[0] != 1 {
			t.Errorf("changed %v, want 1", l.ID[:l.Len()])
		}
		if v := h.ok(getFeature(nvme.FeatureWriteProtect, 1, nvme.FeatureDefault, 0)); v != 0 {
			t.Errorf("default %d", v)
		}
		if st := later(set(nvme.NSIDAll, 0)); !st.OK() || get(1) != 0 {
			t.Errorf("%v, state %d", st, get(1))
		}
		if st := later(set(2, 2)); !st.OK() || get(2) != 2 {
			t.Errorf("%v, state %d", st, get(2))
		}
		h.fails(set(2, 0), nvme.StatusFeatureNotChangeable)
		h.fails(set(nvme.NSIDAll, 1), nvme.StatusFeatureNotChangeable)
		h.fails(set(1, 4), nvme.StatusInvalidField)
		h.fails(set(3, 1), nvme.StatusInvalidField) // inactive
		h.fails(saved(set(1, 1)), nvme.StatusFeatureNotSaveable)
		if st := later(set(2, 2)); !st.OK() { // what is so already
			t.Errorf("the same state: %v", st)
		}
		h.disable()
		h.enable()
		if get(2) != 2 {
			t.Error("a reset is no power cycle")
		}
	})
}
