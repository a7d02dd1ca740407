package vfiouser

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// rawClient sends messages as they are written down, and reads replies.
type rawClient struct {
	t  testing.TB
	fd int
	r  *Receiver
	id uint16
	in []Message
}

func newRawClient(t testing.TB, fd int) *rawClient {
	t.Cleanup(func() { closeFD(t, fd) })
	return &rawClient{t: t, fd: fd, r: NewReceiver(fd, 0)}
}

func (c *rawClient) send(cmd Command, flags uint32, payload []byte, fds ...int) {
	c.t.Helper()
	if err := SendMessage(c.fd, Header{ID: c.id, Cmd: cmd, Flags: flags}, payload, fds); err != nil {
		c.t.Fatal(err)
	}
	c.id++
}

// next returns the next message from the other side.
func (c *rawClient) next(cmd Command) Message {
	c.t.Helper()
	for len(c.in) == 0 {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if n != 1 {
			c.t.Fatalf("%s: no reply in %v: %v", cmd, patience, err)
		}
		eof, err := c.r.Fill()
		if eof || err != nil {
			c.t.Fatalf("%s: no reply: eof %v, %v", cmd, eof, err)
		}
		c.in = drain(c.t, c.r)
	}
	m := c.in[0]
	c.in = c.in[1:]
	if m.Cmd != cmd {
		c.t.Fatalf("%s: got %v", cmd, m.Header)
	}
	return m
}

// reply returns the next message, which must be a reply with this errno.
func (c *rawClient) reply(cmd Command, errno unix.Errno) Message {
	c.t.Helper()
	m := c.next(cmd)
	if unix.Errno(m.Errno) != errno || !m.IsReply() || (m.Flags&FlagError != 0) != (errno != 0) {
		c.t.Fatalf("%s: reply %v", cmd, m.Header)
	}
	return m
}

func (c *rawClient) ask(cmd Command, payload []byte, fds ...int) Message {
	c.t.Helper()
	id := c.id
	c.send(cmd, 0, payload, fds...)
	m := c.reply(cmd, 0)
	if m.ID != id {
		c.t.Fatalf("%s: reply to %d, not %d", cmd, m.ID, id)
	}
	return m
}

func (c *rawClient) read(region uint32, off uint64, n uint32) []byte {
	c.t.Helper()
	m := c.ask(CmdRegionRead, AppendRegionAccess(nil, off, region, n))
	_, _, count, data, ok := ParseRegionAccess(m.Payload)
	if !ok || count != n || len(data) != int(n) {
		c.t.Fatalf("read of %d: %x", n, m.Payload)
	}
	return data
}

func (c *rawClient) write(region uint32, off uint64, data ...byte) {
	c.t.Helper()
	req := append(AppendRegionAccess(nil, off, region, uint32(len(data))), data...)
	if m := c.ask(CmdRegionWrite, req); !bytes.Equal(m.Payload, req[:16]) {
		c.t.Fatalf("write reply %x", m.Payload)
	}
}

func (c *rawClient) post(region uint32, off uint64, data ...byte) {
	c.t.Helper()
	c.send(CmdRegionWrite, FlagNoReply, append(AppendRegionAccess(nil, off, region, uint32(len(data))), data...))
}

func (c *rawClient) regionInfo(index, argsz uint32) Message {
	c.t.Helper()
	req := RegionInfo{Index: index}
	return c.ask(CmdDeviceGetRegionInfo, req.AppendRequest(nil, argsz))
}

func (c *rawClient) setIRQs(index, flags, start, count uint32, fds ...int) {
	c.t.Helper()
	req := SetIRQs{Flags: flags, Index: index, Start: start, Count: count}
	if m := c.ask(CmdDeviceSetIRQs, req.Append(nil), fds...); len(m.Payload) != 0 {
		c.t.Fatalf("SET_IRQS reply %x", m.Payload)
	}
}

// What QEMU 11.1.3 sends for a q35 machine with 512 MiB, from the connect to a guest
// that has enabled MSI-X, with the doorbell page mapped or not.
func TestQEMUStartUp(t *testing.T) {
	for _, mapped := range []bool{false, true} {
		t.Run(fmt.Sprintf("mapped=%v", mapped), func(t *testing.T) { qemuStartUp(t, mapped) })
	}
}

func qemuStartUp(t *testing.T, mapped bool) {
	checkFDs(t)
	files := memFDs(t, 8)
	mem, page, events := files[0], files[1], files[2:]
	dev := newFakeDevice()
	if mapped {
		dev.mapDoorbells(page)
	}
	fd, _ := startServer(t, dev)
	c := newRawClient(t, fd)

	v := append([]byte{0, 0, 0, 0}, qemuVersionData...)
	if len(v)+HeaderSize != 214 {
		t.Fatalf("VERSION has %d bytes", len(v)+HeaderSize)
	}
	answer, err := ParseVersion(c.ask(CmdVersion, v).Payload)
	if err != nil || answer.Major != 0 || answer.Minor != 0 || answer.Caps.MaxMsgFDs > 16 || answer.Caps.MaxDMAMaps > 65535 {
		t.Fatalf("VERSION: %+v %v", answer, err)
	}

	// Two maps, and the first question before their replies.
	ram, rom := DMAMap{3, 0, 0, 512 << 20}, DMAMap{1, 0, 0xfffc0000, 256 << 10}
	c.send(CmdDMAMap, 0, ram.Append(nil), mem)
	c.send(CmdDMAMap, 0, rom.Append(nil))
	c.send(CmdDeviceGetInfo, 0, (&DeviceInfo{}).Append(nil))
	for range 2 {
		if m := c.reply(CmdDMAMap, 0); len(m.Payload) != 0 {
			t.Fatalf("DMA_MAP reply %x", m.Payload)
		}
	}
	if m := c.reply(CmdDeviceGetInfo, 0); !bytes.Equal(m.Payload, []byte{16, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0}) {
		t.Fatalf("GET_INFO: %x", m.Payload)
	}

	for _, i := range []uint32{0, 1, 2, 3, 4, 5, 7} {
		m := c.regionInfo(i, 32)
		need := le.Uint32(m.Payload)
		if len(m.Payload) != 32 || len(m.FDs) != 0 || le.Uint32(m.Payload[4:])&RegionCaps != 0 {
			t.Fatalf("region %d: %x, %d descriptors", i, m.Payload, len(m.FDs))
		}
		if (need > 32) != (mapped && i == 0) {
			t.Fatalf("region %d: argsz %d", i, need)
		}
		if need > 32 {
			m = c.regionInfo(i, need)
			if len(m.Payload)+HeaderSize != 80 || le.Uint32(m.Payload[4:]) != 0xf {
				t.Fatalf("region %d: %x", i, m.Payload)
			}
			sameFiles(t, m.FDs, []int{page})
			closeAll(m.FDs)
		}
	}
	if m := c.ask(CmdDeviceGetIRQInfo, (&IRQInfo{Index: IRQErr}).Append(nil)); le.Uint32(m.Payload[12:]) != 1 {
		t.Fatalf("IRQ 3: %x", m.Payload)
	}
	c.read(RegionConfig, 0, 256)
	c.read(RegionConfig, 0x30, 4)
	c.write(RegionConfig, 0x30, 0, 0xf8, 0xff, 0xff)
	c.write(RegionConfig, 0x30, 0, 0, 0, 0)
	c.ask(CmdDeviceGetIRQInfo, (&IRQInfo{Index: IRQMSIX}).Append(nil))
	c.setIRQs(IRQINTx, 0x24, 0, 1, events[0])
	c.setIRQs(IRQErr, 0x24, 0, 1, events[1])
	c.setIRQs(IRQINTx, 0x21, 0, 0)
	c.write(RegionConfig, 4, 0, 0)
	c.ask(CmdDeviceReset, nil)
	c.setIRQs(IRQINTx, 0x24, 0, 1, events[0])

	// SeaBIOS: a round of unmaps and maps; the echo of an unmap is its request.
	u := DMAUnmap{0, 0, 512 << 20}
	if m := c.ask(CmdDMAUnmap, u.Append(nil)); !bytes.Equal(m.Payload, u.Append(nil)) {
		t.Fatalf("DMA_UNMAP: %x", m.Payload)
	}
	low := DMAMap{3, 0, 0, 0xc3000}
	c.ask(CmdDMAMap, low.Append(nil), mem)
	end := DMAUnmap{0, 0xfef00000, 0xffffffff01100000}
	c.ask(CmdDMAUnmap, end.Append(nil))

	// Registers and doorbells: posted, but not with a mapped page.
	if mapped {
		c.write(0, 0x14, 1, 0, 0x46, 0)
	} else {
		c.post(0, 0x14, 1, 0, 0x46, 0)
		c.post(0, 0x1000, 1, 0, 0, 0)
		c.post(0, 0x1004, 1, 0, 0, 0)
	}
	if got := c.read(0, 0x14, 4); !bytes.Equal(got, []byte{1, 0, 0x46, 0}) {
		t.Fatalf("CC %x", got)
	}

	// MSI-X: vector 0 without an eventfd, then all vectors anew for each one more.
	c.setIRQs(IRQMSIX, 0x24, 0, 1)
	for n := 1; n <= 3; n++ {
		c.setIRQs(IRQMSIX, 0x21, 0, 0)
		c.setIRQs(IRQMSIX, 0x24, 0, uint32(n), events[2:2+n]...)
	}
	for i := range uint32(3) {
		dev.mu.Lock()
		got := dev.vectors[[2]uint32{IRQMSIX, i}]
		dev.mu.Unlock()
		sameFiles(t, []int{got}, events[2+i:3+i])
	}

	log := dev.calls()
	want := []string{
		"map 0x0+0x20000000 @0x0 flags 3 fd", "map 0xfffc0000+0x40000 @0x0 flags 1 none",
		"write 7 0x30 00f8ffff", "write 7 0x30 00000000",
		"irq 0 flags 0x24 [0,+1) fds 1 bools ", "irq 3 flags 0x24 [0,+1) fds 1 bools ", "irq 0 disable",
		"write 7 0x4 0000", "reset", "irq 0 flags 0x24 [0,+1) fds 1 bools ",
		"unmap 0x0+0x20000000 flags 0", "map 0x0+0xc3000 @0x0 flags 3 fd", "unmap 0xfef00000+0xffffffff01100000 flags 0",
		"write 0 0x14 01004600",
	}
	if !mapped {
		want = append(want, "write 0 0x1000 01000000", "write 0 0x1004 01000000")
	}
	want = append(want, "irq 2 flags 0x24 [0,+1) fds 0 bools ")
	for n := 1; n <= 3; n++ {
		want = append(want, "irq 2 disable", fmt.Sprintf("irq 2 flags 0x24 [0,+%d) fds %d bools ", n, n))
	}
	if !slices.Equal(log, want) {
		t.Errorf("device got\n%s\nwant\n%s", strings.Join(log, "\n"), strings.Join(want, "\n"))
	}
}

// What SPDK's user-space driver sends: message ID 0 throughout, VERSION without data,
// each region in a request as long as its buffer, a descriptor with DMA_UNMAP too, no
// interrupts.
func TestSPDKStartUp(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 2)
	huge, page := files[0], files[1]
	dev := newFakeDevice()
	dev.mapDoorbells(page)
	fd, _ := startServer(t, dev)
	c := newRawClient(t, fd)
	ask := func(cmd Command, payload []byte, fds ...int) Message {
		c.id = 0
		return c.ask(cmd, payload, fds...)
	}

	if m := ask(CmdVersion, []byte{0, 0, 0, 0}); !bytes.Equal(m.Payload, []byte{0, 0, 0, 0}) {
		t.Fatalf("VERSION: %x", m.Payload)
	}
	info, ok := ParseDeviceInfo(ask(CmdDeviceGetInfo, (&DeviceInfo{}).Append(nil)).Payload)
	if !ok || info.NumRegions != NumRegions {
		t.Fatalf("GET_INFO: %+v", info)
	}
	for i := range info.NumRegions {
		req := RegionInfo{Index: i}
		buf := append(req.AppendRequest(nil, 4064), make([]byte, 4064-32)...)
		m := ask(CmdDeviceGetRegionInfo, buf)
		r, _, ok := ParseRegionInfo(m.Payload)
		if !ok || r.Index != i || len(m.Payload) > 4096 {
			t.Fatalf("region %d: %x", i, m.Payload)
		}
		if i == 0 {
			if len(r.Areas) != 1 || r.Areas[0] != (MmapArea{0x1000, 0x1000}) {
				t.Fatalf("region 0: %+v", r)
			}
			sameFiles(t, m.FDs, []int{page})
		} else if len(m.FDs) != 0 {
			t.Fatalf("region %d: %d descriptors", i, len(m.FDs))
		}
		closeAll(m.FDs)
	}
	for i := range uint64(3) {
		m := DMAMap{3, i * 2 << 20, 0x200000000000 + i*2<<20, 2 << 20}
		ask(CmdDMAMap, m.Append(nil), huge)
	}
	command := append(AppendRegionAccess(nil, 4, RegionConfig, 2), 6, 4)
	ask(CmdRegionWrite, command)
	ask(CmdRegionWrite, append(AppendRegionAccess(nil, 0x28, 0, 8), 1, 2, 3, 4, 5, 6, 7, 8))
	m := ask(CmdRegionRead, AppendRegionAccess(nil, 0x28, 0, 8))
	if !bytes.Equal(m.Payload[16:], []byte{1, 2, 3, 4, 5, 6, 7, 8}) {
		t.Fatalf("ASQ %x", m.Payload)
	}
	u := DMAUnmap{0, 0x200000000000, 2 << 20}
	ask(CmdDMAUnmap, u.Append(nil), huge)

	want := []string{
		"map 0x200000000000+0x200000 @0x0 flags 3 fd", "map 0x200000200000+0x200000 @0x200000 flags 3 fd", "map 0x200000400000+0x200000 @0x400000 flags 3 fd",
		"write 7 0x4 0604", "write 0 0x28 0102030405060708", "unmap 0x200000000000+0x200000 flags 0",
	}
	if log := dev.calls(); !slices.Equal(log, want) {
		t.Errorf("device got\n%s", strings.Join(log, "\n"))
	}
}

// What Cloud Hypervisor's client sends: it takes one descriptor a message, asks for every region, reads
// no more than a header of most replies, and passes the eventfds of all vectors in one message.
func TestCloudHypervisorStartUp(t *testing.T) {
	checkFDs(t)
	const vectors = 65
	files := memFDs(t, 2+vectors)
	mem, page, events := files[0], files[1], files[2:]
	dev := newFakeDevice()
	dev.mapDoorbells(page)
	dev.irqs[IRQMSIX] = IRQInfo{Flags: IRQEventFD | IRQNoResize, Count: vectors}
	fd, _ := startServer(t, dev)
	c := newRawClient(t, fd)

	v := append([]byte{0, 0, 0, 0}, `{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}`+"\x00"...)
	if answer := c.ask(CmdVersion, v).Payload; answer[len(answer)-1] != 0 {
		t.Fatalf("VERSION: %q: the last byte must be NUL", answer)
	}
	info := c.ask(CmdDeviceGetInfo, []byte{36, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	if len(info.Payload) != 20 || le.Uint32(info.Payload) != 20 || le.Uint32(info.Payload[8:]) != NumRegions || le.Uint32(info.Payload[16:]) != 0 {
		t.Fatalf("GET_INFO: %x: the client reads 20 bytes", info.Payload)
	}
	for i := range uint32(NumRegions) {
		m := c.regionInfo(i, 32)
		if need := le.Uint32(m.Payload); need > 32 {
			m = c.regionInfo(i, need)
			sameFiles(t, m.FDs, []int{page})
			closeAll(m.FDs)
		}
	}
	ram := DMAMap{3, 0, 0, 512 << 20}
	if m := c.ask(CmdDMAMap, ram.Append(nil), mem); len(m.Payload) != 0 {
		t.Fatalf("DMA_MAP reply %x: the client reads a header", m.Payload)
	}
	c.ask(CmdDeviceGetIRQInfo, (&IRQInfo{Index: IRQMSIX}).Append(nil))
	req := SetIRQs{Flags: 0x24, Index: IRQMSIX, Count: vectors}
	push(t, fd, message(c.id, CmdDeviceSetIRQs, 0, req.Append(nil)), events...)
	c.id++
	c.reply(CmdDeviceSetIRQs, 0)
	dev.mu.Lock()
	last := dev.vectors[[2]uint32{IRQMSIX, vectors - 1}]
	dev.mu.Unlock()
	sameFiles(t, []int{last}, events[vectors-1:])
	u := DMAUnmap{0, 0, 512 << 20}
	if m := c.ask(CmdDMAUnmap, u.Append(nil)); len(m.Payload) != DMAUnmapSize {
		t.Fatalf("DMA_UNMAP reply %x", m.Payload)
	}
}

// A client that sends rubbish loses its connection, and the server nothing else.
func TestServerGarbage(t *testing.T) {
	for name, b := range map[string][]byte{
		"text":           []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"zeroes":         make([]byte, 64),
		"ones":           bytes.Repeat([]byte{0xff}, 64),
		"not VERSION":    message(0, CmdDeviceReset, 0, nil),
		"reply":          message(0, CmdVersion, FlagReply, make([]byte, 4)),
		"bad capability": message(0, CmdVersion, 0, []byte("\x00\x00\x00\x00{\"capabilities\":7}")),
	} {
		t.Run(name, func(t *testing.T) {
			checkFDs(t)
			dev := newFakeDevice()
			fd, result := startServer(t, dev)
			defer closeFD(t, fd)
			push(t, fd, b, memFDs(t, 2)...)
			if err := <-result; !errors.Is(err, ErrProtocol) {
				t.Fatalf("%v: want ErrProtocol", err)
			}
			if log := dev.calls(); len(log) != 0 {
				t.Fatalf("device got %q", log)
			}
		})
	}
}

// A client that leaves in the middle of a message, with descriptors under way.
func TestServerClientDies(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 1)
	m := DMAMap{3, 0, 0, 4096}
	stream := append(message(0, CmdVersion, 0, make([]byte, 4)), message(1, CmdDMAMap, 0, m.Append(nil))...)
	for cut := range len(stream) {
		fd, result := startServer(t, newFakeDevice())
		version := min(cut, 20)
		push(t, fd, stream[:version])
		if cut > version {
			push(t, fd, stream[version:cut], files...)
		}
		closeFD(t, fd)
		if err := <-result; err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("cut %d: %v", cut, err)
		}
	}
}
