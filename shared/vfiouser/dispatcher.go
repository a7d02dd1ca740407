package vfiouser

import (
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// Device is what a Dispatcher presents to a client. Its methods are called from Handle,
// one at a time, with requests that are well-formed and inside the bounds that the
// device itself gave; what only the device can know (alignment, overlap, widths) is
// left to it. Info, RegionInfo and IRQInfo must be cheap and, for one connection,
// constant.
//
// An error becomes an error reply with the unix.Errno it wraps, or else EIO from a
// region access and Reset and EINVAL from the rest.
type Device interface {
	Info() DeviceInfo

	// RegionInfo describes region i. False for an i below Info().NumRegions is
	// answered with an empty region, not with an error: SPDK's client asks for every
	// index and gives up at the first error.
	RegionInfo(i uint32) (RegionInfo, bool)

	// IRQInfo describes interrupt type i; false as for RegionInfo.
	IRQInfo(i uint32) (IRQInfo, bool)

	// SetIRQs has one data and one action flag, and Start+Count within the type's Count.
	// With IRQSetDataEventFD, fds has Count entries, or none: de-assign these vectors.
	// s.DisableAll() takes the whole type down. The fds are the device's from here
	// on, even if it fails. QEMU takes all vectors down and sets them anew for each
	// one that the guest adds: an interrupt due in between must be kept.
	SetIRQs(s SetIRQs, fds []int) error

	// DMAMap: Size is not 0, IOVA+Size at most 2^64, Offset+Size fits an int64. fd is
	// the device's from here on, even if it fails; -1: this memory cannot be mapped.
	DMAMap(m DMAMap, fd int) error

	// DMAUnmap removes every mapping inside [iova, iova+size), whose end may be 2^64,
	// and succeeds if there is none: QEMU unmaps ranges that it never mapped. With
	// UnmapAll in flags, iova and size are 0 and everything goes. When it returns
	// nothing touches that memory any more.
	DMAUnmap(iova, size uint64, flags uint32) error

	// RegionRead and RegionWrite: len(p) is not 0, and off+len(p) is inside region i.
	RegionRead(i uint32, off uint64, p []byte) error
	RegionWrite(i uint32, off uint64, p []byte) error

	Reset() error
}

// Dispatcher turns the messages of one client into calls of a Device. It does no I/O
// and has no goroutine; Handle is for one goroutine at a time. Each call takes as long
// as the Device does: QEMU gives a reply up after 5 s.
//
// Where the specification leaves the answer open:
//   - The first message must be VERSION, with major 0; otherwise the connection ends. A
//     second VERSION is EINVAL.
//   - A client that sent no version data gets none back, and the protocol's defaults
//     count (SPDK). Otherwise it is told this side's limits.
//   - A payload may be longer than its request needs (SPDK sends GET_REGION_INFO in 4064
//     bytes), except for a region access, which must be exact.
//   - Descriptors that a command has no use for are closed, and no error (SPDK sends one
//     with DMA_UNMAP).
//   - A region access with count 0 succeeds and does nothing.
//   - DMA_UNMAP with the flag for dirty bitmaps is ENOTSUP; with ALL its range is ignored.
//   - Commands that are not implemented, DMA_READ and DMA_WRITE in this direction, and
//     numbers that nobody assigned are ENOTSUP.
//   - A region with RegionMmap whose client takes no descriptors is described without it.
//   - A command with No_reply is never answered, not even if it fails; VERSION with
//     No_reply ends the connection.
type Dispatcher struct {
	// OnError, if set, is told of each command that was answered with an error, or would
	// have been but for No_reply.
	OnError func(h Header, err error)

	dev   Device
	caps  Capabilities // ours
	peer  Capabilities // the client's
	ready bool         // VERSION is done
	buf   []byte       // the reply's payload
}

// keepReply is the largest reply buffer, in bytes, that is kept for the next reply.
const keepReply = 512

// NewDispatcher returns a Dispatcher for one connection. Fields of caps that are 0 or
// above this package's limits are set to those.
func NewDispatcher(d Device, caps Capabilities) *Dispatcher {
	return &Dispatcher{dev: d, caps: caps.normal(), peer: protocolCapabilities()}
}

// Negotiated reports whether VERSION is done.
func (d *Dispatcher) Negotiated() bool { return d.ready }

// PeerCapabilities returns the client's limits; before VERSION, the protocol's defaults.
func (d *Dispatcher) PeerCapabilities() Capabilities { return d.peer }

// Handle executes one message from the client. If send, the reply is to be sent
// before the next Handle. It closes those of m.FDs that the device did not get. An error
// means that the connection must be dropped: ErrProtocol.
func (d *Dispatcher) Handle(m Message) (reply Reply, send bool, err error) {
	fds := fdSet{m.FDs}
	defer fds.close()

	if !m.IsCommand() {
		return Reply{}, false, fmt.Errorf("%w: %s: not a command", ErrProtocol, m.Header)
	}
	if !d.ready {
		return d.version(&m)
	}
	reply.Header = Header{ID: m.ID, Cmd: m.Cmd, Flags: FlagReply}
	cause := d.command(&m, &fds, &reply)
	if cause != nil {
		if d.OnError != nil {
			d.OnError(m.Header, cause)
		}
		reply.Flags |= FlagError
		reply.Errno = uint32(errnoOf(m.Cmd, cause))
		reply.Payload, reply.FDs = nil, nil
	}
	if m.Flags&FlagNoReply != 0 {
		return Reply{}, false, nil
	}
	return reply, true, nil
}

// version answers the first message.
func (d *Dispatcher) version(m *Message) (Reply, bool, error) {
	if m.Cmd != CmdVersion || m.Flags&FlagNoReply != 0 {
		return Reply{}, false, fmt.Errorf("%w: %s: the first message must be VERSION, with a reply", ErrProtocol, m.Header)
	}
	v, err := ParseVersion(m.Payload)
	if err != nil {
		return Reply{}, false, err
	}
	if v.Major != VersionMajor {
		return Reply{}, false, fmt.Errorf("%w: client speaks version %d.%d, this side %d.%d", ErrProtocol, v.Major, v.Minor, VersionMajor, VersionMinor)
	}
	d.peer, d.ready = v.Caps, true
	answer := Version{Major: VersionMajor, Minor: min(v.Minor, VersionMinor), HasData: v.HasData, Caps: d.caps}
	d.buf = answer.Append(d.buf[:0])
	return Reply{Header: Header{ID: m.ID, Cmd: m.Cmd, Flags: FlagReply}, Payload: d.buf}, true, nil
}

var (
	errShort = fmt.Errorf("payload or argsz too short: %w", unix.EINVAL)
	errFlags = fmt.Errorf("bad flags: %w", unix.EINVAL)
	errRange = fmt.Errorf("outside the bounds: %w", unix.EINVAL)
	errIndex = fmt.Errorf("no such index: %w", unix.EINVAL)
	errFDs   = fmt.Errorf("wrong number of file descriptors: %w", unix.EINVAL)
)

func (d *Dispatcher) command(m *Message, fds *fdSet, reply *Reply) error {
	switch m.Cmd {
	case CmdRegionRead:
		return d.regionRead(m, reply)
	case CmdRegionWrite:
		return d.regionWrite(m, reply)
	case CmdDMAMap:
		return d.dmaMap(m, fds)
	case CmdDMAUnmap:
		return d.dmaUnmap(m, reply)
	case CmdDeviceGetInfo:
		return d.deviceInfo(m, reply)
	case CmdDeviceGetRegionInfo:
		return d.regionInfo(m, reply)
	case CmdDeviceGetIRQInfo:
		return d.irqInfo(m, reply)
	case CmdDeviceSetIRQs:
		return d.setIRQs(m, fds)
	case CmdDeviceReset:
		if info := d.dev.Info(); info.Flags&DeviceReset == 0 {
			return unix.ENOTSUP
		}
		return d.dev.Reset()
	case CmdVersion:
		return fmt.Errorf("second VERSION: %w", unix.EINVAL)
	default:
		return unix.ENOTSUP
	}
}

func (d *Dispatcher) dmaMap(m *Message, fds *fdSet) error {
	req, ok := ParseDMAMap(m.Payload)
	switch {
	case !ok:
		return errShort
	case req.Flags&^dmaMapFlags != 0 || req.Flags&(DMARead|DMAWrite) == 0:
		return errFlags
	case req.Size == 0 || req.IOVA+(req.Size-1) < req.IOVA:
		return errRange
	case req.Offset > math.MaxInt64 || req.Size > math.MaxInt64-req.Offset:
		return errRange
	case len(fds.fds) > 1:
		return errFDs
	}
	fd := -1
	if len(fds.fds) == 1 {
		fd = fds.take()[0]
	}
	return d.dev.DMAMap(req, fd)
}

func (d *Dispatcher) dmaUnmap(m *Message, reply *Reply) error {
	req, ok := ParseDMAUnmap(m.Payload)
	switch {
	case !ok:
		return errShort
	case req.Flags&UnmapDirtyBitmap != 0:
		return unix.ENOTSUP
	case req.Flags&^UnmapAll != 0:
		return errFlags
	}
	iova, size := req.IOVA, req.Size
	if req.Flags&UnmapAll != 0 {
		iova, size = 0, 0
	} else if size == 0 || iova+(size-1) < iova {
		return errRange
	}
	if err := d.dev.DMAUnmap(iova, size, req.Flags); err != nil {
		return err
	}
	reply.Payload = m.Payload[:DMAUnmapSize]
	return nil
}

func (d *Dispatcher) deviceInfo(m *Message, reply *Reply) error {
	if _, ok := ParseDeviceInfo(m.Payload); !ok {
		return errShort
	}
	info := d.dev.Info()
	d.buf = info.AppendReply(d.buf[:0], min(le.Uint32(m.Payload), uint32(len(m.Payload))))
	reply.Payload = d.buf
	return nil
}

func (d *Dispatcher) regionInfo(m *Message, reply *Reply) error {
	if len(m.Payload) < RegionInfoSize || le.Uint32(m.Payload) < RegionInfoSize {
		return errShort
	}
	argsz, index := le.Uint32(m.Payload), le.Uint32(m.Payload[8:])
	info, ok := d.region(index)
	if !ok {
		return errIndex
	}
	mappable := info.Flags&RegionMmap != 0 && info.FD >= 0 && d.peer.MaxMsgFDs > 0
	if !mappable {
		info.Flags &^= RegionMmap
		info.Areas = nil
	}
	var full bool
	d.buf, full = info.AppendReply(d.buf[:0], argsz)
	reply.Payload = d.buf
	if mappable && full {
		reply.FDs = []int{info.FD}
	}
	return nil
}

// region describes region i; an empty one if the device has the index and no more.
func (d *Dispatcher) region(i uint32) (RegionInfo, bool) {
	info, ok := d.dev.RegionInfo(i)
	if !ok {
		if i >= d.dev.Info().NumRegions {
			return RegionInfo{}, false
		}
		info = RegionInfo{}
	}
	info.Index = i
	return info, true
}

func (d *Dispatcher) irqInfo(m *Message, reply *Reply) error {
	req, ok := ParseIRQInfo(m.Payload)
	if !ok {
		return errShort
	}
	info, ok := d.irq(req.Index)
	if !ok {
		return errIndex
	}
	d.buf = info.Append(d.buf[:0])
	reply.Payload = d.buf
	return nil
}

func (d *Dispatcher) irq(i uint32) (IRQInfo, bool) {
	info, ok := d.dev.IRQInfo(i)
	if !ok {
		if i >= d.dev.Info().NumIRQs {
			return IRQInfo{}, false
		}
		info = IRQInfo{}
	}
	info.Index = i
	return info, true
}

func (d *Dispatcher) setIRQs(m *Message, fds *fdSet) error {
	req, ok := ParseSetIRQs(m.Payload)
	if !ok {
		return errShort
	}
	data, action := req.Flags&irqSetDataMask, req.Flags&irqSetActionMask
	if data|action != req.Flags || !oneBit(data) || !oneBit(action) {
		return errFlags
	}
	info, ok := d.irq(req.Index)
	if !ok {
		return errIndex
	}
	if req.DisableAll() {
		return d.dev.SetIRQs(req, nil)
	}
	if req.Count == 0 || req.Start > info.Count || req.Count > info.Count-req.Start {
		return errRange
	}
	if data != IRQSetDataEventFD {
		return d.dev.SetIRQs(req, nil)
	}
	if n := len(fds.fds); n != 0 && uint64(n) != uint64(req.Count) {
		return errFDs
	}
	return d.dev.SetIRQs(req, fds.take())
}

func oneBit(v uint32) bool { return v != 0 && v&(v-1) == 0 }

func (d *Dispatcher) regionRead(m *Message, reply *Reply) error {
	off, region, count, _, ok := ParseRegionAccess(m.Payload)
	if !ok || len(m.Payload) != RegionAccessSize {
		return errShort
	}
	if err := d.checkAccess(region, off, count, RegionRead); err != nil {
		return err
	}
	size := RegionAccessSize + int(count)
	b := d.buf
	if cap(b) < size {
		b = make([]byte, size)
		if size <= keepReply {
			d.buf = b
		}
	}
	b = b[:size]
	data := b[RegionAccessSize:]
	clear(data) // never what an earlier reply left
	if count != 0 {
		if err := d.dev.RegionRead(region, off, data); err != nil {
			return err
		}
	}
	AppendRegionAccess(b[:0], off, region, count)
	reply.Payload = b
	return nil
}

func (d *Dispatcher) regionWrite(m *Message, reply *Reply) error {
	off, region, count, data, ok := ParseRegionAccess(m.Payload)
	if !ok || uint64(len(data)) != uint64(count) {
		return errShort
	}
	if err := d.checkAccess(region, off, count, RegionWrite); err != nil {
		return err
	}
	if count != 0 {
		if err := d.dev.RegionWrite(region, off, data); err != nil {
			return err
		}
	}
	reply.Payload = m.Payload[:RegionAccessSize]
	return nil
}

func (d *Dispatcher) checkAccess(region uint32, off uint64, count, flag uint32) error {
	info, ok := d.region(region)
	switch {
	case !ok:
		return errIndex
	case count > d.caps.MaxDataXfer:
		return fmt.Errorf("%d bytes, limit %d: %w", count, d.caps.MaxDataXfer, unix.EINVAL)
	case off > info.Size || uint64(count) > info.Size-off:
		return errRange
	case info.Flags&flag == 0:
		return unix.EACCES
	}
	return nil
}

// errnoOf is what a failed command is answered with; never 0.
func errnoOf(cmd Command, err error) unix.Errno {
	var errno unix.Errno
	if errors.As(err, &errno) && errno != 0 {
		return errno
	}
	switch cmd {
	case CmdRegionRead, CmdRegionWrite, CmdDeviceReset:
		return unix.EIO
	}
	return unix.EINVAL
}

// fdSet are descriptors that nobody has taken yet.
type fdSet struct{ fds []int }

func (s *fdSet) take() []int {
	fds := s.fds
	s.fds = nil
	return fds
}

func (s *fdSet) close() { closeAll(s.take()) }
