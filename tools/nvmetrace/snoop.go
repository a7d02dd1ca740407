package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type snoopCmd struct {
	eventFlags `embed:""`
	showFlags  `embed:""`
	Duration   time.Duration `placeholder:"TIME" help:"End after this long. Default: Ctrl-C ends it."`
	Count      uint64        `placeholder:"N" help:"End after this many lines."`
	Write      string        `placeholder:"FILE" help:"Write a record for nvmetrace replay instead of lines. It must not be there yet."`
	JSON       bool          `name:"json" help:"One JSON object a line. See above for its fields."`
}

// showFlags say which events are shown.
type showFlags struct {
	Admin  bool `help:"Only the admin queue, as --queue 0."`
	Starts bool `help:"Show commands when they start too, as lines with a >."`
	SQ     bool `name:"sq" help:"Show SQ head and tail after each completion too, as the driver sees them (nvme_sq)."`
}

// shows says whether an event is shown.
func (s *showFlags) shows(e *trace.Event) bool {
	switch {
	case s.Admin && e.QID != 0:
		return false
	case e.Kind == trace.Start:
		return s.Starts
	case e.Kind == trace.Doorbell:
		return s.SQ
	}
	return true
}

// Help is what stands below the flags.
func (snoopCmd) Help() string { return snoopHelp }

const snoopHelp = `A line for each command of the kernel's NVMe queues when it ends, decoded, and for each timeout, reset and asynchronous event. Every event goes through a ring buffer, which costs more than top and latency do; what did not fit in it is counted and said at the end.

Examples

  What Linux asks a controller when it is plugged in:
    nvmetrace snoop --admin

  Reads of nvme0 that took more than 5 ms, and who waited:
    nvmetrace snoop --device nvme0 --opcode read --min-latency 5ms

  A record of ten seconds, and what it says:
    nvmetrace snoop --duration 10s --write trace.nvmetrace
    nvmetrace replay trace.nvmetrace --as latency

The columns, and the fields of --json, an object for each event

  TIME     time_ns            CLOCK_MONOTONIC; in lines: seconds since the first one
           kind               end, start, timeout, reset, async_event or doorbell (--sq)
  DEVICE   device, disk       nvme0, and the disk that the command was for
  QUEUE    qid                of the real queue; 0 is the admin queue
  CID      cid                as the driver numbers requests
  BYTES    bytes              of data
  LATENCY  latency_ns         from nvme_setup_cmd to nvme_complete_rq
  THREAD   comm, tid          that started the command: for buffered writes a kernel thread
  COMMAND  opcode, command, text, nsid, slba, blocks   the number, its name, the line, and the fields of it
  STATUS   status, status_name, retries   ok, or the specification's name (type/code, and DNR); earlier tries
           sq_head, sq_tail   of doorbell`

// Validate is called by kong.
func (c *snoopCmd) Validate() error {
	switch {
	case c.Duration < 0:
		return errors.New("--duration must not be negative")
	case c.Write != "" && c.JSON:
		return errors.New("--write and --json: a record is not JSON; write it, and give --json to nvmetrace replay")
	}
	return c.eventFlags.Validate()
}

// Run prints events until it is told to end.
func (c *snoopCmd) Run(ctx context.Context, out *cli.Output) (err error) {
	o := c.options()
	o.Events, o.MinLatency, o.Doorbells = true, c.MinLatency, c.SQ
	if c.Admin {
		o.Queues = []uint16{0}
	}
	var file *os.File
	if c.Write != "" {
		if file, err = c.create(); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, file.Close()) }()
	}
	src, notes, err := openTrace(ctx, o, false)
	if err != nil {
		if file != nil {
			err = errors.Join(err, os.Remove(c.Write))
		}
		return err
	}
	defer src.Close()
	for _, n := range notes {
		fmt.Fprintf(out.Stderr, "nvmetrace: %s\n", n)
	}
	if c.Duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.Duration)
		defer cancel()
	}
	if file != nil {
		return c.record(ctx, out, src, file)
	}
	return c.lines(ctx, out, src)
}

// create makes the record file.
func (c *snoopCmd) create() (*os.File, error) {
	f, err := os.OpenFile(c.Write, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, os.ErrExist) {
		return nil, cli.Usagef("--write %s: the file is there already: remove it, or name another", c.Write)
	}
	if err != nil {
		return nil, cli.Usagef("--write: %w", err)
	}
	return f, nil
}

// lines prints events.
func (c *snoopCmd) lines(ctx context.Context, out *cli.Output, src source) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := bufio.NewWriter(out.Stdout)
	p := newEventPrinter(w, c.JSON)
	waiting := text.NewLine(out.Stderr, 2*time.Second)
	err := readEvents(ctx, src, func() {
		if p.shown == 0 {
			waiting.Set("waiting for the first command")
		}
		if err := w.Flush(); err != nil {
			cancel(err)
		}
	}, func(e *trace.Event) {
		if !c.shows(e) || !c.matchEvent(e) || c.Count > 0 && p.shown >= c.Count {
			return
		}
		waiting.Clear()
		if err := p.print(e); err != nil {
			cancel(err)
		}
		if c.Count > 0 && p.shown >= c.Count {
			cancel(errEnough)
		}
	})
	waiting.Clear()
	if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, errEnough) && !ended(cause) {
		err = cause
	}
	return errors.Join(err, w.Flush(), c.totals(out, src, fmt.Sprintf("%s events, %s commands failed", text.Count(float64(p.shown)), text.Count(float64(p.errors)))))
}

// ended says whether err is how a command is asked to end.
func ended(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

const flushEvery = 100 * time.Millisecond

// readEvents reads events until ctx ends, and then what is still on its way; it calls tick now and then, never both at a time.
func readEvents(ctx context.Context, src source, tick func(), each func(*trace.Event)) error {
	var mu sync.Mutex
	done, ticked := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ticked)
		t := time.NewTicker(flushEvery)
		defer t.Stop()
		for {
			select {
			case <-done:
				return
			case <-t.C:
				mu.Lock()
				tick()
				mu.Unlock()
			}
		}
	}()
	err := src.Read(ctx, func(e trace.Event) {
		mu.Lock()
		defer mu.Unlock()
		each(&e)
	})
	close(done)
	<-ticked
	if ended(err) {
		err = nil
	}
	return err
}

// totals says on stderr what there was and what was lost.
func (c *snoopCmd) totals(out *cli.Output, src source, what string) error {
	s, err := src.Snapshot()
	if err != nil {
		return err
	}
	if l := lossText(s.Losses); l != "" {
		what += "; " + l
	} else {
		what += ", nothing lost"
	}
	_, err = fmt.Fprintf(out.Stderr, "nvmetrace: %s\n", what)
	return err
}

// record writes a record file.
func (c *snoopCmd) record(ctx context.Context, out *cli.Output, src source, f *os.File) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w, err := trace.NewWriter(f)
	if err != nil {
		return err
	}
	line := text.NewLine(out.Stderr, 0)
	n := uint64(0)
	err = readEvents(ctx, src, func() { line.Set(fmt.Sprintf("%s events; Ctrl-C ends it", text.Count(float64(n)))) }, func(e *trace.Event) {
		// Whether starts and SQ heads are shown is for replay to choose.
		if c.Admin && e.QID != 0 || !c.matchEvent(e) || c.Count > 0 && n >= c.Count {
			return
		}
		n++
		if err := w.Event(*e); err != nil {
			cancel(err)
		}
		if c.Count > 0 && n >= c.Count {
			cancel(errEnough)
		}
	})
	line.Clear()
	if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, errEnough) && !ended(cause) {
		err = cause
	}
	last, lastErr := src.Snapshot()
	if lastErr != nil {
		return errors.Join(err, lastErr, w.Close())
	}
	// For what was lost.
	return errors.Join(err, w.Snapshot(last), w.Close(), c.totals(out, src, fmt.Sprintf("%s events in %s", text.Count(float64(n)), c.Write)))
}
