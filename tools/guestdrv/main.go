// Command guestdrv is the userspace NVMe driver on the command line: it shows, reads, writes and loads a controller from
// inside a sandbox. Package guestdrv is the driver; this program reads the command line, moves bytes and
// prints.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/device/devices"
	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

const description = `guestdrv drives an NVMe controller from an unprivileged, locked-down process.

DEVICE is one of

  vfio-user:PATH  a vfio-user server, such as hostmed: its socket, or a directory with a socket cntrl in it
  pci:ADDRESS     an NVMe controller of this machine, such as pci:0000:00:04.0, by vfio or sysfs
  vfio:ADDRESS    by VFIO: behind an IOMMU, with interrupts (vfio:ADDRESS,noiommu: without an IOMMU)
  sysfs:ADDRESS   by sysfs: polled, without an IOMMU, as root

A controller of this machine must be taken from the kernel before, with guestdrv bind. guestdrv list shows which there are, and how each would be opened.`

type grammar struct {
	Identify identifyCmd        `cmd:"" help:"Show the controller and its namespaces, as nvme-cli does."`
	Read     readCmd            `cmd:"" help:"Copy bytes of a namespace to a file or stdout."`
	Write    writeCmd           `cmd:"" help:"Copy a file or stdin to a namespace."`
	Bench    benchCmd           `cmd:"" help:"Put a load on a namespace and measure it."`
	Serve    serveCmd           `cmd:"" help:"Give namespaces to other programs as disks."`
	List     listCmd            `cmd:"" help:"Show the NVMe controllers of this machine, and what drives them."`
	Bind     bindCmd            `cmd:"" help:"Take a PCI function from the kernel's nvme driver."`
	Unbind   unbindCmd          `cmd:"" help:"Give a PCI function back to the kernel."`
	Init     initCmd            `cmd:"" help:"Be the first process of a microVM whose only disk is an NVMe controller (docs/microvm.md)."`
	Version  cli.VersionCommand `cmd:"" help:"Print the version."`
}

// deviceFlags are those of every command that opens a device.
type deviceFlags struct {
	Device        string        `arg:"" help:"vfio-user:PATH, pci:ADDRESS, vfio:ADDRESS or sysfs:ADDRESS; see guestdrv --help."`
	Timeout       time.Duration `default:"30s" placeholder:"TIME" help:"Longest time that one command may take (${default})."`
	Sandbox       string        `default:"on" enum:"on,off" placeholder:"on|off" help:"off: do not lock the process up (${default}). For debugging: the device is not trusted."`
	SandboxReport bool          `help:"Say on stderr which parts of the sandbox are in force."`
	Verbose       bool          `short:"v" help:"Log on stderr what the driver does; implies --sandbox-report."`

	// privileged keeps root's capabilities until the lock, for what is opened with them.
	privileged bool `kong:"-"`
}

func main() {
	p := cli.Program{Name: "guestdrv", Description: description, Grammar: &grammar{}, Commands: true}
	if isInit() {
		runInit(p, p.Grammar.(*grammar))
	}
	os.Exit(p.Run(os.Args[1:], &cli.Output{Stdout: os.Stdout, Stderr: os.Stderr}))
}

// The life of every command that opens a device:
//
//	check the flags; separate (the process starts again in namespaces of its own); open the device and all
//	files; lock; work
//
// separate does nothing but return when the process is the second one.
func (d *deviceFlags) separate(out *cli.Output) { d.separateUntil(out, nil) }

// separateUntil is separate; atEnd runs in the first process when the second one has ended.
func (d *deviceFlags) separateUntil(out *cli.Output, atEnd func()) {
	if d.Sandbox == "off" {
		fmt.Fprintln(out.Stderr, "guestdrv: warning: no sandbox: the device's other side is not trusted, and this process is not locked up")
	}
	if strings.HasPrefix(d.Device, "sysfs:") || strings.HasPrefix(d.Device, "pci:") {
		// The kernel does for VFIO what this does when the driver was killed: the function still had its memory, which is somebody else's now.
		then := atEnd
		atEnd = func() {
			if err := stopDMA(d.Device); err != nil {
				fmt.Fprintf(out.Stderr, "guestdrv: warning: %v\n", err)
			}
			if then != nil {
				then()
			}
		}
	}
	// Physical addresses are told to the real root only, and ublk devices made by it. An ordinary user, to whom a VFIO group may be given, has
	// nothing to keep.
	keep := d.privileged || devices.OnThisMachine(d.Device) && os.Geteuid() == 0
	sandbox.Reexec(sandbox.Options{Name: "guestdrv", Disable: d.Sandbox == "off", KeepUser: keep, AtEnd: atEnd})
}

// open opens the device. o's Timeout and Logger are filled in.
func (d *deviceFlags) open(ctx context.Context, out *cli.Output, o guestdrv.Options) (*guestdrv.Controller, error) {
	o.Timeout, o.Logger = d.Timeout, d.logger(out)
	c, err := guestdrv.Open(ctx, d.Device, o)
	switch {
	case err != nil && devices.OnThisMachine(d.Device):
		return nil, cli.UsageError{Err: err} // what it says of a function is the remedy too
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED):
		return nil, cli.Usagef("%w; start the other side first: hostmed serve --socket PATH --namespace SPEC", err)
	case errors.Is(err, fs.ErrPermission):
		return nil, cli.Usagef("%w; user %d may not connect to the socket", err, os.Getuid())
	case errors.Is(err, syscall.EBUSY):
		return nil, cli.Usagef("%w; another client has the controller: end it, or give hostmed one more --socket", err)
	case err != nil:
		return nil, cli.UsageError{Err: err}
	}
	return c, nil
}

func (d *deviceFlags) logger(out *cli.Output) hclog.Logger {
	level := hclog.Warn
	if d.Verbose {
		level = hclog.Debug
	}
	return hclog.New(&hclog.LoggerOptions{Name: "guestdrv", Level: level, Output: out.Stderr})
}

// namespace is c.Namespace with a remedy.
func namespace(c *guestdrv.Controller, nsid uint32) (*guestdrv.Namespace, error) {
	ns, err := c.Namespace(nsid)
	if err != nil {
		return nil, cli.Usagef("%w; guestdrv identify shows which there are", err)
	}
	return ns, nil
}

// lock shuts the sandbox. From here on nothing can be opened, and what is let through is what c's device needs.
func (d *deviceFlags) lock(out *cli.Output, c *guestdrv.Controller) error {
	return d.lockWith(out, c, sandbox.Policy{})
}

// lockWith is lock for commands that need more than the device: p.Uses has it.
func (d *deviceFlags) lockWith(out *cli.Output, c *guestdrv.Controller, p sandbox.Policy) error {
	if d.Sandbox == "off" {
		return nil
	}
	p.Uses = append(deviceUses(c.Files()), p.Uses...)
	report, err := sandbox.Enter(p)
	if err != nil {
		return fmt.Errorf("%w (--sandbox=off goes without)", err)
	}
	if d.SandboxReport || d.Verbose {
		fmt.Fprintf(out.Stderr, "%v\n", report)
		return nil
	}
	for _, missing := range report.Missing() {
		fmt.Fprintf(out.Stderr, "guestdrv: warning: sandbox: %v\n", missing)
	}
	return nil
}

// deviceUses is what a device still needs once it is open.
func deviceUses(f device.Files) []sandbox.Use {
	var uses []sandbox.Use
	for _, fd := range f.Sockets {
		uses = append(uses, sandbox.VFIOUser(fd))
	}
	if f.VFIODevice >= 0 {
		uses = append(uses, sandbox.VFIODevice(f.VFIODevice))
	}
	if len(f.Write) > 0 {
		uses = append(uses, sandbox.FileWrites(f.Write...))
	}
	return uses
}
