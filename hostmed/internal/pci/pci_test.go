package pci

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"testing/quick"
)

func newSpace(t testing.TB, p Params) *ConfigSpace {
	t.Helper()
	c, err := New(p)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func read(t testing.TB, c *ConfigSpace, off uint64, n int) uint32 {
	t.Helper()
	var b [4]byte
	if err := c.Read(off, b[:n]); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint32(b[:])
}

func write(t testing.TB, c *ConfigSpace, off uint64, n int, v uint32) Events {
	t.Helper()
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	ev, err := c.Write(off, b[:n])
	if err != nil {
		t.Fatal(err)
	}
	return ev
}

func TestHeader(t *testing.T) {
	c := newSpace(t, Params{Vectors: 65})
	for _, reg := range []struct {
		name string
		off  uint64
		n    int
		want uint32
	}{
		{"vendor, device", 0, 4, 0x001f1ae0},
		{"status", 6, 2, 0x0010},
		{"revision, class", 8, 4, 0x01080200},
		{"header type", 0xe, 1, 0},
		{"subsystem", 0x2c, 4, 0x001f1ae0},
		{"ROM", 0x30, 4, 0},
		{"capabilities", 0x34, 1, CapPM},
		{"interrupt pin", 0x3d, 1, 1},
		{"extended space", 0x100, 4, 0},
	} {
		if got := read(t, c, reg.off, reg.n); got != reg.want {
			t.Errorf("%s: %#x, want %#x", reg.name, got, reg.want)
		}
	}
	whole := make([]byte, 256)
	if err := c.Read(0, whole); err != nil || whole[0] != 0xe0 {
		t.Errorf("reading 256 bytes at once: %v, begins %#x", err, whole[0])
	}
}

func TestCapabilityChain(t *testing.T) {
	c := newSpace(t, Params{Vectors: 65})
	var ids []uint32
	for at := read(t, c, 0x34, 1); at != 0; at = read(t, c, uint64(at)+1, 1) {
		ids = append(ids, read(t, c, uint64(at), 1))
		if len(ids) > 8 {
			t.Fatal("capability chain does not end")
		}
	}
	if len(ids) != 3 || ids[0] != 1 || ids[1] != 0x11 || ids[2] != 0x10 {
		t.Errorf("capabilities %#x, want PM, MSI-X, PCIe", ids)
	}
	if v := read(t, c, CapMSIX+2, 2); v != 64 {
		t.Errorf("MSI-X control %#x, want 64: 65 vectors, zero-based", v)
	}
	if table, pba := read(t, c, CapMSIX+4, 4), read(t, c, CapMSIX+8, 4); table != BARTable || pba != BARPBA {
		t.Errorf("MSI-X table %#x, PBA %#x", table, pba)
	}
	if v := read(t, c, CapPCIe+2, 2); v != 2 {
		t.Errorf("PCIe capability %#x, want a version 2 endpoint", v)
	}
	if v := read(t, c, CapPCIe+4, 4); v&(1<<28) == 0 {
		t.Error("PCIe capability does not say FLR")
	}
}

func TestBARSizing(t *testing.T) {
	c := newSpace(t, Params{Vectors: 2048, BAR0Size: 64 << 10})
	for _, bar := range []struct {
		i     int
		sized uint32
	}{
		{0, 0xffff0004}, {1, 0xffffffff}, {2, 0}, {3, 0}, {4, 0xffff8000}, {5, 0xfffff000},
	} {
		off := uint64(0x10 + 4*bar.i)
		write(t, c, off, 4, ^uint32(0))
		if got := read(t, c, off, 4); got != bar.sized {
			t.Errorf("BAR%d sizes as %#x, want %#x", bar.i, got, bar.sized)
		}
	}
	if ev := write(t, c, 0x10, 4, 0xfebd0000); !ev.BAR {
		t.Error("writing a BAR address is no event")
	}
	if got := read(t, c, 0x10, 4); got != 0xfebd0004 {
		t.Errorf("BAR0 %#x", got)
	}
	if c.BARSize(BARRegisters) != 64<<10 || c.BARSize(BARTable) != 32<<10 || c.BARSize(BARPBA) != 4096 || c.BARSize(2) != 0 {
		t.Error("BARSize")
	}
}

func TestWriteMasks(t *testing.T) {
	c := newSpace(t, Params{})
	if ev := write(t, c, 0, 4, ^uint32(0)); ev != (Events{}) || read(t, c, 0, 4) != 0x001f1ae0 {
		t.Error("the vendor id was written")
	}
	ev := write(t, c, 4, 2, 0xffff)
	if !ev.Command || read(t, c, 4, 2) != cmdMask {
		t.Errorf("command %#x, events %+v", read(t, c, 4, 2), ev)
	}
	if !c.BusMaster() || !c.MemoryOn() || !c.INTxDisabled() {
		t.Error("command bits")
	}
	if write(t, c, 4, 2, 0xffff).Command {
		t.Error("writing the same command is a change")
	}
	ev = write(t, c, CapMSIX+3, 1, 0xc0)
	if !ev.MSIX || !c.MSIXEnabled() || !c.MSIXMasked() || read(t, c, CapMSIX+2, 2) != 0xc000 {
		t.Errorf("MSI-X control %#x, events %+v", read(t, c, CapMSIX+2, 2), ev)
	}
}

func TestFunctionLevelReset(t *testing.T) {
	c := newSpace(t, Params{})
	fresh := c.data
	write(t, c, 4, 2, cmdBusMaster|cmdMemory)
	write(t, c, CapMSIX+2, 2, msixEnable)
	ev := write(t, c, CapPCIe+8, 2, read(t, c, CapPCIe+8, 2)|devCtlFLR)
	if !ev.FLR || !ev.Command || !ev.MSIX {
		t.Errorf("events %+v", ev)
	}
	if c.data != fresh {
		t.Error("the space is not as it is after reset")
	}
	if ev := write(t, c, CapPCIe+9, 1, 0x80); !ev.FLR {
		t.Error("FLR by a one-byte write was not seen")
	}
}

func TestPowerState(t *testing.T) {
	c := newSpace(t, Params{})
	if ev := write(t, c, CapPM+4, 2, 3); !ev.Power || !c.D3hot() {
		t.Error("D3hot was not taken")
	}
	if ev := write(t, c, CapPM+4, 2, 1); ev.Power || !c.D3hot() {
		t.Error("D1 is not supported, and was taken")
	}
	if ev := write(t, c, CapPM+4, 2, 0); !ev.Power || c.D3hot() {
		t.Error("D0 was not taken")
	}
}

func TestAccessOutside(t *testing.T) {
	c := newSpace(t, Params{})
	m := NewMSIX(c)
	p := make([]byte, 8)
	for _, off := range []uint64{4089, 4096, 4097, 1 << 40, ^uint64(0), ^uint64(0) - 7} {
		_, werr := c.Write(off, p)
		for name, err := range map[string]error{"read": c.Read(off, p), "write": werr,
			"table read": m.ReadTable(off, p), "table write": m.WriteTable(off, p), "PBA read": m.ReadPBA(off, p)} {
			if !errors.Is(err, ErrAccess) {
				t.Errorf("%s at %#x: %v", name, off, err)
			}
		}
	}
	if err := c.Read(4096, nil); err != nil {
		t.Errorf("reading nothing: %v", err)
	}
}

func TestBadParams(t *testing.T) {
	for _, p := range []Params{{BAR0Size: 5000}, {BAR0Size: 1024}, {BAR0Size: 1 << 33}, {Vectors: 2049}, {LinkSpeed: 9}, {LinkWidthLog: 6}} {
		if _, err := New(p); err == nil {
			t.Errorf("%+v was accepted", p)
		}
	}
}

func TestMSIXTable(t *testing.T) {
	c := newSpace(t, Params{Vectors: 65})
	m := NewMSIX(c)
	entry := []byte{0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0x21, 0x40, 0, 0, 0xff, 0xff, 0xff, 0xff}
	got := make([]byte, 16)
	if err := m.WriteTable(64*16, entry); err != nil {
		t.Fatal(err)
	}
	if err := m.ReadTable(64*16, got); err != nil {
		t.Fatal(err)
	}
	if want := append(bytes.Clone(entry[:12]), 1, 0, 0, 0); !bytes.Equal(got, want) {
		t.Errorf("entry %x, want %x", got, want)
	}
	if err := m.WriteTable(65*16, entry); err != nil {
		t.Fatal(err)
	}
	if m.ReadTable(65*16, got); !bytes.Equal(got, make([]byte, 16)) {
		t.Error("an entry behind the last was kept")
	}
	var pba [16]byte
	if err := m.ReadPBA(0, pba[:]); err != nil || pba != [16]byte{} {
		t.Errorf("pending %x, %v", pba, err)
	}
	pending := map[int]bool{3: true, 64: true, 65: true, 2000: true}
	m.Pending = func(v int) bool { return pending[v] }
	if err := m.ReadPBA(0, pba[:]); err != nil || pba != [16]byte{0: 8, 8: 1} {
		t.Errorf("pending %x, %v", pba, err)
	}
	delete(pending, 64)
	if m.ReadPBA(8, pba[:1]); pba[0] != 0 {
		t.Error("pending bit was not cleared")
	}
}

func TestMSIXMaskBitsAreTold(t *testing.T) {
	m := NewMSIX(newSpace(t, Params{Vectors: 3}))
	var told []int
	m.Mask = func(v int, on bool) {
		if !on {
			v = -v
		}
		told = append(told, v)
	}
	for _, w := range []struct {
		off uint64
		p   []byte
	}{{16, make([]byte, 12)}, {28, []byte{0, 0, 0, 0}}, {44, []byte{0xff}}, {3*16 + 12, []byte{1}}, {45, []byte{1, 1, 1}}} {
		if err := m.WriteTable(w.off, w.p); err != nil {
			t.Fatal(err)
		}
	}
	if len(told) != 2 || told[0] != -1 || told[1] != 2 {
		t.Errorf("told %v, want vector 1 unmasked, 2 masked", told)
	}
	m.Reset()
	if len(told) != 2 {
		t.Error("a reset is the caller's to carry out")
	}
}

func TestBAR0Size(t *testing.T) {
	for _, c := range []struct {
		n     uint16
		dstrd uint8
		want  uint64
	}{{1, 0, 16 << 10}, {64, 0, 16 << 10}, {64, 4, 16 << 10}, {255, 4, 64 << 10}, {64, 10, 1 << 20}, {64, 15, 32 << 20}, {65535, 15, 32 << 30}} {
		got := BAR0Size(c.n, c.dstrd)
		if end := 0x1000 + 2*(uint64(c.n)+1)*(4<<c.dstrd); got != c.want || got < end {
			t.Errorf("%d queues, DSTRD %d: %#x, want %#x; the doorbells end at %#x", c.n, c.dstrd, got, c.want, end)
		}
	}
}

func TestInterruptStatus(t *testing.T) {
	c := newSpace(t, Params{})
	for _, on := range []bool{true, true, false} {
		c.SetInterruptStatus(on)
		write(t, c, 4, 4, 0xffff0000) // read-only
		if got := read(t, c, 6, 2)&8 != 0; got != on {
			t.Errorf("status says %v, want %v", got, on)
		}
	}
	c.SetInterruptStatus(true)
	c.Reset()
	if read(t, c, 6, 2) != 0x10 {
		t.Error("the bit survives a reset")
	}
	for off, want := range map[uint64]bool{0: false, 2: false, 3: true, 4: true, 5: true, 6: true, 7: false} {
		if HasStatus(off, 4) != want {
			t.Errorf("4 bytes from %d: %v", off, !want)
		}
	}
}

// Any sequence of accesses leaves the read-only bits alone.
func TestReadOnlyBitsStay(t *testing.T) {
	c := newSpace(t, Params{Vectors: 9})
	fresh := c.data
	err := quick.Check(func(off uint16, p []byte) bool {
		if _, err := c.Write(uint64(off%300), p); err != nil && !errors.Is(err, ErrAccess) {
			return false
		}
		for i := range c.data {
			if (c.data[i]^fresh[i])&^c.mask[i] != 0 {
				t.Logf("byte %#x", i)
				return false
			}
		}
		return c.get16(regDevCtl)&devCtlFLR == 0
	}, &quick.Config{MaxCount: 2000})
	if err != nil {
		t.Error(err)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add(uint64(CapPCIe+8), []byte{0, 0x80})
	f.Add(uint64(0x10), []byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, off uint64, p []byte) {
		c := newSpace(t, Params{Vectors: 3})
		m := NewMSIX(c)
		for range 2 {
			_, _ = c.Write(off, p)
			_ = c.Read(off, p)
			_ = m.WriteTable(off, p)
			_ = m.ReadTable(off, p)
			_ = m.ReadPBA(off, p)
			off %= ConfigSize
		}
	})
}
