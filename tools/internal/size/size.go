// Package size reads and writes amounts of bytes on the command line.
package size

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// Bytes is an amount of bytes. As a flag it takes what Parse takes.
type Bytes uint64

// units maps a lower-case suffix to its factor. One letter is binary, as in fio and
// dd; "kB" with a B alone is decimal, as the SI has it.
var units = map[string]uint64{
	"": 1, "b": 1,
	"k": 1 << 10, "kib": 1 << 10, "kb": 1e3,
	"m": 1 << 20, "mib": 1 << 20, "mb": 1e6,
	"g": 1 << 30, "gib": 1 << 30, "gb": 1e9,
	"t": 1 << 40, "tib": 1 << 40, "tb": 1e12,
}

// Parse reads "4096", "4k", "4KiB", "1.5GiB" or "10MB". The error names s and shows the form.
func Parse(s string) (Bytes, error) {
	bad := func(why string) (Bytes, error) {
		return 0, fmt.Errorf("size %q: %s; write it as 4096, 4k, 1MiB or 10GiB", s, why)
	}
	cut := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if cut < 0 {
		cut = len(s)
	}
	number, suffix := s[:cut], strings.ToLower(strings.TrimSpace(s[cut:]))
	unit, ok := units[suffix]
	switch {
	case number == "":
		return bad("no number")
	case !ok:
		return bad(fmt.Sprintf("unknown unit %q", s[cut:]))
	}
	if !strings.Contains(number, ".") {
		n, err := strconv.ParseUint(number, 10, 64)
		hi, lo := bits.Mul64(n, unit)
		if err != nil || hi != 0 {
			return bad("too large")
		}
		return Bytes(lo), nil
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return bad("not a number")
	}
	if f *= float64(unit); f >= math.MaxUint64 {
		return bad("too large")
	}
	if f != math.Trunc(f) {
		return bad("not a whole number of bytes")
	}
	return Bytes(f), nil
}

// UnmarshalText lets a flag be of type Bytes.
func (b *Bytes) UnmarshalText(text []byte) error {
	v, err := Parse(string(text))
	if err != nil {
		return err
	}
	*b = v
	return nil
}

// String prints the largest binary unit that divides b: "4 KiB", "1 GiB", "1000 B".
func (b Bytes) String() string {
	for _, u := range []struct {
		shift uint
		name  string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if b != 0 && b&(1<<u.shift-1) == 0 {
			return fmt.Sprintf("%d %s", b>>u.shift, u.name)
		}
	}
	return fmt.Sprintf("%d B", uint64(b))
}

// Human prints b rounded, for people: "12.3 MiB".
func (b Bytes) Human() string {
	v, unit := float64(b), "B"
	for _, u := range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		if v < 1024 {
			break
		}
		v, unit = v/1024, u
	}
	if unit == "B" || v >= 100 {
		return fmt.Sprintf("%.0f %s", v, unit)
	}
	return fmt.Sprintf("%.1f %s", v, unit)
}

// List is one or more sizes, written with commas. As a flag it takes "4k" and "512,4k,128k".
type List []Bytes

// UnmarshalText lets a flag be of type List.
func (l *List) UnmarshalText(text []byte) error {
	*l = nil
	for s := range strings.SplitSeq(string(text), ",") {
		b, err := Parse(strings.TrimSpace(s))
		if err != nil {
			return err
		}
		if b == 0 {
			return errors.New("size 0: a transfer has at least one block")
		}
		*l = append(*l, b)
	}
	return nil
}

// String prints the sizes with commas.
func (l List) String() string {
	parts := make([]string, len(l))
	for i, b := range l {
		parts[i] = b.String()
	}
	return strings.Join(parts, ", ")
}

// Max returns the largest of the sizes, 0 if there is none.
func (l List) Max() (m Bytes) {
	for _, b := range l {
		m = max(m, b)
	}
	return m
}
