package subsys

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/internal/state"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// cluster is a namespace that the hosts A, B and C have, each by a controller of its own.
type cluster struct {
	t       *testing.T
	s       *Subsystem
	w       *fakeWorkers
	n       *Namespace
	members map[string]*fakeMember
}

func newCluster(t *testing.T, store state.Store) *cluster {
	w := &fakeWorkers{}
	c := &cluster{t: t, w: w, s: New(Config{NQN: "nqn.test", Workers: w, Store: store}), members: map[string]*fakeMember{}}
	t.Cleanup(c.s.Close)
	var ids []uint16
	for i, name := range []string{"A", "B", "C"} {
		x := c.s.AddController(uint16(i + 1))
		m := &fakeMember{c: x}
		x.Connect(m)
		c.members[name] = m
		ids = append(ids, x.ID)
	}
	for name := range c.members {
		c.identify(name)
	}
	c.n = c.s.AddNamespace(NamespaceConfig{NSID: 1, Backend: openMem(t, "mem:size=1MiB"), Shared: true, Controllers: ids})
	return c
}

// identify gives a host its identifier.
func (c *cluster) identify(name string) {
	id := make([]byte, 16)
	id[0] = name[0]
	if st := c.members[name].c.SetHost(id); !st.OK() {
		c.t.Fatal(st)
	}
}

// do runs a command in words: "A register 1", "A replace 1 2", "B acquire 2 type", "B preempt own other type", "A release 1 type",
// "A clear 1", "A unregister 1"; "iekey" at the end ignores the key.
func (c *cluster) do(line string) nvme.Status {
	c.t.Helper()
	f := strings.Fields(line)
	q := &ReservationRequest{Host: c.members[f[0]].c.Host()}
	num := func(i int) (v uint64) {
		if i < len(f) {
			_, _ = fmt.Sscan(f[i], &v)
		}
		return v
	}
	cmd := func(op uint8, action, rest uint32) {
		q.Command = nvme.Command{Opcode: op, NSID: 1, CDW10: action | rest}
	}
	q.Keys.Current = num(2)
	switch f[1] {
	case "register":
		cmd(nvme.IOReservationRegister, nvme.ReservationRegister, 0)
		q.Keys = nvme.ReservationKeys{Other: num(2)}
	case "persist": // register, with PTPL
		cmd(nvme.IOReservationRegister, nvme.ReservationRegister, nvme.CPTPLSet<<30)
		q.Keys = nvme.ReservationKeys{Other: num(2)}
	case "unregister":
		cmd(nvme.IOReservationRegister, nvme.ReservationUnregister, 0)
	case "replace":
		cmd(nvme.IOReservationRegister, nvme.ReservationReplace, 0)
		q.Keys.Other = num(3)
	case "acquire":
		cmd(nvme.IOReservationAcquire, nvme.ReservationAcquire, uint32(num(3))<<8)
	case "preempt", "preempt+abort":
		action := uint32(nvme.ReservationPreempt)
		if f[1] == "preempt+abort" {
			action = nvme.ReservationPreemptAbort
		}
		cmd(nvme.IOReservationAcquire, action, uint32(num(4))<<8)
		q.Keys.Other = num(3)
	case "release":
		cmd(nvme.IOReservationRelease, nvme.ReservationRelease, uint32(num(3))<<8)
	case "clear":
		cmd(nvme.IOReservationRelease, nvme.ReservationClear, 0)
	default:
		c.t.Fatalf("what is %q?", line)
	}
	if f[len(f)-1] == "iekey" {
		q.Command.CDW10 |= 1 << 3
	}
	st, later := c.n.Reserve(q)
	if later != nil {
		st = later()
	}
	return st.Code()
}

// state is "type 3, A*=1 B=2": who is registered with which key, a star for holders.
func (c *cluster) state() string {
	r := c.n.Report()
	out := fmt.Sprintf("type %d,", r.Type)
	for _, x := range r.Controllers {
		star := ""
		if x.Holds {
			star = "*"
		}
		out += fmt.Sprintf(" %c%s=%d", x.HostID[0], star, x.Key)
	}
	return out
}

// told is what each host was told, and forgets it: "B12 C3".
func (c *cluster) told() string {
	var out []string
	for _, name := range []string{"A", "B", "C"} {
		m := c.members[name]
		if len(m.notes) > 0 {
			slices.Sort(m.notes)
			s := name
			for _, k := range m.notes {
				s += fmt.Sprint(k)
			}
			out = append(out, s)
		}
		m.notes = nil
	}
	return strings.Join(out, " ")
}

// TestReservations walks through the actions of NVMe Base 2.0c 8.19. Each step is a command, its status, the state after it and who
// was told what: 1 registration preempted, 2 reservation released, 3 reservation preempted.
func TestReservations(t *testing.T) {
	const (
		ok       = nvme.StatusSuccess
		conflict = nvme.StatusReservationConflict
		invalid  = nvme.StatusInvalidField
	)
	type step struct {
		do    string
		st    nvme.Status
		state string
		told  string
	}
	for name, steps := range map[string][]step{
		"register": {
			{"A register 1", ok, "type 0, A=1", ""},
			{"A register 1", ok, "type 0, A=1", ""},
			{"A register 2", conflict, "type 0, A=1", ""},
			{"A register 0", invalid, "type 0, A=1", ""},
			{"B register 1", ok, "type 0, A=1 B=1", ""},
			{"B unregister 2", conflict, "type 0, A=1 B=1", ""},
			{"B unregister 1", ok, "type 0, A=1", ""},
			{"B unregister 1", conflict, "type 0, A=1", ""},
			{"B unregister 1 iekey", conflict, "type 0, A=1", ""},
			{"A unregister 9 iekey", ok, "type 0,", ""},
		},
		"replace": {
			{"A replace 1 2", conflict, "type 0,", ""},
			{"A replace 0 5 iekey", ok, "type 0, A=5", ""}, // registers it
			{"A unregister 5", ok, "type 0,", ""},
			{"A register 1", ok, "type 0, A=1", ""},
			{"A replace 7 2", conflict, "type 0, A=1", ""},
			{"A replace 1 2", ok, "type 0, A=2", ""},
			{"A replace 7 3 iekey", ok, "type 0, A=3", ""},
			{"A replace 3 0", invalid, "type 0, A=3", ""},
		},
		"acquire and release": {
			{"A acquire 1 1", conflict, "type 0,", ""},
			{"A register 1", ok, "type 0, A=1", ""},
			{"B register 2", ok, "type 0, A=1 B=2", ""},
			{"A acquire 2 1", conflict, "type 0, A=1 B=2", ""},
			{"A acquire 1 0", invalid, "type 0, A=1 B=2", ""},
			{"A acquire 1 7", invalid, "type 0, A=1 B=2", ""},
			{"A acquire 1 1 iekey", invalid, "type 0, A=1 B=2", ""},
			{"A acquire 1 1", ok, "type 1, A*=1 B=2", ""},
			{"A acquire 1 1", ok, "type 1, A*=1 B=2", ""},
			{"A acquire 1 2", conflict, "type 1, A*=1 B=2", ""},
			{"B acquire 2 1", conflict, "type 1, A*=1 B=2", ""},
			{"B release 2 1", ok, "type 1, A*=1 B=2", ""},
			{"C release 3 1", conflict, "type 1, A*=1 B=2", ""},
			{"A release 2 1", conflict, "type 1, A*=1 B=2", ""},
			{"A release 1 2", invalid, "type 1, A*=1 B=2", ""},
			{"A release 1 1 iekey", invalid, "type 1, A*=1 B=2", ""},
			{"A release 1 1", ok, "type 0, A=1 B=2", ""},
			{"A release 1 1", ok, "type 0, A=1 B=2", ""},
		},
		"registrants are told of a release": {
			{"A register 1", ok, "type 0, A=1", ""},
			{"B register 2", ok, "type 0, A=1 B=2", ""},
			{"A acquire 1 3", ok, "type 3, A*=1 B=2", ""},
			{"A release 1 3", ok, "type 0, A=1 B=2", "B2"},
			{"A acquire 1 4", ok, "type 4, A*=1 B=2", ""},
			{"A unregister 1", ok, "type 0, B=2", "B2"},
		},
		"the holder leaves": {
			{"A register 1", ok, "type 0, A=1", ""},
			{"B register 2", ok, "type 0, A=1 B=2", ""},
			{"A acquire 1 2", ok, "type 2, A*=1 B=2", ""},
			{"A unregister 1", ok, "type 0, B=2", ""},
		},
		"all registrants hold": {
			{"A register 1", ok, "type 0, A=1", ""},
			{"B register 2", ok, "type 0, A=1 B=2", ""},
			{"A acquire 1 5", ok, "type 5, A*=1 B*=2", ""},
			{"B acquire 2 5", ok, "type 5, A*=1 B*=2", ""},
			{"B acquire 2 6", conflict, "type 5, A*=1 B*=2", ""},
			{"A unregister 1", ok, "type 5, B*=2", ""},
			{"C register 3", ok, "type 5, B*=2 C*=3", ""},
			{"C release 3 5", ok, "type 0, B=2 C=3", "B2"},
			{"B acquire 2 6", ok, "type 6, B*=2 C*=3", ""},
			{"C unregister 3", ok, "type 6, B*=2", ""},
			{"B unregister 2", ok, "type 0,", ""},
		},
		"preempt the holder": {
			{"A register 1", ok, "type 0, A=1", ""},
			{"B register 2", ok, "type 0, A=1 B=2", ""},
			{"C register 1", ok, "type 0, A=1 B=2 C=1", ""},
			{"A acquire 1 1", ok, "type 1, A*=1 B=2 C=1", ""},
			{"B preempt 2 9 1", conflict, "type 1, A*=1 B=2 C=1", ""},
			{"B preempt 2 0 1", invalid, "type 1, A*=1 B=2 C=1", ""},
			{"B preempt 9 1 1", conflict, "type 1, A*=1 B=2 C=1", ""},
			{"B preempt 2 1 3", ok, "type 3, B*=2", "A13 C1"},
		},
		"preempt a registrant": {
			{"A register 1", ok, "type 0, A=1", ""},
			{"B register 2", ok, "type 0, A=1 B=2", ""},
			{"C register 3", ok, "type 0, A=1 B=2 C=3", ""},
			{"A acquire 1 3", ok, "type 3, A*=1 B=2 C=3", ""},
			{"B preempt 2 3 1", ok, "type 3, A*=1 B=2", "C1"},
			{"B preempt 2 2 1", ok, "type 3, A*=1", ""},
		},
		"preempt changes the type": {
			{"A register 1", ok, "type 0, A=1", ""},
			{"B register 2", ok, "type 0, A=1 B=2", ""},
			{"A acquire 1 3", ok, "type 3, A*=1 B=2", ""},
			{"A preempt 1 1 1", ok, "type 1, A*=1 B=2", "B2"},
		},
		"preempt without a reservation": {
			{"A register 1", ok, "type 0, A=1", ""},
			{"B register 2", ok, "type 0, A=1 B=2", ""},
			{"A preempt 1 2 1", ok, "type 0, A=1", "B1"},
			{"A preempt 1 2 1", conflict, "type 0, A=1", ""},
			{"A preempt 1 1 1", ok, "type 0,", ""},
		},
		"preempt all registrants": {
			{"A register 1", ok, "type 0, A=1", ""},
			{"B register 2", ok, "type 0, A=1 B=2", ""},
			{"C register 3", ok, "type 0, A=1 B=2 C=3", ""},
			{"A acquire 1 6", ok, "type 6, A*=1 B*=2 C*=3", ""},
			{"B preempt 2 3 6", ok, "type 6, A*=1 B*=2", "C1"},
			{"B preempt 2 9 6", conflict, "type 6, A*=1 B*=2", ""},
			{"B preempt 2 0 1", ok, "type 1, B*=2", "A13"},
		},
		"clear": {
			{"A register 1", ok, "type 0, A=1", ""},
			{"B register 2", ok, "type 0, A=1 B=2", ""},
			{"A acquire 1 1", ok, "type 1, A*=1 B=2", ""},
			{"B clear 3", conflict, "type 1, A*=1 B=2", ""},
			{"B clear 2", ok, "type 0,", "A3"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, nil)
			for i, s := range steps {
				if st := c.do(s.do); st != s.st {
					t.Errorf("%d: %s: %v, want %v", i, s.do, st, s.st)
				}
				if got := c.state(); got != s.state {
					t.Fatalf("%d: %s: %q, want %q", i, s.do, got, s.state)
				}
				if got := c.told(); got != s.told {
					t.Errorf("%d: %s: told %q, want %q", i, s.do, got, s.told)
				}
				r := c.n.Report()
				if g := c.n.Gate(); (g != nil) != (r.Type != 0) || g != nil && g.Reserved.Type != r.Type {
					t.Errorf("%d: %s: gate %+v with a reservation of type %d", i, s.do, g, r.Type)
				}
			}
		})
	}
}

func TestReservationGeneration(t *testing.T) {
	c := newCluster(t, nil)
	for _, s := range []struct {
		do  string
		gen uint32
	}{
		{"A register 1", 1}, {"A register 1", 1}, {"B register 2", 2}, {"A replace 1 3", 3}, {"A acquire 3 1", 3}, {"A release 3 1", 3},
		{"B preempt 2 3 1", 4}, {"B unregister 2", 5}, {"B unregister 2", 5}, {"A register 1", 6}, {"A clear 1", 7},
	} {
		c.do(s.do)
		if g := c.n.Report().Generation; g != s.gen {
			t.Errorf("%s: generation %d, want %d", s.do, g, s.gen)
		}
	}
}

func TestPreemptAndAbortWaits(t *testing.T) {
	c := newCluster(t, nil)
	c.do("A register 1")
	c.do("B register 2")
	c.do("A acquire 1 1")
	if slices.Contains(c.w.calls, "drain 1") {
		t.Error("somebody waited")
	}
	if st := c.do("B preempt+abort 2 1 1"); !st.OK() || !slices.Contains(c.w.calls, "drain 1") {
		t.Errorf("%v, workers %v", st, c.w.calls)
	}
}

func TestHostIdentifier(t *testing.T) {
	_, _, m := newSubsystem(t, 1)
	c := m[0].c
	if st := c.SetHost(make([]byte, 8)); !st.OK() || c.Host().Anon == 0 {
		t.Errorf("zero: %v, %+v", st, c.Host())
	}
	for _, x := range []struct {
		id   string
		want nvme.Status
	}{
		{"12345678", nvme.StatusSuccess}, {"12345678", nvme.StatusSuccess}, {"12345679", nvme.StatusSequenceError},
		{"\x00\x00\x00\x00\x00\x00\x00\x00", nvme.StatusSequenceError}, {"12345678\x00\x00\x00\x00\x00\x00\x00\x00", nvme.StatusSequenceError},
	} {
		if st := c.SetHost([]byte(x.id)); st != x.want {
			t.Errorf("%q: %v, want %v", x.id, st, x.want)
		}
	}
	c.ResetHost()
	if st := c.SetHost([]byte("abcdefghijklmnop")); !st.OK() || !c.Host().Extended {
		t.Errorf("after a reset: %v, %+v", st, c.Host())
	}
}

// A host without an identifier is another one after a reset, so what it had is gone; one with an identifier keeps it, and is the same when
// it comes by another controller.
func TestReservationsAndResets(t *testing.T) {
	c := newCluster(t, nil)
	c.members["C"].c.ResetHost() // no identifier
	c.do("A register 1")
	c.do("C register 3")
	c.do("C acquire 3 1")
	if got := c.state(); got != "type 1, A=1 \x00*=3" {
		t.Errorf("%q", got)
	}
	c.members["C"].c.ResetHost()
	if got := c.state(); got != "type 0, A=1" {
		t.Errorf("after a reset of the host without an identifier: %q", got)
	}
	c.do("A acquire 1 1")
	c.members["A"].c.ResetHost()
	if got := c.state(); got != "type 1, A*=1" {
		t.Errorf("after a reset of the holder: %q", got)
	}
	if r := c.n.Report(); r.Controllers[0].CNTLID != 0xffff {
		t.Errorf("the holder has no controller now, and the report says %d", r.Controllers[0].CNTLID)
	}
	id := make([]byte, 16)
	id[0] = 'A'
	if st := c.members["C"].c.SetHost(id); !st.OK() {
		t.Fatal(st)
	}
	c.identify("A")
	r := c.n.Report()
	if len(r.Controllers) != 2 || r.Controllers[0].CNTLID != 1 || r.Controllers[1].CNTLID != 3 || !r.Controllers[1].Holds {
		t.Errorf("a host with two controllers: %+v", r.Controllers)
	}
	if st := c.do("C release 1 1"); !st.OK() || c.n.Gate() != nil {
		t.Errorf("release by the holder's other controller: %v", st)
	}
}

// TestPersistThroughPowerLoss: power is off when no controller has a client.
func TestPersistThroughPowerLoss(t *testing.T) {
	store := state.NewMemory()
	c := newCluster(t, store)
	off := func() {
		for _, m := range c.members {
			m.c.Disconnect()
		}
		for _, m := range c.members {
			m.c.Connect(m)
		}
	}
	c.do("A register 1")
	c.do("A acquire 1 1")
	off()
	if got := c.state(); got != "type 0," || c.n.Gate() != nil {
		t.Errorf("without PTPL: %q", got)
	}
	for name := range c.members {
		c.identify(name)
	}
	c.do("A persist 1")
	c.do("B register 2")
	c.do("B acquire 2 4")
	if !c.n.Report().Persist {
		t.Error("the report does not say that it persists")
	}
	off()
	if got := c.state(); got != "type 4, A=1 B*=2" {
		t.Errorf("with PTPL: %q", got)
	}

	// hostmed ends, and starts again.
	uuid := c.n.Medium().Info.UUID
	again := New(Config{NQN: "nqn.test", Workers: &fakeWorkers{}, Store: store})
	n := again.AddNamespace(NamespaceConfig{NSID: 1, Backend: openMem(t, "mem:size=1MiB"), Shared: true, UUID: uuid})
	r := n.Report()
	if r.Type != 4 || len(r.Controllers) != 2 || r.Controllers[0].Key != 1 || !r.Controllers[1].Holds || !r.Persist || r.Generation != 2 {
		t.Errorf("after a restart: %+v", r)
	}
	if v, _ := n.Gate().Check(Reads, stranger); v != Refuse {
		t.Error("the gate of the namespace is open after the restart")
	}
	// Another medium under the same id is another namespace.
	other := New(Config{NQN: "nqn.test", Workers: &fakeWorkers{}, Store: store})
	if n := other.AddNamespace(NamespaceConfig{NSID: 1, Backend: openMem(t, "mem:size=1MiB"), Shared: true}); n.Report().Type != 0 {
		t.Error("another medium is reserved")
	}
	if err := n.SetPersist(false); err != nil {
		t.Fatal(err)
	}
	if n := New(Config{NQN: "nqn.test", Workers: &fakeWorkers{}, Store: store}).AddNamespace(
		NamespaceConfig{NSID: 1, Backend: openMem(t, "mem:size=1MiB"), Shared: true, UUID: uuid}); n.Report().Type != 0 || n.Persist() {
		t.Error("PTPL was taken back, and the reservation is still there")
	}

	// Where nothing outlives hostmed, PTPL cannot be set.
	c = newCluster(t, nil)
	if st := c.do("A persist 1"); st != nvme.StatusInvalidField {
		t.Errorf("PTPL without a store: %v", st)
	}
}

func TestRegistrantsAreBounded(t *testing.T) {
	c := newCluster(t, nil)
	for i := range maxRegistrants + 10 {
		q := &ReservationRequest{Command: nvme.Command{Opcode: nvme.IOReservationRegister}, Host: *anonymous(), Keys: nvme.ReservationKeys{Other: 1}}
		st, _ := c.n.Reserve(q)
		if want := i < maxRegistrants; st.OK() != want {
			t.Fatalf("registrant %d: %v", i, st)
		}
	}
}

func TestReservationStatusLayout(t *testing.T) {
	s := nvme.ReservationStatus{Generation: 0x01020304, Type: 3, Persist: true, Controllers: []nvme.RegisteredController{
		{CNTLID: 7, Holds: true, HostID: [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, Key: 0x1122334455667788}, {CNTLID: 0xffff},
	}}
	b := s.Encode(false)
	if len(b) != 24*3 || b[0] != 4 || b[4] != 3 || b[5] != 2 || b[9] != 1 || b[24] != 7 || b[26] != 1 || b[32] != 1 || b[40] != 0x88 || b[48] != 0xff {
		t.Errorf("% x", b)
	}
	b = s.Encode(true)
	if len(b) != 64*3 || b[64] != 7 || b[66] != 1 || b[72] != 0x88 || b[80] != 1 || b[89] != 10 {
		t.Errorf("% x", b)
	}
	var back nvme.ReservationStatus
	if back.Decode(b, true); !slices.Equal(back.Controllers, s.Controllers) || back.Generation != s.Generation || back.Type != 3 || !back.Persist {
		t.Errorf("%+v", back)
	}
	if back.Decode(b[:100], true); len(back.Controllers) != 0 {
		t.Errorf("cut off: %+v", back)
	}
}
