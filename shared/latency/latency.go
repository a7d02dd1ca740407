// Package latency counts how long things took, in a histogram of fixed size: nothing is allocated or locked for a value, and what was
// counted in different places can be put together.
//
// A Histogram belongs to one goroutine. A Recorder has one goroutine that writes, and any number that read meanwhile.
//
// Values are nanoseconds. Up to 31 ns each has a bucket of its own; from there on each power of two is divided into 16 buckets, so that a
// bucket is at most 1/16 of its values wide. What is longer than MaxValue counts as that.
//
// The package does not read the clock.
package latency

import (
	"iter"
	"math"
	"math/bits"
	"time"
)

const (
	subBits = 4 // log2 of the buckets of one power of two
	sub     = 1 << subBits
	topBits = 38 // values are below 2^topBits

	// Buckets is how many buckets a Histogram has.
	Buckets = (topBits - subBits + 1) * sub
	// MaxValue is the longest that is told apart, some 275 s.
	MaxValue = time.Duration(1<<topBits - 1)
)

// index returns the bucket of v, which is not above MaxValue. Below 2*sub the shift is 0, and the bucket the value itself.
func index(v uint64) uint {
	shift := uint(bits.Len64(v|sub)) - 1 - subBits
	return shift<<subBits + uint(v>>(shift&63))
}

// clamp makes a value that index takes of any.
func clamp(ns int64) uint64 { return uint64(min(max(ns, 0), int64(MaxValue))) }

// low returns the least value of bucket i; that of the next bucket ends it.
func low(i int) uint64 {
	if i < sub {
		return uint64(i)
	}
	shift := i>>subBits - 1
	return uint64(sub+i&(sub-1)) << shift
}

// Histogram is a distribution of times. The zero value is empty. It has some 4 KiB: pass pointers.
type Histogram struct {
	counts [Buckets]uint64
	count  uint64
	sum    uint64 // ns; wraps after 584 years
	max    uint64 // ns
}

// Record counts n values of d. A negative d counts as 0.
func (h *Histogram) Record(d time.Duration, n uint64) {
	if n == 0 {
		return
	}
	ns := clamp(int64(d))
	h.counts[index(ns)] += n
	h.count += n
	h.sum += ns * n
	h.max = max(h.max, ns)
}

// Count returns how many values there are.
func (h *Histogram) Count() uint64 { return h.count }

// Sum returns the sum of all values.
func (h *Histogram) Sum() time.Duration { return time.Duration(min(h.sum, math.MaxInt64)) }

// Mean returns the mean, which is exact; 0 if there are no values.
func (h *Histogram) Mean() time.Duration {
	if h.count == 0 {
		return 0
	}
	return time.Duration(h.sum / h.count)
}

// Max returns the longest value, which is exact except after Sub; 0 if there are none.
func (h *Histogram) Max() time.Duration { return time.Duration(h.max) }

// Quantile returns the value that the part q of all values, 0 to 1, does not exceed: 0.5 is the median. It is the end of the
// value's bucket, so at most 1/16 too long, and never too short; 0 if there are no values.
func (h *Histogram) Quantile(q float64) time.Duration {
	if h.count == 0 {
		return 0
	}
	rank := uint64(math.Ceil(min(max(q, 0), 1) * float64(h.count)))
	rank = min(max(rank, 1), h.count)
	seen := uint64(0)
	for i, n := range h.counts {
		if seen += n; seen >= rank {
			return time.Duration(min(low(i+1)-1, h.max))
		}
	}
	return h.Max()
}

// Bucket is a part of a Histogram: Count values from Low on and below High.
type Bucket struct {
	Low, High time.Duration
	Count     uint64
}

// All yields the buckets that are not empty, by rising values.
func (h *Histogram) All() iter.Seq[Bucket] {
	return func(yield func(Bucket) bool) {
		for i, n := range h.counts {
			if n > 0 && !yield(Bucket{Low: time.Duration(low(i)), High: time.Duration(low(i + 1)), Count: n}) {
				return
			}
		}
	}
}

// What Cumulative goes through: from one microsecond to one minute, about.
const (
	firstBound = 10
	lastBound  = 36
)

// Cumulative yields how many values are shorter than each power of two from 1.024 us to 69 s. The bounds are always the same
// ones, as monitoring wants the buckets of a histogram; Count is how many there are without a bound.
func (h *Histogram) Cumulative() iter.Seq2[time.Duration, uint64] {
	return func(yield func(time.Duration, uint64) bool) {
		n, i := uint64(0), 0
		for b := firstBound; b <= lastBound; b++ {
			bound := uint64(1) << b
			for ; low(i) < bound; i++ {
				n += h.counts[i]
			}
			if !yield(time.Duration(bound), n) {
				return
			}
		}
	}
}

// Merge adds what other has.
func (h *Histogram) Merge(other *Histogram) {
	for i, n := range other.counts {
		h.counts[i] += n
	}
	h.count += other.count
	h.sum += other.sum
	h.max = max(h.max, other.max)
}

// Sub takes away what was there before, so that h is what came since. Max is then the end of the highest bucket that is left.
func (h *Histogram) Sub(before *Histogram) {
	top := 0
	for i, n := range before.counts {
		if h.counts[i] -= n; h.counts[i] > 0 {
			top = i
		}
	}
	h.count -= before.count
	h.sum -= before.sum
	if h.count == 0 {
		h.max = 0
		return
	}
	h.max = min(h.max, low(top+1)-1)
}
