package qos

import (
	"math"
	"math/bits"
	"sync/atomic"
)

// A bucket does not hold tokens: it counts what was ever granted, which follows from the clock, and what was ever spent. Both count on
// modulo 2^64, and only their difference means anything. So a charge is one addition, nothing is rounded twice, and the rate is exact however long
// it runs.
type bucket struct {
	rate  atomic.Pointer[rate] // nil: no limit
	spent atomic.Uint64
	_     [48]byte // a cache line each: workers write to it
}

// rate is what a bucket is granted. It does not change.
type rate struct {
	perSecond uint64
	burst     uint64
	since     int64  // when base was what had been granted
	base      uint64 // and frac/second of one
	frac      uint64
}

const second = 1_000_000_000 // in ns

// granted is what was ever granted up to now, and the part of the next, in 1/second of one.
func (r *rate) granted(now int64) (n, frac uint64) {
	d := uint64(max(now-r.since, 0)) // another worker's clock may be a little behind
	sec, ns := d/second, d%second
	hi, lo := bits.Mul64(ns, r.perSecond)
	lo, carry := bits.Add64(lo, r.frac, 0)
	if hi += carry; hi == 0 {
		n, frac = lo/second, lo%second
	} else {
		n, frac = bits.Div64(hi, lo, second) // ns < second and perSecond <= MaxRate: it fits
	}
	return r.base + sec*r.perSecond + n, frac
}

// set is called by one at a time.
func (b *bucket) set(l Limit, now int64) {
	old := b.rate.Load()
	if l.Rate == 0 {
		b.rate.Store(nil)
		return
	}
	r := &rate{perSecond: l.Rate, burst: l.Burst, since: now}
	if r.burst == 0 {
		r.burst = max(l.Rate/DefaultBurst, 1)
	}
	if old == nil {
		r.base = b.spent.Load() + r.burst
	} else if r.base, r.frac = old.granted(now); old.perSecond == r.perSecond && old.burst == r.burst {
		return
	}
	b.rate.Store(r)
}

// charge pays cost. It may go when the bucket has it, or is full; what is more than a full bucket is a debt.
func (b *bucket) charge(t *Ticket, cost uint64, now int64) bool {
	r := b.rate.Load()
	if r == nil {
		return true
	}
	n, _ := r.granted(now)
	b.spill(n, r.burst)
	at := b.spent.Add(cost) - cost + min(cost, r.burst)
	t.places[t.n&(maxPlaces-1)] = place{b, at, cost}
	t.n++
	return int64(n-at) >= 0
}

// spill loses what is more than the burst of the n that were granted.
func (b *bucket) spill(n, burst uint64) {
	for {
		spent := b.spent.Load()
		over := int64(n - spent - burst)
		if over <= 0 || b.spent.CompareAndSwap(spent, spent+uint64(over)) {
			return
		}
	}
}

func (b *bucket) owe(cost uint64, now int64) {
	if r := b.rate.Load(); r != nil {
		n, _ := r.granted(now)
		b.spill(n, r.burst)
		b.spent.Add(cost)
	}
}

// when is when n will have been granted: now, if it has been.
func (r *rate) when(n uint64, now int64) int64 {
	have, frac := r.granted(now)
	missing := int64(n - have)
	if missing <= 0 {
		return now
	}
	// (missing * second - frac) / perSecond, rounded up
	hi, lo := bits.Mul64(uint64(missing), second)
	lo, borrow := bits.Sub64(lo, frac, 0)
	lo, carry := bits.Add64(lo, r.perSecond-1, 0)
	if hi = hi - borrow + carry; hi >= r.perSecond {
		return never
	}
	ns, _ := bits.Div64(hi, lo, r.perSecond)
	if ns > uint64(never-now) {
		return never
	}
	return now + int64(ns)
}

// never is later than anybody waits for.
const never = math.MaxInt64 / 2

// maxPlaces is how many buckets a fused pair meets: commands and bytes, of one side and of both, of a namespace and of a controller, for
// each half.
const maxPlaces = 16

// Ticket is the place of a command, or of a fused pair, in the line of each bucket on its path.
type Ticket struct {
	n      int
	places [maxPlaces]place
}

type place struct {
	b    *bucket
	at   uint64 // its turn comes when so much was granted
	cost uint64
}

// Reset makes t that of nothing.
func (t *Ticket) Reset() { t.n = 0 }

// When is when the command may go: now, if it may. It is another time after limits have changed.
func (t *Ticket) When(now int64) int64 {
	at := now
	for i := range t.places[:t.n] {
		p := &t.places[i]
		if r := p.b.rate.Load(); r != nil {
			at = max(at, r.when(p.at, now))
		}
	}
	return at
}

// longestSlack is how much later than When a turn may be. blk-throttle's timers in Linux are as coarse: of a tick of 1 to 10 ms.
const longestSlack = 1 << 21 // ns

// Turn is When, or a little later: a moment that is also that of others, so that who sleeps until then wakes once for several, and a guest has
// one interrupt for them. What the delay grants fits into the buckets, so that it costs no rate.
func (t *Ticket) Turn(now int64) int64 {
	at := t.When(now)
	if at <= now || at == never {
		return at
	}
	slack := int64(longestSlack)
	for i := range t.places[:t.n] {
		p := &t.places[i]
		if r := p.b.rate.Load(); r != nil {
			slack = min(slack, r.slack(p.cost))
		}
	}
	if slack < 2 {
		return at
	}
	grid := int64(1) << (bits.Len64(uint64(slack)) - 1)
	return (at + grid - 1) &^ (grid - 1)
}

// slack is how long it takes to grant a quarter of the room that a bucket has beside cost.
func (r *rate) slack(cost uint64) int64 {
	room := float64(r.burst - min(cost, r.burst))
	return int64(min(room/4/float64(r.perSecond)*second, longestSlack))
}

// Waits reports whether t's turn has not come in a bucket of m that commands of both sides meet.
func (t *Ticket) Waits(m *Limiter, now int64) bool {
	for i := range t.places[:t.n] {
		p := &t.places[i]
		if r := p.b.rate.Load(); r != nil && (p.b == &m.buckets[commands][both] || p.b == &m.buckets[bytes][both]) && r.when(p.at, now) > now {
			return true
		}
	}
	return false
}

// Refund gives back what was paid for a command that has ended without having gone. Those behind it in the line keep their places.
func (t *Ticket) Refund() {
	for i := range t.places[:t.n] {
		p := &t.places[i]
		p.b.spent.Add(-p.cost)
	}
	t.n = 0
}
