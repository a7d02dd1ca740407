package ctrl

import (
	"encoding/binary"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// The Persistent Event log, 0Dh: what happened to the controller over its life. NVMe Base 2.0c 5.16.1.14.
//
// A host reads a snapshot, its reporting context, which it establishes and releases; there is one, and a reset ends it. Times are
// those of hostmed's clock: the Timestamp feature is 0 when most of what matters happens.

// maxEventBytes bounds the events that are kept; the oldest go.
const maxEventBytes = 32 << 10

// snapshotPeriod is how often the SMART log becomes an event, beside each shutdown.
const snapshotPeriod = 24 * time.Hour

// loggedEvent is an event as it is kept.
type loggedEvent struct {
	Type nvme.PersistentEventType `json:"type"`
	Time int64                    `json:"time"` // milliseconds since 1970
	Data []byte                   `json:"data"`
}

func (e *loggedEvent) size() int { return nvme.PersistentEventHeaderSize + len(e.Data) }

var loggedEvents = []nvme.PersistentEventType{
	nvme.PersistentSMART, nvme.PersistentTimestamp, nvme.PersistentPowerOnReset, nvme.PersistentChangeNamespace,
	nvme.PersistentFormatStart, nvme.PersistentFormatEnd,
}

// logEvent keeps an event.
func (c *Controller) logEvent(t nvme.PersistentEventType, data []byte) {
	e := loggedEvent{Type: t, Time: c.now().UnixMilli(), Data: data}
	c.cfg.Persistent.update(func(v *persisted) {
		v.Events = append(v.Events, e)
		total := 0
		for i := range v.Events {
			total += v.Events[i].size()
		}
		for total > maxEventBytes {
			total -= v.Events[0].size()
			v.Events = append(v.Events[:0], v.Events[1:]...)
		}
	})
}

func clockTimestamp(ms int64) nvme.Timestamp {
	return nvme.MakeTimestamp(uint64(ms), nvme.TimestampOriginHost<<nvme.TimestampOriginShift)
}

// logReset keeps that power came on, or that the controller was reset.
func (c *Controller) logReset() {
	b := make([]byte, 8, 8+36)
	nvme.SetASCII(b, c.cfg.Firmware)
	le := binary.LittleEndian
	now := clockTimestamp(c.now().UnixMilli())
	c.cfg.Persistent.read(func(v *persisted) {
		b = le.AppendUint16(b, c.cfg.CNTLID)
		b = append(b, make([]byte, 14)...) // no firmware activation, no operation in progress
		b = le.AppendUint32(b, uint32(v.PowerCycles))
		b = le.AppendUint64(b, uint64((v.PowerOn + c.now().Sub(c.power.since)).Milliseconds()))
		b = append(b, now[:]...)
	})
	c.logEvent(nvme.PersistentPowerOnReset, b)
}

// logSMART keeps the SMART log as it is.
func (c *Controller) logSMART() {
	c.power.snapshot = c.now()
	c.logEvent(nvme.PersistentSMART, c.smart().Bytes()[:])
}

// logTimestamp keeps that the host has set the time, which was was.
func (c *Controller) logTimestamp(was nvme.Timestamp, sinceReset time.Duration) {
	c.logEvent(nvme.PersistentTimestamp, binary.LittleEndian.AppendUint64(was[:], uint64(sinceReset.Milliseconds())))
}

// logBegun keeps that a command that takes long has begun, logEnded what came of one that has succeeded or was begun.
func (c *Controller) logBegun(cmd *nvme.Command) {
	if cmd.Opcode != nvme.AdminFormatNVM {
		return
	}
	le := binary.LittleEndian
	b := le.AppendUint32(nil, cmd.NSID)
	b = append(b, c.controllerData().FNA, 0, 0, 0)
	c.logEvent(nvme.PersistentFormatStart, le.AppendUint32(b, cmd.CDW10))
}

func (c *Controller) logEnded(cmd *nvme.Command, r *result) {
	le := binary.LittleEndian
	switch {
	case cmd.Opcode == nvme.AdminFormatNVM:
		const failed = 1
		b := le.AppendUint32(nil, cmd.NSID)
		b = append(b, 0, 0, 0, 0)
		if !r.status.OK() {
			b[5] = failed
		}
		c.logEvent(nvme.PersistentFormatEnd, le.AppendUint32(b, uint32(r.status)))
	case cmd.Opcode == nvme.AdminNamespaceManagement && r.status.OK():
		nsid := cmd.NSID
		if r.dw0 != 0 { // created
			nsid = r.dw0
		}
		c.logNamespace(cmd.CDW10, nsid)
	}
}

func (c *Controller) logNamespace(cdw10, nsid uint32) {
	b := make([]byte, 48)
	le := binary.LittleEndian
	le.PutUint32(b, cdw10)
	le.PutUint32(b[44:], nsid)
	if n := c.cfg.Self.Subsystem().Namespace(nsid); n != nil {
		le.PutUint64(b[8:], n.Medium().Info.Blocks)
		le.PutUint64(b[16:], n.Medium().Info.Size())
		if n.Shared {
			b[34] = nvme.NMICShared
		}
	}
	c.logEvent(nvme.PersistentChangeNamespace, b)
}

// persistentEvents does what the log specific field of Get Log Page asks for; done says that there is nothing to transfer.
func (c *Controller) persistentEvents(cmd *nvme.Command) (page []byte, r result, done bool) {
	action := cmd.LogSpecific() & 3
	exists := c.reporting != nil
	switch {
	case action == nvme.PersistentRead && !exists:
		return nil, fail(nvme.StatusSequenceError, dword(10, 8), "there is no reporting context"), true
	case action == nvme.PersistentEstablish && exists:
		return nil, fail(nvme.StatusSequenceError, dword(10, 8), "there is a reporting context already"), true
	case action == nvme.PersistentRelease:
		c.reporting = nil
		return nil, result{}, true
	case !exists:
		c.reporting = c.eventLog()
	}
	if action == nvme.PersistentHeader {
		return c.reporting[:nvme.PersistentHeaderSize], result{}, false
	}
	return c.reporting, result{}, false
}

// eventLog is the log as it is now.
func (c *Controller) eventLog() []byte {
	c.sample()
	id := c.controllerData()
	l := nvme.PersistentLog{
		Time: clockTimestamp(c.now().UnixMilli()), VID: id.VID, SSVID: id.SSVID, SN: id.SN, MN: id.MN, SUBNQN: id.SUBNQN,
		Supported: loggedEvents,
	}
	page := make([]byte, nvme.PersistentHeaderSize)
	var n uint32
	c.cfg.Persistent.update(func(v *persisted) {
		v.EventGeneration++
		l.Generation, l.PowerOnHours, l.PowerCycles = v.EventGeneration, uint64(v.PowerOn/time.Hour), v.PowerCycles
		n = uint32(len(v.Events))
		for i := len(v.Events) - 1; i >= 0; i-- {
			e := &v.Events[i]
			page = nvme.AppendPersistentEvent(page, e.Type, c.cfg.CNTLID, clockTimestamp(e.Time), e.Data)
		}
	})
	copy(page, l.Header(n, uint64(len(page)))[:])
	return page
}
