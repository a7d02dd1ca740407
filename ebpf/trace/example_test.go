package trace_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
)

// What nvme0 did in ten seconds, by opcode and size, and every command that took longer than a millisecond meanwhile.
func Example() {
	device, err := trace.FindDevice("nvme0")
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
	defer stop()
	t, err := trace.Open(ctx, trace.Options{Devices: []uint16{device.Instance}, Events: true, MinLatency: time.Millisecond})
	if err != nil {
		log.Fatal(err) // it says what is missing, and what helps
	}
	defer t.Close()
	if err := trace.DropPrivileges(); err != nil {
		log.Fatal(err)
	}
	before, err := t.Snapshot()
	if err != nil {
		log.Fatal(err)
	}
	if err := t.Read(ctx, func(e trace.Event) {
		if e.Kind == trace.End {
			fmt.Printf("%s: queue %d, opcode %#02x, block %d: %v\n", e.Disk, e.QID, e.Opcode, e.SLBA, time.Duration(e.Latency))
		}
	}); err != nil {
		log.Fatal(err)
	}
	after, err := t.Snapshot()
	if err != nil {
		log.Fatal(err)
	}
	s := after.Sub(before)
	for _, c := range s.Cells {
		fmt.Printf("queue %d, opcode %#02x, up to %d bytes: %d commands, median %v, 99 %% within %v\n",
			c.QID, c.Opcode, trace.SizeClassLimit(c.SizeClass), c.Count, c.Latency.Quantile(0.5), c.Latency.Quantile(0.99))
	}
	if s.Losses != (trace.Losses{}) {
		fmt.Printf("not counted: %+v\n", s.Losses)
	}
}
