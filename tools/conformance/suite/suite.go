// Package suite is a black-box conformance suite for NVMe controllers: cases taken from the "shall"s of NVMe Base 2.0c, the NVM
// Command Set 1.0c and the PCIe Transport 1.0c, run over nothing but guestdrv's [device.Device].
//
// It is its own raw driver. Nothing between a case and the controller checks or corrects what is sent, so a case can send what no
// driver would. Files: suite.go (what a case is, and the run), facts.go (what the controller offers, and so which cases are
// skipped), ctl.go (registers and waiting), memory.go, queue.go and data.go (the raw driver), then one file of cases for each subject.
//
// Cases are independent: each begins with a controller that has just been reset and enabled, and has a deadline. A controller that does
// not answer fails the case, with the register or queue that was waited on, and is reset for the next.
package suite

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/shared/device"
)

// Case is one thing that the specification demands.
type Case struct {
	ID   string // stable: SUBJECT.THING.DETAIL
	Text string // what the specification demands, in one line
	Ref  string // where it does

	needs []need
	peer  bool // takes a second controller
	does  effect
	setup setup
	run   func(c *ctl)
}

// Required reports whether every controller has to pass; others may lack the feature.
func (c *Case) Required() bool { return len(c.needs) == 0 && !c.peer }

// effect is what a case does beyond reading.
type effect uint8

const (
	reads   effect = iota
	writes         // to blocks of the namespace under test
	formats        // formats, creates or deletes namespaces
)

// Result is what became of a case.
type Result struct {
	Case    *Case
	Outcome Outcome
	Seen    string // of a failure, what was seen; of a skipped case, why
	Took    time.Duration
}

// Outcome is how a case ended.
type Outcome string

// The outcomes.
const (
	Passed  Outcome = "pass"
	Failed  Outcome = "fail"
	Skipped Outcome = "skip"
)

// Config says what to run.
type Config struct {
	// Open opens the controller. It is called again when a case has lost the connection.
	Open func(context.Context) (device.Device, error)
	// Peer opens a second controller of the same subsystem, for what takes two; nil: those cases are skipped.
	Peer func(context.Context) (device.Device, error)
	// Filter is a glob (path.Match) over case ids; "": all.
	Filter string
	// NSID is the namespace under test, whose data may be overwritten; 0: the first usable one, which is only read.
	NSID uint32
	// Destructive allows cases that write user data, format and manage namespaces.
	Destructive bool
	// Timeout bounds each wait for the controller [10 s]; a case may take ten times as long.
	Timeout time.Duration
	// Progress is called after each case; nil: not.
	Progress func(Result)
}

const (
	defaultTimeout = 10 * time.Second
	waitsPerCase   = 10
)

// Cases returns the cases whose id matches glob, all if it is empty, in the order of a run.
func Cases(glob string) ([]*Case, error) {
	var found []*Case
	for _, list := range subjects {
		for i := range list {
			ok, err := path.Match(glob, list[i].ID)
			if err != nil {
				return nil, fmt.Errorf("filter %q: %w", glob, err)
			}
			if ok || glob == "" {
				found = append(found, &list[i])
			}
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("filter %q: no such case; conformance run --list shows all", glob)
	}
	return found, nil
}

// subjects are all cases.
var subjects = [][]Case{
	registerCases,
	stateCases,
	identifyCases,
	adminCases,
	queueCases,
	featureCases,
	logCases,
	eventCases,
	doorbellCases,
	ioCases,
	writeCases,
	sglCases,
	interruptCases,
	reservationCases,
	manageCases,
}

// ErrNamespace says that Config.NSID cannot be tested with.
var ErrNamespace = errors.New("the namespace cannot be tested with")

// Run runs the cases that cfg selects. The error is one of the run and not of the controller's conduct: it cannot be opened,
// or not even be asked what it offers.
func Run(ctx context.Context, cfg Config) ([]Result, error) {
	cases, err := Cases(cfg.Filter)
	if err != nil {
		return nil, err
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = defaultTimeout
	}
	r := &rig{cfg: cfg, open: cfg.Open}
	if err := r.reopen(ctx); err != nil {
		return nil, err
	}
	defer r.close()
	if cfg.Peer != nil {
		r.peer = &rig{cfg: cfg, open: cfg.Peer}
		if err := r.peer.reopen(ctx); err != nil {
			return nil, fmt.Errorf("peer: %w", err)
		}
		defer r.peer.close()
	}
	for _, r := range []*rig{r, r.peer} {
		if r == nil {
			continue
		}
		if err := r.probe(ctx); err != nil {
			return nil, err
		}
	}
	var results []Result
	for _, cs := range cases {
		if err := ctx.Err(); err != nil {
			return results, err
		}
		res := r.runCase(ctx, cs)
		if ctx.Err() != nil {
			return results, ctx.Err()
		}
		results = append(results, res)
		if cfg.Progress != nil {
			cfg.Progress(res)
		}
	}
	return results, nil
}

// Count returns how many results have the outcome.
func Count(results []Result, o Outcome) (n int) {
	for _, r := range results {
		if r.Outcome == o {
			n++
		}
	}
	return n
}

// failure and skip end a case from anywhere in it.
type (
	failure struct{ seen string }
	skip    struct{ why string }
)

// runCase runs one case and takes its controller back, whatever it has come to.
func (r *rig) runCase(ctx context.Context, cs *Case) (res Result) {
	res.Case = cs
	if why := r.reason(cs); why != "" {
		res.Outcome, res.Seen = Skipped, why
		return res
	}
	begin := time.Now()
	res.Outcome, res.Seen = r.guard(ctx, cs.setup, cs.run)
	res.Took = time.Since(begin)
	return res
}

// guard runs f on a controller that has just been reset, and enabled as setup says.
func (r *rig) guard(ctx context.Context, s setup, f func(c *ctl)) (outcome Outcome, seen string) {
	c := &ctl{rig: r, ctx: ctx, deadline: time.Now().Add(waitsPerCase * r.cfg.Timeout)}
	defer func() {
		switch v := recover().(type) {
		case nil:
		case failure:
			outcome, seen = Failed, v.seen
		case skip:
			outcome, seen = Skipped, v.why
		default:
			panic(v)
		}
		if r.peer != nil && r.peer.used {
			r.peer.settle(ctx)
		}
	}()
	c.begin(s)
	f(c)
	return Passed, ""
}

// reason returns why cs is not run, or "".
func (r *rig) reason(cs *Case) string {
	switch {
	case cs.peer && r.peer == nil:
		return "it takes a second controller: --peer DEVICE"
	case cs.does == writes && !r.cfg.Destructive && r.cfg.NSID == 0:
		return "it writes user data: name the namespace (--nsid) or say --destructive"
	case cs.does == formats && !r.cfg.Destructive:
		return "it destroys namespaces: say --destructive"
	}
	for _, n := range cs.needs {
		if why := n(&r.facts); why != "" {
			return why
		}
	}
	return ""
}

// join puts lists of needs together.
func join(lists ...[]need) []need { return slices.Concat(lists...) }

var errFatal = errors.New("the controller cannot be brought up")
