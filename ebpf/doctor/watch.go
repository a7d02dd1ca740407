package doctor

import (
	"fmt"
	"slices"
	"strings"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/inspect"
)

// history is one controller over the samples, since the last time that it was enabled.
type history struct {
	last  *inspect.Controller
	looks []look // oldest first
}

// look is the controller in one sample.
type look struct {
	taken int64
	c     *inspect.Controller
	views []View
}

func newHistory(samples []Sample, last *inspect.Controller) *history {
	newest := &samples[len(samples)-1]
	h := &history{last: last, looks: []look{{newest.Taken, last, newest.Views}}}
	for i := len(samples) - 2; i >= 0; i-- {
		s := &samples[i]
		at := slices.IndexFunc(s.Controllers, func(c inspect.Controller) bool { return c.Socket == last.Socket && c.CNTLID == last.CNTLID })
		if at < 0 || s.Controllers[at].Enables != last.Enables || s.Controllers[at].Configs > last.Configs {
			break
		}
		h.looks = append(h.looks, look{s.Taken, &s.Controllers[at], s.Views})
	}
	slices.Reverse(h.looks)
	return h
}

func (h *history) now() int64 { return h.looks[len(h.looks)-1].taken }

// moment is one queue in one sample.
type moment struct {
	taken int64
	c     *inspect.Controller
	q     inspect.Queue
	view  *View
}

// watch is one queue over the samples.
type watch struct {
	h     *history
	c     *inspect.Controller
	q     *inspect.Queue // as it is now
	all   []moment       // since the queue was created, oldest first
	still []moment       // of them, the newest in which nothing is different
	done  bool           // still is long enough to judge by
}

func (o Options) watch(h *history, q *inspect.Queue) *watch {
	w := &watch{h: h, c: h.last, q: q}
	for i := len(h.looks) - 1; i >= 0; i-- {
		l := &h.looks[i]
		was := q
		if i < len(h.looks)-1 {
			at := slices.IndexFunc(l.c.Queues, func(x inspect.Queue) bool { return x.QID == q.QID })
			if at < 0 || !sameQueue(&l.c.Queues[at], q) {
				break
			}
			was = &l.c.Queues[at]
		}
		m := moment{taken: l.taken, c: l.c, q: *was}
		if v := slices.IndexFunc(l.views, func(v View) bool { return v.Socket == h.last.Socket && v.QID == q.QID }); v >= 0 {
			m.view = &l.views[v]
			m.fill(&m.q)
			if i == len(h.looks)-1 {
				m.fill(q)
			}
		}
		w.all = append(w.all, m)
	}
	slices.Reverse(w.all)
	first := len(w.all)
	for first > 0 && fixed(w.all[first-1].q) == fixed(*q) {
		first--
	}
	w.still = w.all[first:]
	w.done = len(w.still) >= o.Samples && w.stood() >= int64(o.Still)
	return w
}

// fill takes from the view what hostmed does not read any more of a queue that has failed.
func (m *moment) fill(q *inspect.Queue) {
	if q.State == "failed" && m.view.Doorbells {
		q.SQ.Page, q.SQ.Event, q.CQ.Page, q.CQ.Event = m.view.Tail, m.view.TailEvent, m.view.Head, m.view.HeadEvent
	}
}

// sameQueue says whether old may be the same queue as q, earlier.
func sameQueue(old, q *inspect.Queue) bool {
	return old.CQID == q.CQID && old.Size == q.Size && old.CQSize == q.CQSize && old.SQMemory.IOVA == q.SQMemory.IOVA &&
		old.Commands <= q.Commands && old.Completions <= q.Completions && old.Kicks <= q.Kicks && old.Armed <= q.Armed
}

// fixed is what stays the same of a queue with which nothing happens.
func fixed(q inspect.Queue) inspect.Queue {
	q.LastLook = 0
	for _, m := range []*inspect.Memory{&q.SQMemory, &q.CQMemory, &q.SQ.Slot, &q.SQ.EventSlot, &q.CQ.Slot, &q.CQ.EventSlot} {
		m.File = 0
	}
	return q
}

func (w *watch) newest() *moment { return &w.all[len(w.all)-1] }

// stood is for how long nothing is different, in ns, as far as the samples go.
func (w *watch) stood() int64 {
	if len(w.still) == 0 {
		return 0
	}
	return w.still[len(w.still)-1].taken - w.still[0].taken
}

// shared says whether the queue's doorbells are in pages, which are there.
func (w *watch) shared() bool { return w.c.Shared && w.q.QID != 0 }

// tail and head are what the driver has told the device so far.
func (w *watch) tail() uint32 { return told(w.c, w.q, &w.q.SQ) }
func (w *watch) head() uint32 { return told(w.c, w.q, &w.q.CQ) }

func told(c *inspect.Controller, q *inspect.Queue, b *inspect.Bell) uint32 {
	if c.Shared && q.QID != 0 {
		return b.Page &^ dbbuf.QuietBit
	}
	return b.Register &^ dbbuf.QuietBit
}

// moves says whether the queue did anything in any of the samples.
func (w *watch) moves() bool {
	first := &w.all[0].q
	return first.Commands != w.q.Commands || first.Completions != w.q.Completions
}

// distance returns how many steps lead from a to b in a ring of size entries; false if either is not in it.
func distance(a, b, size uint32) (uint32, bool) {
	switch {
	case a >= size || b >= size:
		return 0, false
	case b >= a:
		return b - a, true
	}
	return b + size - a, true
}

// between is the half-open range of a ring.
func between(from, to uint32) string { return fmt.Sprintf("[%d,%d)", from, to) }

func messages(n uint64) string {
	if n == 1 {
		return "1 doorbell message"
	}
	return fmt.Sprintf("%d doorbell messages", n)
}

// seen is what every sentence begins with.
func (w *watch) seen() string {
	q, parts := w.q, []string(nil)
	if w.shared() {
		parts = append(parts, fmt.Sprintf("tail %s in the page, event index %s", index(w.tail()), index(q.SQ.Event)))
	} else {
		parts = append(parts, fmt.Sprintf("tail %d in the register", w.tail()))
	}
	if w.sleeps() {
		parts = append(parts, "device asleep"+w.since())
	} else {
		parts = append(parts, "device "+q.State)
	}
	parts = append(parts, fmt.Sprintf("consumed %d", q.SQ.Private))
	return strings.Join(parts, ", ")
}

func (w *watch) since() string {
	if w.q.ArmedAt == 0 {
		return ""
	}
	return " since " + ago(w.h.now()-w.q.ArmedAt)
}

// full is what sentences about the CQ have beside that.
func (w *watch) full() string {
	s := fmt.Sprintf("CQ %d is full: tail %d, head %d taken, %d in the ", w.q.CQID, w.q.CQTail, w.q.CQ.Private, w.head())
	if w.shared() {
		return s + fmt.Sprintf("page, its event index %d", w.q.CQ.Event)
	}
	return s + "register"
}

// finding is one without a rule.
func (w *watch) finding(v Verdict, side Side, format string, args ...any) Finding {
	q := w.q
	return Finding{
		Controller: w.c.Socket, Queue: int(q.QID), Verdict: v, Side: side,
		Text: fmt.Sprintf("queue %d: ", q.QID) + fmt.Sprintf(format, args...),
		Values: map[string]uint64{
			"tail": uint64(w.tail()), "consumed": uint64(q.SQ.Private), "event_index": uint64(q.SQ.Event), "event_index_stored": uint64(q.SQ.Asked),
			"head": uint64(w.head()), "head_taken": uint64(q.CQ.Private), "head_event_index": uint64(q.CQ.Event), "head_event_index_stored": uint64(q.CQ.Asked),
			"cq_tail": uint64(q.CQTail), "inflight": uint64(q.Inflight), "arm_index": uint64(q.ArmIndex), "arm_saw": uint64(q.ArmSaw),
			"kicks": q.Kicks, "kicks_asleep": q.KicksAsleep, "rung": uint64(q.SQ.Rung), "size": uint64(q.Size), "cq_size": uint64(q.CQSize),
			"still_ns": uint64(max(w.stood(), 0)), "samples": uint64(len(w.still)),
		},
	}
}

// broken is a broken rule; the sentence ends with it.
func (w *watch) broken(rule string, side Side, remedy, format string, args ...any) Finding {
	f := w.finding(Broken, side, "%s: %s: %s", w.seen(), fmt.Sprintf(format, args...), blame(rule, side))
	f.Rule, f.Remedy = rule, remedy
	return f
}

func blame(rule string, side Side) string {
	if rule == Interrupt {
		rule = "a lost interrupt"
	}
	switch side {
	case Driver:
		return rule + " in the guest's driver"
	case Device:
		return rule + " in the device"
	}
	return rule
}
