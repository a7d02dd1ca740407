package nvme

import "time"

// FeatureID names a feature of Get and Set Features. NVMe Base 2.0c 5.27.1, figure 317.
type FeatureID uint8

// Feature identifiers.
const (
	FeatureArbitration        FeatureID = 0x01
	FeaturePowerManagement    FeatureID = 0x02
	FeatureLBARangeType       FeatureID = 0x03
	FeatureTemperature        FeatureID = 0x04
	FeatureErrorRecovery      FeatureID = 0x05
	FeatureWriteCache         FeatureID = 0x06
	FeatureQueues             FeatureID = 0x07
	FeatureCoalescing         FeatureID = 0x08
	FeatureVectorConfig       FeatureID = 0x09
	FeatureWriteAtomicity     FeatureID = 0x0A
	FeatureAsyncEvents        FeatureID = 0x0B
	FeatureAPST               FeatureID = 0x0C
	FeatureHostMemoryBuffer   FeatureID = 0x0D
	FeatureTimestamp          FeatureID = 0x0E
	FeatureKeepAlive          FeatureID = 0x0F
	FeatureThermalManagement  FeatureID = 0x10
	FeatureNonOpPower         FeatureID = 0x11
	FeatureReadRecovery       FeatureID = 0x12
	FeaturePLMConfig          FeatureID = 0x13
	FeaturePLMWindow          FeatureID = 0x14
	FeatureLBAStatusInterval  FeatureID = 0x15
	FeatureHostBehavior       FeatureID = 0x16
	FeatureSanitize           FeatureID = 0x17
	FeatureEnduranceEvents    FeatureID = 0x18
	FeatureCommandSetProfile  FeatureID = 0x19
	FeatureSpinup             FeatureID = 0x1A
	FeatureControllerMetadata FeatureID = 0x7E
	FeatureNamespaceMetadata  FeatureID = 0x7F
	FeatureSoftwareProgress   FeatureID = 0x80
	FeatureHostID             FeatureID = 0x81
	FeatureReservationNotice  FeatureID = 0x82
	FeatureReservationPersist FeatureID = 0x83
	FeatureWriteProtect       FeatureID = 0x84
	FeatureQuiet              FeatureID = 0xD0 // shadowbell's own, see ShadowbellCaps
)

var featureNames = map[FeatureID]string{
	FeatureArbitration: "Arbitration", FeaturePowerManagement: "Power Management", FeatureLBARangeType: "LBA Range Type",
	FeatureTemperature: "Temperature Threshold", FeatureErrorRecovery: "Error Recovery", FeatureWriteCache: "Volatile Write Cache",
	FeatureQueues: "Number of Queues", FeatureCoalescing: "Interrupt Coalescing", FeatureVectorConfig: "Interrupt Vector Configuration",
	FeatureWriteAtomicity: "Write Atomicity Normal", FeatureAsyncEvents: "Asynchronous Event Configuration",
	FeatureAPST: "Autonomous Power State Transition", FeatureHostMemoryBuffer: "Host Memory Buffer", FeatureTimestamp: "Timestamp",
	FeatureKeepAlive: "Keep Alive Timer", FeatureThermalManagement: "Host Controlled Thermal Management",
	FeatureNonOpPower: "Non-Operational Power State Config", FeatureReadRecovery: "Read Recovery Level Config",
	FeaturePLMConfig: "Predictable Latency Mode Config", FeaturePLMWindow: "Predictable Latency Mode Window",
	FeatureLBAStatusInterval: "LBA Status Information Attributes", FeatureHostBehavior: "Host Behavior Support",
	FeatureSanitize: "Sanitize Config", FeatureEnduranceEvents: "Endurance Group Event Configuration",
	FeatureCommandSetProfile: "I/O Command Set Profile", FeatureSpinup: "Spinup Control",
	FeatureControllerMetadata: "Controller Metadata", FeatureNamespaceMetadata: "Namespace Metadata",
	FeatureSoftwareProgress: "Software Progress Marker", FeatureHostID: "Host Identifier",
	FeatureReservationNotice: "Reservation Notification Mask", FeatureReservationPersist: "Reservation Persistence",
	FeatureWriteProtect: "Namespace Write Protection Config", FeatureQuiet: "Quiet Polling (shadowbell)",
}

func (f FeatureID) String() string {
	if n, ok := featureNames[f]; ok {
		return n
	}
	return "Feature " + hex8(uint8(f))
}

// FeatureSelect is SEL of Get Features.
type FeatureSelect uint8

// Values of FeatureSelect.
const (
	FeatureCurrent   FeatureSelect = 0
	FeatureDefault   FeatureSelect = 1
	FeatureSaved     FeatureSelect = 2
	FeatureSupported FeatureSelect = 3 // returns the FeatureCap bits
)

// Bits of the answer to FeatureSupported.
const (
	FeatureCapSaveable   = 1 << 0
	FeatureCapNamespace  = 1 << 1
	FeatureCapChangeable = 1 << 2
)

// Arbitration is feature 01h: the burst is 2^AB commands, 7: no limit. NVMe Base 2.0c 5.27.1.1.
type Arbitration uint32

// Fields of Arbitration: the burst, and the weights of low, medium and high priority.

func (a Arbitration) AB() uint8       { return uint8(a) & 7 }
func (a Arbitration) LPW() ZeroBased8 { return ZeroBased8(a >> 8) }
func (a Arbitration) MPW() ZeroBased8 { return ZeroBased8(a >> 16) }
func (a Arbitration) HPW() ZeroBased8 { return ZeroBased8(a >> 24) }

// NoArbitrationBurst is the AB of no limit.
const NoArbitrationBurst = 7

// MakeArbitration returns the feature's value.
func MakeArbitration(ab uint8, low, medium, high ZeroBased8) Arbitration {
	return Arbitration(high)<<24 | Arbitration(medium)<<16 | Arbitration(low)<<8 | Arbitration(ab&7)
}

// PowerManagement is feature 02h. NVMe Base 2.0c 5.27.1.2.
type PowerManagement uint32

// PS is the power state.
func (p PowerManagement) PS() uint8 { return uint8(p) & 0x1F }

// WH is the workload hint.
func (p PowerManagement) WH() uint8 { return uint8(p>>5) & 7 }

// TemperatureThreshold is feature 04h. NVMe Base 2.0c 5.27.1.3.
type TemperatureThreshold uint32

// Values of TemperatureThreshold.Sensor and Type.
const (
	TempSensorComposite = 0
	TempSensorAll       = 15
	TempOver            = 0
	TempUnder           = 1
)

// Kelvin is TMPTH, the threshold.
func (t TemperatureThreshold) Kelvin() uint16 { return uint16(t) }

// Sensor is TMPSEL, 0 to 15.
func (t TemperatureThreshold) Sensor() uint8 { return uint8(t>>16) & 15 }

// Type is THSEL, TempOver or TempUnder.
func (t TemperatureThreshold) Type() uint8 { return uint8(t>>20) & 3 }

// MakeTemperatureThreshold puts the fields together.
func MakeTemperatureThreshold(kelvin uint16, sensor, typ uint8) TemperatureThreshold {
	return TemperatureThreshold(uint32(kelvin) | uint32(sensor&15)<<16 | uint32(typ&3)<<20)
}

// ErrorRecovery is feature 05h. NVM Command Set 1.0c 4.1.3.2.
type ErrorRecovery uint32

// TLER is how long a command with limited retry may be retried; 0: no limit.
func (e ErrorRecovery) TLER() time.Duration { return time.Duration(uint16(e)) * 100 * time.Millisecond }

// DULBE says that reading a deallocated block is an error.
func (e ErrorRecovery) DULBE() bool { return e&(1<<16) != 0 }

// WriteCacheEnabled is WCE, bit 0 of feature 06h. NVMe Base 2.0c 5.27.1.4.
const WriteCacheEnabled = 1 << 0

// QueueCounts is feature 07h, as asked for (CDW11) and as granted (DW0). NVMe Base 2.0c 5.27.1.5.
// The value 65535 for either is not allowed.
type QueueCounts uint32

// MakeQueueCounts puts the fields together.
func MakeQueueCounts(sqs, cqs ZeroBased16) QueueCounts {
	return QueueCounts(uint32(sqs) | uint32(cqs)<<16)
}

// SQs is NSQR or NSQA, the I/O submission queues.
func (q QueueCounts) SQs() ZeroBased16 { return ZeroBased16(q) }

// CQs is NCQR or NCQA, the I/O completion queues.
func (q QueueCounts) CQs() ZeroBased16 { return ZeroBased16(q >> 16) }

// Valid says that neither count is the forbidden 65536.
func (q QueueCounts) Valid() bool { return uint16(q) != 0xFFFF && uint16(q>>16) != 0xFFFF }

// Coalescing is feature 08h. NVMe Base 2.0c 5.27.1.6.
type Coalescing uint32

// MakeCoalescing puts the fields together; time100us is in units of 100 us, 0: none.
func MakeCoalescing(entries ZeroBased8, time100us uint8) Coalescing {
	return Coalescing(uint32(entries) | uint32(time100us)<<8)
}

// Threshold is THR, the entries to gather before an interrupt.
func (c Coalescing) Threshold() ZeroBased8 { return ZeroBased8(c) }

// Time is TIME, the longest an interrupt may be held back; 0: coalescing is off.
func (c Coalescing) Time() time.Duration {
	return time.Duration(c.Time100us()) * 100 * time.Microsecond
}

// Time100us is TIME as stored.
func (c Coalescing) Time100us() uint8 { return uint8(c >> 8) }

// VectorConfig is feature 09h. NVMe Base 2.0c 5.27.1.7.
type VectorConfig uint32

// MakeVectorConfig puts the fields together.
func MakeVectorConfig(vector uint16, coalescingDisabled bool) VectorConfig {
	return VectorConfig(uint32(vector) | bit32(coalescingDisabled, 16))
}

// Vector is IV.
func (v VectorConfig) Vector() uint16 { return uint16(v) }

// CoalescingDisabled is CD.
func (v VectorConfig) CoalescingDisabled() bool { return v&(1<<16) != 0 }

// WriteAtomicityDisableNormal is DN, bit 0 of feature 0Ah. NVM Command Set 1.0c 4.1.3.3.
const WriteAtomicityDisableNormal = 1 << 0

// EventConfig is feature 0Bh, and OAES of Identify Controller from bit 8 up. NVMe Base 2.0c 5.27.1.9.
type EventConfig uint32

// Bits of EventConfig; bits 7:0 are the SMARTWarning bits.
const (
	EventConfigNamespace EventConfig = 1 << 8
	EventConfigFirmware  EventConfig = 1 << 9
	EventConfigTelemetry EventConfig = 1 << 10
	EventConfigANA       EventConfig = 1 << 11
	EventConfigPLM       EventConfig = 1 << 12
	EventConfigLBAStatus EventConfig = 1 << 13
	EventConfigEndurance EventConfig = 1 << 14
	EventConfigShutdown  EventConfig = 1 << 15
	EventConfigDiscovery EventConfig = 1 << 31
)

// SMART returns the SMARTWarning bits that may raise an event.
func (e EventConfig) SMART() uint8 { return uint8(e) }

// KeepAliveTimeout is KATO, feature 0Fh: CDW11 is in milliseconds, 0: off. NVMe Base 2.0c 5.27.1.12.
func KeepAliveTimeout(cdw11 uint32) time.Duration { return time.Duration(cdw11) * time.Millisecond }

// Timestamp is the data of feature 0Eh, 8 bytes. NVMe Base 2.0c 5.27.1.11.
type Timestamp [8]byte

// Attributes of Timestamp.
const (
	TimestampStopped     = 1 << 0 // the clock may have stood still
	TimestampOriginShift = 1      // bits 3:1
	TimestampOriginReset = 0      // counts from the last reset
	TimestampOriginHost  = 1      // set by Set Features
)

const timestampMask = 1<<48 - 1

// MakeTimestamp returns ms milliseconds (the low 48 bits) with an attribute byte.
func MakeTimestamp(ms uint64, attributes uint8) (t Timestamp) {
	for i := range 6 {
		t[i] = uint8(ms >> (8 * i))
	}
	t[6] = attributes
	return t
}

// Milliseconds returns the time, since 1970 when the host has set it.
func (t Timestamp) Milliseconds() uint64 {
	var ms uint64
	for i := range 6 {
		ms |= uint64(t[i]) << (8 * i)
	}
	return ms & timestampMask
}

// Attributes returns the Timestamp bits.
func (t Timestamp) Attributes() uint8 { return t[6] }

// HostBehavior is the data of feature 16h, 512 bytes. NVMe Base 2.0c 5.27.1.18.
type HostBehavior struct {
	ACRE   uint8 // 1: the host knows Command Interrupted and CRD
	ETDAS  uint8
	LBAFEE uint8 // 1: the host knows 64 LBA formats and their extended protection
	_      [509]byte
}
