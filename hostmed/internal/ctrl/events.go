package ctrl

import (
	"fmt"
	"slices"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Asynchronous events. NVMe Base 2.0c 5.2.
//
// An event waits until the host has an Asynchronous Event Request outstanding; one that waits already is not added again, since
// it would tell the host nothing that the log page does not. When an event is reported, its type is
// masked until the host reads the event's log page without Retain Asynchronous Event. That also ends the waiting of what
// the page has told.

// aerLimit is how many Asynchronous Event Requests may be outstanding (AERL + 1).
const aerLimit = 16

const eventTypes = 8

type events struct {
	requests []uint16          // CIDs of outstanding requests, oldest first; at most aerLimit (R33)
	waiting  []nvme.AsyncEvent // oldest first, each once; there are few that can be
	masked   [eventTypes]bool
	by       [eventTypes]nvme.LogPage // reading it ends the masking
}

// QueueErrorKind is what a worker found wrong with a doorbell.
type QueueErrorKind uint8

const (
	BadDoorbellRegister QueueErrorKind = nvme.EventErrorDoorbellRegister // of a queue that is not there
	BadDoorbellValue    QueueErrorKind = nvme.EventErrorDoorbellValue    // outside the ring, or past the other end
	QueueFailed         QueueErrorKind = nvme.EventErrorPersistent       // its memory is gone
)

// QueueError reports that queue qid had an invalid doorbell (R30) or has failed: an event and an entry in the error log.
func (c *Controller) QueueError(qid uint16, kind QueueErrorKind) {
	c.log.warn("queue error", "queue", qid, "event", nvme.MakeAsyncEvent(nvme.EventError, uint8(kind), nvme.LogError).String())
	c.guarded(func() bool {
		c.queueError(qid, kind)
		c.interrupt()
		return false
	})
}

func (c *Controller) queueError(qid uint16, kind QueueErrorKind) {
	c.takeIOErrors()
	c.cfg.Persistent.addError(nvme.ErrorLogEntry{SQID: qid, CID: 0xffff, Location: uint16(nowhere)}, nvme.StatusSuccess)
	ev := nvme.MakeAsyncEvent(nvme.EventError, uint8(kind), nvme.LogError)
	c.raise(ev)
	c.keepTelemetry(fmt.Sprintf("queue %d: %v", qid, ev))
}

// takeIOErrors brings the error log up to date. Those that are too many for it are counted.
func (c *Controller) takeIOErrors() {
	newest, n := c.cfg.IOErrors()
	if missed := n - uint64(len(newest)); missed > 0 {
		c.cfg.Persistent.update(func(v *persisted) { v.ErrorCount += missed })
	}
	for _, e := range newest {
		c.cfg.Persistent.addError(nvme.ErrorLogEntry{SQID: e.SQID, CID: e.CID, Location: e.Location, NSID: e.NSID, LBA: e.LBA}, e.Status)
	}
}

// UpdateNamespaces replaces the namespaces. Ids that came, went or changed go to the Changed Namespace List,
// and raise an event if the host asked for it. The data path must have the new ones already, and still the old.
func (c *Controller) UpdateNamespaces(namespaces []Namespace) {
	old := c.cfg.Namespaces
	c.cfg.Namespaces = sortedNamespaces(namespaces)
	changed := c.health.changed
	for _, n := range slices.Concat(old, c.cfg.Namespaces) {
		was, is := findNamespace(old, n.NSID), findNamespace(c.cfg.Namespaces, n.NSID)
		if was == nil || is == nil || was.Info != is.Info || was.Of != is.Of || was.Protection != is.Protection || was.Formats != is.Formats {
			changed = append(changed, n.NSID)
		}
	}
	if c.ready {
		c.applyDULBE()
	}
	slices.Sort(changed)
	c.health.changed = slices.Compact(changed)
	if len(c.health.changed) == 0 || c.eventConfig()&nvme.EventConfigNamespace == 0 {
		return
	}
	c.guarded(func() bool {
		c.raise(nvme.MakeAsyncEvent(nvme.EventNotice, nvme.EventNoticeNamespace, nvme.LogChangedNamespaces))
		c.interrupt()
		return false
	})
}

func (c *Controller) asyncEventRequest(cmd *nvme.Command) result {
	e := &c.events
	if len(e.requests) == aerLimit {
		return fail(nvme.StatusAERLimit, nowhere, "AERL+1 requests are outstanding")
	}
	if slices.Contains(e.requests, cmd.CID) {
		return fail(nvme.StatusCIDConflict, location(2), "a request with this id is outstanding")
	}
	e.requests = append(e.requests, cmd.CID)
	c.reportEvents()
	return result{later: true}
}

// abortEventRequest completes the outstanding request cid, ahead of the Abort that asked for it.
func (c *Controller) abortEventRequest(cid uint16) bool {
	i := slices.Index(c.events.requests, cid)
	if i < 0 {
		return false
	}
	c.events.requests = slices.Delete(c.events.requests, i, i+1)
	c.complete(cid, 0, nvme.StatusAbortRequested)
	return true
}

func (c *Controller) raise(ev nvme.AsyncEvent) {
	if !slices.Contains(c.events.waiting, ev) {
		c.events.waiting = append(c.events.waiting, ev)
	}
	c.reportEvents()
}

// reportEvents completes a request for each event that waits and is not masked.
func (c *Controller) reportEvents() {
	e := &c.events
	for i := 0; i < len(e.waiting) && len(e.requests) > 0; {
		ev := e.waiting[i]
		t := ev.Type()
		if e.masked[t] {
			i++
			continue
		}
		cid := e.requests[0]
		e.requests = slices.Delete(e.requests, 0, 1)
		e.waiting = slices.Delete(e.waiting, i, i+1)
		e.masked[t], e.by[t] = true, ev.Log()
		c.complete(cid, uint32(ev), nvme.StatusSuccess)
	}
}

// clearEvents is called when the host has read log without Retain Asynchronous Event: it
// knows what happened up to now.
func (c *Controller) clearEvents(log nvme.LogPage) {
	e := &c.events
	switch log {
	case nvme.LogChangedNamespaces:
		c.health.changed = nil
	case nvme.LogTelemetryCtrl:
		c.telemetryRead()
	case nvme.LogReservation:
		c.reservationRead()
	}
	e.waiting = slices.DeleteFunc(e.waiting, func(ev nvme.AsyncEvent) bool { return ev.Log() == log })
	for t := range e.masked {
		if e.masked[t] && e.by[t] == log {
			e.masked[t] = false
		}
	}
	if log == nvme.LogReservation && len(c.notices.list) > 0 {
		c.raiseReservation()
		return
	}
	c.reportEvents()
}
