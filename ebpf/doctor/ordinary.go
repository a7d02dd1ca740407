package doctor

import "fmt"

// ordinary says what a queue does that breaks no rule.
func (w *watch) ordinary() Finding {
	q := w.q
	waits := w.tail() != q.SQ.Private
	if w.moves() && !w.done {
		first := &w.all[0]
		return w.finding(Busy, "", "%d commands and %d completions in %s, %d in flight", q.Commands-first.q.Commands, q.Completions-first.q.Completions,
			ago(w.h.now()-first.taken), q.Inflight)
	}
	quiet := !waits && q.Inflight == 0 && q.Staged == 0
	if q.QID == 0 {
		quiet = !waits // Asynchronous Event Requests are in flight as a rule
	}
	if quiet {
		if w.away() && q.QID != 0 {
			return w.finding(Idle, "", "%s: the client has unmapped its doorbell pages, so only register writes count (R25)", w.seen())
		}
		if w.done && w.written() {
			return w.finding(Unknown, Driver, "%s: the driver has written a command to entry %d and told nobody: it holds it back, or has forgotten it", w.seen(), q.SQ.Private)
		}
		return w.finding(Idle, "", "%s%s", w.seen(), w.kept())
	}
	if !w.done {
		return w.finding(Unknown, "", "%s, %d in flight: looked for %s only, which does not say whether it moves", w.seen(), q.Inflight, ago(w.h.now()-w.all[0].taken))
	}
	stood := ago(w.stood())
	switch {
	case q.QID == 0:
		return w.finding(Slow, "", "%s: an admin command is being run, %s so far", w.seen(), stood)
	case q.State == "draining":
		return w.finding(Slow, "", "%s: nothing is fetched: a reset, a deletion or an unmap waits for %d commands, or the function is no bus master or not in D0", w.seen(), q.Inflight)
	case q.State == "parked":
		return w.finding(Slow, Driver, "%s: the client has unmapped the queue's memory", w.seen())
	case q.Held > 0 || q.Full || q.Unseen:
		return w.finding(Slow, "", "%s: %d of %d commands in flight are held back by a limit, a reservation, a format or the other half of a fused pair", w.seen(), q.Held, q.Inflight)
	case q.Blocked:
		return w.finding(Slow, Driver, "%s, %s: the driver takes no completions, for %s", w.seen(), w.full(), stood)
	case q.Inflight > 0:
		return w.finding(Slow, "", "%s: %d commands are with the medium, for %s", w.seen(), q.Inflight, stood)
	}
	return w.finding(Unknown, Neither, "%s: it stands so for %s, and nothing says why", w.seen(), stood)
}

// kept is what the driver has not given back of the CQ.
func (w *watch) kept() string {
	if n, ok := distance(w.head(), w.q.CQTail, w.q.CQSize); ok && n > 0 && w.q.QID != 0 {
		return fmt.Sprintf(", %d entries of CQ %d not given back", n, w.q.CQID)
	}
	return ""
}
