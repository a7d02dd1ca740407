// Command conformance runs the black-box NVMe conformance suite (package suite) against a controller: hostmed's, QEMU's, SPDK's or a
// real one. This program opens the device, chooses the cases and prints; docs/conformance.md says how to run it against each.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"syscall"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv/device/devices"
	"github.com/shadowbell/shadowbell/guestdrv/device/vfiouser"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/tools/conformance/suite"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

const description = `conformance asks an NVMe controller for what the specification demands: NVMe Base 2.0c, NVM Command Set 1.0c, PCIe Transport 1.0c.

It is a driver of its own, takes the whole controller, and resets it many times: nobody else may use the device meanwhile.`

type grammar struct {
	Run     runCmd             `cmd:"" help:"Run the cases against a controller. Exit code 1: a case failed."`
	Version cli.VersionCommand `cmd:"" help:"Print the version."`
}

type runCmd struct {
	Device      string        `arg:"" optional:"" help:"The controller: vfio-user:PATH, or pci:ADDRESS, vfio:ADDRESS or sysfs:ADDRESS for a PCI function of this machine."`
	Peer        string        `placeholder:"DEVICE" help:"A second controller of the same subsystem, for what takes two (reservations)."`
	Filter      string        `placeholder:"GLOB" help:"Only cases whose id matches, such as 'admin.*' or 'io.read.*'."`
	List        bool          `help:"List the cases and run none."`
	Tap         bool          `xor:"format" help:"Print TAP version 13."`
	JSON        bool          `name:"json" xor:"format" help:"Print one JSON object."`
	NSID        uint32        `name:"nsid" placeholder:"N" help:"The namespace to test with. Its data will be overwritten."`
	Destructive bool          `help:"Also run cases that overwrite, format, create or delete namespaces. Without it, and without --nsid, nothing is written."`
	Timeout     time.Duration `default:"10s" placeholder:"TIME" help:"Longest wait for one answer of the controller (${default}). A case may take ten times as long."`
	Verbose     bool          `short:"v" help:"Show the cases that passed or were skipped, too."`
}

func main() {
	p := cli.Program{Name: "conformance", Description: description, Grammar: &grammar{}, Commands: true}
	os.Exit(p.Run(os.Args[1:], &cli.Output{Stdout: os.Stdout, Stderr: os.Stderr}))
}

// Help is what stands below the flags.
func (runCmd) Help() string {
	return `Every case has an id, what the specification demands and where. One whose feature the controller does not offer is skipped, with the reason.`
}

// Run runs the cases.
func (r *runCmd) Run(ctx context.Context, out *cli.Output) error {
	if r.List {
		return r.list(out)
	}
	if r.Device == "" {
		return cli.Usagef("no device: conformance run vfio-user:PATH")
	}
	if _, err := suite.Cases(r.Filter); err != nil {
		return cli.UsageError{Err: err}
	}
	cfg := suite.Config{
		Open: opener(r.Device), Filter: r.Filter, NSID: r.NSID, Destructive: r.Destructive, Timeout: r.Timeout,
	}
	if r.Peer != "" {
		cfg.Peer = opener(r.Peer)
	}
	p := r.printer(out.Stdout)
	cfg.Progress = p.result
	begin := time.Now()
	results, err := suite.Run(ctx, cfg)
	if errors.Is(err, suite.ErrNamespace) {
		return cli.UsageError{Err: err}
	}
	if err != nil {
		return err
	}
	if err := p.end(results, time.Since(begin)); err != nil {
		return err
	}
	if n := suite.Count(results, suite.Failed); n > 0 {
		return fmt.Errorf("%d of %d cases failed", n, len(results)-suite.Count(results, suite.Skipped))
	}
	return nil
}

// opener returns how to open the device that name says. An error is the user's to put right, and says how.
func opener(name string) func(context.Context) (device.Device, error) {
	_, server := vfiouser.IsName(name)
	return func(ctx context.Context) (device.Device, error) {
		dev, err := devices.Open(ctx, name)
		switch {
		case err == nil:
			return dev, nil
		case server && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)):
			return nil, cli.Usagef("%w; start the other side first: hostmed serve --socket PATH --namespace SPEC", err)
		case server && errors.Is(err, syscall.EBUSY):
			return nil, cli.Usagef("%w; another client has the controller: end it", err)
		case errors.Is(err, fs.ErrPermission):
			return nil, cli.Usagef("%w; user %d may not use the device", err, os.Getuid())
		}
		return nil, cli.UsageError{Err: err}
	}
}

func (r *runCmd) list(out *cli.Output) error {
	cases, err := suite.Cases(r.Filter)
	if errors.Is(err, path.ErrBadPattern) || len(cases) == 0 {
		return cli.UsageError{Err: err}
	}
	_, err = out.Stdout.WriteString(listing(cases))
	return err
}
