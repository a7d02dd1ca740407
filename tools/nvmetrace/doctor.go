package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/shadowbell/shadowbell/ebpf/doctor"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/inspect/attach"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type doctorCmd struct {
	Control    string        `placeholder:"PATH" help:"Control socket of hostmed (hostmed serve --control PATH)."`
	Controller string        `placeholder:"SOCKET" help:"Only this controller, by its socket or its trace number. [all that have a client]"`
	For        time.Duration `default:"1s" placeholder:"TIME" help:"How long to look, 50ms to 10m. Who stands still for half of it, or 5 s, is judged. [${default}]"`
	Fix        string        `enum:",kick" default:"" placeholder:"kick" help:"kick: wake queues that sleep and should not, look again, and say what has changed."`
	Record     string        `placeholder:"FILE" help:"Write what was seen to FILE, for --replay."`
	Replay     string        `placeholder:"FILE" help:"Judge what --record wrote, in place of a running hostmed."`
	JSON       bool          `name:"json" help:"Print JSON."`
}

// The time between two looks is a tenth of --for, but no more than seldom, and in all no more looks are taken than a file may have.
const (
	looks  = 10
	seldom = 100 * time.Millisecond
	// longest is how long a queue has to stand still at the most, however long --for is.
	longest = 5 * time.Second
)

// Help is what stands below the flags.
func (doctorCmd) Help() string { return doctorHelp }

const doctorHelp = `Says of each queue of hostmed's guests whether it is healthy, and, where it hangs, which rule of the doorbell protocol (R1 to R36) was broken and by which side: the guest's driver, or the device, which is hostmed. It only looks, unless --fix is given.

Examples

  A guest hangs. Who is it?
    nvmetrace doctor --control /run/hostmed.sock

  Wake it:
    nvmetrace doctor --control /run/hostmed.sock --fix kick

  Look for a minute, and send what was seen to somebody:
    nvmetrace doctor --control /run/hostmed.sock --for 1m --record hang.jsonl
    nvmetrace doctor --replay hang.jsonl

Exit code: 0 if nothing is broken, 1 if something is, 2 if it could not look (no such socket, a worker of hostmed that does not answer).

Verdicts

  healthy, idle, busy   nothing is wrong
  slow                  something waits for what no doorbell brings: the medium, a limit, a driver that takes no completions
  broken                a rule is; the sentence names it, its side, and the values that show it
  unknown               what was seen does not say, or not enough was

docs/doctor.md has what can be seen of each rule.`

// Validate is called by kong.
func (c *doctorCmd) Validate() error {
	switch {
	case c.Control == "" && c.Replay == "":
		return errors.New("missing flags: --control=PATH (a running hostmed) or --replay=FILE (what --record wrote)")
	case c.Control != "" && c.Replay != "":
		return errors.New("--control and --replay: give one of them")
	case c.Replay != "" && (c.Fix != "" || c.Record != "" || c.Controller != ""):
		return errors.New("--fix, --record and --controller need a running hostmed: give --control in place of --replay")
	case c.For < 50*time.Millisecond || c.For > 10*time.Minute:
		return fmt.Errorf("--for %v: give 50ms to 10m", c.For)
	}
	return nil
}

// diagnosis is what --json prints.
type diagnosis struct {
	Samples  int              `json:"samples"`
	Seconds  float64          `json:"seconds"`
	Findings []doctor.Finding `json:"findings"`
	Fixes    []fix            `json:"fixes,omitempty"`
	After    []doctor.Finding `json:"after,omitempty"` // the findings, once more
}

// fix is a queue that was kicked.
type fix struct {
	Controller string       `json:"controller"`
	Queue      uint16       `json:"queue"`
	Kick       inspect.Kick `json:"kick"`
	Error      string       `json:"error,omitempty"`
	Text       string       `json:"text"`
}

// Run diagnoses once, and once more if something was fixed.
func (c *doctorCmd) Run(ctx context.Context, out *cli.Output) (err error) {
	if c.Replay != "" {
		samples, err := readSamples(c.Replay)
		if err != nil {
			return cli.UsageError{Err: err}
		}
		d := diagnosisOf(samples, doctor.Diagnose(samples))
		return c.show(out, samples, d)
	}
	e := &examination{doctorCmd: c, client: attach.New(c.Control), looker: doctor.NewLooker()}
	defer e.client.Close()
	defer e.looker.Close()
	if c.Record != "" {
		if e.record, err = os.Create(c.Record); err != nil {
			return cli.UsageError{Err: err}
		}
		defer func() {
			if cerr := e.record.Close(); err == nil && cerr != nil {
				err = cerr
			}
		}()
	}
	if err := e.look(ctx); err != nil {
		return unseen(ctx, err)
	}
	d := diagnosisOf(e.samples, e.judge())
	if c.Fix == "kick" && slices.ContainsFunc(d.Findings, func(f doctor.Finding) bool { return f.Kickable() }) {
		e.kick(ctx, d)
		e.samples = nil
		if err := e.look(ctx); err != nil {
			return unseen(ctx, err)
		}
		d.After = e.judge()
		for i := range d.Fixes {
			d.Fixes[i].Text += e.since(&d.Fixes[i], d)
		}
	}
	return c.show(out, e.samples, d)
}

// unseen makes of an error that the doctor could not look.
func unseen(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return cli.UsageError{Err: err}
}

func readSamples(path string) ([]doctor.Sample, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	samples, err := doctor.Read(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return samples, nil
}

// examination is one run against a hostmed.
type examination struct {
	*doctorCmd
	client  *attach.Client
	looker  *doctor.Looker
	record  *os.File
	samples []doctor.Sample
}

// look samples for the time of --for.
func (e *examination) look(ctx context.Context) error {
	conn, err := e.client.Attach(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	tick := time.NewTicker(max(min(e.For/looks, seldom), e.For/(doctor.MaxSamples/4)))
	defer tick.Stop()
	for begin := time.Now(); ; {
		s, files, err := conn.Inspect(ctx, e.Controller)
		if err != nil {
			return err
		}
		sample := e.looker.Look(s, files)
		for _, f := range files {
			f.Close()
		}
		e.samples = append(e.samples, sample)
		if e.record != nil {
			if err := doctor.Write(e.record, &sample); err != nil {
				return err
			}
		}
		if time.Since(begin) >= e.For && len(e.samples) > 3 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (e *examination) judge() []doctor.Finding {
	return doctor.Options{Samples: 3, Still: min(e.For/2, longest)}.Diagnose(e.samples)
}

// kick wakes what can be woken.
func (e *examination) kick(ctx context.Context, d *diagnosis) {
	for i := range d.Findings {
		f := &d.Findings[i]
		if !f.Kickable() {
			continue
		}
		x := fix{Controller: f.Controller, Queue: uint16(f.Queue)}
		k, err := e.client.Kick(ctx, f.Controller, x.Queue)
		switch {
		case err != nil:
			x.Error = err.Error()
			x.Text = fmt.Sprintf("queue %d could not be kicked: %v", x.Queue, err)
		case !k.Woken:
			x.Text = fmt.Sprintf("queue %d was kicked, but is %s, not asleep", x.Queue, k.State)
		default:
			x.Text = fmt.Sprintf("queue %d was kicked: it slept, and %d in the SQ waited for it", x.Queue, k.Found)
		}
		x.Kick = k
		d.Fixes = append(d.Fixes, x)
	}
}

// since says what has become of a queue that was kicked.
func (e *examination) since(x *fix, d *diagnosis) string {
	was, now := find(d.Findings, x), find(d.After, x)
	if was == nil || now == nil {
		return "; it is there no more"
	}
	return fmt.Sprintf("; consumed went from %d to %d, and it is %s", was.Values["consumed"], now.Values["consumed"], now.Verdict)
}

func find(all []doctor.Finding, x *fix) *doctor.Finding {
	i := slices.IndexFunc(all, func(f doctor.Finding) bool { return f.Controller == x.Controller && f.Queue == int(x.Queue) })
	if i < 0 {
		return nil
	}
	return &all[i]
}

func diagnosisOf(samples []doctor.Sample, all []doctor.Finding) *diagnosis {
	d := &diagnosis{Samples: len(samples), Findings: all}
	if n := len(samples); n > 0 {
		d.Seconds = float64(samples[n-1].Taken-samples[0].Taken) / 1e9
	}
	if all == nil {
		d.Findings = []doctor.Finding{}
	}
	return d
}

// show prints d and says by the error what the exit code is to be.
func (c *doctorCmd) show(out *cli.Output, samples []doctor.Sample, d *diagnosis) error {
	last := d.Findings
	if d.Fixes != nil {
		last = d.After
	}
	if c.JSON {
		enc := json.NewEncoder(out.Stdout)
		enc.SetIndent("", "  ")
		if err := enc.Encode(d); err != nil {
			return err
		}
	} else if err := c.print(out, samples, d, last); err != nil {
		return err
	}
	broken, blind := 0, ""
	for _, f := range last {
		if f.Verdict == doctor.Broken {
			broken++
		}
		if f.Verdict == doctor.Unknown && f.Queue < 0 {
			blind = f.Text
		}
	}
	switch {
	case broken > 0:
		return fmt.Errorf("%d broken", broken)
	case blind != "":
		return cli.Usagef("could not look: %s", plain(blind))
	}
	return nil
}

func (c *doctorCmd) print(out *cli.Output, samples []doctor.Sample, d *diagnosis, last []doctor.Finding) error {
	var b strings.Builder
	if len(samples) == 0 || len(samples[len(samples)-1].Controllers) == 0 {
		b.WriteString("no controller has a client: there is nothing to look at\n")
	} else {
		b.WriteString(table(&samples[len(samples)-1], last) + "\n")
	}
	tell(&b, d.Findings)
	for _, x := range d.Fixes {
		fmt.Fprintf(&b, "%s: %s\n", x.Controller, x.Text)
	}
	if d.Fixes != nil {
		tell(&b, d.After)
	}
	for line := range strings.SplitAfterSeq(b.String(), "\n") {
		if _, err := fmt.Fprint(out.Stdout, plainLine(line)); err != nil {
			return err
		}
	}
	return nil
}

// table is the queues as the last sample has them.
func table(s *doctor.Sample, all []doctor.Finding) string {
	t := text.Table{Head: []string{"controller", "queue", "state", "tail", "consumed", "event index", "in flight", "verdict"}, Left: map[int]bool{2: true, 7: true}}
	for i := range s.Controllers {
		c := &s.Controllers[i]
		for j := range c.Queues {
			q := &c.Queues[j]
			tail, event, verdict := q.SQ.Register, "-", "-"
			if c.Shared && q.QID != 0 {
				tail, event = q.SQ.Page, fmt.Sprint(q.SQ.Event)
			}
			if f := find(all, &fix{Controller: c.Socket, Queue: q.QID}); f != nil {
				verdict = string(f.Verdict)
				if f.Rule != "" {
					verdict += " (" + f.Rule + ")"
				}
			}
			t.Add(plain(c.Socket), fmt.Sprint(q.QID), plain(queueState(q, s.Taken)), fmt.Sprint(tail), fmt.Sprint(q.SQ.Private), event, fmt.Sprint(q.Inflight), verdict)
		}
	}
	return t.String()
}

func queueState(q *inspect.Queue, now int64) string {
	if q.State == "armed" && q.ArmedAt > 0 && now >= q.ArmedAt {
		return "asleep " + text.Duration(time.Duration(now-q.ArmedAt))
	}
	return q.State
}

// tell prints what needs a sentence.
func tell(b *strings.Builder, all []doctor.Finding) {
	n := map[doctor.Verdict]int{}
	for i := range all {
		f := &all[i]
		if f.Queue >= 0 {
			n[f.Verdict]++
		}
		switch {
		case f.Verdict == doctor.Idle || f.Verdict == doctor.Busy:
			continue
		case f.Verdict == doctor.Healthy:
			fmt.Fprintf(b, "%s: %s\n", f.Controller, f.Text)
			continue
		}
		fmt.Fprintf(b, "%s: %s: %s\n", f.Verdict, f.Controller, f.Text)
		if f.Doubt != "" {
			fmt.Fprintf(b, "  would look the same: %s\n", f.Doubt)
		}
		if f.Remedy != "" {
			fmt.Fprintf(b, "  remedy: %s\n", f.Remedy)
		}
	}
	var parts []string
	for _, v := range []doctor.Verdict{doctor.Broken, doctor.Unknown, doctor.Slow, doctor.Busy, doctor.Idle} {
		if n[v] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n[v], v))
		}
	}
	if parts != nil {
		fmt.Fprintf(b, "queues: %s\n", strings.Join(parts, ", "))
	}
}

// plainLine and plain keep what a guest or a file named from doing things to a terminal.
func plainLine(s string) string {
	body, ok := strings.CutSuffix(s, "\n")
	if ok {
		return plain(body) + "\n"
	}
	return plain(body)
}

func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}
