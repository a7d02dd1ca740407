package ioq

import (
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// FuzzCommand runs arbitrary SQEs. Each must complete with some status, and touch nothing but the guest's memory.
func FuzzCommand(f *testing.F) {
	seed := func(c nvme.Command) { f.Add(append([]byte(nil), c.Bytes()[:]...)) }
	seed(rw(nvme.IORead, 0, 8, base+dataOff))
	seed(rw(nvme.IOWrite, 0, 2048, base+dataOff))
	seed(rw(nvme.IOCompare, 8, 16, base+dataOff))
	seed(nvme.Command{Opcode: nvme.IODSM, NSID: 1, PRP1: base + dataOff, CDW10: 255, CDW11: nvme.DSMDeallocate})
	seed(nvme.Command{Opcode: nvme.IOWriteZeroes, NSID: 1, CDW12: 0xffff | 1<<25})
	seed(nvme.Command{Opcode: nvme.IOFlush, NSID: nvme.NSIDAll})
	seed(nvme.Command{Opcode: nvme.IOVerify, NSID: 1, CDW12: 0xffff})
	seed(nvme.Command{Opcode: nvme.IOWriteUncorrectable, NSID: 1, CDW12: 3})
	seed(nvme.Command{Opcode: nvme.IOCopy, NSID: 1, PRP1: base + dataOff, CDW10: 100, CDW12: 7})
	fusedFirst, fusedSecond := fused(0, 8, dataOff, other)
	seed(fusedFirst)
	seed(fusedSecond)
	sgl := rw(nvme.IORead, 0, 8, 0)
	sgl.SetSGL(nvme.MakeSGL(nvme.SGLSegment, base+dataOff, 32))
	seed(sgl)
	r := newRig(f, rigConfig{shadow: true})
	p := r.pair(1, 16, false)
	f.Fuzz(func(t *testing.T, raw []byte) {
		p.r.t = t
		var c nvme.Command
		copy(c.Bytes()[:], raw)
		// Addresses that are worth trying: in memory, at its end, outside.
		if len(raw) > 64 {
			c.PRP1 = base + uint64(raw[64])<<16 | c.PRP1&0xfff
			c.PRP2 = base + uint64(raw[len(raw)-1])<<16 | c.PRP2&0xfff
		}
		// The rings lie in the same memory; a command that overwrites them is the guest's own affair, and not this test's.
		if lo := c.PRP1 - base; lo < dataOff {
			c.PRP1 += dataOff
		}
		if lo := c.PRP2 - base; lo < dataOff {
			c.PRP2 += dataOff
		}
		p.push(c)
		n := 1
		if c.FUSE() == nvme.FuseFirst { // it may wait for what comes next
			p.push(nvme.Command{Opcode: nvme.IOFlush, NSID: 1})
			n = 2
		}
		p.publish()
		for _, e := range p.reap(n) {
			if e.SQID() != 1 {
				t.Fatalf("completion names SQ %d", e.SQID())
			}
		}
		r.noError()
	})
}
