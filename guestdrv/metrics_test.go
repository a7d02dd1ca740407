package guestdrv_test

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
)

// someStats has something of everything.
func someStats() *guestdrv.Stats {
	s := &guestdrv.Stats{
		Commands: 110, MMIOWrites: 30, Wakeups: 7, Rescued: 1, Errors: 2, Timeouts: 3, Aborts: 4, Resets: 5,
		Queues: []guestdrv.QueueStats{{QID: 0, Commands: 10, MMIOWrites: 20, Wakeups: 2}, {QID: 3, Commands: 60, MMIOWrites: 6, Wakeups: 1}},
		Ops:    []guestdrv.OpStats{{Op: guestdrv.OpRead, Errors: 2}, {Op: guestdrv.OpAdmin}},
	}
	s.Ops[0].Latency.Record(3*time.Microsecond, 99)
	s.Ops[0].Latency.Record(time.Second, 1)
	s.Ops[1].Latency.Record(time.Millisecond, 10)
	return s
}

func TestMetricsHaveWhatStatsHas(t *testing.T) {
	got := map[string]float64{}
	for m := range someStats().Metrics() {
		key := m.Name
		for _, l := range m.Labels {
			key += fmt.Sprintf("{%s=%s}", l.Name, l.Value)
		}
		if m.Histogram != nil {
			m.Value = float64(m.Histogram.Count())
		}
		got[strings.TrimPrefix(key, "shadowbell_guestdrv_")] = m.Value
	}
	want := map[string]float64{
		"commands_total{op=read}": 100, "commands_total{op=admin}": 10, "command_errors_total{op=read}": 2, "command_errors_total{op=admin}": 0,
		"command_duration_seconds{op=read}": 100, "command_duration_seconds{op=admin}": 10,
		// Of the pairs that are closed too.
		"mmio_writes_total{queues=admin}": 20, "mmio_writes_total{queues=io}": 10, "wakeups_total{queues=admin}": 2, "wakeups_total{queues=io}": 5,
		"rescued_completions_total": 1, "timeouts_total": 3, "aborts_total": 4, "resets_total": 5, "queues": 1,
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s is %v, want %v", k, got[k], v)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d metrics, want %d: %v", len(got), len(want), got)
	}
	for m := range someStats().Metrics() {
		if m.Value != 100 {
			t.Errorf("the first metric is %v", m)
		}
		break // it stops when asked to
	}
}

// What OpenMetrics asks of names, families and buckets.
func TestOpenMetricsText(t *testing.T) {
	var b bytes.Buffer
	writeOpenMetrics(&b, "pci:0000:00:03.0", someStats())
	sample := regexp.MustCompile(`^([a-z_]+)\{([a-z_]+="[^"]*",?)+\} [0-9.e+-]+$`)
	var families []string
	kind, last := "", -1.0
	for line := range strings.Lines(b.String()) {
		line = strings.TrimSuffix(line, "\n")
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			var name string
			name, kind, _ = strings.Cut(rest, " ")
			if slices.Contains(families, name) {
				t.Errorf("the samples of %s are not together", name)
			}
			families, last = append(families, name), -1
			continue
		}
		if strings.HasPrefix(line, "#") {
			continue
		}
		m := sample.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("%q is no sample", line)
			continue
		}
		family := families[len(families)-1]
		suffix, ok := strings.CutPrefix(m[1], family)
		allowed := map[string][]string{"counter": {"_total"}, "gauge": {""}, "histogram": {"_bucket", "_sum", "_count"}}[kind]
		if !ok || !slices.Contains(allowed, suffix) {
			t.Errorf("%q in family %s, a %s", line, family, kind)
		}
		if suffix == "_bucket" {
			var n float64
			if _, err := fmt.Sscanf(line[strings.LastIndexByte(line, ' ')+1:], "%g", &n); err != nil || n < last && !strings.Contains(line, `op="admin",le="1.024e-06"`) {
				t.Errorf("%q after a bucket of %v: %v", line, last, err)
			}
			last = n
		}
	}
	for _, want := range []string{
		`shadowbell_guestdrv_command_duration_seconds_bucket{device="pci:0000:00:03.0",op="read",le="2.048e-06"} 0`,
		`shadowbell_guestdrv_command_duration_seconds_bucket{device="pci:0000:00:03.0",op="read",le="4.096e-06"} 99`,
		`shadowbell_guestdrv_command_duration_seconds_bucket{device="pci:0000:00:03.0",op="read",le="+Inf"} 100`,
	} {
		if !strings.Contains(b.String(), want+"\n") {
			t.Errorf("no line %s", want)
		}
	}
	if !strings.HasSuffix(b.String(), "\n# EOF\n") {
		t.Error("no # EOF")
	}
}

func TestStatsSub(t *testing.T) {
	before, after := someStats(), someStats()
	after.Commands += 5
	after.Errors++
	after.Resets++
	after.Ops[0].Latency.Record(time.Minute, 5)
	after.Ops[0].Errors++
	after.Queues[1].Commands += 5
	after.Queues = append(after.Queues, guestdrv.QueueStats{QID: 4, Commands: 1, MMIOWrites: 1})
	d := after.Sub(before)
	if d.Commands != 5 || d.Errors != 1 || d.Resets != 1 || d.MMIOWrites != 0 || d.Timeouts != 0 || len(d.Ops) != 1 {
		t.Errorf("%+v", d)
	}
	read := d.Op(guestdrv.OpRead)
	if read.Latency.Count() != 5 || read.Errors != 1 || read.Latency.Max() != time.Minute {
		t.Errorf("%d reads, %d errors, max %v", read.Latency.Count(), read.Errors, read.Latency.Max())
	}
	if want := []guestdrv.QueueStats{{QID: 0}, {QID: 3, Commands: 5}, {QID: 4, Commands: 1, MMIOWrites: 1}}; !slices.Equal(d.Queues, want) {
		t.Errorf("%+v", d.Queues)
	}
	if got := after.MMIOPerIO(); got != 10.0/105 {
		t.Errorf("%v MMIO writes for each I/O", got)
	}
	if got := d.Queues[0].MMIOPerIO(); got != 0 {
		t.Errorf("%v for each of no commands", got)
	}
}
