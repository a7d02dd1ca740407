package vfiouser

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestHeaderRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := Header{
			ID:    rapid.Uint16().Draw(t, "id"),
			Cmd:   Command(rapid.Uint16().Draw(t, "cmd")),
			Size:  rapid.Uint32().Draw(t, "size"),
			Flags: rapid.Uint32().Draw(t, "flags"),
			Errno: rapid.Uint32().Draw(t, "errno"),
		}
		b := h.Append(nil)
		got, ok := ParseHeader(b)
		if !ok || got != h || len(b) != HeaderSize {
			t.Fatalf("%v -> %x -> %v %v", h, b, got, ok)
		}
		if _, ok := ParseHeader(b[:15]); ok {
			t.Fatal("15 bytes make a header")
		}
	})
}

func TestHeaderBytes(t *testing.T) {
	h := Header{ID: 0x1234, Cmd: CmdRegionWrite, Size: 36, Flags: FlagNoReply, Errno: 5}
	want := []byte{0x34, 0x12, 10, 0, 36, 0, 0, 0, 0x10, 0, 0, 0, 5, 0, 0, 0}
	if got := h.Append(nil); !bytes.Equal(got, want) {
		t.Fatalf("%x, want %x", got, want)
	}
	if got := h.String(); got != "REGION_WRITE id=4660 size=36 flags=0x10 errno=5" {
		t.Fatal(got)
	}
	if got := Command(99).String(); got != "command 99" {
		t.Fatal(got)
	}
}

func TestPayloadsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		u32, u64 := rapid.Uint32(), rapid.Uint64()
		m := DMAMap{u32.Draw(t, "a"), u64.Draw(t, "b"), u64.Draw(t, "c"), u64.Draw(t, "d")}
		if got, ok := ParseDMAMap(m.Append(nil)); !ok || got != m {
			t.Fatal(m, got, ok)
		}
		u := DMAUnmap{u32.Draw(t, "a"), u64.Draw(t, "b"), u64.Draw(t, "c")}
		if got, ok := ParseDMAUnmap(u.Append(nil)); !ok || got != u {
			t.Fatal(u, got, ok)
		}
		d := DeviceInfo{u32.Draw(t, "a"), u32.Draw(t, "b"), u32.Draw(t, "c")}
		if got, ok := ParseDeviceInfo(d.Append(nil)); !ok || got != d {
			t.Fatal(d, got, ok)
		}
		q := IRQInfo{u32.Draw(t, "a"), u32.Draw(t, "b"), u32.Draw(t, "c")}
		if got, ok := ParseIRQInfo(q.Append(nil)); !ok || got != q {
			t.Fatal(q, got, ok)
		}
		s := SetIRQs{Flags: u32.Draw(t, "a"), Index: u32.Draw(t, "b"), Start: u32.Draw(t, "c"), Count: u32.Draw(t, "d")}
		if s.Flags&IRQSetDataBool != 0 {
			s.Bools = rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "bools")
			s.Count = uint32(len(s.Bools))
		}
		if got, ok := ParseSetIRQs(s.Append(nil)); !ok || got.Flags != s.Flags || got.Index != s.Index || got.Start != s.Start || got.Count != s.Count || !bytes.Equal(got.Bools, s.Bools) {
			t.Fatal(s, got, ok)
		}
		data := rapid.SliceOfN(rapid.Byte(), 1, 40).Draw(t, "data")
		b := AppendRegionAccess(nil, m.IOVA, m.Flags, uint32(len(data)))
		off, region, count, got, ok := ParseRegionAccess(append(b, data...))
		if !ok || off != m.IOVA || region != m.Flags || int(count) != len(data) || !bytes.Equal(got, data) {
			t.Fatal(off, region, count, got, ok)
		}
		if _, _, _, _, ok := ParseRegionAccess(append(append(b, data...), 0)); ok {
			t.Fatal("a byte too many is accepted")
		}
	})
}

func TestShortPayloads(t *testing.T) {
	long := bytes.Repeat([]byte{0xff}, 64)
	parsers := map[string]struct {
		size  int
		parse func(p []byte) bool
	}{
		"DMAMap":       {DMAMapSize, func(p []byte) bool { _, ok := ParseDMAMap(p); return ok }},
		"DMAUnmap":     {DMAUnmapSize, func(p []byte) bool { _, ok := ParseDMAUnmap(p); return ok }},
		"DeviceInfo":   {DeviceInfoSize, func(p []byte) bool { _, ok := ParseDeviceInfo(p); return ok }},
		"IRQInfo":      {IRQInfoSize, func(p []byte) bool { _, ok := ParseIRQInfo(p); return ok }},
		"RegionAccess": {RegionAccessSize, func(p []byte) bool { _, _, _, _, ok := ParseRegionAccess(p); return ok }},
		"RegionInfo":   {RegionInfoSize, func(p []byte) bool { _, _, ok := ParseRegionInfo(p); return ok }},
	}
	for name, x := range parsers {
		if x.parse(long[:x.size-1]) {
			t.Errorf("%s: accepts %d bytes", name, x.size-1)
		}
		if !x.parse(long[:x.size]) {
			t.Errorf("%s: refuses %d bytes", name, x.size)
		}
		if name != "RegionAccess" && x.parse(make([]byte, 64)) {
			t.Errorf("%s: accepts argsz 0", name)
		}
	}
	if _, ok := ParseSetIRQs(long[:SetIRQsSize]); ok {
		t.Error("SetIRQs: accepts more booleans than there are")
	}
}

func TestRegionInfoRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := RegionInfo{
			Index:  rapid.Uint32().Draw(t, "index"),
			Flags:  rapid.Uint32Range(0, 7).Draw(t, "flags"),
			Size:   rapid.Uint64Range(0x10000, 1<<40).Draw(t, "size"),
			Offset: rapid.Uint64().Draw(t, "offset"),
			FD:     -1,
		}
		for range rapid.IntRange(0, maxAreas).Draw(t, "areas") {
			m.Areas = append(m.Areas, MmapArea{Offset: rapid.Uint64Range(0, 0x8000).Draw(t, "o"), Size: rapid.Uint64Range(1, 0x8000).Draw(t, "s")})
		}
		b, full := m.AppendReply(nil, m.replySize())
		if !full || len(b) != int(m.replySize()) {
			t.Fatalf("%d bytes, full %v", len(b), full)
		}
		got, argsz, ok := ParseRegionInfo(b)
		got.Flags &^= RegionCaps
		if !ok || argsz != m.replySize() || !reflect.DeepEqual(got, m) {
			t.Fatalf("%+v, want %+v", got, m)
		}
		if b, full = m.AppendReply(nil, m.replySize()-1); full || len(b) != RegionInfoSize {
			t.Fatalf("short: %d bytes, full %v", len(b), full)
		}
		if got, argsz, ok := ParseRegionInfo(b); !ok || argsz != m.replySize() || got.Flags != m.Flags {
			t.Fatalf("short: %+v argsz %d ok %v", got, argsz, ok)
		}
	})
}

func TestRegionInfoBadCaps(t *testing.T) {
	good := RegionInfo{Flags: 7, Size: 0x4000, Areas: []MmapArea{{0x1000, 0x1000}}}
	patch := func(off int, v uint32) []byte {
		b, _ := good.AppendReply(nil, 64)
		le.PutUint32(b[off:], v)
		return b
	}
	for name, b := range map[string][]byte{
		"cap_offset 0":           patch(12, 0),
		"cap_offset in struct":   patch(12, 16),
		"cap_offset beyond":      patch(12, 60),
		"cap_offset far":         patch(12, 0xffffffff),
		"unknown cap looping":    func() []byte { b := patch(36, 32); b[32] = 9; return b }(),
		"more areas than bytes":  patch(40, 2),
		"areas beyond the limit": patch(40, 0x10000000),
		"area outside":           patch(48, 0x3001),
		"area overflows":         patch(52, 0xffffffff),
	} {
		if _, _, ok := ParseRegionInfo(b); ok {
			t.Errorf("%s: accepted", name)
		}
	}
	if m, _, ok := ParseRegionInfo(patch(56, 0)); !ok || m.Flags&RegionMmap != 0 || len(m.Areas) != 0 {
		t.Errorf("list of one empty area: %+v %v", m, ok)
	}
	b := patch(36, 0)
	b[32] = 9
	if m, _, ok := ParseRegionInfo(b); !ok || m.Flags&RegionMmap == 0 || m.Areas != nil {
		t.Errorf("unknown capability: %+v %v", m, ok)
	}
}

// The version data of QEMU 11, whose message has 214 bytes.
const qemuVersionData = `{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}` + "\x00"

func TestVersion(t *testing.T) {
	limits := func(fds int, xfer, maps uint32, pg uint64) Capabilities { return Capabilities{fds, xfer, maps, pg} }
	for name, c := range map[string]struct {
		data string
		has  bool
		want Capabilities
		bad  bool
	}{
		"none":              {"", false, limits(1, MaxDataXfer, 65535, 4096), false},
		"only NUL":          {"\x00", false, limits(1, MaxDataXfer, 65535, 4096), false},
		"QEMU":              {qemuVersionData, true, limits(16, MaxDataXfer, 65535, 4096), false},
		"no NUL":            {`{}`, true, limits(1, MaxDataXfer, 65535, 4096), false},
		"after NUL":         {"{}\x00{", true, limits(1, MaxDataXfer, 65535, 4096), false},
		"null":              {`{"capabilities":null}`, true, limits(1, MaxDataXfer, 65535, 4096), false},
		"large":             {`{"capabilities":{"max_msg_fds":1000000000000,"max_data_xfer_size":99999999999,"max_dma_maps":18446744073709551615}}`, true, limits(16, MaxDataXfer, 1<<32-1, 4096), false},
		"small":             {`{"capabilities":{"max_msg_fds":0,"max_data_xfer_size":8,"max_dma_maps":1,"pgsizes":2097152}}`, true, limits(0, 8, 1, 2<<20), false},
		"no transfers":      {`{"capabilities":{"max_data_xfer_size":0}}`, true, Capabilities{}, true},
		"negative":          {`{"capabilities":{"max_msg_fds":-1}}`, true, Capabilities{}, true},
		"string":            {`{"capabilities":{"max_msg_fds":"1"}}`, true, Capabilities{}, true},
		"fraction":          {`{"capabilities":{"max_msg_fds":1.5}}`, true, Capabilities{}, true},
		"array":             {`[]`, true, Capabilities{}, true},
		"not JSON":          {`hello`, true, Capabilities{}, true},
		"deep":              {strings.Repeat("[", 15000), true, Capabilities{}, true},
		"longer than it is": {strings.Repeat(" ", maxVersionData+1), true, Capabilities{}, true},
	} {
		v, err := ParseVersion(append([]byte{0, 0, 0, 0}, c.data...))
		if (err != nil) != c.bad {
			t.Errorf("%s: error %v", name, err)
		} else if err == nil && (v.HasData != c.has || v.Caps != c.want) {
			t.Errorf("%s: %+v", name, v)
		}
	}
	if _, err := ParseVersion([]byte{0, 0, 0}); err == nil {
		t.Error("3 bytes make a version")
	}
	v := Version{Major: 0, Minor: 3, HasData: true, Caps: limits(5, 4096, 7, 12288)}
	if got, err := ParseVersion(v.Append(nil)); err != nil || got != v {
		t.Errorf("%+v, want %+v (%v)", got, v, err)
	}
}
