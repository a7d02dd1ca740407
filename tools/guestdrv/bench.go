package main

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/cpus"
	"github.com/shadowbell/shadowbell/tools/internal/load"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/internal/size"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type benchCmd struct {
	deviceFlags `embed:""`
	eventFlags  `embed:""`

	NSID      uint32        `name:"nsid" default:"1" placeholder:"N" help:"Namespace (${default})."`
	RW        string        `name:"rw" default:"randread" enum:"randread,randwrite,randrw,read,write" placeholder:"KIND" help:"${enum} (${default}). randrw reads and writes one half each. Everything that writes destroys what is there."`
	BS        size.List     `name:"bs" default:"4k" placeholder:"SIZE" help:"Bytes of each transfer (${default}); several, such as 512,4k,128k, are drawn evenly."`
	QD        int           `name:"qd" default:"32" placeholder:"N" help:"Commands under way in each job (${default})."`
	Jobs      int           `default:"4" placeholder:"N" help:"Threads, each with a queue pair of its own (${default})."`
	Runtime   time.Duration `default:"10s" placeholder:"TIME" help:"How long to measure (${default}). Ctrl-C ends it early and prints what there is."`
	Doorbells string        `default:"auto" enum:"auto,shadow,2014,mmio" placeholder:"MODE" help:"auto: shadow doorbells if the device offers them (${default}); shadow: insist on them; 2014: by the vendor command of that year; mmio: never."`
	CPUs      cpus.List     `name:"cpus" placeholder:"LIST" help:"Cores to pin the jobs to, one after the other, such as 0 or 0,2-3. Default: not pinned."`
	Verify    bool          `help:"Write patterns with block address and generation, and check every read. Destroys what is in --span."`
	Span      size.Bytes    `placeholder:"SIZE" help:"Use only this much of the namespace, from its start. Default: all of it; with --verify at most 256 MiB."`
	Fill      bool          `help:"Write all of --span once before measuring, so that no read meets a hole."`
	Rate      uint32        `placeholder:"N" help:"Start at most N commands a second in each job, evenly spaced. Default: as many as it can."`
	Batch     int           `default:"16" placeholder:"N" help:"Most commands that share a doorbell (${default}); 1 rings for each, as block layers mostly do."`
	Poll      bool          `help:"Poll for ever, without interrupts. Default: poll as long as it pays, then sleep."`
	Idle      time.Duration `placeholder:"TIME" help:"Afterwards stay attached this long without a command, and print what that costs."`
	Priority  []string      `sep:"," enum:"urgent,high,medium,low" placeholder:"LIST" help:"Priorities of the jobs' queues, one after the other: ${enum}. The controller then shares itself by weighted round robin (CC.AMS), and the result is by priority too."`
	Weights   weights       `placeholder:"H:M:L" help:"With --priority: weights of high, medium and low priority, each 1 to 256, as in 8:4:1. Default: those that the controller has."`
	Every     time.Duration `placeholder:"TIME" help:"Meanwhile print a line of JSON this often: {phase,elapsed_s,ios,bytes,errors} of the phase so far."`
	JSON      bool          `name:"json" help:"Print one JSON object instead of a table."`
	Spin      string        `default:"on" enum:"on,off" hidden:"" help:"off: never poll, sleep at once; for measurements."`
}

// Help is what stands below the arguments.
func (benchCmd) Help() string {
	return `Each job keeps --qd commands under way. With --verify a job keeps to a part of the namespace of its own, fills it first, never has two transfers of one block under way if one of them writes, and reads everything back at the end.

Examples

  The experiment of 2014, against hostmed serve --namespace null:size=1GiB:
    guestdrv bench vfio-user:/run/vm1.sock --rw randread --bs 4k --qd 32 --jobs 4

  Is the data right? Mixed sizes, a minute:
    guestdrv bench vfio-user:/run/vm1.sock --rw randrw --bs 512,4k,64k --qd 128 --verify --runtime 60s

The table's lines, and the fields of --json

  IOPS            iops            commands completed in a second
  bandwidth       bw_mib          MiB of data in a second
  latency         lat_ns          {mean,p50,p99,p999,max} from Submit to Reap, each in ns
    reads, writes ops             [{op,ios,errors,lat_ns}] the same for each kind of command
    urgent, high  priorities      [{priority,jobs,iops}] with --priority, the same for each
  MMIO writes     mmio_per_io     doorbell register writes: each is an exit, or a message
  wake-ups        wakeups_per_io  sleeps on the interrupt that ended
  CPU             cpu_s_per_mio   {guest,host,guest_polling} seconds for a million commands; host is the server's process, and
                                  guest_polling the part of guest that looked in vain for completions
  errors          errors          commands that failed; verify_errors: blocks that were wrong
  trouble         trouble         {timeouts,aborts,resets} of the controller, if there was any
                  doorbells       shadow, mmap or mmio: what was in use; and rw, bs, qd, jobs, seconds

Exit codes: 0, 1 if a command failed or data was wrong, 2 if nothing could be done.`
}

// config turns flags into a load.
func (b *benchCmd) config() load.Config {
	var priorities []guestdrv.Priority
	for _, s := range b.Priority {
		p, _ := guestdrv.ParsePriority(s) // kong knows the names
		priorities = append(priorities, p)
	}
	return load.Config{
		Priorities: priorities,
		NSID:       b.NSID, Kind: load.Kind(b.RW), Sizes: b.BS, Depth: b.QD, Jobs: b.Jobs, Runtime: b.Runtime,
		CPUs: b.CPUs, Span: b.Span, Verify: b.Verify, Fill: b.Fill, Rate: b.Rate, Batch: b.Batch, Poll: b.Poll, NoSpin: b.Spin == "off",
	}
}

func (b *benchCmd) options(c load.Config) guestdrv.Options {
	o := c.Options(guestdrv.Options{Vendor2014: b.Doorbells == "2014"})
	if len(b.Priority) > 0 {
		o.Arbitration = &guestdrv.Arbitration{High: b.Weights[0], Medium: b.Weights[1], Low: b.Weights[2]}
	}
	switch b.Doorbells {
	case "shadow", "2014":
		o.Doorbells = guestdrv.DoorbellsShadow
	case "mmio":
		o.Doorbells = guestdrv.DoorbellsMMIO
	}
	return o
}

// weights are those of high, medium and low priority.
type weights [3]int

// UnmarshalText is called by kong.
func (w *weights) UnmarshalText(text []byte) error {
	parts := strings.Split(string(text), ":")
	if len(parts) != len(w) {
		return fmt.Errorf("%q is not three weights: write them as 8:4:1", text)
	}
	for i, s := range parts {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > 256 {
			return fmt.Errorf("weight %q is no number from 1 to 256: write the three as 8:4:1", s)
		}
		w[i] = n
	}
	return nil
}

// Validate is called by kong.
func (b *benchCmd) Validate() error {
	switch {
	case b.Runtime <= 0:
		return fmt.Errorf("--runtime %v: it must be more than 0, as in 10s", b.Runtime)
	case b.Idle < 0:
		return fmt.Errorf("--idle %v: it must not be negative", b.Idle)
	case b.Weights != weights{} && len(b.Priority) == 0:
		return fmt.Errorf("--weights %d:%d:%d: queues have none without --priority", b.Weights[0], b.Weights[1], b.Weights[2])
	case b.Every < 0:
		return fmt.Errorf("--every %v: it must not be negative", b.Every)
	case b.QD == 0:
		return fmt.Errorf("--qd 0: at least one command must be under way")
	case b.Jobs == 0:
		return fmt.Errorf("--jobs 0: at least one job is needed")
	case b.Batch == 0:
		return fmt.Errorf("--batch 0: a doorbell is for at least one command")
	case b.NSID == 0:
		return fmt.Errorf("--nsid 0: namespaces are counted from 1")
	}
	return b.config().Check()
}

// Run measures.
func (b *benchCmd) Run(ctx context.Context, out *cli.Output) error {
	b.separate(out)
	c := b.config()
	o := b.options(c)
	recorded, end, err := b.record(b.Device)
	if err != nil {
		return err
	}
	defer end()
	o.Events = recorded
	ctrl, err := b.open(ctx, out, o)
	if err != nil {
		return err
	}
	defer ctrl.Close()
	if _, err := namespace(ctrl, b.NSID); err != nil {
		return err
	}
	l, err := load.Open(ctrl, c)
	if err != nil {
		return cli.UsageError{Err: err}
	}
	defer l.Close()
	b.warnPollers(out)

	var watch load.Observer
	if clock, err := process.OpenCPUClock(ctrl.PeerPID()); err == nil {
		defer clock.Close()
		watch.HostCPU = clock.Read
	}
	line := text.NewLine(out.Stderr, 0)
	watch.Progress = func(p load.Progress) { line.Set(benchProgress(p)) }
	if b.Every > 0 {
		watch.Every = b.Every
		lines := json.NewEncoder(out.Stdout)
		watch.Progress = func(p load.Progress) { _ = lines.Encode(p) } // whoever has stopped reading will be missed at the end
	}
	if err := b.lock(out, ctrl); err != nil {
		return err
	}

	r, runErr := l.Run(ctx, watch)
	if runErr == nil && b.Idle > 0 && !r.Interrupted {
		line.Set(fmt.Sprintf("idle for %v", b.Idle))
		r.Idle, runErr = l.Idle(ctx, b.Idle, watch)
	}
	line.Clear()
	if runErr == nil || r.IOs > 0 {
		if err := b.print(out, r); err != nil {
			return err
		}
	}
	switch {
	case runErr != nil:
		return runErr
	case r.VerifyErrors > 0:
		return fmt.Errorf("%d blocks were not what they had to be", r.VerifyErrors)
	case r.Errors > 0:
		return fmt.Errorf("%d commands failed", r.Errors)
	}
	return nil
}

// warnPollers says when the figures cannot be what the hardware has to give.
func (b *benchCmd) warnPollers(out *cli.Output) {
	// The other side has at least one worker, on the same machine.
	cores := runtime.NumCPU()
	own := cores
	if len(b.CPUs) > 0 {
		own = len(b.CPUs)
	}
	switch {
	case b.Jobs+1 > cores:
		fmt.Fprintf(out.Stderr, "guestdrv: warning: %d pollers (--jobs %d and the other side) on %d cores take turns: latencies are the scheduler's; --jobs %d leaves each a core\n",
			b.Jobs+1, b.Jobs, cores, max(cores-1, 1))
	case b.Jobs > own:
		fmt.Fprintf(out.Stderr, "guestdrv: warning: %d jobs poll on %d cores (--cpus %v): they take turns\n", b.Jobs, own, b.CPUs)
	}
}

func (b *benchCmd) print(out *cli.Output, r *load.Result) error {
	if b.JSON {
		e := json.NewEncoder(out.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	_, err := fmt.Fprint(out.Stdout, benchTable(b.Device, b.NSID, b.BS, r))
	return err
}

// benchProgress is the live line.
func benchProgress(p load.Progress) string {
	seconds := max(p.Elapsed.Seconds(), 1e-9)
	s := fmt.Sprintf("%s  %s IOPS  %s MiB/s", p.Phase, text.Count(float64(p.IOs)/seconds), text.Count(float64(p.Bytes)/seconds/(1<<20)))
	if p.Total > 0 {
		s = fmt.Sprintf("[%2.0f of %.0f s]  ", p.Elapsed.Seconds(), p.Total.Seconds()) + s
	}
	if p.Errors > 0 {
		s += fmt.Sprintf("  %d ERRORS", p.Errors)
	}
	return s
}

// benchTable is the result for people.
func benchTable(device string, nsid uint32, sizes size.List, r *load.Result) string {
	ns := func(v int64) string { return text.Duration(time.Duration(v)) }
	seconds := func(v *float64) string {
		if v == nil {
			return "unknown"
		}
		return fmt.Sprintf("%.3f s", *v)
	}
	early := ""
	if r.Interrupted {
		early = " (interrupted)"
	}
	jobs := fmt.Sprintf("%d jobs", r.Jobs)
	if r.Jobs == 1 {
		jobs = "1 job"
	}
	head := fmt.Sprintf("%s of %v, %s at queue depth %d, %.1f s%s\n%s, namespace %d, doorbells: %s\n\n",
		r.Kind, sizes, jobs, r.Depth, r.Seconds, early, device, nsid, r.Doorbells)
	t := text.Table{Left: map[int]bool{1: true}}
	t.Add("IOPS", text.Count(r.IOPS))
	t.Add("bandwidth", text.Count(r.BandwidthMiB)+" MiB/s")
	latency := func(name string, l load.Latency) {
		t.Add(name, fmt.Sprintf("mean %s   p50 %s   p99 %s   p99.9 %s   max %s", ns(l.Mean), ns(l.P50), ns(l.P99), ns(l.P999), ns(l.Max)))
	}
	latency("latency", r.Latency)
	if len(r.Ops) > 1 {
		for _, o := range r.Ops {
			latency("  "+o.Op+"s", o.Latency)
		}
	}
	for _, s := range r.Priorities {
		t.Add("  "+s.Priority, fmt.Sprintf("%s IOPS, %d jobs", text.Count(s.IOPS), s.Jobs))
	}
	t.Add("MMIO writes", text.Ratio(r.MMIOPerIO)+" per I/O")
	t.Add("wake-ups", text.Ratio(r.WakeupsPerIO)+" per I/O")
	t.Add("CPU", fmt.Sprintf("guest %s   host %s   per million I/Os", seconds(r.CPU.Guest), seconds(r.CPU.Host)))
	errors := text.Count(float64(r.Errors))
	if r.VerifyErrors > 0 {
		errors += fmt.Sprintf(", %s wrong blocks", text.Count(float64(r.VerifyErrors)))
	}
	t.Add("errors", errors)
	if x := r.Trouble; x != nil {
		t.Add("trouble", fmt.Sprintf("%d commands missed their deadline, %d aborts, %d controller resets", x.Timeouts, x.Aborts, x.Resets))
	}
	if i := r.Idle; i != nil {
		host := "unknown"
		if i.Host != nil {
			host = fmt.Sprintf("%.1f %%", *i.Host)
		}
		t.Add("idle CPU", fmt.Sprintf("guest %.1f %%   host %s   of one core, in %.1f s", i.Guest, host, i.Seconds))
	}
	out := head + t.String()
	for _, p := range r.Problems {
		out += "\n  " + p
	}
	if len(r.Problems) > 0 {
		out += "\n"
	}
	return out
}
