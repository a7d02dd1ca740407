package doorbells

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestMMIOPerIO: a stock kernel uses our doorbell pages, and so hardly rings; without them each command is rung for, and each completion.
func TestMMIOPerIO(t *testing.T) {
	depths := []int{1, 4, 32} // of Depths, all of which make doorbells measures
	rows, err := Measure(t.Context(), vmlab.Open(t), depths, time.Second, func(what string) { t.Log(what) })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", Table(rows))
	if len(rows) != len(depths) {
		t.Fatalf("%d rows", len(rows))
	}
	for _, r := range rows {
		for name, f := range map[string]Figure{"trap": r.Trap, "shadow": r.Shadow, "QEMU": r.QEMU} {
			if f.IOPS <= 0 {
				t.Errorf("queue depth %d, %s: no I/O", r.Depth, name)
			}
		}
		if r.Shadow.MMIO > r.Trap.MMIO/2 {
			t.Errorf("queue depth %d: %.3f MMIO writes per I/O with shadow doorbells, %.3f without", r.Depth, r.Shadow.MMIO, r.Trap.MMIO)
		}
	}
	first, last := rows[0], rows[len(rows)-1]
	// Completions that come together are acknowledged together, so only a queue depth of 1 makes it two.
	if first.Trap.MMIO < 1.9 || first.Trap.MMIO > 2.1 {
		t.Errorf("trap, queue depth 1: %.3f MMIO writes per I/O, want 2", first.Trap.MMIO)
	}
	if last.Trap.MMIO < 1 || last.Trap.MMIO > 2.1 {
		t.Errorf("trap, queue depth %d: %.3f MMIO writes per I/O, want 1 to 2", last.Depth, last.Trap.MMIO)
	}
	if last.Shadow.MMIO > 0.05 {
		t.Errorf("shadow, queue depth %d: %.3f MMIO writes per I/O, want at most 0.05", last.Depth, last.Shadow.MMIO)
	}
}

func TestPlotAndTable(t *testing.T) {
	rows := []Row{
		{1, Figure{1000, 2}, Figure{5000, 0.01}, Figure{2000, 1}},
		{32, Figure{2000, 1.2}, Figure{50000, 0}, Figure{6000, 0.5}},
	}
	for name, want := range map[string]string{"x.svg": "</svg>", "x.png": "IEND"} {
		var b bytes.Buffer
		if err := Plot(&b, rows, name); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(b.String(), want) || name == "x.svg" && !strings.Contains(b.String(), "doorbell writes") {
			t.Errorf("%s is no picture: %d bytes", name, b.Len())
		}
	}
	if err := Plot(&bytes.Buffer{}, rows, "x.doc"); err == nil || !strings.Contains(err.Error(), ".svg") {
		t.Errorf("x.doc: %v", err)
	}
	if got := Table(rows); !strings.Contains(got, "50,000") || !strings.Contains(got, "0.50") || strings.Count(got, "\n") != 4 {
		t.Errorf("table:\n%s", got)
	}
}
