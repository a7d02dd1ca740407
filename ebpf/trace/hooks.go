package trace

import (
	"github.com/shadowbell/shadowbell/ebpf/bpf"
)

// Part is one of the things that can be traced, each by hooks of its own.
type Part string

// The parts. NVMe is always asked for.
const (
	NVMe  Part = "nvme"
	Block Part = "block"
	KVM   Part = "kvm"
)

// How a hook is attached.
const (
	TPBTF      = "tp_btf"     // a tracepoint by the kernel's own types
	Tracepoint = "tracepoint" // a classic one, with offsets from tracefs
	RawTP      = "raw_tp"     // one whose arguments are plain numbers
	Fentry     = "fentry"     // a function's begin, or its end
)

// Hook is a place in the kernel.
type Hook struct {
	Name     string // nvme:nvme_setup_cmd, or nvme_timeout()
	Part     Part
	Needed   bool // without it, nothing of its part works
	Attached bool // Probe: could be
	How      string
	Why      string // why it is not attached, and what helps
	Without  string // what is then missing
	Hits     uint64 // times that it ran, of all devices and queues
	Missed   uint64 // times that it did not, since it was running on that CPU: Losses.Recursion has those of what is Needed
}

// candidate is a program for a hook.
type candidate struct {
	program string
	how     string
}

// place is a hook and its programs, the best first.
type place struct {
	name    string
	part    Part
	needed  bool
	without string
	group   string // of the tracepoint; "": a function
	target  string // the tracepoint's name, or the function's
	counter bpf.TraceCounter
	options []candidate
	asked   func(*Options) bool // nil: always
}

// again are programs that come second at a hook, by the first: see trace.bpf.c. They are attached where the kernel preempts tracepoints, which it does
// since 7.0.
var again = map[string]string{bpf.TraceProgBtfSetupCmd: bpf.TraceProgAgainSetupCmd, bpf.TraceProgBtfRqIssue: bpf.TraceProgAgainRqIssue}

const preemptsSince = 7

func driver(o *Options) bool { return o.Driver }

// places are in the order in which they are attached: ends before starts, so that no start is left without its end.
var places = []place{
	{"nvme:nvme_complete_rq", NVMe, true, "commands", "nvme", "nvme_complete_rq", bpf.TraceCounterHIT_COMPLETE,
		[]candidate{{bpf.TraceProgBtfCompleteRq, TPBTF}, {bpf.TraceProgTpCompleteRq, Tracepoint}}, nil},
	{"nvme:nvme_setup_cmd", NVMe, true, "commands", "nvme", "nvme_setup_cmd", bpf.TraceCounterHIT_SETUP,
		[]candidate{{bpf.TraceProgBtfSetupCmd, TPBTF}, {bpf.TraceProgTpSetupCmd, Tracepoint}}, nil},
	{"nvme:nvme_sq", NVMe, false, "SQ head and tail", "nvme", "nvme_sq", bpf.TraceCounterHIT_SQ,
		[]candidate{{bpf.TraceProgBtfSq, TPBTF}, {bpf.TraceProgTpSq, Tracepoint}}, func(o *Options) bool { return o.Driver || o.Doorbells }},
	{"nvme:nvme_async_event", NVMe, false, "asynchronous events", "nvme", "nvme_async_event", bpf.TraceCounterHIT_ASYNC,
		[]candidate{{bpf.TraceProgBtfAsyncEvent, TPBTF}, {bpf.TraceProgTpAsyncEvent, Tracepoint}}, nil},
	function("nvme_timeout", bpf.TraceCounterHIT_TIMEOUT, bpf.TraceProgFnTimeout, "timeouts", nil),
	function("nvme_reset_work", bpf.TraceCounterHIT_RESET, bpf.TraceProgFnResetWork, "resets", nil),
	function("nvme_queue_rq", bpf.TraceCounterHIT_QUEUE_RQ, bpf.TraceProgFnQueueRq, "how often the SQ tail is moved", driver),
	function("nvme_queue_rqs", bpf.TraceCounterHIT_QUEUE_RQS, bpf.TraceProgFnQueueRqs, "how often the SQ tail is moved", driver),
	function("nvme_commit_rqs", bpf.TraceCounterHIT_COMMIT_RQS, bpf.TraceProgFnCommitRqs, "how often the SQ tail is moved", driver),
	function("nvme_irq", bpf.TraceCounterHIT_IRQ, bpf.TraceProgFnIrq, "interrupts", driver),
	function("nvme_uring_cmd_io", bpf.TraceCounterHIT_URING_CMD, bpf.TraceProgFnUringCmdIo, "user_data of passthrough by io_uring", func(o *Options) bool { return o.Events }),

	{"block:block_rq_complete", Block, true, "the block layer", "block", "block_rq_complete", bpf.TraceCounterHIT_RQ_COMPLETE,
		[]candidate{{bpf.TraceProgBtfRqComplete, TPBTF}}, nil},
	{"block:block_rq_issue", Block, true, "the block layer", "block", "block_rq_issue", bpf.TraceCounterHIT_ISSUE,
		[]candidate{{bpf.TraceProgBtfRqIssue, TPBTF}}, nil},
	{"block:block_rq_insert", Block, false, "time in the I/O scheduler", "block", "block_rq_insert", bpf.TraceCounterHIT_INSERT,
		[]candidate{{bpf.TraceProgBtfRqInsert, TPBTF}}, nil},

	{"kvm:kvm_exit", KVM, true, "exits of virtual machines", "kvm", "kvm_exit", bpf.TraceCounterHIT_KVM_EXIT,
		[]candidate{{bpf.TraceProgTpKvmExit, Tracepoint}, {bpf.TraceProgRawKvmExit, RawTP}}, nil},
	{"kvm:kvm_mmio", KVM, false, "MMIO writes that leave KVM", "kvm", "kvm_mmio", bpf.TraceCounterHIT_KVM_MMIO,
		[]candidate{{bpf.TraceProgRawKvmMmio, RawTP}}, nil},
	{"kvm:kvm_fast_mmio", KVM, false, "doorbells that are ioeventfds", "kvm", "kvm_fast_mmio", bpf.TraceCounterHIT_KVM_FAST_MMIO,
		[]candidate{{bpf.TraceProgRawKvmFastMmio, RawTP}}, nil},
}

func function(name string, counter bpf.TraceCounter, program, without string, asked func(*Options) bool) place {
	return place{name + "()", NVMe, false, without, "", name, counter, []candidate{{program, Fentry}}, asked}
}

// offsets are the fields of classic tracepoints' records that programs read: by program, tracefs' name to the variable that gets the offset.
// Of names with a bar, the first that is there counts.
var offsets = map[string]map[string]string{
	bpf.TraceProgTpSetupCmd: {
		"ctrl_id": bpf.TraceVarSetupCtrl, "qid": bpf.TraceVarSetupQid, "opcode": bpf.TraceVarSetupOpcode, "cid": bpf.TraceVarSetupCid,
		"nsid": bpf.TraceVarSetupNsid, "cdw10": bpf.TraceVarSetupCdw10, "disk": bpf.TraceVarSetupDisk,
	},
	bpf.TraceProgTpCompleteRq: {
		"ctrl_id": bpf.TraceVarCompleteCtrl, "qid": bpf.TraceVarCompleteQid, "cid": bpf.TraceVarCompleteCid,
		"result": bpf.TraceVarCompleteResult, "retries": bpf.TraceVarCompleteRetries, "status": bpf.TraceVarCompleteStatus,
	},
	bpf.TraceProgTpSq: {
		"ctrl_id": bpf.TraceVarSqCtrl, "qid": bpf.TraceVarSqQid, "sq_head": bpf.TraceVarSqHeadAt, "sq_tail": bpf.TraceVarSqTailAt,
	},
	bpf.TraceProgTpAsyncEvent: {"ctrl_id": bpf.TraceVarAsyncCtrl, "result": bpf.TraceVarAsyncResult},
	bpf.TraceProgTpKvmExit:    {"exit_reason|esr_ec": bpf.TraceVarExitReasonAt},
}
