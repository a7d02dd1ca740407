package main

import (
	"fmt"
	"io"
	"math/bits"
	"strings"
	"time"

	"charm.land/lipgloss/v2"

	"github.com/shadowbell/shadowbell/shared/latency"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// heatPrinter prints a heat map as it comes: a line for each step of time, latency from left to right. How dark a cell is says which part of the step's
// commands took that long: twice as many are one shade more.
type heatPrinter struct {
	w      io.Writer
	colour bool
	parts  int // cells of a power of two
	lines  int
}

const (
	heatFirst = 11 // powers of two of ns: 2.05 us
	heatLast  = 31 // 2.1 s; what is longer is in the last cell, what is shorter in the first
	heatShade = " .:-=+*#@"
	heatLeft  = 10 // columns before the map
	heatRight = 24 // and after
	headEvery = 20 // lines
)

// heatColours are the shades above nothing, for terminals of 256 colours.
var heatColours = []string{"53", "89", "125", "161", "197", "203", "215", "228"}

func newHeatPrinter(w io.Writer, colour bool, width int) *heatPrinter {
	h := &heatPrinter{w: w, colour: colour, parts: 1}
	for _, p := range []int{2, 4} {
		if heatLeft+heatRight+(heatLast-heatFirst)*p <= width {
			h.parts = p
		}
	}
	return h
}

// add prints one step; at is when it ended, since the start.
func (h *heatPrinter) add(at time.Duration, lat *latency.Histogram) error {
	if h.lines%headEvery == 0 {
		if _, err := io.WriteString(h.w, h.head()); err != nil {
			return err
		}
	}
	h.lines++
	cells := make([]uint64, (heatLast-heatFirst)*h.parts)
	for b := range lat.All() {
		i := part(b.Low, h.parts) - heatFirst*h.parts
		cells[min(max(i, 0), len(cells)-1)] += b.Count
	}
	var line strings.Builder
	fmt.Fprintf(&line, "%*.1f s ", heatLeft-3, at.Seconds())
	for _, n := range cells {
		line.WriteString(h.cell(shade(n, lat.Count())))
	}
	fmt.Fprintf(&line, " %s", text.Count(float64(lat.Count())))
	if lat.Count() > 0 {
		fmt.Fprintf(&line, "  p99 %s", ns(int64(lat.Quantile(0.99))))
	}
	line.WriteString("\n")
	if h.colour {
		_, err := lipgloss.Fprint(h.w, line.String())
		return err
	}
	_, err := io.WriteString(h.w, line.String())
	return err
}

// shade is 0 for nothing, and 8 for more than half of all; each one less is half of it, down to 1.
func shade(n, of uint64) int {
	if n == 0 {
		return 0
	}
	return max(1, 9-bits.Len64(of/n))
}

func (h *heatPrinter) cell(shade int) string {
	switch {
	case !h.colour:
		return heatShade[shade : shade+1]
	case shade == 0:
		return " "
	}
	return lipgloss.NewStyle().Background(lipgloss.Color(heatColours[shade-1])).Render(" ")
}

// head is the latency axis.
func (h *heatPrinter) head() string {
	axis := []byte(strings.Repeat(" ", heatLeft+(heatLast-heatFirst)*h.parts))
	for d := 10 * time.Microsecond; d <= time.Second; d *= 10 {
		label := "|" + strings.ReplaceAll(d.String(), "µ", "u")
		at := heatLeft + part(d, h.parts) - heatFirst*h.parts
		copy(axis[min(at, len(axis)):], label)
	}
	return strings.TrimRight(string(axis), " ") + "\n"
}
