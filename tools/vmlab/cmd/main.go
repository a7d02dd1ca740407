// Command vmlab boots real Linux guests with hostmed's disks in them: for people, and for scripts. Package vmlab does the work.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

const description = `vmlab boots a stock Linux guest under QEMU with hostmed's disks in it.

It sets itself up from Debian packages in a cache directory; nothing is installed on the machine.`

type grammar struct {
	Setup setupCmd `cmd:"" help:"Make what is missing (a minute or two the first time) and say what there is."`
	Shell shellCmd `cmd:"" help:"A shell in a guest with a disk."`
	Run   runCmd   `cmd:"" help:"Run one command in a guest with a disk, then power it off. Exits with 1 if the command fails."`
	Env   envCmd   `cmd:"" help:"Print where everything is."`
	Clean cleanCmd `cmd:"" help:"Remove everything that setup made."`

	Doorbells  doorbellsCmd  `cmd:"" help:"Measure what doorbells cost in a guest: MMIO writes per I/O and IOPS by queue depth, with and without shadow doorbells and on QEMU's own NVMe device."`
	Guestbench guestbenchCmd `cmd:"" help:"Measure in one guest what the ways to a disk cost: the kernel's nvme driver, guestdrv with ublk, guestdrv with NBD, guestdrv as a library."`

	Backendbench backendbenchCmd `cmd:"" help:"Measure what hostmed costs between a guest and an NVMe device: vfio:, nvme: and block: against the ways without it."`

	TraceDemo  traceDemoCmd  `cmd:"" help:"Show what nvmetrace shows in a guest under load, and draw its pictures."`
	Tracebench tracebenchCmd `cmd:"" help:"Measure what nvmetrace costs the load that it looks at."`

	Version cli.VersionCommand `cmd:"" help:"Print the version."`
}

func main() {
	p := cli.Program{Name: "vmlab", Description: description, Grammar: &grammar{}, Commands: true}
	os.Exit(p.Run(os.Args[1:], &cli.Output{Stdout: os.Stdout, Stderr: os.Stderr}))
}

// open returns the lab, what its guests run under, and why it is not KVM.
func open(ctx context.Context, out *cli.Output) (lab *vmlab.Lab, accel, why string, err error) {
	if lab, err = vmlab.Setup(ctx, out.Stderr); err != nil {
		return nil, "", "", err
	}
	accel, why, err = lab.Accel(ctx)
	return lab, accel, why, err
}

type setupCmd struct{}

// Run makes the cache and probes KVM.
func (setupCmd) Run(ctx context.Context, out *cli.Output) error {
	lab, accel, _, err := open(ctx, out)
	if err != nil {
		return err
	}
	fmt.Fprintf(out.Stderr, "vmlab: %s, %s\n", lab.Dir(), accel)
	return nil
}

type envCmd struct{}

// Run prints NAME=VALUE lines.
func (envCmd) Run(ctx context.Context, out *cli.Output) error {
	lab, accel, why, err := open(ctx, out)
	if err != nil {
		return err
	}
	fmt.Fprintf(out.Stdout, "dir=%s\naccel=%s\n", lab.Dir(), accel)
	if why != "" {
		fmt.Fprintf(out.Stdout, "why=%s\n", why)
	}
	fmt.Fprintf(out.Stdout, "qemu=%s\n", strings.Join(lab.QEMU(), " "))
	return nil
}

type cleanCmd struct{}

// Run removes the cache.
func (cleanCmd) Run(ctx context.Context, out *cli.Output) error { return vmlab.Clean(ctx, out.Stderr) }

// machineFlags are what shell and run have in common.
type machineFlags struct {
	Machine   string   `default:"q35" enum:"q35,pc,microvm" placeholder:"TYPE" help:"${enum} (${default})."`
	Namespace []string `sep:"none" default:"mem:size=1GiB" placeholder:"SPEC" help:"A namespace of the disk, as hostmed serve takes it (${default}). Give it several times for several; - for no disk."`
	Doorbells string   `default:"shadow" enum:"shadow,trap,mmap" placeholder:"MODE" help:"How the guest rings: ${enum} (${default})."`
	CPUs      int      `name:"cpus" default:"2" placeholder:"N" help:"Of the guest (${default})."`
	Memory    int      `default:"512" placeholder:"MIB" help:"Of the guest (${default})."`
	VIOMMU    bool     `name:"viommu" help:"Give the guest an IOMMU."`
	Kernel    string   `default:"stable" enum:"stable,backports" placeholder:"NAME" help:"Debian's: ${enum} (${default})."`
	Append    string   `placeholder:"ARGS" help:"More for the kernel's command line."`
	Socket    []string `sep:"none" placeholder:"PATH" help:"Sockets of vfio-user servers that run already: a device each, besides the disk."`
}

// start starts hostmed, unless no disk is wanted, and returns the machine's configuration. stop ends hostmed.
func (f machineFlags) start(ctx context.Context) (c vmlab.Config, stop func(), err error) {
	c = vmlab.Config{
		Machine: vmlab.Machine(f.Machine), Kernel: vmlab.Kernel(f.Kernel), CPUs: f.CPUs, MemoryMiB: f.Memory, VIOMMU: f.VIOMMU, Append: f.Append, Programs: []string{"guestdrv", "hostmed", "nvmetrace"},
	}
	for _, s := range f.Socket {
		abs, err := filepath.Abs(s)
		if err != nil {
			return c, nil, err
		}
		c.Devices = append(c.Devices, vmlab.VFIOUser(abs))
	}
	if len(f.Namespace) == 1 && f.Namespace[0] == "-" {
		return c, func() {}, nil
	}
	dir, err := os.MkdirTemp("", "vmlab-")
	if err != nil {
		return c, nil, err
	}
	clean := func() { os.RemoveAll(dir) }
	bin, err := process.Binary(ctx, "hostmed", "", dir)
	if err != nil {
		clean()
		return c, nil, err
	}
	args := []string{"--socket", filepath.Join(dir, "s"), "--doorbells", f.Doorbells}
	for _, n := range f.Namespace {
		args = append(args, "--namespace", n)
	}
	d, err := process.StartHostmed(ctx, bin, nil, args...)
	if err != nil {
		clean()
		return c, nil, err
	}
	c.Devices = append([]vmlab.Device{vmlab.VFIOUser(filepath.Join(dir, "s"))}, c.Devices...)
	return c, func() {
		if err := d.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "vmlab:", err)
		}
		clean()
	}, nil
}

type shellCmd struct{ machineFlags }

// Run gives the terminal to the guest.
func (s *shellCmd) Run(ctx context.Context, out *cli.Output) error {
	lab, err := vmlab.Setup(ctx, out.Stderr)
	if err != nil {
		return err
	}
	c, stop, err := s.start(ctx)
	if err != nil {
		return err
	}
	defer stop()
	return lab.Shell(ctx, c, out.Stdout, out.Stderr)
}

type runCmd struct {
	machineFlags
	Within  time.Duration `default:"5m" placeholder:"TIME" help:"Limit of the command (${default})."`
	Command []string      `arg:"" passthrough:"" help:"The command, a shell's."`
}

// exitError is the exit code of the guest's command.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("the command exited with %d", int(e)) }

// Run runs the command and prints what it printed.
func (r *runCmd) Run(ctx context.Context, out *cli.Output) error {
	lab, err := vmlab.Setup(ctx, out.Stderr)
	if err != nil {
		return err
	}
	c, stop, err := r.start(ctx)
	if err != nil {
		return err
	}
	defer stop()
	vm, err := lab.Start(ctx, c)
	if err != nil {
		return err
	}
	defer vm.Close()
	limited, cancel := context.WithTimeout(ctx, r.Within)
	defer cancel()
	command := strings.TrimPrefix(strings.Join(r.Command, " "), "-- ")
	res, err := vm.Exec(limited, command)
	fmt.Fprint(out.Stdout, res.Stdout)
	fmt.Fprint(out.Stderr, res.Stderr)
	if err != nil {
		return err
	}
	if err := vm.Poweroff(ctx); err != nil {
		return err
	}
	if res.Exit != 0 {
		return exitError(res.Exit)
	}
	return nil
}
