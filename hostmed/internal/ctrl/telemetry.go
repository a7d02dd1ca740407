package ctrl

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Telemetry, logs 07h and 08h: what the controller knows of itself, as JSON, in data area 1. NVMe Base 2.0c 5.16.1.8, 5.16.1.9, 8.25.
//
// Host-initiated data is taken when the host asks; controller-initiated data when something went wrong, and is kept, over resets and
// restarts, until a host has read it. So an operator, in the guest or by the state directory, sees what it was like
// then.

// maxTelemetry bounds what is kept.
const maxTelemetry = 64 << 10

// telemetry is a snapshot.
type telemetry struct {
	Time       time.Time             `json:"time"`
	Reason     string                `json:"reason"`
	Controller telemetryController   `json:"controller"`
	Registers  map[string]string     `json:"registers"`
	Queues     []telemetryQueue      `json:"queues"`
	Namespaces []telemetryNamespace  `json:"namespaces"`
	Features   map[featureKey]uint32 `json:"featuresSetSinceReset"`
	Counters   telemetryCounters     `json:"counters"`
	Errors     []nvme.ErrorLogEntry  `json:"errors"` // newest last
	DataPath   string                `json:"dataPath,omitempty"`
}

type telemetryController struct {
	CNTLID    uint16 `json:"cntlid"`
	Subsystem string `json:"subsystem"`
	Firmware  string `json:"firmware"`
	State     string `json:"state"`
	Doorbells string `json:"doorbells"`
	Shared    bool   `json:"doorbellPageInUse"`
	PageSize  uint32 `json:"pageSize"`
}

type telemetryQueue struct {
	CQ  uint16   `json:"cq"`
	SQs []uint16 `json:"sqs"`
}

type telemetryNamespace struct {
	NSID   uint32 `json:"nsid"`
	Blocks uint64 `json:"blocks"`
	Block  uint64 `json:"blockSize"`
}

type telemetryCounters struct {
	IO              IOStats       `json:"io"`
	PowerOn         time.Duration `json:"powerOnNanoseconds"`
	PowerCycles     uint64        `json:"powerCycles"`
	UnsafeShutdowns uint64        `json:"unsafeShutdowns"`
	Errors          uint64        `json:"errors"`
	EventsWaiting   int           `json:"eventsWaiting"`
	EventRequests   int           `json:"eventRequests"`
}

// telemetryErrors is how many errors of the log a snapshot has.
const telemetryErrors = 8

// snapshot describes the controller as it is.
func (c *Controller) snapshot(reason string) string {
	r := &c.regs
	t := telemetry{
		Time: c.now().UTC().Round(0), Reason: reason,
		Controller: telemetryController{
			CNTLID: c.cfg.CNTLID, Subsystem: c.cfg.SubNQN, Firmware: c.cfg.Firmware, State: c.State(),
			Doorbells: c.cfg.Mode.String(), Shared: c.pages.shadow != nil, PageSize: c.pageSize,
		},
		Registers: map[string]string{
			"CAP": r.cap.String(), "CC": r.cc.String(), "CSTS": r.csts.String(), "AQA": r.aqa.String(),
			"ASQ": fmt.Sprintf("%#x", r.asq), "ACQ": fmt.Sprintf("%#x", r.acq), "INTMS": fmt.Sprintf("%#x", c.intMask.Load()),
		},
		Queues:   []telemetryQueue{},
		Features: c.feat.now,
		DataPath: c.cfg.Dump(),
	}
	for id, q := range c.queues.cq {
		if q.exists {
			t.Queues = append(t.Queues, telemetryQueue{CQ: uint16(id), SQs: c.queues.feeding(uint16(id))})
		}
	}
	for i := range c.cfg.Namespaces {
		n := &c.cfg.Namespaces[i]
		t.Namespaces = append(t.Namespaces, telemetryNamespace{n.NSID, n.Info.Blocks, 1 << n.Info.LBAShift})
	}
	c.cfg.Persistent.read(func(v *persisted) {
		t.Counters = telemetryCounters{
			IO: v.IO, PowerOn: v.PowerOn, PowerCycles: v.PowerCycles, UnsafeShutdowns: v.UnsafeShutdowns, Errors: v.ErrorCount,
			EventsWaiting: len(c.events.waiting), EventRequests: len(c.events.requests),
		}
		t.Errors = append(t.Errors, v.Errors[max(len(v.Errors)-telemetryErrors, 0):]...)
	})
	b, err := json.MarshalIndent(&t, "", " ")
	if err != nil {
		return err.Error()
	}
	return string(b[:min(len(b), maxTelemetry)])
}

func (t *queueTable) feeding(cqid uint16) []uint16 {
	list := []uint16{}
	for id, q := range t.sq {
		if q.exists && q.cqid == cqid {
			list = append(list, uint16(id))
		}
	}
	return list
}

// keepTelemetry takes controller-initiated data, unless there is some that nobody has read, which is nearer to the cause.
func (c *Controller) keepTelemetry(reason string) {
	var pending bool
	if c.cfg.Persistent.read(func(v *persisted) { pending = v.Telemetry != "" }); pending {
		return
	}
	data := c.snapshot(reason)
	c.cfg.Persistent.update(func(v *persisted) {
		v.Telemetry, v.TelemetryReason = data, reason
		v.TelemetryGeneration++
	})
	if c.ready && c.eventConfig()&nvme.EventConfigTelemetry != 0 {
		c.raise(nvme.MakeAsyncEvent(nvme.EventNotice, nvme.EventNoticeTelemetry, nvme.LogTelemetryCtrl))
	}
}

// telemetryPage is either log, and for the host's takes a snapshot first if it asks for one.
func (c *Controller) telemetryPage(cmd *nvme.Command) []byte {
	p := c.cfg.Persistent
	host := cmd.LID() == nvme.LogTelemetryHost
	if host && cmd.LogSpecific()&nvme.TelemetryCreate != 0 {
		c.sample()
		c.telemetry = c.snapshot("host request")
		p.update(func(v *persisted) { v.HostGeneration++ })
	}
	h := nvme.TelemetryHeader{LID: cmd.LID(), IEEE: ouiLocal}
	data, reason := c.telemetry, "host request"
	p.read(func(v *persisted) {
		h.Generation = v.TelemetryGeneration
		if v.Telemetry != "" {
			h.Available = 1
		}
		if host {
			h.HostScope, h.HostOrScope = nvme.TelemetryScopeController, v.HostGeneration
		} else {
			h.HostOrScope = nvme.TelemetryScopeController
			data, reason = v.Telemetry, v.TelemetryReason
		}
	})
	blocks := (len(data) + nvme.TelemetryBlock - 1) / nvme.TelemetryBlock
	h.LastBlock1 = uint16(blocks)
	h.LastBlock2, h.LastBlock3 = h.LastBlock1, h.LastBlock1
	copy(h.Reason[:], reason)
	page := make([]byte, (1+blocks)*nvme.TelemetryBlock)
	copy(page, h.Bytes()[:])
	copy(page[nvme.TelemetryBlock:], data)
	return page
}

// telemetryRead is called when the host has read the controller's data without Retain Asynchronous Event.
func (c *Controller) telemetryRead() {
	c.cfg.Persistent.update(func(v *persisted) { v.Telemetry, v.TelemetryReason = "", "" })
}
