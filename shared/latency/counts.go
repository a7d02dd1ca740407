package latency

// AddCounts adds what was counted elsewhere, such as in the kernel, in buckets of this shape: bucket i has the values with the same highest
// bit and the four bits below it, from the least up. sum and max are in ns. A max beyond MaxValue counts as that.
func (h *Histogram) AddCounts(counts *[Buckets]uint64, sum, max uint64) {
	for i, n := range counts {
		h.counts[i] += n
		h.count += n
	}
	h.sum += sum
	if max = min(max, uint64(MaxValue)); max > h.max {
		h.max = max
	}
}

// Counts returns the buckets, so that AddCounts can make the same of them with Sum and Max.
func (h *Histogram) Counts() *[Buckets]uint64 {
	counts := h.counts
	return &counts
}
