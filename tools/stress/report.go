package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
)

// result is a whole run.
type result struct {
	Mutate    string `json:"mutate"`
	Processes bool   `json:"processes"`
	CPUs      []int  `json:"cpus"` // of the driver and the device; -1: not pinned
	Seed      uint64 `json:"seed"`
	Failure   string `json:"failure,omitempty"`
	Rows      []row  `json:"rows"`
}

// row is what one pair of ring sizes did.
type row struct {
	SQ           uint32  `json:"sq"`
	CQ           uint32  `json:"cq"`
	Seconds      float64 `json:"seconds"`
	Commands     uint64  `json:"commands"`
	Rounds       uint64  `json:"rounds"` // Publish calls of the tail: chances to lose a wake-up
	DriverSleeps uint64  `json:"driver_sleeps"`
	DeviceSleeps uint64  `json:"device_sleeps"`
	Kicks        uint64  `json:"kicks"`
	Interrupts   uint64  `json:"interrupts"`
	Spurious     uint64  `json:"spurious"` // wake-ups of either side that found nothing
	ArmLost      uint64  `json:"arm_lost"` // races that Arm noticed
	CQFull       uint64  `json:"cq_full"`  // sleeps of the device for lack of CQ room
}

func (s *shared) row(d time.Duration) *row {
	drv := func(i int) uint64 { return s.driver[i].Load() }
	dev := func(i int) uint64 { return s.device[i].Load() }
	return &row{
		SQ: s.sq, CQ: s.cq, Seconds: d.Seconds(),
		Commands: drv(sideCommands), Rounds: drv(sideBatches),
		DriverSleeps: drv(sideSleeps), DeviceSleeps: dev(sideSleeps),
		Kicks: drv(sideRings), Interrupts: dev(sideRings),
		Spurious: drv(sideSpurious) + dev(sideSpurious), ArmLost: dev(sideArmLost), CQFull: dev(sideFull),
	}
}

func (r *result) print(w io.Writer) {
	where := "two threads"
	if r.Processes {
		where = "two processes"
	}
	pinned := "not pinned: fewer than two cores"
	if len(r.CPUs) == 2 && r.CPUs[0] >= 0 {
		pinned = fmt.Sprintf("driver on core %d, device on core %d", r.CPUs[0], r.CPUs[1])
	}
	fmt.Fprintf(w, "mutation %s; %s; %s; seed %d\n", r.Mutate, where, pinned, r.Seed)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "SQ\tCQ\trounds\tcommands\tsleeps driver\tdevice\tkicks\tinterrupts\tspurious\tarmLost\tcqFull\t")
	for _, x := range r.Rows {
		fmt.Fprintf(t, "%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t\n", x.SQ, x.CQ, x.Rounds, x.Commands,
			x.DriverSleeps, x.DeviceSleeps, x.Kicks, x.Interrupts, x.Spurious, x.ArmLost, x.CQFull)
	}
	t.Flush()
	if r.Failure == "" {
		fmt.Fprintln(w, "no wake-up was lost")
	}
}

// describe says where the two sides stand. It is exact when both are asleep.
func (s *shared) describe() string {
	tail, head, tailEI, headEI, err := s.slots()
	if err != nil {
		return err.Error()
	}
	names := [...]string{running: "running", asleep: "asleep", ended: "ended"}
	drv := func(i int) uint64 { return s.driver[i].Load() }
	dev := func(i int) uint64 { return s.device[i].Load() }
	waits := "a doorbell of the SQ tail"
	if dev(sideLeft) != 0 {
		waits = "room in the CQ"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "  driver  %s: SQ tail %d, CQ head %d, %d outstanding, %d doorbell writes, %d sleeps\n",
		names[drv(sideState)%3], drv(sideSQ), drv(sideCQ), drv(sideLeft), drv(sideRings), drv(sideSleeps))
	fmt.Fprintf(&b, "  device  %s, waiting for %s: SQ head %d, CQ tail %d, %d interrupts, %d sleeps\n",
		names[dev(sideState)%3], waits, dev(sideSQ), dev(sideCQ), dev(sideRings), dev(sideSleeps))
	fmt.Fprintf(&b, "  page    SQ tail %d, event index %d; CQ head %d, quiet %v, event index %d\n",
		tail.Load(), tailEI.Load(), head.Load()&^dbbuf.QuietBit, head.Load()&dbbuf.QuietBit != 0, headEI.Load())
	switch {
	case dev(sideLeft) == 0 && uint64(tail.Load()) != dev(sideSQ):
		b.WriteString("  The driver published a tail and did not ring; the device slept before it saw it.\n")
	case dev(sideLeft) != 0 && uint64(head.Load()&^dbbuf.QuietBit) != uint64(headEI.Load()):
		b.WriteString("  The driver published a CQ head and did not ring; the device slept before it saw it.\n")
	case dev(sideCQ) != drv(sideCQ):
		b.WriteString("  The device posted a completion and did not interrupt; the driver slept before it saw it.\n")
	}
	return b.String()
}
