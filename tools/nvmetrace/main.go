// Command nvmetrace shows what the real NVMe queues of this machine do, and the shared doorbells of hostmed's above them. Package ebpf/trace
// counts in the kernel, hostmed's control socket tells of the doorbells; this program reads the command line, subtracts and prints.
//
// Each command is a file of its own.
package main

import (
	"os"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

const description = `nvmetrace shows what NVMe queues do: those of this machine's kernel, by eBPF, and those of hostmed's guests, by its control socket.`

type grammar struct {
	Top       topCmd             `cmd:"" help:"A live table of devices and queues."`
	Latency   latencyCmd         `cmd:"" help:"How long commands take: percentiles, histograms, and a heat map."`
	Snoop     snoopCmd           `cmd:"" help:"A line for each command, decoded; or a record of them."`
	Replay    replayCmd          `cmd:"" help:"Print a record, or count it."`
	Doorbells doorbellsCmd       `cmd:"" help:"What shared doorbells cost and spare: MMIO, sleeps, interrupts and exits."`
	Export    exportCmd          `cmd:"" help:"Metrics for Prometheus."`
	Path      pathCmd            `cmd:"" help:"Where the time of guests' commands goes, from the guest through hostmed to the real queue and back."`
	Doctor    doctorCmd          `cmd:"" help:"Which queue of a guest hangs, which rule of the doorbells was broken, and by whom."`
	Check     checkCmd           `cmd:"" help:"What this kernel offers for tracing, and what follows."`
	Version   cli.VersionCommand `cmd:"" help:"Print the version."`
}

func program() cli.Program {
	return cli.Program{Name: "nvmetrace", Description: description, Grammar: &grammar{}, Commands: true}
}

func main() { os.Exit(program().Run(os.Args[1:], &cli.Output{Stdout: os.Stdout, Stderr: os.Stderr})) }
