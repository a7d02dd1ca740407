package trace

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/shadowbell/shadowbell/ebpf/bpf"
	"github.com/shadowbell/shadowbell/shared/latency"
)

// Snapshot returns all that was counted since Open, sorted by key. Counting goes on meanwhile: what is in one part need not be in another.
func (t *Tracer) Snapshot() (*Snapshot, error) {
	if t.classic {
		if err := t.blockSizes(); err != nil { // of namespaces that are new
			return nil, err
		}
	}
	now := time.Now()
	s := &Snapshot{At: now, Since: now.Sub(t.opened)}
	for _, step := range []func(*Snapshot) error{t.cells, t.queues, t.block, t.kvm, t.losses} {
		if err := step(s); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (t *Tracer) cells(s *Snapshot) error {
	var key bpf.TraceCellKey
	var each []bpf.TraceCell
	err := scan(t.maps[bpf.TraceMapCells], &key, &each, func() {
		c := Cell{Key: Key{Device: key.Device, QID: key.Qid, Opcode: key.Opcode, SizeClass: key.SizeClass}, Latency: new(latency.Histogram)}
		for i := range each {
			v := &each[i]
			c.Errors += v.Errors
			c.Retries += v.Retries
			c.Bytes += v.Bytes
			c.Latency.AddCounts(&v.Latency.Counts, v.Latency.Sum, v.Latency.Max)
		}
		c.Count = c.Latency.Count()
		s.Cells = append(s.Cells, c)
	})
	slices.SortFunc(s.Cells, func(a, b Cell) int { return a.compare(b.Key) })
	return err
}

func (k Key) compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Device, o.Device), cmp.Compare(k.QID, o.QID), cmp.Compare(k.Opcode, o.Opcode), cmp.Compare(k.SizeClass, o.SizeClass))
}

// firstQueueBits is how many queues of a device the array of first queues has, by its logarithm.
const firstQueueBits = 6

func (t *Tracer) queues(s *Snapshot) error {
	var key bpf.TraceQueueKey
	var q bpf.TraceQueue
	add := func(device, qid uint16) {
		s.Queues = append(s.Queues, Queue{
			Device: device, QID: qid, Started: q.Started, Ended: q.Ended, Orphans: q.Orphans, Replaced: q.Replaced,
			Depth: q.Depth, DepthMax: q.DepthMax, Publishes: q.Publishes, Interrupts: q.Interrupts,
			SQHead: q.SqHead, SQTail: q.SqTail, Timeouts: q.Timeouts, Resets: q.Resets, AERs: q.Aers,
		})
	}
	first, err := array[bpf.TraceQueue](t.maps[bpf.TraceMapFirstQueues])
	if err != nil {
		return err
	}
	for i := range first {
		if q = first[i]; q != (bpf.TraceQueue{}) {
			add(uint16(i>>firstQueueBits), uint16(i&(1<<firstQueueBits-1)))
		}
	}
	err = scan(t.maps[bpf.TraceMapQueueStates], &key, &q, func() { add(key.Device, key.Qid) })
	slices.SortFunc(s.Queues, func(a, b Queue) int { return cmp.Or(cmp.Compare(a.Device, b.Device), cmp.Compare(a.QID, b.QID)) })
	return err
}

func (t *Tracer) block(s *Snapshot) error {
	if !t.options.Block {
		return nil
	}
	var key bpf.TraceBlockKey
	var each []bpf.TraceBlockCell
	err := scan(t.maps[bpf.TraceMapBlockCells], &key, &each, func() {
		c := BlockCell{Disk: t.disks.name(key.Dev), Op: key.Op, Queued: new(latency.Histogram), InDevice: new(latency.Histogram)}
		for i := range each {
			v := &each[i]
			c.Bytes += v.Bytes
			c.Queued.AddCounts(&v.Queued.Counts, v.Queued.Sum, v.Queued.Max)
			c.InDevice.AddCounts(&v.InDevice.Counts, v.InDevice.Sum, v.InDevice.Max)
		}
		c.Count = c.InDevice.Count()
		s.Block = append(s.Block, c)
	})
	slices.SortFunc(s.Block, func(a, b BlockCell) int { return cmp.Or(cmp.Compare(a.Disk, b.Disk), cmp.Compare(a.Op, b.Op)) })
	return err
}

func (t *Tracer) kvm(s *Snapshot) error {
	if !t.options.KVM {
		return nil
	}
	var pid uint32
	var each []bpf.TraceVmCell
	at := map[uint32]int{}
	if err := scan(t.maps[bpf.TraceMapVmCells], &pid, &each, func() {
		c := ExitCell{PID: pid}
		for _, v := range each {
			c.Exits += v.Exits
			c.MMIO += v.Mmio
			c.FastMMIO += v.FastMmio
		}
		at[pid] = len(s.KVM)
		s.KVM = append(s.KVM, c)
	}); err != nil {
		return err
	}
	var key bpf.TraceReasonKey
	var counts []uint64
	if err := scan(t.maps[bpf.TraceMapExitReasons], &key, &counts, func() {
		i, ok := at[key.Tgid]
		if !ok {
			return // it came after the first scan
		}
		if s.KVM[i].Reasons == nil {
			s.KVM[i].Reasons = map[uint32]uint64{}
		}
		for _, n := range counts {
			s.KVM[i].Reasons[key.Reason] += n
		}
	}); err != nil {
		return err
	}
	slices.SortFunc(s.KVM, func(a, b ExitCell) int { return cmp.Compare(a.PID, b.PID) })
	return nil
}

func (t *Tracer) losses(s *Snapshot) error {
	n, err := t.counters()
	if err != nil {
		return err
	}
	s.Losses = Losses{Ring: n[bpf.TraceCounterLOST_RING], Map: n[bpf.TraceCounterLOST_MAP]}
	for _, p := range places {
		if !p.needed {
			continue
		}
		missed, err := t.missed(&p)
		if err != nil {
			return err
		}
		s.Losses.Recursion += missed
	}
	return nil
}

// missed is how often a hook's program did not run because it was running on that CPU; with a second program there, at most.
func (t *Tracer) missed(p *place) (uint64, error) {
	misses := func(name string) (uint64, error) {
		stats, err := t.programs[name].Stats()
		if err != nil {
			return 0, fmt.Errorf("what program %s missed: %w", name, err)
		}
		return stats.RecursionMisses, nil
	}
	for _, c := range p.options {
		if t.programs[c.program] == nil {
			continue
		}
		n, err := misses(c.program)
		if second := again[c.program]; err == nil && t.programs[second] != nil {
			m, err := misses(second)
			return min(n, m), err
		}
		return n, err
	}
	return 0, nil
}

// array returns all values of an array.
func array[T any](m *ebpf.Map) ([]T, error) {
	keys, values := make([]uint32, m.MaxEntries()), make([]T, m.MaxEntries())
	var cursor ebpf.MapBatchCursor
	for n := 0; n < len(values); {
		k, err := m.BatchLookup(&cursor, keys[n:], values[n:], nil)
		if n += k; err != nil {
			if errors.Is(err, ebpf.ErrKeyNotExist) && n == len(values) {
				break
			}
			return nil, fmt.Errorf("%s: %w", m, err)
		}
	}
	return values, nil
}

// scan calls f for each entry of a map that nothing is deleted from.
func scan(m *ebpf.Map, key, value any, f func()) error {
	entries := m.Iterate()
	for entries.Next(key, value) {
		f()
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("%s: %w", m, err)
	}
	return nil
}

// Sub returns what came between before and s. Depths, heads and tails are as in s; DepthMax is the most since Open. Neither is changed.
func (s *Snapshot) Sub(before *Snapshot) *Snapshot {
	d := &Snapshot{At: s.At, Since: s.Since - before.Since, Losses: Losses{
		Ring: s.Losses.Ring - before.Losses.Ring, Map: s.Losses.Map - before.Losses.Map, Recursion: s.Losses.Recursion - before.Losses.Recursion,
	}}
	d.Cells = subtract(s.Cells, before.Cells, func(c Cell) Key { return c.Key }, func(c, b Cell) Cell {
		c.Count -= b.Count
		c.Errors -= b.Errors
		c.Retries -= b.Retries
		c.Bytes -= b.Bytes
		c.Latency = between(c.Latency, b.Latency)
		return c
	})
	d.Queues = subtract(s.Queues, before.Queues, func(q Queue) [2]uint16 { return [2]uint16{q.Device, q.QID} }, func(q, b Queue) Queue {
		q.Started -= b.Started
		q.Ended -= b.Ended
		q.Orphans -= b.Orphans
		q.Replaced -= b.Replaced
		q.Publishes -= b.Publishes
		q.Interrupts -= b.Interrupts
		q.Timeouts -= b.Timeouts
		q.Resets -= b.Resets
		q.AERs -= b.AERs
		return q
	})
	type disk struct {
		name string
		op   byte
	}
	d.Block = subtract(s.Block, before.Block, func(c BlockCell) disk { return disk{c.Disk, c.Op} }, func(c, b BlockCell) BlockCell {
		c.Count -= b.Count
		c.Bytes -= b.Bytes
		c.Queued = between(c.Queued, b.Queued)
		c.InDevice = between(c.InDevice, b.InDevice)
		return c
	})
	d.KVM = subtract(s.KVM, before.KVM, func(c ExitCell) uint32 { return c.PID }, func(c, b ExitCell) ExitCell {
		c.Exits -= b.Exits
		c.MMIO -= b.MMIO
		c.FastMMIO -= b.FastMMIO
		reasons := map[uint32]uint64{}
		for reason, n := range c.Reasons {
			if n -= b.Reasons[reason]; n > 0 {
				reasons[reason] = n
			}
		}
		if c.Reasons != nil {
			c.Reasons = reasons
		}
		return c
	})
	return d
}

// subtract takes from each of now what before has of the same key.
func subtract[T any, K comparable](now, before []T, key func(T) K, sub func(now, before T) T) []T {
	was := make(map[K]T, len(before))
	for _, v := range before {
		was[key(v)] = v
	}
	out := make([]T, 0, len(now))
	for _, v := range now {
		if b, ok := was[key(v)]; ok {
			v = sub(v, b)
		}
		out = append(out, v)
	}
	return out
}

func between(now, before *latency.Histogram) *latency.Histogram {
	h := new(latency.Histogram)
	h.Merge(now)
	h.Sub(before)
	return h
}
