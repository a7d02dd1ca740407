package ctrl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

//go:generate go test -run ^TestPassthroughTable$ -update .

var update = flag.Bool("update", false, "write docs/passthrough.md anew")

// TestPassthroughTable holds the end of docs/passthrough.md to the rules.
func TestPassthroughTable(t *testing.T) {
	const doc = "../../../docs/passthrough.md"
	const mark = "<!-- What follows is written by make gen, from hostmed/internal/ctrl. -->\n"
	was, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	head, _, ok := strings.Cut(string(was), mark)
	if !ok {
		t.Fatalf("%s has no line %q", doc, mark)
	}
	want := head + mark + passthroughTables()
	switch {
	case want == string(was):
	case !*update:
		t.Fatalf("%s is not what the rules say: run make gen", doc)
	default:
		if err := os.WriteFile(doc, []byte(want), 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

func passthroughTables() string {
	var b strings.Builder
	b.WriteString("\n## Admin commands\n\n| Command | Opcode | Answered by | Why |\n|---|---|---|---|\n")
	why := ""
	for _, r := range adminRules {
		if r.why != "as above" {
			why = r.why
		}
		fmt.Fprintf(&b, "| %s | %02Xh | %s | %s |\n", nvme.AdminOpcodeName(r.op), r.op, r.by, why)
	}
	v := adminRuleOf(0xff)
	fmt.Fprintf(&b, "| vendor specific | %02Xh to FFh | %s | %s |\n", firstVendorAdmin, v.by, v.why)
	b.WriteString("| all others | | nobody | not known |\n")
	b.WriteString("\n## Log pages\n\n| Log page | Identifier | Answered by | Why |\n|---|---|---|---|\n")
	for _, r := range logRules {
		fmt.Fprintf(&b, "| %v | %02Xh | %s | %s |\n", r.lid, uint8(r.lid), r.by, r.why)
	}
	b.WriteString("| all others that the controller has | | hostmed | they are of the guest's own controller |\n")
	return b.String()
}

// fakeDevice is a real device under a namespace.
type fakeDevice struct {
	backend.Backend
	dev backend.Device

	mu     sync.Mutex
	seen   []nvme.Command
	data   [][]byte // what went to the device
	logs   map[nvme.LogPage][]byte
	answer byte // of data that comes from it
	status nvme.Status
	err    error
}

func (d *fakeDevice) Info() backend.Info      { return backend.Info{Blocks: 1 << 20, LBAShift: 9} }
func (d *fakeDevice) Device() *backend.Device { return &d.dev }

func (d *fakeDevice) Admin(c *nvme.Command, data []byte) (uint32, nvme.Status, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c.Opcode == nvme.AdminGetLogPage {
		if d.err != nil {
			return 0, 0, d.err
		}
		if page, ok := d.logs[c.LID()]; ok {
			copy(data, page)
			return 0, 0, nil
		}
		return 0, nvme.StatusInvalidLogPage.WithDNR(), nil
	}
	d.seen = append(d.seen, *c)
	if c.Opcode&3 == 1 {
		d.data = append(d.data, bytes.Clone(data))
	}
	if c.Opcode&3 == 2 {
		copy(data, bytes.Repeat([]byte{d.answer}, len(data)))
	}
	return 0x1234, d.status, d.err
}

// greedy is a device that says of every command that it has it and that it is harmless.
func greedy() *fakeDevice {
	d := &fakeDevice{logs: map[nvme.LogPage][]byte{}}
	d.dev.NSID, d.dev.Whole = 9, true
	d.dev.Controller.OACS, d.dev.Controller.AVSCC = 0xffff, 1
	d.dev.Controller.EDSTT, d.dev.Controller.DSTO = 30, 1
	for i := range d.dev.Effects.Admin {
		d.dev.Effects.Admin[i] = nvme.EffectSupported
	}
	return d
}

// deviceHost is a driver of a controller with a namespace 3 of d.
func deviceHost(t *testing.T, ds ...*fakeDevice) (*host, chan bool) {
	cfg := testConfig()
	cfg.Mode = Trap
	cfg.Namespaces = nil
	for i, d := range ds {
		cfg.Namespaces = append(cfg.Namespaces, Namespace{NSID: uint32(3 + i), Backend: d, Info: d.Info()})
	}
	woken := make(chan bool, 1000)
	cfg.Wake = func() { woken <- true }
	return newEnabled(t, cfg), woken
}

// later runs a command that may be completed in the background.
func (h *host) later(woken chan bool, cmd nvme.Command) ring.Entry {
	h.Helper()
	cid := h.push(cmd)
	h.ring()
	for end := time.After(20 * time.Second); ; {
		if es := h.reap(); len(es) > 0 {
			if len(es) != 1 || es[0].CID() != cid {
				h.Fatalf("completions %+v, want one of %d", es, cid)
			}
			return es[0]
		}
		select {
		case <-woken:
			h.c.AdminKick()
		case <-end:
			h.Fatalf("%s is not completed", cmd.Describe(true))
		}
	}
}

// TestPassthroughRules: each command has one policy, and it is what is done.
func TestPassthroughRules(t *testing.T) {
	seen := map[uint8]bool{}
	for _, r := range adminRules {
		if seen[r.op] {
			t.Errorf("%s has two rules", nvme.AdminOpcodeName(r.op))
		}
		seen[r.op] = true
	}
	for op := range 256 {
		if name := nvme.AdminOpcodeName(uint8(op)); !strings.HasPrefix(name, "Admin Opcode") && !seen[uint8(op)] {
			t.Errorf("%s has no rule", name)
		}
	}
	for _, op := range newEnabled(t, testConfig()).c.adminOpcodes() {
		if r := adminRuleOf(op); r.by != byHostmed {
			t.Errorf("%s: answered by hostmed, and the rule says %v", nvme.AdminOpcodeName(op), r.by)
		}
	}

	// A device that wants everything gets what the rules give it.
	for _, vendor := range []bool{false, true} {
		d := greedy()
		d.dev.Vendor = vendor
		h, woken := deviceHost(t, d)
		for op := range 256 {
			cmd := nvme.Command{Opcode: uint8(op), NSID: 3, PRP1: dataIOVA, CDW10: 1}
			r := adminRuleOf(uint8(op))
			passes := r.by == byDevice && (uint8(op) == nvme.AdminDeviceSelfTest || vendor && op&3 != 3)
			if r.by == byHostmed && slices.Contains(h.c.adminOpcodes(), uint8(op)) {
				continue
			}
			d.seen = nil
			st := h.later(woken, cmd).Status()
			if passes != (len(d.seen) == 1) || passes != st.OK() || !passes && st.Code() != nvme.StatusInvalidOpcode {
				t.Errorf("vendor %v, %s: %v, and the device has seen %d", vendor, nvme.AdminOpcodeName(uint8(op)), st, len(d.seen))
			}
		}
	}
}

// TestPassthroughNeedsAll has conditions of passing a command on that do not hold, one at a time.
func TestPassthroughNeedsAll(t *testing.T) {
	selfTest := nvme.Command{Opcode: nvme.AdminDeviceSelfTest, NSID: 3, CDW10: selfTestShort}
	for name, x := range map[string]func(*fakeDevice){
		"a slice":                func(d *fakeDevice) { d.dev.Whole = false },
		"not supported":          func(d *fakeDevice) { d.dev.Effects.Admin[nvme.AdminDeviceSelfTest] = 0 },
		"changes blocks":         func(d *fakeDevice) { d.dev.Effects.Admin[nvme.AdminDeviceSelfTest] |= nvme.EffectBlockContent },
		"changes namespaces":     func(d *fakeDevice) { d.dev.Effects.Admin[nvme.AdminDeviceSelfTest] |= nvme.EffectNamespaceCap },
		"wants all for itself":   func(d *fakeDevice) { d.dev.Effects.Admin[nvme.AdminDeviceSelfTest] |= aloneInController },
		"not in OACS":            func(d *fakeDevice) { d.dev.Controller.OACS &^= nvme.OACSSelfTest },
		"no effects log":         func(d *fakeDevice) { d.dev.Effects = nvme.CommandEffects{} },
		"changes the controller": func(d *fakeDevice) { d.dev.Effects.Admin[nvme.AdminDeviceSelfTest] |= nvme.EffectControllerCap },
	} {
		d := greedy()
		x(d)
		h, woken := deviceHost(t, d)
		if st := h.later(woken, selfTest).Status(); st.Code() != nvme.StatusInvalidOpcode || len(d.seen) > 0 {
			t.Errorf("%s: %v", name, st)
		}
		if id := h.c.controllerData(); id.OACS&nvme.OACSSelfTest != 0 || h.c.hasLog(nvme.LogSelfTest) || h.c.commandEffects(nvme.CSINVM).Admin[nvme.AdminDeviceSelfTest] != 0 {
			t.Errorf("%s: the controller says that it has it", name)
		}
	}
	a, b := greedy(), greedy()
	h, woken := deviceHost(t, a, b)
	if st := h.later(woken, selfTest).Status(); st.Code() != nvme.StatusInvalidOpcode || len(a.seen)+len(b.seen) > 0 {
		t.Errorf("two namespaces: %v", st)
	}
}

func TestPassthroughSelfTest(t *testing.T) {
	d := greedy()
	h, woken := deviceHost(t, d)
	if id := h.c.controllerData(); id.OACS&nvme.OACSSelfTest == 0 || id.EDSTT != 30 || id.DSTO != 1 {
		t.Errorf("Identify: OACS %#x, EDSTT %d, DSTO %d", id.OACS, id.EDSTT, id.DSTO)
	}
	if e := h.c.commandEffects(nvme.CSINVM).Admin[nvme.AdminDeviceSelfTest]; e&nvme.EffectSupported == 0 {
		t.Error("not in the effects log")
	}
	for nsid, want := range map[uint32]uint32{0: 0, 3: 9, nvme.NSIDAll: 9} {
		d.seen = nil
		e := h.later(woken, nvme.Command{Opcode: nvme.AdminDeviceSelfTest, NSID: nsid, CDW10: 0xfffffff0 | selfTestExtended, CDW11: 5, CDW15: 6})
		if !e.Status().OK() || e.Result() != 0x1234 || len(d.seen) != 1 || d.seen[0] != (nvme.Command{Opcode: nvme.AdminDeviceSelfTest, NSID: want, CDW10: selfTestExtended}) {
			t.Errorf("namespace %d: %v, %+v", nsid, e.Status(), d.seen)
		}
	}
	d.seen = nil
	for _, cmd := range []nvme.Command{{NSID: 9, CDW10: 1}, {NSID: 4, CDW10: 1}, {NSID: 3, CDW10: 0xe}, {NSID: 3}} {
		cmd.Opcode = nvme.AdminDeviceSelfTest
		if st := h.later(woken, cmd).Status(); st.OK() || len(d.seen) > 0 {
			t.Errorf("%+v: %v", cmd, st)
		}
	}
	d.status = nvme.StatusSelfTestInProgress.WithDNR()
	if st := h.later(woken, nvme.Command{Opcode: nvme.AdminDeviceSelfTest, NSID: 3, CDW10: 1}).Status(); st.Code() != nvme.StatusSelfTestInProgress || !st.DNR() {
		t.Errorf("the device's status came as %v", st)
	}
	d.err = errors.New("gone")
	if st := h.later(woken, nvme.Command{Opcode: nvme.AdminDeviceSelfTest, NSID: 3, CDW10: 1}).Status(); st != nvme.StatusInternalError.WithMore() {
		t.Errorf("without the device: %v", st)
	}
	d.err = nil

	page := make([]byte, selfTestBytes)
	for i := range 20 {
		page[4+i*selfTestResult] = noSelfTestEntry
	}
	page[4] = 0x10
	binary.LittleEndian.PutUint32(page[4+selfTestNSID:], 9)
	others := page[4+selfTestResult:][:selfTestResult] // another namespace has failed, at a block
	for i := range others {
		others[i] = 0xee
	}
	others[0], others[selfTestValid] = 0x17, 0xf
	unused := page[4+2*selfTestResult:][:selfTestResult]
	binary.LittleEndian.PutUint32(unused[selfTestNSID:], 5)
	d.logs[nvme.LogSelfTest] = page
	var cmd nvme.Command
	if err := cmd.SetGetLogPage(nvme.LogSelfTest, nvme.NSIDAll, 0, selfTestBytes, false); err != nil {
		t.Fatal(err)
	}
	cmd.PRP1 = dataIOVA
	if st := h.later(woken, cmd).Status(); !st.OK() {
		t.Fatal(st)
	}
	got := h.data(selfTestBytes)
	if got[4] != 0x10 || binary.LittleEndian.Uint32(got[4+selfTestNSID:]) != 3 || got[4+19*selfTestResult] != noSelfTestEntry {
		t.Errorf("self-test log % x", got[:64])
	}
	if x := got[4+selfTestResult:]; x[0] != 0x17 || x[selfTestValid] != 0xc || !bytes.Equal(x[selfTestNSID:selfTestSCT], make([]byte, 12)) || x[selfTestSCT] != 0xee {
		t.Errorf("another namespace's result: % x", x[:selfTestResult])
	}
	if x := got[4+2*selfTestResult:]; !bytes.Equal(x[1:selfTestResult], make([]byte, selfTestResult-1)) {
		t.Errorf("an unused result: % x", x[:selfTestResult])
	}
}

func TestPassthroughVendor(t *testing.T) {
	d := greedy()
	d.dev.Vendor, d.answer = true, 0xab
	h, woken := deviceHost(t, d)
	cmd := nvme.Command{Opcode: 0xc2, NSID: 3, PRP1: dataIOVA, CDW10: 16, CDW12: 1, CDW13: 2, CDW14: 3, CDW15: 4}
	e := h.later(woken, cmd)
	if !e.Status().OK() || !bytes.Equal(h.data(64), bytes.Repeat([]byte{0xab}, 64)) {
		t.Errorf("%v, % x", e.Status(), h.data(64))
	}
	cmd.PRP1, cmd.NSID = 0, 9
	if cmd.CID = 0; len(d.seen) != 1 || d.seen[0] != cmd {
		t.Errorf("the device has seen %+v, want %+v", d.seen, cmd)
	}
	cmd = nvme.Command{Opcode: 0xc5, PRP1: dataIOVA, CDW10: 16}
	if st := h.later(woken, cmd).Status(); !st.OK() || len(d.data) != 1 || !bytes.Equal(d.data[0], bytes.Repeat([]byte{0xab}, 64)) {
		t.Errorf("%v, the device got % x", st, d.data)
	}
	d.seen = nil
	for name, cmd := range map[string]nvme.Command{
		"more than MDTS": {Opcode: 0xc2, PRP1: dataIOVA, CDW10: ^uint32(0)},
		"metadata":       {Opcode: 0xc2, PRP1: dataIOVA, CDW10: 1, CDW11: 1},
		"both ways":      {Opcode: 0xc3, PRP1: dataIOVA, CDW10: 1},
		"no memory":      {Opcode: 0xc1, PRP1: 0x1000, CDW10: 1},
		"no namespace":   {Opcode: 0xc2, NSID: 77, PRP1: dataIOVA, CDW10: 1},
	} {
		if st := h.later(woken, cmd).Status(); st.OK() || len(d.seen) > 0 {
			t.Errorf("%s: %v, the device has seen %+v", name, st, d.seen)
		}
	}
}

// TestDeviceHealth: the guest's SMART log has the device's health and the guest's own counters, and a device that talks nonsense, or does not
// answer, does no harm.
func TestDeviceHealth(t *testing.T) {
	d := greedy()
	d.dev.Whole = false // a slice shows it, too
	h, woken := deviceHost(t, d)
	smart := func() *nvme.SMARTLog {
		t.Helper()
		var cmd nvme.Command
		if err := cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, 0, 512, false); err != nil {
			t.Fatal(err)
		}
		cmd.PRP1 = dataIOVA
		if st := h.later(woken, cmd).Status(); !st.OK() {
			t.Fatal(st)
		}
		l := new(nvme.SMARTLog)
		copy(l.Bytes()[:], h.data(512))
		return l
	}
	if l := smart(); l.Temperature() != compositeTemperature || l.AvailableSpare != 100 || l.CriticalWarning != 0 {
		t.Errorf("of a device without the log: %+v", l)
	}
	set := func(l nvme.SMARTLog, kelvin uint16) {
		l.SetTemperature(kelvin)
		d.mu.Lock()
		d.logs[nvme.LogSMART] = bytes.Clone(l.Bytes()[:])
		d.mu.Unlock()
	}
	set(nvme.SMARTLog{AvailableSpare: 71, SpareThreshold: 20, PercentageUsed: 44, WarningMinutes: 5, PowerCycles: nvme.Uint128{Lo: 999}, TempSensor: [8]uint16{301, 0xffff}}, 333)
	l := smart()
	if l.Temperature() != 333 || l.AvailableSpare != 71 || l.SpareThreshold != 20 || l.PercentageUsed != 44 || l.WarningMinutes != 5 || l.TempSensor != [8]uint16{301} {
		t.Errorf("%+v", l)
	}
	if l.PowerCycles.Lo == 999 || l.HostReads.Lo != 10 {
		t.Errorf("counters that are not the guest's: %+v", l)
	}
	d.mu.Lock()
	d.err = errors.New("it hangs")
	d.mu.Unlock()
	if l := smart(); l.Temperature() != 333 || l.AvailableSpare != 71 {
		t.Errorf("of a device that does not answer: %+v", l)
	}
	d.mu.Lock()
	d.err = nil
	d.mu.Unlock()

	// Its warnings are events of the guest's.
	aer := nvme.Command{Opcode: nvme.AdminAsyncEventRequest}
	var events nvme.Command
	events.SetSetFeatures(nvme.FeatureAsyncEvents, 0, nvme.SMARTWarningSpare|nvme.SMARTWarningTemperature)
	h.ok(events)
	h.push(aer)
	h.ring()
	set(nvme.SMARTLog{AvailableSpare: 5, SpareThreshold: 20, CriticalWarning: nvme.SMARTWarningSpare | 0xc0}, 60000)
	var cmd nvme.Command
	if err := cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, 0, 512, true); err != nil {
		t.Fatal(err)
	}
	cmd.PRP1 = dataIOVA
	h.push(cmd)
	h.ring()
	var got []ring.Entry
	for end := time.After(20 * time.Second); len(got) < 2; {
		select {
		case <-woken:
			h.c.AdminKick()
			got = append(got, h.reap()...)
		case <-end:
			t.Fatalf("completions %+v, want the log and an event", got)
		}
	}
	event := nvme.MakeAsyncEvent(nvme.EventSMART, nvme.EventSMARTSpare, nvme.LogSMART)
	if got[0].Result() != uint32(event) && got[1].Result() != uint32(event) {
		t.Errorf("%#x and %#x, want the event %#x", got[0].Result(), got[1].Result(), uint32(event))
	}
	if l := smart(); l.CriticalWarning != nvme.SMARTWarningSpare || l.Temperature() != compositeTemperature {
		t.Errorf("%+v", l)
	}
}
