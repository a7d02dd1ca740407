package qos

import (
	"math/big"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// path returns the path through one limiter with l.
func path(l Limits) (*Path, *Limiter) {
	m := &Limiter{}
	m.Set(l, 0)
	return NewPath(m), m
}

// line is somebody who asks for one command after the other, each as soon as the one before has gone: what a queue's waiting commands look like.
type line struct {
	class Class
	bytes uint64
	paths []*Path // taken in turn

	t      Ticket
	at     int64
	gone   uint64
	asking bool
	shares bool // moments with others: Turn
}

// run lets lines ask until end, and returns when. Time jumps to whoever is next.
func run(begin, end int64, lines ...*line) {
	now := begin
	for _, l := range lines {
		if l.asking {
			l.at = l.turn(now) // limits may have changed
		}
	}
	for {
		var next *line
		for _, l := range lines {
			if !l.asking {
				l.ask(now)
			}
			if next == nil || l.at < next.at {
				next = l
			}
		}
		if next.at >= end {
			return
		}
		now = max(now, next.at)
		next.gone++
		next.asking = false
	}
}

func (l *line) ask(now int64) {
	l.asking, l.at = true, now
	l.t.Reset()
	if !l.paths[int(l.gone)%len(l.paths)].Charge(&l.t, l.class, l.bytes, now) {
		l.at = l.turn(now)
	}
}

func (l *line) turn(now int64) int64 {
	if l.shares {
		return l.t.Turn(now)
	}
	return l.t.When(now)
}

// TestRateIsExact: over 5 s that do not begin with a burst, to the command; and over days.
func TestRateIsExact(t *testing.T) {
	for _, rate := range []uint64{1, 3, 7, 999, 2000, 33_333, 100_003} {
		p, _ := path(Limits{IOPS: Limit{Rate: rate}})
		l := &line{class: Read, bytes: 4096, paths: []*Path{p}}
		run(0, second, l) // the burst
		for window := range int64(4) {
			before := l.gone
			run((1+5*window)*second, (6+5*window)*second, l)
			if n := l.gone - before; n < 5*rate-1 || n > 5*rate+1 {
				t.Errorf("%d IOPS: %d in window %d of 5 s", rate, n, window)
			}
		}
	}
	const days = 1000 * 24 * 3600
	p, _ := path(Limits{IOPS: Limit{Rate: 7, Burst: 3}})
	l := &line{class: Other, paths: []*Path{p}}
	// Asked 5 times at once at odd moments: never more than the rate allows, and all of it.
	granted := uint64(3)
	var spent uint64
	for now := int64(0); now < 100*second; now += 123_456_789 {
		for range 5 {
			l.t.Reset()
			if p.Charge(&l.t, Other, 0, now) {
				spent++
			} else {
				l.t.Refund()
			}
		}
		granted = 3 + uint64(now)*7/second
		if spent > granted || spent+1 < granted {
			t.Fatalf("%d spent of %d at %v", spent, granted, time.Duration(now))
		}
	}
	// The clock of a machine that has been up for years.
	p, _ = path(Limits{Bandwidth: Limit{Rate: MaxRate, Burst: 1}})
	p.Charge(&l.t, Read, 1, 0)
	l.t.Reset()
	if !p.Charge(&l.t, Read, 1<<20, days*second) {
		t.Error("nothing is left after a thousand days")
	}
	if p.Charge(&l.t, Read, 1, days*second+1) && !p.Charge(&l.t, Read, 1<<40, days*second+2) {
		t.Error("a thousand days of the highest rate have saved more than the burst")
	}
}

// TestBandwidthIsExact with commands that do not divide the rate, some larger than the burst.
func TestBandwidthIsExact(t *testing.T) {
	for _, c := range []struct{ rate, burst, size uint64 }{
		{100 << 20, 0, 4096}, {100 << 20, 0, 1 << 20}, {10_000_001, 4096, 1 << 20}, {MinBandwidth, 1, 1 << 20}, {50e9, 0, 128 << 10},
	} {
		p, _ := path(Limits{ReadBandwidth: Limit{c.rate, c.burst}})
		l := &line{class: Read, bytes: c.size, paths: []*Path{p}}
		run(0, second, l)
		long := int64(5 * second * max(1, 2*c.size/(5*c.rate)))
		before := l.gone
		run(second, second+long, l)
		got, want := (l.gone-before)*c.size, uint64(long)/second*c.rate
		if got+c.size < want || got > want+c.size {
			t.Errorf("%d bytes/s, burst %d, commands of %d: %d bytes instead of %d", c.rate, c.burst, c.size, got, want)
		}
	}
}

// TestBurst: after idling, exactly as much as configured goes at once, however long it was idle.
func TestBurst(t *testing.T) {
	count := func(p *Path, class Class, n uint64, now int64) (gone int) {
		var tk Ticket
		for gone = 0; gone < 10_000; gone++ {
			tk.Reset()
			if !p.Charge(&tk, class, n, now) {
				tk.Refund()
				break
			}
		}
		return gone
	}
	p, _ := path(Limits{WriteIOPS: Limit{Rate: 100, Burst: 250}})
	for _, now := range []int64{0, 10 * second, 100_000 * second} {
		if n := count(p, Write, 512, now); n != 250 {
			t.Errorf("%d commands at once after idling until %v, instead of 250", n, time.Duration(now))
		}
	}
	if n := count(p, Write, 512, 100_000*second+second/2); n != 50 {
		t.Errorf("%d commands half a second later, instead of 50", n)
	}
	if n := count(p, Read, 512, 100_000*second); n != 10_000 {
		t.Errorf("a limit for writes let only %d reads go", n)
	}
	p, _ = path(Limits{Bandwidth: Limit{Rate: 1 << 20, Burst: 1 << 20}})
	if n := count(p, Read, 64<<10, 0); n != 16 {
		t.Errorf("%d commands of 64 KiB at once with a burst of 1 MiB", n)
	}
	p, _ = path(Limits{IOPS: Limit{Rate: 2000}})
	if n := count(p, Other, 0, 0); n != 200 {
		t.Errorf("%d commands at once at 2000 IOPS without a burst of its own, instead of 200", n)
	}
	p, _ = path(Limits{IOPS: Limit{Rate: 3}})
	if n := count(p, Other, 0, 0); n != 1 {
		t.Errorf("%d commands at once at 3 IOPS, instead of 1", n)
	}
}

// TestTurnsAreShared: commands go in fewer moments than there are commands, none before its time or much after it, and the rate is what it was.
func TestTurnsAreShared(t *testing.T) {
	for _, x := range []struct {
		limits  Limits
		size    uint64
		perLine uint64 // in 5 s
		moments int    // at most
	}{
		{Limits{IOPS: Limit{Rate: 100}}, 4096, 500, 501},
		{Limits{IOPS: Limit{Rate: 20_000}}, 4096, 100_000, 2500},
		{Limits{IOPS: Limit{Rate: 20_000, Burst: 1}}, 4096, 100_000, 100_001}, // nothing is saved
		{Limits{IOPS: Limit{Rate: 20_000, Burst: 21}}, 4096, 100_000, 50_000},
		{Limits{Bandwidth: Limit{Rate: 64 << 20, Burst: 64 << 10}}, 4096, 81_920, 80_000},
		{Limits{Bandwidth: Limit{Rate: 64 << 20, Burst: 64 << 10}}, 128 << 10, 2560, 2561}, // each takes a full bucket
	} {
		p, _ := path(x.limits)
		l := &line{class: Read, bytes: x.size, paths: []*Path{p}, shares: true}
		run(0, second, l)
		before, moments, last := l.gone, 0, int64(0)
		for now := int64(second); now < 6*second; {
			due := l.t.When(now)
			if l.at < due || l.at-due >= longestSlack {
				t.Fatalf("%v: a turn at %v of what may go at %v", x.limits, time.Duration(l.at), time.Duration(due))
			}
			if l.at != last {
				moments++
				last = l.at
			}
			now = l.at
			run(now, now+1, l)
		}
		if n := l.gone - before; n+x.perLine/250+1 < x.perLine || n > x.perLine+x.perLine/250+1 {
			t.Errorf("%v: %d commands in 5 s, not %d", x.limits, n, x.perLine)
		}
		if moments > x.moments {
			t.Errorf("%v: %d moments, not %d", x.limits, moments, x.moments)
		}
	}
	var ns, other Limiter
	ns.Set(iopsOf(100, 1), 0)
	other.Set(Limits{ReadIOPS: Limit{Rate: 1, Burst: 1}}, 0)
	p := NewPath(&ns, &other)
	var tk Ticket
	p.Charge(&tk, Read, 0, 0)
	if tk.Waits(&ns, 0) || tk.Waits(&other, 0) {
		t.Error("what may go waits")
	}
	tk.Reset()
	p.Charge(&tk, Read, 0, 0)
	if !tk.Waits(&ns, 0) || tk.Waits(&other, 0) || tk.Waits(&ns, second/100) {
		t.Error("what waits for both sides' limit of one of them does not, or for ever, or for a limit of reads")
	}
}

func iopsOf(rate, burst uint64) Limits { return Limits{IOPS: Limit{rate, burst}} }

// TestLargerThanBurst: it passes when the bucket is full, and what it took too much is waited for afterwards, by the small ones as well.
func TestLargerThanBurst(t *testing.T) {
	p, _ := path(Limits{Bandwidth: Limit{Rate: 1 << 20, Burst: 64 << 10}})
	var big, small Ticket
	if !p.Charge(&big, Read, 1<<20, 0) {
		t.Fatal("a command of 1 MiB does not pass a full bucket of 64 KiB")
	}
	if p.Charge(&small, Read, 4096, 0) {
		t.Fatal("the debt is not waited for")
	}
	// 1 MiB - 64 KiB of debt, and 4 KiB.
	if at, want := small.When(0), int64(second)*(1<<20-64<<10+4<<10)/(1<<20); at < want || at > want+1 {
		t.Errorf("the next command may go at %v, not %v", time.Duration(at), time.Duration(want))
	}
	// Among small ones that always wait, the large one has its turn.
	lines := []*line{{class: Read, bytes: 1 << 20, paths: []*Path{p}}}
	for range 20 {
		lines = append(lines, &line{class: Read, bytes: 512, paths: []*Path{p}})
	}
	run(second, 101*second, lines...)
	for i, l := range lines[1:] {
		if d := int64(l.gone) - int64(lines[0].gone); d < -1 || d > 1 {
			t.Errorf("%d large commands and %d of line %d", lines[0].gone, l.gone, i)
		}
	}
	if lines[0].gone < 95 || lines[0].gone > 101 { // 20 small ones are 10 KiB
		t.Errorf("%d commands of 1 MiB in 100 s at 1 MiB/s", lines[0].gone)
	}
}

// TestFairness: who asks for one command after the other has the same part as everybody else, also of the sum of two limits on different paths.
func TestFairness(t *testing.T) {
	var ns, a, b Limiter
	ns.Set(Limits{IOPS: Limit{Rate: 1000}}, 0)
	a.Set(Limits{IOPS: Limit{Rate: 100}}, 0)
	pa, pb := NewPath(&ns, &a), NewPath(&ns, &b)
	lines := []*line{
		{class: Read, bytes: 512, paths: []*Path{pa}}, {class: Write, bytes: 512, paths: []*Path{pa}},
		{class: Read, bytes: 512, paths: []*Path{pb}}, {class: Read, bytes: 1 << 20, paths: []*Path{pb}}, {class: Write, bytes: 512, paths: []*Path{pb}},
	}
	run(0, second, lines...) // the bursts
	var before [5]uint64
	for i, l := range lines {
		before[i] = l.gone
	}
	run(second, 11*second, lines...)
	sum := uint64(0)
	for i, l := range lines {
		n := l.gone - before[i]
		sum += n
		want := uint64(500) // 100 IOPS for two
		if i >= 2 {
			want = 3000
		}
		if n < want-2 || n > want+2 {
			t.Errorf("line %d has had %d commands instead of %d", i, n, want)
		}
	}
	if sum < 9_999 || sum > 10_001 {
		t.Errorf("%d commands in all", sum)
	}
}

// TestChange: a rate that changes counts from that moment, also for who waits; what is owed stays owed.
func TestChange(t *testing.T) {
	p, m := path(Limits{IOPS: Limit{Rate: 10, Burst: 1}})
	var first, second2, third Ticket
	if !p.Charge(&first, Read, 0, 0) || p.Charge(&second2, Read, 0, 0) || p.Charge(&third, Read, 0, 0) {
		t.Fatal("a burst of 1 is not one command")
	}
	if at := third.When(0); at != second/5 {
		t.Fatalf("the third goes at %v", time.Duration(at))
	}
	m.Set(Limits{IOPS: Limit{Rate: 1000, Burst: 1}}, second/20) // half of the second's token is there
	if at := second2.When(second / 20); at != second/20+second/2000 {
		t.Errorf("100 times as fast: the second goes at %v", time.Duration(at))
	}
	if at := third.When(second / 20); at != second/20+3*second/2000 {
		t.Errorf("100 times as fast: the third goes at %v", time.Duration(at))
	}
	m.Set(Limits{}, second/20)
	if at := third.When(second / 20); at != second/20 {
		t.Errorf("no limit: the third goes at %v", time.Duration(at))
	}
	if NewPath(m, nil) != nil {
		t.Error("there is a path through no limit")
	}
	m.Set(Limits{IOPS: Limit{Rate: 10, Burst: 5}}, second) // on again: full
	p = NewPath(m)
	for i := range 6 {
		first.Reset()
		if p.Charge(&first, Write, 0, second) != (i < 5) {
			t.Errorf("command %d after the limit was turned on again", i)
		}
	}
	m.Set(Limits{IOPS: Limit{Rate: 10, Burst: 100}}, second) // a larger burst is not there at once
	if first.Reset(); p.Charge(&first, Write, 0, second) {
		t.Error("a larger burst was given to who owes")
	}
	// The same limits again, however often, change nothing.
	p, m = path(Limits{IOPS: Limit{Rate: 7}})
	l := &line{class: Read, paths: []*Path{p}}
	run(0, second, l)
	before := l.gone
	for now := int64(second); now < 11*second; now += second / 30 {
		run(now, now+second/30, l)
		m.Set(Limits{IOPS: Limit{Rate: 7}}, now)
	}
	if n := l.gone - before; n < 69 || n > 71 {
		t.Errorf("%d commands in 10 s at 7 IOPS, set again and again", n)
	}
	for rate, now := uint64(1), int64(11*second); now < 21*second; now += second / 30 { // and neither loses nor makes parts of tokens
		run(now, now+second/30, l)
		rate ^= 6
		m.Set(Limits{IOPS: Limit{Rate: rate, Burst: 1}}, now) // 7 and 1: 4 on average
	}
	if n := l.gone - before; n < 108 || n > 112 {
		t.Errorf("%d commands in 10 s more at 4 IOPS on average", n-70)
	}
}

// TestOwe and refunds: what nobody waited for the next one waits for, and what was given back nobody.
func TestOwe(t *testing.T) {
	p, _ := path(Limits{Bandwidth: Limit{1 << 20, 1 << 20}, ReadBandwidth: Limit{1 << 20, 1 << 20}, WriteIOPS: Limit{Rate: 1}})
	var tk Ticket
	if !p.Charge(&tk, Write, 0, 10*second) { // a Copy, after a long time of nothing
		t.Fatal("held")
	}
	p.Owe(Read, 1<<20, 10*second)
	p.Owe(Write, 1<<20, 10*second)
	if tk.Reset(); p.Charge(&tk, Read, 512, 10*second) {
		t.Fatal("what a Copy moved was not paid for")
	}
	want := int64(11*second) + second/2048
	if at := tk.When(10 * second); at < want || at > want+1 {
		t.Errorf("1 MiB read and written takes until %v, not %v", time.Duration(at), time.Duration(want))
	}
	tk.Refund()
	if at := tk.When(10 * second); at != 10*second {
		t.Errorf("a ticket that was given back waits until %v", time.Duration(at))
	}
	if p.Charge(&tk, Read, 512, 10*second); tk.When(10*second) > want+1 {
		t.Errorf("after a refund it takes until %v", time.Duration(tk.When(10*second)))
	}
}

// TestAgainstModel compares a bucket with one that counts tokens as a textbook does, in fractions without rounding.
func TestAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := Limit{rapid.Uint64Range(1, 1<<40).Draw(t, "rate"), rapid.Uint64Range(1, 1<<40).Draw(t, "burst")}
		p, _ := path(Limits{Bandwidth: limit})
		burst := new(big.Rat).SetUint64(limit.Burst)
		level, now := new(big.Rat).Set(burst), int64(0)
		big64 := func(v uint64) *big.Rat { return new(big.Rat).SetUint64(v) }
		var tk Ticket
		for range rapid.IntRange(1, 50).Draw(t, "steps") {
			d := rapid.Int64Range(0, 1<<rapid.IntRange(0, 45).Draw(t, "magnitude")).Draw(t, "pause")
			now += d
			gain := new(big.Rat).Mul(big64(limit.Rate), big.NewRat(d, second))
			if level.Add(level, gain); level.Cmp(burst) > 0 {
				level.Set(burst)
			}
			cost := rapid.Uint64Range(1, 1<<rapid.IntRange(0, 41).Draw(t, "size")).Draw(t, "cost")
			need := big64(min(cost, limit.Burst))
			enough := level.Cmp(need) >= 0
			tk.Reset()
			got := p.Charge(&tk, Read, cost, now)
			// The clamp drops what is less than a token of those that are over the burst; nothing else is lost.
			if got != enough && new(big.Rat).Sub(level, need).Cmp(big.NewRat(1, 1)) >= 0 {
				t.Fatalf("%v tokens, %v needed of %d: may go: %v", level, need, cost, got)
			}
			if got && !enough && new(big.Rat).Sub(need, level).Cmp(big.NewRat(1, 1)) >= 0 {
				t.Fatalf("%v tokens, %v needed of %d: it may go", level, need, cost)
			}
			if !got {
				at := tk.When(now)
				if at <= now {
					t.Fatalf("held, and may go at once")
				}
				if r := p.by[Read][0].b.rate.Load(); at != never {
					n, _ := r.granted(at)
					early, _ := r.granted(at - 1)
					if int64(n-tk.places[0].at) < 0 || int64(early-tk.places[0].at) >= 0 {
						t.Fatalf("When is not the first moment")
					}
				}
			}
			level.Sub(level, big64(cost))
		}
	})
}

// TestManyWorkers: together they get what one would, and no command is paid for twice or never. The clock stands still but for what they advance it.
func TestManyWorkers(t *testing.T) {
	const workers, rate, burst = 4, 1000, 50
	p, m := path(Limits{IOPS: Limit{rate, burst}, Bandwidth: Limit{1 << 30, 0}})
	var now atomic.Int64
	var gone [workers]uint64
	var all sync.WaitGroup
	for i := range workers {
		all.Go(func() {
			var tk Ticket
			for seen := now.Load(); seen < 20*second; seen = now.Load() {
				tk.Reset()
				if p.Charge(&tk, Read, 4096, seen) {
					gone[i]++
					continue
				}
				for tk.When(now.Load()) > now.Load() {
					now.Add(100_000)
				}
				gone[i]++
				if gone[i]%512 == 0 {
					m.Set(Limits{IOPS: Limit{rate, burst + gone[i]%2}, Bandwidth: Limit{1 << 30, 0}}, now.Load())
				}
			}
		})
	}
	all.Wait()
	sum := uint64(0)
	for _, n := range gone {
		sum += n
	}
	granted := uint64(now.Load())*rate/second + burst
	if sum > granted+workers || sum+workers < granted {
		t.Errorf("%d commands of %d granted: %v", sum, granted, gone)
	}
}

// TestCheck names the field.
func TestCheck(t *testing.T) {
	for _, c := range []struct {
		l     Limits
		field string
	}{
		{Limits{}, ""},
		{Limits{IOPS: Limit{1, 1}, WriteBandwidth: Limit{Rate: MinBandwidth}}, ""},
		{Limits{ReadIOPS: Limit{0, 5}}, "read_iops_burst"},
		{Limits{IOPS: Limit{MaxRate + 1, 0}}, "iops"},
		{Limits{Bandwidth: Limit{100, 0}}, "bandwidth"},
		{Limits{WriteIOPS: Limit{100, MaxRate + 1}}, "write_iops_burst"},
	} {
		if field, err := c.l.Check(); field != c.field || (err == nil) != (field == "") {
			t.Errorf("%+v: %q, %v", c.l, field, err)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	p, _ := path(Limits{IOPS: Limit{Rate: 1000}, Bandwidth: Limit{Rate: 1 << 20}})
	var tk Ticket
	now := int64(0)
	if n := testing.AllocsPerRun(100, func() {
		tk.Reset()
		now += 1000
		if !p.Charge(&tk, Write, 4096, now) {
			tk.When(now)
			tk.Refund()
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkCharge(b *testing.B) {
	for _, c := range []struct {
		name string
		l    Limits
	}{
		{"iops", Limits{IOPS: Limit{Rate: MaxRate}}},
		{"iops+bandwidth", Limits{IOPS: Limit{Rate: MaxRate}, Bandwidth: Limit{Rate: MaxRate}}},
		{"1GiB/s", Limits{Bandwidth: Limit{1 << 30, MaxRate}}},
	} {
		b.Run(c.name, func(b *testing.B) {
			p, _ := path(c.l)
			var tk Ticket
			now := int64(0)
			for b.Loop() {
				tk.Reset()
				now += 100
				p.Charge(&tk, Read, 4096, now)
			}
		})
	}
}
