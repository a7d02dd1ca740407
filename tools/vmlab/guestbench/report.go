package guestbench

import (
	"fmt"
	"slices"

	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// Report is what Measure has found. Its JSON form is that of `vmlab guestbench --json`.
type Report struct {
	Accel     string      `json:"accel"` // tcg: the guest's CPU is emulated
	CPUs      int         `json:"guest_cpus"`
	Rounds    int         `json:"rounds"`
	Seconds   float64     `json:"seconds"` // of each measurement
	Doorbells string      `json:"doorbells"`
	Poll      string      `json:"host_poll"` // how long hostmed polls an empty queue
	Results   []JobResult `json:"results"`
}

// JobResult is one job on all ways: by round, then in the order of Ways.
type JobResult struct {
	Job    Job        `json:"job"`
	Rounds [][]Figure `json:"rounds"`
}

// Row is one line of the table.
type Row struct {
	Job Job
	Way Way
	Figure
	Ratio float64 // of IOPS to those of the kernel's driver: the median of the rounds' ratios
}

// Rows are the medians of the rounds, by job and way.
func (r *Report) Rows() (rows []Row) {
	for _, result := range r.Results {
		for i, way := range Ways {
			median := func(value func(round []Figure) float64) float64 { return median(result.Rounds, value) }
			rows = append(rows, Row{
				Job: result.Job, Way: way,
				Figure: Figure{
					IOPS: median(func(f []Figure) float64 { return f[i].IOPS }), P50: median(func(f []Figure) float64 { return f[i].P50 }),
					P99: median(func(f []Figure) float64 { return f[i].P99 }), CPU: median(func(f []Figure) float64 { return f[i].CPU }),
					MMIO: median(func(f []Figure) float64 { return f[i].MMIO }),
				},
				Ratio: median(func(f []Figure) float64 { return f[i].IOPS / f[0].IOPS }),
			})
		}
	}
	return rows
}

// median is that of a value of each round.
func median[F any](rounds [][]F, value func(round []F) float64) float64 {
	var all []float64
	for _, round := range rounds {
		all = append(all, value(round))
	}
	return middle(all)
}

// middle returns the median.
func middle(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// Table is the rows for people, in the form that Markdown has for tables.
func (r *Report) Table() string {
	lines := [][]string{{"job", "way", "IOPS", "of kernel nvme", "p50", "p99", "guest CPU per I/O", "MMIO per I/O"}}
	last := ""
	us := func(v float64) string { return text.Count(v) + " us" }
	for _, row := range r.Rows() {
		name := row.Job.Name()
		if name == last {
			name = ""
		} else {
			last = name
		}
		lines = append(lines, []string{
			name, string(row.Way), text.Count(row.IOPS), fmt.Sprintf("%.2f", row.Ratio), us(row.P50), us(row.P99), us(row.CPU), text.Ratio(row.MMIO),
		})
	}
	return markdown(lines, 2)
}

// markdown lays out a table whose first line is its head; the first columns are aligned to the left.
func markdown(lines [][]string, left int) string {
	width := make([]int, len(lines[0]))
	for _, l := range lines {
		for i, c := range l {
			width[i] = max(width[i], len([]rune(c)))
		}
	}
	out := ""
	for n, l := range lines {
		for i, c := range l {
			if i < left {
				out += fmt.Sprintf("| %-*s ", width[i], c)
			} else {
				out += fmt.Sprintf("| %*s ", width[i], c)
			}
		}
		out += "|\n"
		if n > 0 {
			continue
		}
		for i, w := range width {
			rule := "---------------------------"[:w]
			if i < left {
				out += "| " + rule + " "
			} else {
				out += "| " + rule[1:] + ": "
			}
		}
		out += "|\n"
	}
	return out
}
