package ctrl

import (
	"bytes"
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/state"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// event is what a reader makes of an entry of the log.
type readEvent struct {
	typ    nvme.PersistentEventType
	cntlid uint16
	at     nvme.Timestamp
	data   []byte
}

func persistentCmd(action uint8, off, n uint64) nvme.Command {
	cmd := logCmd(nvme.LogPersistentEvent, off, n, false)
	cmd.CDW10 |= uint32(action) << 8
	return cmd
}

// readEvents reads the log as nvme-cli does: the header, the rest in pieces, and lets go of it.
func (h *host) readEvents() (header []byte, events []readEvent) {
	h.Helper()
	le := binary.LittleEndian
	h.ok(persistentCmd(nvme.PersistentEstablish, 0, nvme.PersistentHeaderSize))
	header = h.data(nvme.PersistentHeaderSize)
	total := le.Uint64(header[8:])
	page := bytes.Clone(header)
	for off := uint64(len(page)); off < total; off += 4096 {
		h.ok(persistentCmd(nvme.PersistentRead, off, 4096))
		page = append(page, h.data(4096)...)
	}
	h.ok(persistentCmd(nvme.PersistentRelease, 0, 4))
	if header[0] != byte(nvme.LogPersistentEvent) || le.Uint16(header[18:]) != 492 || header[374+2]&4 == 0 {
		h.Errorf("header % x", header[:32])
	}
	for page = page[nvme.PersistentHeaderSize:total]; len(page) > 0; {
		n := int(page[2]) + 3 + int(le.Uint16(page[22:]))
		e := readEvent{typ: nvme.PersistentEventType(page[0]), cntlid: le.Uint16(page[4:]), data: page[page[2]+3 : n]}
		copy(e.at[:], page[6:])
		events = append(events, e)
		page = page[n:]
	}
	if n := le.Uint32(header[4:]); int(n) != len(events) {
		h.Errorf("the header says %d events, there are %d", n, len(events))
	}
	return header, events
}

func (h *host) wantEvents(events []readEvent, want ...nvme.PersistentEventType) {
	h.Helper()
	if len(events) < len(want) {
		h.Fatalf("%d events, want at least %d", len(events), len(want))
	}
	for i, t := range want {
		if e := events[i]; e.typ != t || e.cntlid != 7 || e.at.Milliseconds() == 0 {
			h.Errorf("event %d: %+v, want type %d", i, e, t)
		}
	}
}

func TestPersistentEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := state.NewMemory()
		p := openPersistent(t, store)
		h := connect(t, p, &IOStats{ReadCommands: 3})
		if id := h.controller(); id.LPA&nvme.LPAPersistentEvent == 0 || id.PELS != 1 {
			t.Errorf("LPA %#x PELS %d", id.LPA, id.PELS)
		}
		header, events := h.readEvents()
		h.wantEvents(events, nvme.PersistentPowerOnReset)
		if nvme.ASCII(header[56:76]) != "SB0001" || nvme.ASCII(header[76:116]) != "shadowbell" || header[480] != 1<<1|1<<3|1<<4|1<<6|1<<7 || header[481] != 1 {
			t.Errorf("header of %q %q, events %#x", header[56:76], header[76:116], header[480:484])
		}
		e := events[0]
		if len(e.data) != 44 || nvme.ASCII(e.data[:8]) != "1.0" || e.data[8] != 7 || binary.LittleEndian.Uint32(e.data[24:]) != 1 {
			t.Errorf("power on % x", e.data)
		}
		time.Sleep(5 * time.Second)
		was := nvme.MakeTimestamp(1_700_000_000_000, 0)
		if !h.mem.WriteIOVA(dataIOVA, was[:]) {
			t.Fatal("data buffer")
		}
		h.ok(setFeature(nvme.FeatureTimestamp, 0, 0))
		h.disable()
		h.enable()
		h.shutDown()
		h.c.Close()
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		h = connect(t, openPersistent(t, store), new(IOStats))
		header2, events := h.readEvents()
		h.wantEvents(events, nvme.PersistentPowerOnReset, nvme.PersistentSMART, nvme.PersistentPowerOnReset, nvme.PersistentTimestamp, nvme.PersistentPowerOnReset)
		var l nvme.SMARTLog
		if copy(l.Bytes()[:], events[1].data); len(events[1].data) != 512 || l.HostReads.Lo != 3 {
			t.Errorf("SMART event %+v", l)
		}
		if d := events[3].data; binary.LittleEndian.Uint64(d) != 5000 || binary.LittleEndian.Uint64(d[8:]) != 5000 {
			t.Errorf("timestamp event % x: it was 5000 ms, and so long after the reset", d)
		}
		if a, b := binary.LittleEndian.Uint16(header[372:]), binary.LittleEndian.Uint16(header2[372:]); b != a+1 {
			t.Errorf("generations %d and %d", a, b)
		}
		h.c.Close()
	})
}

// The log is read as it was when its context was established; there is one context, and a reset ends it.
func TestPersistentEventContext(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.fails(persistentCmd(nvme.PersistentRead, 0, 512), nvme.StatusSequenceError)
	h.ok(persistentCmd(nvme.PersistentRelease, 0, 512)) // of nothing
	h.ok(persistentCmd(nvme.PersistentEstablish, 0, 512))
	first := h.data(512)
	h.fails(persistentCmd(nvme.PersistentEstablish, 0, 512), nvme.StatusSequenceError)
	h.ok(setFeature(nvme.FeatureTimestamp, 0, 0))
	h.ok(persistentCmd(nvme.PersistentRead, 0, 512))
	if !bytes.Equal(h.data(512), first) {
		t.Error("the log changed while it was read")
	}
	h.ok(persistentCmd(nvme.PersistentHeader, 0, 4096)) // of the context there is
	if p := h.data(4096); !bytes.Equal(p[:512], first) || !bytes.Equal(p[512:], make([]byte, 4096-512)) {
		t.Error("more than the header, or another")
	}
	h.disable()
	h.enable()
	h.fails(persistentCmd(nvme.PersistentRead, 0, 512), nvme.StatusSequenceError)
	h.ok(persistentCmd(nvme.PersistentHeader, 0, 512))
	if bytes.Equal(h.data(512), first) {
		t.Error("the context survived the reset")
	}
	h.fails(persistentCmd(nvme.PersistentRead, 1<<16, 512), nvme.StatusInvalidField)
}

// A host that resets for ever does not fill the memory: the oldest events go, and the log stays within PELS.
func TestPersistentEventsAreBounded(t *testing.T) {
	h := newEnabled(t, testConfig())
	for range 600 {
		h.disable()
		h.enable()
	}
	h.c.logSMART()
	header, events := h.readEvents()
	h.wantEvents(events, nvme.PersistentSMART, nvme.PersistentPowerOnReset, nvme.PersistentPowerOnReset)
	if total := binary.LittleEndian.Uint64(header[8:]); total > nvme.PersistentEventUnit || total < maxEventBytes/2 {
		t.Errorf("%d bytes", total)
	}
}

// A day of work is a snapshot of its own.
func TestPersistentSnapshots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := connect(t, openPersistent(t, state.NewMemory()), new(IOStats))
		for range 24*60 + 1 {
			time.Sleep(samplePeriod)
			h.c.AdminKick()
		}
		_, events := h.readEvents()
		h.wantEvents(events, nvme.PersistentSMART, nvme.PersistentPowerOnReset)
		h.c.Close()
	})
}

// Commands that take long are in the log when they begin and when they end; what is refused is not.
func TestPersistentEventsOfFormat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newEnabled(t, testConfig())
		format := nvme.Command{Opcode: nvme.AdminFormatNVM, NSID: 3, CDW10: 0x20, CID: 900}
		for _, st := range []nvme.Status{nvme.StatusSuccess, nvme.StatusInternalError} {
			h.c.logBegun(&format)
			h.c.background(&format, func() error { return nil }, func(error) result { return result{status: st} })
			synctest.Wait()
			h.c.AdminKick()
			h.reap()
		}
		_, events := h.readEvents()
		h.wantEvents(events, nvme.PersistentFormatEnd, nvme.PersistentFormatStart, nvme.PersistentFormatEnd, nvme.PersistentFormatStart)
		if d := events[1].data; len(d) != 12 || d[0] != 3 || d[8] != 0x20 {
			t.Errorf("start % x", d)
		}
		if good, bad := events[2].data, events[0].data; len(good) != 12 || good[5] != 0 || bad[5] != 1 || bad[8] != byte(nvme.StatusInternalError) {
			t.Errorf("ends % x and % x", good, bad)
		}
	})
}
