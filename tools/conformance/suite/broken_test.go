package suite

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// broken is a device with something wrong: what is set replaces the call of the same name.
type broken struct {
	device.Device
	read32 func(off, v uint32) uint32      // changes what was read
	ring   func(off, v uint32) (pass bool) // loses a doorbell
}

func (b *broken) Read32(off uint32) (uint32, error) {
	v, err := b.Device.Read32(off)
	if b.read32 != nil {
		v = b.read32(off, v)
	}
	return v, err
}

func (b *broken) Doorbell(off uint32) device.Doorbell {
	bell := b.Device.Doorbell(off)
	return device.Doorbell{Ring: func(v uint32) error {
		if b.ring != nil && !b.ring(off, v) {
			return nil
		}
		return bell.Ring(v)
	}}
}

// runBroken runs cases against a hostmed that brake has made worse; it is called for each connection.
func runBroken(t *testing.T, filter string, timeout time.Duration, brake func(n int, b *broken)) map[string]Result {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	serve(t, hostmed.Config{Controllers: []hostmed.ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=16MiB"}, Doorbells: hostmed.Trap}}})
	n := 0
	results, err := Run(t.Context(), Config{Filter: filter, Timeout: timeout, Open: func(ctx context.Context) (device.Device, error) {
		dev, err := opener(socket)(ctx)
		if err != nil {
			return nil, err
		}
		b := &broken{Device: dev}
		n++
		brake(n, b)
		return b, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	byID := map[string]Result{}
	for _, r := range results {
		byID[r.Case.ID] = r
	}
	return byID
}

func wantResult(t *testing.T, all map[string]Result, id string, o Outcome, says string) {
	t.Helper()
	if r := all[id]; r.Outcome != o || !strings.Contains(r.Seen, says) {
		t.Errorf("%s: %s, %q; want %s, %q", id, r.Outcome, r.Seen, o, says)
	}
}

// TestAHangIsAFailure: it names the queue, and cases that do without the queue pass before and after.
func TestAHangIsAFailure(t *testing.T) {
	const four = "[qf]*.[cp][qho]*[ilns][del]" // each that hangs takes all of the time
	all := runBroken(t, four, 2*time.Second, func(_ int, b *broken) {
		b.ring = func(off, _ uint32) bool { return off != nvme.SQTailDoorbell(1, 0) }
	})
	wantResult(t, all, "queue.cq.id", Passed, "")
	wantResult(t, all, "queue.phase", Failed, "for SQ 1, CID 0x0 (READ nsid=1 slba=0x0 nlb=1): CSTS=0x1")
	wantResult(t, all, "queue.cq.full", Failed, "for CQ 1 to be full")
	wantResult(t, all, "feature.power.beyond", Passed, "") // after them
}

func TestARegisterThatLiesIsFound(t *testing.T) {
	all := runBroken(t, "*.c*", defaultTimeout, func(_ int, b *broken) {
		b.read32 = func(off, v uint32) uint32 {
			if off == nvme.RegCAP {
				return v ^ 0x10000 // CQR, in the half only
			}
			return v
		}
	})
	wantResult(t, all, "reg.cap.halves", Failed, "halves")
	wantResult(t, all, "reg.cap.mqes", Passed, "")
}

// TestAControllerThatIsNeverReady: the register is named, and nothing else is tried with it for ever.
func TestAControllerThatIsNeverReady(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	serve(t, hostmed.Config{Controllers: []hostmed.ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=16MiB"}}}})
	_, err := Run(t.Context(), Config{Timeout: 300 * time.Millisecond, Open: func(ctx context.Context) (device.Device, error) {
		dev, err := opener(socket)(ctx)
		if err != nil {
			return nil, err
		}
		return &broken{Device: dev, read32: func(off, v uint32) uint32 {
			if off == nvme.RegCSTS {
				return 0
			}
			return v
		}}, nil
	}})
	if err == nil || !strings.Contains(err.Error(), "CSTS.RDY=1 after CC.EN was set: CSTS=0x0, CC=0x460001") {
		t.Errorf("got %v", err)
	}
}

// TestALostConnectionIsOpenedAgain: the case that lost it fails, those after it run.
func TestALostConnectionIsOpenedAgain(t *testing.T) {
	all := runBroken(t, "queue.*", defaultTimeout, func(n int, b *broken) {
		if n > 1 {
			return
		}
		rings := 0
		b.ring = func(off, _ uint32) bool {
			if off == nvme.SQTailDoorbell(1, 0) {
				if rings++; rings == 2 {
					b.Device.Close()
				}
			}
			return true
		}
	})
	lost := 0
	for id, r := range all {
		if r.Outcome == Failed {
			lost++
			if !strings.Contains(r.Seen, "the device is gone") && !strings.Contains(r.Seen, "client is closed") {
				t.Errorf("%s: %s", id, r.Seen)
			}
		}
	}
	if lost != 1 {
		t.Errorf("%d cases failed, want the one that lost the connection", lost)
	}
}

// TestWhatCannotBeRunSaysSo: a namespace that is not there, and a filter that fits nothing.
func TestWhatCannotBeRunSaysSo(t *testing.T) {
	if _, err := Cases("["); err == nil {
		t.Error("a malformed glob")
	}
	if _, err := Cases("nothing.*"); err == nil || !strings.Contains(err.Error(), "--list") {
		t.Errorf("no case: %v", err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	serve(t, hostmed.Config{Controllers: []hostmed.ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=1MiB"}}}})
	results, err := Run(t.Context(), Config{Open: opener(socket), Filter: "io.read.*"})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if r.Outcome != Skipped || !strings.Contains(r.Seen, "smaller than") {
			t.Errorf("%s on a small namespace: %s, %s", r.Case.ID, r.Outcome, r.Seen)
		}
	}
}
