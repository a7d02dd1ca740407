package ctrl

import (
	"bytes"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/state"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// idle is a data path of which nobody asks anything.
type idle struct{}

func (idle) Drain(*subsys.Namespace)      {}
func (idle) Release(*subsys.Namespace)    {}
func (idle) Suspend(backend.Backend)      {}
func (idle) Resume(backend.Backend) error { return nil }
func (idle) Forget(backend.Backend)       {}

// newReserving is an enabled controller with a shared namespace, 1, and a private one, 2.
func newReserving(t *testing.T, store state.Store) (*host, *subsys.Namespace) {
	s := subsys.New(subsys.Config{NQN: "nqn.test", Workers: idle{}, Store: store})
	t.Cleanup(s.Close)
	self := s.AddController(7)
	cfg := testConfig()
	cfg.Self, cfg.Namespaces = self, nil
	var shared *subsys.Namespace
	for nsid := uint32(1); nsid <= 2; nsid++ {
		b, err := backend.Open("mem:size=1MiB")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		n := s.AddNamespace(subsys.NamespaceConfig{NSID: nsid, Backend: b, Shared: nsid == 1, Controllers: []uint16{7}})
		cfg.Namespaces = append(cfg.Namespaces, *View(n))
		if nsid == 1 {
			shared = n
		}
	}
	return newEnabled(t, cfg), shared
}

func TestReservationsAreOffered(t *testing.T) {
	for _, store := range []state.Store{nil, state.NewMemory()} {
		h, _ := newReserving(t, store)
		var id nvme.IdentifyController
		copy(id.Bytes()[:], h.identify(nvme.CNSController, 0))
		if id.ONCS&nvme.ONCSReservations == 0 || id.CTRATT&nvme.CTRATTHostID128 == 0 {
			t.Errorf("ONCS %#x CTRATT %#x", id.ONCS, id.CTRATT)
		}
		want := uint8(nvme.RESCAPTypes | nvme.RESCAPIEKEY)
		if store != nil {
			want |= nvme.RESCAPPersist
		}
		for nsid, want := range map[uint32]uint8{1: want, 2: 0} {
			var ns nvme.IdentifyNamespace
			copy(ns.Bytes()[:], h.identify(nvme.CNSNamespace, nsid))
			if ns.RESCAP != want {
				t.Errorf("namespace %d: RESCAP %#x, want %#x", nsid, ns.RESCAP, want)
			}
		}
	}
	h := newEnabled(t, testConfig()) // in no subsystem
	for _, fid := range []nvme.FeatureID{nvme.FeatureHostID, nvme.FeatureReservationNotice, nvme.FeatureReservationPersist} {
		h.fails(getFeature(fid, 1, nvme.FeatureCurrent, 0), nvme.StatusInvalidField)
	}
	h.fails(logCmd(nvme.LogReservation, 0, 64, false), nvme.StatusInvalidLogPage)
}

func TestHostIdentifierFeature(t *testing.T) {
	h, _ := newReserving(t, nil)
	put := func(id string) {
		if !h.mem.WriteIOVA(dataIOVA, []byte(id)) {
			t.Fatal("data buffer")
		}
	}
	get := func(extended uint32, n int) []byte {
		h.ok(getFeature(nvme.FeatureHostID, 0, nvme.FeatureCurrent, extended))
		return h.data(n)
	}
	if id := get(1, 16); !bytes.Equal(id, make([]byte, 16)) {
		t.Errorf("at first % x", id)
	}
	put("0123456789abcdef")
	h.ok(setFeature(nvme.FeatureHostID, 0, nvme.HostIDExtended))
	if id := get(1, 16); string(id) != "0123456789abcdef" {
		t.Errorf("% x", id)
	}
	h.fails(getFeature(nvme.FeatureHostID, 0, nvme.FeatureCurrent, 0), nvme.StatusHostIDInconsistent)
	put("another one, now")
	h.fails(setFeature(nvme.FeatureHostID, 0, nvme.HostIDExtended), nvme.StatusSequenceError)
	save := setFeature(nvme.FeatureHostID, 0, nvme.HostIDExtended)
	save.CDW10 |= 1 << 31
	h.fails(save, nvme.StatusFeatureNotSaveable)
	h.disable()
	h.enable()
	put("12345678")
	h.ok(setFeature(nvme.FeatureHostID, 0, 0))
	if id := get(0, 8); string(id) != "12345678" {
		t.Errorf("after a reset % x", id)
	}
}

func TestReservationNotices(t *testing.T) {
	h, _ := newReserving(t, nil)
	next := func() (p nvme.ReservationNotice) {
		copy(p.Bytes()[:], h.log(nvme.LogReservation, 64, false))
		return p
	}
	if p := next(); p.Type != 0 || p.Count != 0 {
		t.Errorf("an empty log has %+v", p)
	}
	want := uint32(nvme.MakeAsyncEvent(nvme.EventIO, nvme.EventReservation, nvme.LogReservation))
	h.push(aer())
	h.push(aer())
	h.ring()
	h.c.ReservationNotice(1, nvme.NoticeReservationReleased)
	h.c.ReservationNotice(1, nvme.NoticeRegistrationPreempted)
	if es := h.reap(); len(es) != 1 || es[0].Result() != want {
		t.Fatalf("events %+v, want one: the second is masked until the log is read", es)
	}
	h.push(logCmd(nvme.LogReservation, 0, 64, false))
	h.ring()
	if es := h.reap(); len(es) != 2 || es[0].Result()+es[1].Result() != want {
		t.Errorf("reading the first page: %+v, want its completion and the next event", es)
	}
	var p nvme.ReservationNotice
	copy(p.Bytes()[:], h.data(64))
	if p.Type != nvme.NoticeReservationReleased || p.Count != 1 || p.NSID != 1 || p.Available != 1 {
		t.Errorf("first page %+v", p)
	}
	h.log(nvme.LogReservation, 64, true) // retained
	if p := next(); p.Type != nvme.NoticeRegistrationPreempted || p.Count != 2 || p.Available != 0 {
		t.Errorf("second page %+v", p)
	}
	if p := next(); p.Type != 0 {
		t.Errorf("third page %+v", p)
	}

	h.ok(setFeature(nvme.FeatureReservationNotice, 1, 1<<nvme.NoticeReservationReleased))
	if v := h.ok(getFeature(nvme.FeatureReservationNotice, 1, nvme.FeatureCurrent, 0)); v != 1<<nvme.NoticeReservationReleased {
		t.Errorf("mask %#x", v)
	}
	h.c.ReservationNotice(1, nvme.NoticeReservationReleased)
	if p := next(); p.Type != 0 {
		t.Errorf("a notification that is masked: %+v", p)
	}
	h.ok(setFeature(nvme.FeatureReservationNotice, nvme.NSIDAll, 0xffffffff))
	if v := h.ok(getFeature(nvme.FeatureReservationNotice, 1, nvme.FeatureCurrent, 0)); v != 0xe {
		t.Errorf("mask %#x", v)
	}
	h.disable()
	h.enable()
	for range 300 {
		h.c.ReservationNotice(1, nvme.NoticeReservationPreempted)
	}
	if p := next(); p.Count != 46 || p.Available != 254 {
		t.Errorf("after 300 notifications the oldest page is %+v", p)
	}
}

func TestReservationPersistFeature(t *testing.T) {
	h, n := newReserving(t, state.NewMemory())
	set := func(nsid, v uint32) {
		t.Helper()
		cid := h.push(setFeature(nvme.FeatureReservationPersist, nsid, v))
		h.ring()
		h.c.async.work.Wait() // it is done in the background
		h.ring()
		if es := h.reap(); len(es) != 1 || es[0].CID() != cid || !es[0].Status().OK() {
			t.Errorf("%+v", es)
		}
	}
	set(1, 1)
	if v := h.ok(getFeature(nvme.FeatureReservationPersist, 1, nvme.FeatureCurrent, 0)); v != 1 || !n.Persist() {
		t.Errorf("PTPL %d", v)
	}
	set(nvme.NSIDAll, 0)
	if n.Persist() {
		t.Error("PTPL is still set")
	}
	h.fails(setFeature(nvme.FeatureReservationPersist, 2, 1), nvme.StatusInvalidField) // private
	h, _ = newReserving(t, nil)
	h.fails(setFeature(nvme.FeatureReservationPersist, 1, 1), nvme.StatusInvalidField)
}
