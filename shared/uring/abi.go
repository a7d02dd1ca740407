package uring

// The numbers of include/uapi/linux/io_uring.h, each with the kernel it came with where that is
// later than 5.10.

// Operations (enum io_uring_op).
const (
	OpNop         = 0
	OpReadv       = 1
	OpWritev      = 2
	OpFsync       = 3
	OpReadFixed   = 4
	OpWriteFixed  = 5
	OpPollAdd     = 6
	OpTimeout     = 11
	OpAsyncCancel = 14
	OpFallocate   = 17
	OpRead        = 22
	OpWrite       = 23
	OpURingCmd    = 46 // 5.19
)

// BlockDiscard is a command of block devices (PrepCommand, 6.12; include/uapi/linux/blkdev.h): Addr is where to begin, Addr3 how many bytes.
const BlockDiscard = 0x12 << 8

// SQE.Flags.
const (
	SQEFixedFile        = 1 << 0 // FD is an index of the registered files
	SQEIODrain          = 1 << 1
	SQEIOLink           = 1 << 2
	SQEIOHardlink       = 1 << 3
	SQEAsync            = 1 << 4 // straight to a kernel worker
	SQECQESkipOnSuccess = 1 << 6 // 5.17
)

// SQE.OpFlags of some operations.
const (
	FsyncDatasync    = 1 << 0 // OpFsync
	URingCmdFixed    = 1 << 0 // OpURingCmd: BufIndex names a registered buffer
	CancelAll        = 1 << 0 // OpAsyncCancel, 5.19
	CancelAny        = 1 << 2 // OpAsyncCancel, 5.19
	ReadWriteNowait  = 0x8    // RWF_NOWAIT
	ReadWriteDsync   = 0x2    // RWF_DSYNC
	ReadWriteHighPri = 0x1    // RWF_HIPRI
)

// CQE.Flags.
const (
	CQEBuffer = 1 << 0
	CQEMore   = 1 << 1
)

// Features that the kernel reports at set-up (Ring.Features).
const (
	FeatSingleMmap   = 1 << 0
	FeatNoDrop       = 1 << 1
	FeatSubmitStable = 1 << 2
	FeatExtArg       = 1 << 8  // 5.11
	FeatRsrcTags     = 1 << 10 // 5.13
	FeatCQESkip      = 1 << 11 // 5.17
)

// io_uring_setup flags.
const (
	setupIOPoll       = 1 << 0
	setupSQPoll       = 1 << 1
	setupSQAff        = 1 << 2
	setupCQSize       = 1 << 3
	setupClamp        = 1 << 4
	setupRDisabled    = 1 << 6
	setupSubmitAll    = 1 << 7  // 5.18
	setupCoopTaskrun  = 1 << 8  // 5.19
	setupTaskrunFlag  = 1 << 9  // 5.19
	setupSQE128       = 1 << 10 // 5.19
	setupCQE32        = 1 << 11 // 5.19
	setupSingleIssuer = 1 << 12 // 6.0
	setupDeferTaskrun = 1 << 13 // 6.1
)

// io_uring_enter flags.
const (
	enterGetEvents = 1 << 0
	enterSQWakeup  = 1 << 1
	enterExtArg    = 1 << 3 // 5.11
)

// Flags in the submission ring, written by the kernel.
const (
	sqNeedWakeup = 1 << 0
	sqCQOverflow = 1 << 1
	sqTaskrun    = 1 << 2 // 5.19
)

// io_uring_register operations.
const (
	regBuffers       = 0
	unregBuffers     = 1
	regFiles         = 2
	unregFiles       = 3
	regEventFD       = 4
	unregEventFD     = 5
	regFilesUpdate   = 6
	regEventFDAsync  = 7
	regProbe         = 8
	regPersonality   = 9
	regRestrictions  = 11
	regEnableRings   = 12
	regBuffers2      = 15 // 5.13
	regBuffersUpdate = 16 // 5.13
	regIOWQMax       = 19 // 5.15

	rsrcRegisterSparse = 1 << 0 // 5.19
	probeOpSupported   = 1 << 0
)

// io_uring_restriction.opcode.
const (
	restrictRegisterOp       = 0
	restrictSQEOp            = 1
	restrictSQEFlagsAllowed  = 2
	restrictSQEFlagsRequired = 3
)

// Offsets at which the ring's parts are mapped.
const (
	offSQRing = 0
	offSQEs   = 0x10000000
)

// params is struct io_uring_params.
type params struct {
	sqEntries, cqEntries      uint32
	flags                     uint32
	sqThreadCPU, sqThreadIdle uint32
	features                  uint32
	wqFD                      uint32
	_                         [3]uint32
	sqOff                     sqOffsets
	cqOff                     cqOffsets
}

type sqOffsets struct {
	head, tail, ringMask, ringEntries, flags, dropped, array, _ uint32
	userAddr                                                    uint64
}

type cqOffsets struct {
	head, tail, ringMask, ringEntries, overflow, cqes, flags, _ uint32
	userAddr                                                    uint64
}

// rsrcRegister is struct io_uring_rsrc_register.
type rsrcRegister struct {
	nr, flags uint32
	_         uint64
	data      uint64
	tags      uint64
}

// rsrcUpdate2 is struct io_uring_rsrc_update2.
type rsrcUpdate2 struct {
	offset, _ uint32
	data      uint64
	tags      uint64
	nr, _     uint32
}

// filesUpdate is struct io_uring_files_update.
type filesUpdate struct {
	offset, _ uint32
	fds       uint64
}

// restriction is struct io_uring_restriction.
type restriction struct {
	opcode uint16
	value  uint8
	_      uint8
	_      [3]uint32
}

// getEventsArg is struct io_uring_getevents_arg.
type getEventsArg struct {
	sigmask   uint64
	sigmaskSz uint32
	_         uint32
	ts        uint64
}

// timespec is struct __kernel_timespec.
type timespec struct {
	sec, nsec int64
}

const probeOps = 256

// probe is struct io_uring_probe with room for every operation.
type probe struct {
	lastOp, opsLen uint8
	_              uint16
	_              [3]uint32
	ops            [probeOps]struct {
		op, _ uint8
		flags uint16
		_     uint32
	}
}
