package backend

import (
	"bytes"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestNVMeCharFormatOfAnother: a device that the host has formatted with other blocks is not erased: those that the slice had are others'.
func TestNVMeCharFormatOfAnother(t *testing.T) {
	d := newFakeChar()
	b := openFake(t, d, sliceSpec())
	pattern(d.data, 3)
	before := bytes.Clone(d.data)
	d.ns.LBAF[0].LBADS = 12
	b.happened(EventChanged)
	if err := b.Format(512); err == nil || !strings.Contains(err.Error(), "start hostmed again") {
		t.Error(err)
	}
	expect(t, d.data, before, "what another has")
}

// TestNVMeCharCopyAfterAReset: a Copy that a reset ends may have been done in part, and is not done again.
func TestNVMeCharCopyAfterAReset(t *testing.T) {
	d := newFakeChar()
	q, _ := fakeCharQueue(t, openFake(t, d, sliceSpec()), d, 16)
	for res, want := range map[int32]nvme.Status{0x370: 0x370, -int32(unix.EINTR): nvme.StatusInternalError} {
		tries := 0
		d.refuse = func(*passthru, []Seg) (int32, bool) { tries++; return res, true }
		source := nvme.CopyRange{NLB: 7}
		r := &Request{Op: OpCommand, Off: 4 * 512, Len: 8 * 512, Vec: []Seg{seg(source.Bytes()[:])}, Cmd: &nvme.Command{Opcode: nvme.IOCopy, CDW10: 4}}
		run(t, q, r)
		if r.Status != want || tries != 1 {
			t.Errorf("%d: %v after %d tries", res, r.Status, tries)
		}
	}
}

// TestNVMeCharReadsNothing: a device that says that it has read, and has moved nothing, gives a guest nothing that the buffer had from another.
func TestNVMeCharReadsNothing(t *testing.T) {
	d := newFakeChar()
	q, _ := fakeCharQueue(t, openFake(t, d, sliceSpec()), d, 16)
	mem, got := pattern(guestMemory(t, 64<<10), 6), guestMemory(t, 64<<10)
	d.refuse = func(c *passthru, vec []Seg) (int32, bool) {
		if len(vec) > 1 {
			return -int32(unix.EREMOTEIO), true // through a buffer
		}
		return 0, c.Opcode == nvme.IORead
	}
	mustRun(t, q, write(0, mem[:100], mem[4096:][:924]), read(8192, got[:100], got[1000:1924]))
	expect(t, got[1000:1924], make([]byte, 924), "what was not read")
}
