// Package text lays out what the tools print: numbers as people read them, tables, bar charts, and one live
// line on a terminal. It knows nothing of what the numbers mean.
package text

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Count prints n with thousands apart: "1,234,567". Fractions are rounded away.
func Count(n float64) string {
	s := strconv.FormatFloat(math.Abs(math.Round(n)), 'f', 0, 64)
	for at := len(s) - 3; at > 0; at -= 3 {
		s = s[:at] + "," + s[at:]
	}
	if n <= -0.5 {
		s = "-" + s
	}
	return s
}

// Ratio prints a small number with as many digits as it needs: "2.00", "0.031", "0.00012", "0".
func Ratio(v float64) string {
	a := math.Abs(v)
	switch {
	case v == 0:
		return "0"
	case a < 1e-9:
		return "<1e-9"
	case a >= 1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	// Two significant figures.
	digits := 1 - int(math.Floor(math.Log10(a)))
	return strconv.FormatFloat(v, 'f', digits, 64)
}

// Duration prints d with three figures in the unit that fits: "690 ns", "3.92 us", "1.20 ms", "2.5 s".
func Duration(d time.Duration) string {
	v, unit := float64(d), "ns"
	for _, u := range []string{"us", "ms", "s"} {
		if math.Abs(v) < 1000 {
			break
		}
		v, unit = v/1000, u
	}
	switch {
	case unit == "ns" || math.Abs(v) >= 100:
		return fmt.Sprintf("%.0f %s", v, unit)
	case math.Abs(v) >= 10:
		return fmt.Sprintf("%.1f %s", v, unit)
	}
	return fmt.Sprintf("%.2f %s", v, unit)
}

// Table is rows of cells in columns. The first column is aligned to the left, the others to the right, unless
// Left says otherwise.
type Table struct {
	Head []string
	Left map[int]bool // columns that are aligned to the left, beside the first
	rows [][]string
}

// Add appends a row; missing cells are empty.
func (t *Table) Add(cells ...string) { t.rows = append(t.rows, cells) }

// String prints the table, each line ended, with two spaces before it and between columns.
func (t *Table) String() string {
	all := t.rows
	if t.Head != nil {
		all = append([][]string{t.Head}, all...)
	}
	var width []int
	for _, row := range all {
		for i, cell := range row {
			if i == len(width) {
				width = append(width, 0)
			}
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for r, row := range all {
		line := strings.Builder{}
		for i, w := range width {
			cell := ""
			if i < len(row) {
				cell = row[i]
			}
			pad := strings.Repeat(" ", w-utf8.RuneCountInString(cell))
			line.WriteString("  ")
			if i == 0 || t.Left[i] {
				line.WriteString(cell + pad)
			} else {
				line.WriteString(pad + cell)
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
		if r == 0 && t.Head != nil {
			b.WriteString("  " + strings.Repeat("-", utf8.RuneCountInString(line.String())-2) + "\n")
		}
	}
	return b.String()
}

// Bar is one bar of a chart.
type Bar struct {
	Label string
	Value float64
	Text  string // what stands behind the bar
}

// Bars draws one line for each bar, the longest width cells long, with eighths of a cell on a terminal that has
// Unicode, else with '#'.
func Bars(bars []Bar, width int, unicode bool) string {
	largest, label := 0.0, 0
	for _, b := range bars {
		largest = max(largest, b.Value)
		label = max(label, utf8.RuneCountInString(b.Label))
	}
	var out strings.Builder
	for _, b := range bars {
		length := 0.0
		if largest > 0 {
			length = math.Max(b.Value, 0) / largest * float64(width)
		}
		cells := bar(length, unicode)
		if cells == "" && b.Value > 0 {
			cells = bar(0.25, unicode) + strings.Repeat("|", b2i(!unicode)) // not nothing
		}
		pad := strings.Repeat(" ", label-utf8.RuneCountInString(b.Label))
		fmt.Fprintf(&out, "  %s%s  %s %s\n", b.Label, pad, cells, b.Text)
	}
	return out.String()
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func bar(length float64, unicode bool) string {
	if !unicode {
		return strings.Repeat("#", int(math.Round(length)))
	}
	eighths := int(math.Round(length * 8))
	s := strings.Repeat("█", eighths/8)
	if rest := eighths % 8; rest > 0 {
		s += string(rune(0x2590 - rest)) // from ▏ (1/8, U+258F) to ▉ (7/8, U+2589)
	}
	return s
}
