package ublk

import "encoding/binary"

// The numbers and structures of include/uapi/linux/ublk_cmd.h, each with its kernel where that is later than 6.5.

const (
	cmdGetDevInfo    = ctrlRead | 0x02
	cmdAddDev        = ctrlBoth | 0x04
	cmdDelDev        = ctrlBoth | 0x05
	cmdStartDev      = ctrlBoth | 0x06
	cmdStopDev       = ctrlBoth | 0x07
	cmdSetParams     = ctrlBoth | 0x08
	cmdGetParams     = ctrlRead | 0x09
	cmdStartRecovery = ctrlBoth | 0x10
	cmdEndRecovery   = ctrlBoth | 0x11
	cmdGetFeatures   = ctrlRead | 0x13
	cmdDelDevAsync   = ctrlRead | 0x14 // 6.9
	cmdUpdateSize    = ctrlBoth | 0x15 // 6.16

	ioFetch          = ioBoth | 0x20
	ioCommitAndFetch = ioBoth | 0x21
)

// Command numbers are made as those of ioctls are: direction, size of the argument, letter, number.
const (
	letter   = 'u' << 8
	ctrlRead = 2<<30 | ctrlCmdSize<<16 | letter
	ctrlBoth = 3<<30 | ctrlCmdSize<<16 | letter
	ioBoth   = 3<<30 | ioCmdSize<<16 | letter
)

// Sizes in bytes.
const (
	ctrlCmdSize = 32 // struct ublksrv_ctrl_cmd
	ioCmdSize   = 16 // struct ublksrv_io_cmd
	devInfoSize = 64 // struct ublksrv_ctrl_dev_info
	ioDescSize  = 24 // struct ublksrv_io_desc
	paramsSize  = 76 // struct ublk_params up to and with devt
	setSize     = 60 // and up to it
)

const (
	maxDepth   = 4096
	maxQueues  = 4096
	sectorSize = 512
	allQueues  = 0xffff     // ublksrv_ctrl_cmd.queue_id of a command that is for no queue
	anyID      = 0xffffffff // dev_id of ADD_DEV: the kernel chooses
)

// Features are the UBLK_F bits of a kernel or a device.
type Features uint64

// Some of them.
const (
	FeatureUserRecovery    Features = 1 << 3
	FeatureRecoveryReissue Features = 1 << 4
	FeatureIoctlEncode     Features = 1 << 6
	FeatureUpdateSize      Features = 1 << 10 // 6.16
)

// State is that of a device.
type State uint16

// The states.
const (
	Dead     State = 0 // not started, or stopped
	Live     State = 1
	Quiesced State = 2 // its server has gone and requests wait for the next one
	FailIO   State = 3
)

// String returns the state's name.
func (s State) String() string {
	switch s {
	case Dead:
		return "dead"
	case Live:
		return "live"
	case Quiesced:
		return "quiesced"
	case FailIO:
		return "fail-io"
	}
	return "unknown"
}

// Operations in a descriptor.
const (
	opRead        = 0
	opWrite       = 1
	opFlush       = 2
	opDiscard     = 3
	opWriteZeroes = 5

	opMask = 0xff
	opFUA  = 1 << 13
)

const (
	paramBasic   = 1 << 0
	paramDiscard = 1 << 1
	paramDevt    = 1 << 2

	attrReadOnly      = 1 << 0
	attrVolatileCache = 1 << 2
	attrFUA           = 1 << 3
)

var le = binary.LittleEndian

// ctrlCmd is struct ublksrv_ctrl_cmd.
type ctrlCmd struct {
	id   uint32
	len  uint16
	addr uint64
	data uint64
}

func (c *ctrlCmd) put(b []byte) {
	clear(b[:ctrlCmdSize])
	le.PutUint32(b, c.id)
	le.PutUint16(b[4:], allQueues)
	le.PutUint16(b[6:], c.len)
	le.PutUint64(b[8:], c.addr)
	le.PutUint64(b[16:], c.data)
}

// putIO writes struct ublksrv_io_cmd.
func putIO(b []byte, queue, tag uint16, result int32, addr uint64) {
	le.PutUint16(b, queue)
	le.PutUint16(b[2:], tag)
	le.PutUint32(b[4:], uint32(result))
	le.PutUint64(b[8:], addr)
}

// Info is what the kernel knows of a device.
type Info struct {
	Queues   int
	Depth    int
	State    State
	MaxIO    int // bytes of one request
	ID       uint32
	PID      int // of the server
	Features Features
	Identity uint64
}

func (i *Info) put(b []byte) {
	clear(b[:devInfoSize])
	le.PutUint16(b, uint16(i.Queues))
	le.PutUint16(b[2:], uint16(i.Depth))
	le.PutUint32(b[8:], uint32(i.MaxIO))
	le.PutUint32(b[12:], i.ID)
	le.PutUint64(b[24:], uint64(i.Features))
	le.PutUint64(b[32:], i.Identity)
}

func parseInfo(b []byte) Info {
	return Info{
		Queues: int(le.Uint16(b)), Depth: int(le.Uint16(b[2:])), State: State(le.Uint16(b[4:])),
		MaxIO: int(le.Uint32(b[8:])), ID: le.Uint32(b[12:]), PID: int(int32(le.Uint32(b[16:]))),
		Features: Features(le.Uint64(b[24:])), Identity: le.Uint64(b[32:]),
	}
}

// Params say what the disk is like. Sizes are in bytes.
type Params struct {
	Size          int64
	BlockSize     int // logical: 512 to 4096, a power of two
	PhysicalBlock int // 0: BlockSize
	OptimalIO     int // 0: PhysicalBlock
	Chunk         int // requests do not cross multiples of it; 0: they may
	ReadOnly      bool
	VolatileCache bool // there is something to flush; FUA writes go with it
	MaxDiscard    int  // of one request, 0: there is no discard
	DiscardUnit   int  // 0: PhysicalBlock
	MaxZeroes     int  // of one write zeroes; 0: the block layer writes zeroes instead

	// What the kernel has made of it: the device numbers, after Start.
	Major, Minor uint32
}

func (p *Params) put(b []byte, maxIO int) {
	clear(b[:setSize])
	le.PutUint32(b, setSize)
	types := uint32(paramBasic)
	var attrs uint32
	if p.ReadOnly {
		attrs |= attrReadOnly
	}
	if p.VolatileCache {
		attrs |= attrVolatileCache | attrFUA
	}
	physical := max(p.PhysicalBlock, p.BlockSize)
	le.PutUint32(b[8:], attrs)
	b[12], b[13], b[14], b[15] = log2(p.BlockSize), log2(physical), log2(max(p.OptimalIO, physical)), log2(physical)
	le.PutUint32(b[16:], uint32(maxIO/sectorSize))
	le.PutUint32(b[20:], uint32(p.Chunk/sectorSize))
	le.PutUint64(b[24:], uint64(p.Size/sectorSize))
	if p.MaxDiscard > 0 || p.MaxZeroes > 0 {
		types |= paramDiscard
		le.PutUint32(b[44:], uint32(max(p.DiscardUnit, physical)))
		le.PutUint32(b[48:], uint32(p.MaxDiscard/sectorSize))
		le.PutUint32(b[52:], uint32(p.MaxZeroes/sectorSize))
		le.PutUint16(b[56:], 1)
	}
	le.PutUint32(b[4:], types)
}

func parseParams(b []byte) Params {
	attrs := le.Uint32(b[8:])
	p := Params{
		Size: int64(le.Uint64(b[24:])) * sectorSize, BlockSize: 1 << (b[12] & 31), PhysicalBlock: 1 << (b[13] & 31), OptimalIO: 1 << (b[14] & 31),
		Chunk: int(le.Uint32(b[20:])) * sectorSize, ReadOnly: attrs&attrReadOnly != 0, VolatileCache: attrs&attrVolatileCache != 0,
	}
	types := le.Uint32(b[4:])
	if types&paramDiscard != 0 {
		p.DiscardUnit = int(le.Uint32(b[44:]))
		p.MaxDiscard, p.MaxZeroes = int(le.Uint32(b[48:]))*sectorSize, int(le.Uint32(b[52:]))*sectorSize
	}
	if types&paramDevt != 0 {
		p.Major, p.Minor = le.Uint32(b[68:]), le.Uint32(b[72:])
	}
	return p
}

func log2(n int) (shift uint8) {
	for n > 1 {
		n >>= 1
		shift++
	}
	return shift
}

// ioDesc is struct ublksrv_io_desc, read once.
type ioDesc struct {
	op      uint8
	fua     bool
	sectors uint32
	start   uint64
}

func parseDesc(b []byte) ioDesc {
	flags := le.Uint32(b)
	return ioDesc{op: uint8(flags & opMask), fua: flags&opFUA != 0, sectors: le.Uint32(b[4:]), start: le.Uint64(b[8:])}
}
