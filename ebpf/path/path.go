// Package path follows each command of a guest from guestdrv through hostmed to the real queue and back, and says where its time went.
//
// It puts together three streams: the records of guestdrv's ring and of the rings of hostmed's workers (package events), and the events of the
// kernel's NVMe queues (package trace), all of which have the same clock.
//
//	path.go      what goes in and what comes out
//	order.go     the streams become one, by time
//	virtual.go   a virtual command, from Publish to Reap
//	real.go      which real command is whose
//	spans.go     where the time went
//	summary.go   histograms of that, by medium
//
// A virtual command is named by its controller, queue and CID from Fetch to Post. A real command of a kernel's queue is found by what hostmed
// asked the medium for, a step: the same disk, the same kind of operation, the same bytes, and of those that are alike the one of the thread that
// started the real command, and of those the first. A step may become several real commands, and one of those may serve several steps, where the
// block layer merges. Where hostmed drives the device itself it says what the device calls the command.
//
// What does not fit is counted: see Counts. A command of which a part may have been lost is left out. What stays a guess is which of several
// steps on one disk a command is of that names no blocks, such as Dataset Management: that takes the thread and the order alone.
//
// The package opens nothing and reads no clock.
package path

import (
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/events"
)

// Span is a part of a command's way. The parts follow each other, and together they are the whole.
type Span uint8

// The spans.
const (
	GuestQueue Span = iota // guestdrv published it -> hostmed fetched it
	Hostmed                // fetched -> handed to the medium; for each step
	RealQueue              // handed to the medium -> written for the real queue (nvme_setup_cmd); and the time between tries
	Device                 // -> the driver has its completion (nvme_complete_rq); of a medium that the kernel does not show, all until it is done
	Back                   // -> hostmed notices -> its completion is about to be posted
	ToGuest                // posted -> guestdrv took the completion
	Spans
)

var spanNames = [Spans]string{"guest queue", "hostmed", "real queue", "device", "hostmed, back", "back to the guest"}

func (s Span) String() string { return spanNames[s] }

// Match says how a command was followed.
type Match uint8

// The ways.
const (
	Own       Match = iota // hostmed answered it without the medium
	Matched                // every byte that the medium was asked for is in a real command
	Unseen                 // the kernel's NVMe queues do not show what the medium does: mem, null, file, other disks
	Unmatched              // some of it is in no real command
)

var matchNames = [...]string{"own", "matched", "unseen", "unmatched"}

func (m Match) String() string { return matchNames[m] }

// Command is one virtual command that has ended.
type Command struct {
	Key    events.Key // hostmed's
	CID    uint16
	Opcode uint8
	NSID   uint32
	SLBA   uint64
	Blocks uint32
	Status uint16
	Medium uint16 // of its first step; 0: it had none, or Media has not said

	Match Match
	Guest bool         // GuestQueue and ToGuest are known; otherwise they are 0
	Began int64        // ns: Publish, or Fetch
	Total int64        // ns: the sum of Spans
	Spans [Spans]int64 // ns
	Steps int
	Real  int // real commands that served it; several virtual ones may share one
}

// Counts says what became of everything that went in.
type Counts struct {
	Commands  uint64 `json:"commands"` // virtual commands that ended, of each Match:
	Matched   uint64 `json:"matched"`
	Own       uint64 `json:"own"`
	Unseen    uint64 `json:"unseen"`
	Unmatched uint64 `json:"unmatched"`
	Guestless uint64 `json:"without_guest"` // of Commands, without a guest's record

	Real          uint64 `json:"real"`           // real commands that were matched
	Shared        uint64 `json:"real_shared"`    // of them, those that served several steps
	RealUnmatched uint64 `json:"real_unmatched"` // started by hostmed's threads for no step that is known
	Foreign       uint64 `json:"real_foreign"`   // of other programs

	// What is not in Commands:
	Before  uint64 `json:"before"`  // records of commands that began before all this
	Dropped uint64 `json:"dropped"` // never ended: older than Config.MaxAge, or their CID was used anew
	Suspect uint64 `json:"suspect"` // under way when records of theirs may have been lost
	Full    uint64 `json:"full"`    // there were Config.MaxOpen already

	LostRecords uint64 `json:"lost_records"` // overwritten in a ring before they were read
	LostEvents  uint64 `json:"lost_events"`  // of the kernel's queues
	Late        uint64 `json:"late"`         // came after their time had been taken
}

// Config says what a Matcher is to expect.
type Config struct {
	// MaxAge is how long a command, virtual or real, may take; 0: 30 s.
	MaxAge time.Duration
	// MaxOpen is how many virtual commands are followed at a time, and as many real ones; 0: 1<<18.
	MaxOpen int
	// MaxQueued is how many records and events wait for their turn in Advance, all streams together; 0: 1<<18. More is no error, they are then
	// taken as they are.
	MaxQueued int
}

const (
	defaultAge    = 30 * time.Second
	defaultOpen   = 1 << 18
	defaultQueued = 1 << 18
)

// Matcher does what the package does. It belongs to one goroutine.
type Matcher struct {
	c      Config
	done   func(*Command)
	counts Counts

	streams []*stream
	queued  int
	now     int64 // up to which everything was taken
	swept   int64

	media   map[uint16]*medium
	unknown bool
	disks   map[string]*disk
	threads map[uint32]bool

	open     map[virtualKey]*virtual
	settling []*virtual // posted, and not whole yet
	guests   guests
	real     map[realKey]*real

	result      Command // what done is given
	freeVirtual []*virtual
	freeStep    []*step
	freeReal    []*real
}

// New returns a Matcher that calls done for each command that has ended, with a Command that is done's only during the call.
func New(c Config, done func(*Command)) *Matcher {
	if c.MaxAge == 0 {
		c.MaxAge = defaultAge
	}
	if c.MaxOpen == 0 {
		c.MaxOpen = defaultOpen
	}
	if c.MaxQueued == 0 {
		c.MaxQueued = defaultQueued
	}
	return &Matcher{
		c: c, done: done, streams: []*stream{{}}, media: map[uint16]*medium{}, disks: map[string]*disk{}, threads: map[uint32]bool{},
		open: map[virtualKey]*virtual{}, guests: newGuests(), real: map[realKey]*real{},
	}
}

// Counts returns what became of what was taken so far.
func (m *Matcher) Counts() Counts { return m.counts }

// UnderWay returns how many virtual commands have begun and are not in Counts yet.
func (m *Matcher) UnderWay() (n int) {
	for _, v := range m.settling {
		if !v.finished {
			n++
		}
	}
	return n + len(m.open)
}

// Worker adds the ring of one of hostmed's workers and returns its number for Records.
func (m *Matcher) Worker(info events.Info) int {
	if info.Thread != 0 {
		m.threads[info.Thread] = true
	}
	return m.add(&stream{thread: info.Thread})
}

// Guest adds a ring of guestdrv's.
func (m *Matcher) Guest() int {
	m.guests.rings++
	return m.add(&stream{guest: m.guests.rings})
}

func (m *Matcher) add(s *stream) int {
	m.streams = append(m.streams, s)
	return len(m.streams) - 1
}

// Media says what the numbers in Record.Medium mean. Those that are known stay.
func (m *Matcher) Media(list []events.Medium) {
	for _, x := range list {
		if m.media[x.ID] != nil {
			continue
		}
		n := &medium{Medium: x}
		if strings.HasPrefix(x.Disk, "nvme") {
			n.disk = m.disk(x.Disk)
			n.disk.shift = x.Shift
		}
		m.media[x.ID] = n
	}
	m.unknown = false
}

// Unknown says that Records has had the number of a medium that Media does not know. Until it does, commands are Unseen, so ask hostmed before the
// next Advance.
func (m *Matcher) Unknown() bool { return m.unknown }

// Records adds records of a ring, in its order.
func (m *Matcher) Records(ring int, list []events.Record) {
	s := m.streams[ring]
	for i := range list {
		r := &list[i]
		switch r.Kind {
		case events.Submit:
			if m.media[r.Medium] == nil {
				m.unknown = true
			}
		case events.Fetch, events.Complete, events.Post, events.Publish, events.Reap:
		default:
			continue
		}
		m.came(r.Time)
		x := item{at: sane(r.Time), record: *r}
		x.record.Time = x.at
		s.push(x)
	}
	m.press()
}

// Lost says that n records of a ring are missing before those that Records will be given next. What Records was given before
// and is under way in this ring is then suspect.
func (m *Matcher) Lost(ring int, n uint64) {
	m.counts.LostRecords += n
	m.streams[ring].push(item{lost: true})
	m.queued++
	m.press()
}

// Events adds events of the kernel's queues, in about their order. Those that are no I/O command's Start or End are left out.
func (m *Matcher) Events(list []trace.Event) {
	s := m.streams[kernel]
	for i := range list {
		e := &list[i]
		if (e.Kind != trace.Start && e.Kind != trace.End) || e.QID == 0 {
			continue
		}
		m.came(e.Time)
		x := item{at: sane(e.Time), event: e.Kind, real: realOf(e)}
		x.real.at = x.at
		s.pushSorted(x)
	}
	m.press()
}

// came counts what is added.
func (m *Matcher) came(at int64) {
	m.queued++
	if at < m.now {
		m.counts.Late++
	}
}

// sane is a time whose distance from any other is one too: a ring may have anything in it.
func sane(at int64) int64 { return min(max(at, 0), 1<<62) }

// LostEvents says that n events are missing, at no certain place.
func (m *Matcher) LostEvents(n uint64) { m.counts.LostEvents += n }

// Close settles what can be: nothing will come any more.
func (m *Matcher) Close() {
	m.Advance(events.End)
	for _, v := range m.open {
		m.counts.Dropped++
		m.drop(v)
	}
}
