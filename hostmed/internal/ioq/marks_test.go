package ioq

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
)

func (r *rig) dsm(ranges ...nvme.DSMRange) nvme.Command {
	for i := range ranges {
		r.put(sglOff+0x10000+uint64(i)*16, ranges[i].Bytes()[:])
	}
	return nvme.Command{Opcode: nvme.IODSM, NSID: 1, PRP1: base + sglOff + 0x10000, CDW10: uint32(len(ranges) - 1), CDW11: nvme.DSMDeallocate}
}

func TestWriteUncorrectable(t *testing.T) {
	eachMode(t, func(t *testing.T, c rigConfig) {
		r := newRig(t, c)
		p, q := r.pair(1, 16, false), r.pair(2, 16, false) // on another worker, if there are two
		blocks := r.ctl.namespace(1).info.Blocks
		reads := func(want nvme.Status, lba uint64, n uint32) {
			t.Helper()
			for _, op := range []uint8{nvme.IORead, nvme.IOCompare, nvme.IOVerify} {
				for _, p := range []*pair{p, q} {
					if st := p.do(r.sgl(rw(op, lba, n, 0), prp.Extent{IOVA: base + dataOff, Len: n * 512})); st.Code() != want || st.DNR() {
						t.Errorf("opcode %#x of %d blocks from %d: %v, want %v", op, n, lba, st, want)
					}
				}
			}
			cp := q.run(r.copyCmd(5000, source(lba, n)))
			if cp.Status().Code() != want {
				t.Errorf("copy of %d blocks from %d: %v, want %v", n, lba, cp.Status(), want)
			}
		}
		mark := func() {
			t.Helper()
			if st := p.do(rw(nvme.IOWriteUncorrectable, 10, 10, 0)); st != nvme.StatusSuccess {
				t.Fatal(st)
			}
			reads(nvme.StatusUnrecoveredRead, 10, 1)
			reads(nvme.StatusUnrecoveredRead, 19, 1)
			reads(nvme.StatusUnrecoveredRead, 0, 64)
			reads(nvme.StatusSuccess, 0, 10)
			reads(nvme.StatusSuccess, 20, 10)
		}
		mark()
		// Each way to write makes good what it writes, and no more.
		for name, cmd := range map[string]nvme.Command{
			"write":      rw(nvme.IOWrite, 12, 2, base+dataOff),
			"zeroes":     rw(nvme.IOWriteZeroes, 12, 2, 0),
			"deallocate": {}, // made when its turn comes: its ranges are in memory
			"copy":       {},
			"fua":        func() nvme.Command { c := rw(nvme.IOWrite, 12, 2, base+dataOff); c.CDW12 |= nvme.RWForceUnit; return c }(),
		} {
			if name == "copy" {
				cmd = r.copyCmd(12, source(100, 1), source(200, 1))
			} else if name == "deallocate" {
				cmd = r.dsm(nvme.DSMRange{}, nvme.DSMRange{SLBA: 13, Length: 1}, nvme.DSMRange{SLBA: 12, Length: 1})
			}
			if st := q.do(cmd); st != nvme.StatusSuccess {
				t.Fatalf("%s: %v", name, st)
			}
			if st := p.do(rw(nvme.IORead, 12, 2, base+dataOff+0x10000)); st != nvme.StatusSuccess {
				t.Errorf("read after %s: %v", name, st)
			}
			for _, lba := range []uint64{11, 14} {
				if st := p.do(rw(nvme.IORead, lba, 1, base+dataOff+0x10000)); st.Code() != nvme.StatusUnrecoveredRead {
					t.Errorf("the neighbour %d after %s: %v", lba, name, st)
				}
			}
			mark()
		}
		// A write that fails makes nothing good.
		if st := p.do(rw(nvme.IOWrite, 12, 2, 0x1000)); st.OK() {
			t.Error("a write from nowhere succeeded")
		}
		reads(nvme.StatusUnrecoveredRead, 12, 2)
		p.do(rw(nvme.IOWriteZeroes, 0, 64, 0))
		if gate := r.ctl.namespace(1).of.Gate(); gate != nil {
			t.Errorf("gate %+v with nothing marked", gate)
		}
		for lba, n := range map[uint64]uint32{blocks: 1, blocks - 1: 2} {
			if st := p.do(rw(nvme.IOWriteUncorrectable, lba, n, 0)); st.Code() != nvme.StatusLBAOutOfRange {
				t.Errorf("%d blocks from %d: %v", n, lba, st)
			}
		}
		r.noError()
	})
}

func TestTooManyMarks(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	for i := uint64(0); i < subsys.MaxBad; {
		n := 0
		for ; n < 15 && i < subsys.MaxBad; n++ {
			p.push(rw(nvme.IOWriteUncorrectable, 2*i, 1, 0))
			i++
		}
		p.publish()
		for _, e := range p.reap(n) {
			if !e.Status().OK() {
				t.Fatal(e.Status())
			}
		}
	}
	if st := p.do(rw(nvme.IOWriteUncorrectable, 3*subsys.MaxBad, 1, 0)); st.Code() != nvme.StatusInternalError {
		t.Errorf("one too many: %v", st)
	}
}

// TestMarksModel mixes marks and writes from two queues, and asks each block.
func TestMarksModel(t *testing.T) {
	r := newRig(t, rigConfig{shadow: true, workers: 2, backend: openBackend(t, "mem:size=64KiB")})
	pairs := []*pair{r.pair(1, 16, false), r.pair(2, 16, false)}
	var model [128]bool
	rapid.Check(t, func(t *rapid.T) {
		for range 8 {
			n := rapid.Uint64Range(1, 20).Draw(t, "blocks")
			lba := rapid.Uint64Range(0, 128-n).Draw(t, "lba")
			p := pairs[rapid.IntRange(0, 1).Draw(t, "queue")]
			op := rapid.SampledFrom([]uint8{nvme.IOWriteUncorrectable, nvme.IOWrite, nvme.IOWriteZeroes, nvme.IODSM}).Draw(t, "op")
			cmd := r.sgl(rw(op, lba, uint32(n), 0), prp.Extent{IOVA: base + dataOff, Len: uint32(n) * 512})
			if op == nvme.IODSM {
				cmd = r.dsm(nvme.DSMRange{SLBA: lba, Length: uint32(n)})
			}
			if st := p.do(cmd); st != nvme.StatusSuccess {
				t.Fatal(st)
			}
			for i := lba; i < lba+n; i++ {
				model[i] = op == nvme.IOWriteUncorrectable
			}
		}
		for lba, bad := range model {
			if st := pairs[lba%2].do(rw(nvme.IORead, uint64(lba), 1, base+dataOff)); st.OK() == bad {
				t.Fatalf("block %d: %v, marked %v", lba, st, bad)
			}
		}
	})
}

// TestDULBE has reads of what is not allocated fail where the host asks for it, and for as long.
func TestDULBE(t *testing.T) {
	for name, spec := range map[string]string{"mem": "mem:size=16MiB", "file": "file:" + t.TempDir() + "/disk.img,size=16MiB"} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{shadow: true, backend: openBackend(t, spec)})
			if !r.ctl.namespace(1).info.Maps {
				t.Fatal("the medium does not tell what is allocated: run the tests on ext4, xfs, btrfs or overlayfs")
			}
			p := r.pair(1, 16, false)
			page := func(op uint8, n uint64) nvme.Command { // of 4 KiB
				return r.sgl(rw(op, n*8, 8, 0), prp.Extent{IOVA: base + dataOff, Len: 4096})
			}
			reads := func(n uint64, want nvme.Status) {
				t.Helper()
				for _, op := range []uint8{nvme.IORead, nvme.IOVerify, nvme.IOCompare} {
					r.put(dataOff, make([]byte, 4096))
					if st := p.do(page(op, n)); st.Code() != want {
						t.Errorf("opcode %#x of page %d: %v, want %v", op, n, st, want)
					}
				}
				if st := p.do(r.copyCmd(100*8, source(n*8, 8))); st.Code() != want {
					t.Errorf("copy of page %d: %v, want %v", n, st, want)
				}
			}
			reads(3, nvme.StatusSuccess)
			r.ctl.SetDULBE(1, true)
			reads(3, nvme.StatusDeallocated)
			r.put(dataOff, make([]byte, 4096))
			p.do(page(nvme.IOWrite, 3))
			reads(3, nvme.StatusSuccess)
			// One page of two.
			if st := p.do(r.sgl(rw(nvme.IORead, 3*8, 16, 0), prp.Extent{IOVA: base + dataOff, Len: 8192})); st.Code() != nvme.StatusDeallocated {
				t.Errorf("a read of which a half is not allocated: %v", st)
			}
			p.do(r.dsm(nvme.DSMRange{SLBA: 3 * 8, Length: 8}))
			reads(3, nvme.StatusDeallocated)
			p.do(page(nvme.IOWriteZeroes, 3))
			reads(3, nvme.StatusSuccess)
			z := page(nvme.IOWriteZeroes, 3)
			z.CDW12 |= nvme.RWDeallocate
			p.do(z)
			reads(3, nvme.StatusDeallocated)
			a, b := fused(3*8, 8, dataOff, dataOff)
			if x, y := p.both(a, b); x.Code() != nvme.StatusDeallocated || y.Code() != nvme.StatusAbortFailedFused {
				t.Errorf("a fused pair: %v, %v", x, y)
			}
			r.ctl.SetDULBE(1, false)
			reads(3, nvme.StatusSuccess)
			r.noError()
		})
	}
}
