// Command counted runs a command in a guest while package ebpf/trace counts, and records what it saw: a snapshot before, the events, a snapshot after. It
// prints hooks and losses as JSON.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"sync"

	"github.com/shadowbell/shadowbell/ebpf/trace"
)

// Report is what is printed.
type Report struct {
	Hooks  []trace.Hook
	Losses trace.Losses
	Events uint64
}

func main() {
	var o trace.Options
	flag.BoolVar(&o.Events, "events", false, "read each command as an event")
	flag.BoolVar(&o.Doorbells, "doorbells", false, "and each move of a queue")
	flag.BoolVar(&o.Classic, "classic", false, "as on a kernel without BTF")
	flag.IntVar(&o.RingBytes, "ring", 0, "bytes of the ring buffer")
	flag.DurationVar(&o.MinLatency, "min-latency", 0, "of events")
	qid := flag.Int("queue", 0, "only of this I/O queue")
	opcode := flag.Int("opcode", 0, "only this opcode")
	file := flag.String("file", "/dev/null", "the record")
	out := flag.String("out", "/dev/null", "the command's output")
	flag.Parse()
	o.Block, o.Driver = true, true
	if *qid > 0 {
		o.Queues = []uint16{uint16(*qid)}
	}
	if *opcode > 0 {
		o.Opcodes = []uint8{uint8(*opcode)}
	}
	r, err := run(o, *file, *out, flag.Args())
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(r)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "counted:", err)
		os.Exit(1)
	}
}

func run(o trace.Options, file, out string, args []string) (*Report, error) {
	t, err := trace.Open(context.Background(), o)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	for _, p := range []trace.Part{trace.NVMe, trace.Block} {
		if err := t.Missing(p); err != nil {
			return nil, err
		}
	}
	if err := trace.DropPrivileges(); err != nil {
		return nil, err
	}
	record, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	defer record.Close()
	w, err := trace.NewWriter(record)
	if err != nil {
		return nil, err
	}
	r := new(Report)
	if err := snapshot(t, w); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var reading sync.WaitGroup
	var readErr error
	if o.Events {
		reading.Go(func() {
			readErr = t.Read(ctx, func(e trace.Event) {
				r.Events++
				if err := w.Event(e); err != nil {
					stop()
				}
			})
		})
	}
	output, err := os.Create(out)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = output, os.Stderr
	err = cmd.Run()
	stop()
	reading.Wait()
	if err := errors.Join(err, readErr, snapshot(t, w), w.Close()); err != nil {
		return nil, err
	}
	s, err := t.Snapshot()
	if err != nil {
		return nil, err
	}
	r.Losses, r.Hooks = s.Losses, t.Hooks()
	return r, nil
}

func snapshot(t *trace.Tracer, w *trace.Writer) error {
	s, err := t.Snapshot()
	if err != nil {
		return err
	}
	return w.Snapshot(s)
}
