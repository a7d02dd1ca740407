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
	Added float64 // us more until a command has ended, at the median
}

// Rows are the medians, by job and backend.
func (r *BackendReport) Rows() (rows []BackendRow) {
	for _, result := range r.Results {
		for i, b := range Backends {
			median := func(value func(round []BackendFigure) float64) float64 { return median(result.Rounds, value) }
			row := BackendRow{Job: result.Job, Backend: b, BackendFigure: BackendFigure{
				IOPS:      median(func(f []BackendFigure) float64 { return f[i].IOPS }),
				P50:       median(func(f []BackendFigure) float64 { return f[i].P50 }),
				PerCore:   median(func(f []BackendFigure) float64 { return f[i].PerCore }),
				Guest:     median(func(f []BackendFigure) float64 { return f[i].Guest }),
				GuestBusy: median(func(f []BackendFigure) float64 { return f[i].GuestBusy }),
				Hostmed:   median(func(f []BackendFigure) float64 { return f[i].Hostmed }),
				MMIO:      median(func(f []BackendFigure) float64 { return f[i].MMIO }),
			}}
			if i%2 == 1 {
				row.Ratio = median(func(f []BackendFigure) float64 { return f[i].PerCore / f[i-1].PerCore })
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

// Table is the rows for people, in the form that Markdown has for tables: what is seen from outside, and where the time of the two programs goes.
func (r *BackendReport) Table() string {
	rates := [][]string{{"job", "way", "IOPS", "p50", "p50 added", "IOPS per core", "of the way before"}}
	times := [][]string{{"job", "way", "guestdrv", "of it busy", "hostmed", "of it busy", "per busy core", "translate", "submit", "complete", "interrupt", "MMIO"}}
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
		line := []string{name, string(row.Backend), text.Count(row.IOPS), us(row.P50), "", text.Count(row.PerCore), ""}
		if row.Ratio != 0 {
			line[4], line[6] = us(row.Added), fmt.Sprintf("%.2f", row.Ratio)
		}
		rates = append(rates, line)
		if row.Guest == 0 {
			continue // fio
		}
		line = []string{name, string(row.Backend), us(row.Guest), us(row.GuestBusy), "", "", "", "", "", "", "", ""}
		if row.Hostmed == 0 && row.GuestBusy > 0 {
			line[6] = text.Count(1e6 / row.GuestBusy)
		}
		if row.Hostmed > 0 {
			line[4] = us(row.Hostmed)
		}
		if c := row.Costs; c != nil {
			copy(line[5:], []string{us(c.Busy() / 1e3), text.Count(1e9 / c.Busy()), ns(c.Translate), ns(c.Submit), ns(c.Complete), ns(c.Interrupt)})
		}
		if row.MMIO > 0 {
			line[11] = text.Ratio(row.MMIO)
		}
		times = append(times, line)
	}
	return markdown(rates, 2) + "\nCPU time for a command:\n\n" + markdown(times, 2)
}
