package nvme

import (
	"testing"
	"time"
)

func TestFeatureLayouts(t *testing.T) {
	a := Arbitration(0x04_03_02_07)
	if a.AB() != 7 || a.LPW().Count() != 3 || a.MPW().Count() != 4 || a.HPW().Count() != 5 {
		t.Errorf("arbitration %d %d %d %d", a.AB(), a.LPW(), a.MPW(), a.HPW())
	}
	p := PowerManagement(0xE3)
	if p.PS() != 3 || p.WH() != 7 {
		t.Errorf("power management %d %d", p.PS(), p.WH())
	}
	th := MakeTemperatureThreshold(343, TempSensorAll, TempUnder)
	if th != 0x1F0157 || th.Kelvin() != 343 || th.Sensor() != TempSensorAll || th.Type() != TempUnder {
		t.Errorf("temperature threshold %#x", uint32(th))
	}
	e := ErrorRecovery(1<<16 | 50)
	if e.TLER() != 5*time.Second || !e.DULBE() {
		t.Errorf("error recovery %v %v", e.TLER(), e.DULBE())
	}
	q := MakeQueueCounts(63, 31)
	if q != 0x1F003F || q.SQs().Count() != 64 || q.CQs().Count() != 32 || !q.Valid() {
		t.Errorf("queue counts %#x", uint32(q))
	}
	if QueueCounts(0xFFFF).Valid() || QueueCounts(0xFFFF0000).Valid() {
		t.Error("65536 queues accepted")
	}
	c := MakeCoalescing(7, 2)
	if c != 0x207 || c.Threshold().Count() != 8 || c.Time100us() != 2 || c.Time() != 200*time.Microsecond {
		t.Errorf("coalescing %#x", uint32(c))
	}
	v := MakeVectorConfig(3, true)
	if v != 0x10003 || v.Vector() != 3 || !v.CoalescingDisabled() || MakeVectorConfig(3, false).CoalescingDisabled() {
		t.Errorf("vector config %#x", uint32(v))
	}
	if s := (EventConfigNamespace | SMARTWarningTemperature).SMART(); s != SMARTWarningTemperature {
		t.Errorf("event config: SMART %#x", s)
	}
	if d := KeepAliveTimeout(120000); d != 2*time.Minute {
		t.Errorf("keep alive %v", d)
	}
	ts := MakeTimestamp(0x123456789ABC, TimestampOriginHost<<TimestampOriginShift|TimestampStopped)
	if ts != (Timestamp{0xBC, 0x9A, 0x78, 0x56, 0x34, 0x12, 3, 0}) || ts.Milliseconds() != 0x123456789ABC || ts.Attributes() != 3 {
		t.Errorf("timestamp % x", ts)
	}
	if MakeTimestamp(^uint64(0), 0).Milliseconds() != 1<<48-1 {
		t.Error("a timestamp is 48 bits")
	}
}

func TestLogs(t *testing.T) {
	var s SMARTLog
	s.SetTemperature(0x1234)
	if b := s.Bytes(); b[1] != 0x34 || b[2] != 0x12 || s.Temperature() != 0x1234 {
		t.Errorf("temperature % x", b[:4])
	}
	for _, tt := range []struct{ bytes, want uint64 }{{0, 0}, {1, 1}, {512000, 1}, {512001, 2}, {^uint64(0), 36028797018964}} {
		if got := DataUnits(tt.bytes); got != (Uint128{Lo: tt.want}) {
			t.Errorf("%d bytes are %d units, want %d", tt.bytes, got.Lo, tt.want)
		}
	}
	var e ErrorLogEntry
	e.SetStatus(StatusInvalidField.WithDNR())
	if e.StatusRaw != 0x8004 || e.Status() != StatusInvalidField|StatusDNR {
		t.Errorf("status %#x", e.StatusRaw)
	}
}

// Bytes is the struct's own memory: bytes put there are the fields, fields set are bytes there.
func TestBytesAreTheStruct(t *testing.T) {
	var (
		ctl IdentifyController
		ns  IdentifyNamespace
		ind IdentifyIndependentNamespace
		nvm IdentifyControllerNVM
		set CommandSets
		sup SupportedLogPages
		erl ErrorLogEntry
		smt SMARTLog
		fw  FirmwareSlotLog
		eff CommandEffects
		hb  HostBehavior
		dsm DSMRange
		psd PowerState
		lba LBAFormat
	)
	for _, b := range [][]byte{
		ctl.Bytes()[:], ns.Bytes()[:], ind.Bytes()[:], nvm.Bytes()[:], set.Bytes()[:], sup.Bytes()[:], erl.Bytes()[:],
		smt.Bytes()[:], fw.Bytes()[:], eff.Bytes()[:], hb.Bytes()[:], dsm.Bytes()[:], psd.Bytes()[:], lba.Bytes()[:],
	} {
		for i := range b {
			b[i] = byte(i)
		}
	}
	// A byte at offset n holds n modulo 256, so each value tells where it came from.
	for _, tt := range []struct {
		name      string
		got, want uint64
	}{
		{"IdentifyController.VID", uint64(ctl.VID), 0x0100},
		{"IdentifyController.TNVMCAP", ctl.TNVMCAP.Lo, 0x1F1E1D1C1B1A1918},
		{"IdentifyController.NN", uint64(ctl.NN), 0x07060504},
		{"IdentifyController.PSD[31].ENLAT", uint64(ctl.PSD[31].ENLAT), 0xE7E6E5E4},
		{"IdentifyNamespace.NSZE", ns.NSZE, 0x0706050403020100},
		{"IdentifyNamespace.LBAF[1]", uint64(ns.LBAF[1].LBADS), 0x86},
		{"IdentifyIndependentNamespace.NSTAT", uint64(ind.NSTAT), 14},
		{"IdentifyControllerNVM.DMSL", nvm.DMSL, 0x0F0E0D0C0B0A0908},
		{"CommandSets.Vectors[1]", set.Vectors[1], 0x0F0E0D0C0B0A0908},
		{"SupportedLogPages.Page[2]", uint64(sup.Page[2]), 0x0B0A0908},
		{"ErrorLogEntry.LBA", erl.LBA, 0x1716151413121110},
		{"SMARTLog.Temperature", uint64(smt.Temperature()), 0x0201},
		{"SMARTLog.HostReads", smt.HostReads.Lo, 0x4746454443424140},
		{"FirmwareSlotLog.Slot[0]", uint64(fw.Slot[0][0]), 8},
		{"CommandEffects.IO[1]", uint64(eff.IO[1]), 0x07060504},
		{"HostBehavior.LBAFEE", uint64(hb.LBAFEE), 2},
		{"DSMRange.Length", uint64(dsm.Length), 0x07060504},
		{"PowerState.ACTP", uint64(psd.ACTP), 0x1514},
		{"LBAFormat.LBADS", uint64(lba.LBADS), 2},
	} {
		if tt.got != tt.want {
			t.Errorf("%s = %#x, want %#x", tt.name, tt.got, tt.want)
		}
	}
	dsm.SLBA = 0xAA
	if dsm.Bytes()[8] != 0xAA || dsm.Bytes()[9] != 0 {
		t.Error("a field that is set does not show in Bytes")
	}
}
