package main

import (
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

func table(rows []row) string {
	t := text.Table{Head: []string{"doorbells", "IOPS", "p50", "MMIO per I/O", "CPU at idle"}}
	for _, r := range rows {
		t.Add(r.doorbells, text.Count(r.result.IOPS), text.Duration(time.Duration(r.result.Latency.P50)), text.Ratio(r.result.MMIOPerIO), idle(r.result.Idle))
	}
	return t.String()
}

// idle is what both sides together cost, in percent of a core.
func idle(i *load.Idle) string {
	if i == nil || i.Host == nil {
		return "unknown"
	}
	return fmt.Sprintf("%.1f %%", i.Guest+*i.Host)
}

func chart(rows []row, width int, unicode bool) string {
	var bars []text.Bar
	for _, r := range rows {
		bars = append(bars, text.Bar{Label: r.doorbells, Value: r.result.IOPS, Text: text.Count(r.result.IOPS) + " IOPS"})
	}
	out := text.Bars(bars, min(max(width-40, 10), 60), unicode)
	if len(rows) == 2 && rows[0].result.IOPS > 0 {
		out += fmt.Sprintf("\n  %s is %.1f times as fast as %s.\n", rows[1].doorbells, rows[1].result.IOPS/rows[0].result.IOPS, rows[0].doorbells)
	}
	return out
}
