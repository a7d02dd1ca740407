// Command hostmed is the mediator: it presents virtual NVMe controllers to vfio-user clients. This program reads
// the command line; package hostmed does the work.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/hostmed/api"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/cpus"
)

const description = `hostmed presents virtual NVMe controllers to sandboxed processes and virtual machines, over vfio-user.

It polls the doorbells of its clients while they work and sleeps while they do not, and passes their commands on to memory, files, block devices and NVMe devices.`

type grammar struct {
	Serve   serveCmd           `cmd:"" help:"Serve controllers on unix sockets until SIGTERM or SIGINT."`
	Check   checkCmd           `cmd:"" help:"Read a configuration file, say what is wrong with it, and serve nothing."`
	Version cli.VersionCommand `cmd:"" help:"Print the version."`
}

type serveCmd struct {
	Config    string        `placeholder:"FILE" help:"Configuration file, in place of --socket, --namespace and what is said of doorbells. SIGHUP reads it again. See above."`
	Socket    []string      `sep:"none" placeholder:"PATH" help:"Unix socket to listen on. Give it several times for several controllers; each presents the same namespaces and takes one client at a time."`
	Namespace []string      `sep:"none" placeholder:"SPEC" help:"A namespace to present; the first has NSID 1. Give it several times for several. See above."`
	Limit     limits        `placeholder:"LIMITS" help:"What each controller may use at the most, such as iops=2000,bandwidth=100MiB. See above."`
	Doorbells string        `default:"shadow" enum:"shadow,trap,mmap" placeholder:"MODE" help:"How clients ring: ${enum} (${default}). See above."`
	Stride    int           `name:"doorbell-stride" default:"4" enum:"4,8,16,32,64" placeholder:"BYTES" help:"Bytes from one doorbell to the next: ${enum} (${default}). With 64 no two share a cache line; shadow then has room for 31 I/O queues."`
	State     string        `placeholder:"DIR" help:"Directory of what has to outlive hostmed: counters, saved features. Default: nothing does."`
	Control   string        `placeholder:"PATH" help:"Unix socket on which root and this user can look at controllers and kick their queues, as nvmetrace does. See above. Default: none."`
	CPUs      cpus.List     `name:"cpus" placeholder:"LIST" help:"Cores to poll on, such as 1 or 2-3: one worker is pinned to each. Default: half as many workers as there are cores, not pinned."`
	Poll      time.Duration `placeholder:"TIME" help:"How long a worker polls an empty queue at the most before it sleeps, 10us to 100ms. Default: 250us."`
	NoIOMMU   bool          `name:"unsafe-no-iommu" help:"Take devices for vfio: namespaces that no IOMMU keeps from all memory of the machine. See above."`
	LogLevel  string        `default:"info" enum:"trace,debug,info,warn,error" placeholder:"LEVEL" help:"Least important message to log on stderr: ${enum} (${default})."`
	LogJSON   bool          `name:"log-json" help:"Log one JSON object a line."`
	Spin      string        `default:"on" enum:"on,off" hidden:"" help:"off: never poll, sleep at once; for measurements."`
}

// limits are hostmed's, as a flag.
type limits struct{ hostmed.Limits }

// UnmarshalText reads LIMITS.
func (l *limits) UnmarshalText(text []byte) (err error) {
	l.Limits, err = hostmed.ParseLimits(string(text))
	return err
}

// Validate is called by kong when the flags are parsed.
func (s *serveCmd) Validate() error {
	var missing []string
	if len(s.Socket) == 0 {
		missing = append(missing, "--socket=PATH")
	}
	if len(s.Namespace) == 0 {
		missing = append(missing, "--namespace=SPEC")
	}
	switch {
	case s.Config == "" && len(missing) > 0:
		return fmt.Errorf("missing flags: %s (or --config=FILE)", strings.Join(missing, ", "))
	case s.Config != "" && (len(missing) < 2 || s.Limit.Limits != hostmed.Limits{} || s.Doorbells != "shadow" || s.Stride != 4):
		return errors.New("--config says what is served: leave --socket, --namespace, --limit, --doorbells and --doorbell-stride out, or --config")
	}
	return nil
}

type checkCmd struct {
	File string `arg:"" help:"Configuration file, as for serve --config."`
}

// Run prints what the file asks for.
func (c *checkCmd) Run(out *cli.Output) error {
	cfg, err := hostmed.LoadConfig(c.File)
	if err != nil {
		return cli.UsageError{Err: err}
	}
	controllers, namespaces := 0, 0
	for _, s := range cfg.Subsystems {
		controllers += len(s.Controllers)
		namespaces += len(s.Namespaces)
	}
	_, err = fmt.Fprintf(out.Stdout, "%s: good: %d subsystems, %d controllers, %d namespaces\n", c.File, len(cfg.Subsystems), controllers, namespaces)
	return err
}

// Help is what stands below the flags.
func (serveCmd) Help() string { return serveHelp }

func main() {
	p := cli.Program{Name: "hostmed", Description: description, Grammar: &grammar{}, Commands: true}
	os.Exit(p.Run(os.Args[1:], &cli.Output{Stdout: os.Stdout, Stderr: os.Stderr}))
}

var modes = map[string]hostmed.DoorbellMode{"shadow": hostmed.Shadow, "trap": hostmed.Trap, "mmap": hostmed.Mmap}

// config turns flags, and the file if there is one, into what package hostmed takes.
func (s *serveCmd) config(stderr io.Writer) (c hostmed.Config, err error) {
	level := s.LogLevel
	if s.Config != "" {
		if c, err = hostmed.LoadConfig(s.Config); err != nil {
			return c, err
		}
		if c.LogLevel != "" && level == "info" { // a flag comes before the file
			level = c.LogLevel
		}
	}
	dstrd := uint8(bits.TrailingZeros(uint(s.Stride / 4)))
	if len(s.CPUs) > 0 {
		c.CPUs = s.CPUs
	}
	if s.State != "" {
		c.State = s.State
	}
	if s.Control != "" {
		c.Control = s.Control
	}
	if s.Poll != 0 {
		c.Poll = s.Poll
	}
	c.UnsafeNoIOMMU = c.UnsafeNoIOMMU || s.NoIOMMU
	c.NoSpin = s.Spin == "off"
	c.LogLevel = level
	c.Logger = hclog.New(&hclog.LoggerOptions{Name: "hostmed", Level: hclog.LevelFromString(level), JSONFormat: s.LogJSON, Output: stderr})
	for _, socket := range s.Socket {
		c.Controllers = append(c.Controllers, hostmed.ControllerConfig{Socket: socket, Namespaces: s.Namespace, Doorbells: modes[s.Doorbells], DSTRD: dstrd, Limits: s.Limit.Limits})
	}
	return c, nil
}

// Run serves until a signal.
func (s *serveCmd) Run(ctx context.Context, out *cli.Output) error {
	c, err := s.config(out.Stderr)
	if err != nil {
		return cli.UsageError{Err: err}
	}
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGHUP, syscall.SIGUSR1)
	defer signal.Stop(asked)
	m, err := hostmed.New(c)
	if err != nil {
		return cli.UsageError{Err: err}
	}
	var control sync.WaitGroup
	if c.Control != "" {
		l, err := api.Listen(c.Control, m, c.Logger)
		if err != nil {
			return cli.UsageError{Err: errors.Join(err, m.Close())}
		}
		control.Go(func() {
			if err := l.Serve(ctx); err != nil {
				c.Logger.Error("the control socket is not served any more", "error", cli.OneLine(err))
			}
		})
	}
	defer control.Wait()
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case what := <-asked:
				if what == syscall.SIGUSR1 {
					m.LogStats()
				} else {
					s.reload(m, c.Logger, out.Stderr)
				}
			}
		}
	}()
	return m.Run(ctx)
}

// reload is what SIGHUP asks for. Without a configuration file it looks for namespaces that have another size.
func (s *serveCmd) reload(m *hostmed.Mediator, log hclog.Logger, stderr io.Writer) {
	c, err := s.config(stderr)
	if err == nil {
		err = m.Reload(c)
	}
	if err != nil {
		log.Error("reload: the service goes on", "error", cli.OneLine(err))
		return
	}
	log.Info("reloaded")
}
