package ctrl

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func (h *host) errorEntries(n int) []nvme.ErrorLogEntry {
	h.Helper()
	p := h.log(nvme.LogError, uint64(n)*64, false)
	es := make([]nvme.ErrorLogEntry, n)
	for i := range es {
		copy(es[i].Bytes()[:], p[i*64:])
	}
	return es
}

func TestErrorLog(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.fails(createSQ(5, 16, 0), nvme.StatusInvalidQueueID)
	first := h.cid
	h.fails(identifyCmd(nvme.CNSNamespace, 99), nvme.StatusInvalidNamespace)
	failed := []IOError{{SQID: 3, CID: 42, Status: nvme.StatusLBAOutOfRange, NSID: 1, LBA: 12345, Location: 40}}
	h.c.cfg.IOErrors = func() ([]IOError, uint64) {
		f := failed
		failed = nil
		return f, uint64(len(f))
	}
	es := h.errorEntries(4)
	if es[3].Count != 0 {
		t.Errorf("an entry that is none: %+v", es[3])
	}
	if e := es[0]; e.Count != 3 || e.SQID != 3 || e.CID != 42 || e.Status() != nvme.StatusLBAOutOfRange || e.LBA != 12345 || e.NSID != 1 || e.Location != 40 {
		t.Errorf("I/O error %+v", e)
	}
	if e := es[1]; e.Count != 2 || e.CID != first+1 || e.NSID != 99 || e.Location != uint16(inNSID) {
		t.Errorf("second error %+v", e)
	}
	if e := es[2]; e.Count != 1 || e.SQID != 0 || e.CID != first || e.Status() != nvme.StatusInvalidQueueID.WithDNR().WithMore() || e.Location != 46 {
		t.Errorf("first error %+v, want location dword 11 bit 16 = byte 46", e)
	}
	for range 98 {
		h.fails(nvme.Command{Opcode: 0xff}, nvme.StatusInvalidOpcode)
	}
	// Of three, the first is not told any more.
	failed = []IOError{{SQID: 1, CID: 2}, {SQID: 1, CID: 3}}
	h.c.cfg.IOErrors = func() ([]IOError, uint64) {
		f := failed
		failed = nil
		return f, uint64(len(f)) * 3 / 2
	}
	if e := h.errorEntries(1)[0]; e.Count != 104 || e.CID != 3 {
		t.Errorf("the newest of three: %+v", e)
	}
	es = h.errorEntries(65)
	for i, e := range es[:64] {
		want := 104 - i
		if i > 1 {
			want-- // one was left out
		}
		if e.Count != uint64(want) {
			t.Fatalf("entry %d has count %d", i, e.Count)
		}
	}
	if es[64].Count != 0 {
		t.Error("more than 64 errors are kept")
	}
	h.disable()
	h.enable()
	if e := h.errorEntries(1)[0]; e.Count != 104 {
		t.Error("the log did not survive a reset")
	}
}

func TestSMARTLog(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.fails(nvme.Command{Opcode: 0xff}, nvme.StatusInvalidOpcode)
	var l nvme.SMARTLog
	copy(l.Bytes()[:], h.log(nvme.LogSMART, 512, false))
	if l.DataUnitsRead.Lo != 2 || l.DataUnitsWritten.Lo != 1 || l.HostReads.Lo != 10 || l.HostWrites.Lo != 20 || l.BusyMinutes.Lo != 2 ||
		l.MediaErrors.Lo != 3 || l.ErrorLogEntries.Lo != 1 || l.CriticalWarning != 0 || l.Temperature() != compositeTemperature || l.AvailableSpare != 100 {
		t.Errorf("%+v", l)
	}
	cmd := logCmd(nvme.LogSMART, 0, 512, false)
	cmd.NSID = 1
	h.fails(cmd, nvme.StatusInvalidField)
	cmd.NSID = 0
	h.ok(cmd)
}

func TestOtherLogs(t *testing.T) {
	h := newEnabled(t, testConfig())
	var fw nvme.FirmwareSlotLog
	copy(fw.Bytes()[:], h.log(nvme.LogFirmwareSlot, 512, false))
	if fw.AFI != 1 || nvme.ASCII(fw.Slot[0][:]) != "1.0" {
		t.Errorf("firmware %+v", fw)
	}
	var fx nvme.CommandEffects
	copy(fx.Bytes()[:], h.log(nvme.LogCommandEffects, 4096, false))
	if fx.Admin[nvme.AdminIdentify]&nvme.EffectSupported == 0 || fx.Admin[nvme.AdminDoorbellBufferConfig] == 0 || fx.Admin[nvme.AdminDeviceSelfTest] != 0 ||
		fx.IO[nvme.IOWrite] != nvme.EffectSupported|nvme.EffectBlockContent || fx.IO[nvme.IORead] != nvme.EffectSupported ||
		fx.Admin[nvme.AdminKeepAlive] != nvme.EffectSupported|nvme.EffectScopeController || fx.IO[nvme.IOReservationAcquire+1] != 0 || fx.IO[nvme.IOCopy] != fx.IO[nvme.IOWrite] {
		t.Error("command effects")
	}
	for op, e := range fx.IO {
		if e&^(nvme.EffectSupported|nvme.EffectBlockContent) != 0 {
			t.Errorf("I/O command %02xh has effects %#x, of which Linux warns", op, e)
		}
	}
	cmd := logCmd(nvme.LogCommandEffects, 0, 4096, false)
	cmd.CDW14 = uint32(nvme.CSIZoned) << 24
	h.ok(cmd)
	admin := fx.Admin
	if copy(fx.Bytes()[:], h.data(4096)); fx.Admin != admin || fx.IO != [256]uint32{} {
		t.Error("command effects of a command set that is not there: want the same admin commands and no others")
	}
	pages := h.log(nvme.LogSupported, 1024, false)
	for lid := range 256 {
		says := binary.LittleEndian.Uint32(pages[lid*4:]) == nvme.LogSupports
		cmd := logCmd(nvme.LogPage(lid), 0, 64, true)
		if nvme.LogPage(lid) == nvme.LogPersistentEvent {
			cmd.CDW10 |= nvme.PersistentEstablish << 8
		}
		st := h.do(cmd).Status()
		if says != st.OK() || (!says && st.Code() != nvme.StatusInvalidLogPage) {
			t.Errorf("log %02xh: supported %v, reading it %v", lid, says, st)
		}
	}
	features := h.log(nvme.LogFeatureEffects, 1024, false)
	for fid := range 256 {
		says := binary.LittleEndian.Uint32(features[fid*4:])&featureSupported != 0
		st := h.do(getFeature(nvme.FeatureID(fid), 1, nvme.FeatureSupported, 0)).Status()
		if says != st.OK() {
			t.Errorf("feature %02xh: supported %v, reading it %v", fid, says, st)
		}
	}
}

func TestLogOffsets(t *testing.T) {
	h := newEnabled(t, testConfig())
	whole := h.log(nvme.LogCommandEffects, 4096, false)
	h.ok(logCmd(nvme.LogCommandEffects, 1024, 1028, false))
	if !bytes.Equal(h.data(1028), whole[1024:2052]) {
		t.Error("part of the page")
	}
	h.ok(logCmd(nvme.LogCommandEffects, 4092, 4096, false))
	if want := append(bytes.Clone(whole[4092:]), make([]byte, 4092)...); !bytes.Equal(h.data(4096), want) {
		t.Error("what lies beyond the page is not zero")
	}
	h.ok(logCmd(nvme.LogCommandEffects, 4096, 4, false))
	h.fails(logCmd(nvme.LogCommandEffects, 4100, 4, false), nvme.StatusInvalidField)
	h.fails(logCmd(nvme.LogCommandEffects, 1<<60, 4, false), nvme.StatusInvalidField)
	odd := logCmd(nvme.LogCommandEffects, 0, 4, false)
	odd.CDW12 = 2
	h.fails(odd, nvme.StatusInvalidField)
	index := logCmd(nvme.LogCommandEffects, 0, 4, false)
	index.CDW14 = 1 << 23
	h.fails(index, nvme.StatusInvalidField)
	h.fails(logCmd(nvme.LogError, 0, 1<<20+4, false), nvme.StatusInvalidField)
	h.fails(logCmd(nvme.LogError, 0, 1<<34, false), nvme.StatusInvalidField)
}

// What is supported is in the effects log, and what is there is supported; and no command is said to change what it cannot.
func TestCommandEffects(t *testing.T) {
	for _, mode := range []DoorbellMode{Shadow, Trap} {
		cfg := testConfig()
		cfg.Mode = mode
		h := newEnabled(t, cfg)
		var fx nvme.CommandEffects
		copy(fx.Bytes()[:], h.log(nvme.LogCommandEffects, 4096, false))
		for op := range 256 {
			w := fx.Admin[op]
			if w&nvme.EffectSupported == 0 {
				if w != 0 {
					t.Errorf("%s is not supported and has effects %#x", nvme.AdminOpcodeName(uint8(op)), w)
				}
				h.fails(nvme.Command{Opcode: uint8(op), NSID: 1}, nvme.StatusInvalidOpcode)
			} else if op != nvme.AdminAsyncEventRequest {
				if st := h.do(nvme.Command{Opcode: uint8(op)}).Status(); st.Code() == nvme.StatusInvalidOpcode {
					t.Errorf("%s is in the effects log and not supported", nvme.AdminOpcodeName(uint8(op)))
				}
			}
			if w := fx.IO[op]; w&nvme.EffectSupported == 0 && w != 0 {
				t.Errorf("%s is not supported and has effects %#x", nvme.IOOpcodeName(uint8(op)), w)
			}
		}
	}
}

// takeEvent returns the events that are reported; each request that reported one is replaced.
func (h *host) takeEvents() []nvme.AsyncEvent {
	h.Helper()
	h.ring()
	var evs []nvme.AsyncEvent
	for _, e := range h.reap() {
		if !e.Status().OK() {
			h.Fatalf("event request: %v", e.Status())
		}
		evs = append(evs, nvme.AsyncEvent(e.Result()))
		h.push(aer())
	}
	h.ring()
	return evs
}

func TestEventOfTemperature(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.push(aer())
	h.push(aer())
	hot := setFeature(nvme.FeatureTemperature, 0, uint32(nvme.MakeTemperatureThreshold(300, nvme.TempSensorComposite, nvme.TempOver)))
	cold := setFeature(nvme.FeatureTemperature, 0, uint32(nvme.MakeTemperatureThreshold(400, nvme.TempSensorAll, nvme.TempOver)))
	under := setFeature(nvme.FeatureTemperature, 0, uint32(nvme.MakeTemperatureThreshold(330, nvme.TempSensorComposite, nvme.TempUnder)))
	h.ok(hot)
	h.ok(cold)
	if evs := h.takeEvents(); evs != nil {
		t.Fatalf("events that nobody asked for: %v", evs)
	}
	h.ok(setFeature(nvme.FeatureAsyncEvents, 0, nvme.SMARTWarningTemperature))
	cid := h.push(hot)
	want := nvme.MakeAsyncEvent(nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
	h.ring()
	es := h.reap()
	if len(es) != 2 || nvme.AsyncEvent(es[0].Result()) != want || es[1].CID() != cid {
		t.Fatalf("completions %+v, want the event and the command", es)
	}
	h.ok(cold)
	h.ok(under)
	if evs := h.takeEvents(); evs != nil {
		t.Errorf("masked event was reported: %v", evs)
	}
	if w := h.log(nvme.LogSMART, 512, true)[0]; w != nvme.SMARTWarningTemperature {
		t.Errorf("critical warning %#x", w)
	}
	if h.c.events.masked[nvme.EventSMART] != true {
		t.Error("reading with RAE cleared the event")
	}
	h.log(nvme.LogSMART, 512, false)
	if evs := h.takeEvents(); evs != nil {
		t.Errorf("an event that the host read about was reported: %v", evs)
	}
	if got := h.ok(getFeature(nvme.FeatureTemperature, 0, 0, 1<<20)); got != 330 {
		t.Errorf("under threshold %d", got)
	}
	h.ok(setFeature(nvme.FeatureTemperature, 0, uint32(nvme.MakeTemperatureThreshold(0, 0, nvme.TempUnder))))
	h.push(hot)
	h.ring()
	if es := h.reap(); len(es) != 2 || nvme.AsyncEvent(es[0].Result()) != want {
		t.Errorf("no event after the log was read: %+v", es)
	}
}

// An event without a request outstanding waits for one.
func TestEventWaitsForRequest(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.c.QueueError(4, BadDoorbellRegister)
	h.c.QueueError(5, BadDoorbellValue)
	if n := h.dp.interrupts; n != 0 {
		t.Fatalf("%d interrupts", n)
	}
	h.push(aer())
	h.ring()
	es := h.reap()
	if want := nvme.MakeAsyncEvent(nvme.EventError, nvme.EventErrorDoorbellRegister, nvme.LogError); len(es) != 1 || nvme.AsyncEvent(es[0].Result()) != want {
		t.Fatalf("%+v, want %v", es, want)
	}
	if es := h.errorEntries(2); es[0].SQID != 5 || es[1].SQID != 4 || es[0].CID != 0xffff {
		t.Errorf("error log %+v", es)
	}
	h.push(aer())
	h.ring()
	if es := h.reap(); len(es) != 0 {
		t.Errorf("an event that the log told of already: %+v", es)
	}
	before := h.dp.interrupts
	h.c.QueueError(6, QueueFailed)
	if h.dp.interrupts != before+1 {
		t.Error("no interrupt for an event outside of a kick")
	}
	if es := h.reap(); len(es) != 1 || nvme.AsyncEvent(es[0].Result()).Info() != nvme.EventErrorPersistent {
		t.Errorf("%+v", es)
	}
}

func TestEventRequestLimitAndConflict(t *testing.T) {
	h := newEnabled(t, testConfig())
	for range aerLimit - 1 {
		h.push(aer())
	}
	h.ring()
	h.cid--
	h.fails(aer(), nvme.StatusCIDConflict)
	h.push(aer())
	h.ring()
	h.fails(aer(), nvme.StatusAERLimit)
	h.disable()
	h.enable()
	h.c.QueueError(1, BadDoorbellValue)
	if es := h.reap(); len(es) != 0 {
		t.Errorf("a request survived the reset: %+v", es)
	}
}

func TestChangedNamespaces(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.ok(setFeature(nvme.FeatureAsyncEvents, 0, uint32(nvme.EventConfigNamespace)))
	h.push(aer())
	h.ring()
	ns := testConfig().Namespaces
	h.c.UpdateNamespaces(ns)
	if es := h.reap(); len(es) != 0 {
		t.Fatalf("nothing changed, and there is an event: %+v", es)
	}
	ns[1].Info.Blocks *= 2
	h.c.UpdateNamespaces(append(ns[1:], Namespace{NSID: 9, Info: backend.Info{Blocks: 8, LBAShift: 9}}))
	want := nvme.MakeAsyncEvent(nvme.EventNotice, nvme.EventNoticeNamespace, nvme.LogChangedNamespaces)
	if es := h.reap(); len(es) != 1 || nvme.AsyncEvent(es[0].Result()) != want {
		t.Fatalf("%+v, want %v", es, want)
	}
	for _, retain := range []bool{true, false} {
		var l nvme.ChangedNamespaceList
		copy(l.Bytes()[:], h.log(nvme.LogChangedNamespaces, 4096, retain))
		if l.Len() != 3 || l.ID[0] != 1 || l.ID[1] != 3 || l.ID[2] != 9 {
			t.Errorf("changed %v, want 1, 3 and 9", l.ID[:l.Len()])
		}
	}
	if p := h.log(nvme.LogChangedNamespaces, 4, false); binary.LittleEndian.Uint32(p) != 0 {
		t.Error("the list was not cleared")
	}
	many := make([]Namespace, 2000)
	for i := range many {
		many[i] = Namespace{NSID: uint32(i + 100), Info: backend.Info{Blocks: 8, LBAShift: 9}}
	}
	h.c.UpdateNamespaces(many)
	if p := h.log(nvme.LogChangedNamespaces, 8, false); binary.LittleEndian.Uint64(p) != nvme.ChangedNamespacesOverflow {
		t.Errorf("a list that is too long begins % x", p)
	}
	var l nvme.NamespaceList
	copy(l.Bytes()[:], h.identify(nvme.CNSActiveNamespaces, 0))
	if l.Len() != 1024 || l.ID[1023] != 1123 {
		t.Errorf("active list of %d", l.Len())
	}
}

// A guest that fails as fast as it can does not fill the log.
func TestLogIsLimited(t *testing.T) {
	var out bytes.Buffer
	cfg := testConfig()
	cfg.Logger = hclog.New(&hclog.LoggerOptions{Output: &out, Level: hclog.Debug})
	h := newEnabled(t, cfg)
	for range 1000 {
		h.fails(createCQ(0, 16, 0), nvme.StatusInvalidQueueID)
	}
	// A slow machine may see more than one period.
	if n := bytes.Count(out.Bytes(), []byte("\n")); n == 0 || n > 500 {
		t.Errorf("%d lines", n)
	}
	if !bytes.Contains(out.Bytes(), []byte("Invalid Queue Identifier")) {
		t.Errorf("the log does not name the status:\n%.300s", out.Bytes())
	}
}
