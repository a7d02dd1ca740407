// Package broken is how a build for tests breaks doorbell rules on purpose, on the device's side, so that nvmetrace doctor has something to find. Only a build
// with the tag shadowbell_faults does: in any other On is false, and what stands behind it is not in the program.
//
// Such a build breaks what SHADOWBELL_FAULTS names, commas between, from the start; hostmed.Break does it while it runs.
package broken

// Rule is one way to break a rule. It holds for all controllers of the process.
type Rule uint8

// What can be broken, and how it looks from outside.
const (
	SleepAnyway Rule = iota // R3: a queue that is polled, and empty, goes to sleep over the next command, although Arm saw its tail
	NoArm                   // R12, R13: a queue goes to sleep without arming: its event index still says one behind
	CQAtTail                // R8: a CQ that blocks is armed at its tail, where its driver's head never comes past
	WrongIndex              // R11: the event index is one further than what was consumed
	DropKick                // R10: doorbell messages for I/O SQs are counted, and wake nobody
	Sentinel                // R14: the event index is 0xffffffff while a queue is polled
	StaleSlots              // R22: the slots of a new queue are left as an older one had them
	NoProbe                 // R27: a queue that was paused or parked is left asleep when that is over
	KeepPages               // R21: the doorbell pages stay in use over a reset
	NoInterrupt             // a CQ with interrupts on raises none
	ArmDrained              // R13: a queue from which nothing was ever fetched goes to sleep without arming
	Overcommit              // R9: commands are fetched for whose completions the CQ has no room; their medium must not end them
	Register                // R15: the SQ tail is read from the register though the pages are configured
	count
)
