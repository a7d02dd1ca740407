package backend

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// Kind says where a namespace's bytes are.
type Kind string

// The kinds of a Spec.
const (
	KindNull Kind = "null"
	KindMem  Kind = "mem"
	KindFile Kind = "file"
)

// SpecHelp is the syntax that ParseSpec takes, for --help.
const SpecHelp = `null:size=SIZE[,lba=N]                       answers at once and stores nothing
mem:size=SIZE[,lba=N]                        this process's memory, gone when it ends
file:PATH[,size=SIZE][,lba=N][,readonly]     a regular file; size= creates it, sparse, if it is missing
fault:RULE[,RULE...][,seed=N],over=SPEC      another SPEC with faults, to test drivers: nothing to keep data on
SIZE is in bytes or has a suffix KiB, MiB, GiB, TiB (or K, M, G, T). lba is a power of two from 512 to 65536
bytes, 512 if not given. A comma in PATH is written twice.
RULE is what happens, and @CONDITIONs, all of which must hold; of several rules the first one that holds counts:
  status=STATUS[+dnr]  the command fails. STATUS is a name, as write-fault, or SCT/SC, as 2/80; +dnr: Do Not Retry
  delay=TIME           it is done, and completed TIME later
  drop                 it is never completed, until its queue goes; hold: or until it is aborted
  torn                 of a write, the first half is done, and it fails with Write Fault
  @read @write @flush @zeroes @discard  what is asked of the medium   @lba=A-B  a block of it is from A to B
  @after=N  not the first N of those   @first=N  N of the rest   @rate=N/M  of those, N in M, by chance from seed`

const (
	defaultLBA = 512
	minLBA     = 512
	maxLBA     = 1 << MaxLBAShift
)

// Spec is a parsed namespace specification.
type Spec struct {
	Kind     Kind
	Path     string // KindFile
	Size     uint64 // bytes, a multiple of LBA; 0: not given (KindFile only)
	LBA      uint32 // bytes
	ReadOnly bool   // KindFile
	Faults   string // rules of fault:, as written; empty: none
}

// options is what each kind takes.
var options = map[Kind]string{
	KindNull: "size=, lba=",
	KindMem:  "size=, lba=",
	KindFile: "size=, lba=, readonly",
}

// ParseSpec parses a namespace specification (see SpecHelp). The error is one line that names what is
// wrong and what would be right.
func ParseSpec(s string) (Spec, error) {
	rules, plain, faulty, err := splitFaults(s)
	if err != nil {
		return Spec{}, fmt.Errorf("namespace %q: %w", s, err)
	}
	spec, err := parsePlain(plain)
	if faulty && err != nil {
		return Spec{}, fmt.Errorf("namespace %q: over=: %w", s, err)
	}
	spec.Faults = rules
	return spec, err
}

// parsePlain is ParseSpec for specs without faults.
func parsePlain(s string) (Spec, error) {
	kind, rest, ok := strings.Cut(s, ":")
	takes, known := options[Kind(kind)]
	if !ok || !known {
		return Spec{}, fmt.Errorf("namespace %q: it must begin with null:, mem: or file: (or, for tests, fault:), as in mem:size=1GiB or file:/srv/disk.img", s)
	}
	spec := Spec{Kind: Kind(kind), LBA: defaultLBA}
	fields := splitCommas(rest)
	if spec.Kind == KindFile {
		spec.Path, fields = fields[0], fields[1:]
		if spec.Path == "" {
			return Spec{}, fmt.Errorf("namespace %q: the path is missing, as in file:/srv/disk.img", s)
		}
		if strings.ContainsFunc(spec.Path, func(r rune) bool { return r < ' ' }) {
			return Spec{}, fmt.Errorf("namespace %q: the path contains a control character: rename the file", s)
		}
	} else if rest == "" {
		fields = nil
	}
	seen := map[string]bool{}
	for _, f := range fields {
		key, value, hasValue := strings.Cut(f, "=")
		if seen[key] {
			return Spec{}, fmt.Errorf("namespace %q: %s is given twice", s, key)
		}
		seen[key] = true
		var err error
		switch {
		case key == "size" && hasValue:
			spec.Size, err = ParseSize(value)
			if err == nil && spec.Size == 0 {
				err = fmt.Errorf("size=%s is nothing: give the size of the namespace, as in size=1GiB", value)
			}
		case key == "lba" && hasValue:
			spec.LBA, err = parseLBA(value)
		case key == "readonly" && !hasValue && spec.Kind == KindFile:
			spec.ReadOnly = true
		case key == "readonly" && spec.Kind == KindFile:
			err = fmt.Errorf("readonly takes no value")
		case (key == "size" || key == "lba") && !hasValue:
			err = fmt.Errorf("%s needs a value, as in size=1GiB or lba=4096", key)
		default:
			err = fmt.Errorf("%q is no option of %s, which takes %s", f, kind, takes)
			if spec.Kind == KindFile {
				err = fmt.Errorf("%w (a comma in the path is written twice)", err)
			}
		}
		if err != nil {
			return Spec{}, fmt.Errorf("namespace %q: %w", s, err)
		}
	}
	if spec.Size == 0 && spec.Kind != KindFile {
		return Spec{}, fmt.Errorf("namespace %q: size= is missing, as in %s:size=1GiB", s, kind)
	}
	if err := checkMultiple(spec.Size, spec.LBA); err != nil {
		return Spec{}, fmt.Errorf("namespace %q: size=%d %w", s, spec.Size, err)
	}
	return spec, nil
}

// splitCommas splits at single commas; two in a row stand for one that belongs to the text.
func splitCommas(s string) []string {
	out := []string{""}
	for i := 0; i < len(s); i++ {
		last := &out[len(out)-1]
		switch {
		case s[i] != ',':
			*last += s[i : i+1]
		case i+1 < len(s) && s[i+1] == ',':
			*last += ","
			i++
		default:
			out = append(out, "")
		}
	}
	return out
}

func checkMultiple(size uint64, lba uint32) error {
	if rest := size % uint64(lba); rest != 0 {
		return fmt.Errorf("is not a multiple of the block size lba=%d: the next one is %d", lba, size-rest+uint64(lba))
	}
	return nil
}

func parseLBA(s string) (uint32, error) {
	n, err := ParseSize(s)
	if err != nil || n < minLBA || n > maxLBA || bits.OnesCount64(n) != 1 {
		return 0, fmt.Errorf("lba=%s is not a block size: use a power of two from %d to %d", s, minLBA, maxLBA)
	}
	return uint32(n), nil
}

var suffixes = map[string]int{
	"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "KIB": 10, "MIB": 20, "GIB": 30, "TIB": 40,
}

// ParseSize parses a size in bytes: "4096", "64K", "1GiB". Suffixes are powers of 1024, in any case.
func ParseSize(s string) (uint64, error) {
	digits := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	if digits < 0 {
		digits = len(s)
	}
	shift, ok := suffixes[strings.ToUpper(s[digits:])]
	n, err := strconv.ParseUint(s[:digits], 10, 64)
	if !ok || digits == 0 {
		return 0, fmt.Errorf("%q is not a size: use bytes or a suffix KiB, MiB, GiB, TiB, as in 10GiB", s)
	}
	if err != nil || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("size %q is too large: at most %d bytes", s, int64(math.MaxInt64))
	}
	return n << shift, nil
}

// FormatSize writes n bytes the way ParseSize takes it, with the largest suffix that divides it.
func FormatSize(n uint64) string {
	for _, u := range []struct {
		shift int
		name  string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if n != 0 && n&(1<<u.shift-1) == 0 {
			return strconv.FormatUint(n>>u.shift, 10) + u.name
		}
	}
	return strconv.FormatUint(n, 10)
}

// String returns the spec as ParseSpec takes it, without options that say the default.
func (s Spec) String() string {
	var b strings.Builder
	if s.Faults != "" {
		b.WriteString(faultKind + ":" + s.Faults + "," + faultOver)
	}
	b.WriteString(string(s.Kind) + ":")
	sep := ""
	if s.Kind == KindFile {
		b.WriteString(strings.ReplaceAll(s.Path, ",", ",,"))
		sep = ","
	}
	if s.Size != 0 {
		b.WriteString(sep + "size=" + FormatSize(s.Size))
		sep = ","
	}
	if s.LBA != defaultLBA {
		fmt.Fprintf(&b, "%slba=%d", sep, s.LBA)
	}
	if s.ReadOnly {
		b.WriteString(",readonly")
	}
	return b.String()
}
