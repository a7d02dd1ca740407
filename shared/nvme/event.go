package nvme

// AsyncEvent is DW0 of a completed Asynchronous Event Request: type in bits 2:0,
// information in bits 15:8, log page in bits 23:16. NVMe Base 2.0c 5.2.1.
type AsyncEvent uint32

// MakeAsyncEvent puts the fields together.
func MakeAsyncEvent(typ EventType, info uint8, log LogPage) AsyncEvent {
	return AsyncEvent(uint32(typ&7) | uint32(info)<<8 | uint32(log)<<16)
}

// Type returns the kind of event; reading its log page lets the next of the kind come.
func (e AsyncEvent) Type() EventType { return EventType(e) & 7 }

// Info returns what happened; its meaning depends on Type.
func (e AsyncEvent) Info() uint8 { return uint8(e >> 8) }

// Log returns the log page that tells more.
func (e AsyncEvent) Log() LogPage { return LogPage(e >> 16) }

// EventType is the kind of an AsyncEvent.
type EventType uint8

// Values of EventType.
const (
	EventError  EventType = 0
	EventSMART  EventType = 1
	EventNotice EventType = 2
	EventIO     EventType = 6
	EventVendor EventType = 7
)

// Values of AsyncEvent.Info for EventError.
const (
	EventErrorDoorbellRegister = 0 // write to a doorbell of no queue
	EventErrorDoorbellValue    = 1 // value outside the ring, or past what was free
	EventErrorDiagnostic       = 2
	EventErrorPersistent       = 3
	EventErrorTransient        = 4
	EventErrorFirmware         = 5
)

// Values of AsyncEvent.Info for EventSMART.
const (
	EventSMARTReliability = 0
	EventSMARTTemperature = 1
	EventSMARTSpare       = 2
)

// Values of AsyncEvent.Info for EventNotice.
const (
	EventNoticeNamespace = 0x00
	EventNoticeFirmware  = 0x01
	EventNoticeTelemetry = 0x02
	EventNoticeANA       = 0x03
	EventNoticePLM       = 0x04
	EventNoticeLBAStatus = 0x05
	EventNoticeEndurance = 0x06
	EventNoticeDiscovery = 0xF0
)

func (t EventType) String() string {
	switch t {
	case EventError:
		return "Error"
	case EventSMART:
		return "SMART / Health"
	case EventNotice:
		return "Notice"
	case EventIO:
		return "I/O Command Specific"
	case EventVendor:
		return "Vendor Specific"
	}
	return "Event Type " + hex8(uint8(t))
}

var eventNames = map[EventType]map[uint8]string{
	EventError: {
		EventErrorDoorbellRegister: "Write to Invalid Doorbell Register", EventErrorDoorbellValue: "Invalid Doorbell Write Value",
		EventErrorDiagnostic: "Diagnostic Failure", EventErrorPersistent: "Persistent Internal Error",
		EventErrorTransient: "Transient Internal Error", EventErrorFirmware: "Firmware Image Load Error",
	},
	EventSMART: {
		EventSMARTReliability: "NVM Subsystem Reliability", EventSMARTTemperature: "Temperature Threshold", EventSMARTSpare: "Spare Below Threshold",
	},
	EventNotice: {
		EventNoticeNamespace: "Namespace Attribute Changed", EventNoticeFirmware: "Firmware Activation Starting",
		EventNoticeTelemetry: "Telemetry Log Changed", EventNoticeANA: "Asymmetric Namespace Access Change",
		EventNoticePLM: "Predictable Latency Event Aggregate Log Change", EventNoticeLBAStatus: "LBA Status Information Alert",
		EventNoticeEndurance: "Endurance Group Event Aggregate Log Page Change", EventNoticeDiscovery: "Discovery Log Page Change",
	},
}

// String prints "Error: Invalid Doorbell Write Value, log 01h".
func (e AsyncEvent) String() string {
	name, ok := eventNames[e.Type()][e.Info()]
	if !ok {
		name = "Info " + hex8(e.Info())
	}
	return e.Type().String() + ": " + name + ", log " + hex8(uint8(e.Log()))
}
