package nvme

import (
	"errors"
	"io"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestDescribe(t *testing.T) {
	rw := func(op uint8, lba uint64, blocks uint32, cdw12 uint32) Command {
		var c Command
		z, _ := ToZeroBased16(blocks)
		c.SetRW(op, 1, lba, z)
		c.CDW12 |= cdw12
		return c
	}
	made := func(f func(c *Command)) Command {
		var c Command
		f(&c)
		return c
	}
	tests := []struct {
		admin bool
		cmd   Command
		want  string
	}{
		{false, rw(IORead, 0x10, 8, 0), "READ nsid=1 slba=0x10 nlb=8"},
		{false, rw(IOWrite, 1<<40, 65536, RWForceUnit), "WRITE nsid=1 slba=0x10000000000 nlb=65536 FUA"},
		{false, rw(IOWriteZeroes, 0, 1, RWDeallocate), "WRITE ZEROES nsid=1 slba=0x0 nlb=1 DEAC"},
		{false, rw(IORead, 0, 1, RWLimitedRetry|3<<26), "READ nsid=1 slba=0x0 nlb=1 LR prinfo=0x3"},
		{false, Command{Opcode: IOCompare, Flags: FuseFirst, NSID: 2}, "COMPARE nsid=2 slba=0x0 nlb=1 FUSED-FIRST"},
		{false, Command{Opcode: IOWrite, Flags: FuseSecond | PSDTSGL<<6, NSID: 2}, "WRITE nsid=2 slba=0x0 nlb=1 FUSED-SECOND SGL"},
		{false, Command{Opcode: IOFlush, NSID: NSIDAll}, "FLUSH nsid=all"},
		{false, Command{Opcode: IODSM, NSID: 1, CDW10: 1, CDW11: DSMDeallocate}, "DATASET MANAGEMENT nsid=1 nr=2 AD"},
		{false, Command{Opcode: IODSM, NSID: 1, CDW11: DSMIntegralRead | DSMIntegralWrite}, "DATASET MANAGEMENT nsid=1 nr=1 IDR IDW"},
		{false, Command{Opcode: 0x3F, NSID: 1, CDW10: 10, CDW15: 15}, "OPCODE 3Fh nsid=1 cdw10=0xa cdw11=0x0 cdw12=0x0 cdw13=0x0 cdw14=0x0 cdw15=0xf"},

		{true, Command{Opcode: AdminDeleteSQ, CDW10: 3}, "DELETE I/O SUBMISSION QUEUE qid=3"},
		{true, made(func(c *Command) { c.SetCreateCQ(2, 255, 0x5000, 4, true) }), "CREATE I/O COMPLETION QUEUE qid=2 qsize=256 prp1=0x5000 PC iv=4 IEN"},
		{true, made(func(c *Command) { c.SetCreateSQ(2, 65535, 0x6000, 1, 3) }), "CREATE I/O SUBMISSION QUEUE qid=2 qsize=65536 prp1=0x6000 PC cqid=1 qprio=3"},
		{true, made(func(c *Command) { c.SetIdentify(CNSController, 0, CSINVM) }), `IDENTIFY cns="Controller" nsid=0 csi=0`},
		{true, made(func(c *Command) { c.SetAbort(1, 0x22) }), "ABORT sqid=1 cid=0x22"},
		{true, made(func(c *Command) { c.SetSetFeatures(FeatureQueues, 0, 0x30003) }), `SET FEATURES fid="Number of Queues" nsid=0 cdw11=0x30003`},
		{true, Command{Opcode: AdminSetFeatures, CDW10: 1<<31 | 6, CDW11: 1}, `SET FEATURES fid="Volatile Write Cache" nsid=0 cdw11=0x1 SV`},
		{true, made(func(c *Command) { c.SetGetFeatures(FeatureTimestamp, 0, FeatureSupported) }), `GET FEATURES fid="Timestamp" nsid=0 sel=3 cdw11=0x0`},
		{true, made(func(c *Command) { _ = c.SetGetLogPage(LogSMART, NSIDAll, 0, 512, true) }), `GET LOG PAGE lid="SMART / Health Information" nsid=all bytes=512 lpo=0x0 RAE`},
		{true, Command{Opcode: AdminAsyncEventRequest}, "ASYNCHRONOUS EVENT REQUEST"},
		{true, made(func(c *Command) { c.SetDoorbellBuffers(AdminDoorbellBufferConfig, 0x1000, 0x2000) }), "DOORBELL BUFFER CONFIG shadow=0x1000 eventidx=0x2000"},
		{true, made(func(c *Command) { c.SetDoorbellBuffers(AdminDoorbellMemory2014, 0x1000, 0x2000) }), "SET DOORBELL MEMORY (2014) shadow=0x1000 eventidx=0x2000"},
		{true, Command{Opcode: AdminFormatNVM, NSID: 1}, "FORMAT NVM nsid=1 cdw10=0x0 cdw11=0x0 cdw12=0x0 cdw13=0x0 cdw14=0x0 cdw15=0x0"},
	}
	for _, tt := range tests {
		if got := tt.cmd.Describe(tt.admin); got != tt.want {
			t.Errorf("Describe(%v) = %q\n                want %q", tt.admin, got, tt.want)
		}
	}
}

func TestDescribeDoesNotAllocate(t *testing.T) {
	buf := make([]byte, 0, 256)
	cmds := []Command{{Opcode: IORead, NSID: 1}, {Opcode: IODSM}, {Opcode: AdminIdentify}}
	if n := testing.AllocsPerRun(100, func() {
		for i := range cmds {
			buf = cmds[i].AppendDescription(buf[:0], false)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestCommandFields(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		lba := rapid.Uint64().Draw(t, "lba")
		blocks := rapid.Uint32Range(1, 65536).Draw(t, "blocks")
		z, ok := ToZeroBased16(blocks)
		if !ok || z.Count() != blocks {
			t.Fatalf("ToZeroBased16(%d) = %d, %v", blocks, z, ok)
		}
		c := Command{PRP1: 1, PRP2: 2, MPTR: 3, CDW12: 0xFFFFFFFF}
		c.SetNLB(z)
		if c.NLB() != z || c.CDW12>>16 != 0xFFFF {
			t.Fatalf("SetNLB(%d) gave CDW12 %#x", z, c.CDW12)
		}
		c.SetRW(IORead, 5, lba, z)
		if c != (Command{Opcode: IORead, NSID: 5, PRP1: 1, PRP2: 2, CDW10: uint32(lba), CDW11: uint32(lba >> 32), CDW12: blocks - 1}) {
			t.Fatalf("SetRW gave %+v", c)
		}
		if c.SLBA() != lba || c.NLB().Count() != blocks {
			t.Fatalf("SLBA %#x NLB %d", c.SLBA(), c.NLB())
		}
		c.SetSLBA(^lba)
		if c.SLBA() != ^lba {
			t.Fatalf("SetSLBA: %#x", c.SLBA())
		}

		qid, other := rapid.Uint16().Draw(t, "qid"), rapid.Uint16().Draw(t, "other")
		ien := rapid.Bool().Draw(t, "ien")
		c.SetCreateCQ(qid, z, 0x4000, other, ien)
		if c.QID() != qid || c.QSize() != z || c.CQVector() != other || c.CQInterrupts() != ien || !c.QContiguous() {
			t.Fatalf("SetCreateCQ: %+v", c)
		}
		prio := rapid.Uint8Range(0, 3).Draw(t, "prio")
		c.SetCreateSQ(qid, z, 0x4000, other, prio)
		if c.QID() != qid || c.QSize() != z || c.SQCQID() != other || c.SQPriority() != prio || !c.QContiguous() {
			t.Fatalf("SetCreateSQ: %+v", c)
		}
		c.SetAbort(qid, other)
		if c.AbortSQID() != qid || c.AbortCID() != other {
			t.Fatalf("SetAbort: %+v", c)
		}

		n, off := rapid.Uint64Range(1, 1<<32).Draw(t, "dwords")*4, rapid.Uint64().Draw(t, "offset")&^3
		if err := c.SetGetLogPage(LogError, 7, off, n, ien); err != nil {
			t.Fatal(err)
		}
		if c.LID() != LogError || c.LogBytes() != n || c.LogOffset() != off || c.LogRetainEvent() != ien || c.LogSpecific() != 0 || c.LogOffsetIndex() || c.LogCSI() != 0 {
			t.Fatalf("SetGetLogPage(%d, %d): %+v", off, n, c)
		}
	})
}

func TestSetGetLogPageRefuses(t *testing.T) {
	for _, tt := range []struct{ off, n uint64 }{{0, 0}, {0, 3}, {0, 1<<34 + 4}, {2, 4}} {
		c := Command{CID: 9}
		var re *RangeError
		if err := c.SetGetLogPage(LogError, 0, tt.off, tt.n, false); !errors.As(err, &re) || c != (Command{CID: 9}) {
			t.Errorf("offset %d, %d bytes: %v, command %+v", tt.off, tt.n, err, c)
		}
	}
}

func TestAdminOperands(t *testing.T) {
	c := Command{CDW10: 0x00050006, CDW11: 2 << 24}
	if c.CNS() != CNSCSIController || c.IdentifyCNTID() != 5 || c.IdentifyCSI() != CSIZoned {
		t.Errorf("Identify: %v %d %v", c.CNS(), c.IdentifyCNTID(), c.IdentifyCSI())
	}
	c = Command{CDW10: 1<<31 | 2<<8 | 0x0B}
	if c.FID() != FeatureAsyncEvents || !c.FeatureSave() || c.FeatureSelect() != FeatureSaved {
		t.Errorf("Features: %v %v %v", c.FID(), c.FeatureSave(), c.FeatureSelect())
	}
	c = Command{CDW10: 0xFFFF<<16 | 0x7F<<8 | 5, CDW11: 0xFFFF, CDW14: 1<<24 | 1<<23}
	if c.LogBytes() != 1<<34 || c.LogSpecific() != 0x7F || c.LogCSI() != CSIKV || !c.LogOffsetIndex() {
		t.Errorf("Get Log Page: %d %#x %v %v", c.LogBytes(), c.LogSpecific(), c.LogCSI(), c.LogOffsetIndex())
	}
	c = Command{CDW12: rwStorageTag | 5<<20}
	if !c.StorageTagCheck() || c.DirectiveType() != 5 {
		t.Errorf("Write: %v %d", c.StorageTagCheck(), c.DirectiveType())
	}
}

// TestRule20_LittleEndian: the structs are the wire, byte for byte.
func TestRule20_LittleEndian(t *testing.T) {
	c := Command{Opcode: 0x02, Flags: 0x40, CID: 0x1234, NSID: 0x01020304, PRP1: 0x1122334455667788, CDW15: 0xA0B0C0D0}
	b := c.Bytes()
	if got, want := string(b[:8]), "\x02\x40\x34\x12\x04\x03\x02\x01"; got != want {
		t.Errorf("DW0-1 % x, want % x", got, want)
	}
	if got, want := string(b[24:32]), "\x88\x77\x66\x55\x44\x33\x22\x11"; got != want {
		t.Errorf("PRP1 % x, want % x", got, want)
	}
	if got, want := string(b[60:]), "\xd0\xc0\xb0\xa0"; got != want {
		t.Errorf("DW15 % x, want % x", got, want)
	}
	var back Command
	copy(back.Bytes()[:], b[:])
	if back != c {
		t.Errorf("decoded %+v, want %+v", back, c)
	}
}

// TestRule32_ZeroBased: a count of 65536 survives, and what cannot be stored is refused.
func TestRule32_ZeroBased(t *testing.T) {
	if n := ZeroBased16(0xFFFF).Count(); n != 65536 {
		t.Errorf("ZeroBased16(0xFFFF).Count() = %d", n)
	}
	if n := ZeroBased8(0xFF).Count(); n != 256 {
		t.Errorf("ZeroBased8(0xFF).Count() = %d", n)
	}
	for _, tt := range []struct {
		count  uint32
		z16    ZeroBased16
		z8     ZeroBased8
		ok, o8 bool
	}{
		{0, 0, 0, false, false},
		{1, 0, 0, true, true},
		{256, 255, 255, true, true},
		{257, 256, 0, true, false},
		{65536, 65535, 0, true, false},
		{65537, 0, 0, false, false},
		{0xFFFFFFFF, 0, 0, false, false},
	} {
		if z, ok := ToZeroBased16(tt.count); z != tt.z16 || ok != tt.ok {
			t.Errorf("ToZeroBased16(%d) = %d, %v", tt.count, uint16(z), ok)
		}
		if z, ok := ToZeroBased8(tt.count); z != tt.z8 || ok != tt.o8 {
			t.Errorf("ToZeroBased8(%d) = %d, %v", tt.count, uint8(z), ok)
		}
	}
	if s := ZeroBased16(7).String() + " " + ZeroBased8(255).String(); s != "8 256" {
		t.Errorf("printed as %s", s)
	}
}

func TestCompletion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		low, high := rapid.Uint64().Draw(t, "low"), rapid.Uint64().Draw(t, "high")
		c := CompletionOf(low, high)
		if l, h := c.Words(); l != low || h != high {
			t.Fatalf("Words of CompletionOf(%#x, %#x) = %#x, %#x", low, high, l, h)
		}
		var b [16]byte
		for i := range 8 {
			b[i], b[8+i] = uint8(low>>(8*i)), uint8(high>>(8*i))
		}
		if *c.Bytes() != b {
			t.Fatalf("CompletionOf(%#x, %#x) is % x", low, high, *c.Bytes())
		}
		s, phase := Status(rapid.Uint16Range(0, 0x7FFF).Draw(t, "status")), rapid.Bool().Draw(t, "phase")
		c.SetStatus(s, phase)
		if c.Status() != s || c.Phase() != phase {
			t.Fatalf("SetStatus(%#x, %v): %#x, %v", s, phase, c.Status(), c.Phase())
		}
		if c.Result64() != low {
			t.Fatalf("Result64 = %#x, want %#x", c.Result64(), low)
		}
	})
	c := Completion{Result: 5, SQHead: 2, SQID: 1, CID: 0x20}
	c.SetStatus(StatusInvalidField.WithDNR(), true)
	if got, want := c.String(), "sqid=1 cid=0x20 sqhd=2 dw0=0x5 p=1 Invalid Field in Command (0/02h, DNR)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestStatusError(t *testing.T) {
	if err := StatusSuccess.WithMore().Err(); err != nil {
		t.Errorf("success is the error %v", err)
	}
	err := StatusLBAOutOfRange.WithDNR().Err()
	if got := err.Error(); got != "LBA Out of Range (0/80h, DNR)" {
		t.Error(got)
	}
	wrapped := &StatusError{Status: StatusWriteFault, Cause: io.ErrShortWrite}
	if !errors.Is(wrapped, io.ErrShortWrite) || !strings.HasSuffix(wrapped.Error(), ": "+io.ErrShortWrite.Error()) {
		t.Errorf("%v", wrapped)
	}
	for _, tt := range []struct {
		err  error
		want Status
	}{{nil, StatusSuccess}, {err, StatusLBAOutOfRange | StatusDNR}, {errors.Join(io.EOF, wrapped), StatusWriteFault}, {io.EOF, StatusInternalError}} {
		if got := StatusOf(tt.err); got != tt.want {
			t.Errorf("StatusOf(%v) = %v, want %v", tt.err, got, tt.want)
		}
	}
	if got := (&RangeError{What: "x", Value: 16}).Error(); got != "x: 0x10 does not fit its field" {
		t.Error(got)
	}
}

func FuzzCommand(f *testing.F) {
	seed := Command{Opcode: IORead, NSID: 1, CDW12: 7}
	f.Add(seed.Bytes()[:])
	f.Add([]byte(strings.Repeat("\xff", 64)))
	f.Add([]byte{AdminGetLogPage})
	f.Fuzz(func(t *testing.T, b []byte) {
		var c Command
		n := copy(c.Bytes()[:], b)
		for _, admin := range []bool{true, false} {
			if s := c.Describe(admin); s == "" || len(s) > 256 || strings.ContainsAny(s, "\n\x1b") {
				t.Fatalf("%q", s)
			}
		}
		if n := c.LogBytes(); n < 4 || n > 1<<34 || n%4 != 0 {
			t.Fatalf("LogBytes %d", n)
		}
		if c.NLB().Count() < 1 || c.NLB().Count() > 65536 || c.QSize().Count() > 65536 || c.DSMRanges().Count() > DSMMaxRanges {
			t.Fatalf("counts %d %d %d", c.NLB().Count(), c.QSize().Count(), c.DSMRanges().Count())
		}
		if string(c.Bytes()[:n]) != string(b[:n]) {
			t.Fatal("reading changed the bytes")
		}
	})
}

func FuzzCompletion(f *testing.F) {
	f.Add(uint64(0), uint64(0))
	f.Add(^uint64(0), ^uint64(0))
	f.Fuzz(func(t *testing.T, low, high uint64) {
		c := CompletionOf(low, high)
		if l, h := c.Words(); l != low || h != high {
			t.Fatalf("%#x %#x became %#x %#x", low, high, l, h)
		}
		if s := c.String(); s == "" || len(s) > 256 {
			t.Fatalf("%q", s)
		}
	})
}
