package guestdrv_test

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

var (
	_ export.Disk        = (*guestdrv.Namespace)(nil)
	_ export.Capable     = (*guestdrv.Namespace)(nil)
	_ export.Deallocator = (*guestdrv.Namespace)(nil)
	_ export.Mapper      = (*guestdrv.Namespace)(nil)
	_ export.Memory      = (*guestdrv.Namespace)(nil)
)

// descriptor is one of Get LBA Status.
type descriptor struct {
	first  uint64
	blocks uint32
}

// mapping is a controller that has Get LBA Status and answers as answer says.
func mapping(t *testing.T, answer func(cmd *nvme.Command) (list []descriptor, complete uint8, status nvme.Status)) (opened, *guestdrv.Namespace) {
	t.Helper()
	var dev *nvmetest.Device
	cfg := nvmetest.Config{Hooks: nvmetest.Hooks{
		Identify: func(cmd *nvme.Command, data []byte) {
			if nvme.CNS(cmd.CDW10) == nvme.CNSController {
				binary.LittleEndian.PutUint16(data[256:], binary.LittleEndian.Uint16(data[256:])|nvme.OACSLBAStatus)
			}
		},
		Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
			if qid != 0 || cmd.Opcode != nvme.AdminGetLBAStatus {
				return nvmetest.Verdict{}
			}
			list, complete, status := answer(cmd)
			b := make([]byte, cmd.LBAStatusBytes())
			binary.LittleEndian.PutUint32(b, uint32(len(list)))
			b[4] = complete
			for i, d := range list {
				binary.LittleEndian.PutUint64(b[8+16*i:], d.first)
				binary.LittleEndian.PutUint32(b[16+16*i:], d.blocks)
			}
			dev.WriteIOVA(cmd.PRP1, b)
			return nvmetest.Verdict{Action: nvmetest.Fail, Status: status}
		},
	}}
	dev = nvmetest.New(cfg)
	c, err := guestdrv.OpenDevice(ctx, dev.InProc(), testOptions())
	if err != nil {
		dev.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); dev.Close() })
	o := opened{Controller: c, dev: dev}
	return o, namespace(t, o, 1)
}

// TestExtentsAreWhatTheControllerSays compares with a naive model: a list of which blocks are allocated.
func TestExtentsAreWhatTheControllerSays(t *testing.T) {
	const blocks = 16384
	allocated := make([]bool, blocks)
	rng := rand.New(rand.NewPCG(1, 2))
	for at := 0; at < blocks; {
		n := min(1+rng.IntN(60), blocks-at)
		is := rng.IntN(2) == 0
		for i := range n {
			allocated[at+i] = is
		}
		at += n
	}
	asked := 0
	_, ns := mapping(t, func(cmd *nvme.Command) (list []descriptor, complete uint8, status nvme.Status) {
		asked++
		first, n := cmd.SLBA(), uint64(cmd.LBAStatusRange())
		if n == 0 {
			n = blocks - first
		}
		for at := first; at < first+n; at++ {
			if !allocated[at] {
				continue
			}
			if last := len(list) - 1; last >= 0 && list[last].first+uint64(list[last].blocks) == at {
				list[last].blocks++
				continue
			}
			if len(list) == 7 {
				return list, nvme.LBAStatusIncomplete, 0
			}
			list = append(list, descriptor{at, 1})
		}
		return list, nvme.LBAStatusComplete, 0
	})
	for range 50 {
		first := rng.IntN(blocks)
		n := 1 + rng.IntN(blocks-first)
		var got []bool
		last, seen := false, false
		err := ns.Extents(ctx, int64(first)*512, int64(n)*512, func(length int64, is bool) bool {
			if seen && is == last {
				t.Errorf("two pieces of one kind meet at block %d", first+len(got))
			}
			last, seen = is, true
			got = append(got, slices.Repeat([]bool{is}, int(length/512))...)
			return true
		})
		if err != nil || !slices.Equal(got, allocated[first:first+n]) {
			t.Fatalf("%d blocks from %d: %v, or not what is allocated", n, first, err)
		}
	}
	// Whoever has heard enough is asked no more, and nor is the controller.
	asked = 0
	calls := 0
	if err := ns.Extents(ctx, 0, blocks*512, func(int64, bool) bool { calls++; return false }); err != nil || calls != 1 || asked != 1 {
		t.Errorf("%v, %d calls, the controller was asked %d times", err, calls, asked)
	}
}

func TestExtentsOfALyingController(t *testing.T) {
	for name, c := range map[string]struct {
		list     []descriptor
		complete uint8
	}{
		"backwards":            {[]descriptor{{100, 10}, {50, 1}}, nvme.LBAStatusComplete},
		"overlap":              {[]descriptor{{100, 10}, {105, 10}}, nvme.LBAStatusComplete},
		"no blocks":            {[]descriptor{{100, 0}}, nvme.LBAStatusComplete},
		"before what is asked": {[]descriptor{{1, 10}}, nvme.LBAStatusComplete},
		"nothing, and more":    {nil, nvme.LBAStatusIncomplete},
	} {
		_, ns := mapping(t, func(*nvme.Command) ([]descriptor, uint8, nvme.Status) { return c.list, c.complete, 0 })
		total := int64(0)
		err := ns.Extents(ctx, 10*512, 1000*512, func(n int64, _ bool) bool { total += n; return true })
		if err == nil || !strings.Contains(err.Error(), "Get LBA Status is not in order") || total > 1000*512 {
			t.Errorf("%s: %v after %d bytes", name, err, total)
		}
	}
	// More than was asked for, even up to the end of numbers, is cut.
	_, ns := mapping(t, func(*nvme.Command) ([]descriptor, uint8, nvme.Status) {
		return []descriptor{{10, 1<<32 - 1}, {1<<64 - 1, 1}}, nvme.LBAStatusComplete, 0
	})
	total := int64(0)
	if err := ns.Extents(ctx, 10*512, 1000*512, func(n int64, is bool) bool { total += n; return is }); err != nil || total != 1000*512 {
		t.Errorf("%v, %d bytes", err, total)
	}
}

func TestExtentsWithoutAMap(t *testing.T) {
	all := func(ns *guestdrv.Namespace) {
		t.Helper()
		calls := 0
		if err := ns.Extents(ctx, 512, 8192, func(n int64, is bool) bool { calls++; return is && n == 8192 }); err != nil || calls != 1 {
			t.Errorf("%v, %d calls", err, calls)
		}
		if ns.CanMap() {
			t.Error("CanMap, after the controller said that it has no such map")
		}
	}
	all(namespace(t, openInProc(t, nvmetest.Config{}, testOptions()), 1))
	_, ns := mapping(t, func(*nvme.Command) ([]descriptor, uint8, nvme.Status) {
		return nil, 0, nvme.StatusInvalidField.WithDNR()
	})
	if !ns.CanMap() {
		t.Error("no CanMap, with OACS bit 9")
	}
	all(ns)
	if err := ns.Extents(ctx, 0, ns.Size()+512, func(int64, bool) bool { return true }); err == nil {
		t.Error("extents beyond the end")
	}
}

func TestForceUnitAccessAndDeallocate(t *testing.T) {
	var fua, plain, deallocate atomic.Int64
	c := openInProc(t, nvmetest.Config{NoCache: true, Hooks: nvmetest.Hooks{
		Identify: func(cmd *nvme.Command, data []byte) {
			if nvme.CNS(cmd.CDW10) == nvme.CNSNamespace {
				data[33] = nvme.DLFEATReadZeroes | nvme.DLFEATWZDealloc
				data[99] = nvme.NSATTRWriteProtected
			}
		},
		Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
			switch {
			case qid == 0:
			case cmd.Opcode == nvme.IOWrite && cmd.FUA():
				fua.Add(1)
			case cmd.Opcode == nvme.IOWriteZeroes && cmd.DEAC():
				deallocate.Add(1)
			default:
				plain.Add(1)
			}
			return nvmetest.Verdict{}
		},
	}}, testOptions())
	ns := namespace(t, c, 1)
	if !ns.CanDeallocate() || !ns.ReadsZeroes() || !ns.CanDiscard() || !ns.CanWriteZeroes() || ns.HasCache() || !ns.ReadOnly() {
		t.Error("not what Identify says")
	}
	data := randomBytes(300 << 10) // several commands
	if n, err := ns.WriteFUA(ctx, data, 512); n != len(data) || err != nil {
		t.Fatal(n, err)
	}
	if fua.Load() < 3 || plain.Load() != 0 {
		t.Errorf("%d writes with FUA, %d other commands", fua.Load(), plain.Load())
	}
	mustEqual(t, c.dev.Disk(1)[512:512+len(data)], data)
	if _, err := ns.WriteAt(data, 0); err != nil || plain.Load() == 0 {
		t.Errorf("%v, %d plain writes", err, plain.Load())
	}
	if err := ns.WriteZeroesDeallocate(ctx, 0, 4096); err != nil || deallocate.Load() != 1 {
		t.Errorf("%v, %d", err, deallocate.Load())
	}
	if n, err := ns.WriteFUA(ctx, data, ns.Size()); n != 0 || err == nil {
		t.Errorf("beyond the end: %d, %v", n, err)
	}
}
