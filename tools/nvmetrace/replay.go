package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type replayCmd struct {
	File       string `arg:"" help:"Record of nvmetrace snoop --write."`
	As         string `default:"snoop" enum:"snoop,latency,top" placeholder:"KIND" help:"What to print: ${enum} (${default})."`
	eventFlags `embed:""`
	showFlags  `embed:""`
	viewFlags  `embed:""`
	Interval   time.Duration `placeholder:"TIME" help:"With --as top: a table for each of this time. Default: one for all."`
	JSON       bool          `name:"json" help:"JSON as that command prints it."`
}

// Help is what stands below the flags.
func (replayCmd) Help() string { return replayHelp }

const replayHelp = `Prints a record as snoop prints the kernel's queues, or counts it as latency and top do. It needs no kernel and no privileges. --admin, --starts and --sq are for --as snoop; --by, --heat, --plot and --step for --as latency.

Examples

  Writes that took more than 10 ms:
    nvmetrace replay trace.nvmetrace --opcode write --min-latency 10ms

  A picture of the record:
    nvmetrace replay trace.nvmetrace --as latency --plot trace.svg --step 100ms

  What each queue did, second by second:
    nvmetrace replay trace.nvmetrace --as top --interval 1s`

// Validate is called by kong.
func (c *replayCmd) Validate() error {
	if c.JSON && c.Heat {
		return errors.New("--json and --heat: choose one")
	}
	r := runFlags{Interval: c.Interval}
	return errors.Join(c.eventFlags.Validate(), c.viewFlags.Validate(), r.Validate())
}

// Run reads the record once.
func (c *replayCmd) Run(ctx context.Context, out *cli.Output) error {
	f, err := os.Open(c.File)
	if err != nil {
		return cli.UsageError{Err: err}
	}
	defer f.Close()
	r, err := trace.NewReader(f)
	if err != nil {
		return cli.Usagef("%s: %w", c.File, err)
	}
	if h := r.Header(); !c.JSON {
		fmt.Fprintf(out.Stderr, "nvmetrace: %s: of %s, Linux %s, %s\n", c.File, printable(h.Host), printable(h.Kernel), h.Start.Format(time.DateTime))
	}
	whole := int64(0)
	if st, err := f.Stat(); err == nil {
		whole = st.Size()
	}
	line := text.NewLine(out.Stderr, 2*time.Second)
	defer line.Clear()
	n := 0
	var lost trace.Losses
	each := func(take func(*trace.Event) error) error {
		begun := time.Now()
		for {
			record, err := r.Next()
			switch {
			case errors.Is(err, io.EOF):
				line.Clear()
				return nil
			case errors.Is(err, trace.ErrTruncated): // what is there is whole
				line.Clear()
				fmt.Fprintf(out.Stderr, "nvmetrace: warning: %s: %s\n", c.File, cli.OneLine(err))
				return nil
			case err != nil:
				line.Clear()
				return fmt.Errorf("%s: %w", c.File, err)
			case record.Snapshot != nil:
				lost = record.Snapshot.Losses
				continue
			}
			e := &record.Event
			if n++; n%65536 == 0 {
				if err := ctx.Err(); err != nil {
					return err
				}
				at, _ := f.Seek(0, io.SeekCurrent)
				line.Set(text.Meter(float64(at), float64(whole), text.Count(float64(n))+" events", time.Since(begun), text.Width(out.Stderr)))
			}
			if !c.matchEvent(e) {
				continue
			}
			if err := take(e); err != nil {
				return err
			}
		}
	}
	show := map[string]func(*cli.Output, eachEvent) error{"snoop": c.snoop, "latency": c.latency, "top": c.top}[c.As]
	if err := show(out, each); err != nil {
		return err
	}
	if l := lossText(lost); l != "" {
		fmt.Fprintf(out.Stderr, "nvmetrace: %s: %s\n", c.File, l)
	}
	return nil
}

type eachEvent func(func(*trace.Event) error) error

func (c *replayCmd) snoop(out *cli.Output, each eachEvent) error {
	w := bufio.NewWriter(out.Stdout)
	p := newEventPrinter(w, c.JSON)
	err := each(func(e *trace.Event) error {
		if !c.shows(e) {
			return nil
		}
		return p.print(e)
	})
	return errors.Join(err, w.Flush())
}

// maxGap is how many steps in which nothing happens a record may have in a row.
const maxGap = 1 << 20

// steps calls show for each step of time in the record, those in which nothing happened too, and at last for the rest.
func steps(each eachEvent, step time.Duration, show func(from, to float64, since *trace.Snapshot) error) (*counter, error) {
	c := newCounter()
	before := c.snapshot()
	n := int64(0)
	end := func(to float64) error {
		now := c.snapshot()
		err := show(float64(n)*step.Seconds(), to, now.Sub(before))
		before = now
		n++
		return err
	}
	err := each(func(e *trace.Event) error {
		if step > 0 && c.any && (e.Time-c.first)/int64(step)-n > maxGap {
			return fmt.Errorf("nothing happens for %v in the record: choose a longer time than %v", text.Duration(time.Duration(e.Time-c.last)), step)
		}
		for step > 0 && c.any && e.Time-c.first >= (n+1)*int64(step) {
			if err := end(float64(n+1) * step.Seconds()); err != nil {
				return err
			}
		}
		c.add(e)
		return nil
	})
	if err == nil && c.any {
		err = end(float64(c.last-c.first) / 1e9)
	}
	return c, err
}

func (c *replayCmd) latency(out *cli.Output, each eachEvent) error {
	v, err := c.view(out)
	if err != nil {
		return err
	}
	step := time.Duration(0)
	if c.Heat || c.Plot != "" {
		step = c.Step
	}
	count, err := steps(each, step, func(from, to float64, s *trace.Snapshot) error {
		return v.step(time.Duration(to*1e9), to-from, s)
	})
	if err != nil {
		return err
	}
	all := count.snapshot()
	groups := groupsOf(all, makeBy(c.By))
	seconds := all.Since.Seconds()
	if c.JSON {
		if err := json.NewEncoder(out.Stdout).Encode(latencyJSON{Seconds: seconds, Groups: groups}); err != nil {
			return err
		}
	} else if err := printGroups(out, fmt.Sprintf("%s, %.1f s", c.File, seconds), groups, trace.Losses{}); err != nil {
		return err
	}
	return v.end(out, seconds)
}

func (c *replayCmd) top(out *cli.Output, each eachEvent) error {
	enc := json.NewEncoder(out.Stdout)
	_, err := steps(each, c.Interval, func(from, to float64, s *trace.Snapshot) error {
		f := frame{seconds: to - from, elapsed: to, nodes: kernelNodes(s, to-from)}
		if c.JSON {
			return enc.Encode(f.json(nil, false))
		}
		_, err := fmt.Fprintln(out.Stdout, plainTable(f))
		return err
	})
	return err
}
