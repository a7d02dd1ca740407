// Package doctor says what is wrong with doorbells that a driver and hostmed share: which of the rules R1 to R36 of docs/doorbell-rules.md a queue
// shows to be broken, and by which side.
//
//	Sample     inspect.Snapshot, and what the doctor read by itself       sample.go, look.go
//	Diagnose   samples in, one Finding for each queue and more out        doctor.go
//	watch      one queue over the samples, and how long it stands still   watch.go
//	           asleep.go, polling.go, memory.go, life.go                  the rules
//	Rules      what can be seen of each rule, and by what                 rules.go
//
// Diagnose is a function of its arguments: it waits for nothing and touches no memory. A queue that moves is healthy, whatever a single look at it
// says, except where values contradict each other that only the device writes, on the thread that owns the queue.
package doctor

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/shared/inspect"
)

// Verdict is what a queue's state comes to.
type Verdict string

// Healthy, Idle, Busy and Slow need nobody.
const (
	Healthy Verdict = "healthy"
	Idle    Verdict = "idle"    // nothing is asked of it
	Busy    Verdict = "busy"    // commands or completions move
	Slow    Verdict = "slow"    // something waits for what no doorbell brings: the medium, a limit, a driver that takes no completions
	Broken  Verdict = "broken"  // a rule is
	Unknown Verdict = "unknown" // the samples do not say
)

// Side is who broke a rule.
type Side string

// The two sides.
const (
	Driver  Side = "driver"
	Device  Side = "device"
	Neither Side = "unknown" // the evidence does not name one
)

// Interrupt stands in Finding.Rule for what has no number: completions for which no interrupt came.
const Interrupt = "interrupt"

// Finding is what there is to say of a queue, or of a controller.
type Finding struct {
	Controller string            `json:"controller"` // socket
	Queue      int               `json:"queue"`      // -1: the controller's
	Verdict    Verdict           `json:"verdict"`
	Rule       string            `json:"rule,omitempty"` // R1 to R36, or Interrupt; "": none
	Side       Side              `json:"side,omitempty"`
	Text       string            `json:"text"`             // one sentence with the values
	Doubt      string            `json:"doubt,omitempty"`  // what would look the same
	Values     map[string]uint64 `json:"values,omitempty"` // what Text is made of
	Remedy     string            `json:"remedy,omitempty"`
}

// Kickable says whether a doorbell message wakes the queue, whatever is wrong with it.
func (f *Finding) Kickable() bool {
	return f.Verdict == Broken && f.Queue > 0 && slices.Contains([]string{"R1", "R2", "R3", "R8", "R10", "R11", "R12", "R13", "R18", "R27"}, f.Rule)
}

// Options say what counts as standing still.
type Options struct {
	Samples int           // in so many samples at least [3]
	Still   time.Duration // over at least so long [200 ms]
}

// Diagnose is Options{}.Diagnose.
func Diagnose(samples []Sample) []Finding { return Options{}.Diagnose(samples) }

// Diagnose says what the samples show of each controller that the last of them has: first of the controller, where there is anything to say, then of
// each of its queues. Samples are of one mediator, in the order of time; those that come before one that is older, or of another version, are left out.
func (o Options) Diagnose(samples []Sample) (all []Finding) {
	o.Samples, o.Still = max(o.Samples, 1), max(o.Still, 0)
	if o == (Options{Samples: 1}) {
		o = Options{Samples: 3, Still: 200 * time.Millisecond}
	}
	samples = usable(samples)
	if len(samples) == 0 {
		return nil
	}
	last := &samples[len(samples)-1]
	for i := range last.Controllers {
		h := newHistory(samples, &last.Controllers[i])
		all = append(all, o.controller(h)...)
		queues := slices.Clone(h.last.Queues)
		slices.SortStableFunc(queues, func(a, b inspect.Queue) int { return cmp.Compare(a.QID, b.QID) })
		for i := range queues {
			all = append(all, o.watch(h, &queues[i]).judge())
		}
	}
	return all
}

// usable returns the newest samples that follow one another.
func usable(samples []Sample) []Sample {
	begin := len(samples)
	for begin > 0 && samples[begin-1].Version == inspect.Version && (begin == len(samples) || samples[begin-1].Taken < samples[begin].Taken) {
		begin--
	}
	return samples[begin:]
}

// Worst returns the gravest verdict: Broken, then Unknown, then Slow; Healthy if there is nothing.
func Worst(all []Finding) Verdict {
	for _, v := range []Verdict{Broken, Unknown, Slow} {
		if slices.ContainsFunc(all, func(f Finding) bool { return f.Verdict == v }) {
			return v
		}
	}
	return Healthy
}

// ago prints a time span in ns.
func ago(ns int64) string {
	d := time.Duration(max(ns, 0))
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
