package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
	"github.com/shadowbell/shadowbell/tools/vmlab/tracedemo"
)

type traceDemoCmd struct {
	Heat string `default:"latency-heatmap.png" placeholder:"FILE" help:"Draw nvmetrace latency's picture into FILE (${default})."`
	Path string `default:"path.svg" placeholder:"FILE" help:"Draw nvmetrace path's picture into FILE (${default})."`
}

// Validate is called by kong.
func (d *traceDemoCmd) Validate() error {
	for _, f := range []string{d.Heat, d.Path} {
		if ext := strings.ToLower(filepath.Ext(f)); ext != ".svg" && ext != ".png" {
			return fmt.Errorf("%s: a picture's name must end in .svg or .png", f)
		}
	}
	return nil
}

// Run prints what nvmetrace shows and draws the pictures.
func (d *traceDemoCmd) Run(ctx context.Context, out *cli.Output) error {
	lab, accel, _, err := open(ctx, out)
	if err != nil {
		return err
	}
	line := text.NewLine(out.Stderr, 0)
	defer line.Clear()
	fmt.Fprintf(out.Stdout, "A guest with two CPUs under %s, a stock kernel, and QEMU's NVMe devices.\n\n", accel)
	if err := tracedemo.Demo(ctx, lab, tracedemo.Pictures{Heat: d.Heat, Path: d.Path}, out.Stdout, line.Set); err != nil {
		return err
	}
	line.Clear()
	fmt.Fprintf(out.Stderr, "vmlab: drew %s and %s\n", d.Heat, d.Path)
	return nil
}

type tracebenchCmd struct {
	Rounds  int           `default:"5" placeholder:"N" help:"How often all take turns; the table has the medians (${default})."`
	Runtime time.Duration `default:"4s" placeholder:"TIME" help:"Of each measurement, in whole seconds (${default})."`

	benchOutput `embed:""`
}

// Help is what stands below the arguments.
func (tracebenchCmd) Help() string {
	return `fio's 4 KiB random reads on QEMU's NVMe device in a guest, with nothing beside it and with nvmetrace, in turns. A ratio compares two measurements of one round. What is emulated makes tracing look dear: BPF programs are translated like everything else, and the device costs less in proportion than a real one.

JSON: accel, rounds, seconds, ways, and results: [{qd, iops}], iops being a list for each round of the figures in the order of ways.`
}

// Validate is called by kong.
func (b *tracebenchCmd) Validate() error {
	if b.Rounds < 1 || b.Runtime < time.Second {
		return fmt.Errorf("--rounds %d --runtime %v: it takes a round of a second at the least", b.Rounds, b.Runtime)
	}
	return nil
}

// Run prints the table.
func (b *tracebenchCmd) Run(ctx context.Context, out *cli.Output) error {
	lab, accel, _, err := open(ctx, out)
	if err != nil {
		return err
	}
	line := text.NewLine(out.Stderr, 0)
	report, err := tracedemo.Measure(ctx, lab, b.Rounds, b.Runtime, line.Set)
	line.Clear()
	if err != nil {
		return err
	}
	return b.print(out, report, fmt.Sprintf("4 KiB random reads of fio, a guest with two CPUs under %s, medians of %d rounds of %v:\n\n%s", accel, b.Rounds, b.Runtime, report.Table()))
}
