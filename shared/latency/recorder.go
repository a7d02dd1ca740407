package latency

import "sync/atomic"

// Recorder is a Histogram that one goroutine records in while others read. The zero value is empty.
//
// Each of its words has one writer, so none needs an atomic read-modify-write. Readers see each word as it was at some time during
// AddTo; a value that is recorded meanwhile may be in the counts and not yet in the sum.
type Recorder struct {
	counts [Buckets]uint64
	sum    uint64
	max    uint64
}

// Record counts n values of ns nanoseconds. It is for the one goroutine that writes.
func (r *Recorder) Record(ns int64, n uint64) {
	v := uint64(ns)
	if v > uint64(MaxValue) {
		v = clamp(ns)
	}
	c := &r.counts[index(v)]
	store(c, *c+n) // pairs with the loads in AddTo
	store(&r.sum, r.sum+v*n)
	if v > r.max {
		store(&r.max, v)
	}
}

// AddTo adds what has been recorded so far to h. Any goroutine may call it.
func (r *Recorder) AddTo(h *Histogram) {
	h.sum += atomic.LoadUint64(&r.sum)
	h.max = max(h.max, atomic.LoadUint64(&r.max))
	for i := range r.counts {
		n := atomic.LoadUint64(&r.counts[i])
		h.counts[i] += n
		h.count += n
	}
}
