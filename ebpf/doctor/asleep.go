package doctor

import (
	"fmt"
	"math/bits"
	"slices"

	"github.com/shadowbell/shadowbell/shared/inspect"
)

// judge says what the queue's state comes to.
func (w *watch) judge() Finding {
	for _, look := range []func() (Finding, bool){
		w.born, w.failed, w.elsewhere, w.overrun, w.overwritten, w.behind, w.asleep, w.astray, w.unpublished, w.interrupt,
	} {
		if f, ok := look(); ok {
			return f
		}
	}
	return w.ordinary()
}

// sleeps says whether the device waits for a doorbell.
func (w *watch) sleeps() bool { return sleeps(w.q) }

func sleeps(q *inspect.Queue) bool { return q.QID != 0 && q.State == "armed" && !q.Unseen }

// stopped says that the device takes nothing from the SQ, whatever its tail: so it is not armed.
func (w *watch) stopped() bool { return w.q.Full || w.q.Blocked && w.tail() != w.q.SQ.Private }

const (
	remedyDriver = "the driver must store the doorbell and then load the event index with a full barrier between them, and ring when the index is in [old, new)"
	remedyDevice = "report this with the output of --record: it is hostmed's"
	kick         = "--fix kick wakes the queue; "
)

// asleep judges a device that waits for a doorbell, in the order of what it does: resume, arm, sleep, wake.
func (w *watch) asleep() (Finding, bool) {
	if !w.sleeps() || !w.done {
		return Finding{}, false
	}
	q := w.q
	if w.shared() && !w.stopped() && q.SQ.Asked != q.SQ.Private {
		return w.notArmed(), true
	}
	if q.KicksAsleep > 0 {
		if q.ResumedAt > q.ArmedAt {
			return w.broken("R27", Device, kick+remedyDevice, "%s came, the queue was paused or parked, and when it went on nobody looked", messages(q.KicksAsleep)), true
		}
		return w.broken("R10", Device, kick+remedyDevice, "%s came while it slept, and it sleeps on: a kick was dropped", messages(q.KicksAsleep)), true
	}
	if !w.stopped() && q.ArmedAt != 0 && q.ArmIndex == q.SQ.Private && q.ArmSaw != q.SQ.Private {
		return w.broken("R3", Device, kick+remedyDevice, "when it had armed at %d it loaded tail %d, and went to sleep all the same", q.ArmIndex, q.ArmSaw), true
	}
	if q.Blocked {
		if f, ok := w.starved(); ok {
			return f, true
		}
	}
	if !w.stopped() && w.tail() != q.SQ.Private {
		return w.missed("tail", &q.SQ, q.Size), true
	}
	return Finding{}, false
}

// notArmed is a sleeping device that did not ask for the doorbell that it waits for.
func (w *watch) notArmed() Finding {
	q, asked := w.q, w.q.SQ.Asked
	if q.ResumedAt > q.ArmedAt {
		return w.broken("R27", Device, kick+remedyDevice, "it was paused or parked, and when it went on it slept without looking at the tail or arming: event index %d is not %d", asked, q.SQ.Private)
	}
	if isBehind(q, asked) || asked >= q.Size {
		what := "the marker of polling"
		if asked >= q.Size {
			what = fmt.Sprintf("a fixed marker of polling, %#x,", asked)
		}
		if !w.undrained() {
			return w.broken("R12", Device, kick+remedyDevice, "%s was left in the event index when it went to sleep", what)
		}
		f := w.broken("R13", Device, kick+remedyDevice, "nothing was fetched since it last woke, and it slept with %s in the event index: arming is tied to draining", what)
		if !w.drainedElsewhere() {
			f.Doubt = "R12, a device that never arms: no other queue shows that it does after commands"
		}
		return f
	}
	return w.broken("R11", Device, kick+remedyDevice, "it stored event index %d, which is neither what it consumed nor one behind: an index that is counted, not read", asked)
}

// undrained says that the device has fetched nothing since it last woke.
func (w *watch) undrained() bool {
	return w.q.Commands == 0 || slices.ContainsFunc(w.all, func(m moment) bool {
		return m.q.Commands == w.q.Commands && m.q.Armed < w.q.Armed && sleeps(&m.q) && m.q.SQ.Asked == m.q.SQ.Private
	})
}

// drainedElsewhere says whether another queue of the controller sleeps after it had commands, and is armed.
func (w *watch) drainedElsewhere() bool {
	return slices.ContainsFunc(w.c.Queues, func(o inspect.Queue) bool {
		return o.QID != w.q.QID && sleeps(&o) && !o.Full && !o.Blocked && o.Commands > 0 && o.SQ.Asked == o.SQ.Private
	})
}

// starved is a device that sleeps because the CQ is full.
func (w *watch) starved() (Finding, bool) {
	q := w.q
	if w.shared() && q.CQ.Asked != q.CQ.Private {
		why := "is not where the head stands"
		if q.CQ.Asked == q.CQTail {
			why = "is the CQ's tail, which means never"
		}
		f := w.broken("R8", Device, kick+remedyDevice, "%s: it asked to be rung for head %d, and that %s", w.full(), q.CQ.Asked, why)
		return f, true
	}
	if w.head() != q.CQ.Private {
		return w.missed("CQ head", &q.CQ, q.CQSize), true
	}
	return Finding{}, false
}

// missed is a doorbell that has moved while the device waits for it.
func (w *watch) missed(what string, b *inspect.Bell, size uint32) Finding {
	q, now := w.q, told(w.c, w.q, b)
	if w.c.Stalled {
		return w.finding(Unknown, Neither, "%s: a message of the client is being handled, and the doorbell may be among those behind it", w.seen())
	}
	if !w.shared() {
		if w.c.Mode == "mmap" {
			f := w.broken("", Device, kick+remedyDevice, "the %s is in the mapped page, and the device does not look there", what)
			f.Text = f.Text[:len(f.Text)-2] // no rule to name
			return f
		}
		return w.broken("R10", Device, kick+remedyDevice, "the doorbell register holds %s %d, and the device was not woken", what, now)
	}
	for _, m := range w.all {
		bell := &m.q.SQ
		if b == &q.CQ {
			bell = &m.q.CQ
		}
		if m.q.ArmedAt < q.ArmedAt && m.q.Commands == q.Commands && m.q.Completions == q.Completions && told(m.c, &m.q, bell) == now && bell.Private == b.Private {
			f := w.broken("R15", Device, remedyDevice, "%s %d was in the page before it armed, and it read another value there", what, now)
			f.Doubt = "R7 or R20: the device does not see what the driver stores"
			return f
		}
	}
	if now >= size {
		f := w.broken("R30", Driver, "reset the controller", "%s %d is not in a ring of %d", what, now, size)
		if swapped := bits.ReverseBytes32(now); swapped < size {
			f = w.broken("R20", Driver, "reset the controller; doorbells are little endian", "%s %#x is %d with its bytes swapped", what, now, swapped)
		}
		return f
	}
	where := ""
	if b == &q.CQ {
		where = w.full() + ": "
	}
	f := w.broken("R1", Driver, kick+remedyDriver, "%sthe driver stored its %s and did not ring although %d is in %s", where, what, b.Event, between(b.Private, now))
	f.Doubt = "a VMM that loses the driver's write on its way"
	if !slices.ContainsFunc(w.all, func(m moment) bool {
		bell := &m.q.SQ
		if b == &q.CQ {
			bell = &m.q.CQ
		}
		return m.q.ArmedAt == q.ArmedAt && told(m.c, &m.q, bell) == b.Private
	}) {
		f.Doubt += "; or R2 in the device, if the store came at the time of its arm: hostmed's is one exchange, which tests hold"
	}
	return f
}
