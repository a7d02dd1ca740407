package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
	"github.com/shadowbell/shadowbell/tools/vmlab/doorbells"
)

type doorbellsCmd struct {
	Runtime time.Duration `default:"3s" placeholder:"TIME" help:"Of each measurement, in whole seconds (${default})."`
	Plot    string        `placeholder:"FILE" help:"Draw the table too: a name that ends in .svg or .png."`
}

// Run prints the table.
func (d *doorbellsCmd) Run(ctx context.Context, out *cli.Output) error {
	lab, accel, _, err := open(ctx, out)
	if err != nil {
		return err
	}
	line := text.NewLine(out.Stderr, 0)
	rows, err := doorbells.Measure(ctx, lab, doorbells.Depths, d.Runtime, line.Set)
	line.Clear()
	if err != nil {
		return err
	}
	fmt.Fprintf(out.Stdout, "  4 KiB random reads, fio libaio, one job, a guest with one CPU under %s, hostmed polling for up to %v; each disk a file in memory:\n\n%s", accel, doorbells.Poll(accel), doorbells.Table(rows))
	if d.Plot == "" {
		return nil
	}
	f, err := os.Create(d.Plot)
	if err != nil {
		return err
	}
	if err := doorbells.Plot(f, rows, d.Plot); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
