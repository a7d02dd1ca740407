// Package trace shows what the NVMe queues of this machine's kernel do, by BPF programs on its tracepoints: counts and
// latencies per device, queue, opcode and size, aggregated in the kernel, and, where asked for, each command as an event.
//
// [Open] loads the programs that this kernel can have and attaches them; [Probe] says beforehand what that would be. [Tracer.Snapshot] is what was
// counted since, [Tracer.Read] the events. What is attached belongs to the process: nothing is pinned, and it all ends with it, however it ends.
// [Writer] and [Reader] keep both in a file.
//
// A command is followed from nvme_setup_cmd, when the driver has written it and before it is in the queue, to nvme_complete_rq, when the
// driver has its completion. Latencies are from the one to the other, so they leave out the block layer above: Options.Block has that.
//
// The package needs CAP_BPF and CAP_PERFMON (before Linux 5.8 CAP_SYS_ADMIN) to open, and afterwards nothing: see [DropPrivileges]. Where the nvme
// driver is a module, the kernel lets only CAP_SYS_ADMIN find its types.
//
// What it does not do: decode what a command means, or follow commands of hostmed or guestdrv, which have trace points of their own.
package trace

import (
	"math/bits"
	"time"

	"github.com/shadowbell/shadowbell/shared/latency"
)

// Key says of which commands a Cell is.
type Key struct {
	Device    uint16 // instance: 0 for nvme0
	QID       uint16 // 0: the admin queue
	Opcode    uint8
	SizeClass uint8 // see SizeClassOf
}

// SizeClasses is how many size classes there are.
const SizeClasses = 14

// SizeClassOf returns the size class of a command's data: 0 without any, 1 up to 512 bytes, then one for each doubling, up to 12 for 1 MiB; 13 is
// everything longer.
func SizeClassOf(bytes uint32) uint8 {
	if bytes <= 512 {
		return uint8(min(bytes, 1))
	}
	return uint8(min(bits.Len32(bytes-1)-8, SizeClasses-1))
}

// SizeClassLimit returns the most bytes of a size class; 0 for the last, which has no limit, and for the first.
func SizeClassLimit(class uint8) uint32 {
	if class == 0 || class >= SizeClasses-1 {
		return 0
	}
	return 256 << class
}

// Cell is what the kernel has counted for one Key since Open. Latencies are from nvme_setup_cmd, the command being written for the
// queue, to nvme_complete_rq, the request's end.
type Cell struct {
	Key
	Count   uint64 // completed
	Errors  uint64 // of them, with a status that is not 0
	Retries uint64 // of them, of commands that were tried before
	Bytes   uint64 // of data: by NLB where the command has one, else what the driver moves
	Latency *latency.Histogram
}

// Queue is what the kernel has counted for one real queue.
type Queue struct {
	Device   uint16
	QID      uint16
	Started  uint64 // nvme_setup_cmd
	Ended    uint64 // nvme_complete_rq that found its start
	Orphans  uint64 // nvme_complete_rq of commands that began before Open; not counted while opcodes are filtered
	Replaced uint64 // of Started, those that never ended: the driver could not queue them and started them again, or their end was lost
	Depth    int64  // outstanding now
	DepthMax int64

	// Publishes are the times that the driver moved the SQ tail, for one command or for many: nvme_queue_rq of a batch's last,
	// nvme_queue_rqs and nvme_commit_rqs. Each is a doorbell unless shared doorbells spare it. Interrupts are those that found completions;
	// each moves the CQ head once or a few times. Both are 0 where their hooks are missing.
	Publishes  uint64
	Interrupts uint64

	SQHead   uint32 // as nvme_sq last showed it; the driver's view
	SQTail   uint32
	Timeouts uint64
	Resets   uint64 // of the device; counted on queue 0
	AERs     uint64 // asynchronous events; counted on queue 0
}

// Losses are what was not counted. Nothing is lost silently.
type Losses struct {
	Ring      uint64 // events that found no room in the ring buffer
	Map       uint64 // commands that found no room in a map
	Recursion uint64 // times that a program of starts or ends did not run because it was running on that CPU (recursion_misses), at most
}

// Snapshot is all that was counted since Open.
type Snapshot struct {
	At     time.Time
	Since  time.Duration // since Open
	Cells  []Cell
	Queues []Queue
	Block  []BlockCell
	KVM    []ExitCell
	Losses Losses
}

// BlockCell is the block layer's view of one disk: from block_rq_insert or, without a scheduler, block_rq_issue to block_rq_complete.
type BlockCell struct {
	Disk     string
	Op       byte // R, W, F (flush), D (discard) or O (others, passthrough too)
	Count    uint64
	Bytes    uint64
	Queued   *latency.Histogram // insert to issue; of those that were inserted
	InDevice *latency.Histogram // issue to complete
}

// ExitCell counts exits of one virtual machine (kvm_exit), and of them those for MMIO.
type ExitCell struct {
	PID      uint32 // of the process that runs it
	Exits    uint64
	MMIO     uint64            // kvm_mmio writes
	FastMMIO uint64            // kvm_fast_mmio: an ioeventfd was signalled
	Reasons  map[uint32]uint64 // by the CPU's number of the reason; nil where tracefs could not be read
}

// Kind is what an Event is about.
type Kind uint8

// The kinds of Event.
const (
	Start Kind = iota + 1 // nvme_setup_cmd
	End                   // nvme_complete_rq
	AsyncEvent
	Timeout
	Reset
	Doorbell // nvme_sq: SQ head and tail after a completion; only with Options.Doorbells
)

// Event is one event of a real queue. An End carries what its Start had.
type Event struct {
	Kind    Kind
	Time    int64 // ns of CLOCK_MONOTONIC
	Device  uint16
	QID     uint16
	CID     uint16 // as the driver numbers requests (request tag and generation)
	Opcode  uint8
	Status  uint16 // End: CQE status without the phase bit
	Retries uint8
	NSID    uint32
	SLBA    uint64 // of I/O commands that have one
	Blocks  uint32 // number of logical blocks, one-based; 0: the command has none
	Bytes   uint32
	Latency int64  // ns; End only
	TID     uint32 // thread that started the command
	Comm    string
	Disk    string // "" for admin commands
	CDW10   [6]uint32
	// UserData is that of the io_uring request, for passthrough by io_uring; 0: another way, or not known.
	UserData uint64
	Result   uint64 // End: CQE DW0 and DW1; AsyncEvent: DW0
	SQHead   uint32 // Doorbell
	SQTail   uint32
}
