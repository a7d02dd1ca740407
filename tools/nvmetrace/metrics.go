package main

import (
	"context"
	"fmt"
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/latency"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// metric is one family: its name, what it says, and its labels.
type metric struct {
	name, help string
	kind       prometheus.ValueType
	labels     []string
	desc       *prometheus.Desc
}

// families are all that export has, in the order of --help. Histograms are of kind 0.
var families []*metric

func family(kind prometheus.ValueType, name, help string, labels ...string) *metric {
	m := &metric{"nvmetrace_" + name, help, kind, labels, prometheus.NewDesc("nvmetrace_"+name, help, labels, nil)}
	families = append(families, m)
	return m
}

const (
	counterKind   = prometheus.CounterValue
	gaugeKind     = prometheus.GaugeValue
	histogramKind = prometheus.ValueType(0)
)

// The kernel's queues.
var (
	mCommands = family(counterKind, "commands_total", "Commands that ended.", "device", "queue", "opcode")
	mErrors   = family(counterKind, "command_errors_total", "Of them, with a status that is not 0.", "device", "queue", "opcode")
	mRetries  = family(counterKind, "command_retries_total", "Of them, tried before.", "device", "queue", "opcode")
	mBytes    = family(counterKind, "bytes_total", "Bytes of their data.", "device", "queue", "opcode")
	mLatency  = family(histogramKind, "command_latency_seconds", "From nvme_setup_cmd to nvme_complete_rq.", "device", "opcode")
	mStarted  = family(counterKind, "started_total", "Commands that started.", "device", "queue")
	mDepth    = family(gaugeKind, "queue_depth", "Commands under way.", "device", "queue")
	mTail     = family(counterKind, "tail_moves_total", "Times that the driver moved the SQ tail: a doorbell each, unless shared doorbells spare it.", "device", "queue")
	mIRQ      = family(counterKind, "interrupts_total", "Interrupts that found completions.", "device", "queue")
	mTimeouts = family(counterKind, "timeouts_total", "Commands that timed out.", "device", "queue")
	mResets   = family(counterKind, "resets_total", "Resets of the controller by its driver.", "device")
	mAERs     = family(counterKind, "async_events_total", "Asynchronous events.", "device")
	mOrphans  = family(counterKind, "orphans_total", "Commands that ended and began before nvmetrace did; not in commands_total.", "device", "queue")
	mLost     = family(counterKind, "lost_total", "What was not counted: events that found no room in the ring, commands that found none in a map, programs that the kernel did not run.", "where")

	mDiskRequests = family(counterKind, "disk_requests_total", "Requests of the block layer that ended (--block).", "disk", "op")
	mDiskBytes    = family(counterKind, "disk_bytes_total", "Bytes of their data.", "disk", "op")
	mDiskLatency  = family(histogramKind, "disk_latency_seconds", "From block_rq_issue to block_rq_complete.", "disk", "op")

	mExits = family(counterKind, "vm_exits_total", "Exits of the virtual machine (--vm): all, mmio, and ioeventfd, MMIO that KVM signals itself.", "pid", "kind")
)

// hostmed's queues. They begin anew when a client creates a queue.
var (
	mUp          = family(gaugeKind, "hostmed_up", "1 if hostmed's control socket answers (--control).")
	mHCommands   = family(counterKind, "hostmed_commands_total", "Commands fetched.", "controller", "queue")
	mHKicks      = family(counterKind, "hostmed_doorbells_total", "Doorbell messages: MMIO writes of the guest. bell is sq or cq, and queue the number of that.", "controller", "queue", "bell")
	mHArmed      = family(counterKind, "hostmed_sleeps_total", "Times that the queue went to sleep.", "controller", "queue")
	mHLost       = family(counterKind, "hostmed_arms_lost_total", "Times that a new tail was found instead.", "controller", "queue")
	mHSpurious   = family(counterKind, "hostmed_spurious_doorbells_total", "Doorbell messages that found nothing new.", "controller", "queue")
	mHInterrupts = family(counterKind, "hostmed_interrupts_total", "Interrupts raised, by the CQ's number.", "controller", "queue")
	mHInflight   = family(gaugeKind, "hostmed_inflight", "Commands fetched and not completed.", "controller", "queue")
	mHState      = family(gaugeKind, "hostmed_queue_polling", "1 while the queue is polled, 0 while it sleeps or is away.", "controller", "queue")
)

// ioLabels and adminLabels are the values of the label opcode, by opcode; the rest is "other".
var ioLabels, adminLabels = labels(nvme.IOOpcodes()), labels(nvme.AdminOpcodes())

const otherLabel = "other"

func labels(names func(func(uint8, string) bool)) (l [256]string) {
	for i := range l {
		l[i] = otherLabel
	}
	for op, name := range names {
		l[op] = slug(name)
	}
	return l
}

func opcodeLabel(qid uint16, code uint8) string {
	if qid == 0 {
		return adminLabels[code]
	}
	return ioLabels[code]
}

func queueLabel(q uint16) string { return strconv.Itoa(int(q)) }

// collector is a prometheus.Collector of one sampler. Each collection is one look.
type collector struct {
	ctx     context.Context
	sampler *sampler
	filter  *filterFlags
	vm      uint32

	mu sync.Mutex // one look at a time
}

// Describe is part of prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, f := range families {
		out <- f.desc
	}
}

// Collect is part of prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sampler.src != nil {
		s, err := c.sampler.src.Snapshot()
		if err != nil {
			out <- prometheus.NewInvalidMetric(mCommands.desc, err)
		} else {
			collectKernel(out, c.filter.only(s))
			c.collectVM(out, s)
		}
	}
	if c.sampler.control != nil {
		m, err := c.sampler.control.inspect(c.ctx)
		if err != nil { // hostmed may be restarted meanwhile
			emit(out, mUp, 0)
		} else {
			emit(out, mUp, 1)
			collectMediator(out, m)
		}
	}
}

func emit(out chan<- prometheus.Metric, m *metric, v float64, labels ...string) {
	out <- prometheus.MustNewConstMetric(m.desc, m.kind, v, labels...)
}

// emitHistogram has the bounds of Histogram.Cumulative, which never change: 27 powers of two from 1.02 us to 69 s.
func emitHistogram(out chan<- prometheus.Metric, m *metric, h *latency.Histogram, labels ...string) {
	buckets := map[float64]uint64{}
	for bound, n := range h.Cumulative() {
		buckets[bound.Seconds()] = n
	}
	out <- prometheus.MustNewConstHistogram(m.desc, h.Count(), h.Sum().Seconds(), buckets, labels...)
}

func collectKernel(out chan<- prometheus.Metric, s *trace.Snapshot) {
	type queueOp struct{ device, queue, opcode string }
	type deviceOp struct{ device, opcode string }
	sums := map[queueOp]*trace.Cell{}
	lats := map[deviceOp]*latency.Histogram{}
	for _, c := range s.Cells {
		dev, op := device(c.Device).String(), opcodeLabel(c.QID, c.Opcode)
		k := queueOp{dev, queueLabel(c.QID), op}
		if sums[k] == nil {
			sums[k] = &trace.Cell{}
		}
		sum := sums[k]
		sum.Count, sum.Errors, sum.Retries, sum.Bytes = sum.Count+c.Count, sum.Errors+c.Errors, sum.Retries+c.Retries, sum.Bytes+c.Bytes
		if c.Latency != nil {
			d := deviceOp{dev, op}
			if lats[d] == nil {
				lats[d] = new(latency.Histogram)
			}
			lats[d].Merge(c.Latency)
		}
	}
	for k, c := range sums {
		for m, v := range map[*metric]uint64{mCommands: c.Count, mErrors: c.Errors, mRetries: c.Retries, mBytes: c.Bytes} {
			emit(out, m, float64(v), k.device, k.queue, k.opcode)
		}
	}
	for k, h := range lats {
		emitHistogram(out, mLatency, h, k.device, k.opcode)
	}
	resets, aers := map[string]uint64{}, map[string]uint64{}
	for _, q := range s.Queues {
		dev, queue := device(q.Device).String(), queueLabel(q.QID)
		resets[dev] += q.Resets
		aers[dev] += q.AERs
		emit(out, mDepth, float64(q.Depth), dev, queue)
		for m, v := range map[*metric]uint64{mStarted: q.Started, mTail: q.Publishes, mIRQ: q.Interrupts, mTimeouts: q.Timeouts, mOrphans: q.Orphans} {
			if v == 0 && (m == mTail || m == mIRQ) { // without --driver nobody counts them
				continue
			}
			emit(out, m, float64(v), dev, queue)
		}
	}
	for dev := range resets {
		emit(out, mResets, float64(resets[dev]), dev)
		emit(out, mAERs, float64(aers[dev]), dev)
	}
	for _, c := range s.Block {
		op := blockOps[c.Op]
		if op == "" {
			op = otherLabel
		}
		disk := printable(c.Disk)
		emit(out, mDiskRequests, float64(c.Count), disk, op)
		emit(out, mDiskBytes, float64(c.Bytes), disk, op)
		if c.InDevice != nil {
			emitHistogram(out, mDiskLatency, c.InDevice, disk, op)
		}
	}
	for where, n := range map[string]uint64{"ring": s.Losses.Ring, "map": s.Losses.Map, "recursion": s.Losses.Recursion} {
		emit(out, mLost, float64(n), where)
	}
}

// collectVM is what KVM counted of the one virtual machine that was named.
func (c *collector) collectVM(out chan<- prometheus.Metric, s *trace.Snapshot) {
	for _, e := range s.KVM {
		if c.vm == 0 || e.PID != c.vm {
			continue
		}
		pid := strconv.Itoa(int(e.PID))
		emit(out, mExits, float64(e.Exits), pid, "all")
		emit(out, mExits, float64(e.MMIO), pid, "mmio")
		emit(out, mExits, float64(e.FastMMIO), pid, "ioeventfd")
	}
}

func collectMediator(out chan<- prometheus.Metric, s *inspect.Snapshot) {
	for i := range s.Controllers {
		c := &s.Controllers[i]
		ctrl := printable(c.Socket)
		sqs, cqs := map[uint16]bool{}, map[uint16]bool{} // a CQ that several SQs feed is counted once
		for j := range c.Queues {
			q := &c.Queues[j]
			if !cqs[q.CQID] {
				cqs[q.CQID] = true
				emit(out, mHInterrupts, float64(q.Interrupts), ctrl, queueLabel(q.CQID))
				emit(out, mHKicks, float64(q.CQKicks), ctrl, queueLabel(q.CQID), "cq")
			}
			if sqs[q.QID] {
				continue
			}
			sqs[q.QID] = true
			queue := queueLabel(q.QID)
			for m, v := range map[*metric]uint64{mHCommands: q.Commands, mHArmed: q.Armed, mHLost: q.ArmLost, mHSpurious: q.Spurious, mHInflight: uint64(q.Inflight)} {
				emit(out, m, float64(v), ctrl, queue)
			}
			emit(out, mHKicks, float64(q.Kicks), ctrl, queue, "sq")
			polling := 0.0
			if q.State == "polling" {
				polling = 1
			}
			emit(out, mHState, polling, ctrl, queue)
		}
	}
}

// familyHelp lists the families for --help and the documentation.
func familyHelp() string {
	out := ""
	for _, f := range families {
		l := ""
		for i, name := range f.labels {
			l += map[bool]string{true: "{", false: ","}[i == 0] + name
		}
		if l != "" {
			l += "}"
		}
		out += fmt.Sprintf("  %s%s\n", f.name, l)
	}
	return out
}
