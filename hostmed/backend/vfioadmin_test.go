package backend

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/hostnvme"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// administrable is a device that has logs, Device Self-test, and vendor specific commands, of which it remembers the last.
type administrable struct {
	mu   sync.Mutex
	last nvme.Command
	hold bool // what it gets it keeps
}

func (a *administrable) config(namespaces int) nvmetest.Config {
	c := nvmetest.Config{Hooks: nvmetest.Hooks{
		Identify: func(cmd *nvme.Command, data []byte) {
			if cmd.CNS() == nvme.CNSController {
				var id nvme.IdentifyController
				copy(id.Bytes()[:], data)
				id.LPA, id.AVSCC = nvme.LPACommandEffects, 1
				id.OACS |= nvme.OACSSelfTest
				copy(data, id.Bytes()[:])
			}
		},
		Log: func(cmd *nvme.Command, data []byte) {
			switch cmd.LID() {
			case nvme.LogCommandEffects:
				var l nvme.CommandEffects
				l.Admin[nvme.AdminDeviceSelfTest] = nvme.EffectSupported
				copy(data, l.Bytes()[:])
			case nvme.LogSMART:
				copy(data, (&nvme.SMARTLog{AvailableSpare: 42}).Bytes()[:])
			}
		},
		Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
			a.mu.Lock()
			defer a.mu.Unlock()
			ask := cmd.Opcode == nvme.AdminDeviceSelfTest || cmd.Opcode == nvme.AdminGetLogPage && cmd.LID() == nvme.LogSMART
			if qid == 0 && ask && a.hold {
				return nvmetest.Verdict{Action: nvmetest.Hold}
			}
			return nvmetest.Verdict{}
		},
		Admin: func(cmd *nvme.Command, _ []byte) (nvme.Status, uint32) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.last = *cmd
			return nvme.StatusSelfTestInProgress.WithDNR(), 3
		},
	}}
	for range namespaces {
		c.Namespaces = append(c.Namespaces, nvmetest.Namespace{Blocks: 1024, LBADS: 9})
	}
	return c
}

func (a *administrable) holds(on bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hold = on
}

func smartLog() (cmd nvme.Command, data []byte) {
	_ = cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, 0, 512, true)
	return cmd, make([]byte, 512)
}

func TestVFIOAdministered(t *testing.T) {
	a := &administrable{}
	r, err := vfioOver(t, Spec{NSID: 2, Vendor: true}, a.config(2))
	opened(t)(r, err)
	if d := r.Device(); d.NSID != 2 || !d.Whole || !d.Vendor || d.Controller.OACS&nvme.OACSSelfTest == 0 || d.Effects.Admin[nvme.AdminDeviceSelfTest] != nvme.EffectSupported {
		t.Errorf("%d %v %v, effects of a self-test %#x", d.NSID, d.Whole, d.Vendor, d.Effects.Admin[nvme.AdminDeviceSelfTest])
	}
	cmd, data := smartLog()
	var l nvme.SMARTLog
	if _, st, err := r.Admin(&cmd, data); err != nil || !st.OK() || data[3] != 42 {
		t.Errorf("SMART: %v, %v, %+v", st, err, l)
	}
	// Nothing but what Admin says gets there.
	all := nvme.Command{Opcode: nvme.AdminDeviceSelfTest, Flags: 3, CID: 77, NSID: 2, MPTR: 5, PRP1: 4096, PRP2: 8192, CDW10: 10, CDW11: 11, CDW12: 12, CDW13: 13, CDW14: 14, CDW15: 15}
	dw0, st, err := r.Admin(&all, nil)
	if err != nil || st != nvme.StatusSelfTestInProgress.WithDNR() || dw0 != 3 {
		t.Errorf("%v, %v, %d", st, err, dw0)
	}
	all.Flags, all.MPTR, all.PRP1, all.PRP2, all.CID = 0, 0, 0, 0, a.last.CID
	if a.last != all {
		t.Errorf("the device has seen %+v, want %+v", a.last, all)
	}
	if _, st, err := r.Admin(&nvme.Command{Opcode: 0xc2}, make([]byte, hostnvme.MaxAsk+4)); err != nil || st.Code() != nvme.StatusInvalidField {
		t.Errorf("too much data: %v, %v", st, err)
	}

	slice, err := vfioOver(t, Spec{Offset: 4096}, a.config(1))
	opened(t)(slice, err)
	if slice.Device().Whole || slice.Device().Vendor {
		t.Error("a slice is the whole")
	}
	if _, err := vfioOver(t, Spec{Size: 4096, Vendor: true}, a.config(1)); err == nil || !strings.Contains(err.Error(), "leave out either") {
		t.Errorf("vendor of a slice: %v", err)
	}
	// A device that has no effects log.
	plain, err := vfioOver(t, Spec{}, nvmetest.Config{})
	opened(t)(plain, err)
	if plain.Device().Effects != (nvme.CommandEffects{}) || !plain.Device().Whole {
		t.Error("effects out of nothing")
	}
}

// TestVFIOAdminUnderReset: a log page that a reset of the device comes over is read after it; what else it comes over ends with an error, since nobody knows
// what of it was done.
func TestVFIOAdminUnderReset(t *testing.T) {
	a := &administrable{}
	r, err := vfioOver(t, Spec{}, a.config(1))
	opened(t)(r, err)
	for _, log := range []bool{true, false} {
		a.holds(true)
		cmd, data := smartLog()
		if !log {
			cmd, data = nvme.Command{Opcode: nvme.AdminDeviceSelfTest, NSID: 1, CDW10: 1}, nil
		}
		end := make(chan error, 1)
		go func() {
			_, st, err := r.Admin(&cmd, data)
			end <- errors.Join(err, st.Err())
		}()
		for r.model.Held() == 0 {
			time.Sleep(time.Millisecond)
		}
		a.holds(false)
		if err := r.dev.Reset(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := <-end; log && (err != nil || data[3] != 42) || !log && !errors.Is(err, queue.ErrReset) {
			t.Errorf("log page %v: %v", log, err)
		}
	}
}

// TestVFIOAdminAndClose: a command that the device does not end keeps neither Close nor another namespace's.
func TestVFIOAdminAndClose(t *testing.T) {
	a := &administrable{}
	r, err := vfioOver(t, Spec{NSID: 1}, a.config(2))
	opened(t)(r, err)
	other, err := r.again(Spec{NSID: 2})
	opened(t)(other, err)
	a.holds(true)
	ends := make(chan error, 2)
	for range cap(ends) { // one is with the device, the other waits for it
		go func() {
			cmd, data := smartLog()
			_, _, err := r.Admin(&cmd, data)
			ends <- err
		}()
	}
	for r.model.Held() == 0 {
		time.Sleep(time.Millisecond)
	}
	a.holds(false)
	cmd, data := smartLog()
	if _, st, err := other.Admin(&cmd, data); err != nil || !st.OK() {
		t.Errorf("another namespace's: %v, %v", st, err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	for range cap(ends) {
		if err := <-ends; err == nil {
			t.Error("a command that did not end has ended well")
		}
	}
	if _, _, err := r.Admin(&cmd, data); err == nil {
		t.Error("a command after Close")
	}
	if _, st, err := other.Admin(&cmd, data); err != nil || !st.OK() || !bytes.Equal(data[3:4], []byte{42}) {
		t.Errorf("another namespace's, after Close: %v, %v", st, err)
	}
}

// TestVFIOWarns: a critical warning of the device is an event of each namespace on it.
func TestVFIOWarns(t *testing.T) {
	a := &administrable{}
	r, err := vfioOver(t, Spec{}, a.config(1))
	opened(t)(r, err)
	events := make(chan Event, 8)
	r.Watch(func(e Event) { events <- e })
	for !r.model.Event(nvme.MakeAsyncEvent(nvme.EventSMART, nvme.EventSMARTReliability, nvme.LogSMART)) {
		time.Sleep(time.Millisecond)
	}
	if e := <-events; e != EventHealth {
		t.Errorf("event %d", e)
	}
}
