package ctrl

import (
	"bytes"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// says sets the SMART log of the device.
func (d *fakeDevice) says(l nvme.SMARTLog, kelvin uint16) {
	l.SetTemperature(kelvin)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.logs[nvme.LogSMART] = bytes.Clone(l.Bytes()[:])
}

// event waits for the completion of an Asynchronous Event Request, and reads its log page so that the next may come.
func (h *host) event(woken chan bool) nvme.AsyncEvent {
	h.Helper()
	var got []ring.Entry
	for end := time.After(20 * time.Second); len(got) == 0; {
		select {
		case <-woken:
			h.c.AdminKick()
			got = h.reap()
		case <-end:
			h.Fatal("no event comes")
		}
	}
	if len(got) != 1 || !got[0].Status().OK() {
		h.Fatalf("completions %+v, want one event", got)
	}
	var cmd nvme.Command
	if err := cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, 0, 512, false); err != nil {
		h.Fatal(err)
	}
	cmd.PRP1 = dataIOVA
	if st := h.later(woken, cmd).Status(); !st.OK() {
		h.Fatal(st)
	}
	return nvme.AsyncEvent(got[0].Result())
}

// TestDeviceWarns: a warning of a device is an event for a guest that wants to hear of it, without its asking; each kind by its own
// information, once as long as it lasts, and a temperature by the guest's own threshold.
func TestDeviceWarns(t *testing.T) {
	for _, asked := range []bool{true, false} { // the device tells of it, or nobody does
		d := greedy()
		d.dev.Whole = false
		d.says(nvme.SMARTLog{AvailableSpare: 100}, 300)
		cfg := testConfig()
		cfg.Mode = Trap
		cfg.HealthPeriod = time.Hour
		if !asked {
			cfg.HealthPeriod = time.Millisecond
		}
		cfg.Namespaces = []Namespace{{NSID: 3, Backend: d, Info: d.Info()}}
		woken := make(chan bool, 1<<20)
		cfg.Wake = func() { woken <- true }
		h := newEnabled(t, cfg)
		var set nvme.Command
		set.SetSetFeatures(nvme.FeatureAsyncEvents, 0, nvme.SMARTWarningSpare|nvme.SMARTWarningTemperature|nvme.SMARTWarningReadOnly)
		h.ok(set)
		for _, x := range []struct {
			warning uint8
			kelvin  uint16
			info    uint8
		}{
			{nvme.SMARTWarningSpare | nvme.SMARTWarningReliability, 300, nvme.EventSMARTSpare},
			{nvme.SMARTWarningSpare, warningTemperature, nvme.EventSMARTTemperature},
			{nvme.SMARTWarningReadOnly, 300, nvme.EventSMARTReliability},
			{0, warningTemperature, nvme.EventSMARTTemperature},
		} {
			d.says(nvme.SMARTLog{AvailableSpare: 9, SpareThreshold: 10, CriticalWarning: x.warning}, x.kelvin)
			h.push(aer())
			h.ring()
			if asked {
				h.c.AskHealth()
				h.c.AskHealth() // of two namespaces
			}
			if got, want := h.event(woken), nvme.MakeAsyncEvent(nvme.EventSMART, x.info, nvme.LogSMART); got != want {
				t.Errorf("warnings %#x, %d K: %v, want %v", x.warning, x.kelvin, got, want)
			}
		}
		h.c.Close()
	}
}

// TestNobodyAsksForHealth: a guest that does not want to hear of warnings costs the device nothing.
func TestNobodyAsksForHealth(t *testing.T) {
	d := greedy()
	h, woken := deviceHost(t, d)
	h.c.cfg.HealthPeriod = time.Millisecond
	var set nvme.Command
	set.SetSetFeatures(nvme.FeatureAsyncEvents, 0, uint32(nvme.EventConfigNamespace))
	h.ok(set)
	if h.c.health.asking || h.c.health.stop != nil {
		t.Error("the device is asked")
	}
	set.SetSetFeatures(nvme.FeatureAsyncEvents, 0, nvme.SMARTWarningSpare)
	h.ok(set)
	if !h.c.health.asking || h.c.health.stop == nil {
		t.Error("the device is not asked")
	}
	set.SetSetFeatures(nvme.FeatureAsyncEvents, 0, 0)
	h.ok(set)
	for h.c.health.asking {
		<-woken
		h.c.AdminKick()
	}
	if h.c.health.stop != nil {
		t.Error("it is asked again")
	}
}
