package inproc_test

import (
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// TestPrioritiesUnderALimit: guestdrv asks for weighted round robin, and while a limit holds its commands back they go urgent ones first, then by weight. It counts commands, not time.
func TestPrioritiesUnderALimit(t *testing.T) {
	const depth = 60
	m := serve(t, hostmed.Config{CPUs: []int{-1}, Subsystems: []hostmed.SubsystemConfig{{
		Controllers: []hostmed.ControllerConfig{{Socket: name, Limits: hostmed.Limits{IOPS: hostmed.Limit{Rate: 100, Burst: 1}}}},
		Namespaces:  []hostmed.NamespaceConfig{{Spec: "null:size=64MiB"}},
	}}})
	c := open(t, m, name, guestdrv.Options{Queues: 1, DMASize: 16 << 20, Arbitration: &guestdrv.Arbitration{High: 8, Medium: 4, Low: 2}})
	buf, err := c.Alloc(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer buf.Free()
	classes := []guestdrv.Priority{guestdrv.PriorityLow, guestdrv.PriorityMedium, guestdrv.PriorityHigh, guestdrv.PriorityUrgent}
	var pairs []*guestdrv.QueuePair
	for _, p := range classes {
		q, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: depth, Priority: p, Poll: true})
		if err != nil {
			t.Fatal(err)
		}
		defer q.Close()
		pairs = append(pairs, q)
		ios := make([]guestdrv.IO, depth)
		for i := range ios {
			ios[i] = guestdrv.IO{Op: nvme.IORead, NSID: 1, Blocks: 8, IOVA: buf.IOVA()}
		}
		if n, err := q.Submit(ios); err != nil || n != depth {
			t.Fatal(n, err)
		}
	}
	// done is how many of each have ended. The urgent ones are counted last: what is counted before they are complete has overtaken them.
	var done [4]int
	others := func() int { return done[0] + done[1] + done[2] }
	reap := func(until func() bool) [4]int {
		for begin := time.Now(); !until(); time.Sleep(time.Millisecond) {
			if time.Since(begin) > time.Minute {
				t.Fatalf("%v in a minute", done)
			}
			for i, q := range pairs {
				var out [depth]guestdrv.Result
				n, err := q.Reap(out[:])
				if err != nil || n > 0 && !out[0].Status.OK() {
					t.Fatal(err, out[0].Status)
				}
				done[i] += n
			}
			if done[3] < depth && others() > 0 {
				t.Fatalf("others have gone before all that are urgent: %v", done)
			}
		}
		return done
	}
	// hostmed has seen the urgent ones when the first has ended. A turn that had begun before might still have given the others' queues a command.
	publish := func(pairs ...*guestdrv.QueuePair) {
		for _, q := range pairs {
			if err := q.Publish(); err != nil {
				t.Fatal(err)
			}
		}
	}
	publish(pairs[3])
	reap(func() bool { return done[3] > 0 })
	publish(pairs[:3]...)
	first := reap(func() bool { return done[3] == depth })
	at := others()
	then := reap(func() bool { return others() >= at+28 })
	if then[2] == depth {
		t.Fatalf("one second passed between two looks: %v, then %v", first, then)
	}
	for i, weight := range []int{2, 4, 8} {
		got, want := then[i]-first[i], (others()-at)*weight/14
		if got < want-4 || got > want+4 {
			t.Errorf("priority %v: %d of %d commands, not about %d", classes[i], got, others()-at, want)
		}
	}
	s, err := m.Stats(name)
	if err != nil || s.Throttled == 0 {
		t.Errorf("%+v, %v", s, err)
	}
}
