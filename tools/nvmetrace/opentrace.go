package main

import (
	"context"
	"errors"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

// openTrace opens the tracer in the kernel and gives up all privileges: files and sockets that need them are opened before. A test puts its own here. notes are of what is missing all the same. Where there is no nvme driver to trace
// and disks will do, those are opened instead.
var openTrace = func(ctx context.Context, o trace.Options, disksWillDo bool) (src source, notes []string, err error) {
	t, err := trace.Open(ctx, o)
	if err != nil && disksWillDo && !o.Block {
		o.Block = true
		first := err
		if t, err = trace.Open(ctx, o); err != nil {
			err = first
		}
	}
	if err != nil {
		return nil, nil, cli.UsageError{Err: err}
	}
	if err := known(t, o.Devices); err != nil {
		return nil, nil, errors.Join(cli.UsageError{Err: err}, t.Close())
	}
	if err := t.Missing(trace.KVM); o.KVM && err != nil {
		return nil, nil, errors.Join(cli.UsageError{Err: err}, t.Close())
	}
	if err := t.Missing(trace.NVMe); err != nil {
		notes = append(notes, cli.OneLine(err))
		if o.Block {
			notes = append(notes, "only disks are shown, from block_rq_issue to block_rq_complete")
		}
	}
	if err := t.Missing(trace.Block); o.Block && err != nil {
		notes = append(notes, cli.OneLine(err))
	}
	if err := trace.DropPrivileges(); err != nil {
		notes = append(notes, "privileges are kept: "+cli.OneLine(err))
	}
	return t, notes, nil
}

// known says of a device that is not there what is. Without a driver that is said anyway.
func known(t *trace.Tracer, devices []uint16) error {
	if t.Missing(trace.NVMe) != nil {
		return nil
	}
	for _, d := range devices {
		if _, err := trace.FindDevice(device(d).String()); err != nil {
			return err
		}
	}
	return nil
}
