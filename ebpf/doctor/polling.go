package doctor

import (
	"fmt"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/inspect"
)

// shown says whether wrong is true of the newest moment that it applies to, and of one more.
func (w *watch) shown(wrong func(*moment) (applies, wrong bool)) bool {
	n := 0
	for i := len(w.all) - 1; i >= 0 && n < 2; i-- {
		applies, is := wrong(&w.all[i])
		if applies && !is && n == 0 {
			return false
		}
		if applies && is {
			n++
		}
	}
	return n == 2
}

// live says that the device wrote the queue's event index on its thread.
func (m *moment) live() bool {
	q := &m.q
	return q.QID != 0 && m.c.Shared && (q.State == "polling" || q.State == "armed")
}

// isBehind says whether index is what a device that polls stores: one behind what it had consumed when it last did, at most a quarter of
// the ring ago (R14).
func isBehind(q *inspect.Queue, index uint32) bool {
	d, ok := distance(index, q.SQ.Private, q.Size)
	return ok && d >= 1 && (d-1)*4 < q.Size
}

// behind judges a device that polls.
func (w *watch) behind() (Finding, bool) {
	if !w.shown(func(m *moment) (bool, bool) {
		return m.live() && m.q.State == "polling" && !m.q.Fresh, !isBehind(&m.q, m.q.SQ.Asked)
	}) {
		return Finding{}, false
	}
	q := w.q
	for i := len(w.all) - 1; i >= 0; i-- { // the newest that it is true of
		if m := &w.all[i]; m.live() && m.q.State == "polling" && !isBehind(&m.q, m.q.SQ.Asked) {
			q = &m.q
			break
		}
	}
	const remedy = "it costs the driver a doorbell for each lap and loses nothing; " + remedyDevice
	if q.SQ.Asked == q.SQ.Private {
		return w.broken("R14", Device, remedy, "while it polled at %d it asked to be rung for %d", q.SQ.Private, q.SQ.Asked), true
	}
	return w.broken("R14", Device, remedy, "while it polled at %d its event index was %s, not one behind, so the driver rings each lap for nothing (%s so far)",
		q.SQ.Private, index(q.SQ.Asked), messages(w.q.Kicks)), true
}

func index(v uint32) string {
	if v >= 1<<16 {
		return fmt.Sprintf("%#x", v)
	}
	return fmt.Sprint(v)
}

// overwritten finds an event index that is not what the device stored.
func (w *watch) overwritten() (Finding, bool) {
	const remedy = kick + "the event-index page is the device's to write, once it is configured"
	if w.shown(func(m *moment) (bool, bool) { return m.live(), m.q.SQ.Event != m.q.SQ.Asked }) {
		return w.broken("R18", Driver, remedy, "the device stored event index %d, and somebody else %s: only the device writes there", w.q.SQ.Asked, index(w.q.SQ.Event)), true
	}
	if w.shown(func(m *moment) (bool, bool) { return m.live() && m.q.Blocked, m.q.CQ.Event != m.q.CQ.Asked }) {
		return w.broken("R18", Driver, remedy, "of CQ %d the device stored event index %d, and somebody else %s: only the device writes there", w.q.CQID, w.q.CQ.Asked, index(w.q.CQ.Event)), true
	}
	return Finding{}, false
}

// elsewhere finds a device that does not read its doorbell where the driver writes it.
func (w *watch) elsewhere() (Finding, bool) {
	if !w.done || !w.newest().live() {
		return Finding{}, false
	}
	for i := range w.still {
		if v := w.still[i].view; v == nil || !v.Doorbells || v.Tail != w.newest().view.Tail || v.Tail == w.q.SQ.Page {
			return Finding{}, false
		}
	}
	v := w.newest().view.Tail
	f := w.broken("R15", Device, remedyDevice, "it reads tail %s where the page holds %s: it looks at another place", index(w.q.SQ.Page), index(v))
	f.Doubt = "R7, R20 or R29: the device does not see what the driver stores"
	return f, true
}

// overrun finds more completions promised than the CQ has entries.
func (w *watch) overrun() (Finding, bool) {
	used := func(m *moment) (uint32, bool) {
		posted, ok := distance(m.q.CQ.Private, m.q.CQTail, m.q.CQSize)
		for i := range m.c.Queues {
			if o := &m.c.Queues[i]; o.CQID == m.q.CQID && o.QID != 0 {
				posted += o.Inflight
			}
		}
		return posted + m.q.Staged, ok
	}
	if w.q.QID == 0 || !w.shown(func(m *moment) (bool, bool) {
		n, ok := used(m)
		return ok && m.live(), n > m.q.CQSize-1
	}) {
		return Finding{}, false
	}
	n, _ := used(&w.all[len(w.all)-1])
	return w.broken("R9", Device, remedyDevice, "%d completions are posted or promised in CQ %d of %d entries", n, w.q.CQID, w.q.CQSize), true
}

// astray finds a driver that rings the registers of a queue whose doorbells are in the pages, and stores nothing there.
func (w *watch) astray() (Finding, bool) {
	q := w.q
	if !w.newest().live() || q.Kicks == 0 || w.tail() != q.SQ.Private || q.SQ.Rung == w.tail() || q.SQ.Rung >= q.Size {
		return Finding{}, false
	}
	values := map[uint32]bool{}
	for i := len(w.all) - 1; i >= 0; i-- {
		if m := &w.all[i].q; told(w.all[i].c, m, &m.SQ) != w.tail() || m.Commands != q.Commands {
			break
		}
		values[w.all[i].q.SQ.Rung] = true
	}
	firstLap := q.Commands == uint64(q.SQ.Private) && q.SQ.Rung > q.SQ.Private && w.done
	if len(values) < 3 && !firstLap {
		return Finding{}, false
	}
	return w.broken("R15", Driver, "the driver must store its tail in the page that it has configured; a register's value does not count then (R17)",
		"the driver rang %d times, last with tail %d, which it never stored in the page", q.Kicks, q.SQ.Rung), true
}

// interrupt finds completions that nobody was told of.
func (w *watch) interrupt() (Finding, bool) {
	const remedy = "the driver's own timeout finds the completions (Linux: nvme_timeout, \"completion polled\"); " + remedyDevice
	if w.shown(func(m *moment) (bool, bool) {
		return m.q.QID != 0 && m.q.Vector >= 0 && !m.c.Coalesced && m.q.State != "failed", m.q.Unraised > 0
	}) {
		quiet := "and the driver does not poll"
		if w.q.CQ.Page&dbbuf.QuietBit != 0 && w.shared() {
			quiet = "before the driver began to poll"
		}
		return w.broken(Interrupt, Device, remedy, "%d completions were posted in CQ %d up to entry %d, vector %d is on, %s, and no interrupt was raised for them",
			w.q.Unraised, w.q.CQID, w.q.CQTail, w.q.Vector, quiet), true
	}
	if w.done && w.q.QID != 0 && w.q.VectorLatch && w.q.VectorFD && !w.q.VectorMasked {
		return w.broken(Interrupt, Device, remedy, "an interrupt of vector %d waits, and nothing holds it back", w.q.Vector), true
	}
	return Finding{}, false
}
