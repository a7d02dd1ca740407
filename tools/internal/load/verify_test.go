package load

import (
	"context"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/internal/size"
)

func TestPatternIsAccepted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		block := make([]byte, rapid.SampledFrom([]int{512, 520, 4096}).Draw(t, "block"))
		lba, gen, run := rapid.Uint64().Draw(t, "lba"), rapid.Uint64().Draw(t, "gen"), rapid.Uint64().Draw(t, "run")
		fillBlock(block, lba, gen, run)
		if m := checkBlock(block, lba, gen, run); m != nil {
			t.Fatal(m)
		}
	})
}

func TestPatternCatchesEveryFlippedBit(t *testing.T) {
	block := make([]byte, 512)
	fillBlock(block, 7, 3, 99)
	for bit := range len(block) * 8 {
		block[bit/8] ^= 1 << (bit % 8)
		if checkBlock(block, 7, 3, 99) == nil {
			t.Fatalf("bit %d flipped and not seen", bit)
		}
		block[bit/8] ^= 1 << (bit % 8)
	}
}

func TestPatternNamesTheFault(t *testing.T) {
	write := func(lba, gen, run uint64) []byte {
		b := make([]byte, 4096)
		fillBlock(b, lba, gen, run)
		return b
	}
	poisoned := write(7, 3, 99)
	poisonBlock(poisoned)
	lostHeader := write(7, 3, 99)
	clear(lostHeader[:8])
	torn := func(cut int) []byte { return append(write(7, 3, 99)[:cut], write(7, 2, 99)[cut:]...) }
	for _, c := range []struct {
		name  string
		block []byte
		fault Fault
		says  string
	}{
		{"nothing came", poisoned, FaultNothing, "brought nothing"},
		{"zeroes", make([]byte, 4096), FaultForeign, "not written in this run"},
		{"an earlier run", write(7, 3, 98), FaultForeign, "not written in this run"},
		{"another address", write(8, 3, 99), FaultMisplaced, "it is lba 0x8 generation 3"},
		{"an earlier write", write(7, 2, 99), FaultStale, "it is generation 2"},
		{"a later write", write(7, 4, 99), FaultFuture, "it is generation 4"},
		{"header lost", lostHeader, FaultTorn, "torn from byte 0"},
		{"half old", torn(2048), FaultTorn, "torn from byte 2048"},
		{"all but the last word", torn(4088), FaultTorn, "torn from byte 4088"},
		{"only the header is new", torn(32), FaultTorn, "torn from byte 32"},
		{"old generation number only", torn(16), FaultStale, "generation 2"},
	} {
		m := checkBlock(c.block, 7, 3, 99)
		if m == nil || m.Fault != c.fault || !strings.Contains(m.Error(), c.says) {
			t.Errorf("%s: %v; want %v and %q", c.name, m, c.fault, c.says)
		}
	}
}

func TestLedgerClaims(t *testing.T) {
	l := newLedger(100, 50, testBlock, 1)
	if !l.claim(false, 100, 8) || !l.claim(false, 104, 8) {
		t.Fatal("reads must be able to overlap")
	}
	if l.claim(true, 111, 2) || l.claim(true, 99+1, 1) {
		t.Fatal("a write of blocks that are being read was let through")
	}
	l.release(false, 104, 8)
	if !l.claim(true, 108, 8) {
		t.Fatal("a write of free blocks was refused")
	}
	if l.claim(false, 107, 2) || l.claim(true, 115, 4) {
		t.Fatal("blocks that are being written were let through")
	}
	l.release(true, 108, 8)
	l.release(false, 100, 8)
	if !l.claim(true, 100, 50) {
		t.Fatal("not everything was given back")
	}
}

func TestLedgerForgetsAfterFailedWrite(t *testing.T) {
	l := newLedger(0, 4, testBlock, 1)
	mem, old := make([]byte, testBlock), make([]byte, testBlock)
	count := 0
	bad := func(*Mismatch) { count++ }
	l.prepareWrite(old, 0, 1) // generation 1
	l.prepareWrite(mem, 0, 1) // generation 2 fails: either may be there
	l.failedWrite(0, 1)
	l.check(old, 0, 1, bad)
	l.check(mem, 0, 1, bad)
	if count != 0 {
		t.Fatal("a block whose write failed was checked")
	}
	failed := append([]byte(nil), mem...)
	l.prepareWrite(mem, 0, 1)
	l.check(mem, 0, 1, bad)
	if count != 0 {
		t.Fatal("the write after the failed one is not accepted")
	}
	if l.check(failed, 0, 1, bad); count != 1 {
		t.Fatal("what the failed write left passes for the next one's")
	}
}

// verifying runs a verifying load of at least 1000 I/Os, which on a busy machine takes more than its usual 50 ms, and returns its result.
// The disk is a new one for each attempt.
func verifying(t *testing.T, kind Kind, disk func() *disk) *Result {
	t.Helper()
	for runtime := 50 * time.Millisecond; ; runtime *= 4 {
		l := newTestLoad(t, Config{Kind: kind, Sizes: size.List{512, 4096, 3072}, Depth: 16, Jobs: 2, Runtime: runtime, Verify: true}, disk())
		r, err := l.Run(context.Background(), Observer{})
		if err != nil {
			t.Fatal(err)
		}
		if r.IOs >= 1000 {
			return r
		}
		if runtime > 20*time.Second {
			t.Fatalf("%d I/Os in %v", r.IOs, runtime)
		}
	}
}

func TestVerifyPassesOnAGoodDisk(t *testing.T) {
	for _, kind := range Kinds() {
		r := verifying(t, kind, func() *disk { return newDisk(100_000 / testBlock * testBlock) })
		if r.VerifyErrors != 0 || r.Errors != 0 {
			t.Errorf("%s: %d verify errors, %d errors, %d I/Os: %v", kind, r.VerifyErrors, r.Errors, r.IOs, r.Problems)
		}
	}
}

// TestVerifyCatches spoils one in so many I/Os in one way each. Every run must see it; what is wrong with a block depends on which of those that
// were touched is read first, and only the first few are described, so that can take another run.
func TestVerifyCatches(t *testing.T) {
	every := func(n int, op uint8, f func(d *disk, io *guestdrv.IO, mem []byte)) func(*disk) {
		return func(d *disk) {
			k := 0
			d.spoil = func(io *guestdrv.IO, mem []byte) (bool, nvme.Status) {
				if io.Op == op {
					if k++; k%n == 0 {
						f(d, io, mem)
						return true, nvme.StatusSuccess
					}
				}
				return false, 0
			}
		}
	}
	last := func(d *disk, io *guestdrv.IO) uint64 { return uint64(len(d.data))/testBlock - uint64(io.Blocks) }
	for name, c := range map[string]struct {
		spoil func(*disk)
		says  string
	}{
		"a write that is lost":       {every(50, nvme.IOWrite, func(*disk, *guestdrv.IO, []byte) {}), "stale"},
		"a read that brings nothing": {every(50, nvme.IORead, func(*disk, *guestdrv.IO, []byte) {}), "brought nothing"},
		"a write to the wrong place": {every(50, nvme.IOWrite, func(d *disk, io *guestdrv.IO, mem []byte) {
			d.move(io.Op, (io.LBA+7)%last(d, io), mem)
		}), "misplaced"},
		"a read from the other job's region": {every(50, nvme.IORead, func(d *disk, io *guestdrv.IO, mem []byte) {
			d.move(io.Op, (io.LBA+uint64(len(d.data))/testBlock/2)%last(d, io), mem)
		}), "misplaced"},
		"half a write": {every(50, nvme.IOWrite, func(d *disk, io *guestdrv.IO, mem []byte) {
			d.move(io.Op, io.LBA, mem[:len(mem)/2-100])
		}), "torn"},
		"one flipped bit": {every(50, nvme.IOWrite, func(d *disk, io *guestdrv.IO, mem []byte) {
			d.move(io.Op, io.LBA, mem)
			d.data[io.LBA*testBlock+300] ^= 4
		}), "torn from byte 296"},
	} {
		said := false
		for run := 0; run < 20 && !said; run++ {
			r := verifying(t, RandRW, func() *disk {
				d := newDisk(128 << 10)
				c.spoil(d)
				return d
			})
			said = strings.Contains(strings.Join(r.Problems, "\n"), c.says)
			if r.VerifyErrors == 0 || !said && run == 19 {
				t.Errorf("%s: %d verify errors in %d I/Os; want one that says %q: %v", name, r.VerifyErrors, r.IOs, c.says, r.Problems)
			}
		}
	}
}

// TestVerifyReadsBackWhatWasOnlyWritten: a load without reads is checked at its end.
func TestVerifyReadsBackWhatWasOnlyWritten(t *testing.T) {
	spoilt := func() *disk {
		d := newDisk(128 << 10)
		k := 0
		d.spoil = func(io *guestdrv.IO, _ []byte) (bool, nvme.Status) {
			k++
			return io.Op == nvme.IOWrite && k > 200 && k%10 == 0, nvme.StatusSuccess
		}
		return d
	}
	if r := verifying(t, RandWrite, spoilt); r.VerifyErrors == 0 {
		t.Fatal("lost writes were not seen")
	}
}
