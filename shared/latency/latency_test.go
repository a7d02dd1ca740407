package latency

import (
	"math"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestBucketsAreGaplessAndNarrow(t *testing.T) {
	for i := range Buckets {
		lo, next := low(i), low(i+1)
		if next <= lo {
			t.Fatalf("bucket %d is [%d, %d)", i, lo, next)
		}
		if first, last := index(lo), index(next-1); first != uint(i) || last != uint(i) {
			t.Fatalf("bucket %d is [%d, %d), whose ends are in %d and %d", i, lo, next, first, last)
		}
		if width := next - lo; width > 1 && width*sub > lo {
			t.Fatalf("bucket %d is [%d, %d): wider than 1/%d", i, lo, next, sub)
		}
	}
	if end := low(Buckets) - 1; end != uint64(MaxValue) {
		t.Fatalf("the last bucket ends at %d", end)
	}
	for ns, want := range map[int64]time.Duration{math.MaxInt64: MaxValue, int64(MaxValue) + 1: MaxValue, -1: 0, math.MinInt64: 0} {
		var h, read Histogram
		var r Recorder
		h.Record(time.Duration(ns), 1)
		r.Record(ns, 1)
		r.AddTo(&read)
		if h.Max() != want || h.Quantile(1) != want || read != h {
			t.Errorf("%d counts as %v, %v", ns, h.Max(), read.Max())
		}
	}
}

// values draws times of all magnitudes.
func values() *rapid.Generator[[]int64] {
	one := rapid.Custom(func(t *rapid.T) int64 {
		shift := rapid.IntRange(0, topBits-1).Draw(t, "shift")
		return rapid.Int64Range(0, 2<<shift-1).Draw(t, "ns")
	})
	return rapid.SliceOfN(one, 1, 200)
}

// The model is a sorted slice.
func TestHistogramAgainstSlice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h Histogram
		var sum int64
		all := values().Draw(t, "values")
		for i, ns := range all {
			all[i] = min(ns, int64(MaxValue))
			sum += all[i]
			h.Record(time.Duration(ns), 1)
		}
		slices.Sort(all)
		if h.Count() != uint64(len(all)) || int64(h.Sum()) != sum || int64(h.Max()) != all[len(all)-1] || int64(h.Mean()) != sum/int64(len(all)) {
			t.Fatalf("count %d, sum %v, max %v, mean %v of %v", h.Count(), h.Sum(), h.Max(), h.Mean(), all)
		}
		q := rapid.Float64Range(0, 1).Draw(t, "q")
		rank := max(int(math.Ceil(q*float64(len(all)))), 1)
		if want, got := all[rank-1], int64(h.Quantile(q)); got < want || got > want+want/sub {
			t.Fatalf("quantile %v is %d, want %d and at most 1/%d more", q, got, want, sub)
		}
		bounds := 0
		for bound, n := range h.Cumulative() {
			if at, _ := slices.BinarySearch(all, int64(bound)); n != uint64(at) {
				t.Fatalf("%d of %v are below %v, Cumulative says %d", at, all, bound, n)
			}
			bounds++
		}
		if bounds != lastBound-firstBound+1 {
			t.Fatalf("%d bounds", bounds)
		}
		n, last := uint64(0), time.Duration(-1)
		for b := range h.All() {
			if b.Low <= last || b.High <= b.Low || b.Count == 0 {
				t.Fatalf("bucket %+v after %v", b, last)
			}
			n, last = n+b.Count, b.Low
		}
		if n != h.Count() {
			t.Fatalf("the buckets have %d of %d values", n, h.Count())
		}
	})
}

func TestMergeAndSub(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var a, b, both Histogram
		first, second := values().Draw(t, "first"), values().Draw(t, "second")
		for _, ns := range first {
			a.Record(time.Duration(ns), 2)
			both.Record(time.Duration(ns), 2)
		}
		for _, ns := range second {
			b.Record(time.Duration(ns), 1)
			both.Record(time.Duration(ns), 1)
		}
		merged := a
		merged.Merge(&b)
		if merged != both {
			t.Fatal("Merge is not what recording both is")
		}
		merged.Sub(&a)
		if most := merged.Max(); most < b.Max() || most > max(b.Max()+b.Max()/sub, both.Max()) {
			t.Fatalf("after Sub the longest is %v, want %v or its bucket's end", most, b.Max())
		}
		merged.max = b.max
		if merged != b {
			t.Fatal("Sub does not undo Merge")
		}
		merged.Sub(&b)
		if merged != (Histogram{}) {
			t.Fatal("all taken away, and something is left")
		}
	})
}

func TestEmpty(t *testing.T) {
	var h Histogram
	h.Record(time.Second, 0)
	if h.Count() != 0 || h.Mean() != 0 || h.Max() != 0 || h.Quantile(0.99) != 0 || h.Sum() != 0 {
		t.Errorf("%+v", h)
	}
	for b := range h.All() {
		t.Errorf("bucket %+v", b)
	}
	h.Record(time.Second, 3)
	for b := range h.All() {
		if b.Count != 3 {
			t.Errorf("bucket %+v", b)
		}
		break // All stops when asked to
	}
	for bound, n := range h.Cumulative() {
		if bound != 1024 || n != 0 {
			t.Errorf("%d below %v", n, bound)
		}
		break
	}
}

func TestRecorderIsReadMeanwhile(t *testing.T) {
	const n = 20000
	var r Recorder
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		wg.Go(func() {
			last := uint64(0)
			for {
				var h Histogram
				r.AddTo(&h)
				if h.Count() < last {
					t.Errorf("count went from %d to %d", last, h.Count())
					return
				}
				last = h.Count()
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	var want Histogram
	for i := range int64(n) {
		r.Record(i*i, 1)
		want.Record(time.Duration(i*i), 1)
	}
	close(stop)
	wg.Wait()
	var got Histogram
	r.AddTo(&got)
	if got != want {
		t.Errorf("count %d, sum %v, max %v; want %d, %v, %v", got.Count(), got.Sum(), got.Max(), want.Count(), want.Sum(), want.Max())
	}
}

func TestRecordDoesNotAllocate(t *testing.T) {
	var r Recorder
	var h Histogram
	if n := testing.AllocsPerRun(100, func() {
		r.Record(12345, 3)
		r.AddTo(&h)
		h.Record(h.Quantile(0.5), 1)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkRecord(b *testing.B) {
	var r Recorder
	ns := int64(0)
	for b.Loop() {
		ns = (ns*5 + 1) & 0xFFFF
		r.Record(ns, 1)
	}
}
