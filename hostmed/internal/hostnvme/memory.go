package hostnvme

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

// Mapper lets a device reach memory of this process.
type Mapper interface {
	// Map pins mem, which is whole pages, and returns where the device finds it. It takes as long as that takes.
	Map(mem []byte) (Place, error)
	// Unmap takes back what Map gave, which no command names any more.
	Unmap(mem []byte, at Place) error
}

// Place is where a device finds memory.
type Place struct {
	IOVA  uint64   // of its first byte, if it is in one piece
	Pages []uint64 // otherwise: its pages, as joinPages makes them
}

// Memory is the guest memory that a device reaches. Every queue of the device tells of all memory that it is told of; each
// mapping is given to the device once. Pinning a guest takes seconds, so a goroutine does that: until it has, and where
// it cannot, data goes through bounce buffers.
//
// Readers look up in a snapshot and take no lock.
type Memory struct {
	dev  Mapper
	log  hclog.Logger
	most uint64 // bytes that are pinned at a time
	snap atomic.Pointer[snapshot]

	mu      sync.Mutex
	known   map[block]*mapping
	jobs    []*mapping    // to be mapped or unmapped, in order
	running chan struct{} // there is a goroutine that does the jobs; closed when it has
	warned  time.Time     // when somebody was told last of memory that is not reached
	untold  int           // and how often since that nobody was
}

// block is memory by its address in this process.
type block struct{ base, size uint64 }

// mapping is a block that somebody wants, or has wanted, the device to reach.
type mapping struct {
	block
	mem    []byte
	at     Place
	refs   int
	mapped bool // the device reaches it
	failed bool
}

// stretch is memory that is in one piece for the device.
type stretch struct {
	base, size uint64
	delta      uint64 // IOVA - base
}

// span is a block that the device reaches.
type span struct {
	stretch          // all of it, if pages is nil
	pages   []uint64 // see joinPages
}

// snapshot is all spans, by address. It does not change.
type snapshot struct{ spans []span }

// NewMemory returns an empty Memory.
func NewMemory(dev Mapper, log hclog.Logger) *Memory {
	m := &Memory{dev: dev, log: log, most: mayPin(), known: map[block]*mapping{}}
	m.snap.Store(&snapshot{})
	return m
}

// mayPin is how much of this machine's memory guests may have pinned. A sparse file costs its owner nothing until it is pinned, which fills it: a hostile client
// would take all memory of the host, and the rights that hostmed runs with make RLIMIT_MEMLOCK no bound.
func mayPin() uint64 {
	var s unix.Sysinfo_t
	if err := unix.Sysinfo(&s); err != nil { // it cannot fail for memory that is ours
		return 0
	}
	return s.Totalram * uint64(s.Unit) / 4 * 3
}

// add says that b, which is whole pages, is wanted once more.
func (m *Memory) add(b []byte) {
	k := blockOf(b)
	m.mu.Lock()
	defer m.mu.Unlock()
	x := m.known[k]
	if x == nil {
		x = &mapping{block: k, mem: b}
		m.known[k] = x
		m.do(x)
	}
	x.refs++
}

// remove takes back one add. After the last one nobody finds b any more when it returns.
func (m *Memory) remove(b []byte) { m.removeBlock(blockOf(b)) }

func (m *Memory) removeBlock(k block) {
	m.mu.Lock()
	defer m.mu.Unlock()
	x := m.known[k]
	if x == nil {
		return
	}
	if x.refs--; x.refs > 0 {
		return
	}
	delete(m.known, k)
	if x.mapped {
		m.publish()
		m.do(x)
	}
}

// do has x mapped, or unmapped if nobody wants it.
func (m *Memory) do(x *mapping) {
	m.jobs = append(m.jobs, x)
	if m.running == nil {
		m.running = make(chan struct{})
		go m.run()
	}
}

// run does the jobs that there are. mu is free while it is in the kernel.
func (m *Memory) run() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(m.jobs) > 0 {
		x := m.jobs[0]
		m.jobs = m.jobs[1:]
		switch {
		case x.mapped:
			m.unmap(x)
		case x.refs > 0:
			m.mapOne(x)
		}
	}
	m.jobs = nil
	close(m.running)
	m.running = nil
}

// warnEvery is how often the log has a line about memory that is not reached: a client could write as many as it likes by mapping and unmapping.
const warnEvery = 10 * time.Second

// warn tells of memory that the device does not reach. mu is held.
func (m *Memory) warn(msg string, args ...any) {
	if now := time.Now(); now.Sub(m.warned) >= warnEvery {
		m.log.Warn(msg, append(args, "left_out", m.untold)...)
		m.warned, m.untold = now, 0
		return
	}
	m.untold++
}

func (m *Memory) mapOne(x *mapping) {
	if m.overlaps(x) { // a snapshot could not be searched
		x.failed = true
		m.warn("memory overlaps other memory of the device: its data is copied", "bytes", x.size)
		return
	}
	if pinned := m.pinned(); x.size > m.most-min(pinned, m.most) {
		x.failed = true
		m.warn("guests may have three quarters of this machine's memory pinned, and this would be more: its data is copied", "bytes", x.size, "pinned", pinned)
		return
	}
	m.mu.Unlock()
	at, err := m.dev.Map(x.mem)
	m.mu.Lock()
	if err != nil {
		x.failed = true
		m.warn("the device cannot reach a guest's memory: its data is copied", "bytes", x.size, "error", err)
		return
	}
	x.at, x.mapped = at, true
	if x.refs == 0 { // meanwhile it was taken back
		m.unmap(x)
		return
	}
	m.publish()
}

func (m *Memory) unmap(x *mapping) {
	x.mapped = false
	m.mu.Unlock()
	err := m.dev.Unmap(x.mem, x.at)
	m.mu.Lock()
	x.at = Place{}
	if err != nil {
		m.log.Error("taking memory from the device", "error", err)
	}
}

// pinned is how many bytes the device reaches. mu is held.
func (m *Memory) pinned() (n uint64) {
	for _, x := range m.known {
		if x.mapped {
			n += x.size
		}
	}
	return n
}

func (m *Memory) overlaps(x *mapping) bool {
	for _, y := range m.known {
		if y.mapped && y.base < x.base+x.size && x.base < y.base+y.size {
			return true
		}
	}
	return false
}

// publish makes a snapshot of what is mapped and wanted.
func (m *Memory) publish() {
	s := &snapshot{}
	for _, x := range m.known {
		if x.mapped {
			s.spans = append(s.spans, span{stretch{x.base, x.size, x.at.IOVA - x.base}, x.at.Pages})
		}
	}
	slices.SortFunc(s.spans, func(a, b span) int {
		if a.base < b.base {
			return -1
		}
		return 1
	})
	m.snap.Store(s)
}

// MemoryState is what a Memory has come to.
type MemoryState struct {
	Mapped  uint64 // bytes that the device reaches
	Pending int    // mappings that are being made
	Failed  int    // mappings that the device does not reach
}

// State returns what there is at the moment.
func (m *Memory) State() (s MemoryState) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s.Mapped = m.pinned()
	for _, x := range m.known {
		switch {
		case x.mapped:
		case x.failed:
			s.Failed++
		default:
			s.Pending++
		}
	}
	return s
}

// Settle returns when nothing is being mapped or unmapped any more, or most has passed.
func (m *Memory) Settle(most time.Duration) {
	m.mu.Lock()
	running := m.running
	m.mu.Unlock()
	if running == nil {
		return
	}
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-running:
	case <-timer.C:
	}
}

// finder looks up addresses for one goroutine at a time. Data lies in the same guest's memory again and again, so it
// remembers where it found the last.
type finder struct {
	m    *Memory
	in   *snapshot
	last stretch
	span *span // that last is of; nil: none
}

// refresh makes f look in the present snapshot. It is called before each batch: what is not in it any more is not wanted by
// any request of the batch.
func (f *finder) refresh() {
	if s := f.m.snap.Load(); s != f.in {
		f.in, f.last, f.span = s, stretch{}, nil
	}
}

// find returns where the device finds the byte at addr, and how many follow it for both; left is 0 if it does not reach it.
func (f *finder) find(addr uint64) (iova, left uint64) {
	if off := addr - f.last.base; off < f.last.size {
		return addr + f.last.delta, f.last.size - off
	}
	return f.search(addr)
}

func (f *finder) search(addr uint64) (iova, left uint64) {
	if f.span == nil || addr-f.span.base >= f.span.size {
		if f.span = f.in.at(addr); f.span == nil {
			return 0, 0
		}
	}
	if f.last = f.span.stretch; f.span.pages != nil {
		f.last = f.span.around(addr)
	}
	return addr + f.last.delta, f.last.size - (addr - f.last.base)
}

// at returns the span that addr is in; nil: there is none.
func (s *snapshot) at(addr uint64) *span {
	i, n := 0, len(s.spans)
	for i < n {
		if h := int(uint(i+n) >> 1); s.spans[h].base+s.spans[h].size > addr {
			n = h
		} else {
			i = h + 1
		}
	}
	if i == len(s.spans) || addr < s.spans[i].base {
		return nil
	}
	return &s.spans[i]
}
