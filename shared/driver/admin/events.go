package admin

import (
	"context"
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/shared/driver/lane"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

const (
	// maxEvents is how many Asynchronous Event Requests are kept outstanding.
	maxEvents = 4
	// eventPause is the least time between two events: a controller that sends more fills no log.
	eventPause = 100 * time.Millisecond
)

// events are the Asynchronous Event Requests.
type events struct {
	running sync.WaitGroup
	stop    context.CancelFunc
	got     chan event

	// mu guards what follows; the lane's lock is taken under it.
	mu    sync.Mutex
	epoch int // counts RequestEvents: what was asked before a reset is not asked again on its account
}

func (e *events) end() {
	if e.stop != nil {
		e.stop()
	}
}

// Watcher is told of events, each by a call that may take its time; nil: of none of that kind.
type Watcher struct {
	Namespaces func(ctx context.Context) // they are not what they were
	Health     func(ctx context.Context) // the SMART log has a warning
}

// WatchEvents logs events until Close, once RequestEvents asks for them, and tells w of them by a goroutine of its own.
func (a *Admin) WatchEvents(w Watcher) {
	ctx, cancel := context.WithCancel(context.Background())
	a.events.stop = cancel
	// Room for those of two enables, so that Complete never waits.
	a.events.got = make(chan event, 4*maxEvents)
	a.events.running.Add(1)
	go func() {
		defer a.events.running.Done()
		a.handleEvents(ctx, w)
	}()
}

// RequestEvents is part of every enable: it says which events are wanted, and keeps requests outstanding from then on.
func (a *Admin) RequestEvents(ctx context.Context) {
	a.configureEvents(ctx)
	a.events.mu.Lock()
	a.events.epoch++
	epoch := a.events.epoch
	a.events.mu.Unlock()
	for range min(int(a.Identity().AERL.Count()), maxEvents) {
		if !a.requestEvent(epoch) {
			break
		}
	}
}

// configureEvents asks for the notices about namespaces and firmware that the controller has, and for those about its health, which every
// controller has (NVMe Base 2.0c 5.27.1.9). Errors come unasked.
func (a *Admin) configureEvents(ctx context.Context) {
	want := nvme.EventConfig(a.Identity().OAES) & (nvme.EventConfigNamespace | nvme.EventConfigFirmware)
	if a.cfg.Health {
		want |= nvme.SMARTWarningSpare | nvme.SMARTWarningTemperature | nvme.SMARTWarningReliability | nvme.SMARTWarningReadOnly | nvme.SMARTWarningBackup
	}
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
	epoch  int
	status nvme.Status
	what   nvme.AsyncEvent
}

// request is one Asynchronous Event Request.
type request struct {
	got   chan<- event
	epoch int
	asked bool
}

func (a *Admin) requestEvent(epoch int) bool {
	a.events.mu.Lock()
	defer a.events.mu.Unlock()
	if epoch != a.events.epoch {
		return false
	}
	n, err := a.lane.StartForever(&request{got: a.events.got, epoch: epoch})
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

// Complete never waits, also when requests of several enables end at once.
func (r *request) Complete(status nvme.Status, result uint32) {
	select {
	case r.got <- event{epoch: r.epoch, status: status, what: nvme.AsyncEvent(result)}:
	default:
	}
}

// Lost is a reset: RequestEvents comes after it.
func (r *request) Lost(error) {}

func (a *Admin) handleEvents(ctx context.Context, w Watcher) {
	for {
		var e event
		select {
		case e = <-a.events.got:
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
		switch t := e.what.Type(); {
		case t == nvme.EventNotice && e.what.Info() == nvme.EventNoticeNamespace && w.Namespaces != nil:
			w.Namespaces(ctx)
		case t == nvme.EventSMART && w.Health != nil:
			w.Health(ctx)
		}
		select {
		case <-time.After(eventPause):
		case <-ctx.Done():
			return
		}
		a.requestEvent(e.epoch)
	}
}

// readEventLog reads the page that an event names, so that the next event of its kind may come. NVMe Base 2.0c 5.2. What the Changed
// Namespace List says is not believed: whoever is told of a change reads everything again.
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
	switch page {
	case nvme.LogError:
		var entry nvme.ErrorLogEntry
		copy(entry.Bytes()[:], data)
		a.log.Warn("controller error log", "status", entry.Status(), "sqid", entry.SQID, "cid", entry.CID, "nsid", entry.NSID, "lba", entry.LBA)
	case nvme.LogChangedNamespaces:
		var list nvme.ChangedNamespaceList
		copy(list.Bytes()[:], data)
		a.log.Warn("controller has changed namespaces", "nsids", list.ID[:list.Len()])
	}
}
