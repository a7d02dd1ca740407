package main

import (
	"context"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
	"github.com/shadowbell/shadowbell/tools/vmlab/guestbench"
)

type backendbenchCmd struct {
	Rounds  int           `default:"3" placeholder:"N" help:"How often all ways take turns; the table has the medians (${default})."`
	Runtime time.Duration `default:"3s" placeholder:"TIME" help:"Of each measurement, in whole seconds (${default})."`
	CPUs    int           `name:"cpus" default:"2" placeholder:"N" help:"CPUs of the machine that plays the host (${default})."`

	benchOutput `embed:""`
}

// Help is what stands below the arguments.
func (backendbenchCmd) Help() string {
	return `A guest plays the host: QEMU's NVMe devices behind an IOMMU, hostmed, and guestdrv as its guest. Each backend is compared, within one round, with the way to the same device without hostmed: vfio: with guestdrv on the bare device, nvme: with fio's io_uring_cmd, block: with fio's io_uring. Translate to interrupt are hostmed's own samples, and their sum is what it is busy with for a command; the rest of its CPU time is polling in vain, system calls that look for messages, and waking up. What guestdrv is busy with is its CPU time without the looks of its Wait that found nothing. MMIO is doorbell writes to the device.
nvme-mdev had 0.20 us to translate, 0.12 us to complete and 0.18 us to interrupt, on hardware; where the CPU is emulated no figure here is comparable with that.

JSON: accel, host_cpus, rounds, seconds, hostmed_poll, and for each job in results the rounds: lists of figures in the order of the table,
each {iops, p50_us, iops_per_core, guestdrv_us, guestdrv_busy_us, hostmed_us, device_mmio_per_io, costs_ns: {translate, submit, complete, interrupt}}.`
}

// Validate is called by kong.
func (b *backendbenchCmd) Validate() error {
	g := guestbenchCmd{Rounds: b.Rounds, Runtime: b.Runtime, CPUs: b.CPUs}
	return g.Validate()
}

// Run prints the table.
func (b *backendbenchCmd) Run(ctx context.Context, out *cli.Output) error {
	lab, accel, _, err := open(ctx, out)
	if err != nil {
		return err
	}
	line := text.NewLine(out.Stderr, 0)
	cfg := guestbench.Config{Jobs: guestbench.BackendJobs, Rounds: b.Rounds, Runtime: b.Runtime, CPUs: b.CPUs}
	report, err := guestbench.MeasureBackends(ctx, lab, cfg, line.Set)
	line.Clear()
	if err != nil {
		return err
	}
	return b.print(out, report, fmt.Sprintf("A host with %d CPUs under %s, medians of %d rounds of %v, hostmed polling for up to %s; each device QEMU's nvme, its medium a file in memory:\n\n%s",
		report.CPUs, accel, report.Rounds, b.Runtime, report.Poll, report.Table()))
}
