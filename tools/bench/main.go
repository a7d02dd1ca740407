// Command bench is `make bench`: it measures what the project promises about speed and memory, in one run on one machine, with
// hostmed as a process of its own on one core and the load on another. Because machines
// drift, every case stands between two runs of the bare rings (bare.go), and the ratio is what counts.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/cpus"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type grammar struct {
	Quick bool      `help:"Measure each case for half a second only, to see that everything works."`
	Case  string    `placeholder:"REGEX" help:"Only the cases whose name matches, such as null/shadow or idle. --list names them all."`
	List  bool      `help:"Print the names of the cases and what they aim at."`
	JSON  bool      `name:"json" help:"Print one JSON object instead of a table."`
	Out   string    `placeholder:"FILE" help:"Write the JSON object to FILE too."`
	Bin   string    `placeholder:"DIR" help:"Where hostmed and guestdrv are. Default: they are built."`
	CPUs  cpus.List `name:"cpus" placeholder:"LIST" help:"Two cores: hostmed's, then the load's. Default: the first two."`
}

func main() {
	p := cli.Program{
		Name: "bench", Grammar: &grammar{},
		Description: "Measures shadowbell: rates, ratios to bare rings, idle cost, wake-up latency, memory, allocations.",
	}
	os.Exit(p.Run(os.Args[1:], &cli.Output{Stdout: os.Stdout, Stderr: os.Stderr}))
}

// bench is what all cases share.
type bench struct {
	quick    bool
	hostmed  string // path of the program
	bin      string // where others are; "": they are built
	dir      string // for sockets
	hostCPU  int
	loadCPU  int
	line     *text.Line
	progress string // of the whole run, before each line
	sockets  int    // names given so far
	hostLog  string // the last lines of what the last hostmed said
}

// Run measures the chosen cases.
func (g *grammar) Run(ctx context.Context, out *cli.Output) (err error) {
	match, err := regexp.Compile(g.Case)
	if err != nil {
		return cli.Usagef("--case: %w", err)
	}
	var chosen []benchCase
	var names []string
	for _, c := range cases() {
		names = append(names, c.name)
		if match.MatchString(c.name) {
			chosen = append(chosen, c)
		}
	}
	if len(chosen) == 0 {
		return cli.Usagef("--case %s matches none of %s", g.Case, strings.Join(names, ", "))
	}
	if g.List {
		return list(out, chosen)
	}
	b, err := newBench(ctx, g, out)
	if err != nil {
		return err
	}
	defer func() {
		b.line.Clear()
		if e := os.RemoveAll(b.dir); err == nil {
			err = e
		}
	}()
	// Two threads that poll must not keep the rest of this process from running.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), 4)))

	rep := report{Machine: describeMachine(b)}
	for i, c := range chosen {
		b.progress = fmt.Sprintf("[%d/%d] %s", i+1, len(chosen), c.name)
		b.line.Set(b.progress)
		r, err := c.run(ctx, b)
		if ctx.Err() != nil {
			break // print what there is
		}
		if err != nil {
			r.Error = cli.OneLine(err)
		}
		r.Name = c.name
		rep.Cases = append(rep.Cases, r)
	}
	rep.compare()
	b.line.Clear()
	return rep.print(g, out, ctx.Err() != nil)
}

func newBench(ctx context.Context, g *grammar, out *cli.Output) (*bench, error) {
	b := &bench{quick: g.Quick, bin: g.Bin, line: text.NewLine(out.Stderr, 0)}
	usable, err := cpus.Usable()
	if err != nil {
		return nil, err
	}
	switch {
	case len(g.CPUs) == 2:
		usable = g.CPUs
	case len(g.CPUs) != 0:
		return nil, cli.Usagef("--cpus %v: exactly two are needed", g.CPUs)
	case len(usable) < 2:
		return nil, cli.Usagef("one core is not enough: each side needs one of its own")
	}
	b.hostCPU, b.loadCPU = usable[0], usable[1]
	if b.dir, err = os.MkdirTemp("", "shadowbell-bench-"); err != nil {
		return nil, err
	}
	if b.hostmed, err = process.Binary(ctx, "hostmed", g.Bin, b.dir); err != nil {
		_ = os.RemoveAll(b.dir)
		return nil, cli.UsageError{Err: err}
	}
	return b, nil
}

// pick returns long, or short with --quick.
func (b *bench) pick(long, short time.Duration) time.Duration {
	if b.quick {
		return short
	}
	return long
}

func (b *bench) note(format string, args ...any) {
	b.line.Set(b.progress + ": " + fmt.Sprintf(format, args...))
}

// host starts hostmed with one controller for each of n sockets, pinned to one core, runs f and stops it.
func (b *bench) host(ctx context.Context, n int, args []string, f func(h *process.Daemon, devices []string) error) (err error) {
	args = append([]string{"--cpus", fmt.Sprint(b.hostCPU), "--log-level", "info"}, args...)
	var devices []string
	for range n {
		b.sockets++
		socket := filepath.Join(b.dir, fmt.Sprintf("%d.sock", b.sockets))
		args = append(args, "--socket", socket)
		devices = append(devices, "vfio-user:"+socket)
	}
	h, err := process.StartHostmed(ctx, b.hostmed, nil, args...)
	if err != nil {
		return err
	}
	defer func() {
		if e := h.Stop(); err == nil {
			err = e
		}
		b.hostLog = h.Log()
	}()
	return f(h, devices)
}

func list(out *cli.Output, chosen []benchCase) error {
	t := text.Table{Head: []string{"case", "aims"}, Left: map[int]bool{1: true}}
	for _, c := range chosen {
		t.Add(c.name, c.aims)
	}
	_, err := fmt.Fprint(out.Stdout, t.String())
	return err
}

func (r *report) writeJSON(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}
