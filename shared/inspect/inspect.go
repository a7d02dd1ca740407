// Package inspect is what hostmed shows of a live controller: the private indices of its queues beside what stands in the memory that
// it shares with the driver. hostmed takes a Snapshot on the threads that own the queues, its control socket hands it out as JSON, and
// nvmetrace doctor judges it. These are plain values; the package reads and writes no memory.
package inspect

import "errors"

// Version is the layout of Snapshot. A reader refuses another.
const Version = 1

// Snapshot is the state of a mediator at one time.
type Snapshot struct {
	Version     int          `json:"version"`
	Taken       int64        `json:"taken_ns"` // CLOCK_MONOTONIC
	Controllers []Controller `json:"controllers"`
}

// Controller is one controller that has a client.
type Controller struct {
	Socket string `json:"socket"`
	NQN    string `json:"nqn"`
	CNTLID uint16 `json:"cntlid"`
	Trace  uint16 `json:"trace"` // its number in event records (package events)

	Mode  string `json:"doorbells"` // shadow, trap or mmap
	DSTRD uint8  `json:"dstrd"`     // CAP.DSTRD
	CC    uint32 `json:"cc"`
	CSTS  uint32 `json:"csts"`

	// Shared says that I/O queues have their doorbells in the driver's pages: Doorbell Buffer Config, NVMe Base 2.0c 5.8, or the vendor
	// command of 2014, has succeeded since the last enable.
	Shared bool `json:"shared"`
	// Shadow and EventIndex are the pages' IOVAs; 0 while not Shared.
	Shadow     uint64 `json:"shadow_iova,omitempty"`
	EventIndex uint64 `json:"event_index_iova,omitempty"`
	// Configs counts successful configurations, and Enables the times that CC.EN went from 0 to 1, both since the client connected; ConfigEnable
	// is what Enables was when the pages were last configured (R21, R28).
	Configs      uint64 `json:"configs"`
	Enables      uint64 `json:"enables"`
	ConfigEnable uint64 `json:"config_enable"`

	Coalesced bool `json:"coalesced"` // interrupts may come late (feature 08h)
	// Stalled says that a message of the client is being handled: doorbell messages behind it have not been read.
	Stalled bool `json:"stalled"`

	// Silent says that the controller's session did not answer in time: nothing else but its names is filled in.
	Silent bool `json:"silent,omitempty"`
	// Busy names workers that did not answer in time; the queues that they own are missing.
	Busy   []int   `json:"busy_workers,omitempty"`
	Queues []Queue `json:"queues"`
	// Errors are failures of queues since the client connected, newest last, at most MaxErrors.
	Errors []QueueError `json:"errors,omitempty"`
}

// MaxErrors is how many QueueErrors are kept for a controller.
const MaxErrors = 16

// QueueError is a queue that hostmed stopped because of what the driver did (R30, R36).
type QueueError struct {
	QID  uint16 `json:"qid"`
	Kind string `json:"kind"` // bad-sq-tail, bad-cq-head, no-queue, memory-fault
	Text string `json:"text"`
	At   int64  `json:"at_ns"` // CLOCK_MONOTONIC
}

// Queue is one submission queue with the completion queue that it feeds. Queue 0 is the admin queue, whose commands a goroutine runs: of
// its fields those about polling and arming are zero, and its Worker is -1.
type Queue struct {
	QID    uint16 `json:"qid"`
	CQID   uint16 `json:"cqid"`
	Size   uint32 `json:"size"`    // entries of the SQ
	CQSize uint32 `json:"cq_size"` // entries of the CQ
	Worker int    `json:"worker"`
	State  string `json:"state"` // absent, polling, armed, draining, parked, failed

	SQ Bell `json:"sq"` // Private: the next entry to be fetched
	CQ Bell `json:"cq"` // Private: the driver's head as last taken

	CQTail   uint32 `json:"cq_tail"`  // the next entry to be posted
	Inflight uint32 `json:"inflight"` // fetched and not completed, of this SQ
	Staged   uint32 `json:"staged"`   // completions that are not posted yet, of the CQ
	Held     uint32 `json:"held"`     // of Inflight, what limits, reservations or a fused partner hold back
	Room     uint32 `json:"room"`     // entries of the CQ that are neither posted nor promised
	Blocked  bool   `json:"blocked"`  // the SQ has commands for which the CQ has no room
	Full     bool   `json:"full"`     // nothing is fetched until limits let go of something
	Unseen   bool   `json:"unseen"`   // nobody looks at it before the turn of a limit comes

	// Of the last time that the group went to sleep:
	ArmedAt  int64  `json:"armed_at_ns"` // CLOCK_MONOTONIC; 0: it never did
	ArmIndex uint32 `json:"arm_index"`   // the event index that was stored
	ArmSaw   uint32 `json:"arm_saw"`     // the SQ tail that was loaded after it (R2, R3)
	// Doorbell messages for this SQ, and for its CQ, since the queue was created, and those since ArmedAt.
	Kicks        uint64 `json:"kicks"`
	CQKicks      uint64 `json:"cq_kicks"`
	KicksAsleep  uint64 `json:"kicks_asleep"`
	Armed        uint64 `json:"armed"`         // sleeps
	ArmLost      uint64 `json:"arm_lost"`      // arms that found a new tail
	Spurious     uint64 `json:"spurious"`      // doorbell messages that found nothing new
	Commands     uint64 `json:"commands"`      // fetched
	Completions  uint64 `json:"completions"`   // posted, of the CQ
	LastFetch    int64  `json:"last_fetch_ns"` // CLOCK_MONOTONIC, as of the worker's last look at its clock; 0: never
	LastPost     int64  `json:"last_post_ns"`
	LastLook     int64  `json:"last_look_ns"` // when the worker last went round its loop
	Interrupts   uint64 `json:"interrupts"`   // raised, of the CQ
	Vector       int    `json:"vector"`       // of the CQ; -1: interrupts are off (CREATE CQ, IEN)
	VectorFD     bool   `json:"vector_fd"`    // the client has given the vector an eventfd
	VectorMasked bool   `json:"vector_masked"`
	VectorLatch  bool   `json:"vector_pending"` // an interrupt waits for that
	// Unraised is how many completions were posted since the CQ raised an interrupt, left that to coalescing, or found its driver polling (the quiet
	// bit): 0, unless interrupts are off.
	Unraised uint32 `json:"unraised"`
	// ResumedAt is when fetching went on after the queue was draining or parked (R27); 0: it never was.
	ResumedAt int64 `json:"resumed_at_ns"`
	Fresh     bool  `json:"fresh"` // created while the doorbell pages were away

	SQMemory Memory `json:"sq_memory"`
	CQMemory Memory `json:"cq_memory"`
}

// MaxFiles is how many files go with a snapshot.
const MaxFiles = 128

// Why a controller or a queue cannot be asked.
var (
	ErrNoController = errors.New("no such controller")
	ErrNoClient     = errors.New("it has no client")
	ErrNoQueue      = errors.New("no such queue")
	ErrBusy         = errors.New("its thread does not answer: it waits for a medium, or for a core")
)

// Listed is a controller that is served.
type Listed struct {
	Socket string `json:"socket"`
	NQN    string `json:"nqn"`
	CNTLID uint16 `json:"cntlid"`
	Trace  uint16 `json:"trace"`
	Mode   string `json:"doorbells"` // shadow, trap or mmap
	Client bool   `json:"client"`    // it has one
}

// Kick is what became of a queue that was kicked by hand.
type Kick struct {
	QID   uint16 `json:"qid"`
	State string `json:"state"` // in which it was found, as in Queue
	Woken bool   `json:"woken"` // it slept, and is polled now
	Awake bool   `json:"awake"` // it was polled already
	Found uint32 `json:"found"` // commands that it had not fetched yet
}

// Bell is one doorbell of a queue: what the mediator has taken, and what stands where the driver writes.
type Bell struct {
	Private  uint32 `json:"private"`  // what the mediator goes by
	Register uint32 `json:"register"` // the last value of an MMIO write that counted, or what is in the mapped page
	Page     uint32 `json:"page"`     // the slot of the doorbell page, with the quiet bit
	Event    uint32 `json:"event"`    // the slot of the event-index page
	Asked    uint32 `json:"asked"`    // what the mediator stored there last; Event is another: somebody else wrote to it
	Rung     uint32 `json:"rung"`     // value of the last doorbell message, whether it counted or not
	Born     uint32 `json:"born"`     // what was found in the slot or register when the queue was there, after it was zeroed (R22)
	// Slot and EventSlot are where these two are in memory; Size is 0 where doorbells are not shared.
	Slot      Memory `json:"slot"`
	EventSlot Memory `json:"event_slot"`
}

// Memory is a place in a file that was handed over with the snapshot.
type Memory struct {
	File   int    `json:"file"` // index of the descriptor
	Offset uint64 `json:"offset"`
	Size   uint64 `json:"size"` // bytes; 0: not there
	IOVA   uint64 `json:"iova"`
}
