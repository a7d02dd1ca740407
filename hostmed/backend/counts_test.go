package backend

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

func expectCounts(t *testing.T, what string, got, want Counts) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %+v, want %+v", what, got, want)
	}
}

// TestBlockCounts: what suits O_DIRECT is handed on as it is, the rest is copied, and the counts outlive their queue.
func TestBlockCounts(t *testing.T) {
	b := opened(t)(blockOverFile(t, testSize, Spec{Kind: KindBlock}, plainFacts))
	var _ Counted = b.(*block)
	mem := guestMemory(t, 1<<20)
	q, err := b.NewQueue()
	if err != nil {
		t.Fatal(err)
	}
	mustRun(t, q, write(0, mem[:4096]), read(8192, mem[4096:8192], mem[65536:][:4096]), read(0, mem[100:][:512]), &Request{Op: OpFlush})
	want := Counts{Commands: 4, Mapped: 2, Bounced: 1}
	expectCounts(t, "with an open queue", b.(Counted).Counts(), want)
	var many []*Request
	for range bounceCount + 3 {
		many = append(many, write(0, mem[1:][:512]))
	}
	mustRun(t, q, many...)
	want.Commands += bounceCount + 3
	want.Bounced += bounceCount + 3
	want.Waited = 3
	expectCounts(t, "with more copies than buffers", b.(Counted).Counts(), want)
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	mustRun(t, newQueue(t, b), read(0, mem[:512]))
	want.Commands++
	want.Mapped++
	expectCounts(t, "with another queue", b.(Counted).Counts(), want)
}

func TestNVMeCharCounts(t *testing.T) {
	d := newFakeChar()
	b := openFake(t, d, sliceSpec())
	q, _ := fakeCharQueue(t, b, d, 16)
	b.join(q, q.counts.get)
	mem := guestMemory(t, 1<<20)
	mustRun(t, q,
		read(0, mem[:64<<10], mem[128<<10:][:64<<10]), // of 64 KiB at the most: two
		&Request{Op: OpFlush},
		&Request{Op: OpCommand, Len: 512, Vec: []Seg{seg(mem[:512])}, Cmd: &nvme.Command{Opcode: nvme.IOCompare}},
		&Request{Op: OpCommand, Len: 512, Cmd: &nvme.Command{Opcode: nvme.IOVerify}},
		&Request{Op: OpCommand, Vec: []Seg{seg(make([]byte, nvme.DSMRangeSize))}, Cmd: &nvme.Command{Opcode: nvme.IODSM}},
	)
	want := Counts{Commands: 6, Native: 3, Mapped: 3}
	if got := len(d.seen); got != 6 {
		t.Fatalf("%d commands", got)
	}
	expectCounts(t, "", b.Counts(), want)
	n := 0
	d.refuse = func(*passthru, []Seg) (int32, bool) { n++; return -int32(unix.EINTR), n <= 2 }
	mustRun(t, q, write(0, mem[:512]))
	want.Commands++
	want.Mapped++
	want.Repeated = 2
	expectCounts(t, "after a reset", b.Counts(), want)
	d.refuse = func(_ *passthru, vec []Seg) (int32, bool) { return -int32(unix.EREMOTEIO), len(vec) > 1 }
	mustRun(t, q, write(512, mem[:100], mem[4096:][:924]))
	want.Commands += 2 // the kernel refuses the first one
	want.Bounced++
	expectCounts(t, "through a buffer", b.Counts(), want)
	d.refuse = func(*passthru, []Seg) (int32, bool) { return int32(nvme.StatusUnrecoveredRead), true }
	run(t, q, read(0, mem[:512]))
	want.Commands++
	expectCounts(t, "failed", b.Counts(), want)
	b.leave(q)
	expectCounts(t, "without its queue", b.Counts(), want)
	d.refuse = nil
}

func TestVFIOCounts(t *testing.T) {
	b, err := vfioOf(t, Spec{}, testSize, 512)
	opened(t)(b, err)
	mem := b.guests.Memory(1 << 20)
	q, err := b.NewQueue()
	if err != nil {
		t.Fatal(err)
	}
	mustRun(t, q, write(0, mem[:4096]), &Request{Op: OpFlush})
	want := Counts{Commands: 2, Bounced: 1}
	got := func() Counts {
		c := b.Counts()
		c.Doorbells = 0 // as the device has asked for
		return c
	}
	expectCounts(t, "memory that the device was not told of", got(), want)
	q.AddMemory(mem)
	b.AwaitMemory()
	other := newQueue(t, b)
	mustRun(t, q, read(0, mem[:4096]))
	mustRun(t, other, write(8192, mem[:4096]))
	want.Commands, want.Mapped = 4, 2
	expectCounts(t, "of two queues", got(), want)
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	expectCounts(t, "when one is closed", got(), want)
	if b.Counts().Doorbells == 0 {
		t.Error("the device never had to be told")
	}
}
