package guestbench

import (
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestEveryBackendMeasures is the bench itself, short: each way works, and each row has its figures.
func TestEveryBackendMeasures(t *testing.T) {
	cfg := Config{Jobs: []Job{{"randread", "4k", 4}}, Rounds: 1, Runtime: time.Second, CPUs: 2}
	report, err := MeasureBackends(t.Context(), vmlab.Open(t), cfg, func(what string) { t.Log(what) })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", report.Table())
	rows := report.Rows()
	if len(rows) != len(Backends) {
		t.Fatalf("%d rows, want %d", len(rows), len(Backends))
	}
	for i, r := range rows {
		if r.IOPS <= 0 || r.PerCore <= 0 || r.P50 <= 0 || (i%2 == 1) != (r.Ratio > 0) {
			t.Errorf("%s: %+v", r.Backend, r)
		}
	}
}

func TestBackendRowsCompareWithinARound(t *testing.T) {
	round := func(bare, via float64, c *Costs) []BackendFigure {
		pair := []BackendFigure{{PerCore: bare, P50: 10}, {PerCore: via, P50: 13, Costs: c}}
		return append(append(pair, pair...), pair...)
	}
	r := BackendReport{Results: []BackendResult{{Job: Jobs[0], Rounds: [][]BackendFigure{
		round(1e6, 0.5e6, &Costs{Translate: 100, Complete: 5}), round(1e5, 2e4, nil), round(1e6, 0.8e6, &Costs{Translate: 300, Complete: 5}),
	}}}}
	rows := r.Rows()
	if got := rows[1]; got.Ratio != 0.5 || got.CPU != 1 || got.Added != 3 || *got.Costs != (Costs{Translate: 200, Complete: 5}) || rows[0].Costs != nil {
		t.Errorf("%+v, %+v", got, got.Costs)
	}
	if table := strings.Join(strings.Fields(r.Table()), " "); !strings.Contains(table, "| 0.50 | 13.0 us | 1.0 us | 3.0 us | 200 ns | 0 ns | 5 ns | 0 ns |") {
		t.Errorf("\n%s", r.Table())
	}
}

func TestParseCosts(t *testing.T) {
	phase := func(ns time.Duration) hostmed.Phase { return hostmed.Phase{Commands: 2, Time: 2 * ns} }
	said := hostmed.Costs{Translate: phase(101), Submit: phase(7), Complete: phase(20), Interrupt: phase(3)}
	c, err := parseCosts("x\n… client disconnected: reads=1 ns_per_io=" + said.String() + "\n")
	if err != nil || *c != (Costs{101, 7, 20, 3}) {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err := parseCosts("client disconnected: reads=1"); c != nil || err != nil {
		t.Errorf("%+v, %v", c, err)
	}
}
