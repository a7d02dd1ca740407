package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/tools/conformance/suite"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// printer prints a run in one of three ways.
type printer interface {
	result(suite.Result) // after each case
	end(results []suite.Result, took time.Duration) error
}

func (r *runCmd) printer(w io.Writer) printer {
	switch {
	case r.Tap:
		return &tap{w: w}
	case r.JSON:
		return &object{w: w, device: r.Device}
	}
	return &table{w: w, verbose: r.Verbose}
}

// listing is what --list prints.
func listing(cases []*suite.Case) string {
	t := text.Table{Head: []string{"case", "", "demands", "by"}, Left: map[int]bool{1: true, 2: true, 3: true}}
	for _, c := range cases {
		kind := "optional"
		if c.Required() {
			kind = "required"
		}
		t.Add(c.ID, kind, c.Text, c.Ref)
	}
	return t.String() + fmt.Sprintf("\n  %d cases\n", len(cases))
}

// table is for people: failures as they come, the rest with verbose, a summary.
type table struct {
	w       io.Writer
	verbose bool
}

var marks = map[suite.Outcome]string{suite.Passed: "ok", suite.Failed: "FAILED", suite.Skipped: "skipped"}

func (t *table) result(r suite.Result) {
	if r.Outcome != suite.Failed && !t.verbose {
		return
	}
	fmt.Fprintf(t.w, "  %-8s %-40s", marks[r.Outcome], r.Case.ID)
	switch r.Outcome {
	case suite.Failed:
		fmt.Fprintf(t.w, "\n           demands: %s (%s)\n           seen:    %s\n", r.Case.Text, r.Case.Ref, r.Seen)
	case suite.Skipped:
		fmt.Fprintf(t.w, " %s\n", r.Seen)
	default:
		fmt.Fprintf(t.w, " %s\n", text.Duration(r.Took))
	}
}

func (t *table) end(results []suite.Result, took time.Duration) error {
	reasons := map[string]int{}
	var order []string
	for _, r := range results {
		if r.Outcome == suite.Skipped {
			if reasons[r.Seen] == 0 {
				order = append(order, r.Seen)
			}
			reasons[r.Seen]++
		}
	}
	if !t.verbose {
		for _, why := range order {
			fmt.Fprintf(t.w, "  skipped  %3d case%s: %s\n", reasons[why], plural(reasons[why]), why)
		}
	}
	_, err := fmt.Fprintf(t.w, "%d passed, %d failed, %d skipped in %s\n", suite.Count(results, suite.Passed), suite.Count(results, suite.Failed),
		suite.Count(results, suite.Skipped), text.Duration(took))
	return err
}

func plural(n int) string {
	if n == 1 {
		return ""
	}
	return "s"
}

// tap is TAP version 13. The plan stands at the end.
type tap struct {
	w io.Writer
	n int
}

func (t *tap) result(r suite.Result) {
	if t.n == 0 {
		fmt.Fprintln(t.w, "TAP version 13")
	}
	t.n++
	switch r.Outcome {
	case suite.Passed:
		fmt.Fprintf(t.w, "ok %d - %s\n", t.n, r.Case.ID)
	case suite.Skipped:
		fmt.Fprintf(t.w, "ok %d - %s # SKIP %s\n", t.n, r.Case.ID, r.Seen)
	case suite.Failed:
		fmt.Fprintf(t.w, "not ok %d - %s\n  ---\n  demands: %s\n  by: %s\n  seen: %s\n  ...\n", t.n, r.Case.ID,
			strconv.Quote(r.Case.Text), strconv.Quote(r.Case.Ref), strconv.Quote(r.Seen))
	}
}

func (t *tap) end(results []suite.Result, _ time.Duration) error {
	_, err := fmt.Fprintf(t.w, "1..%d\n", len(results))
	return err
}

// object is one JSON object.
type object struct {
	w      io.Writer
	device string
}

type resultJSON struct {
	ID           string  `json:"id"`
	Demands      string  `json:"demands"`
	By           string  `json:"by"`
	Required     bool    `json:"required"`
	Result       string  `json:"result"`
	Seen         string  `json:"seen,omitempty"`
	Skipped      string  `json:"skipped,omitempty"`
	Milliseconds float64 `json:"ms"`
}

func (o *object) result(suite.Result) {}

func (o *object) end(results []suite.Result, took time.Duration) error {
	all := make([]resultJSON, 0, len(results))
	for _, r := range results {
		j := resultJSON{
			ID: r.Case.ID, Demands: r.Case.Text, By: r.Case.Ref, Required: r.Case.Required(), Result: string(r.Outcome),
			Milliseconds: float64(r.Took.Microseconds()) / 1000,
		}
		switch r.Outcome {
		case suite.Failed:
			j.Seen = r.Seen
		case suite.Skipped:
			j.Skipped = r.Seen
		}
		all = append(all, j)
	}
	enc := json.NewEncoder(o.w)
	enc.SetIndent("", "  ")
	return enc.Encode(map[string]any{
		"device": strings.TrimSpace(o.device), "seconds": took.Seconds(), "cases": all,
		"passed": suite.Count(results, suite.Passed), "failed": suite.Count(results, suite.Failed), "skipped": suite.Count(results, suite.Skipped),
	})
}
