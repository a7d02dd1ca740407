package trace

import (
	"io"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/ebpf/bpf"
)

// BenchmarkWriteEvent is what a recorded command costs this side, twice: begin and end.
func BenchmarkWriteEvent(b *testing.B) {
	w, err := newWriter(io.Discard, testHeader)
	if err != nil {
		b.Fatal(err)
	}
	e := Event{Kind: End, QID: 1, Opcode: 2, NSID: 1, SLBA: 123456, Blocks: 8, Bytes: 4096, Latency: 80000, TID: 1234, Comm: "fio", Disk: "nvme0n1", CDW10: [6]uint32{123456, 0, 7}}
	b.ReportAllocs()
	for b.Loop() {
		e.Time += 10000
		e.CID++
		if err := w.Event(e); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkDecode is what an event from the ring costs.
func BenchmarkDecode(b *testing.B) {
	raw := make([]byte, eventSize)
	copy(raw[104:], "fio")
	copy(raw[120:], "nvme0n1")
	var names interned
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decode(raw, &names); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkBlock writes to a loop device and reports what each program took, by the kernel's own clock: the time of a write varies by more than that.
func BenchmarkBlock(b *testing.B) {
	disk := loopDisk(b, 1<<20)
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()
	tr := block(b)
	b.ResetTimer()
	direct(b, disk, b.N, 4096, true)
	for _, name := range []string{bpf.TraceProgBtfRqIssue, bpf.TraceProgBtfRqComplete} {
		s, err := tr.programs[name].Stats()
		if err != nil {
			b.Fatal(err)
		}
		if s.RunCount > 0 {
			b.ReportMetric(float64(s.Runtime)/float64(s.RunCount), name+"-ns")
		}
	}
}

// BenchmarkSnapshot is what one look costs, here without NVMe.
func BenchmarkSnapshot(b *testing.B) {
	tr := block(b)
	for b.Loop() {
		if _, err := tr.Snapshot(); err != nil {
			b.Fatal(err)
		}
	}
}

func TestDecodeAllocatesNothing(t *testing.T) {
	raw := make([]byte, eventSize)
	copy(raw[104:], "fio")
	var names interned
	if n := testing.AllocsPerRun(100, func() {
		if e, err := decode(raw, &names); err != nil || e.Comm != "fio" {
			t.Errorf("%+v, %v", e, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if _, err := decode(raw[:eventSize-1], &names); err == nil {
		t.Error("a short one was taken")
	}
}
