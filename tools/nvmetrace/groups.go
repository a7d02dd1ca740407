package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/latency"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// by says what latencies are told apart by.
type by struct{ device, queue, opcode, size bool }

func makeBy(names []string) (b by) {
	for _, n := range names {
		switch n {
		case "device":
			b.device = true
		case "queue":
			b.queue = true
		case "opcode":
			b.opcode = true
		case "size":
			b.size = true
		}
	}
	return b
}

// group is the commands that are told apart from others, and their latencies. Its fields are documented in latencyHelp.
type group struct {
	Name    string      `json:"name"`
	Device  string      `json:"device,omitempty"`
	QID     *uint16     `json:"qid,omitempty"`
	Command string      `json:"command,omitempty"`
	Size    string      `json:"size,omitempty"`
	Count   uint64      `json:"count"`
	Errors  uint64      `json:"errors"`
	Bytes   uint64      `json:"bytes"`
	Mean    int64       `json:"mean_ns"`
	P50     int64       `json:"p50_ns"`
	P90     int64       `json:"p90_ns"`
	P99     int64       `json:"p99_ns"`
	P999    int64       `json:"p999_ns"`
	Max     int64       `json:"max_ns"`
	Buckets [][3]uint64 `json:"buckets"` // from, below, count

	lat latency.Histogram
}

// groupsOf puts the cells of s together, those of most commands first. by without a device puts all devices together.
func groupsOf(s *trace.Snapshot, b by) []*group {
	all := map[string]*group{}
	add := func(g group, count, errors, bytes uint64, lat *latency.Histogram) {
		if count == 0 || lat == nil {
			return
		}
		var parts []string
		if g.Device != "" {
			parts = append(parts, g.Device)
		}
		if g.QID != nil {
			parts = append(parts, queueName(*g.QID))
		}
		for _, p := range []string{g.Command, g.Size} {
			if p != "" {
				parts = append(parts, p)
			}
		}
		g.Name = cmp.Or(strings.Join(parts, " "), "all commands")
		have := all[g.Name]
		if have == nil {
			have = &g
			all[g.Name] = have
		}
		have.Count, have.Errors, have.Bytes = have.Count+count, have.Errors+errors, have.Bytes+bytes
		have.lat.Merge(lat)
	}
	for _, c := range s.Cells {
		g := group{}
		if b.device {
			g.Device = device(c.Device).String()
		}
		if b.queue {
			g.QID = &c.QID
		}
		if b.opcode {
			g.Command = opcodeName(c.QID, c.Opcode)
		}
		if b.size {
			g.Size = sizeName(c.SizeClass)
		}
		add(g, c.Count, c.Errors, c.Bytes, c.Latency)
	}
	for _, c := range s.Block {
		op := cmp.Or(blockOps[c.Op], fmt.Sprintf("op %#x", c.Op))
		disk := printable(c.Disk)
		add(group{Device: disk, Command: op}, c.Count, 0, c.Bytes, c.InDevice)
		add(group{Device: disk, Command: op + " queued"}, queuedCount(c), 0, 0, c.Queued)
	}
	out := make([]*group, 0, len(all))
	for _, g := range all {
		g.finish()
		out = append(out, g)
	}
	slices.SortFunc(out, func(a, b *group) int { return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Name, b.Name)) })
	return out
}

// queuedCount is how many requests waited above the driver: without a scheduler none does.
func queuedCount(c trace.BlockCell) uint64 {
	if c.Queued == nil {
		return 0
	}
	return c.Queued.Count()
}

func (g *group) finish() {
	h := &g.lat
	g.Mean, g.Max = int64(h.Mean()), int64(h.Max())
	g.P50, g.P90, g.P99, g.P999 = int64(h.Quantile(0.5)), int64(h.Quantile(0.9)), int64(h.Quantile(0.99)), int64(h.Quantile(0.999))
	for b := range h.All() {
		g.Buckets = append(g.Buckets, [3]uint64{uint64(b.Low), uint64(b.High), b.Count})
	}
}

// groupTable is the percentiles of groups.
func groupTable(groups []*group) string {
	t := text.Table{Head: []string{"", "commands", "mean", "p50", "p90", "p99", "p99.9", "max", "errors"}}
	for _, g := range groups {
		t.Add(g.Name, text.Count(float64(g.Count)), ns(g.Mean), ns(g.P50), ns(g.P90), ns(g.P99), ns(g.P999), ns(g.Max), nonzero(g.Errors))
	}
	return t.String()
}

const maxBars = 24

// histogram draws g's latencies as bars, of half a power of two each, or of a whole one if they would be more than maxBars.
func histogram(g *group, width int, unicode bool) string {
	bars := barsOf(&g.lat, 2)
	if len(bars) > maxBars {
		bars = barsOf(&g.lat, 1)
	}
	var out []text.Bar
	for _, b := range bars {
		out = append(out, text.Bar{Label: fmt.Sprintf("%8s - %-8s", ns(int64(b.Low)), ns(int64(b.High))), Value: float64(b.Count),
			Text: fmt.Sprintf("%s  %.1f %%", text.Count(float64(b.Count)), 100*float64(b.Count)/float64(g.Count))})
	}
	return fmt.Sprintf("%s: %s commands\n%s", g.Name, text.Count(float64(g.Count)), text.Bars(out, width, unicode))
}

// barsOf is h in parts of a power of two, from the first that has anything to the last.
func barsOf(h *latency.Histogram, parts int) []latency.Bucket {
	counts := map[int]uint64{}
	first, last := -1, -1
	for b := range h.All() {
		i := part(b.Low, parts)
		counts[i] += b.Count
		if first < 0 {
			first = i
		}
		last = i
	}
	if first < 0 {
		return nil
	}
	var out []latency.Bucket
	for i := first; i <= last; i++ {
		out = append(out, latency.Bucket{Low: partLow(i, parts), High: partLow(i+1, parts), Count: counts[i]})
	}
	return out
}

// part returns which part of which power of two d is in, counted from the power of 1 ns; parts is 1, 2, 4, 8 or 16 a power. Below 16 ns all is
// one part.
func part(d time.Duration, parts int) int {
	d = max(d, 16)
	power := 0
	for v := d; v > 1; v >>= 1 {
		power++
	}
	return power*parts + int((d-1<<power)*time.Duration(parts)>>power)
}

// partLow is the least d of a part.
func partLow(i, parts int) time.Duration {
	power := i / parts
	return 1<<power + time.Duration(i%parts)<<power/time.Duration(parts)
}
