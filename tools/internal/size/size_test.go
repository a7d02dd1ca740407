package size

import (
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestParse(t *testing.T) {
	for s, want := range map[string]Bytes{
		"0": 0, "4096": 4096, "512b": 512, "4k": 4096, "4K": 4096, "4KiB": 4096, "4 KiB": 4096, "4kB": 4000,
		"1m": 1 << 20, "1.5MiB": 3 << 19, "10GiB": 10 << 30, "2T": 2 << 40, "1TB": 1e12,
		"18446744073709551615": 1<<64 - 1,
	} {
		got, err := Parse(s)
		if err != nil || got != want {
			t.Errorf("Parse(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for s, why := range map[string]string{
		"": "no number", "k": "no number", "-1": "no number", "4q": "unknown unit", "4kk": "unknown unit", "0x10": "unknown unit",
		"18446744073709551616": "too large", "99999999T": "too large", "1.2.3k": "not a number", "1.3": "whole number", "99999999999.5T": "too large",
	} {
		_, err := Parse(s)
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("Parse(%q): error %v; want one that says %q", s, err, why)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("Parse(%q): more than one line: %v", s, err)
		}
	}
}

func TestStringIsReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := Bytes(rapid.Uint64().Draw(t, "b"))
		if back, err := Parse(b.String()); err != nil || back != b {
			t.Fatalf("%d prints as %q, read back as %d, %v", uint64(b), b, back, err)
		}
	})
}

func TestHuman(t *testing.T) {
	for b, want := range map[Bytes]string{0: "0 B", 1000: "1000 B", 1536: "1.5 KiB", 200 << 20: "200 MiB", 1 << 60: "1024 PiB"} {
		if got := b.Human(); got != want {
			t.Errorf("%d: %q, want %q", uint64(b), got, want)
		}
	}
}

func TestList(t *testing.T) {
	var l List
	if err := l.UnmarshalText([]byte("512,4k, 128KiB")); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(l, List{512, 4096, 128 << 10}) || l.Max() != 128<<10 || l.String() != "512 B, 4 KiB, 128 KiB" {
		t.Fatalf("%v, max %d", l, l.Max())
	}
	for _, s := range []string{"", "4k,", "0", "4k,0"} {
		if err := l.UnmarshalText([]byte(s)); err == nil {
			t.Errorf("%q was accepted", s)
		}
	}
}
