package main

import (
	"fmt"
	"math"
	"strings"

	"charm.land/lipgloss/v2"

	"github.com/shadowbell/shadowbell/ebpf/path"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

// pathColours are those of the spans, in the terminal and in the picture: what is before the device and what is behind it go together.
var pathColours = [path.Spans]string{"#f59e0b", "#2a78d6", "#4fb3a5", "#6b7280", "#7fb2ee", "#fbd38d"}

// pathLetters stand for the spans where there are no colours.
var pathLetters = [path.Spans]byte{'g', 'h', 'q', 'D', 'b', 'r'}

// pathText is what is printed for an interval.
func pathText(x pathJSON, colours bool, width int) string {
	var b strings.Builder
	head := fmt.Sprintf("%.1f s", x.Seconds)
	if x.Total {
		head = "totals, " + head
	}
	b.WriteString(head + "\n")
	for i := range x.Groups {
		g := &x.Groups[i]
		b.WriteString("\n" + pathTable(g))
		if g.Commands > 0 {
			b.WriteString("\n  " + pathBar(g, min(max(width-4, 20), 100), colours) + "\n")
		}
	}
	if len(x.Groups) == 0 {
		b.WriteString("  no command ended\n")
	}
	b.WriteString("\n" + pathCountsText(&x.Counts))
	return b.String()
}

// pathTable is the spans of a group.
func pathTable(g *pathGroup) string {
	t := text.Table{Head: []string{"span", "", "mean", "p50", "p99", "share"}}
	for _, s := range g.Spans {
		t.Add(s.Name, string(pathLetters[s.span]), ns(s.Mean), ns(s.P50), ns(s.P99), fmt.Sprintf("%.1f %%", s.Share*100))
	}
	t.Add("all", "", ns(g.Mean), ns(g.P50), ns(g.P99), "")
	head := fmt.Sprintf("  %s: %s commands", g.Name, text.Count(float64(g.Commands)))
	if !g.Guest {
		head += ", from hostmed's fetch to its post (nothing is known of the guest's part)"
	}
	if g.Unmatched > 0 {
		head += fmt.Sprintf("; %s more whose real commands are not known", text.Count(float64(g.Unmatched)))
	}
	return head + "\n" + t.String()
}

// pathBar is the shares of a group's spans as one bar, width cells long.
func pathBar(g *pathGroup, width int, colours bool) string {
	var b strings.Builder
	sum, drawn := 0.0, 0
	for _, s := range g.Spans {
		sum += s.Share
		n := int(math.Round(sum*float64(width))) - drawn
		drawn += n
		cells := strings.Repeat(string(pathLetters[s.span]), n)
		if colours {
			cells = lipgloss.NewStyle().Background(lipgloss.Color(pathColours[s.span])).Foreground(lipgloss.Color("#000000")).Render(cells)
		}
		b.WriteString(cells)
	}
	return b.String()
}

// pathCountsText says how well commands were matched, and what was lost, both in any case.
func pathCountsText(c *pathCounts) string {
	n := func(v uint64) string { return text.Count(float64(v)) }
	var b strings.Builder
	fmt.Fprintf(&b, "  commands  %s: %s matched, %s not matched", n(c.Commands), n(c.Matched), n(c.Unmatched))
	for _, x := range []struct {
		n    uint64
		what string
	}{{c.Own, "answered by hostmed"}, {c.Unseen, "of media that the kernel does not show"}, {c.Guestless, "without the guest's part"}} {
		if x.n > 0 {
			fmt.Fprintf(&b, ", %s %s", n(x.n), x.what)
		}
	}
	fmt.Fprintf(&b, "\n  real      %s matched, %s of them for several commands; %s of hostmed's not matched, %s of others\n", n(c.Real), n(c.Shared), n(c.RealUnmatched), n(c.Foreign))
	fmt.Fprintf(&b, "  lost      %s records, %s events of the kernel", n(c.LostRecords), n(c.LostEvents))
	for _, x := range []struct {
		n    uint64
		what string
	}{
		{c.Suspect, "commands left out for that"}, {c.Dropped, "commands that never ended"}, {c.Full, "too many at a time"}, {c.Late, "too late"},
		{c.Before, "records of commands that began before"},
	} {
		if x.n > 0 {
			fmt.Fprintf(&b, "; %s %s", n(x.n), x.what)
		}
	}
	if c.UnderWay > 0 {
		fmt.Fprintf(&b, "; %s under way", text.Count(float64(c.UnderWay)))
	}
	return b.String() + "\n"
}
