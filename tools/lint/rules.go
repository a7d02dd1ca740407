package lint

import (
	"fmt"
	"go/ast"
	"path"
	"slices"
	"strconv"
	"strings"
)

// A Rule is one known way to get shared doorbells wrong, and what keeps this project out of it.
type Rule struct {
	Part  string // of the protocol
	Wrong string // what happened, somewhere
	Rule  string // what is done here
}

// Rules are R1 to R36, in order. To add one, add it here, write its test, and run make gen.
var Rules = []Rule{
	{"Ordering", "the driver loads the event index before its tail is visible: a wake-up is lost after minutes or hours", "store of the tail and load of the event index are both full atomics"},
	{"Ordering", "the device's arming has the same hole", "`Arm` stores the event index, loads the tail, and says whether it stood still"},
	{"Ordering", "the race is noticed and the device sleeps all the same", "sleep only when `Arm` said yes; a lost race means another round"},
	{"Ordering", "an SQE is read before the tail that covers it", "atomic load of the tail, then the copy"},
	{"Ordering", "a CQE is seen with a new phase and an old body", "body first, the word with the phase last; the reader takes the phase first"},
	{"Ordering", "the doorbell is seen before the SQE", "`Publish` is the only way to move a tail"},
	{"Ordering", "a page mapped as device memory in the guest and as normal memory in the server goes stale on Arm", "mapped doorbells are x86-64 only, and refused elsewhere"},
	{"Arming and sleeping", "a CQ event index equal to the tail means never: a blocked SQ starves", "the CQ head is armed where it stands, only when an SQ is blocked, then read again"},
	{"Arming and sleeping", "the guest refills the SQ before it gives CQ entries back", "a CQ entry is reserved before a command is fetched"},
	{"Arming and sleeping", "a kick that comes while the worker finishes is dropped", "a kick is sticky, and cleared before the last probe"},
	{"Arming and sleeping", "an event index that is counted up drifts", "it is a value read from the page, or one behind it"},
	{"Arming and sleeping", "the marker of polling is left set by a device that sleeps", "the mode is the queue's state; going to sleep always arms"},
	{"Arming and sleeping", "a queue that nobody drains is never armed again", "arming belongs to sleeping, not to popping"},
	{"Arming and sleeping", "a fixed index for \"never\" rings once per lap", "a polling device publishes one behind, at least once per lap"},
	{"One truth", "register and page are kept as two values", "one truth for each queue, chosen when the page is configured"},
	{"One truth", "drivers disagree on queue 0's slot", "the register counts, is mirrored to the page, and the page is read too; guestdrv never shadows queue 0"},
	{"One truth", "a late register value moves the tail back and the ring is replayed", "with a page, the value of an I/O queue's register write is ignored"},
	{"One truth", "the device writes the page that the driver reads as its old value", "the device writes event indices only, apart from seeding and queue 0"},
	{"One truth", "the driver takes its old value from shared memory", "it is private"},
	{"One truth", "width and byte order", "one little-endian 32-bit accessor"},
	{"Life cycle", "the page survives a reset, and the next boot's memory is written to", "a reset drains the workers, drops the page, and only then says that it is done"},
	{"Life cycle", "a queue id is used again with old slots", "creation zeroes both, on either side"},
	{"Life cycle", "configured under load: the seed is missing, or locks are taken in the wrong order", "quiesce, seed both pages from the values as they are, switch, wake all"},
	{"Life cycle", "configured twice, equal, misaligned", "all is checked and mapped before anything changes"},
	{"Life cycle", "the client unmaps the page", "DMA_UNMAP moves the values off it before it is answered"},
	{"Life cycle", "a configuration that failed leaves pointers", "enabled only after success; registers otherwise"},
	{"Life cycle", "what was rung while paused is lost", "resuming probes every queue"},
	{"Life cycle", "the driver does not send the configuration again after a reset", "it is part of enabling, with pages zeroed"},
	{"Life cycle", "slots are sized by the queues there happen to be", "by the page, and each index is checked"},
	{"Hostile input", "a tail beyond the ring loops for ever; a doorbell while disabled panics", "range and overrun are checked: error event, that queue stops, counted"},
	{"Hostile input", "an SQE is checked and then read again", "64 bytes are copied once; the CQ is never read back"},
	{"Hostile input", "zero-based sizes overflow 16 bits", "the type `ZeroBased16`"},
	{"Hostile input", "errors that complete at once skew the count of what is in flight", "it moves only where a slot is taken or given back"},
	{"Hostile input", "the peer makes a shared eventfd block", "it is read only after poll says that it can be"},
	{"Hostile input", "guest memory is used while it is being unmapped", "snapshots; unmapping waits for their users"},
	{"Hostile input", "the guest shrinks its memory file, and SIGBUS kills the server", "a guard on every goroutine that touches guest memory"},
}

// RuleTable is the table of docs/doorbell-rules.md: every rule with its tests.
func RuleTable(files []File) string {
	tests := map[int][]string{}
	for _, f := range files {
		if f.AST == nil || !f.isTest() {
			continue
		}
		for _, decl := range f.AST.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || fn.Recv != nil {
				continue
			}
			if m := ruleTest.FindStringSubmatch(fn.Name.Name); m != nil {
				n, _ := strconv.Atoi(m[1])
				tests[n] = append(tests[n], fmt.Sprintf("`%s` %s", path.Dir(f.Path), strings.TrimPrefix(fn.Name.Name, "Test")))
			}
		}
	}
	var b strings.Builder
	part := ""
	for i, r := range Rules {
		if r.Part != part {
			part = r.Part
			fmt.Fprintf(&b, "\n## %s\n\n| # | What went wrong | What is done here | Tests |\n|---|---|---|---|\n", part)
		}
		slices.Sort(tests[i+1])
		fmt.Fprintf(&b, "| R%d | %s | %s | %s |\n", i+1, r.Wrong, r.Rule, strings.Join(tests[i+1], "<br>"))
	}
	return b.String()
}
