package backend

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Kind says where a namespace's bytes are.
type Kind string

// The kinds of a Spec.
const (
	KindNull  Kind = "null"
	KindMem   Kind = "mem"
	KindFile  Kind = "file"
	KindBlock Kind = "block"
	KindNVMe  Kind = "nvme"
	KindVFIO  Kind = "vfio"
)

// Keeps reports whether what a namespace of this kind holds is there after the end of hostmed, by the same path.
func (k Kind) Keeps() bool { return k == KindFile || k == KindBlock }

// SpecHelp is the syntax that ParseSpec takes, for --help.
const SpecHelp = `null:size=SIZE[,lba=N]                       answers at once and stores nothing
mem:size=SIZE[,lba=N]                        this process's memory, gone when it ends
file:PATH[,size=SIZE][,lba=N][,readonly]     a regular file; size= creates it, sparse, if it is missing
block:PATH[,lba=N][,poll][,nopin][,readonly] a block device or partition, as /dev/nvme0n1p3; lba is the device's if not given
nvme:PATH[,offset=SIZE][,size=SIZE][,poll][,nopin][,vendor][,readonly]
                                             an NVMe namespace by its character device, /dev/ng0n1, or a slice of it;
                                             poll: by its poll queues; nopin: guest memory is not pinned; vendor: the
                                             guest may send the device's vendor specific admin commands
vfio:ADDRESS[,nsid=N][,offset=SIZE][,size=SIZE][,queues=N][,poll][,timeout=TIME][,vendor][,readonly]
                                             a namespace, or a slice of one, of the NVMe device at a PCI address, as
                                             0000:01:00.0, which vfio-pci has: hostmed drives it, for all that name it;
                                             queues: so many of its queue pairs are for this SPEC alone; poll: no
                                             interrupts; timeout: commands that take longer are aborted, 10s if not given
fault:RULE[,RULE...][,seed=N],over=SPEC      another SPEC with faults, to test drivers: nothing to keep data on
SIZE is in bytes or has a suffix KiB, MiB, GiB, TiB (or K, M, G, T). lba is a power of two from 512 to 65536
bytes, 512 if not given. A comma in PATH is written twice.
RULE is what happens, and @CONDITIONs, all of which must hold; of several rules the first one that holds counts:
  status=STATUS[+dnr]  the command fails. STATUS is a name, as write-fault, or SCT/SC, as 2/80; +dnr: Do Not Retry
  delay=TIME           it is done, and completed TIME later
  stuck=TIME           it is done TIME later, and until then nothing ends it, as by a device that hangs
  reorder=N            N of them are done, and completed the last one first, or as many as there are after 10 ms
  drop                 it is never completed, until its queue goes; hold: or until it is aborted
  torn                 of a write, the first half is done, and it fails with Write Fault
  @read @write @flush @zeroes @discard  what is asked of the medium   @lba=A-B  a block of it is from A to B
  @opcode=N  it is, or is a part of, a guest's command with the opcode N, as 0x05 of Compare
  @after=N  not the first N of those   @first=N  N of the rest   @rate=N/M  of those, N in M, by chance from seed`

const (
	defaultLBA = 512
	minLBA     = 512
	maxLBA     = 1 << MaxLBAShift

	minTimeout = 100 * time.Millisecond
	maxTimeout = 10 * time.Minute
)

// Spec is a parsed namespace specification.
type Spec struct {
	Kind     Kind
	Path     string // of kinds that begin with one
	Size     uint64 // bytes, a multiple of LBA; 0: not given
	LBA      uint32 // bytes; 0: the device's
	ReadOnly bool
	Offset   uint64        // bytes, where a slice begins
	NSID     uint32        // of the device's namespace; 0: its only one
	Queues   int           // queue pairs that are reserved
	Timeout  time.Duration // of each command at the device; 0: not given
	Poll     bool          // by the device's poll queues
	NoPin    bool          // guest memory is not registered with the kernel
	Vendor   bool          // vendor specific admin commands go to the device
	Faults   string        // rules of fault:, as written; empty: none

	// UnsafeNoIOMMU takes a device for vfio: that no IOMMU keeps from all memory of the machine, too. It is the operator's to say, not a SPEC's.
	UnsafeNoIOMMU bool
}

// whole says whether all of a device's namespace is served, and nothing else of it to anybody.
func (s *Spec) whole() bool { return s.Offset == 0 && s.Size == 0 }

func (s *Spec) mayVendor() error {
	if s.Vendor && !s.whole() {
		return errors.New("vendor: vendor specific commands reach all of a device, and this is a slice of it: leave out either")
	}
	return nil
}

// syntax is what a spec of one kind looks like.
type syntax struct {
	path    string // an example of what it begins with; empty: it begins with an option
	sized   bool   // size= must be given
	ownLBA  bool   // without lba= the device decides
	options []option
}

// option is a part of a spec after its path.
type option struct {
	key     string
	example string // of its value; empty: it takes none
	set     func(s *Spec, value string) error
}

var (
	optSize = option{"size", "1GiB", func(s *Spec, v string) (err error) {
		if s.Size, err = ParseSize(v); err == nil && s.Size == 0 {
			err = fmt.Errorf("size=%s is nothing: give the size of the namespace, as in size=1GiB", v)
		}
		return err
	}}
	optLBA = option{"lba", "4096", func(s *Spec, v string) (err error) {
		s.LBA, err = parseLBA(v)
		return err
	}}
	optReadOnly = flag("readonly", func(s *Spec) { s.ReadOnly = true })
	optPoll     = flag("poll", func(s *Spec) { s.Poll = true })
	optNoPin    = flag("nopin", func(s *Spec) { s.NoPin = true })
	optVendor   = flag("vendor", func(s *Spec) { s.Vendor = true })
	optNSID     = option{"nsid", "1", func(s *Spec, v string) error {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil || n == 0 || n > math.MaxUint32-2 {
			return fmt.Errorf("nsid=%s is no namespace id: they begin at 1 (nvme list)", v)
		}
		s.NSID = uint32(n)
		return nil
	}}
	optQueues = option{"queues", "2", func(s *Spec, v string) error {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("queues=%s is no number of queue pairs: give how many are to be reserved, or leave it out", v)
		}
		s.Queues = int(n)
		return nil
	}}
	optTimeout = option{"timeout", "10s", func(s *Spec, v string) error {
		d, err := time.ParseDuration(v)
		if err != nil || d < minTimeout || d > maxTimeout {
			return fmt.Errorf("timeout=%s is no time from %v to %v: less than the guest's own patience is right, which is 30s with Linux", v, minTimeout, maxTimeout)
		}
		s.Timeout = d
		return nil
	}}
	optOffset = option{"offset", "1GiB", func(s *Spec, v string) (err error) {
		s.Offset, err = ParseSize(v)
		return err
	}}
)

func flag(key string, set func(*Spec)) option {
	return option{key: key, set: func(s *Spec, _ string) error {
		set(s)
		return nil
	}}
}

var syntaxes = map[Kind]syntax{
	KindNull:  {sized: true, options: []option{optSize, optLBA}},
	KindMem:   {sized: true, options: []option{optSize, optLBA}},
	KindFile:  {path: "/srv/disk.img", options: []option{optSize, optLBA, optReadOnly}},
	KindBlock: {path: "/dev/nvme0n1p3", ownLBA: true, options: []option{optLBA, optPoll, optNoPin, optReadOnly}},
	KindNVMe:  {path: "/dev/ng0n1", options: []option{optOffset, optSize, optPoll, optNoPin, optVendor, optReadOnly}},
	KindVFIO:  {path: "0000:01:00.0", options: []option{optNSID, optOffset, optSize, optQueues, optPoll, optTimeout, optVendor, optReadOnly}},
}

// takes names the options of x.
func (x syntax) takes() string {
	var names []string
	for _, o := range x.options {
		name := o.key
		if o.example != "" {
			name += "="
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}

// parse sets the option that field is.
func (x syntax) parse(s *Spec, field string) error {
	key, value, hasValue := strings.Cut(field, "=")
	i := slices.IndexFunc(x.options, func(o option) bool { return o.key == key })
	switch {
	case i < 0 && x.path != "":
		return fmt.Errorf("%q is no option of %s, which takes %s (a comma in the path is written twice)", field, s.Kind, x.takes())
	case i < 0:
		return fmt.Errorf("%q is no option of %s, which takes %s", field, s.Kind, x.takes())
	case hasValue && x.options[i].example == "":
		return fmt.Errorf("%s takes no value", key)
	case !hasValue && x.options[i].example != "":
		return fmt.Errorf("%s needs a value, as in %s=%s", key, key, x.options[i].example)
	}
	return x.options[i].set(s, value)
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
	say := func(format string, a ...any) (Spec, error) {
		return Spec{}, fmt.Errorf("namespace %q: %w", s, fmt.Errorf(format, a...))
	}
	kind, rest, ok := strings.Cut(s, ":")
	x, known := syntaxes[Kind(kind)]
	if !ok || !known {
		return say("it must begin with %s (or, for tests, fault:), as in mem:size=1GiB or file:/srv/disk.img", kindNames())
	}
	spec := Spec{Kind: Kind(kind), LBA: defaultLBA}
	if x.ownLBA {
		spec.LBA = 0
	}
	fields := splitCommas(rest)
	if x.path != "" {
		spec.Path, fields = fields[0], fields[1:]
		if spec.Path == "" {
			return say("the path is missing, as in %s:%s", kind, x.path)
		}
		if strings.ContainsFunc(spec.Path, func(r rune) bool { return r < ' ' }) {
			return say("the path contains a control character: rename the file")
		}
	} else if rest == "" {
		fields = nil
	}
	seen := map[string]bool{}
	for _, f := range fields {
		key, _, _ := strings.Cut(f, "=")
		if seen[key] {
			return say("%s is given twice", key)
		}
		seen[key] = true
		if err := x.parse(&spec, f); err != nil {
			return say("%w", err)
		}
	}
	if spec.Size == 0 && x.sized {
		return say("size= is missing, as in %s:size=1GiB", kind)
	}
	if err := checkMultiple(spec.Size, spec.LBA); err != nil {
		return say("size=%d %w", spec.Size, err)
	}
	return spec, nil
}

// kindNames lists the kinds: "a:, b: or c:".
func kindNames() string {
	var names []string
	for k := range syntaxes {
		names = append(names, string(k)+":")
	}
	slices.Sort(names)
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
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
	if lba == 0 {
		return nil
	}
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
	if s.Path != "" {
		b.WriteString(strings.ReplaceAll(s.Path, ",", ",,"))
		sep = ","
	}
	if s.NSID != 0 {
		fmt.Fprintf(&b, "%snsid=%d", sep, s.NSID)
		sep = ","
	}
	if s.Offset != 0 {
		b.WriteString(sep + "offset=" + FormatSize(s.Offset))
		sep = ","
	}
	if s.Size != 0 {
		b.WriteString(sep + "size=" + FormatSize(s.Size))
		sep = ","
	}
	if s.LBA != defaultLBA && s.LBA != 0 || s.Kind == KindBlock && s.LBA != 0 {
		fmt.Fprintf(&b, "%slba=%d", sep, s.LBA)
	}
	if s.Queues != 0 {
		fmt.Fprintf(&b, "%squeues=%d", sep, s.Queues)
	}
	if s.Timeout != 0 {
		fmt.Fprintf(&b, "%stimeout=%v", sep, s.Timeout)
	}
	for _, f := range []struct {
		on   bool
		name string
	}{{s.Poll, "poll"}, {s.NoPin, "nopin"}, {s.Vendor, "vendor"}, {s.ReadOnly, "readonly"}} {
		if f.on {
			b.WriteString("," + f.name)
		}
	}
	return b.String()
}
