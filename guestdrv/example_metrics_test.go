package guestdrv_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"strings"

	"github.com/shadowbell/shadowbell/guestdrv"
)

// writeOpenMetrics is a whole collector: what an HTTP handler for /metrics writes. With client_golang the same loop makes
// prometheus.MustNewConstMetric and MustNewConstHistogram, with OpenTelemetry the observations of a callback.
func writeOpenMetrics(w io.Writer, device string, s *guestdrv.Stats) {
	family := ""
	for m := range s.Metrics() {
		if m.Name != family {
			family = m.Name
			name := strings.TrimSuffix(family, "_total")
			fmt.Fprintf(w, "# TYPE %s %s\n# HELP %s %s\n", name, m.Kind, name, m.Help)
		}
		labels := fmt.Sprintf("device=%q", device)
		for _, l := range m.Labels {
			labels += fmt.Sprintf(",%s=%q", l.Name, l.Value)
		}
		if h := m.Histogram; h != nil {
			for bound, n := range h.Cumulative() {
				fmt.Fprintf(w, "%s_bucket{%s,le=\"%g\"} %d\n", m.Name, labels, bound.Seconds(), n)
			}
			fmt.Fprintf(w, "%s_bucket{%s,le=\"+Inf\"} %d\n", m.Name, labels, h.Count())
			fmt.Fprintf(w, "%s_sum{%s} %g\n%s_count{%s} %d\n", m.Name, labels, h.Sum().Seconds(), m.Name, labels, h.Count())
			continue
		}
		fmt.Fprintf(w, "%s{%s} %g\n", m.Name, labels, m.Value)
	}
	fmt.Fprintln(w, "# EOF")
}

func ExampleStats_Metrics() {
	path, stop := serveTestDevice()
	defer stop()
	c, err := guestdrv.Open(context.Background(), "vfio-user:"+path, guestdrv.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	ns, err := c.Namespace(1)
	if err != nil {
		log.Fatal(err)
	}
	block := make([]byte, 4096)
	for i := range int64(8) {
		if _, err := ns.WriteAt(block, i*4096); err != nil {
			log.Fatal(err)
		}
	}
	if _, err := ns.ReadAt(block, 0); err != nil {
		log.Fatal(err)
	}

	stats := c.Stats()
	var page bytes.Buffer
	writeOpenMetrics(&page, "vm1", &stats)
	// Some lines of it; the others are times and counts that differ from run to run.
	for line := range strings.Lines(page.String()) {
		if strings.Contains(line, "guestdrv_commands") && !strings.Contains(line, "admin") || strings.Contains(line, "+Inf") && strings.Contains(line, "write") || line == "# EOF\n" {
			fmt.Print(line)
		}
	}
	// Output:
	// # TYPE shadowbell_guestdrv_commands counter
	// # HELP shadowbell_guestdrv_commands Commands that have ended.
	// shadowbell_guestdrv_commands_total{device="vm1",op="read"} 1
	// shadowbell_guestdrv_commands_total{device="vm1",op="write"} 8
	// shadowbell_guestdrv_command_duration_seconds_bucket{device="vm1",op="write",le="+Inf"} 8
	// # EOF
}
