package trace

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/ebpf/bpf"
	"github.com/shadowbell/shadowbell/shared/latency"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(envChild); role != "" {
		child(role)
	}
	goleak.VerifyTestMain(m)
}

// needBPF skips where the process may load no programs, except in CI.
func needBPF(t testing.TB) {
	t.Helper()
	if _, missing := caps(); len(missing) > 0 && os.Getenv("CI") != "true" {
		t.Skipf("%v missing: run as root", missing)
	}
}

// bare is a loader whose programs are attached nowhere.
func bare(t testing.TB) *loader {
	t.Helper()
	needBPF(t)
	spec, err := bpf.LoadTrace()
	if err != nil {
		t.Fatal(err)
	}
	l := &loader{cache: btf.NewCache(), spec: spec, tracer: new(Tracer)}
	if err := l.loadMaps(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.tracer.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// arithmetic returns a function of the programs that takes and returns a number.
func arithmetic(t *testing.T, l *loader, name string) func(uint64) uint64 {
	t.Helper()
	p, err := l.program(name)
	if err != nil {
		t.Fatal(err)
	}
	l.tracer.programs[name] = p
	return func(v uint64) uint64 {
		n, err := p.Run(&ebpf.RunOptions{Context: binary.LittleEndian.AppendUint64(nil, v)})
		if err != nil {
			t.Fatal(err)
		}
		return uint64(n)
	}
}

func TestKernelCountsInTheBucketsOfPackageLatency(t *testing.T) {
	bucket := arithmetic(t, bare(t), bpf.TraceProgTestBucket)
	check := func(ns uint64) {
		var h latency.Histogram
		h.Record(time.Duration(ns), 1)
		if at := bucket(ns); h.Counts()[at] != 1 {
			t.Fatalf("%d ns is in bucket %d for the kernel: %v", ns, at, h.Counts())
		}
	}
	for shift := range 63 {
		for _, ns := range []uint64{1<<shift - 1, 1 << shift, 1<<shift + 1, 1<<shift + 1<<shift>>1, 2<<shift - 1} {
			check(ns)
		}
	}
	for range 20000 {
		check(rand.Uint64() >> (1 + rand.IntN(63)))
	}
	if n := len(bpf.TraceCell{}.Latency.Counts); n != latency.Buckets {
		t.Errorf("%d buckets, package latency has %d", n, latency.Buckets)
	}
}

func TestSizeClasses(t *testing.T) {
	class := arithmetic(t, bare(t), bpf.TraceProgTestSizeClass)
	check := func(bytes uint32) {
		got := SizeClassOf(bytes)
		if kernel := class(uint64(bytes)); kernel != uint64(got) {
			t.Fatalf("%d bytes: class %d, in the kernel %d", bytes, got, kernel)
		}
		most := SizeClassLimit(got)
		if bytes > 0 && most > 0 && (bytes > most || got > 1 && bytes <= most/2) {
			t.Fatalf("%d bytes are in class %d, which ends at %d", bytes, got, most)
		}
	}
	check(0)
	for shift := range 32 {
		for _, b := range []uint32{1<<shift - 1, 1 << shift, 1<<shift + 1} {
			check(b)
		}
	}
	for range 5000 {
		check(rand.Uint32() >> rand.IntN(32))
	}
	for _, c := range []struct {
		bytes uint32
		want  uint8
	}{{0, 0}, {1, 1}, {512, 1}, {513, 2}, {4096, 4}, {1 << 20, 12}, {1<<20 + 1, 13}, {1<<32 - 1, 13}} {
		if got := SizeClassOf(c.bytes); got != c.want {
			t.Errorf("%d bytes: class %d, want %d", c.bytes, got, c.want)
		}
	}
	if bits.OnesCount32(SizeClassLimit(12)) != 1 || SizeClassLimit(13) != 0 || SizeClassLimit(0) != 0 {
		t.Error("limits")
	}
}

// TestEveryProgramPassesTheVerifier loads what can be loaded without the driver's types. VM tests load the rest.
func TestEveryProgramPassesTheVerifier(t *testing.T) {
	l := bare(t)
	for _, p := range places {
		for _, c := range p.options {
			if has, err := hasType(l.cache, p.typeName()); c.how != Tracepoint && c.how != RawTP && (err != nil || !has) {
				continue
			}
			program, err := l.program(c.program)
			if err != nil {
				t.Errorf("%s: %+v", c.program, err)
				continue
			}
			l.tracer.programs[c.program] = program
		}
	}
	for _, name := range []string{bpf.TraceProgTpSetupCmd, bpf.TraceProgTpCompleteRq, bpf.TraceProgBtfRqComplete, bpf.TraceProgTpKvmExit} {
		if l.tracer.programs[name] == nil {
			t.Errorf("%s was not tried", name)
		}
	}
}

func TestEventHasTheSizeOfItsType(t *testing.T) {
	if want := 8*5 + 4*6 + 24 + 8 + 8 + 16 + 32; eventSize != want {
		t.Errorf("%d bytes, decode expects %d", eventSize, want)
	}
}

// TestTable: each key has a place of its own, in the array or, if another has that, in the hash; and has none after it was freed.
func TestTable(t *testing.T) {
	l := bare(t)
	p, err := l.program(bpf.TraceProgTestTable)
	if err != nil {
		t.Fatal(err)
	}
	l.tracer.programs[bpf.TraceProgTestTable] = p
	const find, claim, free = 0, 1, 2
	do := func(what, key uint64) uint32 {
		n, err := p.Run(&ebpf.RunOptions{Context: binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, what), key)})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	slot := func(key uint64) uint64 { return key * 0x9E3779B97F4A7C15 >> (64 - 14) }
	same := []uint64{0xffff888012345600} // keys of one place
	for k := same[0] + 256; len(same) < 4; k += 256 {
		if slot(k) == slot(same[0]) {
			same = append(same, k)
		}
	}
	a, b, c, d := same[0], same[1], same[2], same[3]
	for i, x := range []struct {
		what, key uint64
		want      uint32
	}{
		{find, a, 0}, {claim, a, 1}, {find, a, 1}, {find, b, 0},
		{claim, b, 2}, {claim, c, 2}, {find, a, 1}, {find, b, 2}, {find, c, 2}, {find, d, 0},
		{free, a, 1}, {find, a, 0}, {find, b, 2}, {free, a, 0}, // freed once
		{claim, d, 1}, {find, d, 1}, {free, b, 2}, {find, b, 0}, {find, c, 2},
		{free, c, 2}, {free, d, 1}, {claim, b, 1}, {find, b, 1}, {find, d, 0}, {free, b, 1},
	} {
		if got := do(x.what, x.key); got != x.want {
			t.Fatalf("step %d: %+v: got %d", i, x, got)
		}
	}
	// As many as fit: every one is found where it was put.
	const requests = 2000
	hash := 0
	for i := range uint64(requests) {
		if do(claim, a+i*512) == 2 {
			hash++
		}
	}
	for i := range uint64(requests) {
		if do(free, a+i*512) == 0 {
			t.Fatalf("key %d is lost", i)
		}
	}
	if hash > requests/8 {
		t.Errorf("%d of %d went to the hash", hash, requests)
	}
}
