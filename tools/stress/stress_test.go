//go:build !race

// The race detector replaces the instructions that this program is about by calls of its own.

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	for _, a := range os.Args[1:] {
		if strings.HasPrefix(a, "--device-parent=") { // started by a run with --processes
			os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
		}
	}
	goleak.VerifyTestMain(m)
}

// stress runs the program and returns its result.
func stress(t *testing.T, wantCode int, args ...string) (res result, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code := run(append(args, "--json"), &out, &errs)
	if err := json.Unmarshal(out.Bytes(), &res); err != nil {
		t.Fatalf("exit code %d, no JSON: %v\n%s%s", code, err, out.String(), errs.String())
	}
	var table bytes.Buffer
	res.print(&table)
	t.Logf("\n%s%s", table.String(), errs.String())
	if code != wantCode {
		t.Fatalf("exit code %d, want %d", code, wantCode)
	}
	return res, errs.String()
}

func TestNoWakeUpIsLost(t *testing.T) {
	for _, x := range []struct {
		name        string
		args        []string
		short, long string
	}{
		{"threads", nil, "2", "10"},
		{"processes", []string{"--processes"}, "1.5", "5"},
	} {
		t.Run(x.name, func(t *testing.T) {
			seconds := x.long
			if testing.Short() {
				seconds = x.short
			}
			res, _ := stress(t, exitOK, append(x.args, "--seconds", seconds)...)
			if res.Failure != "" || len(res.Rows) != 10 {
				t.Fatalf("%d rows, failure %q", len(res.Rows), res.Failure)
			}
			for _, r := range res.Rows {
				// A side that never slept has not been tested.
				if r.DriverSleeps == 0 || r.DeviceSleeps == 0 || r.Kicks == 0 || r.Interrupts == 0 {
					t.Errorf("SQ %d, CQ %d: nobody slept: %+v", r.SQ, r.CQ, r)
				}
			}
		})
	}
}

// caught runs with one barrier taken out, for 20 s at the most: the run has to fail.
func caught(t *testing.T, mutate, says string, args ...string) {
	t.Helper()
	if runtime.NumCPU() < 2 {
		if os.Getenv("CI") == "true" {
			t.Fatal("one core: two sides that take turns on it cannot show a reordering")
		}
		t.Skip("one core: two sides that take turns on it cannot show a reordering")
	}
	begin := time.Now()
	res, stderr := stress(t, exitLost, append(args, "--mutate", mutate, "--seconds", "20")...)
	if !strings.Contains(stderr, "LOST WAKE-UP") || !strings.Contains(stderr, says) || res.Failure == "" {
		t.Errorf("failed otherwise: %s", stderr)
	}
	t.Logf("caught after %v", time.Since(begin))
}

const (
	noRing      = "did not ring"
	noInterrupt = "did not interrupt"
)

// Short, one of the two barriers is taken out of threads and the other out of processes.
func TestRule01_DriverBarrierIsNeeded(t *testing.T) {
	t.Run("threads", func(t *testing.T) { caught(t, "driver", noRing) })
	if !testing.Short() {
		t.Run("processes", func(t *testing.T) { caught(t, "driver", noRing, "--processes") })
	}
}

func TestRule02_DeviceBarrierIsNeeded(t *testing.T) {
	if !testing.Short() {
		t.Run("threads", func(t *testing.T) { caught(t, "device", noRing) })
	}
	t.Run("processes", func(t *testing.T) { caught(t, "device", noRing, "--processes") })
}

func TestQuietBarriersAreNeeded(t *testing.T) {
	t.Run("driver", func(t *testing.T) { caught(t, "quiet-driver", noInterrupt) })
	t.Run("device", func(t *testing.T) { caught(t, "quiet-device", noInterrupt) })
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{"--size", "1"}, {"--size", "65536"}, {"--size", "many"}, {"--seconds", "0"}, {"--seconds", "-1"},
		{"--mutate", "everything"}, {"--no-such-flag"}, {"argument"},
	} {
		var out, errs bytes.Buffer
		if code := run(args, &out, &errs); code != exitUsage || errs.Len() == 0 || out.Len() != 0 {
			t.Errorf("%q: exit code %d, %q, %q", args, code, out.String(), errs.String())
		}
	}
	var out, errs bytes.Buffer
	if code := run([]string{"--help"}, &out, &errs); code != exitOK || !strings.Contains(out.String(), "--mutate") || strings.Contains(out.String(), "device-parent") {
		t.Errorf("help: exit code %d\n%s%s", code, out.String(), errs.String())
	}
}

func TestTable(t *testing.T) {
	var out, errs bytes.Buffer
	if code := run([]string{"--size", "3", "--seconds", "0.2"}, &out, &errs); code != exitOK {
		t.Fatalf("exit code %d: %s", code, errs.String())
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 4 || !strings.Contains(lines[1], "armLost") || lines[3] != "no wake-up was lost" {
		t.Errorf("table:\n%s", out.String())
	}
}
