package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type topCmd struct {
	filterFlags  `embed:""`
	controlFlags `embed:""`
	runFlags     `embed:""`
	Block        bool `help:"Show the block layer's disks too. They are shown in any case if there is no nvme driver to trace."`
	Driver       bool `help:"Count how often the driver moves SQ tails and takes interrupts, too: in --json. It costs twice what counting commands does."`
	Plain        bool `help:"Print a table for each interval, as it does where there is no terminal."`
}

// Help is what stands below the flags.
func (topCmd) Help() string { return topHelp }

const topHelp = `A live table of the kernel's NVMe queues, and with --control of hostmed's. On a terminal: arrows select, enter opens a device and a queue, s sorts, p pauses, ? has the rest. Elsewhere, and with --plain, a table for each interval. At the end the totals are printed.

Examples

  Everything:
    nvmetrace top

  The writes of one device, ten seconds, for another program:
    nvmetrace top --device nvme0 --opcode write --duration 10s --json

  hostmed's guests beside the real queues that it uses:
    nvmetrace top --control /run/hostmed.sock

The fields of --json, an object for each interval

  time, seconds   when it ended, and how long it was; total is true for the last object, which is the whole time
  devices         [{source,name,commands,iops,mib_s,…,parts}] parts are its queues, and theirs the kinds of commands
    source        nvme: the kernel's queues; block: its disks; hostmed: the mediator's queues
    name          nvme0, queue 1, Read <=4 KiB (more than 2 KiB, up to 4); qid and opcode are the numbers
    commands      that ended in the interval; iops and mib_s: of them and their data, in a second
    depth         commands under way at the end; depth_max: at any time since the start; of a device: of any one queue. The admin
                  queue is not in a device's
    p50_ns, p99_ns, max_ns   latencies; max_ns is the end of the histogram's bucket
    errors, retries          with a status; tried before; like the next, of nvme's, and 0 of others
    timeouts, resets, async_events
    orphans                  commands that began before nvmetrace did, and are not counted
    tail_moves, interrupts   with --driver: times that the driver moved the SQ tail (a doorbell, unless shared doorbells spare it), and interrupts
                             that found completions
    mmio_per_io, state       of hostmed's queues
  lost            {ring,map,recursion} what was not counted, since the start; also shown in the table unless it is nothing
  notes           what is missing, and why

A field that nobody knows is not there.`

// Validate is called by kong.
func (c *topCmd) Validate() error {
	if c.Interval == 0 {
		return errors.New("--interval 0s: a table needs some time, as in 1s")
	}
	return c.runFlags.Validate()
}

// topJSON is what --json prints for an interval.
type topJSON struct {
	Time    *time.Time `json:"time,omitempty"` // nil in replay
	Seconds float64    `json:"seconds"`
	Total   bool       `json:"total,omitempty"`
	Devices []*node    `json:"devices"`
	Lost    lostJSON   `json:"lost"`
	Notes   []string   `json:"notes,omitempty"`
}

// lostJSON is trace.Losses as all of --json has them.
type lostJSON struct {
	Ring      uint64 `json:"ring"`
	Map       uint64 `json:"map"`
	Recursion uint64 `json:"recursion"`
}

func (f frame) json(at *time.Time, total bool) topJSON {
	return topJSON{Time: at, Seconds: f.seconds, Total: total, Devices: f.nodes, Lost: lostJSON(f.lost), Notes: f.notes}
}

// Run shows the table until it is told to end.
func (c *topCmd) Run(ctx context.Context, out *cli.Output) error {
	o := c.options()
	o.Driver = c.Driver
	o.Block = c.Block
	s, notes, err := open(ctx, o, &c.filterFlags, c.Control)
	if err != nil {
		return err
	}
	defer s.close()
	begun := time.Now()
	frames := func(st step) frame {
		f := c.frame(st)
		f.elapsed, f.notes = st.now.at.Sub(begun).Seconds(), append(f.notes, notes...)
		return f
	}
	var total step
	switch {
	case c.JSON:
		enc := json.NewEncoder(out.Stdout)
		total, err = s.watch(ctx, c.Interval, c.Duration, func(st step) error { return enc.Encode(frames(st).json(&st.now.at, false)) })
		if err != nil {
			return err
		}
		return enc.Encode(frames(total).json(&total.now.at, true))
	case c.Plain || !text.IsTerminal(out.Stdout) || !text.IsTerminal(os.Stdin):
		for _, n := range notes {
			fmt.Fprintf(out.Stderr, "nvmetrace: %s\n", n)
		}
		notes = nil // once will do
		line := text.NewLine(out.Stderr, 2*time.Second)
		total, err = s.watch(ctx, c.Interval, c.Duration, func(st step) error {
			line.Clear()
			_, err := fmt.Fprintln(out.Stdout, plainTable(frames(st)))
			return err
		})
	default:
		total, err = c.live(ctx, s, frames)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out.Stdout, "totals\n%s", plainTable(frames(total)))
	return err
}

// live shows the table on a terminal.
func (c *topCmd) live(ctx context.Context, s *sampler, frames func(step) frame) (step, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Without bubbletea's signal handler: the context is this program's.
	p := tea.NewProgram(newTopModel(c.title()), tea.WithoutSignalHandler())
	type result struct {
		total step
		err   error
	}
	watched := make(chan result, 1)
	go func() {
		total, err := s.watch(ctx, c.Interval, c.Duration, func(st step) error {
			p.Send(frames(st))
			return nil
		})
		watched <- result{total, err}
		p.Send(endMsg{})
	}()
	_, err := p.Run()
	cancel()
	r := <-watched
	if r.err != nil {
		err = r.err
	}
	return r.total, err
}

// title says what is shown.
func (c *topCmd) title() string {
	var parts []string
	for _, d := range c.Device {
		parts = append(parts, d.String())
	}
	for _, q := range c.Queue {
		parts = append(parts, queueName(q))
	}
	for _, o := range c.Opcode {
		parts = append(parts, o.String())
	}
	if parts == nil {
		parts = []string{"all devices"}
	}
	return fmt.Sprintf("%s  every %v", strings.Join(parts, ", "), c.Interval)
}

// frame makes figures of an interval.
func (c *topCmd) frame(st step) (f frame) {
	f.seconds = st.seconds()
	if k := st.kernel(&c.filterFlags); k != nil {
		f.nodes = append(kernelNodes(k, f.seconds), blockNodes(k, f.seconds)...)
		f.lost = st.now.kernel.Losses
	}
	if m := st.now.mediator; m != nil {
		f.nodes = append(f.nodes, mediatorNodes(st.before.known, m, f.seconds)...)
	}
	f.notes = st.now.notes()
	return f
}

// open opens what a command reads. Without a driver to trace there are still disks, and hostmed; notes say so.
func open(ctx context.Context, o trace.Options, f *filterFlags, control string) (s *sampler, notes []string, err error) {
	s = &sampler{filter: f}
	if control != "" {
		if s.control, err = openControl(ctx, control); err != nil {
			return nil, nil, err
		}
	}
	s.src, notes, err = openTrace(ctx, o, true)
	if err != nil && s.control != nil {
		return s, []string{"the kernel's queues are not shown: " + cli.OneLine(err)}, nil
	}
	if err != nil {
		return nil, nil, err
	}
	return s, notes, nil
}
