package backend

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// sliceSpec is blocks 1000 to 2999 of a fake device.
func sliceSpec() Spec {
	return Spec{Kind: KindNVMe, Path: "/dev/ng0n1", LBA: 512, Offset: 1000 * 512, Size: 2000 * 512}
}

func TestNVMeCharMovesBytes(t *testing.T) {
	d := newFakeChar()
	pattern(d.data, 1)
	before := bytes.Clone(d.data)
	q, ring := fakeCharQueue(t, openFake(t, d, sliceSpec()), d, 16)
	mem := guestMemory(t, 1<<20)
	q.AddMemory(mem)
	mustRun(t, q, read(0, mem[:4096]), read(1999*512, mem[8192:8704]))
	expect(t, mem[:4096], before[1000*512:], "the slice's first blocks")
	expect(t, mem[8192:8704], before[2999*512:3000*512], "its last block")
	useOften(t, q, mem)
	d.fixed = nil
	mustRun(t, q, read(0, mem[:4096]), read(0, mem[8192:8704]))
	for i, fixed := range d.fixed {
		if !fixed {
			t.Errorf("command %d: its memory is not registered", i)
		}
	}

	// More than the device takes, in pieces that are neighbours and such as are not: 600 KiB of 1000.
	want := pattern(make([]byte, 600<<10), 2)
	copy(mem, want)
	d.seen = nil
	mustRun(t, q, write(200*512, mem[:100<<10], mem[100<<10:300<<10], mem[300<<10:600<<10]))
	expect(t, d.data[1200*512:][:600<<10], want, "a long write")
	expect(t, d.data[:1200*512], before[:1200*512], "before it")
	expect(t, d.data[1200*512+600<<10:], before[1200*512+600<<10:], "behind it")
	if len(d.seen) < 600/64 {
		t.Errorf("%d commands for 600 KiB, of which the device takes 64", len(d.seen))
	}
	got := guestMemory(t, 600<<10)
	mustRun(t, q, read(200*512, got[300<<10:], got[:300<<10]))
	expect(t, got[300<<10:], want[:300<<10], "read in two pieces")
	expect(t, got[:300<<10], want[300<<10:], "read in two pieces")

	q.RemoveMemory(mem)
	if len(ring.buffers) != 0 {
		t.Errorf("%d buffers are registered when the memory is gone", len(ring.buffers))
	}
	d.fixed = nil
	mustRun(t, q, read(0, mem[:512]))
	if d.fixed[0] {
		t.Error("memory that is not registered any more was used as if it were")
	}
}

func TestNVMeCharVectors(t *testing.T) {
	d := newFakeChar()
	pattern(d.data, 3)
	q, _ := fakeCharQueue(t, openFake(t, d, sliceSpec()), d, 16)
	mem := guestMemory(t, 1<<20)
	for _, x := range []struct {
		name  string
		vec   [][]byte
		pages []uint32 // pieces of memory of each command
	}{
		{"neighbours are one", [][]byte{mem[:4096], mem[4096:8192]}, []uint32{1}},
		{"two places", [][]byte{mem[:4096], mem[8192:12288]}, []uint32{2}},
		{"17 pages", [][]byte{mem[100:][:16<<12]}, []uint32{1}},
		{"33 places are two commands", func() (v [][]byte) {
			for i := range 33 {
				v = append(v, mem[i<<13:][:512])
			}
			return v
		}(), []uint32{17, 16}},
		{"pieces that are no blocks", [][]byte{mem[:100], mem[4096:][:412], mem[9000:][:1024]}, []uint32{3}},
	} {
		d.pages = nil
		r := read(512, x.vec...)
		mustRun(t, q, r)
		var got []byte
		for _, v := range x.vec {
			got = append(got, v...)
		}
		expect(t, got, d.data[1001*512:], x.name)
		if !equal(d.pages, x.pages) {
			t.Errorf("%s: commands of %v pieces, want %v", x.name, d.pages, x.pages)
		}
	}
}

func equal(a, b []uint32) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// TestNVMeCharCommands checks what the device gets to see, field by field.
func TestNVMeCharCommands(t *testing.T) {
	d := newFakeChar()
	b := openFake(t, d, sliceSpec())
	q, _ := fakeCharQueue(t, b, d, 16)
	mem := guestMemory(t, 64<<10)
	// All that a guest can set, so that what gets through is seen.
	dirty := func(op uint8) *nvme.Command {
		return &nvme.Command{Opcode: op, Flags: 0xff, CID: 0xffff, NSID: 1, CDW2: ^uint32(0), CDW3: ^uint32(0), MPTR: ^uint64(0), PRP1: ^uint64(0), PRP2: ^uint64(0),
			CDW12: 0xffff0000, CDW13: ^uint32(0), CDW14: ^uint32(0), CDW15: ^uint32(0)}
	}
	list := func(p []byte) []Seg { return []Seg{seg(p)} }
	ranges := func(x ...nvme.DSMRange) (p []byte) {
		for _, x := range x {
			p = append(p, x.Bytes()[:]...)
		}
		return p
	}
	sources := func(x ...nvme.CopyRange) (p []byte) {
		for _, x := range x {
			p = append(p, x.Bytes()[:]...)
		}
		return p
	}
	const rw = 0xc0000000 // FUA, LR
	at := func(lba uint32, c passthru) passthru { c.NSID, c.CDW10 = 7, lba; return c }
	for name, x := range map[string]struct {
		r    *Request
		want passthru
	}{
		"read":                {&Request{Op: OpRead, Off: 512, Len: 1024, Vec: list(mem[:1024]), Cmd: dirty(nvme.IORead)}, at(1001, passthru{Opcode: 2, CDW12: rw | 1, CDW13: 0xff})},
		"read, hostmed's":     {&Request{Op: OpRead, Off: 512, Len: 1024, Vec: list(mem[:1024])}, at(1001, passthru{Opcode: 2, CDW12: 1})},
		"read, of a Copy":     {&Request{Op: OpRead, Off: 512, Len: 1024, Vec: list(mem[:1024]), Cmd: dirty(nvme.IOCopy)}, at(1001, passthru{Opcode: 2, CDW12: 1})},
		"write":               {&Request{Op: OpWrite, Len: 512, Vec: list(mem[:512]), Cmd: dirty(nvme.IOWrite)}, at(1000, passthru{Opcode: 1, CDW12: 0x80000000, CDW13: 0xff})},
		"write, FUA":          {&Request{Op: OpWrite, FUA: true, Len: 512, Vec: list(mem[:512])}, at(1000, passthru{Opcode: 1, CDW12: 0x40000000})},
		"flush":               {&Request{Op: OpFlush, Cmd: dirty(nvme.IOFlush)}, at(0, passthru{})},
		"zeroes":              {&Request{Op: OpWriteZeroes, Off: 1024, Len: 2048, Cmd: dirty(nvme.IOWriteZeroes)}, at(1002, passthru{Opcode: 8, CDW12: 3})},
		"zeroes, deallocate":  {&Request{Op: OpWriteZeroes, FUA: true, Dealloc: true, Off: 1024, Len: 2048}, at(1002, passthru{Opcode: 8, CDW12: 0x42000003})},
		"discard":             {&Request{Op: OpDiscard, Off: 1024, Len: 2048}, at(0, passthru{Opcode: 9, CDW11: 4})},
		"compare":             {&Request{Op: OpCommand, Off: 1024, Len: 512, Vec: list(make([]byte, 512)), Cmd: dirty(nvme.IOCompare)}, at(1002, passthru{Opcode: 5, CDW12: rw})},
		"verify":              {&Request{Op: OpCommand, Off: 1024, Len: 512, Cmd: dirty(nvme.IOVerify)}, at(1002, passthru{Opcode: 12, CDW12: rw})},
		"write uncorrectable": {&Request{Op: OpCommand, Off: 1999 * 512, Len: 512, Cmd: dirty(nvme.IOWriteUncorrectable)}, at(2999, passthru{Opcode: 4})},
		"dataset management":  {&Request{Op: OpCommand, Vec: list(ranges(nvme.DSMRange{SLBA: 3, Length: 4})), Cmd: &nvme.Command{Opcode: 9, CDW11: ^uint32(0)}}, at(0, passthru{Opcode: 9, CDW11: 7})},
		"copy":                {&Request{Op: OpCommand, FUA: true, Vec: list(sources(nvme.CopyRange{SLBA: 3, NLB: 4, EILBRT: 5})), Cmd: &nvme.Command{Opcode: 0x19, CDW10: 8, CDW12: 0x3c000000, CDW3: 1, CDW13: 1, CDW14: 1}}, at(1008, passthru{Opcode: 0x19, CDW12: 0x40000000})},
	} {
		d.seen = nil
		mustRun(t, q, x.r)
		if len(d.seen) != 1 {
			t.Fatalf("%s: %d commands", name, len(d.seen))
		}
		got := d.seen[0]
		if x.r.DW0 != uint32(got.Opcode)<<8 {
			t.Errorf("%s: DW0 %#x is not the device's", name, x.r.DW0)
		}
		got.Addr, got.DataLen = 0, 0
		if got != x.want {
			t.Errorf("%s:\n%+v, want\n%+v", name, got, x.want)
		}
	}
	before := bytes.Clone(pattern(d.data, 9))
	mustRun(t, q, &Request{Op: OpDiscard, Off: 1024, Len: 2048})
	clear(before[1002*512 : 1006*512])
	expect(t, d.data, before, "after a discard of four blocks")
}

// TestNVMeCharOutside asks for blocks outside the slice in every way there is: nothing of it reaches the device.
func TestNVMeCharOutside(t *testing.T) {
	d := newFakeChar()
	pattern(d.data, 4)
	before := bytes.Clone(d.data)
	q, _ := fakeCharQueue(t, openFake(t, d, sliceSpec()), d, 16)
	mem := guestMemory(t, 64<<10)
	command := func(op uint8, off, n uint64, data []byte, c nvme.Command) *Request {
		c.Opcode = op
		r := &Request{Op: OpCommand, Off: off, Len: n, Cmd: &c}
		if data != nil {
			r.Vec = []Seg{seg(data)}
		}
		return r
	}
	dsm := func(x nvme.DSMRange) *Request {
		return command(nvme.IODSM, 0, 0, append(make([]byte, nvme.DSMRangeSize), x.Bytes()[:]...), nvme.Command{CDW10: 1, CDW11: 4})
	}
	copied := func(to uint64, x nvme.CopyRange) *Request {
		return command(nvme.IOCopy, 0, 0, append(make([]byte, nvme.CopyRangeSize), x.Bytes()[:]...), nvme.Command{CDW10: uint32(to), CDW11: uint32(to >> 32), CDW12: 1})
	}
	const size, last = 2000 * 512, ^uint64(0)
	for name, r := range map[string]*Request{
		"read behind":          read(size, mem[:512]),
		"read across the end":  read(size-512, mem[:1024]),
		"write at the wrap":    write(last-511, mem[:512]),
		"write to block 0":     write(last-1000*512+1, mem[:512]),
		"zeroes":               {Op: OpWriteZeroes, Off: size, Len: 512},
		"zeroes, all":          {Op: OpWriteZeroes, Off: 512, Len: size},
		"discard":              {Op: OpDiscard, Off: size - 512, Len: 1024},
		"discard wraps":        {Op: OpDiscard, Off: 512, Len: last - 511},
		"compare":              command(nvme.IOCompare, size, 512, mem[:512], nvme.Command{}),
		"verify":               command(nvme.IOVerify, size-512, 1024, nil, nvme.Command{}),
		"uncorrectable":        command(nvme.IOWriteUncorrectable, last-511, 512, nil, nvme.Command{}),
		"dsm behind":           dsm(nvme.DSMRange{SLBA: 2000, Length: 1}),
		"dsm across":           dsm(nvme.DSMRange{SLBA: 1999, Length: 2}),
		"dsm wraps":            dsm(nvme.DSMRange{SLBA: last, Length: 2}),
		"dsm to block 0":       dsm(nvme.DSMRange{SLBA: last - 999, Length: 1}),
		"dsm, too long":        dsm(nvme.DSMRange{SLBA: 0, Length: 1<<32 - 1}),
		"copy from behind":     copied(0, nvme.CopyRange{SLBA: 2000}),
		"copy from across":     copied(0, nvme.CopyRange{SLBA: 1999, NLB: 1}),
		"copy from the wrap":   copied(0, nvme.CopyRange{SLBA: last - 999}),
		"copy to behind":       copied(1999, nvme.CopyRange{SLBA: 0}),
		"copy to the wrap":     copied(last-999, nvme.CopyRange{SLBA: 0}),
		"copy to, all of them": copied(1998, nvme.CopyRange{SLBA: 0, NLB: 1}),
	} {
		run(t, q, r)
		if r.Status.Code() != nvme.StatusLBAOutOfRange {
			t.Errorf("%s: %v", name, r.Status)
		}
	}
	for name, r := range map[string]*Request{
		"no command":                {Op: OpCommand},
		"not native":                command(0x80, 0, 0, nil, nvme.Command{}),
		"read as it is":             command(nvme.IORead, 0, 512, mem[:512], nvme.Command{}),
		"dsm, list too short":       command(nvme.IODSM, 0, 0, mem[:16], nvme.Command{CDW10: 1}),
		"dsm, no list":              command(nvme.IODSM, 0, 0, nil, nvme.Command{}),
		"copy, list too short":      command(nvme.IOCopy, 0, 0, mem[:63], nvme.Command{CDW12: 1}),
		"not of blocks":             command(nvme.IOVerify, 1, 512, nil, nvme.Command{}),
		"verify of nothing":         command(nvme.IOVerify, 0, 0, nil, nvme.Command{}),
		"read, not of blocks":       read(256, mem[:512]),
		"an operation there is not": {Op: 99},
	} {
		run(t, q, r)
		if c := r.Status.Code(); c != nvme.StatusInvalidField && c != nvme.StatusInvalidOpcode {
			t.Errorf("%s: %v", name, r.Status)
		}
	}
	if len(d.seen) > 0 {
		t.Errorf("the device has seen %+v", d.seen)
	}
	expect(t, d.data, before, "nothing was written")
}

// TestNVMeCharAnswers: what the device answers is the request's status; what the kernel answers is translated.
func TestNVMeCharAnswers(t *testing.T) {
	d := newFakeChar()
	q, _ := fakeCharQueue(t, openFake(t, d, sliceSpec()), d, 16)
	mem := guestMemory(t, 64<<10)
	tries := 0
	say := func(res int32) { d.refuse = func(*passthru, []Seg) (int32, bool) { tries++; return res, true } }
	for _, x := range []struct {
		res   int32
		want  nvme.Status
		tries int
	}{
		{0x4285, 0x4285, 1}, // DNR
		{0x7fff, 0x7fff, 1},
		{0x7800, nvme.StatusSuccess, 1}, // with bits that mean nothing of a success
		{0x02a1, 0x02a1, 1},
		{0x370, 0x370, resetTries + 1},
		{-int32(unix.EINTR), nvme.StatusInterrupted, resetTries + 1},
		{-int32(unix.EAGAIN), nvme.StatusInterrupted, charTries + 1},
		{-int32(unix.ENODEV), nvme.StatusNamespaceNotReady.WithDNR(), 1},
		{-int32(unix.EACCES), nvme.StatusAccessDenied.WithDNR(), 1},
		{-int32(unix.EFAULT), nvme.StatusDataTransferError, 1},
		{-int32(unix.EIO), nvme.StatusInternalError, 1},
		{-int32(unix.EINVAL), nvme.StatusInternalError.WithDNR(), 2}, // by a bounce buffer, too
		{-1 << 31, nvme.StatusWriteFault, 1},
	} {
		say(x.res)
		tries = 0
		r := write(0, mem[:512])
		run(t, q, r)
		if r.Status != x.want || tries != x.tries {
			t.Errorf("%d: %v after %d tries, want %v after %d", x.res, r.Status, tries, x.want, x.tries)
		}
	}
	// A reset ends a command, which is done all the same.
	n := 0
	d.refuse = func(*passthru, []Seg) (int32, bool) { n++; return -int32(unix.EINTR), n <= resetTries }
	mustRun(t, q, write(0, pattern(mem[:512], 5)))
	expect(t, d.data[1000*512:][:512], mem[:512], "after a reset")
	// So it is not for who does not wait for it any more.
	n = 0
	d.refuse = func(*passthru, []Seg) (int32, bool) { n++; return -int32(unix.EINTR), true }
	unwanted, done := write(0, mem[:512]), make([]*Request, 1)
	q.begin(unwanted)
	q.inflight++
	q.GiveUp(true, func(*Request) bool { return true })
	q.GiveUp(false, func(r *Request) bool { return r == unwanted })
	q.flush()
	if k := q.Reap(done); k != 1 || unwanted.Status != nvme.StatusInterrupted || n != 1 {
		t.Errorf("given up: %d done, %v after %d tries", k, unwanted.Status, n)
	}
	// One piece of many fails.
	d.refuse = func(c *passthru, _ []Seg) (int32, bool) { return int32(nvme.StatusWriteFault), c.CDW10 == 1000+128 }
	r := write(0, guestMemory(t, 64<<10)[:32<<10], guestMemory(t, 64<<10))
	run(t, q, r)
	if r.Status != nvme.StatusWriteFault {
		t.Errorf("one piece of many: %v", r.Status)
	}
	// Memory that the kernel refuses goes through a buffer.
	d.refuse = func(_ *passthru, vec []Seg) (int32, bool) { return -int32(unix.EREMOTEIO), len(vec) > 1 }
	pattern(mem, 6)
	mustRun(t, q, write(512, mem[:100], mem[4096:][:924]), write(512*1000, mem[:512], mem[4096:][:60<<10]))
	expect(t, d.data[1001*512:][:100], mem[:100], "through a buffer")
	got := guestMemory(t, 64<<10)
	mustRun(t, q, read(512, got[:100], got[1000:1924]))
	expect(t, got[1000:1924], mem[4096:][:924], "through a buffer")
	mustRun(t, q, read(512*1000, got[:512], got[1024:][:60<<10]))
	expect(t, got[1024:][:60<<10], mem[4096:][:60<<10], "through a buffer")
	gone := shrunkMemory(t, 1<<20)
	lost := write(0, gone[512<<10:][:256], gone[600<<10:][:256])
	run(t, q, lost)
	if lost.Status.Code() != nvme.StatusDataTransferError {
		t.Errorf("memory that is gone: %v", lost.Status)
	}
}

// TestNVMeCharManyRequests has more requests, and more pieces, than there are slots and entries, and a kernel that takes nothing for a while.
func TestNVMeCharManyRequests(t *testing.T) {
	d := newFakeChar()
	q, ring := fakeCharQueue(t, openFake(t, d, sliceSpec()), d, 8)
	mem := guestMemory(t, 1<<20)
	pattern(mem, 7)
	ring.full = true
	var reqs []*Request
	for i := range 3 * maxSlots {
		reqs = append(reqs, write(uint64(i%2000)*512, mem[i%2000*512:][:512]))
	}
	reqs = append(reqs, write(0, mem[:2000*512]))
	done := make([]*Request, len(reqs))
	n := q.Submit(reqs, done)
	ring.full = false
	for range 1000 {
		n += q.Reap(done[n:])
	}
	if n != len(reqs) || q.Inflight() != 0 {
		t.Fatalf("%d of %d are done, %d in flight", n, len(reqs), q.Inflight())
	}
	for _, r := range reqs {
		if !r.Status.OK() {
			t.Fatal(r.Status)
		}
	}
	expect(t, d.data[1000*512:][:2000*512], mem[:2000*512], "many writes")
	ring.instant = true
	batch := []*Request{read(0, mem[:4096]), write(0, mem[:512], mem[4096:4608])}
	if a := testing.AllocsPerRun(100, func() {
		for k := q.Submit(batch, done); k < 2; {
			k += q.Reap(done[k:])
		}
	}); a != 0 {
		t.Errorf("%v allocations for two commands", a)
	}
}

func TestNVMeCharReadOnly(t *testing.T) {
	d := newFakeChar()
	s := sliceSpec()
	s.ReadOnly = true
	b := openFake(t, d, s)
	q, _ := fakeCharQueue(t, b, d, 16)
	mem := guestMemory(t, 4096)
	i := b.Info()
	if !i.ReadOnly || i.Discard || i.VolatileCache || i.Native.Has(nvme.IODSM) || i.Native.Has(nvme.IOCopy) || !i.Native.Has(nvme.IOCompare) {
		t.Errorf("%+v", i)
	}
	for _, r := range []*Request{write(0, mem[:512]), {Op: OpWriteZeroes, Len: 512}, {Op: OpDiscard, Len: 512}} {
		run(t, q, r)
		if r.Status != nvme.StatusReadOnly.WithDNR() {
			t.Errorf("%v: %v", r.Op, r.Status)
		}
	}
	mustRun(t, q, &Request{Op: OpFlush}, read(0, mem))
	if len(d.seen) != 1 {
		t.Errorf("%d commands for one read", len(d.seen))
	}
}

// TestNVMeCharUnprivileged: without CAP_SYS_ADMIN nothing is offered that the kernel might refuse.
func TestNVMeCharUnprivileged(t *testing.T) {
	d := newFakeChar()
	d.unprivileged = true
	b := openFake(t, d, sliceSpec())
	b.claim = new(claim)
	if i := b.Info(); i.Native != (Opcodes{}) || i.Discard || i.WriteZeroes || !i.VolatileCache || len(b.Warnings()) != 1 {
		t.Errorf("%+v, %q", i, b.Warnings())
	}
	d.ns.NSFEAT, d.ns.NPWG = nvme.NSFEATOptPerf, 15
	other := openFake(t, d, sliceSpec())
	if other.claim = new(claim); len(other.Warnings()) != 2 || !strings.Contains(other.Warnings()[0], "8192 bytes") {
		t.Errorf("a slice not of the device's units: %q", other.Warnings())
	}
	q, _ := fakeCharQueue(t, b, d, 16)
	mustRun(t, q, &Request{Op: OpWriteZeroes, Len: 64 << 10}, &Request{Op: OpDiscard, Len: 512}, &Request{Op: OpFlush})
	for _, c := range d.seen {
		if c.Opcode != nvme.IOWrite && c.Opcode != nvme.IOFlush {
			t.Errorf("opcode %#x", c.Opcode)
		}
	}
}

// TestNVMeCharWithoutZeroes has a device that knows nothing but reading and writing.
func TestNVMeCharWithoutZeroes(t *testing.T) {
	d := newFakeChar()
	d.ctrl.ONCS, d.ctrl.VWC = 0, 0
	pattern(d.data, 8)
	before := bytes.Clone(d.data)
	b := openFake(t, d, sliceSpec())
	if i := b.Info(); i.Native != (Opcodes{}) || i.WriteZeroes || i.Discard || i.VolatileCache {
		t.Errorf("%+v", i)
	}
	q, _ := fakeCharQueue(t, b, d, 16)
	mustRun(t, q, &Request{Op: OpWriteZeroes, Off: 512, Len: 300 << 10}, &Request{Op: OpFlush}, &Request{Op: OpDiscard, Len: 512})
	expect(t, d.data[1001*512:][:300<<10], make([]byte, 300<<10), "zeroes")
	expect(t, d.data[:1001*512], before[:1001*512], "before")
	expect(t, d.data[1001*512+300<<10:], before[1001*512+300<<10:], "behind")
	if err := b.Format(512); err != nil {
		t.Fatal(err)
	}
	expect(t, d.data[1000*512:3000*512], make([]byte, 2000*512), "formatted")
	expect(t, d.data[:1000*512], before[:1000*512], "before what was formatted")
	expect(t, d.data[3000*512:], before[3000*512:], "behind what was formatted")
	if err := b.Format(4096); err == nil || !strings.Contains(err.Error(), "nvme format") {
		t.Errorf("another block size: %v", err)
	}
}

// TestNVMeCharRefusesDevices opens what cannot be served: devices that lie, formats that guests are not given, slices that are not there.
func TestNVMeCharRefusesDevices(t *testing.T) {
	for name, x := range map[string]struct {
		lie  func(*fakeChar, *Spec)
		says string
	}{
		"no blocks":         {func(d *fakeChar, _ *Spec) { d.ns.NSZE = 0 }, "no blocks"},
		"blocks of a byte":  {func(d *fakeChar, _ *Spec) { d.ns.LBAF[0].LBADS = 0 }, "2^0 bytes"},
		"blocks of 2^63":    {func(d *fakeChar, _ *Spec) { d.ns.LBAF[0].LBADS = 63 }, "2^63 bytes"},
		"blocks of 2^255":   {func(d *fakeChar, _ *Spec) { d.ns.LBAF[0].LBADS = 255 }, "nvme format"},
		"another format":    {func(d *fakeChar, _ *Spec) { d.ns.FLBAS = 15 }, "2^0 bytes"},
		"too many blocks":   {func(d *fakeChar, _ *Spec) { d.ns.NSZE = 1 << 60 }, "no device has"},
		"all ones":          {func(d *fakeChar, _ *Spec) { d.ns.NSZE = ^uint64(0) }, "no device has"},
		"metadata":          {func(d *fakeChar, _ *Spec) { d.ns.LBAF[0].MS = 8 }, "8 bytes of metadata"},
		"protection":        {func(d *fakeChar, _ *Spec) { d.ns.DPS = 1 }, "type 1"},
		"zoned":             {func(d *fakeChar, _ *Spec) { d.ids.HasCSI, d.ids.CSI = true, nvme.CSIZoned }, "Zoned"},
		"no namespace":      {func(d *fakeChar, _ *Spec) { d.idErr = unix.ENOTTY }, "ng0n1"},
		"not permitted":     {func(d *fakeChar, _ *Spec) { d.adminErr = unix.EACCES }, "CAP_SYS_ADMIN"},
		"no NVMe":           {func(d *fakeChar, _ *Spec) { d.adminErr = unix.ENOTTY }, "ng0n1"},
		"dead":              {func(d *fakeChar, _ *Spec) { d.adminErr = unix.ENODEV }, "dmesg"},
		"reads not allowed": {func(d *fakeChar, _ *Spec) { d.ioErr = unix.EACCES }, "Read: permission denied: run hostmed as root"},
		"no poll queues":    {func(_ *fakeChar, s *Spec) { s.Poll = true }, "nvme.poll_queues=2"},
		"offset, no block":  {func(_ *fakeChar, s *Spec) { s.Offset = 513 }, "the next one is 1024"},
		"size, no block":    {func(d *fakeChar, s *Spec) { d.ns.LBAF[0].LBADS = 12; s.Offset = 0; s.Size = 512 }, "the next one is 4096"},
		"offset behind":     {func(_ *fakeChar, s *Spec) { s.Offset = fakeBlocks * 512 }, "is behind its end"},
		"too large":         {func(_ *fakeChar, s *Spec) { s.Size = fakeBlocks * 512 }, "at the most size=1548KiB"},
		"too large by wrap": {func(_ *fakeChar, s *Spec) { s.Size = 1<<63 - 512 }, "at the most"},
	} {
		d, s := newFakeChar(), sliceSpec()
		x.lie(d, &s)
		b, err := tryFake(d, s)
		if err == nil {
			b.id.release()
			t.Errorf("%s: it was opened: %+v", name, b.info)
		} else if !strings.Contains(err.Error(), x.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; want %q", name, err, x.says)
		}
	}
}

// TestNVMeCharBelievesNoLimit has devices whose limits cannot be: commands stay within what the kernel takes, and are never of no blocks.
func TestNVMeCharBelievesNoLimit(t *testing.T) {
	for name, lie := range map[string]func(*fakeChar){
		"small MDTS of large blocks": func(d *fakeChar) { d.ctrl.MDTS = 1; d.ns.LBAF[0].LBADS = 16; d.ns.NSZE = 32 },
		"large MDTS":                 func(d *fakeChar) { d.ctrl.MDTS = 255 },
		"large limits":               func(d *fakeChar) { d.nvm.WZSL, d.nvm.VSL, d.nvm.WUSL, d.nvm.DMRSL = 255, 255, 255, ^uint32(0) },
		"small limits":               func(d *fakeChar) { d.nvm.WZSL, d.nvm.VSL, d.nvm.WUSL, d.nvm.DMRSL, d.nvm.DMSL = 1, 1, 1, 1, 1 },
		"kernel without":             func(d *fakeChar) { d.k = blockLimits{} },
	} {
		d := newFakeChar()
		lie(d)
		b := openFake(t, d, Spec{Kind: KindNVMe, Path: "/dev/ng0n1", LBA: 512})
		size := b.info.LBASize()
		l := b.dev
		for what, n := range map[string]uint64{"data": l.maxData, "zeroes": l.maxZeroes, "discard": l.maxDiscard, "verify": b.info.NativeMax.Verify} {
			if n < size || n%size != 0 || what != "discard" && n > maxNLB<<b.info.LBAShift {
				t.Errorf("%s: %s %d in blocks of %d", name, what, n, size)
			}
		}
		if l.maxData > max(d.k.maxBytes, defaultCharData) || l.maxPages == 0 {
			t.Errorf("%s: %+v", name, l)
		}
	}
}

func TestNVMeCharResized(t *testing.T) {
	d := newFakeChar()
	b := openFake(t, d, Spec{Kind: KindNVMe, Path: "/dev/ng0n1", LBA: 512, Offset: 1000 * 512})
	if b.Resized() || b.Info().Blocks != fakeBlocks-1000 {
		t.Errorf("resized without a change, or %d blocks", b.Info().Blocks)
	}
	d.ns.NSZE = fakeBlocks + 500
	if !b.Resized() {
		t.Error("a growth was not seen")
	}
	if err := b.Resize(); err != nil || b.Info().Blocks != fakeBlocks-500 || b.Resized() {
		t.Errorf("%v, %d blocks", err, b.Info().Blocks)
	}
	d.ns.NSZE = 900
	if err := b.Resize(); err == nil || b.Info().Blocks != fakeBlocks-500 {
		t.Errorf("shrunk to less than where it begins: %v, %d blocks", err, b.Info().Blocks)
	}
	d.ns.NSZE, d.ns.LBAF[0].LBADS = fakeBlocks, 12
	if err := b.Resize(); err == nil {
		t.Error("another block size was taken")
	}
	if fixed := openFake(t, d, Spec{Kind: KindNVMe, Path: "/dev/ng0n1", LBA: 512, Size: 8192}); fixed.Resized() {
		t.Error("a slice of a fixed size was resized")
	}
}

// TestNVMeCharOpens refuses what is no NVMe namespace's character device.
func TestNVMeCharOpens(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for spec, says := range map[string]string{
		"nvme:/dev/ng77n1":              "ls /dev/ng*",
		"nvme:" + file:                  "no character device",
		"nvme:/dev/null":                "no character device of an NVMe namespace",
		"nvme:/dev/ng0n1,lba=4096":      "offset=, size=, poll, nopin, vendor, readonly",
		"nvme:/dev/ng0n1,offset=nought": "not a size",
	} {
		b, err := Open(spec)
		if err == nil {
			b.Close()
			t.Errorf("%s was opened", spec)
		} else if !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v; want %q", spec, err, says)
		}
	}
}

// TestNVMeCharRandomDevices has devices that say anything: each is refused, or is served within what is sane.
func TestNVMeCharRandomDevices(t *testing.T) {
	src := rand.New(rand.NewPCG(1, 2))
	served, data := 0, make([]byte, fakeBlocks*512) // which nobody gets to: one is enough
	for range 5000 {
		d := fakeCharOver(data)
		for _, b := range [][]byte{d.ctrl.Bytes()[:], d.nvm.Bytes()[:], d.ns.Bytes()[:192]} {
			for range src.IntN(40) {
				b[src.IntN(len(b))] = byte(src.Uint32() >> src.IntN(8))
			}
		}
		d.ioErr = unix.EIO // it has not so much memory as it says
		d.k = blockLimits{maxBytes: src.Uint64() >> src.IntN(64), maxPages: src.Uint64() >> src.IntN(64)}
		s := Spec{Kind: KindNVMe, Path: "/dev/ng0n1", LBA: 512}
		if src.IntN(2) == 0 {
			s.Offset, s.Size = src.Uint64()>>src.IntN(64)&^511, src.Uint64()>>src.IntN(64)&^511
		}
		b, err := tryFake(d, s)
		if err != nil {
			continue
		}
		served++
		i, size := b.Info(), b.Info().LBASize()
		if end := b.first + i.Blocks; i.Blocks == 0 || end < b.first || end > d.ns.NSZE || i.LBAShift < 9 || i.LBAShift > MaxLBAShift || i.Size()>>i.LBAShift != i.Blocks {
			t.Fatalf("blocks %d to %d of %d, of 2^%d bytes", b.first, end, d.ns.NSZE, i.LBAShift)
		}
		l := b.dev
		for what, n := range map[string]uint64{"data": l.maxData, "zeroes": l.maxZeroes, "discard": l.maxDiscard, "verify": i.NativeMax.Verify, "uncorrectable": i.NativeMax.WriteUncorrectable} {
			if n < size || n%size != 0 || what != "discard" && n > maxNLB*size || what == "discard" && n>>i.LBAShift > maxCharDiscard {
				t.Fatalf("%s: %d bytes in blocks of %d", what, n, size)
			}
		}
		if l.maxPages == 0 || l.maxPages > maxVec {
			t.Fatalf("%d pages", l.maxPages)
		}
		b.id.release()
	}
	if served < 300 {
		t.Errorf("only %d of 5000 were served", served)
	}
}
