package latency

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestCountsThereAndBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h, got, both Histogram
		for _, ns := range values().Draw(t, "values") {
			h.Record(time.Duration(ns), 3)
			both.Record(time.Duration(ns), 6)
		}
		counts := h.Counts()
		got.AddCounts(counts, uint64(h.Sum()), uint64(h.Max()))
		if got != h {
			t.Fatal("AddCounts does not undo Counts")
		}
		got.AddCounts(counts, uint64(h.Sum()), uint64(h.Max()))
		if got != both {
			t.Fatal("AddCounts twice is not twice as many")
		}
		counts[0]++
		if h.counts[0] == counts[0] {
			t.Fatal("Counts hands out the histogram's own")
		}
	})
}

func TestAddCountsTakesAnything(t *testing.T) {
	var h Histogram
	var counts [Buckets]uint64
	for i := range counts {
		counts[i] = math.MaxUint64
	}
	h.AddCounts(&counts, math.MaxUint64, math.MaxUint64)
	if h.Max() != MaxValue || h.Sum() < 0 || h.Quantile(0.5) > MaxValue || h.Mean() < 0 {
		t.Errorf("max %v, sum %v, median %v, mean %v", h.Max(), h.Sum(), h.Quantile(0.5), h.Mean())
	}
}
