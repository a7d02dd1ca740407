package tally

import (
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestKinds(t *testing.T) {
	io, admin := New(false), New(true)
	for _, opcode := range []uint8{
		nvme.IORead, nvme.IOWrite, nvme.IOFlush, nvme.IODSM, nvme.IOWriteZeroes, nvme.IOCompare, nvme.IOVerify, nvme.IOCopy, 0xFF,
	} {
		io.Ended(opcode, 1000, 2)
		io.Failed(opcode)
		admin.Ended(opcode, 2000, 1)
	}
	var c Counts
	io.AddTo(&c)
	for k := range c {
		n := uint64(1)
		switch Kind(k) {
		case Other:
			n = 3
		case Admin:
			n = 0
		}
		if c[k].Errors != n || c[k].Times.Count() != 2*n {
			t.Errorf("kind %d: %d commands, %d errors", k, c[k].Times.Count(), c[k].Errors)
		}
	}
	var a Counts
	admin.AddTo(&a)
	if a[Admin].Times.Count() != 9 || a[Admin].Times.Mean() != 2*time.Microsecond || a[Read].Times.Count() != 0 {
		t.Errorf("admin: %d", a[Admin].Times.Count())
	}
	c.Merge(&a)
	if c[Admin].Times.Count() != 9 || c[Other].Errors != 3 {
		t.Errorf("merged: %d, %d", c[Admin].Times.Count(), c[Other].Errors)
	}
}
