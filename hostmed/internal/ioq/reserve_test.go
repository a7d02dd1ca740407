package ioq

import (
	"encoding/binary"
	"path/filepath"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/state"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// silent is a client that is told nothing.
type silent struct{}

func (silent) Changed(done func())  { done() }
func (silent) Reset()               {}
func (silent) Notice(uint32, uint8) {}
func (silent) Warned()              {}

// twoHosts are two controllers, of two hosts, that have one namespace, each with a queue pair on a worker of its own.
type twoHosts struct {
	n     *subsys.Namespace
	rigs  [2]*rig
	pairs [2]*pair
}

func newTwoHosts(t *testing.T, b backend.Backend, store state.Store) *twoHosts {
	r := newRig(t, rigConfig{workers: 2, mode: ctrl.Trap, backend: b})
	s := subsys.New(subsys.Config{NQN: "nqn.test", Workers: Pool(r.workers), Store: store})
	r.closeAtEnd(s)
	h := &twoHosts{n: s.AddNamespace(subsys.NamespaceConfig{NSID: 1, Backend: b, Shared: true, Controllers: []uint16{1, 2}})}
	for i := range h.rigs {
		self := s.AddController(uint16(i + 1))
		self.Connect(silent{})
		if st := self.SetHost([]byte{byte(i + 1), 0, 0, 0, 0, 0, 0, 0}); !st.OK() {
			t.Fatal(st)
		}
		x := r
		if i == 1 {
			cfg := r.ctl.cfg
			x = &rig{t: t, workers: r.workers, mem: r.mem, guest: r.guest, errs: r.errs, next: 0x400000}
			var err error
			if x.ctl, err = NewController(cfg); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { x.ctl.Close() })
		}
		x.ctl.cfg.Self = self
		x.attach(h.n)
		h.rigs[i], h.pairs[i] = x, x.pair(uint16(i+1), 16, false)
	}
	return h
}

func (h *twoHosts) data(host int) uint64 { return dataOff + uint64(host)*0x10000 }

// resv runs a reservation command of a host.
func (h *twoHosts) resv(host int, op uint8, cdw10 uint32, current, other uint64) nvme.Status {
	r := h.rigs[host]
	r.t.Helper()
	var keys [16]byte
	binary.LittleEndian.PutUint64(keys[:], current)
	binary.LittleEndian.PutUint64(keys[8:], other)
	if err := r.guest.Write(h.data(host), keys[:]); err != nil {
		r.t.Fatal(err)
	}
	return h.pairs[host].do(nvme.Command{Opcode: op, NSID: 1, PRP1: base + h.data(host), CDW10: cdw10}).Code()
}

func (h *twoHosts) io(host int, op uint8) nvme.Status {
	return h.pairs[host].do(rw(op, 0, 1, base+h.data(host))).Code()
}

func TestReservationIsEnforcedOnAllWorkers(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	h := newTwoHosts(t, disk, nil)
	const ok, conflict = nvme.StatusSuccess, nvme.StatusReservationConflict
	for host, key := range []uint64{10, 20} {
		if st := h.resv(host, nvme.IOReservationRegister, nvme.ReservationRegister, 0, key); st != ok {
			t.Fatal(st)
		}
	}
	check := func(what string, r0, w0, r1, w1 nvme.Status) {
		t.Helper()
		for host, want := range [2][2]nvme.Status{{r0, w0}, {r1, w1}} {
			for i, op := range []uint8{nvme.IORead, nvme.IOWrite} {
				if st := h.io(host, op); st != want[i] {
					t.Errorf("%s: host %d, %s: %v, want %v", what, host, nvme.IOOpcodeName(op), st, want[i])
				}
			}
		}
	}
	check("nobody holds it", ok, ok, ok, ok)
	for _, x := range []struct {
		typ  nvme.ReservationType
		r, w nvme.Status // of the other, who is registered
	}{
		{nvme.WriteExclusive, ok, conflict}, {nvme.ExclusiveAccess, conflict, conflict}, {nvme.WriteExclusiveRegistrants, ok, ok},
		{nvme.ExclusiveAccessRegistrants, ok, ok}, {nvme.WriteExclusiveAllRegistrants, ok, ok}, {nvme.ExclusiveAccessAllRegistrants, ok, ok},
	} {
		if st := h.resv(0, nvme.IOReservationAcquire, nvme.ReservationAcquire|uint32(x.typ)<<8, 10, 0); st != ok {
			t.Fatalf("acquire %v: %v", x.typ, st)
		}
		check(x.typ.String(), ok, ok, x.r, x.w)
		if st := h.resv(0, nvme.IOReservationRelease, nvme.ReservationRelease|uint32(x.typ)<<8, 10, 0); st != ok {
			t.Fatalf("release %v: %v", x.typ, st)
		}
		check("after "+x.typ.String(), ok, ok, ok, ok)
	}
	for _, op := range []uint8{nvme.IOFlush, nvme.IOWriteZeroes, nvme.IODSM, nvme.IOCompare, nvme.IOVerify} {
		h.resv(0, nvme.IOReservationAcquire, nvme.ReservationAcquire|uint32(nvme.ExclusiveAccess)<<8, 10, 0)
		if st := h.io(1, op); st != conflict {
			t.Errorf("%s: %v", nvme.IOOpcodeName(op), st)
		}
	}
	if st := h.resv(1, nvme.IOReservationAcquire, nvme.ReservationPreempt|uint32(nvme.ExclusiveAccess)<<8, 20, 10); st != ok {
		t.Fatal(st)
	}
	check("preempted", conflict, conflict, ok, ok)
	if st := h.resv(0, nvme.IOReservationAcquire, nvme.ReservationAcquire|uint32(nvme.ExclusiveAccess)<<8, 10, 0); st != conflict {
		t.Errorf("a host that was preempted acquires: %v", st)
	}
}

func TestReservationReport(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	h := newTwoHosts(t, disk, nil)
	h.resv(0, nvme.IOReservationRegister, nvme.ReservationRegister, 0, 10)
	h.resv(1, nvme.IOReservationRegister, nvme.ReservationRegister, 0, 20)
	h.resv(1, nvme.IOReservationAcquire, nvme.ReservationAcquire|uint32(nvme.ExclusiveAccess)<<8, 20, 0)
	report := func(bytes, cdw11 uint32) (b []byte, st nvme.Status) {
		b = make([]byte, bytes)
		for i := range b {
			b[i] = 0xa5
		}
		r := h.rigs[0]
		if err := r.guest.Write(h.data(0), b); err != nil {
			t.Fatal(err)
		}
		st = h.pairs[0].do(nvme.Command{Opcode: nvme.IOReservationReport, NSID: 1, PRP1: base + h.data(0), CDW10: bytes/4 - 1, CDW11: cdw11}).Code()
		if err := r.guest.Read(h.data(0), b); err != nil {
			t.Fatal(err)
		}
		return b, st
	}
	b, st := report(4096, 0)
	var s nvme.ReservationStatus
	s.Decode(b, false)
	if !st.OK() || s.Type != nvme.ExclusiveAccess || len(s.Controllers) != 2 || s.Controllers[0].CNTLID != 1 || s.Controllers[0].Holds || !s.Controllers[1].Holds ||
		s.Controllers[1].Key != 20 || s.Controllers[1].HostID[0] != 2 || b[4095] != 0 {
		t.Errorf("%v, %+v", st, s)
	}
	if b, st := report(8, 0); !st.OK() || b[5] != 2 {
		t.Errorf("two dwords: %v, % x", st, b)
	}
	// The hosts' identifiers are of 64 bits.
	if _, st := report(4096, 1); st != nvme.StatusHostIDInconsistent {
		t.Errorf("extended: %v", st)
	}
	if st := h.pairs[0].do(nvme.Command{Opcode: nvme.IOReservationReport, NSID: 1, PRP1: base + h.data(0), CDW10: 1<<32 - 1}).Code(); st != nvme.StatusInvalidField {
		t.Errorf("16 GiB: %v", st)
	}
	if st := h.pairs[0].do(nvme.Command{Opcode: nvme.IOReservationRegister, NSID: 1, PRP1: 0x10}).Code(); st != nvme.StatusDataTransferError {
		t.Errorf("keys outside of memory: %v", st)
	}
	private, _ := h.rigs[0], 0
	private.attach(subsys.Alone(1, disk, disk.Info()))
	for _, op := range []uint8{nvme.IOReservationRegister, nvme.IOReservationReport, nvme.IOReservationAcquire, nvme.IOReservationRelease} {
		if st := h.resv(0, op, 0, 0, 1); st != nvme.StatusInvalidOpcode {
			t.Errorf("%s of a private namespace: %v", nvme.IOOpcodeName(op), st)
		}
	}
}

// Preempt and Abort is complete when what the other had under way is.
func TestPreemptAndAbortWaitsForCommands(t *testing.T) {
	dev := &slow{info: backend.Info{Blocks: 1000, LBAShift: 9}}
	h := newTwoHosts(t, dev, nil)
	h.resv(0, nvme.IOReservationRegister, nvme.ReservationRegister, 0, 10)
	h.resv(1, nvme.IOReservationRegister, nvme.ReservationRegister, 0, 20)
	h.resv(0, nvme.IOReservationAcquire, nvme.ReservationAcquire|uint32(nvme.WriteExclusive)<<8, 10, 0)
	a, b := h.pairs[0], h.pairs[1]
	a.push(rw(nvme.IOWrite, 0, 1, base+h.data(0)))
	a.publish()
	h.rigs[0].eventually("a write is with the backend", func() bool { return dev.held() == 1 })
	keys := make([]byte, 16)
	keys[0], keys[8] = 20, 10
	if err := h.rigs[1].guest.Write(h.data(1), keys); err != nil {
		t.Fatal(err)
	}
	b.push(nvme.Command{Opcode: nvme.IOReservationAcquire, NSID: 1, PRP1: base + h.data(1), CDW10: nvme.ReservationPreemptAbort | uint32(nvme.WriteExclusive)<<8})
	b.publish()
	h.rigs[1].eventually("it waits", h.rigs[1].heldBack(1))
	// Neither DMA_UNMAP nor the gate's opening for others completes it or begins it again.
	h.rigs[1].ctl.pause()
	h.rigs[1].ctl.resume()
	Pool(h.rigs[0].workers).Release(h.n)
	dev.finish(1)
	if st := a.reap(1)[0].Status(); !st.OK() {
		t.Error(st)
	}
	if st := b.reap(1)[0].Status(); !st.OK() {
		t.Error(st)
	}
	if r := h.n.Report(); len(r.Controllers) != 1 || r.Controllers[0].Key != 20 || r.Generation != 3 {
		t.Errorf("%+v", r)
	}
}

// A reservation that persists is saved before the command that made it is complete, and queues may go meanwhile.
func TestReservationThatPersists(t *testing.T) {
	disk := openBackend(t, "mem:size=1MiB")
	dir := filepath.Join(t.TempDir(), "state")
	store, err := state.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	h := newTwoHosts(t, disk, store)
	if st := h.resv(0, nvme.IOReservationRegister, nvme.ReservationRegister|nvme.CPTPLSet<<30, 0, 10); !st.OK() {
		t.Fatal(st)
	}
	if st := h.resv(0, nvme.IOReservationAcquire, nvme.ReservationAcquire|uint32(nvme.WriteExclusive)<<8, 10, 0); !st.OK() {
		t.Fatal(st)
	}
	files, err := filepath.Glob(dir + "/reservations-*.json")
	if err != nil || len(files) != 1 {
		t.Errorf("saved in %v, %v", files, err)
	}
	for range 10 {
		h.pairs[0].push(nvme.Command{Opcode: nvme.IOReservationRelease, NSID: 1, PRP1: base + h.data(0), CDW10: nvme.ReservationRelease | uint32(nvme.WriteExclusive)<<8})
	}
	h.pairs[0].publish()
	h.rigs[0].ctl.Stop(patience)
}
