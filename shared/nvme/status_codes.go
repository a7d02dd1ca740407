package nvme

// Generic command status. NVMe Base 2.0c figure 101 and NVM Command Set 1.0c figure 4.
const (
	StatusSuccess                  Status = 0x000
	StatusInvalidOpcode            Status = 0x001
	StatusInvalidField             Status = 0x002
	StatusCIDConflict              Status = 0x003
	StatusDataTransferError        Status = 0x004
	StatusPowerLoss                Status = 0x005
	StatusInternalError            Status = 0x006
	StatusAbortRequested           Status = 0x007
	StatusAbortSQDeleted           Status = 0x008
	StatusAbortFailedFused         Status = 0x009
	StatusAbortMissingFused        Status = 0x00A
	StatusInvalidNamespace         Status = 0x00B
	StatusSequenceError            Status = 0x00C
	StatusSGLSegmentInvalid        Status = 0x00D
	StatusSGLCountInvalid          Status = 0x00E
	StatusSGLDataLengthInvalid     Status = 0x00F
	StatusSGLMetadataLengthInvalid Status = 0x010
	StatusSGLTypeInvalid           Status = 0x011
	StatusCMBInvalidUse            Status = 0x012
	StatusPRPOffsetInvalid         Status = 0x013
	StatusAtomicWriteUnitExceeded  Status = 0x014
	StatusOperationDenied          Status = 0x015
	StatusSGLOffsetInvalid         Status = 0x016
	StatusHostIDInconsistent       Status = 0x018
	StatusKeepAliveExpired         Status = 0x019
	StatusKeepAliveInvalid         Status = 0x01A
	StatusAbortPreempted           Status = 0x01B
	StatusSanitizeFailed           Status = 0x01C
	StatusSanitizeInProgress       Status = 0x01D
	StatusSGLGranularityInvalid    Status = 0x01E
	StatusNotSupportedInCMB        Status = 0x01F
	StatusNamespaceWriteProtected  Status = 0x020
	StatusInterrupted              Status = 0x021
	StatusTransientTransportError  Status = 0x022
	StatusProhibitedByLockdown     Status = 0x023
	StatusMediaNotReady            Status = 0x024
	StatusLBAOutOfRange            Status = 0x080
	StatusCapacityExceeded         Status = 0x081
	StatusNamespaceNotReady        Status = 0x082
	StatusReservationConflict      Status = 0x083
	StatusFormatInProgress         Status = 0x084
	StatusInvalidValueSize         Status = 0x085
	StatusInvalidKeySize           Status = 0x086
	StatusKeyDoesNotExist          Status = 0x087
	StatusUnrecoveredError         Status = 0x088
	StatusKeyExists                Status = 0x089
)

// Command specific status. NVMe Base 2.0c figure 102, NVM Command Set 1.0c figure 5 and Zoned Namespace Command Set 1.1c.
const (
	StatusInvalidCQ                      Status = 0x100
	StatusInvalidQueueID                 Status = 0x101
	StatusInvalidQueueSize               Status = 0x102
	StatusAbortLimit                     Status = 0x103
	StatusAERLimit                       Status = 0x105
	StatusInvalidFirmwareSlot            Status = 0x106
	StatusInvalidFirmwareImage           Status = 0x107
	StatusInvalidVector                  Status = 0x108
	StatusInvalidLogPage                 Status = 0x109
	StatusInvalidFormat                  Status = 0x10A
	StatusFirmwareNeedsConventionalReset Status = 0x10B
	StatusInvalidQueueDeletion           Status = 0x10C
	StatusFeatureNotSaveable             Status = 0x10D
	StatusFeatureNotChangeable           Status = 0x10E
	StatusFeatureNotPerNamespace         Status = 0x10F
	StatusFirmwareNeedsSubsystemReset    Status = 0x110
	StatusFirmwareNeedsReset             Status = 0x111
	StatusFirmwareNeedsMaxTime           Status = 0x112
	StatusFirmwareProhibited             Status = 0x113
	StatusOverlappingRange               Status = 0x114
	StatusNamespaceInsufficientCapacity  Status = 0x115
	StatusNamespaceIDUnavailable         Status = 0x116
	StatusNamespaceAlreadyAttached       Status = 0x118
	StatusNamespacePrivate               Status = 0x119
	StatusNamespaceNotAttached           Status = 0x11A
	StatusThinProvisioningNotSupported   Status = 0x11B
	StatusControllerListInvalid          Status = 0x11C
	StatusSelfTestInProgress             Status = 0x11D
	StatusBootPartitionProhibited        Status = 0x11E
	StatusInvalidControllerID            Status = 0x11F
	StatusInvalidSecondaryState          Status = 0x120
	StatusInvalidResourceCount           Status = 0x121
	StatusInvalidResourceID              Status = 0x122
	StatusSanitizeProhibitedPMR          Status = 0x123
	StatusANAGroupInvalid                Status = 0x124
	StatusANAAttachFailed                Status = 0x125
	StatusInsufficientCapacity           Status = 0x126
	StatusAttachmentLimit                Status = 0x127
	StatusProhibitionNotSupported        Status = 0x128
	StatusCommandSetNotSupported         Status = 0x129
	StatusCommandSetNotEnabled           Status = 0x12A
	StatusCommandSetRejected             Status = 0x12B
	StatusInvalidCommandSet              Status = 0x12C
	StatusIDUnavailable                  Status = 0x12D
	StatusConflictingAttributes          Status = 0x180
	StatusInvalidProtectionInfo          Status = 0x181
	StatusReadOnly                       Status = 0x182
	StatusCommandSizeLimit               Status = 0x183
	StatusZoneBoundary                   Status = 0x1B8
	StatusZoneFull                       Status = 0x1B9
	StatusZoneReadOnly                   Status = 0x1BA
	StatusZoneOffline                    Status = 0x1BB
	StatusZoneInvalidWrite               Status = 0x1BC
	StatusTooManyActiveZones             Status = 0x1BD
	StatusTooManyOpenZones               Status = 0x1BE
	StatusInvalidZoneTransition          Status = 0x1BF
	StatusDoorbellMemoryInvalid          Status = 0x1C0 // vendor: the 2014 doorbell command was given pages that cannot be used
)

// Media and data integrity errors. NVMe Base 2.0c figure 103 and NVM Command Set 1.0c figure 6.
const (
	StatusWriteFault          Status = 0x280
	StatusUnrecoveredRead     Status = 0x281
	StatusGuardCheck          Status = 0x282
	StatusApplicationTagCheck Status = 0x283
	StatusReferenceTagCheck   Status = 0x284
	StatusCompareFailure      Status = 0x285
	StatusAccessDenied        Status = 0x286
	StatusDeallocated         Status = 0x287
	StatusStorageTagCheck     Status = 0x288
)

// Path related status. NVMe Base 2.0c figure 104.
const (
	StatusInternalPathError    Status = 0x300
	StatusAccessPersistentLoss Status = 0x301
	StatusAccessInaccessible   Status = 0x302
	StatusAccessTransition     Status = 0x303
	StatusControllerPathError  Status = 0x360
	StatusHostPathError        Status = 0x370
	StatusAbortedByHost        Status = 0x371
)

var statusNames = [StatusCodeMask + 1]string{
	StatusSuccess:                        "Success",
	StatusInvalidOpcode:                  "Invalid Command Opcode",
	StatusInvalidField:                   "Invalid Field in Command",
	StatusCIDConflict:                    "Command ID Conflict",
	StatusDataTransferError:              "Data Transfer Error",
	StatusPowerLoss:                      "Commands Aborted due to Power Loss Notification",
	StatusInternalError:                  "Internal Error",
	StatusAbortRequested:                 "Command Abort Requested",
	StatusAbortSQDeleted:                 "Command Aborted due to SQ Deletion",
	StatusAbortFailedFused:               "Command Aborted due to Failed Fused Command",
	StatusAbortMissingFused:              "Command Aborted due to Missing Fused Command",
	StatusInvalidNamespace:               "Invalid Namespace or Format",
	StatusSequenceError:                  "Command Sequence Error",
	StatusSGLSegmentInvalid:              "Invalid SGL Segment Descriptor",
	StatusSGLCountInvalid:                "Invalid Number of SGL Descriptors",
	StatusSGLDataLengthInvalid:           "Data SGL Length Invalid",
	StatusSGLMetadataLengthInvalid:       "Metadata SGL Length Invalid",
	StatusSGLTypeInvalid:                 "SGL Descriptor Type Invalid",
	StatusCMBInvalidUse:                  "Invalid Use of Controller Memory Buffer",
	StatusPRPOffsetInvalid:               "PRP Offset Invalid",
	StatusAtomicWriteUnitExceeded:        "Atomic Write Unit Exceeded",
	StatusOperationDenied:                "Operation Denied",
	StatusSGLOffsetInvalid:               "SGL Offset Invalid",
	StatusHostIDInconsistent:             "Host Identifier Inconsistent Format",
	StatusKeepAliveExpired:               "Keep Alive Timer Expired",
	StatusKeepAliveInvalid:               "Keep Alive Timeout Invalid",
	StatusAbortPreempted:                 "Command Aborted due to Preempt and Abort",
	StatusSanitizeFailed:                 "Sanitize Failed",
	StatusSanitizeInProgress:             "Sanitize In Progress",
	StatusSGLGranularityInvalid:          "SGL Data Block Granularity Invalid",
	StatusNotSupportedInCMB:              "Command Not Supported for Queue in CMB",
	StatusNamespaceWriteProtected:        "Namespace is Write Protected",
	StatusInterrupted:                    "Command Interrupted",
	StatusTransientTransportError:        "Transient Transport Error",
	StatusProhibitedByLockdown:           "Command Prohibited by Command and Feature Lockdown",
	StatusMediaNotReady:                  "Admin Command Media Not Ready",
	StatusLBAOutOfRange:                  "LBA Out of Range",
	StatusCapacityExceeded:               "Capacity Exceeded",
	StatusNamespaceNotReady:              "Namespace Not Ready",
	StatusReservationConflict:            "Reservation Conflict",
	StatusFormatInProgress:               "Format In Progress",
	StatusInvalidValueSize:               "Invalid Value Size",
	StatusInvalidKeySize:                 "Invalid Key Size",
	StatusKeyDoesNotExist:                "KV Key Does Not Exist",
	StatusUnrecoveredError:               "Unrecovered Error",
	StatusKeyExists:                      "Key Exists",
	StatusInvalidCQ:                      "Completion Queue Invalid",
	StatusInvalidQueueID:                 "Invalid Queue Identifier",
	StatusInvalidQueueSize:               "Invalid Queue Size",
	StatusAbortLimit:                     "Abort Command Limit Exceeded",
	StatusAERLimit:                       "Asynchronous Event Request Limit Exceeded",
	StatusInvalidFirmwareSlot:            "Invalid Firmware Slot",
	StatusInvalidFirmwareImage:           "Invalid Firmware Image",
	StatusInvalidVector:                  "Invalid Interrupt Vector",
	StatusInvalidLogPage:                 "Invalid Log Page",
	StatusInvalidFormat:                  "Invalid Format",
	StatusFirmwareNeedsConventionalReset: "Firmware Activation Requires Conventional Reset",
	StatusInvalidQueueDeletion:           "Invalid Queue Deletion",
	StatusFeatureNotSaveable:             "Feature Identifier Not Saveable",
	StatusFeatureNotChangeable:           "Feature Not Changeable",
	StatusFeatureNotPerNamespace:         "Feature Not Namespace Specific",
	StatusFirmwareNeedsSubsystemReset:    "Firmware Activation Requires NVM Subsystem Reset",
	StatusFirmwareNeedsReset:             "Firmware Activation Requires Controller Level Reset",
	StatusFirmwareNeedsMaxTime:           "Firmware Activation Requires Maximum Time Violation",
	StatusFirmwareProhibited:             "Firmware Activation Prohibited",
	StatusOverlappingRange:               "Overlapping Range",
	StatusNamespaceInsufficientCapacity:  "Namespace Insufficient Capacity",
	StatusNamespaceIDUnavailable:         "Namespace Identifier Unavailable",
	StatusNamespaceAlreadyAttached:       "Namespace Already Attached",
	StatusNamespacePrivate:               "Namespace Is Private",
	StatusNamespaceNotAttached:           "Namespace Not Attached",
	StatusThinProvisioningNotSupported:   "Thin Provisioning Not Supported",
	StatusControllerListInvalid:          "Controller List Invalid",
	StatusSelfTestInProgress:             "Device Self-test In Progress",
	StatusBootPartitionProhibited:        "Boot Partition Write Prohibited",
	StatusInvalidControllerID:            "Invalid Controller Identifier",
	StatusInvalidSecondaryState:          "Invalid Secondary Controller State",
	StatusInvalidResourceCount:           "Invalid Number of Controller Resources",
	StatusInvalidResourceID:              "Invalid Resource Identifier",
	StatusSanitizeProhibitedPMR:          "Sanitize Prohibited While Persistent Memory Region is Enabled",
	StatusANAGroupInvalid:                "ANA Group Identifier Invalid",
	StatusANAAttachFailed:                "ANA Attach Failed",
	StatusInsufficientCapacity:           "Insufficient Capacity",
	StatusAttachmentLimit:                "Namespace Attachment Limit Exceeded",
	StatusProhibitionNotSupported:        "Prohibition of Command Execution Not Supported",
	StatusCommandSetNotSupported:         "I/O Command Set Not Supported",
	StatusCommandSetNotEnabled:           "I/O Command Set Not Enabled",
	StatusCommandSetRejected:             "I/O Command Set Combination Rejected",
	StatusInvalidCommandSet:              "Invalid I/O Command Set",
	StatusIDUnavailable:                  "Identifier Unavailable",
	StatusConflictingAttributes:          "Conflicting Attributes",
	StatusInvalidProtectionInfo:          "Invalid Protection Information",
	StatusReadOnly:                       "Attempted Write to Read Only Range",
	StatusCommandSizeLimit:               "Command Size Limit Exceeded",
	StatusZoneBoundary:                   "Zone Boundary Error",
	StatusZoneFull:                       "Zone Is Full",
	StatusZoneReadOnly:                   "Zone Is Read Only",
	StatusZoneOffline:                    "Zone Is Offline",
	StatusZoneInvalidWrite:               "Zone Invalid Write",
	StatusTooManyActiveZones:             "Too Many Active Zones",
	StatusTooManyOpenZones:               "Too Many Open Zones",
	StatusInvalidZoneTransition:          "Invalid Zone State Transition",
	StatusDoorbellMemoryInvalid:          "Doorbell Memory Invalid",
	StatusWriteFault:                     "Write Fault",
	StatusUnrecoveredRead:                "Unrecovered Read Error",
	StatusGuardCheck:                     "End-to-end Guard Check Error",
	StatusApplicationTagCheck:            "End-to-end Application Tag Check Error",
	StatusReferenceTagCheck:              "End-to-end Reference Tag Check Error",
	StatusCompareFailure:                 "Compare Failure",
	StatusAccessDenied:                   "Access Denied",
	StatusDeallocated:                    "Deallocated or Unwritten Logical Block",
	StatusStorageTagCheck:                "End-to-End Storage Tag Check Error",
	StatusInternalPathError:              "Internal Path Error",
	StatusAccessPersistentLoss:           "Asymmetric Access Persistent Loss",
	StatusAccessInaccessible:             "Asymmetric Access Inaccessible",
	StatusAccessTransition:               "Asymmetric Access Transition",
	StatusControllerPathError:            "Controller Pathing Error",
	StatusHostPathError:                  "Host Pathing Error",
	StatusAbortedByHost:                  "Command Aborted By Host",
}
