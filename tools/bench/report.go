package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// report is the JSON object that bench prints.
type report struct {
	Machine machine      `json:"machine"`
	Cases   []caseResult `json:"cases"`
}

type machine struct {
	Model   string `json:"model"`
	Cores   int    `json:"cores"`
	HostCPU int    `json:"host_cpu"`
	LoadCPU int    `json:"load_cpu"`
	Go      string `json:"go"`
	Arch    string `json:"arch"`
	Time    string `json:"time"`
	Quick   bool   `json:"quick,omitempty"`
}

// caseResult is what a case measured. Bare rates are entries a second.
type caseResult struct {
	Name       string       `json:"name"`
	Load       *load.Result `json:"load,omitempty"`
	HostNS     *phases      `json:"host_ns,omitempty"`
	BareBefore float64      `json:"bare_before,omitempty"`
	BareAfter  float64      `json:"bare_after,omitempty"`
	Ratio      float64      `json:"ratio,omitempty"` // of IOPS to the mean of the two
	Figures    []figure     `json:"figures,omitempty"`
	Error      string       `json:"error,omitempty"` // the case could not be measured
}

// phases are the ns of hostmed's worker that a command took, as it has sampled them.
type phases struct {
	Translate float64 `json:"translate"`
	Submit    float64 `json:"submit"`
	Complete  float64 `json:"complete"`
	Interrupt float64 `json:"interrupt"`
}

func (p *phases) String() string {
	if p == nil {
		return ""
	}
	return fmt.Sprintf("%.0f/%.0f/%.0f/%.0f", p.Translate, p.Submit, p.Complete, p.Interrupt)
}

// phasesIn finds what hostmed has logged when its client went; nil: it has not.
func phasesIn(log string) *phases {
	const key = "ns_per_io="
	i := strings.LastIndex(log, key)
	if i < 0 {
		return nil
	}
	p := &phases{}
	if n, _ := fmt.Sscanf(log[i+len(key):], "%f/%f/%f/%f", &p.Translate, &p.Submit, &p.Complete, &p.Interrupt); n != 4 {
		return nil
	}
	return p
}

// figure is a number, and what it should be if there is an aim.
type figure struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Aim   *aim    `json:"aim,omitempty"`
}

type aim struct {
	Bound bound   `json:"bound"`
	Value float64 `json:"value"`
	Met   bool    `json:"met"`
}

type bound string

const (
	atLeast bound = "at least"
	atMost  bound = "at most"
)

// unsteady says that the machine changed its pace during the case, so that the ratio means little.
func (r *caseResult) unsteady() bool {
	return max(r.BareBefore, r.BareAfter) > 1.5*min(r.BareBefore, r.BareAfter)
}

func (r *caseResult) figure(name string, v float64) {
	r.Figures = append(r.Figures, figure{Name: name, Value: v})
}

func (r *caseResult) aim(name string, v float64, b bound, want float64) {
	met := v >= want
	if b == atMost {
		met = v <= want
	}
	r.Figures = append(r.Figures, figure{Name: name, Value: v, Aim: &aim{b, want, met}})
}

// compare adds what needs two cases.
func (r *report) compare() {
	find := func(name string) *caseResult {
		for i := range r.Cases {
			if c := &r.Cases[i]; c.Name == name && c.Load != nil && c.Load.IOPS > 0 {
				return c
			}
		}
		return nil
	}
	for _, suffix := range []string{"qd32", "qd32/each"} {
		if shadow, trap := find("null/shadow/"+suffix), find("null/trap/"+suffix); shadow != nil && trap != nil {
			trap.aim("times as fast with shadow doorbells", shadow.Load.IOPS/trap.Load.IOPS, atLeast, 20)
		}
	}
}

// failed lists the cases that could not be measured.
func (r *report) failed() (names []string) {
	for _, c := range r.Cases {
		if c.Error != "" {
			names = append(names, c.Name)
		}
	}
	return names
}

// print writes what was asked for. An aim that is missed is shown and is not an error: machines differ.
func (r *report) print(g *grammar, out *cli.Output, interrupted bool) error {
	if g.Out != "" {
		if err := r.writeJSON(g.Out); err != nil {
			return err
		}
	}
	var err error
	if g.JSON {
		e := json.NewEncoder(out.Stdout)
		e.SetIndent("", "  ")
		err = e.Encode(r)
	} else {
		_, err = fmt.Fprint(out.Stdout, r.table())
	}
	if err != nil {
		return err
	}
	if failed := r.failed(); len(failed) > 0 {
		return fmt.Errorf("not measured: %s", strings.Join(failed, ", "))
	}
	if interrupted {
		return errors.New("interrupted")
	}
	return nil
}

func (r *report) table() string {
	m := r.Machine
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %d cores (hostmed on %d, load on %d), %s", m.Model, m.Cores, m.HostCPU, m.LoadCPU, m.Go)
	if m.Quick {
		b.WriteString(", QUICK: no figures to quote")
	}
	b.WriteString("\n\n")

	rates := text.Table{Head: []string{"case", "IOPS", "MiB/s", "p50", "p99", "MMIO/IO", "host ns", "bare rings", "ratio "}}
	figs := text.Table{Head: []string{"case", "figure", "measured", "aim", ""}, Left: map[int]bool{1: true, 4: true}}
	anyRate, anyFigure, anyUnsteady := false, false, false
	for _, c := range r.Cases {
		if l := c.Load; l != nil {
			anyRate = true
			bare, ratio := "", ""
			if c.BareBefore > 0 {
				bare, ratio = text.Count((c.BareBefore+c.BareAfter)/2), fmt.Sprintf("%.2f ", c.Ratio)
				if c.unsteady() {
					anyUnsteady = true
					ratio = fmt.Sprintf("%.2f?", c.Ratio)
				}
			}
			rates.Add(c.Name, text.Count(l.IOPS), text.Count(l.BandwidthMiB), text.Duration(time.Duration(l.Latency.P50)),
				text.Duration(time.Duration(l.Latency.P99)), text.Ratio(l.MMIOPerIO), c.HostNS.String(), bare, ratio)
		}
		for _, f := range c.Figures {
			anyFigure = true
			want, met := "", ""
			if a := f.Aim; a != nil {
				want, met = fmt.Sprintf("%s %s", a.Bound, number(a.Value)), "met"
				if !a.Met {
					met = "MISSED"
				}
			}
			figs.Add(c.Name, f.Name, number(f.Value), want, met)
		}
		if c.Error != "" {
			anyFigure = true
			figs.Add(c.Name, "not measured: "+c.Error)
		}
	}
	if anyRate {
		b.WriteString(rates.String())
		b.WriteString("\n  host ns: what a command took of hostmed's worker, to translate / submit / complete / interrupt\n")
	}
	if anyUnsteady {
		b.WriteString("\n  ? the bare rings before and after differ by more than a half: the machine was busy with something else\n")
	}
	if anyRate && anyFigure {
		b.WriteByte('\n')
	}
	if anyFigure {
		b.WriteString(figs.String())
	}
	return b.String()
}

// number prints large values whole and small ones with two figures.
func number(v float64) string {
	switch {
	case v >= 1000 || v <= -1000:
		return text.Count(v)
	case v >= 100 || v <= -100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10 || v <= -10:
		return fmt.Sprintf("%.1f", v)
	}
	return text.Ratio(v)
}

// modelName finds the processor's name in /proc/cpuinfo.
func modelName(cpuinfo string) string {
	for line := range strings.Lines(cpuinfo) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown processor"
}
