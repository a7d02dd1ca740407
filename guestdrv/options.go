package guestdrv

import (
	"fmt"
	"runtime"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/shared/driver/lane"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/events"
)

// DoorbellMode says how the driver tells the controller of new commands.
type DoorbellMode uint8

const (
	// DoorbellsAuto shares doorbell pages when the controller offers Doorbell Buffer Config, and otherwise does as DoorbellsMMIO.
	DoorbellsAuto DoorbellMode = iota
	// DoorbellsShadow is DoorbellsAuto, except that Open fails when the pages cannot be shared.
	DoorbellsShadow
	// DoorbellsMMIO writes the doorbell registers: where they are mapped by stores, otherwise by messages.
	DoorbellsMMIO
)

// String returns "auto", "shadow" or "mmio".
func (m DoorbellMode) String() string {
	switch m {
	case DoorbellsAuto:
		return "auto"
	case DoorbellsShadow:
		return "shadow"
	case DoorbellsMMIO:
		return "mmio"
	}
	return fmt.Sprintf("DoorbellMode(%d)", uint8(m))
}

// CompletionMode says how calls of Namespace wait for the controller.
type CompletionMode uint8

const (
	// CompletionsAdaptive polls for as long as that has paid off lately, then sleeps until the interrupt. Without interrupts the sleep is short,
	// and followed by a look.
	CompletionsAdaptive CompletionMode = iota
	// CompletionsInterrupt sleeps at once: it uses the least CPU time, and takes a wake-up for each command.
	CompletionsInterrupt
	// CompletionsPoll asks for no interrupt at all. For each queue one goroutine polls, and keeps a core busy, while commands are outstanding; an idle
	// controller costs nothing. It is for who has cores to spare, and takes no interrupt vector.
	CompletionsPoll
)

// String returns "adaptive", "interrupt" or "poll".
func (m CompletionMode) String() string {
	switch m {
	case CompletionsAdaptive:
		return "adaptive"
	case CompletionsInterrupt:
		return "interrupt"
	case CompletionsPoll:
		return "poll"
	}
	return fmt.Sprintf("CompletionMode(%d)", uint8(m))
}

func (m CompletionMode) waiting() lane.Waiting {
	switch m {
	case CompletionsInterrupt:
		return lane.Sleep
	case CompletionsPoll:
		return lane.Poll
	}
	return lane.Adaptive
}

// ResetMode says what becomes of commands that are outstanding when the controller is reset.
type ResetMode uint8

const (
	// ResetFail ends them with an error that wraps ErrReset.
	ResetFail ResetMode = iota
	// ResetReplay sends the commands of Namespace once more, in any order: they may have been executed before. One that meets a second reset
	// fails with ErrReset. Admin commands and those of a QueuePair fail as with ResetFail.
	ResetReplay
)

// String returns "fail" or "replay".
func (m ResetMode) String() string {
	switch m {
	case ResetFail:
		return "fail"
	case ResetReplay:
		return "replay"
	}
	return fmt.Sprintf("ResetMode(%d)", uint8(m))
}

// Defaults and limits of Options.
const (
	DefaultDMASize       = 64 << 20
	DefaultQueueDepth    = 128
	DefaultTimeout       = 30 * time.Second
	DefaultResetTimeout  = 30 * time.Second
	DefaultMaxQueuePairs = 16

	// MaxQueueDepth is the most commands that one queue pair holds.
	MaxQueueDepth = queue.MaxSize - 1

	// minEntries is the least that a queue's rings have, if the controller allows it. On shorter ones the two sides
	// write the same few cache lines over and over.
	minEntries = 64
)

// Options are what Open can be told. The zero value is good.
type Options struct {
	// Doorbells is how the controller is told of new commands.
	Doorbells DoorbellMode

	// Vendor2014 shares the doorbell pages by the vendor command of 2014 (C0h) and not by Doorbell Buffer Config (7Ch).
	Vendor2014 bool

	// SGL points commands at their data by scatter gather lists and not by PRPs; Open fails with ErrUnsupported if the controller has
	// none. Memory here is contiguous, so each list is one descriptor, in the command.
	SGL bool

	// Arbitration asks for weighted round robin, by which submission queues have priorities; Open fails with ErrUnsupported if the controller
	// has none (CAP.AMS). nil: round robin.
	Arbitration *Arbitration

	// Priority is that of the plain API's queues. A QueuePair has its own, see QueuePairOptions.
	Priority Priority

	// DMASize is the size in bytes of the memory that the controller can reach; 0: DefaultDMASize. It holds the queues, every
	// Buffer, and data on its way to and from memory that is no Buffer. Pages of it that were never touched cost nothing.
	DMASize uint64

	// QueueDepth is how many commands each queue of the plain API holds at least; 0: DefaultQueueDepth.
	QueueDepth uint32

	// Completions is how calls of Namespace wait. A QueuePair has its own choice, see QueuePairOptions.
	Completions CompletionMode

	// Queues is how many queue pairs the plain API has; 0: GOMAXPROCS. There are fewer if the controller has fewer queues or
	// interrupt vectors.
	Queues int

	// MaxQueuePairs is how many queue pairs NewQueuePair can make at one time; 0: DefaultMaxQueuePairs. Each keeps an interrupt
	// vector, that is a file descriptor, from Open on. There are fewer if the controller has fewer.
	MaxQueuePairs int

	// Timeout is the deadline of each command; 0: DefaultTimeout. A command that misses it is aborted: if it ends then, within a quarter of
	// Timeout and 2 s at the most, its error wraps ErrTimeout, and nothing else happens. Otherwise the controller is reset.
	Timeout time.Duration

	// OnReset is what becomes of commands that are outstanding when the controller is reset.
	OnReset ResetMode

	// ResetTimeout bounds one reset of the controller, until it is as it was before; 0: DefaultResetTimeout. A controller that takes longer
	// fails for good, and so does one that was reset four times in a row and executed no command of a caller in between.
	//
	// So each command ends after Timeout, its quarter and ResetTimeout at the latest, twice that with ResetReplay. A call that needs
	// several commands one after the other, or waits until there is room for its own, takes that for each.
	ResetTimeout time.Duration

	// OnChange is told of namespaces that appear, vanish or are resized after Open, by one goroutine, one after the other. It may do I/O and
	// take its time, but Close waits for it, so it does not call Close itself. nil: nobody is told.
	OnChange func(Change)

	// Events is told of each I/O command that is published and reaped, and of sleep; nil: nobody. The ring behind it is made before a sandbox is shut. The
	// controllers of a process have numbers in it, from 1, in the order of Open.
	Events *events.Shared

	// Logger is told of controller events and of what had to be done without; nil: nobody.
	Logger hclog.Logger
}

// withDefaults checks o and fills in what is 0.
func (o Options) withDefaults() (Options, error) {
	if o.Doorbells > DoorbellsMMIO {
		return o, fmt.Errorf("options: unknown doorbell mode %v", o.Doorbells)
	}
	if o.Completions > CompletionsPoll {
		return o, fmt.Errorf("options: unknown completion mode %v", o.Completions)
	}
	if o.OnReset > ResetReplay {
		return o, fmt.Errorf("options: unknown reset mode %v", o.OnReset)
	}
	if err := o.Arbitration.check(); err != nil {
		return o, fmt.Errorf("options: %w", err)
	}
	if err := o.Priority.check(o.Arbitration); err != nil {
		return o, fmt.Errorf("options: %w", err)
	}
	if o.ResetTimeout < 0 {
		return o, fmt.Errorf("options: ResetTimeout %v is negative", o.ResetTimeout)
	}
	if o.Queues < 0 || o.MaxQueuePairs < 0 || o.Timeout < 0 {
		return o, fmt.Errorf("options: Queues %d, MaxQueuePairs %d, Timeout %v: none may be negative", o.Queues, o.MaxQueuePairs, o.Timeout)
	}
	if o.QueueDepth > MaxQueueDepth {
		return o, fmt.Errorf("options: QueueDepth %d, at most %d", o.QueueDepth, MaxQueueDepth)
	}
	if o.DMASize == 0 {
		o.DMASize = DefaultDMASize
	}
	if o.QueueDepth == 0 {
		o.QueueDepth = DefaultQueueDepth
	}
	if o.Queues == 0 {
		o.Queues = runtime.GOMAXPROCS(0)
	}
	if o.MaxQueuePairs == 0 {
		o.MaxQueuePairs = DefaultMaxQueuePairs
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.ResetTimeout == 0 {
		o.ResetTimeout = DefaultResetTimeout
	}
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	return o, nil
}
