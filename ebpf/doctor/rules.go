package doctor

import (
	"fmt"
	"strings"
)

// Rule is what can be seen of one rule when one side breaks it.
type Rule struct {
	N    int  // 1 to 36; 0: Interrupt
	Side Side // who breaks it; "": it cannot be seen from outside
	How  string
	Case string // of TestFaults or TestDeviceFaults; "" with Side ""
}

// Name is what Finding.Rule has.
func (r Rule) Name() string {
	if r.N == 0 {
		return Interrupt
	}
	return fmt.Sprintf("R%d", r.N)
}

// Rules are all rules, in order: those that can be seen once for each side that can be told, the others once with the reason.
var Rules = []Rule{
	{1, Driver, "asleep, event index as armed, the tail loaded after the arm was what is consumed, no doorbell message since; the page's tail has gone past the event index. The same of a CQ head that a full CQ waits for", "tail not rung; CQ head not rung"},
	{2, "", "on the wire it is R1, and so is said as a doubt with it unless a sample shows that the tail came after the arm; hostmed's arm is one exchange, which its tests hold", ""},
	{3, Device, "asleep, and the tail that it loaded after it had stored the event index is not what it had consumed", "slept on a lost race"},
	{4, "", "what was copied is gone", ""},
	{5, "", "by the time that anybody looks both halves are there", ""},
	{6, "", "the ring does not say when an entry was written", ""},
	{7, "", "memory types of a guest are not the host's to see; where the device reads other values than the page holds it is R15's doubt", ""},
	{8, Device, "asleep with a full CQ, and the event index that it stored for the head is not the head", "CQ armed at its tail"},
	{9, Device, "completions posted and in flight are more than the CQ has entries", "CQ promised twice"},
	{10, Device, "asleep, armed, and a doorbell message came since", "kick dropped; kick dropped, of a register"},
	{11, Device, "asleep, and the event index that it stored is neither what it consumed nor one behind", "index counted up"},
	{12, Device, "asleep after commands, and the event index that it stored is that of polling", "marker left"},
	{13, Device, "as R12, of a queue from which nothing was fetched since it last woke, while one that was drained is armed", "armed only when drained"},
	{14, Device, "polling, and the event index that it stored is not within a quarter of the ring behind what it consumed", "fixed marker"},
	{15, Driver, "doorbell messages whose tails never come to stand in the page", "registers only"},
	{15, Device, "the tail that it reads is not what stands in the page, or it armed while another stood there than it says that it loaded", "register for the truth"},
	{16, "", "every use of queue 0's slot is allowed for", ""},
	{17, "", "the value of the message does not count, so a late one harms nothing", ""},
	{18, Driver, "the event-index page holds another value than the device stored", "event index overwritten"},
	{19, "", "the driver's old value is its own; what comes of a wrong one is R1", ""},
	{20, Driver, "a doorbell out of the ring that is in it with its bytes swapped", "big endian"},
	{21, Device, "pages in use that were configured before the last enable", "pages survive a reset"},
	{22, Device, "a new queue found another value than 0 in its slot", "stale slots"},
	{23, "", "what was seeded cannot be told from what was stored since", ""},
	{24, Driver, "a doorbell page overlaps the other, or a ring", "page is a ring"},
	{25, Driver, "the pages are unmapped, and entries are written that no register tells of", "pages unmapped"},
	{26, "", "a configuration that failed leaves no trace but the command's status", ""},
	{27, Device, "resumed since it last armed, and asleep: not armed, or with a doorbell message that came meanwhile", "resumed without a look"},
	{28, Driver, "enabled again without pages, and entries are written that no register tells of", "pages not sent again"},
	{29, "", "a slot that is not there is refused", ""},
	{30, Driver, "the device stopped the queue for a tail or head that cannot be, or was rung for a queue that is not there", "tail beyond the ring; CQ head beyond the tail; no such queue"},
	{31, "", "as R4", ""},
	{32, "", "no doorbell is involved", ""},
	{33, "", "what is in flight for long may be with the medium", ""},
	{34, "", "a worker that does not answer is named, not why", ""},
	{35, "", "as R4", ""},
	{36, "", "the client is dropped at once, and hostmed's log says why", ""},
	{0, Device, "completions posted with interrupts on and no quiet bit, and none raised since", "interrupt lost"},
}

// Table is the rules as docs/doctor.md has them.
func Table() string {
	var b strings.Builder
	b.WriteString("| Rule | Seen | By what | Whose | Test |\n|---|---|---|---|---|\n")
	for _, r := range Rules {
		name, seen, test := r.Name(), "yes", "`TestFaults` "
		if r.N == 0 {
			name = "lost interrupt"
		}
		switch r.Side {
		case "":
			seen, test = "no", ""
		case Device:
			test = "`TestDeviceFaults` "
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s%s |\n", name, seen, r.How, r.Side, test, r.Case)
	}
	return b.String()
}
