package main

import (
	"context"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
	"github.com/shadowbell/shadowbell/tools/vmlab/guestbench"
)

type guestbenchCmd struct {
	Rounds  int           `default:"3" placeholder:"N" help:"How often each way has its turn; the table has the medians (${default})."`
	Runtime time.Duration `default:"3s" placeholder:"TIME" help:"Of each measurement, in whole seconds (${default})."`
	CPUs    int           `name:"cpus" default:"1" placeholder:"N" help:"CPUs of the guest (${default}). With hostmed they should not be more than the machine has cores."`

	benchOutput `embed:""`
}

// Help is what stands below the arguments.
func (guestbenchCmd) Help() string {
	return `The load is fio's (libaio, direct) on a block device, and "guestdrv bench" with the same pattern for the library. Ratios are of rates within one round, in which all ways have their turn; docs/export.md says what the figures mean.

JSON: accel, guest_cpus, rounds, seconds, doorbells, host_poll, and for each job in results the rounds: lists of figures in the order kernel nvme, ublk, NBD, library, each
{iops, p50_us, p99_us, cpu_us_per_io, mmio_per_io}.`
}

// Validate is called by kong.
func (g *guestbenchCmd) Validate() error {
	switch {
	case g.Rounds < 1:
		return fmt.Errorf("--rounds %d: at least one", g.Rounds)
	case g.Runtime < time.Second:
		return fmt.Errorf("--runtime %v: at least 1s", g.Runtime)
	case g.CPUs < 1:
		return fmt.Errorf("--cpus %d: at least one", g.CPUs)
	}
	return nil
}

// Run prints the table.
func (g *guestbenchCmd) Run(ctx context.Context, out *cli.Output) error {
	lab, accel, _, err := open(ctx, out)
	if err != nil {
		return err
	}
	line := text.NewLine(out.Stderr, 0)
	cfg := guestbench.Config{Jobs: guestbench.Jobs, Rounds: g.Rounds, Runtime: g.Runtime, CPUs: g.CPUs}
	report, err := guestbench.Measure(ctx, lab, cfg, line.Set)
	line.Clear()
	if err != nil {
		return err
	}
	return g.print(out, report, fmt.Sprintf("A guest with %d CPU under %s, medians of %d rounds of %v, hostmed with %s doorbells, polling for up to %s; each disk a file in memory:\n\n%s",
		report.CPUs, accel, report.Rounds, g.Runtime, report.Doorbells, report.Poll, report.Table()))
}
