package main

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/latency"
)

// counter counts events as the programs in the kernel do, for records.
type counter struct {
	cells  map[trace.Key]*trace.Cell
	queues map[[2]uint16]*trace.Queue
	first  int64 // ns of CLOCK_MONOTONIC; of the first event
	last   int64
	any    bool
}

func newCounter() *counter {
	return &counter{cells: map[trace.Key]*trace.Cell{}, queues: map[[2]uint16]*trace.Queue{}}
}

func (c *counter) queue(e *trace.Event) *trace.Queue {
	qid := e.QID
	if e.Kind == trace.Reset || e.Kind == trace.AsyncEvent {
		qid = 0
	}
	k := [2]uint16{e.Device, qid}
	q := c.queues[k]
	if q == nil {
		q = &trace.Queue{Device: e.Device, QID: qid}
		c.queues[k] = q
	}
	return q
}

// add counts one event.
func (c *counter) add(e *trace.Event) {
	if !c.any {
		c.first, c.any = e.Time, true
	}
	c.last = max(c.last, e.Time)
	q := c.queue(e)
	switch e.Kind {
	case trace.Start:
		q.Started++
		q.Depth++
		q.DepthMax = max(q.DepthMax, q.Depth)
	case trace.End:
		q.Ended++
		if q.Depth > 0 { // a record may begin, or have lost something, between the two
			q.Depth--
		}
		k := trace.Key{Device: e.Device, QID: e.QID, Opcode: e.Opcode, SizeClass: trace.SizeClassOf(e.Bytes)}
		cell := c.cells[k]
		if cell == nil {
			cell = &trace.Cell{Key: k, Latency: new(latency.Histogram)}
			c.cells[k] = cell
		}
		cell.Count++
		cell.Bytes += uint64(e.Bytes)
		if e.Status != 0 {
			cell.Errors++
		}
		if e.Retries > 0 {
			cell.Retries++
		}
		cell.Latency.Record(time.Duration(e.Latency), 1)
	case trace.AsyncEvent:
		q.AERs++
	case trace.Timeout:
		q.Timeouts++
	case trace.Reset:
		q.Resets++
	case trace.Doorbell:
		q.SQHead, q.SQTail = e.SQHead, e.SQTail
	}
}

// snapshot is what was counted, of which the caller may change everything.
func (c *counter) snapshot() *trace.Snapshot {
	s := &trace.Snapshot{Since: time.Duration(c.last - c.first)}
	for _, cell := range c.cells {
		copied := *cell
		copied.Latency = new(latency.Histogram)
		copied.Latency.Merge(cell.Latency)
		s.Cells = append(s.Cells, copied)
	}
	for _, k := range slices.SortedFunc(maps.Keys(c.queues), func(a, b [2]uint16) int { return cmp.Or(cmp.Compare(a[0], b[0]), cmp.Compare(a[1], b[1])) }) {
		s.Queues = append(s.Queues, *c.queues[k])
	}
	return s
}
