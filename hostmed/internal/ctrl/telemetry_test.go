package ctrl

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed/internal/state"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// telemetry reads a telemetry log as nvme-cli does: the header, then the blocks that it names.
func (h *host) telemetry(lid nvme.LogPage, lsp uint8, retain bool) (hdr nvme.TelemetryHeader, data []byte) {
	h.Helper()
	cmd := logCmd(lid, 0, nvme.TelemetryBlock, true)
	cmd.CDW10 |= uint32(lsp) << 8
	h.ok(cmd)
	copy(hdr.Bytes()[:], h.data(nvme.TelemetryBlock))
	for block := uint64(1); block <= uint64(hdr.LastBlock1); block++ {
		h.ok(logCmd(lid, block*nvme.TelemetryBlock, nvme.TelemetryBlock, true))
		data = append(data, h.data(nvme.TelemetryBlock)...)
	}
	if !retain {
		h.ok(logCmd(lid, 0, 4, false))
	}
	if hdr.LID != lid || hdr.IEEE != ouiLocal || hdr.LastBlock2 != hdr.LastBlock1 || hdr.LastBlock3 != hdr.LastBlock1 || hdr.LastBlock4 != 0 {
		h.Errorf("header %+v", hdr)
	}
	return hdr, bytes.TrimRight(data, "\x00")
}

func (h *host) parseTelemetry(data []byte) (t telemetry) {
	h.Helper()
	if err := json.Unmarshal(data, &t); err != nil {
		h.Fatalf("%v in %q", err, data)
	}
	return t
}

func TestTelemetryOfTheHost(t *testing.T) {
	cfg := testConfig()
	cfg.Dump = func() string { return "CQ 5: polling" }
	h := newEnabled(t, cfg)
	if id := h.controller(); id.LPA&nvme.LPATelemetry == 0 {
		t.Errorf("LPA %#x", id.LPA)
	}
	if hdr, data := h.telemetry(nvme.LogTelemetryHost, 0, true); hdr.LastBlock1 != 0 || len(data) != 0 || hdr.HostOrScope != 0 {
		t.Errorf("before any was taken: %+v, %d bytes", hdr, len(data))
	}
	h.ok(createCQ(5, 16, 1))
	h.ok(createSQ(6, 16, 5))
	h.ok(createSQ(7, 16, 5))
	h.fails(nvme.Command{Opcode: 0xff}, nvme.StatusInvalidOpcode)
	for gen := uint8(1); gen <= 2; gen++ {
		hdr, data := h.telemetry(nvme.LogTelemetryHost, nvme.TelemetryCreate, true)
		if hdr.HostScope != nvme.TelemetryScopeController || hdr.HostOrScope != gen || hdr.Available != 0 || !strings.HasPrefix(string(hdr.Reason[:]), "host request") {
			t.Errorf("header %+v", hdr)
		}
		s := h.parseTelemetry(data)
		if s.Controller.CNTLID != 7 || s.Controller.State != "enabled" || len(s.Queues) != 1 || s.Queues[0].CQ != 5 || len(s.Queues[0].SQs) != 2 ||
			len(s.Namespaces) != 2 || s.Counters.IO.ReadCommands != 10 || s.Counters.Errors != 1 || len(s.Errors) != 1 || s.DataPath != "CQ 5: polling" ||
			!strings.Contains(s.Registers["CC"], "IOSQES=6") {
			t.Errorf("%s", data)
		}
		_, again := h.telemetry(nvme.LogTelemetryHost, 0, false)
		if !bytes.Equal(again, data) {
			t.Error("without a request to create it the data is another")
		}
	}
	// A namespace's telemetry is the controller's, and an offset behind it is refused.
	h.fails(logCmd(nvme.LogTelemetryHost, 1<<20, 512, true), nvme.StatusInvalidField)
}

// What went wrong is kept until a host has read it, over resets and restarts.
func TestTelemetryOfTheController(t *testing.T) {
	store := state.NewMemory()
	p := openPersistent(t, store)
	h := connect(t, p, new(IOStats))
	if hdr, data := h.telemetry(nvme.LogTelemetryCtrl, 0, true); hdr.Available != 0 || hdr.LastBlock1 != 0 || len(data) != 0 {
		t.Errorf("at first %+v, %q", hdr, data)
	}
	h.ok(setFeature(nvme.FeatureAsyncEvents, 0, uint32(nvme.EventConfigTelemetry|nvme.EventConfigNamespace)))
	h.push(aer())
	h.push(aer())
	h.push(aer())
	h.ring()
	h.c.QueueError(3, BadDoorbellValue)
	h.c.QueueError(4, BadDoorbellValue) // is not kept: the first is nearer to the cause
	want := []nvme.AsyncEvent{
		nvme.MakeAsyncEvent(nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError),
		nvme.MakeAsyncEvent(nvme.EventNotice, nvme.EventNoticeTelemetry, nvme.LogTelemetryCtrl),
	}
	es := h.reap()
	if len(es) != 2 || nvme.AsyncEvent(es[0].Result()) != want[0] || nvme.AsyncEvent(es[1].Result()) != want[1] {
		t.Fatalf("%+v, want %v", es, want)
	}
	// Notices are masked now; another of them waits, and reading its page alone ends that.
	ns := testConfig().Namespaces
	h.c.UpdateNamespaces(ns[1:])
	if es := h.reap(); len(es) != 0 {
		t.Errorf("a masked event: %+v", es)
	}
	hdr, data := h.telemetry(nvme.LogTelemetryCtrl, 0, true)
	if hdr.Available != 1 || hdr.Generation != 1 || hdr.HostOrScope != nvme.TelemetryScopeController || !strings.Contains(string(hdr.Reason[:]), "queue 3") {
		t.Errorf("header %+v", hdr)
	}
	if s := h.parseTelemetry(data); !strings.Contains(s.Reason, "queue 3") || len(s.Errors) != 1 || s.Errors[0].SQID != 3 {
		t.Errorf("%s", data)
	}
	cid := h.push(logCmd(nvme.LogTelemetryCtrl, 0, 512, false))
	h.ring()
	es = h.reap()
	if notice := nvme.MakeAsyncEvent(nvme.EventNotice, nvme.EventNoticeNamespace, nvme.LogChangedNamespaces); len(es) != 2 ||
		nvme.AsyncEvent(es[0].Result()) != notice || es[1].CID() != cid {
		t.Errorf("after the telemetry was read: %+v, want %v and the command", es, notice)
	}
	if hdr, _ := h.telemetry(nvme.LogTelemetryHost, 0, true); hdr.Available != 0 || hdr.Generation != 1 {
		t.Errorf("read: %+v", hdr)
	}

	h.writeReg(nvme.RegCC, 4, 0)
	h.writeReg(nvme.RegASQ, 8, 0) // nothing is mapped there
	h.writeReg(nvme.RegCC, 4, uint64(goodCC))
	if !h.csts().CFS() {
		t.Fatal(h.csts())
	}
	h.c.Close()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	h = connect(t, openPersistent(t, store), new(IOStats))
	hdr, data = h.telemetry(nvme.LogTelemetryCtrl, 0, false)
	if hdr.Available != 1 || hdr.Generation != 2 || !strings.Contains(string(data), "admin SQ") {
		t.Errorf("after a restart %+v %s", hdr, data)
	}
	if hdr, _ := h.telemetry(nvme.LogTelemetryCtrl, 0, true); hdr.Available != 0 || hdr.Generation != 2 {
		t.Errorf("after it was read %+v", hdr)
	}
}

// Media errors put the reliability in doubt; the host hears of it without asking.
func TestReliabilityWarning(t *testing.T) {
	stats := new(IOStats)
	h := connect(t, openPersistent(t, nil), stats)
	h.ok(setFeature(nvme.FeatureAsyncEvents, 0, nvme.SMARTWarningReliability|nvme.SMARTWarningTemperature))
	h.push(aer())
	h.push(aer())
	h.ring()
	stats.MediaErrors = mediaErrorsWarning - 1
	h.c.sample()
	if es := h.reap(); len(es) != 0 {
		t.Errorf("%d media errors: %+v", stats.MediaErrors, es)
	}
	stats.MediaErrors++
	h.c.sample()
	h.c.sample()
	want := nvme.MakeAsyncEvent(nvme.EventSMART, nvme.EventSMARTReliability, nvme.LogSMART)
	if es := h.reap(); len(es) != 1 || nvme.AsyncEvent(es[0].Result()) != want {
		t.Errorf("%+v, want %v once", es, want)
	}
	if l := h.smart(); l.CriticalWarning != nvme.SMARTWarningReliability || l.MediaErrors.Lo != mediaErrorsWarning {
		t.Errorf("%+v", l)
	}
}
