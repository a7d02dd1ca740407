package doctor

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/shared/inspect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const second = int64(1e9)

// armed is a queue of 32 entries that sleeps since 100 ms after the clock began, with 9 consumed.
func armed() inspect.Queue {
	return inspect.Queue{
		QID: 3, CQID: 3, Size: 32, CQSize: 32, State: "armed", Vector: -1, CQTail: 9, Room: 31, Commands: 9, Completions: 9, Armed: 1,
		SQ: inspect.Bell{Private: 9, Page: 9, Event: 9, Asked: 9, Slot: inspect.Memory{Size: 4}}, CQ: inspect.Bell{Page: 9},
		ArmedAt: second / 10, ArmIndex: 9, ArmSaw: 9, LastFetch: second / 20,
	}
}

// over is a controller with q, in so many samples a tenth of a second apart, from half a second on.
func over(n int, q inspect.Queue, change ...func(i int, c *inspect.Controller)) (samples []Sample) {
	for i := range n {
		c := inspect.Controller{
			Socket: "/run/guest", CNTLID: 1, Mode: "shadow", Shared: true, Shadow: 0x1000, EventIndex: 0x2000, Configs: 1, Enables: 1, ConfigEnable: 1, CC: 1, CSTS: 1,
			Queues: []inspect.Queue{q},
		}
		for _, f := range change {
			f(i, &c)
		}
		samples = append(samples, Sample{Snapshot: inspect.Snapshot{Version: inspect.Version, Taken: second/2 + int64(i)*second/10, Controllers: []inspect.Controller{c}}})
	}
	return samples
}

func of(i int, samples []Sample) Finding {
	all := Diagnose(samples)
	return all[i]
}

// The sentence that the doctor is for.
func TestSentence(t *testing.T) {
	q := armed()
	q.SQ.Page = 17
	samples := over(38, q)
	f := of(0, samples)
	const want = "queue 3: tail 17 in the page, event index 9, device asleep since 4.1 s, consumed 9: the driver stored its tail and did not ring although 9 is in [9,17): R1 in the guest's driver"
	if f.Text != want || f.Rule != "R1" || f.Side != Driver || f.Verdict != Broken || f.Remedy == "" || !f.Kickable() {
		t.Errorf("%+v", f)
	}
	if !strings.Contains(f.Doubt, "R2") {
		t.Error("the store may have raced with the arm (R2), and nothing says so")
	}
	if f := of(0, append(over(1, armed()), samples[1:]...)); f.Rule != "R1" || strings.Contains(f.Doubt, "R2") {
		t.Errorf("seen asleep before the store: %+v", f)
	}
}

// TestJudgements is what no live fault shows: how much it takes to judge, and what tells like from like.
func TestJudgements(t *testing.T) {
	missed := func(q *inspect.Queue) { q.SQ.Page = 17 }
	undrained := func(q *inspect.Queue) {
		q.SQ, q.CQTail, q.Commands, q.Completions, q.LastFetch = inspect.Bell{Event: 31, Asked: 31}, 0, 0, 0, 0
	}
	for _, x := range []struct {
		name    string
		samples int
		change  func(*inspect.Queue)
		also    func(i int, c *inspect.Controller)
		verdict Verdict
		rule    string
		side    Side
		doubt   string
	}{
		{name: "idle", verdict: Idle},
		{name: "idle, one look", samples: 1, verdict: Idle},
		{name: "two looks are too few", samples: 2, change: missed, verdict: Unknown},
		{name: "it moves", change: missed, also: func(i int, c *inspect.Controller) { c.Queues[0].Commands += uint64(i) }, verdict: Busy},
		{name: "its doorbell may be on its way", change: missed, also: func(_ int, c *inspect.Controller) { c.Stalled = true }, verdict: Unknown, side: Neither},
		{name: "R1 of a doorbell out of the ring", change: func(q *inspect.Queue) { q.SQ.Page = 40 }, verdict: Broken, rule: "R30", side: Driver},
		{name: "R3", change: func(q *inspect.Queue) { q.SQ.Page, q.ArmSaw = 17, 12 }, verdict: Broken, rule: "R3", side: Device},
		{name: "R10", change: func(q *inspect.Queue) { q.SQ.Page, q.Kicks, q.KicksAsleep = 17, 4, 1 }, verdict: Broken, rule: "R10", side: Device},
		{name: "R10, and nothing waits", change: func(q *inspect.Queue) { q.Kicks, q.KicksAsleep = 4, 1 }, verdict: Broken, rule: "R10", side: Device},
		{name: "R27 by a kick", change: func(q *inspect.Queue) { q.SQ.Page, q.Kicks, q.KicksAsleep, q.ResumedAt = 17, 4, 1, second/4 }, verdict: Broken, rule: "R27", side: Device},
		{name: "R27 by the marker", change: func(q *inspect.Queue) { q.SQ.Event, q.SQ.Asked, q.ResumedAt = 8, 8, second/4 }, verdict: Broken, rule: "R27", side: Device},
		{name: "R12", change: func(q *inspect.Queue) { q.SQ.Event, q.SQ.Asked = 8, 8 }, verdict: Broken, rule: "R12", side: Device},
		{name: "R12 with a fixed marker", change: func(q *inspect.Queue) { q.SQ.Event, q.SQ.Asked = 1<<32-1, 1<<32-1 }, verdict: Broken, rule: "R12", side: Device},
		{name: "R13, or R12", change: undrained, verdict: Broken, rule: "R13", side: Device, doubt: "R12"},
		{name: "R13 after an arm", change: func(q *inspect.Queue) { q.SQ.Event, q.SQ.Asked = 8, 8 }, also: func(i int, c *inspect.Controller) {
			if i == 0 {
				c.Queues[0].SQ.Event, c.Queues[0].SQ.Asked, c.Queues[0].Armed = 9, 9, 0
			}
		}, verdict: Broken, rule: "R13", side: Device, doubt: "R12"},
		{name: "R13", change: undrained, also: func(_ int, c *inspect.Controller) {
			other := armed()
			other.QID, other.CQID = 4, 4
			c.Queues = append(c.Queues, other)
		}, verdict: Broken, rule: "R13", side: Device},
		{name: "R11", change: func(q *inspect.Queue) { q.SQ.Event, q.SQ.Asked, q.ArmIndex = 11, 11, 11 }, verdict: Broken, rule: "R11", side: Device},
		{name: "R18", change: func(q *inspect.Queue) { q.SQ.Event = 11 }, verdict: Broken, rule: "R18", side: Driver},
		{name: "R15 of the device", change: missed, also: func(i int, c *inspect.Controller) {
			if i > 0 {
				c.Queues[0].Armed, c.Queues[0].ArmedAt = 2, second/2+second/20
			}
		}, verdict: Broken, rule: "R15", side: Device, doubt: "R7 or R20"},
		{name: "R14", change: func(q *inspect.Queue) { q.State, q.SQ.Event, q.SQ.Asked = "polling", 1<<32-1, 1<<32-1 }, verdict: Broken, rule: "R14", side: Device},
		{name: "polling, a quarter behind", change: func(q *inspect.Queue) { q.State, q.SQ.Event, q.SQ.Asked = "polling", 1, 1 }, verdict: Idle},
		{name: "R14, more than a quarter behind", change: func(q *inspect.Queue) { q.State, q.SQ.Event, q.SQ.Asked = "polling", 0, 0 }, verdict: Broken, rule: "R14", side: Device},
		{name: "R8", change: func(q *inspect.Queue) {
			q.Blocked, q.SQ.Page, q.CQTail, q.CQ = true, 17, 31, inspect.Bell{Asked: 31, Event: 31}
		}, verdict: Broken, rule: "R8", side: Device},
		{name: "R1 of a CQ head", change: func(q *inspect.Queue) { q.Blocked, q.SQ.Page, q.CQTail, q.CQ = true, 17, 31, inspect.Bell{Page: 5} }, verdict: Broken, rule: "R1", side: Driver, doubt: "R2"},
		{name: "no completions taken", change: func(q *inspect.Queue) { q.Blocked, q.SQ.Page, q.CQTail, q.CQ = true, 17, 31, inspect.Bell{} }, verdict: Slow, side: Driver},
		{name: "R9", change: func(q *inspect.Queue) { q.CQTail, q.Inflight = 30, 2 }, verdict: Broken, rule: "R9", side: Device},
		{name: "R22", change: func(q *inspect.Queue) { q.SQ.Born = 5 }, verdict: Broken, rule: "R22", side: Device, doubt: "before the creation"},
		{name: "held back by a limit", change: func(q *inspect.Queue) { q.Full, q.Held, q.Inflight, q.SQ.Page, q.CQSize = true, 1024, 1024, 17, 2048 }, verdict: Slow},
		{name: "left alone until its turn", change: func(q *inspect.Queue) { q.Unseen, q.Held, q.Inflight, q.SQ.Page = true, 3, 3, 17 }, verdict: Slow},
		{name: "with the medium", change: func(q *inspect.Queue) { q.Inflight = 2 }, verdict: Slow},
		{name: "parked", change: func(q *inspect.Queue) { q.State, q.SQ.Page = "parked", 17 }, verdict: Slow, side: Driver},
		{name: "draining", change: func(q *inspect.Queue) { q.State, q.Inflight = "draining", 1 }, verdict: Slow},
		{name: "polled and not fetched", change: func(q *inspect.Queue) { q.State, q.SQ.Page, q.SQ.Asked, q.SQ.Event = "polling", 17, 8, 8 }, verdict: Unknown, side: Neither},
		{name: "R36, before the client is dropped", change: func(q *inspect.Queue) { q.State = "failed" }, also: func(_ int, c *inspect.Controller) {
			c.Errors = []inspect.QueueError{{QID: 3, Kind: "memory-fault", Text: "fault"}}
		}, verdict: Broken, rule: "R36", side: Driver},
		{name: "failed, and nobody knows", change: func(q *inspect.Queue) { q.State = "failed" }, verdict: Unknown, side: Neither},
		{name: "no interrupt", change: func(q *inspect.Queue) { q.Vector, q.VectorFD, q.Unraised = 1, true, 2 }, verdict: Broken, rule: Interrupt, side: Device},
		{name: "interrupts may be late", change: func(q *inspect.Queue) { q.Vector, q.Unraised = 1, 2 }, also: func(_ int, c *inspect.Controller) { c.Coalesced = true }, verdict: Idle},
		{name: "a latch that nothing holds", change: func(q *inspect.Queue) { q.Vector, q.VectorFD, q.VectorLatch = 1, true, true }, verdict: Broken, rule: Interrupt, side: Device},
		{name: "the admin queue waits for events", change: func(q *inspect.Queue) { q.QID, q.CQID, q.Inflight, q.SQ.Register = 0, 0, 4, 9 }, verdict: Idle},
	} {
		t.Run(x.name, func(t *testing.T) {
			q := armed()
			if x.change != nil {
				x.change(&q)
			}
			n := x.samples
			if n == 0 {
				n = 5
			}
			var also []func(int, *inspect.Controller)
			if x.also != nil {
				also = append(also, x.also)
			}
			f := of(0, over(n, q, also...))
			if f.Verdict != x.verdict || f.Rule != x.rule || f.Side != x.side || (x.doubt == "") != (f.Doubt == "") || !strings.Contains(f.Doubt, x.doubt) {
				t.Errorf("%+v", f)
			}
			if x.rule != "" && (!strings.HasPrefix(f.Text, "queue ") || f.Remedy == "" || f.Values["consumed"] != uint64(q.SQ.Private)) {
				t.Errorf("%+v", f)
			}
		})
	}
}

// A command that is in the ring, and that no doorbell tells of, is the driver's to explain.
func TestWritten(t *testing.T) {
	for name, x := range map[string]struct {
		hashes []uint64
		want   Verdict
	}{
		"written long ago": {[]uint64{1, 1, 1, 1, 1, 1}, Idle},
		"written":          {[]uint64{1, 1, 2, 2, 2, 2}, Unknown},
		"being written":    {[]uint64{1, 1, 1, 1, 1, 2}, Idle},
	} {
		samples := over(len(x.hashes), armed())
		for i := range samples {
			samples[i].Views = []View{{Socket: "/run/guest", QID: 3, Ring: true, Next: true, Hash: x.hashes[i]}}
		}
		if f := of(0, samples); f.Verdict != x.want {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

// TestControllers is what is said of no queue.
func TestControllers(t *testing.T) {
	for _, x := range []struct {
		name    string
		change  func(i int, c *inspect.Controller)
		verdict Verdict
		rule    string
		side    Side
		text    string
	}{
		{"R21", func(_ int, c *inspect.Controller) { c.Enables = 2 }, Broken, "R21", Device, "configured in enable 1, and this is enable 2"},
		{"R24", func(_ int, c *inspect.Controller) { c.EventIndex = c.Shadow }, Broken, "R24", Driver, "same memory"},
		{"a worker that hangs", func(_ int, c *inspect.Controller) { c.Busy, c.Queues = []int{1}, nil }, Unknown, "", Device, "worker 1 has not answered in the last 5 samples"},
		{"a session that hangs", func(_ int, c *inspect.Controller) { c.Silent, c.Queues = true, nil }, Unknown, "", Device, "session does not answer"},
		{"CFS", func(_ int, c *inspect.Controller) { c.CSTS = 3 }, Broken, "", Neither, "CSTS.CFS"},
		{"an error of long ago", func(_ int, c *inspect.Controller) {
			c.Errors = []inspect.QueueError{{QID: 9, Kind: "bad-sq-tail", Text: "SQ tail 99", At: second / 10}}
		}, Healthy, "R30", Driver, "in the past: 800ms ago, queue 9: SQ tail 99"},
	} {
		t.Run(x.name, func(t *testing.T) {
			f := of(0, over(5, armed(), x.change))
			if f.Verdict != x.verdict || f.Rule != x.rule || f.Side != x.side || f.Queue != -1 || !strings.Contains(f.Text, x.text) {
				t.Errorf("%+v", f)
			}
		})
	}
}

// A controller that was enabled anew begins anew, and samples that go back in time are others'.
func TestWindow(t *testing.T) {
	q := armed()
	q.SQ.Page = 17
	samples := over(5, q)
	for i := range 3 {
		samples[i].Controllers[0].Enables = 0
	}
	if f := of(0, samples); f.Verdict != Unknown {
		t.Errorf("%+v", f)
	}
	samples = over(5, q)
	samples[2].Taken = samples[4].Taken
	if f := of(0, samples); f.Verdict != Unknown {
		t.Errorf("%+v", f)
	}
	if f := Diagnose(nil); f != nil {
		t.Errorf("%+v", f)
	}
	if f := (Options{Samples: 2, Still: 1}).Diagnose(over(2, q)); f[0].Rule != "R1" {
		t.Errorf("%+v", f)
	}
}

func TestFileRoundTrip(t *testing.T) {
	q := armed()
	q.SQ.Page = 17
	samples := over(5, q)
	samples[1].Views = []View{{Socket: "/run/guest", QID: 3, Doorbells: true, Tail: 17, Ring: true, Hash: 1 << 63, Next: true}}
	var b bytes.Buffer
	for i := range samples {
		if err := Write(&b, &samples[i]); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Read(&b)
	if err != nil || !reflect.DeepEqual(got, samples) {
		t.Fatalf("%v\n%+v\n%+v", err, got, samples)
	}
	if !reflect.DeepEqual(Diagnose(got), Diagnose(samples)) {
		t.Error("another diagnosis")
	}
	for in, want := range map[string]string{
		"":                   "no sample",
		"{}\n":               "version 0",
		"{\"version\":1}\n{": "line 2",
		strings.Repeat("{\"version\":1}\n", MaxSamples+1): fmt.Sprint("more than ", MaxSamples),
		strings.Repeat(" ", maxLine+1):                    "longer than 16 MiB",
	} {
		if _, err := Read(strings.NewReader(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v", in, err)
		}
	}
	many, _ := json.Marshal(Sample{Snapshot: inspect.Snapshot{Version: 1}, Views: make([]View, maxQueues+1)})
	if _, err := Read(bytes.NewReader(many)); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("%v", err)
	}
}

// FuzzDiagnose: whatever a file holds, it is judged or refused.
func FuzzDiagnose(f *testing.F) {
	q := armed()
	q.SQ.Page = 17
	var b bytes.Buffer
	for _, s := range over(4, q) {
		_ = Write(&b, &s)
	}
	f.Add(b.Bytes())
	zero := over(4, inspect.Queue{QID: 1, State: "armed", Unraised: 1})
	b.Reset()
	for i := range zero {
		_ = Write(&b, &zero[i])
	}
	f.Add(b.Bytes())
	f.Add([]byte(`{"version":1,"taken_ns":1,"controllers":[{"cc":4294967295,"shared":true,"shadow_iova":18446744073709551615,"queues":[{"qid":1,"size":4294967295,"cq_size":1,"state":"failed"}]}]}`))
	f.Add([]byte(`{"version":1,"taken_ns":1,"controllers":[{"enables":1,"queues":[{"qid":1},{"qid":1,"size":2,"state":"armed"}]},{"enables":2,"queues":[{"qid":1,"cqid":3}]}]}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		samples, err := Read(bytes.NewReader(in))
		if err != nil {
			return
		}
		for _, f := range Diagnose(samples) {
			if f.Text == "" || f.Verdict == "" {
				t.Errorf("%+v", f)
			}
		}
	})
}
