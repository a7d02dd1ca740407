package guestbench

import (
	"fmt"
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
		pair := []BackendFigure{{PerCore: bare, P50: 10, Guest: 9, GuestBusy: 4}, {PerCore: via, P50: 13, Guest: 8, GuestBusy: 2, Hostmed: 7, MMIO: 0.25, Costs: c}}
		return append(append(pair, pair...), pair...)
	}
	r := BackendReport{Results: []BackendResult{{Job: Jobs[0], Rounds: [][]BackendFigure{
		round(1e6, 0.5e6, &Costs{Translate: 100, Complete: 5}), round(1e5, 2e4, nil), round(1e6, 0.8e6, &Costs{Translate: 300, Complete: 5}),
	}}}}
	rows := r.Rows()
	if got := rows[1]; got.Ratio != 0.5 || got.Added != 3 || *got.Costs != (Costs{Translate: 200, Complete: 5}) || rows[0].Costs != nil {
		t.Errorf("%+v, %+v", got, got.Costs)
	}
	table := strings.Join(strings.Fields(r.Table()), " ")
	for _, want := range []string{
		"| guestdrv, hostmed vfio: | 0 | 13.0 us | 3.0 us | 500,000 | 0.50 |",
		"| guestdrv on the device | 9.0 us | 4.0 us | | | 250,000 | | | | | |",
		"| guestdrv, hostmed vfio: | 8.0 us | 2.0 us | 7.0 us | 0.2 us | 4,878,049 | 200 ns | 0 ns | 5 ns | 0 ns | 0.25 |",
	} {
		if !strings.Contains(table, want) {
			t.Errorf("%q is missing in\n%s", want, r.Table())
		}
	}
}

func TestParseCPU(t *testing.T) {
	const said = `{"iops":1,"mmio_per_io":0.5,"cpu_s_per_mio":{"guest":9,"host":7,"guest_polling":5}}`
	var bare, via BackendFigure
	if err := bare.addCPU([]byte(said), true); err != nil || bare != (BackendFigure{Guest: 9, GuestBusy: 4, MMIO: 0.5}) {
		t.Errorf("%+v, %v", bare, err)
	}
	if err := via.addCPU([]byte(said), false); err != nil || via != (BackendFigure{Guest: 9, GuestBusy: 4, Hostmed: 7}) {
		t.Errorf("%+v, %v", via, err)
	}
	if err := via.addCPU([]byte(`{"cpu_s_per_mio":{"guest":2,"host":null,"guest_polling":3}}`), false); err != nil || via.GuestBusy != 0 {
		t.Errorf("%+v, %v", via, err)
	}
}

func TestParseCounters(t *testing.T) {
	line := func(commands, copied, doorbells int) string {
		return fmt.Sprintf("x\n2026 [INFO]  hostmed: counters: subsystem=nqn.a nsid=1 spec=\"vfio:0,nsid=1\" commands=%d native=0 mapped=0 copied=%d waited=0 repeated=0 failed=0 doorbells=%d throttled=0\n", commands, copied, doorbells)
	}
	if mmio, err := parseCounters(line(100, 10, 25)); err != nil || mmio != 0.25 {
		t.Errorf("%v, %v", mmio, err)
	}
	for _, bad := range []string{"", line(0, 0, 0), line(100, 51, 25)} {
		if _, err := parseCounters(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
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
