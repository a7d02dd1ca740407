package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

type exportCmd struct {
	Listen       string   `default:"127.0.0.1:9777" placeholder:"ADDRESS" help:"Where to answer HTTP (${default}). Port 0 takes a free one. Whoever reaches it sees what this machine does with its disks: beyond the loopback, put something before it."`
	Device       []device `sep:"," placeholder:"nvmeN" help:"Only these devices. Give it several times for several, or nvme0,nvme1."`
	controlFlags `embed:""`
	VM           uint32 `name:"vm" placeholder:"PID" help:"Exits of the virtual machine that this process runs, too."`
	Driver       bool   `help:"How often the driver moves SQ tails and takes interrupts, too. It costs twice what counting commands does."`
	Block        bool   `help:"The block layer's disks too. They are exported in any case if there is no nvme driver to trace."`
}

// Help is what stands below the flags.
func (exportCmd) Help() string { return exportHelp() }

func exportHelp() string {
	return `Metrics for Prometheus, at http://ADDRESS/metrics. docs/nvmetrace-dashboard.json in the source is a dashboard of them for Grafana.

Examples

    nvmetrace export
    nvmetrace export --listen 127.0.0.1:9777 --control /run/hostmed.sock

Labels are bounded: device and disk are this machine's, queue is a number that its driver has created (one for each core, at the most, and the admin queue), opcode is a name of the specification with dashes or "other" (some 50), controller is a socket of hostmed's. No series has a command identifier, an address or a process name. A device of 8 queues that does reads, writes and flushes has some 250 series, and 34 more for each kind of admin command. Histograms have 27 fixed buckets, powers of two from 1.02 us to 69 s.

What was lost is in nvmetrace_lost_total. Counters of hostmed's queues begin anew when a guest creates a queue.

` + familyHelp()
}

// Validate is called by kong.
func (c *exportCmd) Validate() error {
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("--listen %s: it must be an address and a port, as 127.0.0.1:9777", c.Listen)
	}
	return nil
}

const (
	headerWithin = 10 * time.Second
	endWithin    = 3 * time.Second
)

// Run answers until it is told to end.
func (c *exportCmd) Run(ctx context.Context, out *cli.Output) error {
	f := &filterFlags{Device: c.Device}
	o := f.options()
	o.Block, o.KVM, o.VM, o.Driver = c.Block, c.VM != 0, c.VM, c.Driver
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return cli.Usagef("--listen: %w", err)
	}
	s, notes, err := open(ctx, o, f, c.Control)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer s.close()
	for _, n := range notes {
		fmt.Fprintf(out.Stderr, "nvmetrace: %s\n", n)
	}
	registry := prometheus.NewRegistry()
	if err := registry.Register(&collector{ctx: ctx, sampler: s, filter: f, vm: c.VM}); err != nil {
		return errors.Join(err, l.Close())
	}
	if a, ok := l.Addr().(*net.TCPAddr); ok && !a.IP.IsLoopback() {
		fmt.Fprintf(out.Stderr, "nvmetrace: warning: %v can be reached from other machines, and asks nobody who they are\n", l.Addr())
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, ErrorHandling: promhttp.ContinueOnError}))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = fmt.Fprintln(w, `<title>nvmetrace</title><a href="/metrics">metrics</a>`)
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: headerWithin, WriteTimeout: time.Minute}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	fmt.Fprintf(out.Stderr, "nvmetrace: http://%v/metrics\n", l.Addr())
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), endWithin)
	defer cancel()
	err = server.Shutdown(end)
	if errors.Is(err, context.DeadlineExceeded) {
		err = server.Close()
	}
	<-ended
	return err
}
