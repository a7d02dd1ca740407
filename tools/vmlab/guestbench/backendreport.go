package guestbench

import (
	"fmt"

	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// BackendRow is one line of the table: medians of the rounds.
type BackendRow struct {
	Job     Job
	Backend Backend
	BackendFigure
	// Against the way without hostmed, within a round.
	Ratio float64 // of commands per second per core; 0 for that way itself
	CPU   float64 // us more of CPU time for a command
	Added float64 // us more until a command has ended, at the median
}

// Rows are the medians, by job and backend.
func (r *BackendReport) Rows() (rows []BackendRow) {
	for _, result := range r.Results {
		for i, b := range Backends {
			median := func(value func(round []BackendFigure) float64) float64 { return median(result.Rounds, value) }
			row := BackendRow{Job: result.Job, Backend: b, BackendFigure: BackendFigure{
				IOPS:    median(func(f []BackendFigure) float64 { return f[i].IOPS }),
				P50:     median(func(f []BackendFigure) float64 { return f[i].P50 }),
				PerCore: median(func(f []BackendFigure) float64 { return f[i].PerCore }),
			}}
			if i%2 == 1 {
				row.Ratio = median(func(f []BackendFigure) float64 { return f[i].PerCore / f[i-1].PerCore })
				row.CPU = median(func(f []BackendFigure) float64 { return 1e6/f[i].PerCore - 1e6/f[i-1].PerCore })
				row.Added = median(func(f []BackendFigure) float64 { return f[i].P50 - f[i-1].P50 })
				row.Costs = costsOf(result.Rounds, i)
			}
			rows = append(rows, row)
		}
	}
	return rows
}

// costsOf is the medians of hostmed's samples of backend i; nil if it took none.
func costsOf(rounds [][]BackendFigure, i int) *Costs {
	var all [4][]float64
	for _, round := range rounds {
		if c := round[i].Costs; c != nil {
			for k, v := range []float64{c.Translate, c.Submit, c.Complete, c.Interrupt} {
				all[k] = append(all[k], v)
			}
		}
	}
	if len(all[0]) == 0 {
		return nil
	}
	return &Costs{middle(all[0]), middle(all[1]), middle(all[2]), middle(all[3])}
}

// Table is the rows for people, in the form that Markdown has for tables.
func (r *BackendReport) Table() string {
	lines := [][]string{{"job", "way", "IOPS", "IOPS per core", "of the way before", "p50", "CPU added", "p50 added", "translate", "submit", "complete", "interrupt"}}
	last := ""
	us := func(v float64) string { return fmt.Sprintf("%.1f us", v) }
	ns := func(v float64) string { return text.Count(v) + " ns" }
	for _, row := range r.Rows() {
		name := row.Job.Name()
		if name == last {
			name = ""
		} else {
			last = name
		}
		line := []string{name, string(row.Backend), text.Count(row.IOPS), text.Count(row.PerCore), "", us(row.P50), "", "", "", "", "", ""}
		if row.Ratio != 0 {
			copy(line[4:], []string{fmt.Sprintf("%.2f", row.Ratio), us(row.P50), us(row.CPU), us(row.Added)})
		}
		if c := row.Costs; c != nil {
			copy(line[8:], []string{ns(c.Translate), ns(c.Submit), ns(c.Complete), ns(c.Interrupt)})
		}
		lines = append(lines, line)
	}
	return markdown(lines, 2)
}
