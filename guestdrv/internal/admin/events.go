package admin

import (
	"context"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv/internal/lane"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

const (
	// maxEvents is how many Asynchronous Event Requests are kept outstanding.
	maxEvents = 4
	// eventPause is the least time between two events: a controller that sends more fills no log.
	eventPause = 100 * time.Millisecond
)

// WatchEvents keeps Asynchronous Event Requests outstanding and logs what comes, until Close. A device without interrupts is not asked:
// requests that never end would keep the poller of the admin queue running.
func (a *Admin) WatchEvents() {
	if a.cfg.EventFD < 0 {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	a.stop = cancel
	n := min(int(a.id.AERL.Count()), maxEvents)
	got := make(chan event, n)
	for range n {
		if !a.requestEvent(got) {
			break
		}
	}
	a.events.Add(1)
	go func() {
		defer a.events.Done()
		a.configureEvents(ctx)
		a.logEvents(ctx, got)
	}()
}

// configureEvents asks for the notices about namespaces and firmware that the controller has. Errors come unasked.
func (a *Admin) configureEvents(ctx context.Context) {
	want := nvme.EventConfig(a.id.OAES) & (nvme.EventConfigNamespace | nvme.EventConfigFirmware)
	if want == 0 {
		return
	}
	var cmd nvme.Command
	cmd.SetSetFeatures(nvme.FeatureAsyncEvents, 0, uint32(want))
	if _, err := a.exec(ctx, cmd, nil); err != nil && ctx.Err() == nil {
		a.log.Debug("asynchronous events", "error", err)
	}
}

// event is the end of an Asynchronous Event Request.
type event struct {
	status nvme.Status
	what   nvme.AsyncEvent
}

// request is one Asynchronous Event Request.
type request struct {
	got   chan<- event
	asked bool
}

func (a *Admin) requestEvent(got chan<- event) bool {
	n, err := a.lane.StartForever(&request{got: got})
	return n == 1 && err == nil
}

func (r *request) Next(_ uint16, cmd *nvme.Command) (lane.Sink, error) {
	if r.asked {
		return nil, nil
	}
	r.asked = true
	cmd.Opcode = nvme.AdminAsyncEventRequest
	return r, nil
}

func (r *request) String() string { return "ASYNCHRONOUS EVENT REQUEST" }

// Complete never blocks: got has room for every request.
func (r *request) Complete(status nvme.Status, result uint32) {
	r.got <- event{status: status, what: nvme.AsyncEvent(result)}
}

func (a *Admin) logEvents(ctx context.Context, got chan event) {
	for {
		var e event
		select {
		case e = <-got:
		case <-a.lane.Failed():
			return
		case <-ctx.Done():
			return
		}
		if !e.status.OK() {
			// It has fewer requests than it said, or none: one that is refused is not asked again.
			a.log.Debug("asynchronous event request refused", "status", e.status)
			continue
		}
		a.log.Warn("controller event", "event", e.what)
		a.readEventLog(ctx, e.what.Log())
		select {
		case <-time.After(eventPause):
		case <-ctx.Done():
			return
		}
		a.requestEvent(got)
	}
}

// readEventLog reads the page that an event names, so that the next event of its kind may come. NVMe Base 2.0c 5.2.
func (a *Admin) readEventLog(ctx context.Context, page nvme.LogPage) {
	size := 4096
	switch page {
	case nvme.LogError:
		size = 64
	case nvme.LogSMART, nvme.LogFirmwareSlot:
		size = 512
	case nvme.LogChangedNamespaces:
	default:
		return
	}
	var cmd nvme.Command
	if err := cmd.SetGetLogPage(page, nvme.NSIDAll, 0, uint64(size), false); err != nil {
		return
	}
	data := make([]byte, size)
	if _, err := a.exec(ctx, cmd, data); err != nil {
		if ctx.Err() == nil {
			a.log.Debug("log page of an event", "error", err)
		}
		return
	}
	if page == nvme.LogError {
		var entry nvme.ErrorLogEntry
		copy(entry.Bytes()[:], data)
		a.log.Warn("controller error log", "status", entry.Status(), "sqid", entry.SQID, "cid", entry.CID, "nsid", entry.NSID, "lba", entry.LBA)
	}
}
