package main

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/latency"
	"github.com/shadowbell/shadowbell/tools/internal/size"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// node is one line of top with what it is made of: a device of its queues, a queue of its kinds of commands. Its fields are documented in
// topHelp. Pointers are nil where nobody knows the figure.
type node struct {
	Source   string   `json:"source"`        // nvme: the kernel's queues; block: its disks; hostmed: the mediator's queues
	Name     string   `json:"name"`          // nvme0, queue 1, Read <=4 KiB; unique among the parts of one node
	QID      *uint16  `json:"qid,omitempty"` // of a queue and its parts
	Opcode   *uint8   `json:"opcode,omitempty"`
	State    string   `json:"state,omitempty"` // hostmed: of the queue
	Commands uint64   `json:"commands"`        // completed in the interval
	IOPS     float64  `json:"iops"`
	MiB      *float64 `json:"mib_s,omitempty"`
	Depth    *int64   `json:"depth,omitempty"`
	DepthMax *int64   `json:"depth_max,omitempty"`
	P50      *int64   `json:"p50_ns,omitempty"`
	P99      *int64   `json:"p99_ns,omitempty"`
	Max      *int64   `json:"max_ns,omitempty"`
	Errors   uint64   `json:"errors"`
	Retries  uint64   `json:"retries"`
	Timeouts uint64   `json:"timeouts"`
	Resets   uint64   `json:"resets,omitempty"`
	AERs     uint64   `json:"async_events,omitempty"`
	Orphans  uint64   `json:"orphans,omitempty"`
	Tails    uint64   `json:"tail_moves,omitempty"`
	IRQs     uint64   `json:"interrupts,omitempty"`
	MMIO     *float64 `json:"mmio_per_io,omitempty"`
	Parts    []*node  `json:"parts,omitempty"`

	bytes uint64
	lat   *latency.Histogram
	order int // the natural order among the parts of one node
}

// kernelNodes are the devices of the kernel's nvme driver, of what came within seconds.
func kernelNodes(s *trace.Snapshot, seconds float64) []*node {
	devices := map[uint16]*node{}
	queues := map[[2]uint16]*node{}
	dev := func(d uint16) *node {
		n := devices[d]
		if n == nil {
			n = &node{Source: "nvme", Name: device(d).String(), order: int(d), lat: new(latency.Histogram), Depth: new(int64), DepthMax: new(int64)}
			devices[d] = n
		}
		return n
	}
	queue := func(d, q uint16) *node {
		n := queues[[2]uint16{d, q}]
		if n == nil {
			n = &node{Source: "nvme", Name: queueName(q), QID: &q, order: int(q), lat: new(latency.Histogram)}
			queues[[2]uint16{d, q}] = n
			parent := dev(d)
			parent.Parts = append(parent.Parts, n)
		}
		return n
	}
	for _, q := range s.Queues {
		n := queue(q.Device, q.QID)
		n.Depth, n.DepthMax = &q.Depth, &q.DepthMax
		n.Timeouts, n.Resets, n.AERs, n.Orphans, n.Tails, n.IRQs = q.Timeouts, q.Resets, q.AERs, q.Orphans, q.Publishes, q.Interrupts
		d := dev(q.Device)
		if q.QID != 0 { // event requests always are
			*d.Depth += q.Depth
			*d.DepthMax = max(*d.DepthMax, q.DepthMax)
		}
		d.Timeouts, d.Resets, d.AERs, d.Orphans = d.Timeouts+q.Timeouts, d.Resets+q.Resets, d.AERs+q.AERs, d.Orphans+q.Orphans
		d.Tails, d.IRQs = d.Tails+q.Publishes, d.IRQs+q.Interrupts
	}
	for _, c := range s.Cells {
		if c.Count == 0 {
			continue
		}
		n := &node{Source: "nvme", Name: cellName(c.Key), QID: &c.QID, Opcode: &c.Opcode, order: int(c.Opcode)<<8 | int(c.SizeClass), lat: c.Latency}
		q := queue(c.Device, c.QID)
		q.Parts = append(q.Parts, n)
		for _, n := range []*node{n, q, dev(c.Device)} {
			n.Commands, n.bytes, n.Errors, n.Retries = n.Commands+c.Count, n.bytes+c.Bytes, n.Errors+c.Errors, n.Retries+c.Retries
			if n.lat != c.Latency && c.Latency != nil {
				n.lat.Merge(c.Latency)
			}
		}
	}
	return finish(devices, seconds)
}

// blockOps are the operations of a BlockCell.
var blockOps = map[byte]string{'R': "read", 'W': "write", 'F': "flush", 'D': "discard", 'O': "other"}

// blockNodes are the disks of the block layer; latencies are from issue to completion.
func blockNodes(s *trace.Snapshot, seconds float64) []*node {
	disks := map[string]*node{}
	for _, c := range s.Block {
		d := disks[c.Disk]
		if d == nil {
			d = &node{Source: "block", Name: printable(c.Disk), lat: new(latency.Histogram)}
			disks[c.Disk] = d
		}
		if c.Count == 0 {
			continue
		}
		name := blockOps[c.Op]
		if name == "" {
			name = fmt.Sprintf("op %#x", c.Op)
		}
		n := &node{Source: "block", Name: name, order: int(c.Op), lat: c.InDevice}
		d.Parts = append(d.Parts, n)
		for _, n := range []*node{n, d} {
			n.Commands, n.bytes = n.Commands+c.Count, n.bytes+c.Bytes
		}
		if c.InDevice != nil {
			d.lat.Merge(c.InDevice)
		}
	}
	return finish(disks, seconds)
}

// finish sorts nodes and their parts and fills in what follows from the sums.
func finish[K cmp.Ordered](nodes map[K]*node, seconds float64) []*node {
	all := make([]*node, 0, len(nodes))
	for _, n := range nodes {
		all = append(all, n)
	}
	var each func([]*node)
	each = func(list []*node) {
		slices.SortFunc(list, func(a, b *node) int { return cmp.Or(cmp.Compare(a.order, b.order), cmp.Compare(a.Name, b.Name)) })
		for _, n := range list {
			n.rates(seconds)
			each(n.Parts)
		}
	}
	each(all)
	return all
}

func (n *node) rates(seconds float64) {
	if seconds > 0 {
		n.IOPS = float64(n.Commands) / seconds
		if n.Source != "hostmed" {
			mib := float64(n.bytes) / seconds / (1 << 20)
			n.MiB = &mib
		}
	}
	if n.lat != nil && n.lat.Count() > 0 {
		ns := func(d time.Duration) *int64 { v := int64(d); return &v }
		n.P50, n.P99, n.Max = ns(n.lat.Quantile(0.5)), ns(n.lat.Quantile(0.99)), ns(n.lat.Max())
	}
}

// busy says whether anything happened.
func (n *node) busy() bool {
	return n.Commands > 0 || n.Timeouts > 0 || n.Resets > 0 || n.AERs > 0 || n.Depth != nil && *n.Depth > 0
}

func queueName(q uint16) string {
	if q == 0 {
		return "admin queue"
	}
	return fmt.Sprintf("queue %d", q)
}

func cellName(k trace.Key) string {
	name := opcodeName(k.QID, k.Opcode)
	if s := sizeName(k.SizeClass); s != "" {
		name += " " + s
	}
	return name
}

// sizeName is a size class as it is shown: "<=4 KiB" is more than 2 KiB and up to 4. It is empty for commands without data.
func sizeName(class uint8) string {
	switch limit := trace.SizeClassLimit(class); {
	case limit > 0:
		return "<=" + size.Bytes(limit).String()
	case class == 0:
		return ""
	}
	return ">" + size.Bytes(trace.SizeClassLimit(trace.SizeClasses-2)).String()
}

// column is one of a node's figures as it is shown.
type column struct {
	head  string
	wide  int // with the space before it, in the live table
	cell  func(*node) string
	value func(*node) float64 // what is sorted by; nil: the natural order
}

func optional(v *int64, show func(int64) string) string {
	if v == nil {
		return "-"
	}
	return show(*v)
}

func number(v *int64) float64 {
	if v == nil {
		return -1
	}
	return float64(*v)
}

func ns(v int64) string { return text.Duration(time.Duration(v)) }

func nonzero(n uint64) string {
	if n == 0 {
		return "-"
	}
	return text.Count(float64(n))
}

// columns are those of top, beside the name.
var columns = []column{
	{"IOPS", 9, func(n *node) string { return text.Count(n.IOPS) }, func(n *node) float64 { return n.IOPS }},
	{"MiB/s", 7, func(n *node) string { return rate(n.MiB) }, func(n *node) float64 {
		if n.MiB == nil {
			return -1
		}
		return *n.MiB
	}},
	{"depth", 6, func(n *node) string { return optional(n.Depth, func(v int64) string { return fmt.Sprint(v) }) }, func(n *node) float64 { return number(n.Depth) }},
	{"max", 5, func(n *node) string { return optional(n.DepthMax, func(v int64) string { return fmt.Sprint(v) }) }, func(n *node) float64 { return number(n.DepthMax) }},
	{"p50", 9, func(n *node) string { return optional(n.P50, ns) }, func(n *node) float64 { return number(n.P50) }},
	{"p99", 9, func(n *node) string { return optional(n.P99, ns) }, func(n *node) float64 { return number(n.P99) }},
	{"errors", 8, func(n *node) string { return nonzero(n.Errors) }, func(n *node) float64 { return float64(n.Errors) }},
	{"t.outs", 8, func(n *node) string { return nonzero(n.Timeouts) }, func(n *node) float64 { return float64(n.Timeouts) }},
	{"resets", 8, func(n *node) string { return nonzero(n.Resets) }, func(n *node) float64 { return float64(n.Resets) }},
	{"MMIO/IO", 9, func(n *node) string { return ratio(n.MMIO) }, func(n *node) float64 {
		if n.MMIO == nil {
			return -1
		}
		return *n.MMIO
	}},
}

func ratio(v *float64) string {
	if v == nil {
		return "-"
	}
	return text.Ratio(*v)
}

// rate prints MiB/s: small ones with a digit.
func rate(v *float64) string {
	switch {
	case v == nil:
		return "-"
	case *v > 0 && *v < 10:
		return fmt.Sprintf("%.1f", *v)
	}
	return text.Count(*v)
}
