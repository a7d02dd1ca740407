package vfiouser

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestDoorbellPathAllocatesNothing(t *testing.T) {
	a, b := socketPair(t)
	defer closeFD(t, a)
	defer closeFD(t, b)
	r := NewReceiver(b, 0)
	defer r.Close()
	payload := append(AppendRegionAccess(nil, 0x1008, 0, 4), 1, 2, 3, 4)
	h := Header{Cmd: CmdRegionWrite, Flags: FlagNoReply}
	allocs := testing.AllocsPerRun(200, func() {
		for range 3 {
			if err := SendMessage(a, h, payload, nil); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := r.Fill(); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			m, ok, err := r.Next()
			if !ok || err != nil {
				t.Fatal(ok, err)
			}
			off, region, count, data, ok := ParseRegionAccess(m.Payload)
			if !ok || off != 0x1008 || region != 0 || count != 4 || len(data) != 4 {
				t.Fatal(off, region, count, data, ok)
			}
		}
		if _, err := r.Fill(); err != unix.EAGAIN {
			t.Fatal(err)
		}
	})
	if allocs != 0 {
		t.Fatalf("%v allocations", allocs)
	}
}

func BenchmarkDoorbellMessages(b *testing.B) {
	s, c := socketPair(b)
	defer closeFD(b, s)
	defer closeFD(b, c)
	r := NewReceiver(s, 0)
	defer r.Close()
	payload := append(AppendRegionAccess(nil, 0x1008, 0, 4), 1, 2, 3, 4)
	h := Header{Cmd: CmdRegionWrite, Flags: FlagNoReply}
	b.ReportAllocs()
	for b.Loop() {
		if err := SendMessage(c, h, payload, nil); err != nil {
			b.Fatal(err)
		}
		if _, err := r.Fill(); err != nil {
			b.Fatal(err)
		}
		if _, ok, _ := r.Next(); !ok {
			b.Fatal("no message")
		}
	}
}

func TestDispatcherRegisterAccessAllocatesNothing(t *testing.T) {
	dev := &quietDevice{newFakeDevice()}
	d := negotiated(t, dev, Capabilities{})
	read := AppendRegionAccess(nil, 0x1c, 0, 4)
	write := append(AppendRegionAccess(nil, 0x14, 0, 4), 1, 2, 3, 4)
	allocs := testing.AllocsPerRun(100, func() {
		if r, _ := handle(t, d, CmdRegionRead, 0, read); r.Flags != FlagReply {
			t.Fatal(r.Header)
		}
		if r, _ := handle(t, d, CmdRegionWrite, 0, write); r.Flags != FlagReply {
			t.Fatal(r.Header)
		}
	})
	if allocs != 0 {
		t.Fatalf("%v allocations", allocs)
	}
}

// quietDevice writes nothing down.
type quietDevice struct{ *fakeDevice }

func (d *quietDevice) RegionWrite(uint32, uint64, []byte) error { return nil }

func TestClientAllocatesNothing(t *testing.T) {
	c := connect(t, &quietDevice{newFakeDevice()}, ClientConfig{})
	for name, call := range map[string]func(p []byte) error{
		"posted": func(p []byte) error { return c.RegionWritePosted(bg, 0, 0x1000, p) },
		"write":  func(p []byte) error { return c.RegionWrite(bg, 0, 0x1000, p) },
		"read":   func(p []byte) error { return c.RegionRead(bg, 0, 0x1c, p) },
	} {
		p := make([]byte, 4)
		allocs := testing.AllocsPerRun(200, func() { // counts the server's too
			if err := call(p); err != nil {
				t.Fatal(err)
			}
		})
		if allocs != 0 {
			t.Errorf("%s: %v allocations", name, allocs)
		}
	}
}

func BenchmarkClient(b *testing.B) {
	c := connect(b, &quietDevice{newFakeDevice()}, ClientConfig{})
	p := make([]byte, 4)
	b.Run("posted", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := c.RegionWritePosted(bg, 0, 0x1000, p); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := c.RegionRead(bg, 0, 0x1c, p); err != nil {
				b.Fatal(err)
			}
		}
	})
}
