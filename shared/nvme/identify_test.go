package nvme

import (
	"testing"

	"pgregory.net/rapid"
)

func TestIdentifyStrings(t *testing.T) {
	var c IdentifyController
	SetASCII(c.SN[:], "SB0001")
	SetASCII(c.MN[:], "a model name that is longer than the forty bytes that there are for it")
	SetASCII(c.FR[:], "")
	copy(c.SUBNQN[:], "nqn.2014-08.org.nvmexpress:uuid:0")
	for _, tt := range []struct{ got, want string }{
		{string(c.SN[:]), "SB0001              "},
		{c.Serial(), "SB0001"},
		{c.Model(), "a model name that is longer than the for"},
		{c.Firmware(), ""},
		{c.Subsystem(), "nqn.2014-08.org.nvmexpress:uuid:0"},
		{ASCII([]byte("a\x1b[31m\xff\x00b")), "a?[31m?"},
	} {
		if tt.got != tt.want {
			t.Errorf("%q, want %q", tt.got, tt.want)
		}
	}
}

func TestMaxTransfer(t *testing.T) {
	for _, tt := range []struct {
		mdts, mpsmin uint8
		want         uint64
	}{{0, 0, 0}, {8, 0, 1 << 20}, {5, 1, 1 << 18}, {50, 0, 1 << 62}, {51, 0, 0}, {255, 15, 0}} {
		c := IdentifyController{MDTS: tt.mdts}
		if got := c.MaxTransfer(tt.mpsmin); got != tt.want {
			t.Errorf("MDTS=%d MPSMIN=%d: %d, want %d", tt.mdts, tt.mpsmin, got, tt.want)
		}
	}
}

func TestBlockSize(t *testing.T) {
	var n IdentifyNamespace
	n.NLBAF = 1
	n.LBAF[0].LBADS, n.LBAF[1].LBADS, n.LBAF[0x21].LBADS = 9, 12, 40
	for _, tt := range []struct {
		flbas, nlbafZ uint8
		size          uint32
		ok            bool
	}{{0, 1, 512, true}, {1, 1, 4096, true}, {0x11, 1, 4096, true}, {0x41, 1, 4096, true}, {0x41, 63, 0, false}, {2, 1, 0, false}} {
		n.FLBAS, n.NLBAF = tt.flbas, ZeroBased8(tt.nlbafZ)
		if size, ok := n.BlockSize(); size != tt.size || ok != tt.ok {
			t.Errorf("FLBAS %#x of %d formats: %d, %v; want %d, %v", tt.flbas, n.NLBAF.Count(), size, ok, tt.size, tt.ok)
		}
	}
	n.FLBAS, n.NLBAF = 0x61, 63
	if i := n.FormatIndex(); i != 0x31 {
		t.Errorf("index %#x, want 31h", i)
	}
	if s := (LBAFormat{MS: 8, LBADS: 12, RP: 2}).String(); s != "lbads=12 ms=8 rp=2" {
		t.Error(s)
	}
}

func TestPowerState(t *testing.T) {
	if mw := (&PowerState{MP: 2500}).MaxPowerMilliwatts(); mw != 25000 {
		t.Errorf("%d mW", mw)
	}
	if mw := (&PowerState{MP: 2500, Flags: PowerStateMXPS}).MaxPowerMilliwatts(); mw != 250 {
		t.Errorf("%d mW", mw)
	}
}

func TestNamespaceList(t *testing.T) {
	var l NamespaceList
	if l.Len() != 0 {
		t.Errorf("empty list has %d", l.Len())
	}
	l.ID[0], l.ID[1], l.ID[3] = 1, 5, 9
	if l.Len() != 2 {
		t.Errorf("%d ids before the first 0, want 2", l.Len())
	}
	for i := range l.ID {
		l.ID[i] = uint32(i + 1)
	}
	if l.Len() != 1024 {
		t.Errorf("full list has %d", l.Len())
	}
	if b := l.Bytes(); b[4] != 2 || b[4092] != 0 || b[4093] != 4 {
		t.Errorf("not little-endian: % x … % x", b[:8], b[4092:])
	}
}

func TestNamespaceDescriptors(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var d NamespaceDescriptors
		if d.HasEUI64 = rapid.Bool().Draw(t, "eui64"); d.HasEUI64 {
			d.EUI64[0], d.EUI64[7] = 1, 8
		}
		if d.HasNGUID = rapid.Bool().Draw(t, "nguid"); d.HasNGUID {
			d.NGUID[0], d.NGUID[15] = 2, 16
		}
		if d.HasUUID = rapid.Bool().Draw(t, "uuid"); d.HasUUID {
			d.UUID[0], d.UUID[15] = 3, 16
		}
		if d.HasCSI = rapid.Bool().Draw(t, "csi"); d.HasCSI {
			d.CSI = CSIZoned
		}
		var b [IdentifySize]byte
		b[100] = 0xFF // Encode clears what was there
		d.Encode(&b)
		back := NamespaceDescriptors{HasUUID: true}
		back.Decode(&b)
		if back != d {
			t.Fatalf("%+v, want %+v", back, d)
		}
	})
}

func TestNamespaceDescriptorsOfOthers(t *testing.T) {
	var b [IdentifySize]byte
	copy(b[:], "\x09\x02\x00\x00zz"+ // an unknown type
		"\x01\x07\x00\x000123456"+ // an EUI64 of 7 bytes
		"\x04\x01\x00\x00\x02")
	var d NamespaceDescriptors
	d.Decode(&b)
	if d != (NamespaceDescriptors{CSI: CSIZoned, HasCSI: true}) {
		t.Errorf("%+v", d)
	}
	// The last descriptor claims more bytes than there are.
	clear(b[:])
	for i := 0; i < 4080; i += 255 {
		b[i], b[i+1] = 0x77, 251
	}
	b[4080], b[4081] = NIDTUUID, 16
	d.Decode(&b)
	if d != (NamespaceDescriptors{}) {
		t.Errorf("%+v", d)
	}
}

func TestFormatUUID(t *testing.T) {
	u := [16]byte{0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF, 0xFE, 0xDC, 0xBA, 0x98, 0x76, 0x54, 0x32, 0x10}
	if got, want := FormatUUID(u), "01234567-89ab-cdef-fedc-ba9876543210"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestShadowbell(t *testing.T) {
	var c IdentifyController
	if s, ok := c.Shadowbell(); ok {
		t.Errorf("zeroes are shadowbell's: %+v", s)
	}
	want := ShadowbellCaps{Version: ShadowbellVersion, Caps: ShadowbellQuiet}
	c.SetShadowbell(want)
	if got, want := string(c.Bytes()[3072:3080]), "SBEL\x01\x00\x01\x00"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, ok := c.Shadowbell(); !ok || got != want {
		t.Errorf("%+v, %v", got, ok)
	}
	c.SetShadowbell(ShadowbellCaps{})
	if _, ok := c.Shadowbell(); ok {
		t.Error("version 0 accepted")
	}
}

func FuzzIdentify(f *testing.F) {
	f.Add([]byte("\x01\x08\x00\x0001234567\x03\x10\x00\x00"))
	f.Add([]byte{25: 63, 26: 0x7F})
	f.Fuzz(func(t *testing.T, b []byte) {
		var page [IdentifySize]byte
		copy(page[:], b)

		var d, back NamespaceDescriptors
		d.Decode(&page)
		var again [IdentifySize]byte
		d.Encode(&again)
		if back.Decode(&again); back != d {
			t.Fatalf("%+v encodes to %+v", d, back)
		}

		var c IdentifyController
		*c.Bytes() = page
		for _, s := range []string{c.Serial(), c.Model(), c.Firmware(), c.Subsystem()} {
			for _, r := range s {
				if r < ' ' || r > '~' {
					t.Fatalf("%q is not printable", s)
				}
			}
		}
		c.Shadowbell()
		if c.MaxTransfer(page[0]) > 1<<62 {
			t.Fatal("transfer limit too large for an int64")
		}
		for i := range c.PSD {
			c.PSD[i].MaxPowerMilliwatts()
		}
		if *c.Bytes() != page {
			t.Fatal("decoding changed the bytes")
		}

		var n IdentifyNamespace
		*n.Bytes() = page
		if size, ok := n.BlockSize(); ok && (size < 512 || size&(size-1) != 0) {
			t.Fatalf("block size %d", size)
		}
		var l NamespaceList
		*l.Bytes() = page
		l.Len()
	})
}
