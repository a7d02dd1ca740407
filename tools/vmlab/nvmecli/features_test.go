package nvmecli

import (
	"encoding/binary"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// feature is one that nvme-cli gets and sets. Values are Dword 0.
type feature struct {
	fid      nvme.FeatureID
	args     string // of nvme-cli, for both
	def      uint32 // default
	driver   uint32 // what the kernel has set, if it has
	set      uint32
	save     uint32 // what is saved; 0: the feature is not saveable
	byDriver bool   // the kernel sets it whenever it enables the controller
	onlyGet  bool   // the kernel, or what is there, does not let it be set
}

var featureTable = []feature{
	{fid: nvme.FeatureArbitration, def: 7, set: 0x04030201, save: 0x04030202},
	{fid: nvme.FeaturePowerManagement, def: 0, set: 1, save: 1},
	{fid: nvme.FeatureTemperature, def: 343, set: 350, save: 351},
	{fid: nvme.FeatureErrorRecovery, args: "-n 1", def: 0, set: 20, save: 30},
	{fid: nvme.FeatureWriteCache, def: 1, set: 0, save: 0},
	{fid: nvme.FeatureQueues, def: 0x003f003f, driver: 0x00010001, byDriver: true, onlyGet: true},
	{fid: nvme.FeatureCoalescing, def: 0, set: 0x0101, save: 0x0102},
	{fid: nvme.FeatureWriteAtomicity, def: 0, set: 1, save: 1},
	{fid: nvme.FeatureAsyncEvents, def: 0, driver: uint32(nvme.EventConfigNamespace), set: uint32(nvme.EventConfigNamespace) | 2, save: uint32(nvme.EventConfigNamespace), byDriver: true},
	{fid: nvme.FeatureKeepAlive, def: 0, onlyGet: true},
	{fid: nvme.FeatureCommandSetProfile, def: 0, set: 0},
}

var gotFeature = regexp.MustCompile(`get-feature:0x([0-9a-f]+) \([^)]*\), ([A-Za-z]+)[a-z ]*:(?:0x)?([0-9a-f]+)`)

// selects are what nvme-cli calls the values of SEL.
var selects = []string{"Current", "Default", "Saved", "Supported"}

// features: get-feature with each SEL, set-feature, set-feature --save, and what is left of them after a reset.
func features(t *testing.T, b *bench) {
	state := b.featureState(t, 0, 1, 2, 3)
	for _, f := range featureTable {
		want := [4]uint32{f.def, f.def, f.def, nvme.FeatureCapChangeable}
		if f.driver != 0 {
			want[0] = f.driver
		}
		if f.saveable() {
			want[3] |= nvme.FeatureCapSaveable
		}
		if f.fid == nvme.FeatureErrorRecovery {
			want[3] |= nvme.FeatureCapNamespace
		}
		if got := state[f.fid]; got != want {
			t.Errorf("get-feature %v: current, default, saved, supported %#x, want %#x", f.fid, got, want)
		}
	}

	var sets strings.Builder
	for _, f := range featureTable {
		if f.onlyGet {
			continue
		}
		fmt.Fprintf(&sets, "nvme set-feature %s -f %d -V %d %s || exit\n", b.ctrl(), f.fid, f.set, f.args)
	}
	b.Run(t, sets.String())
	set := b.featureState(t, 0)
	sets.Reset()
	for _, f := range featureTable {
		if f.saveable() {
			fmt.Fprintf(&sets, "nvme set-feature %s -f %d -V %d %s --save || exit\n", b.ctrl(), f.fid, f.save, f.args)
		}
	}
	b.Run(t, sets.String())
	saved := b.featureState(t, 0, 2)
	b.Run(t, "nvme reset "+b.ctrl())
	reset := b.featureState(t, 0, 2)
	for _, f := range featureTable {
		before := state[f.fid]
		wantSet, wantSaved, wantReset := before, before, before
		if !f.onlyGet {
			wantSet[0], wantSaved[0] = f.set, f.set
		}
		if f.saveable() {
			wantSaved[0], wantSaved[2] = f.save, f.save
			wantReset = wantSaved
		}
		if f.byDriver {
			wantReset[0] = f.driver
		}
		for _, x := range []struct {
			when      string
			got, want [4]uint32
			sels      []int
		}{{"set", set[f.fid], wantSet, []int{0}}, {"saved", saved[f.fid], wantSaved, []int{0, 2}}, {"after a reset", reset[f.fid], wantReset, []int{0, 2}}} {
			for _, sel := range x.sels {
				if x.got[sel] != x.want[sel] {
					t.Errorf("%v, %s: %s value %#x, want %#x", f.fid, x.when, selects[sel], x.got[sel], x.want[sel])
				}
			}
		}
	}
	b.says(t, "nvme get-feature "+b.ctrl()+" -f 4 -H", "Temperature Threshold         (TMPTH): 78 °C (351 K)", "Over Temperature Threshold")

	ctrl := b.ctrl()
	b.fails(t, nvme.StatusFeatureNotSaveable, "nvme set-feature "+ctrl+" -f 0x19 -V 0 --save")
	b.fails(t, nvme.StatusInvalidField, "nvme set-feature "+ctrl+" -f 2 -V 3")
	b.fails(t, nvme.StatusInvalidField, "nvme set-feature "+ctrl+" -f 0x7f -V 0")
	b.fails(t, nvme.StatusInvalidField, "nvme set-feature "+ctrl+" -f 5 -n 9 -V 0") // could be a namespace, and is none
	b.fails(t, nvme.StatusInvalidNamespace, "nvme set-feature "+ctrl+" -f 5 -n 99 -V 0")
	b.fails(t, nvme.StatusFeatureNotPerNamespace, "nvme set-feature "+ctrl+" -f 4 -n 1 -V 350")

	thresholdsAndVectors(t, b)
	powerStates(t, b)
	dataFeatures(t, b)
}

func (f *feature) saveable() bool { return f.save != 0 || f.fid == nvme.FeatureWriteCache }

// featureState gets every feature of the table with some values of SEL.
func (b *bench) featureState(t *testing.T, sels ...int) map[nvme.FeatureID][4]uint32 {
	t.Helper()
	var script strings.Builder
	for _, f := range featureTable {
		for _, sel := range sels {
			fmt.Fprintf(&script, "nvme get-feature %s -f %d -s %d %s || exit\n", b.ctrl(), f.fid, sel, f.args)
		}
	}
	out := b.Run(t, script.String())
	state := map[nvme.FeatureID][4]uint32{}
	for _, m := range gotFeature.FindAllStringSubmatch(out, -1) {
		fid, _ := strconv.ParseUint(m[1], 16, 8)
		v, _ := strconv.ParseUint(m[3], 16, 32)
		for sel, name := range selects {
			if name == m[2] {
				values := state[nvme.FeatureID(fid)]
				values[sel] = uint32(v)
				state[nvme.FeatureID(fid)] = values
			}
		}
	}
	if len(state) != len(featureTable) {
		t.Fatalf("%d of %d features in\n%s", len(state), len(featureTable), out)
	}
	return state
}

func (b *bench) feature(t *testing.T, args string) uint32 {
	t.Helper()
	m := gotFeature.FindStringSubmatch(b.Run(t, "nvme get-feature "+b.ctrl()+" "+args))
	if m == nil {
		t.Fatalf("get-feature %s prints no value", args)
	}
	v, err := strconv.ParseUint(m[3], 16, 32)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(v)
}

// thresholdsAndVectors: features of several values, told apart by bits of CDW11.
func thresholdsAndVectors(t *testing.T, b *bench) {
	const under = 1 << 20
	b.Run(t, fmt.Sprintf("nvme set-feature %s -f 4 -V %#x", b.ctrl(), under|200))
	if got := b.feature(t, fmt.Sprintf("-f 4 --cdw11=%#x", under)); got&0xffff != 200 {
		t.Errorf("threshold below: %d, want 200", got)
	}
	if got := b.feature(t, "-f 4"); got != 351 {
		t.Errorf("threshold above: %d, want 351, as before", got)
	}
	const uncoalesced = 1 << 16
	b.Run(t, fmt.Sprintf("nvme set-feature %s -f 9 -V %#x", b.ctrl(), uncoalesced|2))
	for vector, want := range []uint32{0, 1, uncoalesced | 2} {
		if got := b.feature(t, fmt.Sprintf("-f 9 --cdw11=%d", vector)); got != want {
			t.Errorf("vector %d: %#x, want %#x", vector, got, want)
		}
	}
}

// powerStates: a non-operational state is left by the first I/O, for the last operational one.
func powerStates(t *testing.T, b *bench) {
	b.Run(t, "nvme set-feature "+b.ctrl()+" -f 2 -V 0")
	b.Run(t, "nvme set-feature "+b.ctrl()+" -f 2 -V 2")
	if got := b.feature(t, "-f 2"); got != 2 {
		t.Errorf("power state %d, want 2", got)
	}
	b.Run(t, "dd if="+b.block(1)+" of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null")
	if got := b.feature(t, "-f 2"); got != 0 {
		t.Errorf("power state %d after I/O, want 0", got)
	}
}

// dataFeatures: features whose value is a structure.
func dataFeatures(t *testing.T, b *bench) {
	raw := func(args string) []byte {
		t.Helper()
		b.Run(t, "nvme get-feature "+b.ctrl()+" --raw-binary "+args+" > /tmp/feature")
		return b.get(t, "/tmp/feature")
	}
	const then = 0x123456789ab // milliseconds
	b.Run(t, fmt.Sprintf("nvme set-feature %s -f 0xe -V %#x", b.ctrl(), then))
	if stamp := raw("-f 0xe -l 8"); len(stamp) != 8 {
		t.Errorf("timestamp: % x", stamp)
	} else if v := binary.LittleEndian.Uint64(stamp); v&(1<<48-1) < then || v&(1<<48-1) > then+60_000 || v>>48 != nvme.TimestampOriginHost<<nvme.TimestampOriginShift {
		t.Errorf("timestamp: %#x, set to %#x a moment ago", v, then)
	}
	b.says(t, "nvme get-feature "+b.ctrl()+" -f 0xe -H", "initialized with a Timestamp value using a Set Features command")

	b.says(t, "nvme get-feature "+b.ctrl()+" -f 0x16 -H", "Advanced Command Retry Enable (ACRE): False") // the kernel lets only itself set it

	// The kernel wants to go to the idle state from both others.
	if on := b.feature(t, "-f 0xc"); on != 1 {
		t.Errorf("APST: %d, want 1: the kernel uses it", on)
	}
	table := raw("-f 0xc -l 256")
	for ps, want := range []uint64{2, 2, 0} {
		if len(table) != 256 {
			t.Fatalf("APST: %d bytes", len(table))
		}
		if e := binary.LittleEndian.Uint64(table[8*ps:]); e>>3&0x1f != want || (e>>8 != 0) != (want != 0) {
			t.Errorf("APST: from state %d: %#x, want to state %d", ps, e, want)
		}
	}
}
