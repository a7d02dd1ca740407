package nvme

import "unsafe"

// The sizes of the specification: a struct of any other stops the build here.
var (
	_ [CommandSize]byte    = [unsafe.Sizeof(Command{})]byte{}
	_ [CompletionSize]byte = [unsafe.Sizeof(Completion{})]byte{}
	_ [DSMRangeSize]byte   = [unsafe.Sizeof(DSMRange{})]byte{}
	_ [16]byte             = [unsafe.Sizeof(SGLDescriptor{})]byte{}
	_ [8]byte              = [unsafe.Sizeof(LBAStatusHeader{})]byte{}
	_ [LBAStatusSize]byte  = [unsafe.Sizeof(LBAStatus{})]byte{}
	_ [CopyRangeSize]byte  = [unsafe.Sizeof(CopyRange{})]byte{}
	_ [4096]byte           = [unsafe.Sizeof(IdentifyController{})]byte{}
	_ [4096]byte           = [unsafe.Sizeof(IdentifyControllerNVM{})]byte{}
	_ [4096]byte           = [unsafe.Sizeof(IdentifyNamespace{})]byte{}
	_ [4096]byte           = [unsafe.Sizeof(IdentifyIndependentNamespace{})]byte{}
	_ [4096]byte           = [unsafe.Sizeof(NamespaceList{})]byte{}
	_ [4096]byte           = [unsafe.Sizeof(CommandSets{})]byte{}
	_ [32]byte             = [unsafe.Sizeof(PowerState{})]byte{}
	_ [4]byte              = [unsafe.Sizeof(LBAFormat{})]byte{}
	_ [1024]byte           = [unsafe.Sizeof(SupportedLogPages{})]byte{}
	_ [64]byte             = [unsafe.Sizeof(ErrorLogEntry{})]byte{}
	_ [512]byte            = [unsafe.Sizeof(SMARTLog{})]byte{}
	_ [512]byte            = [unsafe.Sizeof(FirmwareSlotLog{})]byte{}
	_ [4096]byte           = [unsafe.Sizeof(CommandEffects{})]byte{}
	_ [512]byte            = [unsafe.Sizeof(HostBehavior{})]byte{}
	_ [4096]byte           = [unsafe.Sizeof(ControllerList{})]byte{}
	_ [64]byte             = [unsafe.Sizeof(ReservationNotice{})]byte{}
	_ [16]byte             = [unsafe.Sizeof(ReservationKeys{})]byte{}
	_ [4096]byte           = [unsafe.Sizeof(NamespaceGranularity{})]byte{}
	_ [512]byte            = [unsafe.Sizeof(TelemetryHeader{})]byte{}
)

// Bytes returns v's own memory.
func (v *Command) Bytes() *[64]byte { return (*[64]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *Completion) Bytes() *[16]byte { return (*[16]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *DSMRange) Bytes() *[16]byte { return (*[16]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *IdentifyController) Bytes() *[4096]byte { return (*[4096]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *IdentifyControllerNVM) Bytes() *[4096]byte { return (*[4096]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *IdentifyNamespace) Bytes() *[4096]byte { return (*[4096]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *IdentifyIndependentNamespace) Bytes() *[4096]byte { return (*[4096]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *NamespaceList) Bytes() *[4096]byte { return (*[4096]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *CommandSets) Bytes() *[4096]byte { return (*[4096]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *PowerState) Bytes() *[32]byte { return (*[32]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *LBAFormat) Bytes() *[4]byte { return (*[4]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *SupportedLogPages) Bytes() *[1024]byte { return (*[1024]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *ErrorLogEntry) Bytes() *[64]byte { return (*[64]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *SMARTLog) Bytes() *[512]byte { return (*[512]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *FirmwareSlotLog) Bytes() *[512]byte { return (*[512]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *CommandEffects) Bytes() *[4096]byte { return (*[4096]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *HostBehavior) Bytes() *[512]byte { return (*[512]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *SGLDescriptor) Bytes() *[16]byte { return (*[16]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *TelemetryHeader) Bytes() *[512]byte { return (*[512]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *CopyRange) Bytes() *[32]byte { return (*[32]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *ControllerList) Bytes() *[4096]byte { return (*[4096]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *NamespaceGranularity) Bytes() *[4096]byte { return (*[4096]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *LBAStatusHeader) Bytes() *[8]byte { return (*[8]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *LBAStatus) Bytes() *[16]byte { return (*[16]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *ReservationNotice) Bytes() *[64]byte { return (*[64]byte)(unsafe.Pointer(v)) }

// Bytes returns v's own memory.
func (v *ReservationKeys) Bytes() *[16]byte { return (*[16]byte)(unsafe.Pointer(v)) }
