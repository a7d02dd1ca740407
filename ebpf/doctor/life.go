package doctor

import (
	"fmt"
	"math/bits"
	"slices"

	"github.com/shadowbell/shadowbell/shared/inspect"
)

// born finds a queue whose slots were not zeroed when it was made (R22).
func (w *watch) born() (Finding, bool) {
	q := w.q
	bell, what := &q.SQ, "tail"
	if bell.Born == 0 {
		bell, what = &q.CQ, "CQ head"
	}
	if q.QID == 0 || bell.Born == 0 {
		return Finding{}, false
	}
	f := w.broken("R22", Device, "delete the queue and create it again, after its slots are zeroed; "+remedyDevice,
		"when the queue had been created its %s was %d: what an older queue left was taken for a doorbell", what, bell.Born)
	f.Doubt = "a driver that rang before the creation was complete"
	return f, true
}

// failed says why a queue was stopped.
func (w *watch) failed() (Finding, bool) {
	q := w.q
	if q.State != "failed" {
		return Finding{}, false
	}
	var e *inspect.QueueError
	for i := range w.c.Errors {
		if x := &w.c.Errors[i]; x.Kind == "bad-sq-tail" && x.QID == q.QID || (x.Kind == "bad-cq-head" || x.Kind == "memory-fault") && x.QID == q.CQID {
			e = x
		}
	}
	remedy := "reset the controller, or delete the queue and create it again"
	if e == nil {
		return w.finding(Unknown, Neither, "%s: it was stopped, and nothing says why", w.seen()), true
	}
	switch e.Kind {
	case "memory-fault":
		return w.broken("R36", Driver, remedy+"; memory that is shared must not be truncated: seal it", "its memory was taken away without a word (%s)", e.Text), true
	case "bad-cq-head":
		return w.bad("CQ head", w.head(), q.CQSize, e.Text, remedy), true
	}
	return w.bad("SQ tail", w.tail(), q.Size, e.Text, remedy), true
}

// bad is a doorbell that cannot be.
func (w *watch) bad(what string, v, size uint32, text, remedy string) Finding {
	if swapped := bits.ReverseBytes32(v); v >= size && swapped < size {
		return w.broken("R20", Driver, remedy+"; doorbells are little endian", "%s %#x is %d with its bytes swapped, and stopped the queue", what, v, swapped)
	}
	return w.broken("R30", Driver, remedy, "the driver's %s cannot be, and stopped the queue (%s)", what, text)
}

// away says that the client has unmapped the doorbell pages, and has not mapped them again (R25).
func (w *watch) away() bool {
	return !w.c.Shared && w.c.Configs > 0 && w.c.Enables == w.c.ConfigEnable
}

// written says that the driver has put a command in the ring that it has told the device nothing of. What the newest view has may be another life's already: an
// entry counts if it has stood there for some looks, and was not there before.
func (w *watch) written() (written bool) {
	last, same := w.newest().view, 0
	for i := len(w.all) - 1; i >= 0 && !written && last != nil && last.Ring && last.Next; i-- {
		m := &w.all[i]
		if m.q.Commands != w.q.Commands || told(m.c, &m.q, &m.q.SQ) != w.tail() || m.view == nil || !m.view.Ring {
			break
		}
		if written = m.view.Hash != last.Hash; !written {
			same++
		}
	}
	return written && same >= 3
}

// unpublished finds commands that the driver has put in the ring and told the device of in a place where it does not look.
func (w *watch) unpublished() (Finding, bool) {
	q := w.q
	away := w.away()
	forgot := !w.c.Shared && w.c.Configs > 0 && w.c.Enables > w.c.ConfigEnable
	if q.QID == 0 || !(away || forgot) || !w.done || !w.sleeps() || w.tail() != q.SQ.Private {
		return Finding{}, false
	}
	if !w.written() {
		return Finding{}, false
	}
	f := w.broken("R28", Driver, "the driver must send Doorbell Buffer Config after each enable, with the pages zeroed",
		"the controller was enabled %d times, the doorbell pages were last configured in enable %d, and the driver wrote a command to entry %d that no register tells of", w.c.Enables, w.c.ConfigEnable, w.tail())
	if away {
		f = w.broken("R25", Driver, "the driver must ring the registers while its doorbell pages are unmapped, or map them again",
			"the client has unmapped its doorbell pages, and the driver wrote a command to entry %d that no register tells of", w.tail())
	}
	f.Doubt = "a driver that writes commands and rings for them much later, on purpose"
	return f, true
}

// controller is what there is to say of a controller beside its queues.
func (o Options) controller(h *history) (all []Finding) {
	c := h.last
	add := func(v Verdict, rule string, side Side, remedy, format string, args ...any) {
		f := Finding{Controller: c.Socket, Queue: -1, Verdict: v, Rule: rule, Side: side, Remedy: remedy, Text: fmt.Sprintf(format, args...)}
		if rule != "" && v == Broken {
			f.Text += ": " + blame(rule, side)
		}
		all = append(all, f)
	}
	if c.Silent {
		add(Unknown, "", Device, "look at the log of hostmed", "the controller's session does not answer")
	}
	for _, worker := range c.Busy {
		if n := h.silent(worker); n >= min(o.Samples, len(h.looks)) {
			add(Unknown, "", Device, "look at what the worker does (its thread's stack): a medium that blocks, or memory that does",
				"worker %d has not answered in the last %d samples: its queues cannot be judged%s", worker, n, h.unanswered(worker))
		}
	}
	if c.CSTS&2 != 0 {
		add(Broken, "", Neither, "reset the controller", "the controller has failed (CSTS.CFS)")
	}
	if c.Shared && c.ConfigEnable != c.Enables && len(h.looks) > 1 {
		add(Broken, "R21", Device, "reset the controller before its memory is used for something else; "+remedyDevice,
			"doorbell pages at %#x and %#x are in use, which were configured in enable %d, and this is enable %d: they survived a reset, and their memory may be somebody else's by now",
			c.Shadow, c.EventIndex, c.ConfigEnable, c.Enables)
	}
	if what, ok := overlap(c); ok {
		add(Broken, "R24", Driver, "the driver must give two pages that are nothing else", "%s", what)
	}
	for _, e := range c.Errors {
		if slices.ContainsFunc(c.Queues, func(q inspect.Queue) bool { return q.State == "failed" && (q.QID == e.QID || q.CQID == e.QID) }) {
			continue // the queue's finding says it
		}
		if e.Kind == "no-queue" && e.At >= h.looks[0].taken {
			add(Broken, "R30", Driver, "the driver must not ring for queues that it has not created, or has deleted", "a doorbell of queue %d, which does not exist (%s)", e.QID, e.Text)
			continue
		}
		add(Healthy, "R30", Driver, "", "in the past: %s ago, queue %d: %s", ago(h.now()-e.At), e.QID, e.Text)
	}
	return all
}

// silent is in how many of the newest samples worker n did not answer.
func (h *history) silent(n int) (samples int) {
	for i := len(h.looks) - 1; i >= 0 && slices.Contains(h.looks[i].c.Busy, n); i-- {
		samples++
	}
	return samples
}

// unanswered is what the pages say of queues whose worker does not answer.
func (h *history) unanswered(worker int) (s string) {
	for _, v := range h.looks[len(h.looks)-1].views {
		if v.Socket == h.last.Socket && v.Doorbells && v.Worker == worker {
			s += fmt.Sprintf("; queue %d: tail %d in the page, event index %s", v.QID, v.Tail, index(v.TailEvent))
		}
	}
	return s
}

// overlap finds doorbell pages that are something else as well (R24).
func overlap(c *inspect.Controller) (string, bool) {
	if !c.Shared {
		return "", false
	}
	size := uint64(4096) << (c.CC >> 7 & 0xf)
	type piece struct {
		what     string
		at, size uint64
	}
	pages := []piece{{"the shadow doorbell page", c.Shadow, size}, {"the event-index page", c.EventIndex, size}}
	all := slices.Clone(pages)
	for i := range c.Queues {
		q := &c.Queues[i]
		all = append(all, piece{fmt.Sprintf("SQ %d", q.QID), q.SQMemory.IOVA, uint64(q.Size) * 64}, piece{fmt.Sprintf("CQ %d", q.CQID), q.CQMemory.IOVA, uint64(q.CQSize) * 16})
	}
	for _, p := range pages {
		for _, x := range all {
			if x.what != p.what && x.at != 0 && p.at != 0 && x.at < p.at+size && p.at < x.at+x.size {
				return fmt.Sprintf("%s at %#x and %s at %#x are the same memory", p.what, p.at, x.what, x.at), true
			}
		}
	}
	return "", false
}
