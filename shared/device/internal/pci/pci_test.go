package pci

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestParseAddress(t *testing.T) {
	for in, want := range map[string]string{
		"0000:00:04.0": "0000:00:04.0", "00:04.0": "0000:00:04.0", "10000:E1:1F.7": "10000:e1:1f.7",
		"": "", "04.0": "", "0000:00:04.8": "", "../../etc": "", "000:00:04.0": "", "0000:00:20.0": "", "0000:00:04.0 ": "",
	} {
		if got, err := ParseAddress(in); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
}

// TestRunsAreAsLongAsCanBe compares joinRuns with the definition.
func TestRunsAreAsLongAsCanBe(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const page = 1 << 21
		n := rapid.IntRange(1, 33).Draw(t, "n")
		addresses := make([]uint64, n)
		for i := range addresses {
			addresses[i] = uint64(rapid.IntRange(1, 99).Draw(t, "at")) * page
			if i > 0 && rapid.IntRange(0, 9).Draw(t, "follows") > 0 {
				addresses[i] = addresses[i-1] + page
			}
		}
		fits := func(run uint64) bool {
			for i := 1; i < n; i++ {
				if uint64(i)*page%run != 0 && addresses[i] != addresses[i-1]+page {
					return false
				}
			}
			return true
		}
		run, iovas := joinRuns(slices.Clone(addresses), page)
		if !fits(run) {
			t.Fatalf("runs of %d pages in %#x", run/page, addresses)
		}
		if len(iovas) > 1 && fits(2*run) {
			t.Fatalf("runs of %d pages, and twice that would do, in %#x", run/page, addresses)
		}
		for i, a := range addresses {
			off := uint64(i) * page
			if got := iovas[off/run] + off%run; got != a {
				t.Fatalf("page %d is said to be at %#x, it is at %#x", i, got, a)
			}
		}
	})
}

func TestHugePagesSayHowManyAreMissing(t *testing.T) {
	_, err := NewHugePages(1<<46 + 1)
	if err == nil || !strings.Contains(err.Error(), "33554433 huge pages") || !strings.Contains(err.Error(), "nr_hugepages") {
		t.Fatalf("got %v", err)
	}
	if _, err := NewPhysical(0); err == nil {
		t.Fatal("no bytes of memory")
	}
}

// TestPhysicalMemory runs where the kernel has huge pages to give and tells addresses; elsewhere the refusals are the test.
func TestPhysicalMemory(t *testing.T) {
	mem, err := NewPhysical(3*HugePage - 5)
	free, _ := os.ReadFile(freeHugePages)
	if err != nil {
		if len(free) > 0 && free[0] >= '3' && os.Geteuid() == 0 && !errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		}
		t.Logf("none here: %v", err)
		if !strings.Contains(err.Error(), "nr_hugepages") && !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
			t.Fatalf("no remedy: %v", err)
		}
		return
	}
	defer mem.Free()
	if mem.Len() != 3*HugePage || mem.IOVAOf(2*HugePage)%HugePage != 0 {
		t.Fatalf("%d bytes, the last page at %#x", mem.Len(), mem.IOVAOf(2*HugePage))
	}
}

// memory is what no area covers.
type memory struct {
	b    []byte
	last int // bytes of the last access
}

func (m *memory) ReadBAR(p []byte, off uint64) error  { m.last = copy(p, m.b[off:]); return nil }
func (m *memory) WriteBAR(p []byte, off uint64) error { m.last = copy(m.b[off:], p); return nil }

func TestWhatIsNotMappedIsReachedOneByOne(t *testing.T) {
	m := &memory{b: make([]byte, 0x4000)}
	mapped := shm.NewHeap(0x1000)
	r := &Registers{Size: 0x4000, Areas: []Area{{Off: 0x1000, Mem: mapped}}, Slow: m, Gone: NewEnding()}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(r.Write32(nvme.RegCC, 0x460001))
	check(r.Write64(nvme.RegASQ, 0x123456000))
	if m.last != 8 || binary.LittleEndian.Uint64(m.b[nvme.RegASQ:]) != 0x123456000 {
		t.Errorf("the last access was of %d bytes", m.last)
	}
	if v, err := r.Read32(nvme.RegCC); v != 0x460001 || err != nil {
		t.Errorf("CC=%#x, %v", v, err)
	}
	if v, err := r.Read64(nvme.RegASQ); v != 0x123456000 || err != nil {
		t.Errorf("ASQ=%#x, %v", v, err)
	}
	check(r.Doorbell(nvme.DoorbellBase).Ring(7))
	if v, err := mapped.Word32(0); err != nil || v.Load() != 7 {
		t.Errorf("the mapped doorbell: %v, %v", v.Load(), err)
	}
	check(r.Doorbell(0x2000).Ring(9))
	if m.b[0x2000] != 9 {
		t.Error("the doorbell that is not mapped was not rung")
	}
	for _, off := range []uint32{0x4000, 0x3ffd, 2} {
		if _, err := r.Read32(off); err == nil {
			t.Errorf("a register at %#x", off)
		}
	}
	// Half in the mapped part, half not.
	if _, err := r.Read64(0xffc); err == nil {
		t.Error("a register across the edge of a mapping")
	}
	check(r.Unmap())
}

// TestNothingThere: registers of a function that somebody resets read as those of one that has gone. Configuration space tells which it is.
func TestNothingThere(t *testing.T) {
	for what, b := range map[string]byte{"all ones": 0xff, "zeroes": 0} {
		for name, c := range map[string]struct {
			there bool  // the registers are back when configuration space has answered
			err   error // its answer
			gone  bool
		}{
			"reset":                            {there: true},
			"pulled out":                       {err: device.ErrGone, gone: true},
			"its link is down, not the port's": {gone: true},
		} {
			t.Run(what+"/"+name, func(t *testing.T) {
				m := &memory{b: bytes.Repeat([]byte{b}, 0x4000)}
				r := &Registers{Size: 0x4000, Slow: m, Gone: NewEnding()}
				asked := 0
				r.Answers = func() error {
					asked++
					if c.there {
						clear(m.b)
						binary.LittleEndian.PutUint64(m.b[nvme.RegCAP:], 0x1234)
						binary.LittleEndian.PutUint32(m.b[nvme.RegVS:], 0x10400)
					}
					return c.err
				}
				v, err := r.Read64(nvme.RegCAP)
				if asked != 1 {
					t.Errorf("configuration space was asked %d times", asked)
				}
				if !c.gone {
					if err != nil || v != 0x1234 || r.Gone.Err() != nil {
						t.Errorf("CAP=%#x, %v; ended: %v", v, err, r.Gone.Err())
					}
					return
				}
				if !errors.Is(err, device.ErrGone) || !strings.Contains(err.Error(), what) || r.Gone.Err() == nil {
					t.Errorf("CAP=%#x, %v; ended: %v", v, err, r.Gone.Err())
				}
			})
		}
	}
}
