package guestbench

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestEveryWayMeasures is the bench itself, short: each way to the disk works in one stock guest, and each row has all its figures.
func TestEveryWayMeasures(t *testing.T) {
	cfg := Config{Jobs: []Job{{"randread", "4k", 4}}, Rounds: 1, Runtime: time.Second, CPUs: 1}
	report, err := Measure(t.Context(), vmlab.Open(t), cfg, func(what string) { t.Log(what) })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", report.Table())
	rows := report.Rows()
	if len(rows) != len(cfg.Jobs)*len(Ways) {
		t.Fatalf("%d rows, want %d for each of %d jobs", len(rows), len(Ways), len(cfg.Jobs))
	}
	for i, r := range rows {
		if r.Way != Ways[i%len(Ways)] {
			t.Errorf("row %d is %s, want %s", i, r.Way, Ways[i%len(Ways)])
		}
		if r.IOPS <= 0 || r.Ratio <= 0 || r.P50 <= 0 || r.P99 < r.P50 || r.CPU <= 0 || r.MMIO < 0 || math.IsNaN(r.MMIO) {
			t.Errorf("%s, %s: %+v", r.Job.Name(), r.Way, r)
		}
	}
	if b, err := json.Marshal(report); err != nil || !strings.Contains(string(b), `"mmio_per_io"`) || !strings.Contains(string(b), `"doorbells":"shadow"`) {
		t.Errorf("%s, %v", b, err)
	}
}

func TestRowsAreMediansAndRatiosOfRounds(t *testing.T) {
	round := func(kernel, ublk, nbd, library float64) []Figure {
		return []Figure{{IOPS: kernel, MMIO: 1}, {IOPS: ublk}, {IOPS: nbd, CPU: 7}, {IOPS: library}}
	}
	r := Report{Results: []JobResult{{Job: Jobs[0], Rounds: [][]Figure{round(100, 50, 10, 200), round(1000, 500, 100, 4000), round(10, 5, 2, 30)}}}}
	rows := r.Rows()
	for i, want := range []struct{ iops, ratio float64 }{{100, 1}, {50, 0.5}, {10, 0.1}, {200, 3}} {
		if rows[i].IOPS != want.iops || rows[i].Ratio != want.ratio {
			t.Errorf("%s: %v IOPS, %v of the kernel's, want %v", rows[i].Way, rows[i].IOPS, rows[i].Ratio, want)
		}
	}
	table := r.Table()
	for _, want := range []string{"| randread 4k qd1 | kernel nvme ", "| 1.00 |", "1.00", "| guestdrv, NBD ", "0.50", "3.00"} {
		if !strings.Contains(table, want) && !strings.Contains(strings.Join(strings.Fields(table), " "), want) {
			t.Errorf("%q is missing in\n%s", want, table)
		}
	}
	if n := strings.Count(table, "\n"); n != 6 {
		t.Errorf("%d lines:\n%s", n, table)
	}
}

func TestMiddle(t *testing.T) {
	for want, v := range map[float64][]float64{0: nil, 3: {3}, 2: {1, 3}, 5: {9, 5, 1}} {
		if got := middle(v); got != want {
			t.Errorf("median of %v is %v", v, got)
		}
	}
}

func TestParseBusy(t *testing.T) {
	const text = "cpu  100 0 100 800 0 0 0 0 0 0\ncpu  150 0 110 880 10 30 20 0 0 0\nrest\n"
	busy, rest, err := parseBusy(text)
	if err != nil || math.Abs(busy-0.55) > 1e-9 || rest != "rest\n" {
		t.Errorf("%v, %q, %v", busy, rest, err)
	}
	for _, bad := range []string{"", "cpu 1 2 3\n", "cpu 1 2 3 4 5 6 7 8\ncpu 1 2 3 4 5 6 7 8\n", "cpu a 2 3 4 5 6 7 8\n"} {
		if _, _, err := parseBusy(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestParseLoads(t *testing.T) {
	const fio = `note: something
{"jobs":[{"error":0,"read":{"iops":0},"write":{"iops":1234.5,"clat_ns":{"percentile":{"50.000000":2000,"99.000000":30000}}}}]}`
	if f, err := parseFio([]byte(fio)); err != nil || f != (Figure{IOPS: 1234.5, P50: 2, P99: 30}) {
		t.Errorf("%+v, %v", f, err)
	}
	const library = `{"iops":10,"errors":0,"lat_ns":{"p50":1000,"p99":2000}}`
	if f, err := parseLibrary([]byte(library)); err != nil || f != (Figure{IOPS: 10, P50: 1, P99: 2}) {
		t.Errorf("%+v, %v", f, err)
	}
	for _, bad := range []string{"", `{"jobs":[]}`, `{"jobs":[{"error":5}]}`, `{"jobs":[{"error":0,"read":{"iops":0}}]}`} {
		if _, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("fio: %q was taken", bad)
		}
	}
	for _, bad := range []string{"", `{}`, `{"iops":10,"errors":1,"lat_ns":{"p50":1000,"p99":2000}}`} {
		if _, err := parseLibrary([]byte(bad)); err == nil {
			t.Errorf("library: %q was taken", bad)
		}
	}
}
