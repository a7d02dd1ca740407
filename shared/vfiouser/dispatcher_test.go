package vfiouser

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// handle runs one command and returns its reply.
func handle(t testing.TB, d *Dispatcher, cmd Command, flags uint32, payload []byte, fds ...int) (Reply, bool) {
	t.Helper()
	m := Message{Header: Header{ID: 77, Cmd: cmd, Size: uint32(HeaderSize + len(payload)), Flags: flags}, Payload: payload, FDs: fds}
	r, send, err := d.Handle(m)
	if err != nil {
		t.Fatalf("%s: %v", cmd, err)
	}
	if send && (r.ID != 77 || r.Cmd != cmd || !r.IsReply()) {
		t.Fatalf("%s: reply header %v", cmd, r.Header)
	}
	if send && r.Flags&FlagError != 0 && (r.Errno == 0 || len(r.Payload) != 0 || len(r.FDs) != 0) {
		t.Fatalf("%s: error reply %v with %d bytes", cmd, r.Header, len(r.Payload))
	}
	return r, send
}

func negotiated(t testing.TB, dev Device, caps Capabilities) *Dispatcher {
	t.Helper()
	d := NewDispatcher(dev, caps)
	v := Version{HasData: true, Caps: DefaultCapabilities()}
	if r, send := handle(t, d, CmdVersion, 0, v.Append(nil)); !send || r.Flags != FlagReply {
		t.Fatal("VERSION", r, send)
	}
	return d
}

// dup returns copies of fds, for someone to own.
func dup(t testing.TB, fds ...int) []int {
	t.Helper()
	out := make([]int, len(fds))
	for i, fd := range fds {
		var err error
		if out[i], err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestDispatcherVersionFirst(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 1)
	version := func(major, minor uint16) []byte {
		return le.AppendUint16(le.AppendUint16(nil, major), minor)
	}
	for name, m := range map[string]Message{
		"other command":   {Header: Header{Cmd: CmdDMAMap}, Payload: (&DMAMap{Flags: 3, Size: 4096}).Append(nil)},
		"a reply":         {Header: Header{Cmd: CmdVersion, Flags: FlagReply}, Payload: version(0, 0)},
		"unknown type":    {Header: Header{Cmd: CmdVersion, Flags: 7}, Payload: version(0, 0)},
		"no reply wanted": {Header: Header{Cmd: CmdVersion, Flags: FlagNoReply}, Payload: version(0, 0)},
		"major 1":         {Header: Header{Cmd: CmdVersion}, Payload: version(1, 0)},
		"empty":           {Header: Header{Cmd: CmdVersion}},
		"bad data":        {Header: Header{Cmd: CmdVersion}, Payload: append(version(0, 0), "garbage"...)},
	} {
		dev := newFakeDevice()
		d := NewDispatcher(dev, Capabilities{})
		m.FDs = dup(t, files...)
		if _, send, err := d.Handle(m); send || !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: send %v, error %v", name, send, err)
		}
		if d.Negotiated() || len(dev.calls()) != 0 {
			t.Errorf("%s: went on", name)
		}
	}

	d := NewDispatcher(newFakeDevice(), Capabilities{})
	r, send := handle(t, d, CmdVersion, 0, version(0, 5))
	if !send || !bytes.Equal(r.Payload, version(0, 0)) || !d.Negotiated() {
		t.Fatalf("minor 5, no data: %v %x", send, r.Payload)
	}
	if r, _ := handle(t, d, CmdVersion, 0, version(0, 0)); r.Errno != uint32(unix.EINVAL) {
		t.Fatalf("second VERSION: %v", r.Header)
	}
	if _, _, err := d.Handle(Message{Header: Header{Cmd: CmdDMARead, Flags: FlagReply}}); !errors.Is(err, ErrProtocol) {
		t.Fatalf("a reply to nothing: %v", err)
	}
}

func TestDispatcherCapabilities(t *testing.T) {
	d := NewDispatcher(newFakeDevice(), Capabilities{MaxMsgFDs: 99, MaxDataXfer: 4096, MaxDMAMaps: 100})
	r, _ := handle(t, d, CmdVersion, 0, append([]byte{0, 0, 0, 0}, qemuVersionData...))
	v, err := ParseVersion(r.Payload)
	if err != nil || v.Major != 0 || v.Minor != 0 || v.Caps != (Capabilities{MaxFDs, 4096, 100, 4096}) {
		t.Fatalf("%+v %v", v, err)
	}
	for _, word := range []string{"twin", "write_multiple", "migration"} {
		if bytes.Contains(r.Payload, []byte(word)) {
			t.Errorf("reply offers %s: %s", word, r.Payload[4:])
		}
	}
	if r.Payload[len(r.Payload)-1] != 0 {
		t.Error("reply's data does not end with NUL")
	}
	if p := d.PeerCapabilities(); p.MaxMsgFDs != 16 {
		t.Errorf("peer %+v", p)
	}
	if r, _ := handle(t, d, CmdRegionRead, 0, AppendRegionAccess(nil, 0, 0, 4097)); r.Errno != uint32(unix.EINVAL) {
		t.Errorf("read above our own limit: %v", r.Header)
	}
	if r, _ := handle(t, d, CmdRegionRead, 0, AppendRegionAccess(nil, 0, 0, 4096)); r.Flags&FlagError != 0 || len(r.Payload) != 4096+16 {
		t.Errorf("read at our own limit: %v", r.Header)
	}
}

func TestDispatcherRegionInfo(t *testing.T) {
	dev := newFakeDevice()
	file := memFDs(t, 1)[0]
	dev.mapDoorbells(file)
	d := negotiated(t, dev, Capabilities{})
	ask := func(i, argsz uint32) Reply {
		req := RegionInfo{Index: i}
		r, _ := handle(t, d, CmdDeviceGetRegionInfo, 0, req.AppendRequest(nil, argsz))
		return r
	}

	r := ask(0, 32) // first, with little room: what is needed, no CAPS flag, no descriptor
	if len(r.Payload) != 32 || le.Uint32(r.Payload) != 64 || le.Uint32(r.Payload[4:]) != 7 || le.Uint32(r.Payload[12:]) != 0 || len(r.FDs) != 0 {
		t.Fatalf("argsz 32: %x, %d descriptors", r.Payload, len(r.FDs))
	}
	r = ask(0, 64)
	if len(r.Payload) != 64 || le.Uint32(r.Payload) != 64 || le.Uint32(r.Payload[4:]) != 0xf || le.Uint32(r.Payload[12:]) != 32 || !slices.Equal(r.FDs, []int{file}) {
		t.Fatalf("argsz 64: %x, descriptors %v", r.Payload, r.FDs)
	}
	// cap {id 1, version 1, next 0}, nr_areas 1, reserved, offset 0x1000, size 0x1000
	cap := []byte{1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0}
	if !bytes.Equal(r.Payload[32:], cap) {
		t.Fatalf("capability %x", r.Payload[32:])
	}
	for i := range NumRegions { // SPDK gives up at the first error
		if r := ask(i, 4064); r.Flags&FlagError != 0 || le.Uint32(r.Payload[8:]) != i {
			t.Errorf("region %d: %v", i, r.Header)
		}
	}
	if r := ask(NumRegions, 32); r.Errno != uint32(unix.EINVAL) {
		t.Errorf("region %d: %v", NumRegions, r.Header)
	}
	if r := ask(0, 31); r.Errno != uint32(unix.EINVAL) {
		t.Errorf("argsz 31: %v", r.Header)
	}

	// A client that takes no descriptors must not be told to map.
	d = NewDispatcher(dev, Capabilities{})
	handle(t, d, CmdVersion, 0, append([]byte{0, 0, 0, 0}, `{"capabilities":{"max_msg_fds":0}}`...))
	if r = ask(0, 64); le.Uint32(r.Payload) != 32 || le.Uint32(r.Payload[4:]) != 3 || len(r.FDs) != 0 {
		t.Errorf("no descriptors: %x", r.Payload)
	}
	// Mappable as a whole: no capability, the descriptor at once.
	dev.regions[0] = RegionInfo{Flags: 7, Size: 0x4000, FD: file}
	d = negotiated(t, dev, Capabilities{})
	if r = ask(0, 32); le.Uint32(r.Payload[4:]) != 7 || !slices.Equal(r.FDs, []int{file}) {
		t.Errorf("whole region: %x %v", r.Payload, r.FDs)
	}
}

func TestDispatcherSetIRQs(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 3)
	dev := newFakeDevice()
	defer dev.close()
	d := negotiated(t, dev, Capabilities{})
	const (
		trigger = IRQSetDataEventFD | IRQSetTrigger
		none    = IRQSetDataNone | IRQSetTrigger
	)
	for name, c := range map[string]struct {
		req  SetIRQs
		fds  int
		want string // the device's log; "": refused
	}{
		"disable all":            {SetIRQs{Flags: none, Index: IRQMSIX}, 0, "irq 2 disable"},
		"disable, absent type":   {SetIRQs{Flags: none, Index: IRQReq}, 0, "irq 4 disable"},
		"disable with fds":       {SetIRQs{Flags: none, Index: IRQMSIX}, 2, "irq 2 disable"},
		"set":                    {SetIRQs{Flags: trigger, Index: IRQMSIX, Start: 1, Count: 3}, 3, "irq 2 flags 0x24 [1,+3) fds 3 bools "},
		"set the last":           {SetIRQs{Flags: trigger, Index: IRQMSIX, Start: 32, Count: 1}, 1, "irq 2 flags 0x24 [32,+1) fds 1 bools "},
		"de-assign":              {SetIRQs{Flags: trigger, Index: IRQMSIX, Count: 33}, 0, "irq 2 flags 0x24 [0,+33) fds 0 bools "},
		"trigger one":            {SetIRQs{Flags: none, Index: IRQErr, Count: 1}, 0, "irq 3 flags 0x21 [0,+1) fds 0 bools "},
		"booleans":               {SetIRQs{Flags: IRQSetDataBool | IRQSetMask, Index: IRQMSIX, Count: 2, Bools: []byte{1, 0}}, 0, "irq 2 flags 0xa [0,+2) fds 0 bools 0100"},
		"unmask by eventfd":      {SetIRQs{Flags: IRQSetDataEventFD | IRQSetUnmask, Count: 1}, 1, "irq 0 flags 0x14 [0,+1) fds 1 bools "},
		"too few fds":            {SetIRQs{Flags: trigger, Index: IRQMSIX, Count: 3}, 2, ""},
		"too many fds":           {SetIRQs{Flags: trigger, Index: IRQMSIX, Count: 1}, 2, ""},
		"eventfds, count 0":      {SetIRQs{Flags: trigger, Index: IRQMSIX}, 0, ""},
		"beyond the end":         {SetIRQs{Flags: trigger, Index: IRQMSIX, Start: 33, Count: 1}, 1, ""},
		"overflow":               {SetIRQs{Flags: trigger, Index: IRQMSIX, Start: math.MaxUint32, Count: 2}, 2, ""},
		"count without end":      {SetIRQs{Flags: none, Index: IRQMSIX, Count: math.MaxUint32}, 0, ""},
		"disable from 1":         {SetIRQs{Flags: none, Index: IRQMSIX, Start: 1}, 0, ""},
		"mask nothing":           {SetIRQs{Flags: IRQSetDataNone | IRQSetMask, Index: IRQMSIX}, 0, ""},
		"absent type":            {SetIRQs{Flags: trigger, Index: IRQMSI, Count: 1}, 1, ""},
		"no such type":           {SetIRQs{Flags: none, Index: NumIRQs}, 0, ""},
		"no data flag":           {SetIRQs{Flags: IRQSetTrigger, Index: IRQMSIX, Count: 1}, 0, ""},
		"no action flag":         {SetIRQs{Flags: IRQSetDataNone, Index: IRQMSIX, Count: 1}, 0, ""},
		"two data flags":         {SetIRQs{Flags: none | IRQSetDataEventFD, Index: IRQMSIX, Count: 1}, 0, ""},
		"two action flags":       {SetIRQs{Flags: none | IRQSetMask, Index: IRQMSIX, Count: 1}, 0, ""},
		"flag nobody knows":      {SetIRQs{Flags: none | 0x40, Index: IRQMSIX, Count: 1}, 0, ""},
		"more bools than vector": {SetIRQs{Flags: IRQSetDataBool | IRQSetTrigger, Index: IRQErr, Count: 2, Bools: []byte{1, 1}}, 0, ""},
	} {
		r, send := handle(t, d, CmdDeviceSetIRQs, 0, c.req.Append(nil), dup(t, files[:c.fds]...)...)
		log := dev.calls()
		if c.want == "" {
			if !send || r.Errno != uint32(unix.EINVAL) || len(log) != 0 {
				t.Errorf("%s: %v, device got %q", name, r.Header, log)
			}
		} else if !send || r.Flags != FlagReply || len(r.Payload) != 0 || !slices.Equal(log, []string{c.want}) {
			t.Errorf("%s: %v, device got %q", name, r.Header, log)
		}
	}
}

func TestDispatcherDMA(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 2)
	dev := newFakeDevice()
	defer dev.close()
	d := negotiated(t, dev, Capabilities{})
	dmaMap := func(m DMAMap) []byte { return m.Append(nil) }
	unmap := func(m DMAUnmap) []byte { return m.Append(nil) }
	for name, c := range map[string]struct {
		cmd   Command
		req   []byte
		fds   int
		want  string
		errno unix.Errno
	}{
		"map":               {CmdDMAMap, dmaMap(DMAMap{3, 0x1000, 0, 512 << 20}), 1, "map 0x0+0x20000000 @0x1000 flags 3 fd", 0},
		"map without fd":    {CmdDMAMap, dmaMap(DMAMap{1, 0, 0xfffc0000, 256 << 10}), 0, "map 0xfffc0000+0x40000 @0x0 flags 1 none", 0},
		"map to 2^64":       {CmdDMAMap, dmaMap(DMAMap{3, 0, 1<<64 - 4096, 4096}), 1, "map 0xfffffffffffff000+0x1000 @0x0 flags 3 fd", 0},
		"map beyond 2^64":   {CmdDMAMap, dmaMap(DMAMap{3, 0, 1<<64 - 4096, 4097}), 1, "", unix.EINVAL},
		"map nothing":       {CmdDMAMap, dmaMap(DMAMap{3, 0, 0, 0}), 1, "", unix.EINVAL},
		"map two fds":       {CmdDMAMap, dmaMap(DMAMap{3, 0, 0, 4096}), 2, "", unix.EINVAL},
		"map flags":         {CmdDMAMap, dmaMap(DMAMap{0x13, 0, 0, 4096}), 1, "", unix.EINVAL},
		"map no access":     {CmdDMAMap, dmaMap(DMAMap{0, 0, 0, 4096}), 1, "", unix.EINVAL},
		"map wild offset":   {CmdDMAMap, dmaMap(DMAMap{3, 1 << 63, 0, 4096}), 1, "", unix.EINVAL},
		"map offset + size": {CmdDMAMap, dmaMap(DMAMap{3, 1<<63 - 4096, 0, 4096}), 1, "", unix.EINVAL},
		"map short":         {CmdDMAMap, dmaMap(DMAMap{3, 0, 0, 4096})[:31], 1, "", unix.EINVAL},
		"unmap":             {CmdDMAUnmap, unmap(DMAUnmap{0, 0, 0xc0000}), 0, "unmap 0x0+0xc0000 flags 0", 0},
		"unmap with fd":     {CmdDMAUnmap, unmap(DMAUnmap{0, 0, 0xc0000}), 1, "unmap 0x0+0xc0000 flags 0", 0}, // SPDK
		"unmap to 2^64":     {CmdDMAUnmap, unmap(DMAUnmap{0, 0xfef00000, 0xffffffff01100000}), 0, "unmap 0xfef00000+0xffffffff01100000 flags 0", 0},
		"unmap half":        {CmdDMAUnmap, unmap(DMAUnmap{0, 0x800000000000, 0x800000000000}), 0, "unmap 0x800000000000+0x800000000000 flags 0", 0},
		"unmap beyond 2^64": {CmdDMAUnmap, unmap(DMAUnmap{0, 0xfef00000, 0xffffffff01100001}), 0, "", unix.EINVAL},
		"unmap nothing":     {CmdDMAUnmap, unmap(DMAUnmap{0, 4096, 0}), 0, "", unix.EINVAL},
		"unmap all":         {CmdDMAUnmap, unmap(DMAUnmap{UnmapAll, 5, 5}), 0, "unmap 0x0+0x0 flags 2", 0},
		"unmap dirty":       {CmdDMAUnmap, unmap(DMAUnmap{UnmapDirtyBitmap, 0, 4096}), 0, "", unix.ENOTSUP},
		"unmap flags":       {CmdDMAUnmap, unmap(DMAUnmap{4, 0, 4096}), 0, "", unix.EINVAL},
		"unmap short":       {CmdDMAUnmap, make([]byte, 23), 0, "", unix.EINVAL},
	} {
		r, _ := handle(t, d, c.cmd, 0, c.req, dup(t, files[:c.fds]...)...)
		log := dev.calls()
		if unix.Errno(r.Errno) != c.errno || (c.want == "") != (len(log) == 0) || (len(log) != 0 && log[0] != c.want) {
			t.Errorf("%s: %v, device got %q", name, r.Header, log)
		}
		if c.errno != 0 {
			continue
		}
		if want := map[Command][]byte{CmdDMAUnmap: c.req}[c.cmd]; !bytes.Equal(r.Payload, want) {
			t.Errorf("%s: reply %x, want %x", name, r.Payload, want)
		}
	}
}

func TestDispatcherRegionAccess(t *testing.T) {
	dev := newFakeDevice()
	dev.regions[4] = RegionInfo{Flags: RegionRead, Size: 0x1000, FD: -1}
	d := negotiated(t, dev, Capabilities{})
	access := func(off uint64, region, count uint32, data ...byte) []byte {
		return append(AppendRegionAccess(nil, off, region, count), data...)
	}
	for name, c := range map[string]struct {
		cmd   Command
		req   []byte
		errno unix.Errno
		call  string
	}{
		"write 4":           {CmdRegionWrite, access(0x14, 0, 4, 1, 2, 3, 4), 0, "write 0 0x14 01020304"},
		"write 8":           {CmdRegionWrite, access(0x28, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8), 0, "write 0 0x28 0102030405060708"},
		"write 2 to config": {CmdRegionWrite, access(4, 7, 2, 6, 0), 0, "write 7 0x4 0600"},
		"write at the end":  {CmdRegionWrite, access(0x3fff, 0, 1, 9), 0, "write 0 0x3fff 09"},
		"write past it":     {CmdRegionWrite, access(0x3fff, 0, 2, 9, 9), unix.EINVAL, ""},
		"write nothing":     {CmdRegionWrite, access(0, 0, 0), 0, ""},
		"write, no data":    {CmdRegionWrite, access(0, 0, 4), unix.EINVAL, ""},
		"write, more data":  {CmdRegionWrite, access(0, 0, 2, 1, 2, 3), unix.EINVAL, ""},
		"write, less data":  {CmdRegionWrite, access(0, 0, 4, 1, 2, 3), unix.EINVAL, ""},
		"write overflow":    {CmdRegionWrite, access(math.MaxUint64, 0, 1, 1), unix.EINVAL, ""},
		"write read-only":   {CmdRegionWrite, access(0, 4, 1, 1), unix.EACCES, ""},
		"write absent":      {CmdRegionWrite, access(0, 6, 1, 1), unix.EINVAL, ""},
		"no such region":    {CmdRegionWrite, access(0, 9, 1, 1), unix.EINVAL, ""},
		"write short":       {CmdRegionWrite, make([]byte, 15), unix.EINVAL, ""},
		"read 256":          {CmdRegionRead, access(0, 7, 256), 0, ""},
		"read past it":      {CmdRegionRead, access(0xf01, 7, 256), unix.EINVAL, ""},
		"read overflow":     {CmdRegionRead, access(math.MaxUint64-3, 7, 4), unix.EINVAL, ""},
		"read all there is": {CmdRegionRead, access(0, 0, math.MaxUint32), unix.EINVAL, ""},
		"read with data":    {CmdRegionRead, access(0, 0, 1, 1), unix.EINVAL, ""},
		"read nothing":      {CmdRegionRead, access(0, 0, 0), 0, ""},
		"read absent":       {CmdRegionRead, access(0, 1, 4), unix.EINVAL, ""},
	} {
		r, _ := handle(t, d, c.cmd, 0, c.req)
		log := dev.calls()
		if unix.Errno(r.Errno) != c.errno || (c.call == "") != (len(log) == 0) || (len(log) != 0 && log[0] != c.call) {
			t.Errorf("%s: %v, device got %q", name, r.Header, log)
		}
		if c.errno != 0 {
			continue
		}
		off, region, count, data, ok := ParseRegionAccess(r.Payload)
		if !ok || !bytes.Equal(AppendRegionAccess(nil, off, region, count), c.req[:16]) {
			t.Errorf("%s: reply %x", name, r.Payload)
		}
		if c.cmd == CmdRegionWrite && len(data) != 0 || c.cmd == CmdRegionRead && !bytes.Equal(data, dev.mem[region][off:off+uint64(count)]) {
			t.Errorf("%s: data %x", name, data)
		}
	}
}

func TestDispatcherPostedIsNeverAnswered(t *testing.T) {
	dev := newFakeDevice()
	d := negotiated(t, dev, Capabilities{})
	var failed []Command
	d.OnError = func(h Header, err error) { failed = append(failed, h.Cmd) }
	for _, c := range []struct {
		cmd     Command
		payload []byte
	}{
		{CmdRegionWrite, append(AppendRegionAccess(nil, 0x1000, 0, 4), 1, 0, 0, 0)},
		{CmdRegionWrite, append(AppendRegionAccess(nil, 0x1000, 99, 4), 1, 0, 0, 0)},
		{CmdRegionWrite, nil},
		{CmdRegionRead, AppendRegionAccess(nil, 0, 0, 4)},
		{Command(200), nil},
	} {
		if r, send := handle(t, d, c.cmd, FlagNoReply, c.payload); send {
			t.Errorf("%s: answered with %v", c.cmd, r.Header)
		}
	}
	if log := dev.calls(); !slices.Equal(log, []string{"write 0 0x1000 01000000"}) {
		t.Errorf("device got %q", log)
	}
	if !slices.Equal(failed, []Command{CmdRegionWrite, CmdRegionWrite, 200}) {
		t.Errorf("errors told: %v", failed)
	}
}

func TestDispatcherOtherCommands(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 2)
	dev := newFakeDevice()
	d := negotiated(t, dev, Capabilities{})
	for _, cmd := range []Command{0, CmdDeviceGetRegionIOFDs, CmdDMARead, CmdDMAWrite, CmdDirtyPages, CmdRegionWriteMulti, CmdDeviceFeature, CmdMigDataRead, CmdMigDataWrite, 19, 0xffff} {
		if r, send := handle(t, d, cmd, 0, make([]byte, 64), dup(t, files...)...); !send || r.Errno != uint32(unix.ENOTSUP) {
			t.Errorf("%s: %v", cmd, r.Header)
		}
	}
	if r, _ := handle(t, d, CmdDeviceReset, 0, nil); r.Flags != FlagReply || !slices.Equal(dev.calls(), []string{"reset"}) {
		t.Errorf("reset: %v", r.Header)
	}
	dev.info.Flags = DevicePCI
	if r, _ := handle(t, d, CmdDeviceReset, 0, nil); r.Errno != uint32(unix.ENOTSUP) || len(dev.calls()) != 0 {
		t.Errorf("reset of a device without: %v", r.Header)
	}
	q := IRQInfo{Index: IRQMSIX}
	if r, _ := handle(t, d, CmdDeviceGetIRQInfo, 0, q.Append(nil)); le.Uint32(r.Payload[12:]) != 33 || le.Uint32(r.Payload[4:]) != IRQEventFD|IRQNoResize {
		t.Errorf("IRQ info: %x", r.Payload)
	}
	q.Index = IRQMSI
	if r, _ := handle(t, d, CmdDeviceGetIRQInfo, 0, q.Append(nil)); r.Flags&FlagError != 0 || le.Uint32(r.Payload[12:]) != 0 {
		t.Errorf("absent IRQ: %v %x", r.Header, r.Payload)
	}
	q.Index = NumIRQs
	if r, _ := handle(t, d, CmdDeviceGetIRQInfo, 0, q.Append(nil)); r.Errno != uint32(unix.EINVAL) {
		t.Errorf("no such IRQ: %v", r.Header)
	}
	if r, _ := handle(t, d, CmdDeviceGetInfo, 0, make([]byte, 15)); r.Errno != uint32(unix.EINVAL) {
		t.Errorf("short info: %v", r.Header)
	}
}

func TestDispatcherDeviceErrors(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 1)
	dev := newFakeDevice()
	defer dev.close()
	d := negotiated(t, dev, Capabilities{})
	run := func(cmd Command, payload []byte, fds ...int) unix.Errno {
		r, _ := handle(t, d, cmd, 0, payload, fds...)
		return unix.Errno(r.Errno)
	}
	m := DMAMap{3, 0, 0, 4096}
	s := SetIRQs{Flags: IRQSetDataEventFD | IRQSetTrigger, Index: IRQMSIX, Count: 1}
	for _, c := range []struct {
		err            error
		mapped, access unix.Errno
	}{
		{errFDs, unix.EINVAL, unix.EINVAL},
		{errors.Join(errors.New("overlap"), unix.EEXIST), unix.EEXIST, unix.EEXIST},
		{errors.New("no errno"), unix.EINVAL, unix.EIO},
		{unix.Errno(0), unix.EINVAL, unix.EIO},
	} {
		dev.setFail(c.err)
		if e := run(CmdDMAMap, m.Append(nil), dup(t, files...)...); e != c.mapped {
			t.Errorf("DMA_MAP %v: %v", c.err, e)
		}
		if e := run(CmdDeviceSetIRQs, s.Append(nil), dup(t, files...)...); e != c.mapped {
			t.Errorf("SET_IRQS %v: %v", c.err, e)
		}
		if e := run(CmdRegionRead, AppendRegionAccess(nil, 0, 0, 4)); e != c.access {
			t.Errorf("REGION_READ %v: %v", c.err, e)
		}
		if e := run(CmdDeviceReset, nil); e != c.access {
			t.Errorf("DEVICE_RESET %v: %v", c.err, e)
		}
	}
}
