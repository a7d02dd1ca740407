package export

import "github.com/shadowbell/shadowbell/shared/nvme"

// Queued is a Disk that has queue pairs beside its methods, for a server whose requests come many at a time on a thread of their own: one
// doorbell for all of them, and no goroutine and no allocation for any. The data of commands is in memory of DMAMemory.
type Queued interface {
	Memory
	// NewQueue makes a queue that holds depth commands, if the device allows it. It fails when the device has no more queues.
	NewQueue(depth int) (Queue, error)
	// Again tells whether a queue's error means that the device was reset: a new queue can be had, at once or soon, and the commands that
	// were under way are sent once more.
	Again(err error) bool
}

// Queue is a queue pair. It belongs to one goroutine at a time. An error of any method but Close is the queue's end.
type Queue interface {
	// Submit takes commands, in order, that the device sees with Publish. It takes fewer than there are when the queue is full.
	Submit(cmds []Command) (int, error)
	Publish() error
	// Reap takes results that are there. It does not wait.
	Reap(out []Result) (int, error)
	// Outstanding is how many commands have been taken and not reaped.
	Outstanding() int
	// EventFD is readable after an interrupt; -1: there is none, and the queue is polled.
	EventFD() int
	// Arm asks for the interrupt. It returns false if there is something to reap already. It looks at deadlines too.
	Arm() (bool, error)
	// Close gives the queue back, with what is outstanding.
	Close() error
}

// Command is one NVMe command.
type Command struct {
	Op     uint8 // nvme.IORead, IOWrite, IOFlush, IOWriteZeroes or IODSM, which discards
	FUA    bool
	Blocks uint32 // logical blocks
	LBA    uint64
	Data   []byte // IORead, IOWrite: the blocks; IODSM: room for nvme.DSMRangeSize bytes
	Tag    uint64 // comes back in Result
}

// Result is the end of one.
type Result struct {
	Tag    uint64
	Status nvme.Status
}
