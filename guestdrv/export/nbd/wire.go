package nbd

// Magic numbers.
const (
	magicServer   = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption   = 0x49484156454F5054 // "IHAVEOPT"
	magicOptReply = 0x0003e889045565a9
	magicRequest  = 0x25609513
	magicExtended = 0x21e41c71 // a request with extended headers
	magicSimple   = 0x67446698
	magicChunk    = 0x668e33ef // of a structured reply
	magicExtReply = 0x6e8a278c
)

// Handshake flags; the client's have the same bits.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Transmission flags.
const (
	flagHasFlags        = 1 << 0
	flagReadOnly        = 1 << 1
	flagSendFlush       = 1 << 2
	flagSendFUA         = 1 << 3
	flagSendTrim        = 1 << 5
	flagSendWriteZeroes = 1 << 6
	flagSendDF          = 1 << 7
	flagCanMultiConn    = 1 << 8
	flagSendFastZero    = 1 << 11
)

// Options.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
	optExtendedHeaders = 11
)

// Replies to options.
const (
	repAck              = 1
	repServer           = 2
	repInfo             = 3
	repMetaContext      = 4
	repErrUnsup         = 1<<31 + 1
	repErrInvalid       = 1<<31 + 3
	repErrUnknown       = 1<<31 + 6
	repErrShutdown      = 1<<31 + 7
	repErrBlockSizeReqd = 1<<31 + 8
	repErrTooBig        = 1<<31 + 9
	repErrExtHeaderReqd = 1<<31 + 10
)

// What repInfo is about.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
)

// Flags of commands.
const (
	cmdFlagFUA        = 1 << 0
	cmdFlagNoHole     = 1 << 1
	cmdFlagDF         = 1 << 2
	cmdFlagReqOne     = 1 << 3
	cmdFlagFastZero   = 1 << 4
	cmdFlagPayloadLen = 1 << 5
)

// Chunks of replies.
const (
	chunkDone = 1 << 0 // flag

	chunkNone           = 0
	chunkOffsetData     = 1
	chunkBlockStatus    = 5
	chunkBlockStatusExt = 6
	chunkError          = 1<<15 + 1
)

// States of base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

// The one metadata context there is, and its identifier.
const (
	contextName = "base:allocation"
	contextBase = "base:" // matches all of the namespace
	contextID   = 1
)

// Sizes in bytes.
const (
	optionHeader   = 16
	requestHeader  = 28
	extendedHeader = 32

	maxName    = 4096     // of any string
	maxOption  = 64 << 10 // of an option's data that is looked at
	skipOption = 1 << 20  // and that is read over

	maxBlock = 64 << 10 // of a block size

	// maxPayload is the most data of one request that clients are told of. It is what one NVMe command moves at most.
	maxPayload = 1 << 20
	// mostPayload is the most data that is taken: what clients may send that do not ask, as Linux does. More ends the connection.
	mostPayload = 32 << 20
)
