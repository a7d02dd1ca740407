package guestdrv_test

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// told is what a device was told of arbitration since it was last asked.
type told struct {
	mu       sync.Mutex
	ams      []uint8
	prio     map[uint16]uint8 // by queue
	features []nvme.Arbitration
}

func (x *told) hooks() nvmetest.Hooks {
	x.prio = map[uint16]uint8{}
	return nvmetest.Hooks{
		Write: func(off uint32, v uint64) bool {
			if cc := nvme.CC(v); off == nvme.RegCC && cc.EN() {
				x.mu.Lock()
				defer x.mu.Unlock()
				x.ams = append(x.ams, cc.AMS())
			}
			return true
		},
		Command: func(qid uint16, cmd *nvme.Command) nvmetest.Verdict {
			x.mu.Lock()
			defer x.mu.Unlock()
			switch {
			case qid == 0 && cmd.Opcode == nvme.AdminCreateSQ:
				x.prio[uint16(cmd.CDW10)] = cmd.SQPriority()
			case qid == 0 && cmd.Opcode == nvme.AdminSetFeatures && cmd.FID() == nvme.FeatureArbitration:
				x.features = append(x.features, nvme.Arbitration(cmd.CDW11))
			}
			return nvmetest.Verdict{}
		},
	}
}

// TestPriorities: what the controller is told, at first and again after a reset.
func TestPriorities(t *testing.T) {
	x := &told{}
	cfg := nvmetest.Config{CAP: nvme.CAP(0).WithMQES(1023).WithTO(2).WithCSS(nvme.CAPCSSNVM).WithAMS(nvme.CAPAMSWeighted), Hooks: x.hooks()}
	o := testOptions()
	o.Queues, o.Priority = 1, guestdrv.PriorityHigh
	o.Arbitration = &guestdrv.Arbitration{High: 256, Medium: 4, Burst: 8}
	dev := nvmetest.New(cfg)
	t.Cleanup(dev.Close)
	c, err := guestdrv.OpenDevice(ctx, dev.InProc(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	wants := map[guestdrv.Priority]uint8{guestdrv.PriorityUrgent: 0, guestdrv.PriorityHigh: 1, guestdrv.PriorityMedium: 2, guestdrv.PriorityLow: 3, guestdrv.PriorityDefault: 2}
	for p := range wants {
		q, err := c.NewQueuePair(guestdrv.QueuePairOptions{Priority: p, Poll: true})
		if err != nil {
			t.Fatal(err)
		}
		last := uint8(0xff)
		x.mu.Lock()
		for qid, prio := range x.prio {
			if qid != 1 {
				last = prio
			} else if prio != 1 {
				t.Errorf("the plain API's queue has QPRIO %d", prio)
			}
			if qid != 1 {
				delete(x.prio, qid)
			}
		}
		x.mu.Unlock()
		if last != wants[p] {
			t.Errorf("%v is QPRIO %d, not %d", p, last, wants[p])
		}
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	}
	check := func(enables int) {
		t.Helper()
		x.mu.Lock()
		defer x.mu.Unlock()
		if len(x.ams) != enables || x.ams[enables-1] != nvme.AMSWeighted || x.prio[1] != 1 {
			t.Errorf("CC.AMS %v, QPRIO %v", x.ams, x.prio)
		}
		if v := x.features; len(v) != enables || v[enables-1] != nvme.MakeArbitration(3, 0, 3, 255) {
			t.Errorf("features %#x", v)
		}
		clear(x.prio)
	}
	check(1)
	dev.Fault()
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, 512); ; { // what meets the reset fails
		if _, err := ns.ReadAt(buf, 0); err == nil && c.Stats().Resets > 0 {
			break
		} else if err != nil && !errors.Is(err, guestdrv.ErrReset) {
			t.Fatal(err)
		}
	}
	check(2)
}

// TestNoPriorities: without being asked the driver says nothing of them; with a controller that has none, and with options that cannot be, it says so.
func TestNoPriorities(t *testing.T) {
	open := func(x *told, o guestdrv.Options) (*guestdrv.Controller, error) {
		dev := nvmetest.New(nvmetest.Config{Hooks: x.hooks()})
		t.Cleanup(dev.Close)
		return guestdrv.OpenDevice(ctx, dev.InProc(), o)
	}
	x := &told{}
	c, err := open(x, testOptions())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.NewQueuePair(guestdrv.QueuePairOptions{Priority: guestdrv.PriorityLow}); err == nil || !strings.Contains(err.Error(), "priority low") || !strings.Contains(err.Error(), "Options.Arbitration") {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if slices.Max(x.ams) != nvme.AMSRoundRobin || len(x.features) != 0 {
		t.Errorf("CC.AMS %v, features %v", x.ams, x.features)
	}
	o := testOptions()
	o.Arbitration = &guestdrv.Arbitration{}
	if _, err := open(&told{}, o); !errors.Is(err, guestdrv.ErrUnsupported) || !strings.Contains(err.Error(), "CAP.AMS") {
		t.Error(err)
	}
	for says, change := range map[string]func(*guestdrv.Options){
		"1 to 256":         func(o *guestdrv.Options) { o.Arbitration = &guestdrv.Arbitration{High: 257} },
		"power of two":     func(o *guestdrv.Options) { o.Arbitration = &guestdrv.Arbitration{Burst: 3} },
		"priority urgent":  func(o *guestdrv.Options) { o.Priority = guestdrv.PriorityUrgent },
		"unknown priority": func(o *guestdrv.Options) { o.Priority = 9 },
	} {
		o := testOptions()
		change(&o)
		if _, err := open(&told{}, o); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v does not say %q", err, says)
		}
	}
	for p := guestdrv.PriorityDefault; p <= guestdrv.PriorityLow; p++ {
		if got, err := guestdrv.ParsePriority(p.String()); err != nil || got != p {
			t.Errorf("%v: %v, %v", p, got, err)
		}
	}
	if _, err := guestdrv.ParsePriority("top"); err == nil {
		t.Error("there is a priority top")
	}
}
