package ioq

import (
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestLimitsOfNativeCommands: what the medium does itself waits for the limits that it would wait for if hostmed did it, does not reach the medium before its turn, and is counted.
func TestLimitsOfNativeCommands(t *testing.T) {
	s := newSpeaker(t, "mem:size=16MiB", nvme.IOCompare, nvme.IOVerify, nvme.IOWriteUncorrectable, nvme.IODSM, nvme.IOCopy, 0x81, 0x82)
	l := newLimited(t, rigConfig{shadow: true}, s)
	p := l.pair(1, 64, false)
	const second = time.Second
	one := qos.Limit{Rate: 1, Burst: 1}
	kib := qos.Limit{Rate: 4096, Burst: 4096}
	vendor := func(op uint8) nvme.Command {
		return nvme.Command{Opcode: op, NSID: 1, PRP1: base + dataOff, CDW10: 1024}
	}
	dsm := func() nvme.Command { return l.dsm(nvme.DSMRange{SLBA: 8, Length: 8}) }
	copied := func() nvme.Command { return l.copyCmd(1000, source(0, 8)) }
	for name, x := range map[string]struct {
		make                 func() nvme.Command
		reads, writes, bytes bool // which limits hold it back
	}{
		"compare":             {func() nvme.Command { return rw(nvme.IOCompare, 0, 8, base+dataOff) }, true, false, true},
		"verify":              {func() nvme.Command { return rw(nvme.IOVerify, 0, 8, 0) }, true, false, true},
		"vendor, from medium": {func() nvme.Command { return vendor(0x82) }, true, false, true},
		"vendor, to medium":   {func() nvme.Command { return vendor(0x81) }, false, true, true},
		"write uncorrectable": {func() nvme.Command { return rw(nvme.IOWriteUncorrectable, 20, 1, 0) }, false, true, false},
		"dsm":                 {dsm, false, true, false},
		"copy":                {copied, false, true, true},
	} {
		for limits, y := range map[string]struct {
			l     qos.Limits
			holds bool
		}{
			"all commands": {qos.Limits{IOPS: one}, true},
			"reads":        {qos.Limits{ReadIOPS: one}, x.reads},
			"writes":       {qos.Limits{WriteIOPS: one}, x.writes},
			"bytes":        {qos.Limits{Bandwidth: kib}, x.bytes},
		} {
			l.limit(1, qos.Limits{})
			l.advance(100 * second)
			l.limit(1, y.l)
			// What the limit has goes to others, of both sides.
			if st := p.do(rw(nvme.IORead, 0, 8, base+dataOff)); !st.OK() {
				t.Fatal(st)
			}
			if y.l.WriteIOPS.Rate > 0 {
				if st := p.do(rw(nvme.IOWrite, 0, 8, base+dataOff)); !st.OK() {
					t.Fatal(st)
				}
			}
			s.take()
			before := l.ctl.Stats().Throttled
			p.pushAll(1, x.make())
			if !y.holds {
				p.reap(1)
			} else {
				l.awaitWaiting(1)
				if seen := s.take(); len(seen) != 0 {
					t.Errorf("%s, limit of %s: it has begun", name, limits)
				}
				l.advance(2 * second)
				p.reap(1)
			}
			if seen := s.take(); len(seen) != 1 {
				t.Errorf("%s, limit of %s: the medium was asked %d times", name, limits, len(seen))
			}
			if held := l.ctl.Stats().Throttled - before; held != map[bool]uint64{true: 1, false: 0}[y.holds] {
				t.Errorf("%s, limit of %s: %d were held back", name, limits, held)
			}
		}
	}
	// The bytes of a Copy, read and written, are waited for by those after it.
	l.limit(1, qos.Limits{})
	l.advance(100 * second)
	l.limit(1, qos.Limits{Bandwidth: kib})
	if st := p.do(copied()); !st.OK() {
		t.Fatal(st)
	}
	p.pushAll(1, rw(nvme.IORead, 0, 8, base+dataOff))
	l.awaitWaiting(1)
	l.advance(1900 * time.Millisecond)
	l.wantReady(p, 0)
	l.advance(500 * time.Millisecond)
	p.reap(1)
	l.empty()
	l.noError()
}
