package inspect

// Counters is what a mediator's controllers and namespaces have done.
type Counters struct {
	Taken       int64                `json:"taken_ns"` // CLOCK_MONOTONIC
	Controllers []ControllerCounters `json:"controllers"`
	Namespaces  []NamespaceCounters  `json:"namespaces"`
}

// ControllerCounters is what a controller has done for the client that it has now. Bytes are of commands that succeeded.
type ControllerCounters struct {
	Socket string `json:"socket"`
	NQN    string `json:"nqn"`
	CNTLID uint16 `json:"cntlid"`
	Trace  uint16 `json:"trace"`

	Silent bool  `json:"silent,omitempty"`       // its session did not answer in time: all is 0
	Busy   []int `json:"busy_workers,omitempty"` // what these have done is missing, because they did not answer in time

	Reads        uint64 `json:"reads"` // I/O commands that succeeded
	Writes       uint64 `json:"writes"`
	Others       uint64 `json:"others"`
	Errors       uint64 `json:"errors"`
	MediaErrors  uint64 `json:"media_errors"` // of Errors
	BytesRead    uint64 `json:"bytes_read"`
	BytesWritten uint64 `json:"bytes_written"`
	Native       uint64 `json:"native"`   // Compare, Copy and the like that the medium did itself
	Emulated     uint64 `json:"emulated"` // and that hostmed did with other commands
	Interrupts   uint64 `json:"interrupts"`
	SQDoorbells  uint64 `json:"sq_doorbells"` // messages, each an exit of a virtual machine; queue 0's not counted
	CQDoorbells  uint64 `json:"cq_doorbells"`
	Throttled    uint64 `json:"throttled"` // commands that limits held back
	ThrottledFor int64  `json:"throttled_for_ns"`
	Busied       int64  `json:"busy_ns"` // with a command outstanding

	Costs Costs `json:"costs"`
}

// Costs is what samples of the commands cost the workers' threads.
type Costs struct {
	Translate Phase `json:"translate"`
	Submit    Phase `json:"submit"`
	Complete  Phase `json:"complete"`
	Interrupt Phase `json:"interrupt"`
}

// Phase is what one part of the way of those commands took that were measured.
type Phase struct {
	Commands uint64 `json:"commands"`
	Time     int64  `json:"time_ns"`
}

// NamespaceCounters is what has become of a namespace's commands since it is there. What its medium was asked to do is counted where the medium has its
// own queue; Counted is false for others, as null:, mem: and file:.
type NamespaceCounters struct {
	NQN  string `json:"nqn"`
	NSID uint32 `json:"nsid"`
	Spec string `json:"spec"`

	Throttled    uint64 `json:"throttled"`
	ThrottledFor int64  `json:"throttled_for_ns"`

	Counted   bool   `json:"counted"`
	Commands  uint64 `json:"commands"`
	Native    uint64 `json:"native"`    // of Commands, the guest's own
	Mapped    uint64 `json:"mapped"`    // of Commands, those that moved the guest's data without a copy
	Bounced   uint64 `json:"bounced"`   // and those with one
	Waited    uint64 `json:"waited"`    // how often a request waited for room
	Repeated  uint64 `json:"repeated"`  // commands that were given again
	Failed    uint64 `json:"failed"`    // requests that the end of the device has ended
	Doorbells uint64 `json:"doorbells"` // MMIO writes of hostmed's to the device
}
