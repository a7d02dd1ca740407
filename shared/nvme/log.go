package nvme

// LogPage names a log page. NVMe Base 2.0c 5.16.1, figure 202.
type LogPage uint8

// Log page identifiers.
const (
	LogSupported         LogPage = 0x00
	LogError             LogPage = 0x01
	LogSMART             LogPage = 0x02
	LogFirmwareSlot      LogPage = 0x03
	LogChangedNamespaces LogPage = 0x04
	LogCommandEffects    LogPage = 0x05
	LogSelfTest          LogPage = 0x06
	LogTelemetryHost     LogPage = 0x07
	LogTelemetryCtrl     LogPage = 0x08
	LogEnduranceGroup    LogPage = 0x09
	LogPLMPerSet         LogPage = 0x0A
	LogPLMEvents         LogPage = 0x0B
	LogANA               LogPage = 0x0C
	LogPersistentEvent   LogPage = 0x0D
	LogLBAStatus         LogPage = 0x0E
	LogEnduranceEvents   LogPage = 0x0F
	LogMediaUnits        LogPage = 0x10
	LogCapacityConfigs   LogPage = 0x11
	LogFeatureEffects    LogPage = 0x12
	LogMIEffects         LogPage = 0x13
	LogLockdown          LogPage = 0x14
	LogBootPartition     LogPage = 0x15
	LogRotationalMedia   LogPage = 0x16
	LogDiscovery         LogPage = 0x70
	LogReservation       LogPage = 0x80
	LogSanitize          LogPage = 0x81
)

var logNames = map[LogPage]string{
	LogSupported: "Supported Log Pages", LogError: "Error Information", LogSMART: "SMART / Health Information",
	LogFirmwareSlot: "Firmware Slot Information", LogChangedNamespaces: "Changed Namespace List",
	LogCommandEffects: "Commands Supported and Effects", LogSelfTest: "Device Self-test", LogTelemetryHost: "Telemetry Host-Initiated",
	LogTelemetryCtrl: "Telemetry Controller-Initiated", LogEnduranceGroup: "Endurance Group Information",
	LogPLMPerSet: "Predictable Latency Per NVM Set", LogPLMEvents: "Predictable Latency Event Aggregate",
	LogANA: "Asymmetric Namespace Access", LogPersistentEvent: "Persistent Event Log", LogLBAStatus: "LBA Status Information",
	LogEnduranceEvents: "Endurance Group Event Aggregate", LogMediaUnits: "Media Unit Status",
	LogCapacityConfigs: "Supported Capacity Configuration List", LogFeatureEffects: "Feature Identifiers Supported and Effects",
	LogMIEffects: "NVMe-MI Commands Supported and Effects", LogLockdown: "Command and Feature Lockdown", LogBootPartition: "Boot Partition",
	LogRotationalMedia: "Rotational Media Information", LogDiscovery: "Discovery", LogReservation: "Reservation Notification",
	LogSanitize: "Sanitize Status",
}

func (l LogPage) String() string {
	if n, ok := logNames[l]; ok {
		return n
	}
	return "Log " + hex8(uint8(l))
}

// SupportedLogPages is log 00h, 1024 bytes: a word of LogSupports bits for each page. NVMe Base 2.0c 5.16.1.1.
type SupportedLogPages struct {
	Page [256]uint32
}

// Bits of SupportedLogPages.Page.
const (
	LogSupports       = 1 << 0 // LSUPP
	LogSupportsOffset = 1 << 1 // IOS: an offset may be an index
)

// ErrorLogEntry is one entry of log 01h, 64 bytes; the newest comes first. NVMe Base 2.0c 5.16.1.2.
type ErrorLogEntry struct {
	Count     uint64 // 1 for the first error ever; 0: no entry
	SQID      uint16 // 0xFFFF: of no queue
	CID       uint16 // 0xFFFF: of no command
	StatusRaw uint16 // as in Completion.StatusPhase; see Status
	Location  uint16 // byte in bits 7:0, bit in bits 10:8; 0xFFFF: none
	LBA       uint64
	NSID      uint32
	VendorLog uint8 // log page with more; 0: none
	TRTYPE    uint8
	_         [2]byte
	CmdInfo   uint64
	TrInfo    uint16
	_         [22]byte
}

// Status returns the status of the command that failed.
func (e *ErrorLogEntry) Status() Status { return Status(e.StatusRaw >> 1) }

// SetStatus sets the status of the command that failed.
func (e *ErrorLogEntry) SetStatus(s Status) { e.StatusRaw = uint16(s) << 1 }

// SMARTLog is log 02h, 512 bytes. NVMe Base 2.0c 5.16.1.3.
type SMARTLog struct {
	CriticalWarning  uint8
	compositeTemp    [2]byte
	AvailableSpare   uint8 // percent
	SpareThreshold   uint8 // percent
	PercentageUsed   uint8 // may exceed 100
	EnduranceWarning uint8
	_                [25]byte
	DataUnitsRead    Uint128 // 1000 units of 512 bytes, rounded up
	DataUnitsWritten Uint128
	HostReads        Uint128 // commands
	HostWrites       Uint128 // commands
	BusyMinutes      Uint128
	PowerCycles      Uint128
	PowerOnHours     Uint128
	UnsafeShutdowns  Uint128
	MediaErrors      Uint128
	ErrorLogEntries  Uint128
	WarningMinutes   uint32
	CriticalMinutes  uint32
	TempSensor       [8]uint16 // kelvin; 0: none
	ThermalCount1    uint32
	ThermalCount2    uint32
	ThermalSeconds1  uint32
	ThermalSeconds2  uint32
	_                [280]byte
}

// Bits of SMARTLog.CriticalWarning.
const (
	SMARTWarningSpare       = 1 << 0
	SMARTWarningTemperature = 1 << 1
	SMARTWarningReliability = 1 << 2
	SMARTWarningReadOnly    = 1 << 3
	SMARTWarningBackup      = 1 << 4
	SMARTWarningPMR         = 1 << 5
)

// Temperature returns the composite temperature in kelvin.
func (s *SMARTLog) Temperature() uint16 {
	return uint16(s.compositeTemp[0]) | uint16(s.compositeTemp[1])<<8
}

// SetTemperature sets the composite temperature in kelvin.
func (s *SMARTLog) SetTemperature(kelvin uint16) {
	s.compositeTemp = [2]byte{uint8(kelvin), uint8(kelvin >> 8)}
}

// DataUnits returns bytes in the unit of SMARTLog.DataUnitsRead: thousands of 512 bytes, rounded up.
func DataUnits(bytes uint64) Uint128 {
	const unit = 512 * 1000
	n := bytes / unit
	if bytes%unit != 0 {
		n++
	}
	return Uint128{Lo: n}
}

// FirmwareSlotLog is log 03h, 512 bytes. NVMe Base 2.0c 5.16.1.4.
type FirmwareSlotLog struct {
	AFI  uint8 // running slot in bits 2:0, the one of the next reset in bits 6:4
	_    [7]byte
	Slot [7][8]byte // revision in slot 1 to 7; zeroes: empty
	_    [448]byte
}

// ChangedNamespacesOverflow is the first id of a Changed Namespace List log that could not hold all. NVMe
// Base 2.0c 5.16.1.5.
const ChangedNamespacesOverflow = 0xFFFFFFFF

// ChangedNamespaceList is log 04h, 4096 bytes.
type ChangedNamespaceList = NamespaceList

// CommandEffects is log 05h, 4096 bytes: a word of Effect bits for each opcode. NVMe Base 2.0c 5.16.1.6.
type CommandEffects struct {
	Admin [256]uint32
	IO    [256]uint32
	_     [2048]byte
}

// CommandsSupportedAndEffects is the specification's name of CommandEffects.
type CommandsSupportedAndEffects = CommandEffects

// TelemetryHeader is the beginning of logs 07h and 08h, 512 bytes; blocks of TelemetryBlock bytes follow, numbered from
// 1. NVMe Base 2.0c 5.16.1.8 and 5.16.1.9.
type TelemetryHeader struct {
	LID         LogPage
	_           [4]byte
	IEEE        [3]byte
	LastBlock1  uint16 // of data area 1; those of the others are not less
	LastBlock2  uint16
	LastBlock3  uint16
	_           [2]byte
	LastBlock4  uint32
	_           [360]byte
	HostScope   uint8 // log 07h only, as is the next
	HostOrScope uint8 // log 07h: host-initiated generation; log 08h: scope
	Available   uint8 // 1: there is controller-initiated data
	Generation  uint8 // of the controller-initiated data
	Reason      [128]byte
}

// Values of TelemetryHeader.
const (
	TelemetryBlock           = 512
	TelemetryScopeController = 1
	// TelemetryCreate is bit 0 of the log specific field: take new host-initiated data.
	TelemetryCreate = 1 << 0
)

// Bits of CommandEffects.
const (
	EffectSupported       = 1 << 0 // CSUPP
	EffectBlockContent    = 1 << 1 // LBCC
	EffectNamespaceCap    = 1 << 2 // NCC
	EffectNamespaceList   = 1 << 3 // NIC
	EffectControllerCap   = 1 << 4 // CCC
	EffectExclusiveShift  = 16     // CSE, bits 18:16
	EffectUUID            = 1 << 19
	EffectScopeNamespace  = 1 << 20
	EffectScopeController = 1 << 21
	EffectScopeSet        = 1 << 22
	EffectScopeEndurance  = 1 << 23
	EffectScopeDomain     = 1 << 24
	EffectScopeSubsystem  = 1 << 25
)
