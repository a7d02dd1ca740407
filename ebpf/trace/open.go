package trace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/ebpf/bpf"
)

// Options say what to trace. The zero value counts all commands of all NVMe devices, without events.
type Options struct {
	// Devices are instances, such as 0 for nvme0; empty: all. Commands that a filter leaves out are neither counted nor events.
	Devices []uint16
	Queues  []uint16
	Opcodes []uint8

	Block bool   // count in the block layer too, for all disks
	KVM   bool   // count exits of virtual machines too
	VM    uint32 // only of the virtual machine that this process runs; 0: of each

	// Driver counts how often the driver moves its SQ tails and takes interrupts, and shows SQ head and tail: three programs more for each command,
	// where counting commands takes two.
	Driver bool

	Events bool // hand commands to Read
	// MinLatency leaves out what ended sooner, and all Starts, since nobody knows then. It is for events only.
	MinLatency time.Duration
	Doorbells  bool // events of kind Doorbell too: one more for each command
	RingBytes  int  // of the ring buffer for events, rounded up to a power of two, at most 1 GiB; 0: 8 MiB

	// Classic attaches NVMe's tracepoints as on a kernel without BTF: what needs the kernel's types is missing.
	Classic bool
}

// Limits of Options.
const (
	MaxDevice   = 1023 // highest instance that a filter can name
	MaxRing     = 1 << 30
	defaultRing = 8 << 20
)

// What maps may take for all CPUs together; see sizes.
const (
	cellBudget   = 64 << 20
	maxCells     = 1024
	minCells     = 256
	maxDiskCells = 128
	minDiskCells = 32
)

// Tracer is an open trace. Its methods may be called from several goroutines.
type Tracer struct {
	options Options
	opened  time.Time

	maps     map[string]*ebpf.Map
	programs map[string]*ebpf.Program
	links    []link.Link
	events   []int // perf events of classic tracepoints
	reader   *ringbuf.Reader
	hooks    []Hook
	disks    *diskNames
	classic  bool // NVMe is by classic tracepoints

	close sync.Once
}

// Open loads and attaches what the kernel can have. It fails if nothing that was asked for works; what else is missing, Missing and Hooks say.
// An error names what the kernel or the process lacks, and what helps. Close ends it.
func Open(ctx context.Context, o Options) (_ *Tracer, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if err := rlimit.RemoveMemlock(); err != nil && !errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("memory limit for BPF maps: %w", err)
	}
	spec, err := bpf.LoadTrace()
	if err != nil {
		return nil, err
	}
	if err := o.set(spec); err != nil {
		return nil, err
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, err
	}
	sizes(spec, &o, cpus)
	fs, fsErr := openTracefs()
	if fsErr == nil {
		defer fs.Close()
	}
	t := &Tracer{options: o, disks: newDiskNames(), opened: time.Now()}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	l := &loader{cache: btf.NewCache(), spec: spec, tracer: t, fs: fs, fsErr: fsErr, classic: o.Classic}
	if err := l.offsets(); err != nil {
		return nil, err
	}
	if err := l.loadMaps(); err != nil {
		return nil, err
	}
	if o.Events {
		if t.reader, err = ringbuf.NewReader(t.maps[bpf.TraceMapEvents]); err != nil {
			return nil, fmt.Errorf("ring buffer: %w", err)
		}
	}
	if err := t.blockSizes(); err != nil {
		return nil, err
	}
	for _, p := range places {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if o.wantsHook(&p) {
			t.hooks = append(t.hooks, l.attach(&p))
		}
	}
	t.classic = l.how == Tracepoint
	parts := []Part{NVMe, Block, KVM}
	if !slices.ContainsFunc(parts, func(p Part) bool { return o.wants(p) && t.Missing(p) == nil }) {
		return nil, t.Missing(NVMe)
	}
	return t, nil
}

// wantsHook says whether a hook has anything to tell that was asked for.
func (o *Options) wantsHook(p *place) bool {
	return o.wants(p.part) && (p.asked == nil || p.asked(o))
}

func (o *Options) wants(p Part) bool { return p == NVMe || p == Block && o.Block || p == KVM && o.KVM }

func (o *Options) check() error {
	for _, d := range o.Devices {
		if d > MaxDevice {
			return fmt.Errorf("device nvme%d: filters go up to nvme%d", d, MaxDevice)
		}
	}
	if o.RingBytes < 0 || o.RingBytes > MaxRing {
		return fmt.Errorf("a ring buffer of %d bytes: at most %d", o.RingBytes, MaxRing)
	}
	if o.RingBytes == 0 {
		o.RingBytes = defaultRing
	}
	size := os.Getpagesize()
	for size < o.RingBytes {
		size *= 2
	}
	o.RingBytes = size
	if o.MinLatency < 0 {
		return fmt.Errorf("a least latency of %v", o.MinLatency)
	}
	return nil
}

// set fills in the programs' settings.
func (o *Options) set(spec *ebpf.CollectionSpec) error {
	var devices [16]uint64
	var queues [1024]uint64
	var opcodes [4]uint64
	for _, d := range o.Devices {
		devices[d/64] |= 1 << (d % 64)
	}
	for _, q := range o.Queues {
		queues[q/64] |= 1 << (q % 64)
	}
	for _, op := range o.Opcodes {
		opcodes[op/64] |= 1 << (op % 64)
	}
	for name, v := range map[string]any{
		bpf.TraceVarWantEvents: o.Events, bpf.TraceVarWantDoorbells: o.Doorbells,
		bpf.TraceVarMinLatency: uint64(o.MinLatency), bpf.TraceVarWakeupBytes: uint32(o.RingBytes / 4),
		bpf.TraceVarFilterDevices: len(o.Devices) > 0, bpf.TraceVarFilterQueues: len(o.Queues) > 0, bpf.TraceVarFilterOpcodes: len(o.Opcodes) > 0,
		bpf.TraceVarDevices: devices, bpf.TraceVarQueues: queues, bpf.TraceVarOpcodes: opcodes,
		bpf.TraceVarVm: o.VM,
	} {
		if err := spec.Variables[name].Set(v); err != nil {
			return fmt.Errorf("setting %s: %w", name, err)
		}
	}
	return nil
}

// sizes bounds the maps: those whose values are histograms, one for each CPU, by memory.
func sizes(spec *ebpf.CollectionSpec, o *Options, cpus int) {
	fit := func(name string, budget, least, most int) {
		m := spec.Maps[name]
		m.MaxEntries = uint32(min(max(budget/(int(m.ValueSize)*cpus), least), most))
	}
	fit(bpf.TraceMapCells, cellBudget, minCells, maxCells)
	fit(bpf.TraceMapBlockCells, cellBudget/4, minDiskCells, maxDiskCells)
	if o.Events {
		spec.Maps[bpf.TraceMapEvents].MaxEntries = uint32(o.RingBytes)
	} else {
		spec.Maps[bpf.TraceMapEvents].MaxEntries = uint32(os.Getpagesize())
	}
	if !o.Block {
		for _, name := range []string{bpf.TraceMapBlockCells, bpf.TraceMapBlockStarts, bpf.TraceMapBlockStartsSpilled} {
			spec.Maps[name].MaxEntries = 1
		}
	}
	if !o.KVM {
		spec.Maps[bpf.TraceMapVmCells].MaxEntries, spec.Maps[bpf.TraceMapExitReasons].MaxEntries = 1, 1
	}
}

// Hooks returns all hooks of the parts that were asked for, and how often each ran.
func (t *Tracer) Hooks() []Hook {
	hooks := slices.Clone(t.hooks)
	n, err := t.counters()
	if err != nil {
		return hooks
	}
	for i, h := range hooks {
		p := &places[slices.IndexFunc(places, func(p place) bool { return p.name == h.Name })]
		hooks[i].Hits = n[p.counter]
		if missed, err := t.missed(p); err == nil {
			hooks[i].Missed = missed
		}
	}
	return hooks
}

// Missing returns why a part does not work, with what helps; nil if it does.
func (t *Tracer) Missing(p Part) error { return missing(t.hooks, p) }

func missing(hooks []Hook, p Part) error {
	asked := false
	for _, h := range hooks {
		if h.Part != p {
			continue
		}
		asked = true
		if h.Needed && !h.Attached {
			return fmt.Errorf("%s cannot be traced: %s: %s", partName[p], h.Name, h.Why)
		}
	}
	if !asked {
		return fmt.Errorf("%s was not asked for", partName[p])
	}
	return nil
}

var partName = map[Part]string{NVMe: "NVMe", Block: "the block layer", KVM: "KVM"}

// Close detaches everything. Calls of Read end. What was counted is gone.
func (t *Tracer) Close() error {
	var err error
	t.close.Do(func() {
		var errs []error
		if t.reader != nil {
			errs = append(errs, t.reader.Close())
		}
		for _, l := range t.links {
			errs = append(errs, l.Close())
		}
		for _, fd := range t.events {
			errs = append(errs, unix.Close(fd))
		}
		for _, p := range t.programs {
			errs = append(errs, p.Close())
		}
		for _, m := range t.maps {
			errs = append(errs, m.Close())
		}
		err = errors.Join(errs...)
	})
	return err
}
