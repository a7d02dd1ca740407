package backend

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

func TestAtomicUnits(t *testing.T) {
	for _, c := range []struct {
		name                 string
		awun, awupf          uint32 // blocks
		nawun, nawupf        uint32 // 0: the namespace says nothing
		nabsn, nabspf        uint32 // 0: none
		nabo                 uint16
		first, most          uint64
		wantWrite, wantFails uint32
	}{
		{"nothing is promised", 1, 1, 0, 0, 0, 0, 0, 0, 128, 1, 1},
		{"the controller's", 64, 8, 0, 0, 0, 0, 0, 5, 128, 64, 8},
		{"the namespace's", 8, 1, 64, 32, 0, 0, 0, 5, 128, 64, 32},
		{"one of the namespace's", 8, 4, 64, 0, 0, 0, 0, 0, 128, 64, 4},
		{"no power of two", 100, 7, 0, 0, 0, 0, 0, 0, 128, 64, 4},
		{"more than a command", 256, 256, 0, 0, 0, 0, 0, 0, 128, 128, 128},
		{"more when power fails than otherwise", 4, 16, 0, 0, 0, 0, 0, 0, 128, 4, 4},
		{"boundaries", 64, 64, 0, 0, 128, 32, 0, 0, 128, 64, 32},
		{"a slice at a boundary", 64, 64, 0, 0, 64, 64, 0, 6400, 128, 64, 64},
		{"a slice at half of one", 64, 64, 0, 0, 64, 64, 0, 6432, 128, 32, 32},
		{"a slice at an odd block", 64, 64, 0, 0, 64, 64, 0, 6401, 128, 1, 1},
		{"without boundaries anywhere", 64, 64, 0, 0, 0, 0, 0, 6401, 128, 64, 64},
		{"boundaries with an offset", 64, 64, 0, 0, 64, 64, 16, 0, 128, 16, 16},
		{"a slice that begins there", 64, 64, 0, 0, 64, 64, 16, 16, 128, 64, 64},
		{"an odd boundary", 64, 64, 0, 0, 12, 64, 0, 0, 128, 4, 4},
	} {
		z := func(n uint32) nvme.ZeroBased16 { v, _ := nvme.ToZeroBased16(max(n, 1)); return v }
		ctrl := &nvme.IdentifyController{AWUN: z(c.awun), AWUPF: z(c.awupf)}
		ns := &nvme.IdentifyNamespace{NAWUN: z(c.nawun), NAWUPF: z(c.nawupf), NABSN: z(c.nabsn), NABSPF: z(c.nabspf), NABO: c.nabo}
		if c.nawun+c.nawupf > 0 {
			ns.NSFEAT = nvme.NSFEATAtomics
		}
		write, fails := atomicUnits(ctrl, ns, c.first, c.most)
		if write != c.wantWrite || fails != c.wantFails {
			t.Errorf("%s: %d and %d, want %d and %d", c.name, write, fails, c.wantWrite, c.wantFails)
		}
	}
}

// TestAtomicUnitsAreTheDevices: whatever a device says, a write that is promised as a whole is one that the device promises.
func TestAtomicUnitsAreTheDevices(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		field := func(name string) nvme.ZeroBased16 {
			return nvme.ZeroBased16(rapid.OneOf(rapid.Uint16Range(0, 40), rapid.Uint16()).Draw(t, name))
		}
		ctrl := &nvme.IdentifyController{AWUN: field("awun"), AWUPF: field("awupf")}
		ns := &nvme.IdentifyNamespace{
			NSFEAT: nvme.NSFEATAtomics, NAWUN: field("nawun"), NAWUPF: field("nawupf"), NABSN: field("nabsn"), NABSPF: field("nabspf"),
			NABO: uint16(field("nabo")),
		}
		first := rapid.Uint64Range(0, 1<<40).Draw(t, "first")
		most := rapid.Uint64Range(1, 300).Draw(t, "most")
		write, fails := atomicUnits(ctrl, ns, first, most)
		check := func(unit uint32, size, all, boundary nvme.ZeroBased16) {
			if size == 0 {
				size = all
			}
			if unit&(unit-1) != 0 || uint64(unit) > most || unit > size.Count() {
				t.Fatalf("%d of %d blocks", unit, size.Count())
			}
			for k := range uint64(200) { // units of the slice
				from := first + (k+rapid.Uint64Range(0, 1<<30).Draw(t, "k"))*uint64(unit)
				b := uint64(boundary.Count())
				if boundary != 0 && (from-uint64(ns.NABO)+b<<41)/b != (from+uint64(unit)-1-uint64(ns.NABO)+b<<41)/b && unit > 1 {
					t.Fatalf("the unit of %d at %d crosses a boundary of %d with offset %d", unit, from, b, ns.NABO)
				}
			}
		}
		check(write, ns.NAWUN, ctrl.AWUN, ns.NABSN)
		check(fails, ns.NAWUPF, ctrl.AWUPF, ns.NABSPF)
		if fails > write {
			t.Fatal("more is promised when power fails")
		}
	})
}

// TestVFIOPromises: what guests are told of writes and discards is the device's, where the slice begins at its multiples.
func TestVFIOPromises(t *testing.T) {
	change := func(ns *nvme.IdentifyNamespace) {
		ns.NSFEAT = nvme.NSFEATOptPerf | nvme.NSFEATAtomics
		ns.NPWG, ns.NPWA, ns.NPDG, ns.NPDA, ns.NOWS, ns.NOIOB = 7, 7, 15, 31, 63, 256
		ns.NAWUN, ns.NAWUPF, ns.NABSPF = 63, 15, 31
		ns.DLFEAT = nvme.DLFEATReadUnknown
	}
	cfg := nvmetest.Config{Namespaces: []nvmetest.Namespace{{Blocks: 4096, LBADS: 9}}, Hooks: nvmetest.Hooks{Identify: func(cmd *nvme.Command, data []byte) {
		if cmd.CNS() == nvme.CNSNamespace {
			var ns nvme.IdentifyNamespace
			copy(ns.Bytes()[:], data)
			change(&ns)
			copy(data, ns.Bytes()[:])
		}
	}}}
	type promises struct{ write, optimal, discard, boundary, atomic, fails uint32 }
	for _, c := range []struct {
		first uint64
		want  promises
	}{
		{0, promises{8, 64, 32, 256, 64, 16}},
		{256, promises{8, 64, 32, 256, 64, 16}},
		{8, promises{8, 0, 1, 0, 64, 8}},
		{1, promises{1, 0, 1, 0, 64, 1}},
	} {
		r, err := vfioOver(t, Spec{Offset: c.first * 512}, cfg)
		opened(t)(r, err)
		i := r.Info()
		if got := (promises{i.WriteBlocks, i.OptimalWrite, i.OptimalBlocks, i.Boundary, i.AtomicWrite, i.AtomicPowerFail}); got != c.want {
			t.Errorf("from block %d: %+v, want %+v", c.first, got, c.want)
		}
		if !i.Discard || i.DiscardZeroes || !i.WriteZeroes || !i.ZeroesStay {
			t.Errorf("from block %d: %+v", c.first, i)
		}
		if r.slice.Atomic != uint64(i.AtomicWrite)*512 {
			t.Errorf("commands are cut at %d bytes", r.slice.Atomic)
		}
		rules, err := parseFaults("torn@first=1")
		if err != nil {
			t.Fatal(err)
		}
		if i := withFaults(r, r.spec, rules).Info(); i.AtomicWrite != 0 || i.AtomicPowerFail != 0 {
			t.Error("writes that are torn are promised as a whole")
		}
	}
	change = func(ns *nvme.IdentifyNamespace) { ns.DLFEAT = nvme.DLFEATReadZeroes | nvme.DLFEATWZDealloc }
	r, err := vfioOver(t, Spec{Offset: 512}, cfg)
	opened(t)(r, err)
	if i := r.Info(); i.WriteBlocks != 1 || i.OptimalWrite != 0 || i.OptimalBlocks != 1 || i.Boundary != 0 || i.AtomicWrite != 1 || i.AtomicPowerFail != 1 || !i.DiscardZeroes || i.ZeroesStay {
		t.Errorf("of a device that says nothing: %+v", i)
	}
}

// TestNVMeCharKeepsUnits: the commands of a request are cut at multiples of what the device writes as a whole, whatever memory the data is in and
// whatever the kernel takes.
func TestNVMeCharKeepsUnits(t *testing.T) {
	for _, zeroes := range []bool{true, false} {
		d := newFakeChar()
		d.ns.NSFEAT, d.ns.NAWUN, d.ns.NAWUPF = nvme.NSFEATAtomics, 31, 7
		if !zeroes {
			d.ctrl.ONCS &^= nvme.ONCSWriteZeroes
		}
		b := openFake(t, d, Spec{Kind: KindNVMe, Path: "/dev/ng0n1", Offset: 3 * 512})
		if i := b.Info(); i.AtomicWrite != 32 || i.AtomicPowerFail != 8 {
			t.Fatalf("%+v", i)
		}
		q, _ := fakeCharQueue(t, b, d, 256)
		mem := guestMemory(t, 4<<20)
		const unit = 32
		rapid.Check(t, func(rt *rapid.T) {
			first := rapid.Uint64Range(0, 2000).Draw(rt, "first")
			blocks := rapid.Uint64Range(1, 600).Draw(rt, "blocks")
			r := &Request{Op: rapid.SampledFrom([]Op{OpRead, OpWrite, OpWriteZeroes}).Draw(rt, "op"), Off: first * 512, Len: blocks * 512}
			if r.Op != OpWriteZeroes {
				r.Vec, _ = drawPieces(rt, mem, r.Len)
			}
			d.seen = nil
			mustRun(t, q, r)
			at := first
			for i, c := range d.seen {
				from, n := uint64(c.CDW11)<<32|uint64(c.CDW10)-3, uint64(c.CDW12&0xffff)+1
				if from != at || i > 0 && from%unit != 0 {
					rt.Fatalf("command %d of %v of %d blocks at %d begins at %d", i, r.Op, blocks, first, from)
				}
				at += n
			}
			if at != first+blocks {
				rt.Fatalf("%v of %d blocks at %d ends at %d", r.Op, blocks, first, at)
			}
		})
	}
}
