package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/path"
	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type pathCmd struct {
	Control  string        `required:"" placeholder:"PATH" help:"Control socket of hostmed (hostmed serve --control PATH)."`
	Guest    []string      `sep:"none" placeholder:"FILE" help:"What guestdrv records on this machine (guestdrv bench --events FILE). It may appear later. Give it several times for several."`
	Interval time.Duration `placeholder:"TIME" help:"Print what came in each of this time. Default: once, at the end."`
	Duration time.Duration `placeholder:"TIME" help:"End after this long. Default: Ctrl-C ends it."`
	JSON     bool          `name:"json" help:"Print one JSON object for each interval. See above for its fields."`
	Plot     string        `placeholder:"FILE" help:"Draw the bars into FILE.svg or FILE.png."`
}

// Help is what stands below the flags.
func (pathCmd) Help() string { return pathHelp }

const pathHelp = `Where the time of the commands of hostmed's guests goes: each is followed from the guest through hostmed to the real queue and back, and matched with the real commands that it became.

  guest queue         guestdrv published it, until hostmed fetched it (with --guest)
  hostmed             until it was handed to the medium
  real queue          until the kernel's driver wrote it for the device's queue (nvme_setup_cmd): system call, block layer, waiting for a free tag
  device              until the driver has its completion (nvme_complete_rq); with vfio:, mem:, file: and null: all until hostmed noticed
  hostmed, back       until its completion was about to be posted
  back to the guest   until guestdrv took that (with --guest)

The spans of a command do not overlap, and add up to its whole time. Without --guest, as for the guests of a virtual machine, the first and the last are not known.

Examples

  Ten seconds, and a picture:
    nvmetrace path --control /run/hostmed.sock --duration 10s --plot path.svg

  From the guest's end too:
    guestdrv bench vfio-user:/run/disk.sock --events /tmp/guest.events &
    nvmetrace path --control /run/hostmed.sock --guest /tmp/guest.events

The fields of --json, an object for each interval

  time, seconds   when it ended, and how long it was; total is true for the last object if there is --interval
  groups          [{name,kind,guest,commands,mean_ns,p50_ns,p99_ns,spans,unmatched}] of each medium; guest says whether the guest's spans are known
    kind          nvme, block, vfio, mem, file, null; or hostmed: commands that it answered by itself
    spans         [{name,mean_ns,p50_ns,p99_ns,share}] share is that of all the time of these commands, 0 to 1
    unmatched     commands whose real ones are not known: they are in no other figure of the group
  counts          since the start: of commands {commands,matched,own,unseen,unmatched,without_guest}, of real ones {real,real_shared,real_unmatched,real_foreign},
                  and {before,dropped,suspect,full,lost_records,lost_events,late} of what is not in commands; under_way began and has not ended
  notes           what is missing, and why`

// Validate is called by kong.
func (c *pathCmd) Validate() error {
	if ext := strings.ToLower(filepath.Ext(c.Plot)); c.Plot != "" && ext != ".svg" && ext != ".png" {
		return fmt.Errorf("--plot %s: its name must end in .svg or .png", c.Plot)
	}
	r := runFlags{Interval: c.Interval, Duration: c.Duration}
	return r.Validate()
}

// pathJSON is what --json prints for an interval.
type pathJSON struct {
	Time    time.Time   `json:"time"`
	Seconds float64     `json:"seconds"`
	Total   bool        `json:"total,omitempty"`
	Groups  []pathGroup `json:"groups"`
	Counts  pathCounts  `json:"counts"`
	Notes   []string    `json:"notes,omitempty"`
}

type pathCounts struct {
	path.Counts
	UnderWay int `json:"under_way"`
}

// pathGroup is a path.Group with its medium's name. Its fields are documented in pathHelp.
type pathGroup struct {
	Name      string     `json:"name"`
	Kind      string     `json:"kind"`
	Guest     bool       `json:"guest"`
	Commands  uint64     `json:"commands"`
	Mean      int64      `json:"mean_ns"`
	P50       int64      `json:"p50_ns"`
	P99       int64      `json:"p99_ns"`
	Spans     []pathSpan `json:"spans"`
	Unmatched uint64     `json:"unmatched"`
}

type pathSpan struct {
	Name  string  `json:"name"`
	Mean  int64   `json:"mean_ns"`
	P50   int64   `json:"p50_ns"`
	P99   int64   `json:"p99_ns"`
	Share float64 `json:"share"`

	span path.Span
}

// Run follows commands until it is told to end.
func (c *pathCmd) Run(ctx context.Context, out *cli.Output) error {
	var picture *os.File
	if c.Plot != "" {
		var err error
		if picture, err = os.Create(c.Plot); err != nil {
			return cli.Usagef("--plot: %w", err)
		}
		defer picture.Close()
	}
	taps, err := openTaps(ctx, c.Control)
	if err != nil {
		return err
	}
	defer taps.close()
	// What the kernel's queues do not show, the rings do all the same.
	src, notes, err := openTrace(ctx, trace.Options{Events: true, RingBytes: pathRing}, false)
	if err != nil {
		notes, src = []string{"the kernel's queues are not shown: " + cli.OneLine(err)}, nil
	} else {
		defer src.Close()
	}
	p, err := newPump(taps, src, c.Guest)
	if err != nil {
		return err
	}
	defer p.close()
	p.notes = notes
	if !c.JSON {
		for _, n := range notes {
			fmt.Fprintf(out.Stderr, "nvmetrace: %s\n", n)
		}
	}
	fmt.Fprintln(out.Stderr, "nvmetrace: following commands")
	line := text.NewLine(out.Stderr, 2*time.Second)
	total, err := p.run(ctx, c.Interval, c.Duration, func(x pathJSON) error {
		line.Clear()
		return c.print(out, x)
	}, func(at time.Duration) {
		if c.Interval == 0 {
			line.Set(fmt.Sprintf("%.0f s, %s commands; Ctrl-C ends it", at.Seconds(), text.Count(float64(p.m.Counts().Commands))))
		}
	})
	line.Clear()
	if err != nil {
		return err
	}
	total.Total = c.Interval > 0
	if err := c.print(out, total); err != nil || picture == nil {
		return err
	}
	err = errors.Join(drawPath(picture, c.Plot, total), picture.Close())
	if err == nil {
		fmt.Fprintf(out.Stderr, "nvmetrace: drew %s\n", c.Plot)
	}
	return err
}

// pathRing is the ring buffer's size: two events for each command, for some ten ms.
const pathRing = 32 << 20

func (c *pathCmd) print(out *cli.Output, x pathJSON) error {
	if c.JSON {
		return json.NewEncoder(out.Stdout).Encode(x)
	}
	_, err := fmt.Fprintln(out.Stdout, pathText(x, text.IsTerminal(out.Stdout) && os.Getenv("NO_COLOR") == "", text.Width(out.Stdout)))
	return err
}
