package vfiouser

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// firstArgsz is what RegionInfo offers at first for a reply: enough for 60 areas.
const firstArgsz = 1024

// Negotiate proposes this package's version and limits, and returns the server's
// answer. It is the first call on a connection, and is made once; Dial has made it.
func (c *Client) Negotiate(ctx context.Context) (Version, error) {
	propose := Version{Major: VersionMajor, Minor: VersionMinor, HasData: true, Caps: DefaultCapabilities()}
	s, err := c.call(ctx, CmdVersion, propose.Append(nil), nil, nil)
	if err != nil {
		return Version{}, err
	}
	defer c.release(s)
	v, err := ParseVersion(s.data)
	if err == nil && (v.Major != VersionMajor || v.Minor > VersionMinor) {
		err = fmt.Errorf("%w: server answered version %d.%d to %d.%d", ErrProtocol, v.Major, v.Minor, VersionMajor, VersionMinor)
	}
	if err != nil {
		c.fail(err)
		return Version{}, err
	}
	c.mu.Lock()
	c.caps = v.Caps
	c.mu.Unlock()
	return v, nil
}

// badReply is for a reply that makes no sense; the connection goes on.
func badReply(cmd Command, data []byte) error {
	return fmt.Errorf("%s: %w: bad reply of %d bytes", cmd, ErrProtocol, len(data))
}

// DeviceInfo asks what the device is.
func (c *Client) DeviceInfo(ctx context.Context) (DeviceInfo, error) {
	var req DeviceInfo
	s, err := c.call(ctx, CmdDeviceGetInfo, req.Append(nil), nil, nil)
	if err != nil {
		return DeviceInfo{}, err
	}
	defer c.release(s)
	info, ok := ParseDeviceInfo(s.data)
	if !ok {
		return DeviceInfo{}, badReply(CmdDeviceGetInfo, s.data)
	}
	return info, nil
}

// RegionInfo asks about region index. Its FD belongs to the caller; it is -1 if the server
// sent none, whatever Flags say. Areas lie inside Size; neither is known to lie
// inside the file behind FD.
func (c *Client) RegionInfo(ctx context.Context, index uint32) (RegionInfo, error) {
	req := RegionInfo{Index: index}
	argsz := uint32(firstArgsz)
	for range 2 {
		s, err := c.call(ctx, CmdDeviceGetRegionInfo, req.AppendRequest(nil, argsz), nil, nil)
		if err != nil {
			return RegionInfo{FD: -1}, err
		}
		info, need, ok := ParseRegionInfo(s.data)
		if !ok || info.Index != index || need > MaxMsg-HeaderSize || (need <= argsz && int(need) > len(s.data)) {
			err = badReply(CmdDeviceGetRegionInfo, s.data)
		} else if need <= argsz {
			if len(s.fds) != 0 && info.Flags&RegionMmap != 0 {
				info.FD = s.fds[0]
				s.fds = s.fds[1:]
			}
			info.Flags &^= RegionCaps
		}
		c.release(s)
		if err != nil {
			return RegionInfo{FD: -1}, err
		}
		if need <= argsz {
			return info, nil
		}
		argsz = need
	}
	return RegionInfo{FD: -1}, fmt.Errorf("%s: %w: reply never fits", CmdDeviceGetRegionInfo, ErrProtocol)
}

// IRQInfo asks about interrupt type index.
func (c *Client) IRQInfo(ctx context.Context, index uint32) (IRQInfo, error) {
	req := IRQInfo{Index: index}
	s, err := c.call(ctx, CmdDeviceGetIRQInfo, req.Append(nil), nil, nil)
	if err != nil {
		return IRQInfo{}, err
	}
	defer c.release(s)
	info, ok := ParseIRQInfo(s.data)
	if !ok || info.Index != index {
		return IRQInfo{}, badReply(CmdDeviceGetIRQInfo, s.data)
	}
	return info, nil
}

// SetIRQs gives each vector from start on an eventfd, in messages of as many as the
// server takes; flags are usually IRQSetDataEventFD|IRQSetTrigger. The fds stay the
// caller's. Without fds it is one message with count 0, which DisableIRQs explains. After
// an error some of the vectors may be set.
func (c *Client) SetIRQs(ctx context.Context, index, start, flags uint32, fds []int) error {
	if len(fds) == 0 {
		return c.IRQAction(ctx, SetIRQs{Flags: flags, Index: index, Start: start}, nil)
	}
	chunk := max(c.Capabilities().MaxMsgFDs, 1)
	for len(fds) > 0 {
		n := min(chunk, len(fds))
		if err := c.IRQAction(ctx, SetIRQs{Flags: flags, Index: index, Start: start, Count: uint32(n)}, fds[:n]); err != nil {
			return err
		}
		fds = fds[n:]
		start += uint32(n)
	}
	return nil
}

// DisableIRQs takes down every vector of the type, by asking for no data and no vectors.
func (c *Client) DisableIRQs(ctx context.Context, index uint32) error {
	return c.IRQAction(ctx, SetIRQs{Flags: IRQSetDataNone | IRQSetTrigger, Index: index}, nil)
}

// UnassignIRQs takes the eventfds of count vectors from start on away.
func (c *Client) UnassignIRQs(ctx context.Context, index, start, count uint32) error {
	return c.IRQAction(ctx, SetIRQs{Flags: IRQSetDataEventFD | IRQSetTrigger, Index: index, Start: start, Count: count}, nil)
}

// IRQAction sends one DEVICE_SET_IRQS as it is. The fds stay the caller's.
func (c *Client) IRQAction(ctx context.Context, s SetIRQs, fds []int) error {
	return c.do(ctx, CmdDeviceSetIRQs, s.Append(nil), nil, fds)
}

// DMAMap shows the server size bytes of memory at iova: those at offset of the file fd, or
// if fd is -1 none that it can reach. flags are DMARead and DMAWrite. fd stays the
// caller's.
func (c *Client) DMAMap(ctx context.Context, iova, size, offset uint64, fd int, flags uint32) error {
	m := DMAMap{Flags: flags, Offset: offset, IOVA: iova, Size: size}
	var fds []int
	if fd >= 0 {
		fds = []int{fd}
	}
	return c.do(ctx, CmdDMAMap, m.Append(nil), nil, fds)
}

// DMAUnmap takes a mapping away. When it returns nil the server touches that memory
// no more.
func (c *Client) DMAUnmap(ctx context.Context, iova, size uint64) error {
	m := DMAUnmap{IOVA: iova, Size: size}
	return c.do(ctx, CmdDMAUnmap, m.Append(nil), nil, nil)
}

// DMAUnmapAll takes all mappings away.
func (c *Client) DMAUnmapAll(ctx context.Context) error {
	m := DMAUnmap{Flags: UnmapAll}
	return c.do(ctx, CmdDMAUnmap, m.Append(nil), nil, nil)
}

// Reset resets the device.
func (c *Client) Reset(ctx context.Context) error {
	return c.do(ctx, CmdDeviceReset, nil, nil, nil)
}

// do is a call whose reply says nothing but success.
func (c *Client) do(ctx context.Context, cmd Command, payload, more []byte, fds []int) error {
	s, err := c.call(ctx, cmd, payload, more, fds)
	if err != nil {
		return err
	}
	c.release(s)
	return nil
}

// RegionRead fills p from byte off of a region. A register is read in one access of
// len(p) bytes. len(p) is limited by the server's MaxDataXfer.
func (c *Client) RegionRead(ctx context.Context, region uint32, off uint64, p []byte) error {
	if err := c.checkSize(CmdRegionRead, p); err != nil {
		return err
	}
	var req [RegionAccessSize]byte
	s, err := c.call(ctx, CmdRegionRead, AppendRegionAccess(req[:0], off, region, uint32(len(p))), nil, nil)
	if err != nil {
		return err
	}
	defer c.release(s)
	_, _, count, data, ok := ParseRegionAccess(s.data)
	if !ok || int64(count) != int64(len(p)) || len(data) != len(p) {
		return badReply(CmdRegionRead, s.data)
	}
	copy(p, data)
	return nil
}

// RegionWrite writes p at byte off of a region, in one access, and waits until it is
// done. len(p) is limited by the server's MaxDataXfer.
func (c *Client) RegionWrite(ctx context.Context, region uint32, off uint64, p []byte) error {
	if err := c.checkSize(CmdRegionWrite, p); err != nil {
		return err
	}
	var req [RegionAccessSize]byte
	return c.do(ctx, CmdRegionWrite, AppendRegionAccess(req[:0], off, region, uint32(len(p))), p, nil)
}

// RegionWritePosted is RegionWrite without waiting for the device. Whether it failed
// there is never known. It allocates nothing for a register, and blocks only while the
// socket is full.
func (c *Client) RegionWritePosted(ctx context.Context, region uint32, off uint64, p []byte) error {
	if err := c.checkSize(CmdRegionWrite, p); err != nil {
		return err
	}
	deadline := c.deadline(ctx)
	if err := c.lockSend(ctx, deadline); err != nil {
		return callError(CmdRegionWrite, err)
	}
	err := c.postLocked(ctx, deadline, region, off, p)
	<-c.sending
	if err != nil {
		return callError(CmdRegionWrite, err)
	}
	return nil
}

func (c *Client) postLocked(ctx context.Context, deadline time.Time, region uint32, off uint64, p []byte) error {
	size := HeaderSize + RegionAccessSize + len(p)
	h := Header{ID: postedID, Cmd: CmdRegionWrite, Size: uint32(size), Flags: FlagNoReply}
	msg := h.Append(c.posted[:0])
	msg = AppendRegionAccess(msg, off, region, uint32(len(p)))
	return c.sendLocked(ctx, deadline, append(msg, p...), nil)
}

func (c *Client) checkSize(cmd Command, p []byte) error {
	if limit := c.Capabilities().MaxDataXfer; uint64(len(p)) > uint64(limit) {
		return callError(cmd, fmt.Errorf("%d bytes, the server takes %d: %w", len(p), limit, unix.EMSGSIZE))
	}
	return nil
}
