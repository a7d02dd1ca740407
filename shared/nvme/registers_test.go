package nvme

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestRegisterStrings(t *testing.T) {
	tests := []struct{ got, want string }{
		{CC(0).String(), "CC=0x0"},
		{CC(0x460001).String(), "CC=0x460001 (EN, IOSQES=6, IOCQES=4)"},
		{CC(0).WithSHN(SHNAbrupt).WithMPS(1).WithAMS(1).WithCSS(CSSIOCS).WithCRIME(true).String(), "CC=0x10088e0 (CSS=6, MPS=1, AMS=1, SHN=2, CRIME)"},
		{CSTS(0).String(), "CSTS=0x0"},
		{CSTS(3).String(), "CSTS=0x3 (RDY, CFS)"},
		{CSTS(0).WithSHST(SHSTComplete).WithNSSRO(true).WithPaused(true).String(), "CSTS=0x38 (SHST=2, NSSRO, PP)"},
		{CSTS(1 << 6).String(), "CSTS=0x40 (ST)"},
		{AQA(0).WithASQS(31).WithACQS(63).String(), "AQA=0x3f001f (ASQS=32, ACQS=64)"},
		{CAP(0x20_1400_03FF | 1<<16).String(), "CAP=0x20140103ff (MQES=1024, CQR, TO=20, DSTRD=0, CSS=0x1, MPSMIN=0, MPSMAX=0)"},
		{CAP(^uint64(0)).String(), "CAP=0xffffffffffffffff (MQES=65536, CQR, AMS=3, TO=255, DSTRD=15, NSSRS, CSS=0xff, BPS, CPS=3, MPSMIN=15, MPSMAX=15, PMRS, CMBS, NSSS, CRMS=3)"},
		{MakeVersion(1, 4, 0).String(), "1.4"},
		{MakeVersion(1, 2, 1).String(), "1.2.1"},
		{Version(0x00020000).String(), "2.0"},
		{RegisterName(RegCSTS), "CSTS"},
		{RegisterName(RegASQ + 4), "ASQ+4"},
		{RegisterName(0x123), "reg+0x123"},
	}
	for _, tt := range tests {
		if tt.got != tt.want {
			t.Errorf("%s\nwant %s", tt.got, tt.want)
		}
	}
}

// A With method changes its own bits and no other, and the getter returns what it was given.
func TestRegisterFields(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		on, v := rapid.Bool().Draw(t, "on"), rapid.Uint8().Draw(t, "v")
		z := ZeroBased16(rapid.Uint16().Draw(t, "z"))

		c := CAP(rapid.Uint64().Draw(t, "CAP"))
		check := func(name string, ok bool, changed, mask uint64) {
			if !ok || changed&^mask != 0 {
				t.Fatalf("%s: reads back %v, changed bits %#x of %#x", name, ok, changed, mask)
			}
		}
		capCheck := func(name string, n CAP, ok bool, mask uint64) { check("CAP."+name, ok, uint64(n^c), mask) }
		capCheck("MQES", c.WithMQES(z), c.WithMQES(z).MQES() == z, 0xFFFF)
		capCheck("CQR", c.WithCQR(on), c.WithCQR(on).CQR() == on, 1<<16)
		capCheck("AMS", c.WithAMS(v), c.WithAMS(v).AMS() == v&3, 3<<17)
		capCheck("TO", c.WithTO(v), c.WithTO(v).TO() == v, 0xFF<<24)
		capCheck("DSTRD", c.WithDSTRD(v), c.WithDSTRD(v).DSTRD() == v&15, 0xF<<32)
		capCheck("NSSRS", c.WithNSSRS(on), c.WithNSSRS(on).NSSRS() == on, 1<<36)
		capCheck("CSS", c.WithCSS(v), c.WithCSS(v).CSS() == v, 0xFF<<37)
		capCheck("MPSMIN", c.WithMPSMIN(v), c.WithMPSMIN(v).MPSMIN() == v&15, 0xF<<48)
		capCheck("MPSMAX", c.WithMPSMAX(v), c.WithMPSMAX(v).MPSMAX() == v&15, 0xF<<52)
		capCheck("CRMS", c.WithCRMS(v), c.WithCRMS(v).CRMS() == v&3, 3<<59)

		cc := CC(rapid.Uint32().Draw(t, "CC"))
		ccCheck := func(name string, n CC, ok bool, mask uint64) { check("CC."+name, ok, uint64(n^cc), mask) }
		ccCheck("EN", cc.WithEN(on), cc.WithEN(on).EN() == on, 1)
		ccCheck("CSS", cc.WithCSS(v), cc.WithCSS(v).CSS() == v&7, 7<<4)
		ccCheck("MPS", cc.WithMPS(v), cc.WithMPS(v).MPS() == v&15, 0xF<<7)
		ccCheck("AMS", cc.WithAMS(v), cc.WithAMS(v).AMS() == v&7, 7<<11)
		ccCheck("SHN", cc.WithSHN(v), cc.WithSHN(v).SHN() == v&3, 3<<14)
		ccCheck("IOSQES", cc.WithIOSQES(v), cc.WithIOSQES(v).IOSQES() == v&15, 0xF<<16)
		ccCheck("IOCQES", cc.WithIOCQES(v), cc.WithIOCQES(v).IOCQES() == v&15, 0xF<<20)
		ccCheck("CRIME", cc.WithCRIME(on), cc.WithCRIME(on).CRIME() == on, 1<<24)

		s := CSTS(rapid.Uint32().Draw(t, "CSTS"))
		stsCheck := func(name string, n CSTS, ok bool, mask uint64) { check("CSTS."+name, ok, uint64(n^s), mask) }
		stsCheck("RDY", s.WithRDY(on), s.WithRDY(on).RDY() == on, 1)
		stsCheck("CFS", s.WithCFS(on), s.WithCFS(on).CFS() == on, 2)
		stsCheck("SHST", s.WithSHST(v), s.WithSHST(v).SHST() == v&3, 3<<2)
		stsCheck("NSSRO", s.WithNSSRO(on), s.WithNSSRO(on).NSSRO() == on, 1<<4)
		stsCheck("PP", s.WithPaused(on), s.WithPaused(on).PP() == on, 1<<5)

		a := AQA(rapid.Uint32().Draw(t, "AQA"))
		check("AQA.ASQS", a.WithASQS(z).ASQS() == z&0xFFF, uint64(a.WithASQS(z)^a), 0xFFF)
		check("AQA.ACQS", a.WithACQS(z).ACQS() == z&0xFFF, uint64(a.WithACQS(z)^a), 0xFFF<<16)
	})
}

func TestDerivedRegisterValues(t *testing.T) {
	if got := CAP(0).WithTO(15).Timeout(); got != 7500*time.Millisecond {
		t.Errorf("TO=15 is %v", got)
	}
	if got := CAP(0).Timeout(); got != 500*time.Millisecond {
		t.Errorf("TO=0 is %v", got)
	}
	if got := CC(0).WithMPS(4).PageSize(); got != 65536 {
		t.Errorf("MPS=4 is %d", got)
	}
	if got := AQA(0xFFFFFFFF).ACQS().Count(); got != 4096 {
		t.Errorf("ACQS=FFFh is %d", got)
	}
	v := MakeVersion(2, 1, 3)
	if v != 0x20103 || v.Major() != 2 || v.Minor() != 1 || v.Tertiary() != 3 {
		t.Errorf("%#x", uint32(v))
	}
}

func TestDoorbells(t *testing.T) {
	tests := []struct {
		qid    uint16
		dstrd  uint8
		sq, cq uint32
	}{
		{0, 0, 0x1000, 0x1004},
		{1, 0, 0x1008, 0x100C},
		{64, 0, 0x1200, 0x1204},
		{1, 4, 0x1080, 0x10C0},
		{511, 0, 0x1FF8, 0x1FFC},
		{65535, 0, 0x80FF8, 0x80FFC},
	}
	for _, tt := range tests {
		if sq, cq := SQTailDoorbell(tt.qid, tt.dstrd), CQHeadDoorbell(tt.qid, tt.dstrd); sq != tt.sq || cq != tt.cq {
			t.Errorf("queue %d, stride %d: %#x, %#x; want %#x, %#x", tt.qid, tt.dstrd, sq, cq, tt.sq, tt.cq)
		}
		if qid, cq, ok := ParseDoorbell(tt.sq, tt.dstrd); qid != tt.qid || cq || !ok {
			t.Errorf("ParseDoorbell(%#x, %d) = %d, %v, %v", tt.sq, tt.dstrd, qid, cq, ok)
		}
		if qid, cq, ok := ParseDoorbell(tt.cq, tt.dstrd); qid != tt.qid || !cq || !ok {
			t.Errorf("ParseDoorbell(%#x, %d) = %d, %v, %v", tt.cq, tt.dstrd, qid, cq, ok)
		}
	}
	for _, off := range []uint32{0, 0xFFC, 0x1002, 0x81000, 0xFFFFFFFC} {
		if qid, _, ok := ParseDoorbell(off, 0); ok {
			t.Errorf("%#x is a doorbell of queue %d", off, qid)
		}
	}
	if _, _, ok := ParseDoorbell(0x1004, 1); ok {
		t.Error("0x1004 is a doorbell at a stride of 8")
	}
}

func FuzzRegisters(f *testing.F) {
	f.Add(uint64(0x460001), uint32(0x1008), uint8(0))
	f.Add(^uint64(0), ^uint32(0), uint8(255))
	f.Fuzz(func(t *testing.T, v uint64, off uint32, dstrd uint8) {
		for _, s := range []string{CAP(v).String(), CC(v).String(), CSTS(v).String(), AQA(v).String(), Version(v).String(), RegisterName(off)} {
			if s == "" || len(s) > 256 {
				t.Fatalf("%q", s)
			}
		}
		if CC(v).PageSize() < 4096 || CAP(v).Timeout() <= 0 {
			t.Fatalf("page size %d, timeout %v", CC(v).PageSize(), CAP(v).Timeout())
		}
		if qid, cq, ok := ParseDoorbell(off, dstrd); ok {
			back := SQTailDoorbell(qid, dstrd)
			if cq {
				back = CQHeadDoorbell(qid, dstrd)
			}
			if back != off {
				t.Fatalf("doorbell at %#x is of queue %d, whose doorbell is at %#x", off, qid, back)
			}
		}
	})
}
