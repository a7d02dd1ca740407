package trace

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/ebpf/bpf"
)

// loader turns the specification into what is attached, hook by hook: one that a kernel does not have keeps no other from being loaded.
type loader struct {
	cache  *btf.Cache
	spec   *ebpf.CollectionSpec
	tracer *Tracer
	fs     *tracefs
	fsErr  error
	// noOffsets are programs whose tracepoints tracefs does not have, or not as they expect.
	noOffsets map[string]error
	// how is that of the first of NVMe's needed hooks. Both must be of a kind, since that says what commands are known by.
	how     string
	classic bool // Options.Classic
}

// offsets reads where the fields of classic tracepoints are. It comes before the maps, since settings are in one.
func (l *loader) offsets() error {
	l.noOffsets = map[string]error{}
	for _, p := range places {
		for _, c := range p.options {
			if c.how != Tracepoint {
				continue
			}
			if l.fsErr != nil {
				l.noOffsets[c.program] = l.fsErr
				continue
			}
			format, err := l.fs.format(p.group, p.target)
			if err != nil {
				l.noOffsets[c.program] = fmt.Errorf("no tracepoint %s in tracefs", p.name)
				continue
			}
			for names, variable := range offsets[c.program] {
				if err := l.offset(format, names, variable); errors.Is(err, errNoField) {
					l.noOffsets[c.program] = fmt.Errorf("tracepoint %s has no field %s", p.name, names)
				} else if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

var errNoField = errors.New("no such field")

func (l *loader) offset(format map[string]uint32, names, variable string) error {
	for name := range strings.SplitSeq(names, "|") {
		if at, ok := format[name]; ok {
			return l.spec.Variables[variable].Set(at)
		}
	}
	return errNoField
}

// loadMaps makes the maps, the one with the settings among them: what is in that is constant from here on.
func (l *loader) loadMaps() error {
	c, err := ebpf.NewCollection(&ebpf.CollectionSpec{Maps: l.spec.Maps, Variables: l.spec.Variables, Types: l.spec.Types, ByteOrder: l.spec.ByteOrder})
	if err != nil {
		if why := lacking(err); why != "" {
			return errors.New(why)
		}
		return fmt.Errorf("BPF maps: %w", err)
	}
	l.tracer.maps, l.tracer.programs = c.Maps, map[string]*ebpf.Program{}
	return nil
}

// blockSizes tells the programs of classic tracepoints, whose records do not have it, how long a logical block is.
func (t *Tracer) blockSizes() error {
	devices, err := Devices()
	if err != nil {
		return err
	}
	for _, d := range devices {
		for _, disk := range d.Disks {
			if err := t.maps[bpf.TraceMapBlockSizes].Put(uint64(d.Instance)<<32|uint64(disk.NSID), disk.BlockSize); err != nil {
				return fmt.Errorf("block size of %s: %w", disk.Name, err)
			}
		}
	}
	return nil
}

// attach tries a hook's programs in turn.
func (l *loader) attach(p *place) Hook {
	h := Hook{Name: p.name, Part: p.part, Needed: p.needed, Without: p.without}
	pair := p.part == NVMe && p.needed
	for _, c := range p.options {
		if pair && l.how != "" && c.how != l.how {
			continue
		}
		if l.classic && p.part == NVMe && c.how != Tracepoint {
			h.Why = "it needs the kernel's types, which Options.Classic does without"
			continue
		}
		err := l.try(p, c)
		if err == nil {
			if pair {
				l.how = c.how
			}
			h.Attached, h.How, h.Why = true, c.how, ""
			return h
		}
		if h.Why == "" { // that of the best is what helps most
			h.Why = explain(l.cache, p, c, err)
		}
	}
	return h
}

// try loads one program and attaches it.
func (l *loader) try(p *place, c candidate) error {
	if err := l.noOffsets[c.program]; err != nil {
		return err
	}
	program, err := l.program(c.program)
	if err != nil {
		return err
	}
	var made link.Link
	switch c.how {
	case TPBTF, Fentry:
		made, err = link.AttachTracing(link.TracingOptions{Program: program})
	case RawTP:
		made, err = link.AttachRawTracepoint(link.RawTracepointOptions{Name: p.target, Program: program})
	case Tracepoint:
		made, err = l.perf(p, program)
	}
	if err != nil {
		return errors.Join(err, program.Close())
	}
	l.tracer.programs[c.program] = program
	l.tracer.links = append(l.tracer.links, made)
	if major, _ := version(release()); again[c.program] != "" && major >= preemptsSince {
		return l.try(p, candidate{again[c.program], c.how})
	}
	return nil
}

func (l *loader) program(name string) (*ebpf.Program, error) {
	spec := l.spec.Programs[name]
	one := &ebpf.CollectionSpec{
		Programs: map[string]*ebpf.ProgramSpec{name: spec}, Maps: map[string]*ebpf.MapSpec{}, Types: l.spec.Types, ByteOrder: l.spec.ByteOrder,
	}
	made := map[string]*ebpf.Map{}
	for _, ins := range spec.Instructions {
		if ref := ins.Reference(); ins.IsLoadFromMap() && ref != "" {
			one.Maps[ref], made[ref] = l.spec.Maps[ref], l.tracer.maps[ref]
		}
	}
	c, err := ebpf.NewCollectionWithOptions(one, ebpf.CollectionOptions{MapReplacements: made, Cache: l.cache})
	if err != nil {
		return nil, err
	}
	program := c.DetachProgram(name)
	c.Close() // its descriptors of the maps are copies
	return program, nil
}

// perf attaches to a classic tracepoint. The event is of one CPU; the program runs on each.
func (l *loader) perf(p *place, program *ebpf.Program) (link.Link, error) {
	id, err := l.fs.id(p.group, p.target)
	if err != nil {
		return nil, err
	}
	fd, err := unix.PerfEventOpen(&unix.PerfEventAttr{
		Type: unix.PERF_TYPE_TRACEPOINT, Config: id, Sample: 1, Sample_type: unix.PERF_SAMPLE_RAW, Wakeup: 1,
	}, -1, 0, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("perf_event_open: %w", err)
	}
	made, err := link.AttachRawLink(link.RawLinkOptions{Target: fd, Program: program, Attach: ebpf.AttachPerfEvent})
	if err == nil {
		err = unix.IoctlSetInt(fd, unix.PERF_EVENT_IOC_ENABLE, 0)
	}
	if err != nil {
		if made != nil {
			err = errors.Join(err, made.Close())
		}
		return nil, errors.Join(err, unix.Close(fd))
	}
	l.tracer.events = append(l.tracer.events, fd)
	return made, nil
}

// hasType says whether the kernel or one of its modules has a type of this name.
func hasType(cache *btf.Cache, name string) (bool, error) {
	kernel, err := cache.Kernel()
	if err != nil {
		return false, err
	}
	if _, err := kernel.AnyTypesByName(name); err == nil {
		return true, nil
	}
	for _, module := range btfModules() {
		spec, err := cache.Module(module)
		if err != nil {
			continue // gone meanwhile, or of a kernel that was not built with it
		}
		if _, err := spec.AnyTypesByName(name); err == nil {
			return true, nil
		}
	}
	return false, nil
}

func (p *place) typeName() string {
	if p.group == "" {
		return p.target
	}
	return "btf_trace_" + p.target
}

// counters returns the sums over all CPUs.
func (t *Tracer) counters() ([]uint64, error) {
	n := make([]uint64, bpf.TraceCounterCOUNTERS)
	var each []uint64
	for i := range n {
		if err := t.maps[bpf.TraceMapCounters].Lookup(uint32(i), &each); err != nil {
			return nil, fmt.Errorf("counters: %w", err)
		}
		for _, v := range each {
			n[i] += v
		}
	}
	return n, nil
}
