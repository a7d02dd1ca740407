package doctor

import (
	"math/bits"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// fault is one rule, broken on purpose against a live mediator.
type fault struct {
	rule  string
	side  Side
	queue int // that the finding is about
	// run breaks it. What it returns, if anything, is done between the first sample and the second.
	run  func(g *guest) (meanwhile func())
	want string // in the sentence
	mend bool   // a doorbell message mends it
}

// short is how long the tests have queues stand still: nothing here is slow but the machine.
var short = Options{Samples: 3, Still: 60 * time.Millisecond}

// The driver's faults, by the names that Rules has.
var driverFaults = map[string]fault{
	"tail not rung": {"R1", Driver, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		// As a driver without a barrier: it loads the event index before it stores the tail, and the device arms between the two.
		old, ring := uint32(0), true
		for ring {
			p.do(1)
			old = p.sq.Tail()
			ring = dbbuf.NeedEvent(p.ei[0].Load(), (old+3)%guestSize, old)
		}
		p.asleep()
		p.flush(3)
		p.word[0].Store(p.sq.Tail())
		return nil
	}, ": the driver stored its tail and did not ring although ", true},
	"CQ head not rung": {"R1", Driver, 1, func(g *guest) func() {
		g.enable(true)
		p := g.starved(1)
		p.word[1].Store(p.cq.Head())
		return nil
	}, "did not ring although 0 is in [0,3)", true},
	"registers only": {"R15", Driver, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		for range 3 {
			p.flush(1)
			g.must(g.ring(nvme.SQTailDoorbell(1, 0), p.sq.Tail()))
		}
		return nil
	}, "rang 3 times, last with tail 3", false},
	"event index overwritten": {"R18", Driver, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		p.do(5)
		p.asleep()
		p.ei[0].Store(13)
		return nil
	}, "stored event index 5, and somebody else 13", true},
	"big endian": {"R20", Driver, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		p.flush(3)
		p.word[0].Store(bits.ReverseBytes32(p.sq.Tail()))
		g.must(g.ring(nvme.SQTailDoorbell(1, 0), p.sq.Tail()))
		return nil
	}, "is 3 with its bytes swapped", false},
	"page is a ring": {"R24", Driver, -1, func(g *guest) func() {
		g.enable(false)
		_, shadow := g.alloc()
		p := g.half(1, guestSize, guestSize)
		g.create(p, guestSize)
		g.share(shadow, p.sqAt)
		return nil
	}, "the event-index page at 0x10", false},
	"pages unmapped": {"R25", Driver, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		p.do(3)
		p.asleep()
		g.must(g.c.DMAUnmap(g.Context(), pagesAt, 2*shm.PageSize))
		p.asleep()
		return func() {
			p.flush(1)
			p.ei[0].Store(2) // as a device that polled left it
			g.must(p.tail.Publish(p.sq.Tail()))
		}
	}, "has unmapped its doorbell pages, and the driver wrote a command to entry 3", false},
	"pages not sent again": {"R28", Driver, 1, func(g *guest) func() {
		g.enable(true)
		shadow, ei := g.shadow, g.ei
		g.pair(1, guestSize, guestSize).do(3)
		g.enable(false)
		g.shadow, g.ei = shadow, ei // the driver takes them to be in use
		p := g.pair(1, guestSize, guestSize)
		p.do(1) // event index 0, as the driver has zeroed it: this one it rings for
		p.asleep()
		return func() {
			p.flush(1)
			g.must(p.tail.Publish(p.sq.Tail()))
		}
	}, "last configured in enable 1, and the driver wrote a command to entry 1", false},
	"tail beyond the ring": {"R30", Driver, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, guestSize)
		p.word[0].Store(0x4711)
		g.must(g.ring(nvme.SQTailDoorbell(1, 0), 0))
		return nil
	}, "SQ tail 18193 in a ring of 16", false},
	"CQ head beyond the tail": {"R30", Driver, 1, func(g *guest) func() {
		g.enable(true)
		p := g.pair(1, guestSize, 4)
		p.flush(3)
		g.must(p.tail.Publish(p.sq.Tail()))
		p.reap(3)
		p.flush(1)
		g.must(p.tail.Publish(p.sq.Tail()))
		g.blocked(1)
		p.word[1].Store(77)
		g.must(g.ring(nvme.CQHeadDoorbell(1, 0), 77))
		return nil
	}, "CQ head 77 with head 0", false},
	"no such queue": {"R30", Driver, -1, func(g *guest) func() {
		g.enable(true)
		g.pair(1, guestSize, guestSize).do(1)
		g.sample()
		g.must(g.ring(nvme.SQTailDoorbell(7, 0), 1))
		return nil
	}, "a doorbell of queue 7, which does not exist", false},
}

// starved makes queue qid with a CQ of 4 that the driver has taken three completions out of without saying so: two commands more, and the device sleeps.
func (g *guest) starved(qid uint16) *pair {
	g.Helper()
	p := g.pair(qid, guestSize, 4)
	p.flush(3)
	g.must(p.tail.Publish(p.sq.Tail()))
	p.reap(3)
	p.flush(2)
	g.must(p.tail.Publish(p.sq.Tail()))
	g.blocked(qid)
	return p
}

// blocked waits until the device sleeps because the CQ of queue qid is full.
func (g *guest) blocked(qid uint16) {
	g.Helper()
	g.eventually("a queue that is blocked", func() bool {
		for _, q := range g.sample().Controllers[0].Queues {
			if q.QID == qid {
				return q.Blocked && q.State == "armed"
			}
		}
		return false
	})
}

// diagnosed samples until the doctor has a broken rule to tell, and returns that; there must be one.
func (g *guest) diagnosed(o Options) Finding {
	g.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(o.Still / 4) {
		g.sample()
		var broken []Finding
		all := o.Diagnose(g.samples)
		for _, f := range all {
			if f.Verdict == Broken {
				broken = append(broken, f)
			}
		}
		switch len(broken) {
		case 0:
		case 1:
			return broken[0]
		default:
			g.Fatalf("several rules: %+v", broken)
		}
	}
	g.Fatalf("nothing is wrong: %+v\n%+v", o.Diagnose(g.samples), g.samples[len(g.samples)-1])
	return Finding{}
}

// TestFaults breaks each rule that Rules says can be seen, on the side that it names, and has the doctor name it.
func TestFaults(t *testing.T) {
	for name, f := range driverFaults {
		t.Run("driver/"+name, func(t *testing.T) {
			t.Parallel()
			g := newGuest(t, hostmed.ControllerConfig{Doorbells: hostmed.Shadow})
			meanwhile := f.run(g)
			if meanwhile != nil {
				g.sample()
				meanwhile()
			}
			g.named(f)
		})
	}
}

// named checks that the doctor finds f, and nothing else, and that it says the same from a file of the samples.
func (g *guest) named(f fault) {
	g.Helper()
	got := g.diagnosed(short)
	if got.Rule != f.rule || got.Side != f.side || got.Queue != f.queue || !strings.Contains(got.Text, f.want) {
		g.Fatalf("%+v\nwant %s of the %s in queue %d: %q", got, f.rule, f.side, f.queue, f.want)
	}
	g.Log(got.Text)
	if got.Doubt != "" {
		g.Log("  doubt:", got.Doubt)
	}
	if f.mend {
		if !got.Kickable() {
			g.Errorf("not to be kicked: %+v", got)
		}
		if _, err := g.m.Kick(g.Context(), g.socket, uint16(f.queue)); err != nil {
			g.Fatal(err)
		}
		for range 20 {
			g.sample()
			time.Sleep(short.Still / 5)
		}
		if v := Worst(short.Diagnose(g.samples)); v == Broken {
			g.Errorf("after a kick: %+v", short.Diagnose(g.samples))
		}
	}
}
