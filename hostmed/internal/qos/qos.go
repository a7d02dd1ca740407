// Package qos limits how many commands and bytes a second a namespace or a controller may use: token buckets that all
// workers share without a lock, and tickets for commands that have to wait.
//
// It knows no queue and starts no timer. Who has a command asks [Path.Charge], which pays for it at once, so that a bucket may come to be in
// debt, and says whether the command may go already. If not, its [Ticket] is a place in the line: [Ticket.When] is when its turn comes. Since
// places are given in the order of asking, on whichever worker, who asks for one command after the other has the same part of a limit as
// everybody else who does.
//
// All times are nanoseconds of one clock, which its callers read.
package qos

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/hostmed/backend"
)

// Limit is a rate, and how much of it may be used at once after a time of less.
type Limit struct {
	Rate  uint64 // a second; 0: no limit
	Burst uint64 // 0: what the rate gives in DefaultBurst
}

// DefaultBurst is 1/DefaultBurst of a second. Less would be lost whenever a worker or a guest is not run for that long; more shows in the rate over a few seconds.
const DefaultBurst = 10

// Bounds of a Limit. A bandwidth below MinBandwidth is a unit forgotten.
const (
	MinBandwidth = 4 << 10
	MaxRate      = 1 << 50
)

// Limits are what a namespace or a controller may use. IOPS and Bandwidth are of all commands together; Read… and Write… are limits
// beside them.
type Limits struct {
	IOPS, ReadIOPS, WriteIOPS                Limit // commands
	Bandwidth, ReadBandwidth, WriteBandwidth Limit // bytes
}

// unit is what a bucket counts, and side whose.
type (
	unit uint8
	side uint8
)

const (
	commands unit = iota
	bytes
	units
)

const (
	both side = iota
	reads
	writes
	sides
)

// Field is one of Limits.
type Field struct {
	Name  string // as configurations have it; that of its burst ends in _burst
	Bytes bool
	Limit *Limit
}

// Fields are all of l.
func (l *Limits) Fields() [6]Field {
	return [...]Field{
		{"iops", false, &l.IOPS}, {"read_iops", false, &l.ReadIOPS}, {"write_iops", false, &l.WriteIOPS},
		{"bandwidth", true, &l.Bandwidth}, {"read_bandwidth", true, &l.ReadBandwidth}, {"write_bandwidth", true, &l.WriteBandwidth},
	}
}

// String is l as the command line has it.
func (l Limits) String() string {
	var parts []string
	for _, f := range l.Fields() {
		format := func(n uint64) string { return strconv.FormatUint(n, 10) }
		if f.Bytes {
			format = backend.FormatSize
		}
		if f.Limit.Rate != 0 {
			parts = append(parts, f.Name+"="+format(f.Limit.Rate))
		}
		if f.Limit.Burst != 0 {
			parts = append(parts, f.Name+"_burst="+format(f.Limit.Burst))
		}
	}
	if parts == nil {
		return "none"
	}
	return strings.Join(parts, ",")
}

// Check says what is wrong with l, and with which field.
func (l Limits) Check() (field string, err error) {
	for _, f := range l.Fields() {
		switch x := f.Limit; {
		case x.Rate == 0 && x.Burst != 0:
			return f.Name + "_burst", fmt.Errorf("%s_burst: a burst of what has no limit: give %s too", f.Name, f.Name)
		case x.Rate > MaxRate:
			return f.Name, fmt.Errorf("%s: %d a second is more than any medium can: leave it out for no limit", f.Name, x.Rate)
		case x.Burst > MaxRate:
			return f.Name + "_burst", fmt.Errorf("%s_burst: %d is too much: leave it out for a tenth of a second's worth", f.Name, x.Burst)
		case f.Bytes && x.Rate != 0 && x.Rate < MinBandwidth:
			return f.Name, fmt.Errorf("%s: %d bytes a second is less than one block: is a unit missing, as in 100MiB?", f.Name, x.Rate)
		}
	}
	return "", nil
}

// Limiter is the buckets of one namespace or one controller. It is there whether there are limits or not.
type Limiter struct {
	buckets [units][sides]bucket

	mu     sync.Mutex // guards limits, and writers of the buckets' rates
	limits Limits

	held    atomic.Uint64
	heldFor atomic.Int64
}

// Set makes l the limits from now on. What a bucket has, or owes, it keeps; one that was off is full. Whoever waits by a Ticket of older
// limits is to ask it again.
func (m *Limiter) Set(l Limits, now int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limits = l
	for i, f := range l.Fields() {
		m.buckets[i/int(sides)][i%int(sides)].set(*f.Limit, now)
	}
}

// Limits are what was set last.
func (m *Limiter) Limits() Limits {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.limits
}

// CountHeld counts a command that had to wait for d ns.
func (m *Limiter) CountHeld(d int64) {
	m.held.Add(1)
	m.heldFor.Add(d)
}

// Held is how many commands had to wait, and for how many ns in all.
func (m *Limiter) Held() (commands uint64, ns int64) { return m.held.Load(), m.heldFor.Load() }

// Class is which of the limits a command meets.
type Class uint8

// The classes.
const (
	Other Class = iota // IOPS
	Read               // and ReadIOPS, Bandwidth, ReadBandwidth
	Write              // and WriteIOPS, Bandwidth, WriteBandwidth
	Classes
)

// Path is the buckets that commands of one controller for one namespace meet. It does not change: where other buckets are in use another Path is
// made.
type Path struct {
	by [Classes][]meter
}

type meter struct {
	b    *bucket
	unit unit
}

// NewPath returns the path through the buckets in use of all of ms, some of which may be nil; nil if there is none.
func NewPath(ms ...*Limiter) *Path {
	p, any := &Path{}, false
	for _, m := range ms {
		if m == nil {
			continue
		}
		for u := range units {
			for s := range sides {
				b := &m.buckets[u][s]
				if b.rate.Load() == nil {
					continue
				}
				any = true
				for c := range Classes {
					if s == both && (c != Other || u == commands) || s == reads && c == Read || s == writes && c == Write {
						p.by[c] = append(p.by[c], meter{b, u})
					}
				}
			}
		}
	}
	if !any {
		return nil
	}
	return p
}

// Charge pays for one command of class c that moves n bytes, and reports whether it may go now. If not, the place that it has in the line
// is added to t.
func (p *Path) Charge(t *Ticket, c Class, n uint64, now int64) bool {
	may := true
	for _, m := range p.by[c] {
		cost := uint64(1)
		if m.unit == bytes {
			if cost = n; cost == 0 {
				continue
			}
		}
		if !m.b.charge(t, cost, now) {
			may = false
		}
	}
	return may
}

// ChargeBytes is Charge for n bytes of a command that is paid for as one of another class.
func (p *Path) ChargeBytes(t *Ticket, c Class, n uint64, now int64) bool {
	may := true
	for _, m := range p.by[c] {
		if m.unit == bytes && !m.b.charge(t, n, now) {
			may = false
		}
	}
	return may
}

// Owe pays for n bytes of class c that nobody waits for: those who come later do.
func (p *Path) Owe(c Class, n uint64, now int64) {
	for _, m := range p.by[c] {
		if m.unit == bytes {
			m.b.owe(n, now)
		}
	}
}
