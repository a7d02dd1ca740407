package main

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/cpus"
	"github.com/shadowbell/shadowbell/tools/internal/load"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestBareRingsGoRound(t *testing.T) {
	usable, err := cpus.Usable()
	if err != nil {
		t.Fatal(err)
	}
	for _, qd := range []int{1, 2, 16, 17, 128} {
		// On one core the two take turns: slow, and right all the same. On a busy machine one of them may get no turn in 50 ms.
		rate, err := 0.0, error(nil)
		for d := 50 * time.Millisecond; rate == 0 && err == nil && d < 20*time.Second; d *= 4 {
			rate, err = bareRate(usable[0], usable[len(usable)-1], qd, d)
		}
		if err != nil || rate <= 0 {
			t.Errorf("depth %d: %v a second, %v", qd, rate, err)
		}
	}
}

func TestCaseNames(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range cases() {
		if seen[c.name] || c.run == nil {
			t.Errorf("case %q is there twice, or does nothing", c.name)
		}
		seen[c.name] = true
	}
	for _, name := range []string{"null/shadow/qd32", "null/trap/qd32", "null/shadow/qd32/each", "null/trap/qd32/each"} {
		if !seen[name] {
			t.Errorf("case %q, which others are compared with, is missing", name)
		}
	}
}

// A filter that matches nothing measured nothing, and whoever wrote it has to know.
func TestCaseThatMatchesNothing(t *testing.T) {
	err := (&grammar{Case: "null/qd32"}).Run(t.Context(), &cli.Output{})
	if !errors.As(err, new(cli.UsageError)) {
		t.Fatalf("error %v, want one that is the user's", err)
	}
	for _, c := range cases() {
		if !strings.Contains(err.Error(), c.name) {
			t.Errorf("%q does not name %s", err, c.name)
		}
	}
}

func sampleReport() *report {
	r := &report{Machine: machine{Model: "CPU", Cores: 2, LoadCPU: 1, Go: "go1"}}
	shadow := caseResult{Name: "null/shadow/qd32", Load: &load.Result{IOPS: 8e6, BandwidthMiB: 31250, MMIOPerIO: 0.000001, Latency: load.Latency{P50: 4000, P99: 9000}},
		HostNS: phasesIn("INFO client gone: reads=1 ns_per_io=18/10/21/0 x=y\nINFO stopped"), BareBefore: 10e6, BareAfter: 14e6, Ratio: 8. / 12}
	shadow.aim("IOPS", 8e6, atLeast, 6e6)
	shadow.aim("MMIO writes per I/O", 0.000001, atMost, 0.001)
	trap := caseResult{Name: "null/trap/qd32", Load: &load.Result{IOPS: 500e3, Latency: load.Latency{P50: 60_000, P99: 90_000}, MMIOPerIO: 1.02}}
	idle := caseResult{Name: "idle"}
	idle.figure("something", 12.345)
	r.Cases = []caseResult{shadow, trap, idle, {Name: "memory", Error: "no memory"}}
	r.compare()
	return r
}

func TestReportTable(t *testing.T) {
	const want = `CPU, 2 cores (hostmed on 0, load on 1), go1

  case                   IOPS   MiB/s      p50      p99    MMIO/IO     host ns  bare rings  ratio
  ------------------------------------------------------------------------------------------------
  null/shadow/qd32  8,000,000  31,250  4.00 us  9.00 us  0.0000010  18/10/21/0  12,000,000   0.67
  null/trap/qd32      500,000       0  60.0 us  90.0 us       1.02

  host ns: what a command took of hostmed's worker, to translate / submit / complete / interrupt

  case              figure                                measured                 aim
  --------------------------------------------------------------------------------------------
  null/shadow/qd32  IOPS                                 8,000,000  at least 6,000,000  met
  null/shadow/qd32  MMIO writes per I/O                  0.0000010      at most 0.0010  met
  null/trap/qd32    times as fast with shadow doorbells       16.0       at least 20.0  MISSED
  idle              something                                 12.3
  memory            not measured: no memory
`
	if got := sampleReport().table(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestUnsteadyMachineIsMarked(t *testing.T) {
	r := sampleReport()
	r.Cases[0].BareAfter = 16e6
	if got := r.table(); !strings.Contains(got, "0.67?\n") || !strings.Contains(got, "the machine was busy") {
		t.Error(got)
	}
}

func TestReportJSON(t *testing.T) {
	data, err := json.Marshal(sampleReport())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{
		`"machine":{"model":"CPU","cores":2`, `"name":"null/shadow/qd32","load":{"iops":8000000`, `"host_ns":{"translate":18,"submit":10,"complete":21,"interrupt":0}`, `"bare_before":10000000,"bare_after":14000000,"ratio":0.66`,
		`{"name":"times as fast with shadow doorbells","value":16,"aim":{"bound":"at least","value":20,"met":false}}`, `{"name":"memory","error":"no memory"}`,
	} {
		if !strings.Contains(string(data), s) {
			t.Errorf("%s is missing in %s", s, data)
		}
	}
	if failed := sampleReport().failed(); len(failed) != 1 || failed[0] != "memory" {
		t.Errorf("%v", failed)
	}
}

func TestModelName(t *testing.T) {
	if got := modelName("processor\t: 0\nmodel name\t: A CPU: fast\n"); got != "A CPU: fast" {
		t.Error(got)
	}
	if got := modelName(""); got != "unknown processor" {
		t.Error(got)
	}
}
