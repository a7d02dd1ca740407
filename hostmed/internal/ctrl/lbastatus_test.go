package ctrl

import (
	"errors"
	"slices"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// holes is a medium of which pages of 4 KiB are allocated if they are in it.
type holes struct {
	backend.Backend
	pages map[uint64]bool
	err   error
}

func (m *holes) Allocated(off, n uint64) (bool, uint64, error) {
	yes := m.pages[off/4096]
	run := 4096 - off%4096
	for run < n && m.pages[(off+run)/4096] == yes {
		run += 4096
	}
	return yes, min(run, n), m.err
}

// lbaHost is a driver of a controller with one namespace of 1000 pages, on medium.
func lbaHost(t *testing.T, medium *holes) (h *host, n *subsys.Namespace, woken chan bool) {
	info := backend.Info{Blocks: 8000, LBAShift: 9, Maps: true}
	n = subsys.Alone(1, medium, info)
	cfg := testConfig()
	cfg.Namespaces = []Namespace{{NSID: 1, Backend: medium, Info: info, Of: n}}
	woken = make(chan bool, 100)
	cfg.Wake = func() { woken <- true }
	return newEnabled(t, cfg), n, woken
}

func lbaCmd(action nvme.LBAStatusAction, lba uint64, blocks uint16, n uint32) nvme.Command {
	c := nvme.Command{PRP1: dataIOVA}
	c.SetGetLBAStatus(1, action, lba, blocks, n)
	return c
}

// lbaList parses what the controller has written.
func (h *host) lbaList() (list []subsys.Range, cmpc uint8) {
	data := h.data(4096)
	var hdr nvme.LBAStatusHeader
	copy(hdr.Bytes()[:], data)
	for i := range int(hdr.NLSD) {
		var d nvme.LBAStatus
		copy(d.Bytes()[:], data[8+16*i:])
		list = append(list, subsys.Range{First: d.SLBA, Last: d.SLBA + uint64(d.NLB) - 1})
	}
	return list, hdr.CMPC
}

func TestMarkedLBAStatus(t *testing.T) {
	h, n, _ := lbaHost(t, &holes{})
	want := func(cmd nvme.Command, cmpc uint8, want ...subsys.Range) {
		t.Helper()
		h.ok(cmd)
		if list, c := h.lbaList(); !slices.Equal(list, want) || c != cmpc {
			t.Errorf("%v, completion condition %d; want %v, %d", list, c, want, cmpc)
		}
	}
	for _, action := range []nvme.LBAStatusAction{nvme.LBAStatusScan, nvme.LBAStatusTracked} {
		want(lbaCmd(action, 0, 0, 4096), nvme.LBAStatusComplete)
		n.Mark(10, 5)
		n.Mark(100, 1)
		n.Mark(7999, 1)
		want(lbaCmd(action, 0, 0, 4096), nvme.LBAStatusComplete, subsys.Range{First: 10, Last: 14}, subsys.Range{First: 100, Last: 100}, subsys.Range{First: 7999, Last: 7999})
		want(lbaCmd(action, 12, 80, 4096), nvme.LBAStatusComplete, subsys.Range{First: 12, Last: 14})
		want(lbaCmd(action, 12, 89, 8+16), nvme.LBAStatusIncomplete, subsys.Range{First: 12, Last: 14})
		want(lbaCmd(action, 12, 89, 8+2*16), nvme.LBAStatusComplete, subsys.Range{First: 12, Last: 14}, subsys.Range{First: 100, Last: 100})
		want(lbaCmd(action, 0, 0, 8), nvme.LBAStatusIncomplete)
		n.Unmark(0, 8000)
	}
}

func TestAllocatedLBAStatus(t *testing.T) {
	medium := &holes{pages: map[uint64]bool{2: true, 3: true, 999: true}}
	h, _, woken := lbaHost(t, medium)
	run := func(cmd nvme.Command) nvme.Status {
		t.Helper()
		cid := h.push(cmd)
		h.ring()
		<-woken
		h.c.AdminKick()
		es := h.reap()
		if len(es) != 1 || es[0].CID() != cid {
			t.Fatalf("%+v", es)
		}
		return es[0].Status()
	}
	for name, x := range map[string]struct {
		cmd  nvme.Command
		cmpc uint8
		want []subsys.Range
	}{
		"all":         {lbaCmd(nvme.LBAStatusAllocated, 0, 0, 4096), nvme.LBAStatusComplete, []subsys.Range{{First: 16, Last: 31}, {First: 7992, Last: 7999}}},
		"a part":      {lbaCmd(nvme.LBAStatusAllocated, 20, 2, 4096), nvme.LBAStatusComplete, []subsys.Range{{First: 20, Last: 21}}},
		"no room":     {lbaCmd(nvme.LBAStatusAllocated, 0, 0, 24), nvme.LBAStatusIncomplete, []subsys.Range{{First: 16, Last: 31}}},
		"just enough": {lbaCmd(nvme.LBAStatusAllocated, 0, 0, 40), nvme.LBAStatusComplete, []subsys.Range{{First: 16, Last: 31}, {First: 7992, Last: 7999}}},
		"nothing":     {lbaCmd(nvme.LBAStatusAllocated, 32, 100, 4096), nvme.LBAStatusComplete, nil},
	} {
		if st := run(x.cmd); !st.OK() {
			t.Errorf("%s: %v", name, st)
		}
		if list, c := h.lbaList(); !slices.Equal(list, x.want) || c != x.cmpc {
			t.Errorf("%s: %v, completion condition %d; want %v, %d", name, list, c, x.want, x.cmpc)
		}
	}
	medium.err = errors.New("no medium")
	if st := run(lbaCmd(nvme.LBAStatusAllocated, 0, 0, 4096)); st.Code() != nvme.StatusInternalError {
		t.Errorf("a medium that cannot tell: %v", st)
	}
}

func TestBadLBAStatus(t *testing.T) {
	h, _, _ := lbaHost(t, &holes{})
	with := func(f func(*nvme.Command)) nvme.Command {
		c := lbaCmd(nvme.LBAStatusTracked, 0, 0, 4096)
		f(&c)
		return c
	}
	h.fails(with(func(c *nvme.Command) { c.NSID = 9 }), nvme.StatusInvalidNamespace)
	h.fails(with(func(c *nvme.Command) { c.NSID = nvme.NSIDAll }), nvme.StatusInvalidNamespace)
	h.fails(lbaCmd(nvme.LBAStatusTracked, 8000, 0, 4096), nvme.StatusLBAOutOfRange)
	h.fails(lbaCmd(nvme.LBAStatusTracked, 7999, 2, 4096), nvme.StatusLBAOutOfRange)
	h.fails(lbaCmd(nvme.LBAStatusTracked, ^uint64(0), 1, 4096), nvme.StatusLBAOutOfRange)
	h.fails(lbaCmd(0, 0, 0, 4096), nvme.StatusInvalidField)
	h.fails(lbaCmd(nvme.LBAStatusTracked, 0, 0, 2<<20), nvme.StatusInvalidField)
	h.fails(with(func(c *nvme.Command) { c.PRP1 = 0x10 }), nvme.StatusDataTransferError)
	plain := newEnabled(t, testConfig())
	plain.fails(lbaCmd(nvme.LBAStatusAllocated, 0, 0, 4096), nvme.StatusInvalidField)
	plain.ok(lbaCmd(nvme.LBAStatusTracked, 0, 0, 4096))
}

func TestDULBE(t *testing.T) {
	h, _, _ := lbaHost(t, &holes{})
	var id nvme.IdentifyNamespace
	copy(id.Bytes()[:], h.identify(nvme.CNSNamespace, 1))
	if id.NSFEAT&nvme.NSFEATDeallocError == 0 {
		t.Errorf("NSFEAT %#x", id.NSFEAT)
	}
	h.ok(setFeature(nvme.FeatureErrorRecovery, 1, 1<<16|5))
	if !h.dp.called("SetDULBE 1 true") {
		t.Error("the data path does not know")
	}
	get := nvme.Command{}
	get.SetGetFeatures(nvme.FeatureErrorRecovery, 1, nvme.FeatureCurrent)
	if v := h.ok(get); v != 1<<16|5 {
		t.Errorf("%#x", v)
	}
	h.dp.calls = nil
	h.disable()
	if !h.dp.called("SetDULBE 1 false") {
		t.Error("a reset leaves it")
	}
}
