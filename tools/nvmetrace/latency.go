package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/latency"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type latencyCmd struct {
	filterFlags `embed:""`
	viewFlags   `embed:""`
	Interval    time.Duration `placeholder:"TIME" help:"Print what came in each of this time. Default: once, at the end."`
	Duration    time.Duration `placeholder:"TIME" help:"End after this long. Default: Ctrl-C ends it."`
	JSON        bool          `name:"json" help:"Print one JSON object for each interval. See above for its fields."`
}

// viewFlags say how latencies are shown.
type viewFlags struct {
	By   []string      `default:"device,opcode" enum:"device,queue,opcode,size" sep:"," placeholder:"LIST" help:"What is told apart: some of ${enum} (${default})."`
	Heat bool          `help:"Meanwhile a line for each --step: time downwards, latency to the right, the darker the more commands."`
	Plot string        `placeholder:"FILE" help:"Draw time and latency into FILE.svg or FILE.png."`
	Step time.Duration `default:"1s" placeholder:"TIME" help:"Width of a column of --plot and of a line of --heat (${default}). If it comes to more than 600 of them, --plot puts two in one."`
}

// Help is what stands below the flags.
func (latencyCmd) Help() string { return latencyHelp }

const latencyHelp = `How long commands took, from nvme_setup_cmd to nvme_complete_rq: percentiles and a histogram for each group. They are counted in the kernel, in buckets that are at most 1/16 of their values wide.

Examples

  Until Ctrl-C, reads and writes and all others apart:
    nvmetrace latency

  A minute of nvme0, as a heat map in the terminal and as a picture:
    nvmetrace latency --device nvme0 --duration 1m --heat --plot nvme0.svg

  Which queue and which size is slow, every ten seconds:
    nvmetrace latency --by queue,size --interval 10s

The fields of --json, an object for each interval

  time, seconds   when it ended, and how long it was; total is true for the last object if there is --interval
  groups          [{name,count,errors,bytes,mean_ns,p50_ns,p90_ns,p99_ns,p999_ns,max_ns,buckets}], most commands first; of
                  device, qid, command and size those that --by names
    buckets       [[from,below,count]] in ns
  lost            {ring,map,recursion} what was not counted, since the start`

// Validate is called by kong.
func (c *latencyCmd) Validate() error {
	if c.JSON && c.Heat {
		return errors.New("--json and --heat: choose one")
	}
	r := runFlags{Interval: c.Interval, Duration: c.Duration}
	return errors.Join(r.Validate(), c.viewFlags.Validate())
}

// Validate is called by kong.
func (v *viewFlags) Validate() error {
	if v.Step < leastInterval {
		return fmt.Errorf("--step %v: it must be at least %v", v.Step, leastInterval)
	}
	if ext := strings.ToLower(filepath.Ext(v.Plot)); v.Plot != "" && ext != ".svg" && ext != ".png" {
		return fmt.Errorf("--plot %s: its name must end in .svg or .png", v.Plot)
	}
	return nil
}

// latencyJSON is what --json prints for an interval.
type latencyJSON struct {
	Time    *time.Time `json:"time,omitempty"` // nil in replay
	Seconds float64    `json:"seconds"`
	Total   bool       `json:"total,omitempty"`
	Groups  []*group   `json:"groups"`
	Lost    lostJSON   `json:"lost"`
}

// Run counts until it is told to end.
func (c *latencyCmd) Run(ctx context.Context, out *cli.Output) error {
	v, err := c.view(out)
	if err != nil {
		return err
	}
	s, notes, err := open(ctx, c.options(), &c.filterFlags, "")
	if err != nil {
		return err
	}
	defer s.close()
	for _, n := range notes {
		fmt.Fprintf(out.Stderr, "nvmetrace: %s\n", n)
	}
	line := text.NewLine(out.Stderr, 2*time.Second)
	begun, next := time.Now(), c.Interval
	var printed sample // what the last interval ended with
	total, err := s.watch(ctx, c.tick(), c.Duration, func(st step) error {
		if printed.kernel == nil {
			printed = st.before
		}
		at := st.now.at.Sub(begun)
		if err := v.step(at, st.seconds(), st.kernel(&c.filterFlags)); err != nil {
			return err
		}
		if !c.Heat {
			line.Set(fmt.Sprintf("%.0f s; Ctrl-C ends it", at.Seconds()))
		}
		if c.Interval == 0 || at < next-c.tick()/2 {
			return nil
		}
		line.Clear()
		interval := step{printed, st.now}
		printed, next = st.now, next+c.Interval
		return c.print(out, interval, false)
	})
	line.Clear()
	if err != nil {
		return err
	}
	if c.Interval > 0 && printed.at.Before(total.now.at) { // what is left of the last interval
		if err := c.print(out, step{printed, total.now}, false); err != nil {
			return err
		}
	}
	if err := c.print(out, total, true); err != nil {
		return err
	}
	return v.end(out, total.seconds())
}

// tick is how often the counters are read.
func (c *latencyCmd) tick() time.Duration {
	if c.Interval > 0 && !c.Heat && c.Plot == "" {
		return c.Interval
	}
	return c.Step
}

func (c *latencyCmd) print(out *cli.Output, st step, total bool) error {
	g := groupsOf(st.kernel(&c.filterFlags), makeBy(c.By))
	if c.JSON {
		return json.NewEncoder(out.Stdout).Encode(latencyJSON{Time: &st.now.at, Seconds: st.seconds(), Total: total && c.Interval > 0, Groups: g, Lost: lostJSON(st.now.kernel.Losses)})
	}
	head := fmt.Sprintf("%.1f s", st.seconds())
	if total && c.Interval > 0 {
		head = "totals, " + head
	}
	return printGroups(out, head, g, st.now.kernel.Losses)
}

// printGroups prints the table and the histograms.
func printGroups(out *cli.Output, head string, groups []*group, lost trace.Losses) error {
	var b strings.Builder
	b.WriteString(head + "\n")
	if len(groups) == 0 {
		b.WriteString("  no command ended\n")
	} else {
		b.WriteString(groupTable(groups))
	}
	unicode := text.HasUnicode(out.Stdout)
	for _, g := range groups {
		b.WriteString("\n" + histogram(g, 40, unicode))
	}
	if l := lossText(lost); l != "" {
		b.WriteString("\n  " + l + "\n")
	}
	_, err := fmt.Fprintln(out.Stdout, b.String())
	return err
}

// view is what --heat and --plot make of steps.
type view struct {
	flags   *viewFlags
	heat    *heatPrinter // nil: none
	picture *heatMap     // nil: none
	file    *os.File
}

// view opens what is to be drawn into, so that a name that cannot be is known at once.
func (v *viewFlags) view(out *cli.Output) (w *view, err error) {
	w = &view{flags: v}
	if v.Heat {
		w.heat = newHeatPrinter(out.Stdout, text.IsTerminal(out.Stdout) && os.Getenv("NO_COLOR") == "", text.Width(out.Stdout))
	}
	if v.Plot != "" {
		w.picture = newHeatMap()
		if w.file, err = os.Create(v.Plot); err != nil {
			return nil, cli.Usagef("--plot: %w", err)
		}
	}
	return w, nil
}

// step takes what came in a step that ended at, since the start.
func (w *view) step(at time.Duration, seconds float64, s *trace.Snapshot) error {
	if w.picture != nil {
		w.picture.add(at.Seconds()-seconds, at.Seconds(), groupsOf(s, makeBy(w.flags.By)))
	}
	if w.heat == nil {
		return nil
	}
	return w.heat.add(at, allLatencies(s))
}

// allLatencies is all of s in one: of the kernel's queues, or, if there are none, of its disks.
func allLatencies(s *trace.Snapshot) *latency.Histogram {
	all := new(latency.Histogram)
	for _, c := range s.Cells {
		all.Merge(c.Latency)
	}
	if len(s.Queues) > 0 {
		return all
	}
	for _, c := range s.Block {
		all.Merge(c.InDevice)
	}
	return all
}

// end draws the picture.
func (w *view) end(out *cli.Output, seconds float64) error {
	if w.picture == nil {
		return nil
	}
	err := errors.Join(w.picture.draw(w.file, w.flags.Plot, seconds), w.file.Close())
	if err == nil {
		fmt.Fprintf(out.Stderr, "nvmetrace: drew %s\n", w.flags.Plot)
	}
	return err
}
