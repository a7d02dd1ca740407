// Command hostmed is the mediator: it presents virtual NVMe controllers to vfio-user clients. This program reads
// the command line; package hostmed does the work.
package main

import (
	"context"
	"io"
	"math/bits"
	"os"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/cpus"
)

const description = `hostmed presents virtual NVMe controllers to sandboxed processes and virtual machines, over vfio-user.

It polls the doorbells of its clients while they work and sleeps while they do not, and passes their commands on to memory or files.`

type grammar struct {
	Serve   serveCmd           `cmd:"" help:"Serve controllers on unix sockets until SIGTERM or SIGINT."`
	Version cli.VersionCommand `cmd:"" help:"Print the version."`
}

type serveCmd struct {
	Socket    []string  `required:"" sep:"none" placeholder:"PATH" help:"Unix socket to listen on. Give it several times for several controllers; each presents the same namespaces and takes one client at a time."`
	Namespace []string  `required:"" sep:"none" placeholder:"SPEC" help:"A namespace to present; the first has NSID 1. Give it several times for several. See above."`
	Doorbells string    `default:"shadow" enum:"shadow,trap,mmap" placeholder:"MODE" help:"How clients ring: ${enum} (${default}). See above."`
	Stride    int       `name:"doorbell-stride" default:"4" enum:"4,8,16,32,64" placeholder:"BYTES" help:"Bytes from one doorbell to the next: ${enum} (${default}). With 64 no two share a cache line; shadow then has room for 31 I/O queues."`
	CPUs      cpus.List `name:"cpus" placeholder:"LIST" help:"Cores to poll on, such as 1 or 2-3: one worker is pinned to each. Default: half as many workers as there are cores, not pinned."`
	LogLevel  string    `default:"info" enum:"trace,debug,info,warn,error" placeholder:"LEVEL" help:"Least important message to log on stderr: ${enum} (${default})."`
	LogJSON   bool      `name:"log-json" help:"Log one JSON object a line."`
	Spin      string    `default:"on" enum:"on,off" hidden:"" help:"off: never poll, sleep at once; for measurements."`
}

// Help is what stands below the flags.
func (serveCmd) Help() string { return serveHelp }

func main() {
	p := cli.Program{Name: "hostmed", Description: description, Grammar: &grammar{}, Commands: true}
	os.Exit(p.Run(os.Args[1:], &cli.Output{Stdout: os.Stdout, Stderr: os.Stderr}))
}

var modes = map[string]hostmed.DoorbellMode{"shadow": hostmed.Shadow, "trap": hostmed.Trap, "mmap": hostmed.Mmap}

// config turns flags into what package hostmed takes.
func (s *serveCmd) config(stderr io.Writer) hostmed.Config {
	c := hostmed.Config{
		CPUs: s.CPUs, NoSpin: s.Spin == "off",
		Logger: hclog.New(&hclog.LoggerOptions{Name: "hostmed", Level: hclog.LevelFromString(s.LogLevel), JSONFormat: s.LogJSON, Output: stderr}),
	}
	dstrd := uint8(bits.TrailingZeros(uint(s.Stride / 4)))
	for _, socket := range s.Socket {
		c.Controllers = append(c.Controllers, hostmed.ControllerConfig{Socket: socket, Namespaces: s.Namespace, Doorbells: modes[s.Doorbells], DSTRD: dstrd})
	}
	return c
}

// Run serves until a signal.
func (s *serveCmd) Run(ctx context.Context, out *cli.Output) error {
	m, err := hostmed.New(s.config(out.Stderr))
	if err != nil {
		return cli.UsageError{Err: err}
	}
	return m.Run(ctx)
}
