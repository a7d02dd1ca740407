package backends

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// TestHealth: a guest's SMART log has the health of the device, and a critical warning that the device gives while the guest runs is an event for it. Events
// of a kernel's device nobody tells hostmed: it looks, twice a minute.
func TestHealth(t *testing.T) {
	h := open(t)
	for _, kind := range []string{"nvme", "vfio"} {
		t.Run(kind, func(t *testing.T) {
			s := h.subject(t, kind)
			if out := h.Run(t, guestCommand+" smart "+s.m.device(0)); !strings.Contains(out, `"temperature":323`) {
				t.Errorf("the device's temperature is 323 K, and the guest sees %s", out)
			}
			for _, x := range []struct {
				bit   uint8 // of the critical warnings
				event string
			}{
				{1 << 0, "Spare"},
				{1 << 3, "Reliability"}, // the media are read-only
			} {
				guest := h.start(t, guestCommand+" warned "+s.m.device(0))
				s.m.says(t, "client connected")
				h.warn(t, s.d, x.bit)
				out := guest.wait()
				var w struct {
					Event    string
					Warnings uint8
				}
				if err := json.Unmarshal([]byte(out), &w); err != nil {
					t.Fatal(err)
				}
				if w.Warnings != x.bit || !strings.Contains(strings.ToLower(w.Event), strings.ToLower(x.event)) {
					t.Errorf("of warning %#x the guest hears %s", x.bit, out)
				}
				h.warn(t, s.d, 0)
			}
		})
	}
}

// warn has the device show these critical warnings.
func (h *host) warn(t *testing.T, d *disk, bits uint8) {
	t.Helper()
	args := map[string]any{"path": fmt.Sprintf("/machine/peripheral/%s-dev", d.Port), "property": "smart_critical_warning", "value": bits}
	if _, err := h.QMP(t.Context(), "qom-set", args); err != nil {
		t.Fatal(err)
	}
}
