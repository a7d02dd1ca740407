package vfiouser

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzReceiver sends a stream in the pieces that plan asks for (length, and in the top
// bit whether a descriptor goes along) and checks what comes out against a reading of
// the stream in one go.
func FuzzReceiver(f *testing.F) {
	f.Add(bytes.Join([][]byte{message(1, CmdVersion, 0, nil), message(2, CmdRegionWrite, FlagNoReply, pattern(20)), message(3, CmdDMAMap, 0, pattern(32))}, nil), []byte{16, 36, 128 + 48})
	f.Add(message(1, CmdRegionWrite, 0, pattern(3000)), []byte{1, 2, 127})
	f.Add(make([]byte, 32), []byte{128 + 3})
	f.Add(bytes.Repeat([]byte{0xff}, 40), []byte{40})
	f.Fuzz(func(t *testing.T, stream, plan []byte) {
		const limit = 4096
		if len(stream) > 1<<16 {
			return
		}
		before := openFDs(t)
		file, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		a, b := socketPair(t)
		r := NewReceiver(b, limit)
		want := stream
		sent, got := 0, 0
		dead := false
		for i := 0; len(stream) > 0 && !dead; i++ {
			n, fds := len(stream), []int(nil)
			if i < len(plan) {
				n = min(max(int(plan[i]&0x7f), 1), n)
				if plan[i]&0x80 != 0 {
					fds = []int{file}
					sent++
				}
			}
			push(t, a, stream[:n], fds...)
			stream = stream[n:]
			for !dead {
				eof, err := r.Fill()
				if err == unix.EAGAIN {
					break
				}
				if eof {
					t.Fatal("end of a socket that is open")
				}
				dead = err != nil
				for !dead {
					m, ok, err := r.Next()
					if dead = err != nil; dead || !ok {
						break
					}
					if m.Size < HeaderSize || m.Size > limit || len(m.FDs) > MaxFDsTaken {
						t.Fatalf("%v with %d descriptors", m.Header, len(m.FDs))
					}
					whole := append(m.Header.Append(nil), m.Payload...)
					if !bytes.HasPrefix(want, whole) {
						t.Fatalf("got %x, want %x", whole, want[:min(len(want), len(whole))])
					}
					want = want[len(whole):]
					got += len(m.FDs)
					closeAll(m.FDs)
				}
			}
		}
		if h, ok := ParseHeader(want); !dead && ok && (h.Size < HeaderSize || int(h.Size) <= len(want)) {
			t.Fatalf("a message is left: %v", h)
		}
		if got > sent {
			t.Fatalf("%d descriptors out of %d", got, sent)
		}
		r.Close()
		closeAll([]int{a, b, file})
		if after := openFDs(t); after != before {
			t.Fatalf("%d descriptors open, %d at the start", after, before)
		}
	})
}

// checkedDevice fails the test if it is called with what a Device must never see.
type checkedDevice struct {
	*fakeDevice
	t *testing.T
}

func (d *checkedDevice) access(i uint32, off uint64, p []byte) {
	r, ok := d.regions[i]
	if n := uint64(len(p)); !ok || n == 0 || off > r.Size || n > r.Size-off {
		d.t.Fatalf("access to region %d at %#x, %d bytes", i, off, n)
	}
}

func (d *checkedDevice) RegionRead(i uint32, off uint64, p []byte) error {
	d.access(i, off, p)
	return d.fakeDevice.RegionRead(i, off, p)
}

func (d *checkedDevice) RegionWrite(i uint32, off uint64, p []byte) error {
	d.access(i, off, p)
	return d.fakeDevice.RegionWrite(i, off, p)
}

func (d *checkedDevice) DMAMap(m DMAMap, fd int) error {
	if m.Size == 0 || m.IOVA+(m.Size-1) < m.IOVA || int64(m.Offset) < 0 || int64(m.Offset+m.Size) < 0 {
		d.t.Fatalf("map %+v", m)
	}
	return d.fakeDevice.DMAMap(m, fd)
}

func (d *checkedDevice) DMAUnmap(iova, size uint64, flags uint32) error {
	if flags != UnmapAll && (flags != 0 || size == 0 || iova+(size-1) < iova) {
		d.t.Fatalf("unmap %#x+%#x flags %#x", iova, size, flags)
	}
	return d.fakeDevice.DMAUnmap(iova, size, flags)
}

func (d *checkedDevice) SetIRQs(s SetIRQs, fds []int) error {
	if n := d.irqs[s.Index].Count; !s.DisableAll() && (s.Count == 0 || s.Start >= n || s.Count > n-s.Start) {
		d.t.Fatalf("irqs %+v", s)
	}
	if len(fds) != 0 && (len(fds) != int(s.Count) || s.Flags&IRQSetDataEventFD == 0) {
		d.t.Fatalf("irqs %+v with %d descriptors", s, len(fds))
	}
	return d.fakeDevice.SetIRQs(s, fds)
}

// FuzzDispatcher gives a negotiated Dispatcher one command of arbitrary payload, and a
// new one an arbitrary first message.
func FuzzDispatcher(f *testing.F) {
	dma, unmap := DMAMap{3, 0, 0, 4096}, DMAUnmap{0, 4096, 0xfffffffffffff000}
	irqs := SetIRQs{Flags: 0x24, Index: IRQMSIX, Count: 2}
	region := RegionInfo{}
	f.Add(uint16(CmdVersion), uint32(0), append([]byte{0, 0, 0, 0}, qemuVersionData...), uint8(0))
	f.Add(uint16(CmdDMAMap), uint32(0), dma.Append(nil), uint8(1))
	f.Add(uint16(CmdDMAUnmap), uint32(0), unmap.Append(nil), uint8(1))
	f.Add(uint16(CmdDeviceGetInfo), uint32(0), (&DeviceInfo{}).Append(nil), uint8(0))
	f.Add(uint16(CmdDeviceGetRegionInfo), uint32(0), region.AppendRequest(nil, 64), uint8(0))
	f.Add(uint16(CmdDeviceGetIRQInfo), uint32(0), (&IRQInfo{Index: 2}).Append(nil), uint8(0))
	f.Add(uint16(CmdDeviceSetIRQs), uint32(0), irqs.Append(nil), uint8(2))
	f.Add(uint16(CmdRegionRead), uint32(0), AppendRegionAccess(nil, 0, 7, 256), uint8(0))
	f.Add(uint16(CmdRegionWrite), uint32(FlagNoReply), append(AppendRegionAccess(nil, 0x1000, 0, 4), 1, 0, 0, 0), uint8(0))
	f.Add(uint16(CmdDeviceReset), uint32(0), []byte(nil), uint8(3))
	f.Fuzz(func(t *testing.T, cmd uint16, flags uint32, payload []byte, nfds uint8) {
		if len(payload) > MaxMsg-HeaderSize {
			return
		}
		before := openFDs(t)
		for _, first := range []bool{false, true} {
			dev := &checkedDevice{newFakeDevice(), t}
			file, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			dev.mapDoorbells(file)
			d := NewDispatcher(dev, Capabilities{})
			if !first {
				handle(t, d, CmdVersion, 0, []byte{0, 0, 0, 0})
			}
			fds := make([]int, min(nfds, MaxFDs))
			for i := range fds {
				fds[i] = file
			}
			m := Message{Header: Header{ID: 5, Cmd: Command(cmd), Flags: flags}, Payload: payload, FDs: dup(t, fds...)}
			r, send, err := d.Handle(m)
			if send && (err != nil || flags&FlagNoReply != 0 || r.ID != 5 || r.Cmd != Command(cmd) || !r.IsReply()) {
				t.Fatalf("reply %v, error %v", r.Header, err)
			}
			if send && len(r.Payload) > MaxMsg-HeaderSize || len(r.FDs) > MaxFDs {
				t.Fatalf("reply of %d bytes, %d descriptors", len(r.Payload), len(r.FDs))
			}
			dev.close()
			closeAll([]int{file})
		}
		if after := openFDs(t); after != before {
			t.Fatalf("%d descriptors open, %d at the start", after, before)
		}
	})
}

// FuzzClientReplies gives the client's parsers arbitrary replies.
func FuzzClientReplies(f *testing.F) {
	info := RegionInfo{Flags: 7, Size: 0x4000, Areas: []MmapArea{{0x1000, 0x1000}, {0x3000, 0x1000}}}
	b, _ := info.AppendReply(nil, 4096)
	f.Add(b)
	f.Add([]byte("\x00\x00\x00\x00" + qemuVersionData))
	f.Fuzz(func(t *testing.T, p []byte) {
		if m, _, ok := ParseRegionInfo(p); ok {
			if len(m.Areas) > maxAreas {
				t.Fatal(len(m.Areas))
			}
			for _, a := range m.Areas {
				if a.Size == 0 || a.Offset > m.Size || a.Size > m.Size-a.Offset {
					t.Fatalf("%+v in %+v", a, m)
				}
			}
		}
		if v, err := ParseVersion(p); err == nil && (v.Caps.MaxMsgFDs > MaxFDs || v.Caps.MaxDataXfer == 0 || v.Caps.MaxDataXfer > MaxDataXfer) {
			t.Fatalf("%+v", v)
		}
	})
}
