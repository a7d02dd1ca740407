package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
	"github.com/shadowbell/shadowbell/tools/internal/text"
)

type doorbellsCmd struct {
	controlFlags `embed:""`
	VM           uint32   `name:"vm" placeholder:"PID" help:"Process of a virtual machine, such as QEMU's: count its exits by KVM's tracepoints."`
	Socket       []string `sep:"none" placeholder:"PATH" help:"Only the controller of this socket. Give it several times for several."`
	Queue        []uint16 `sep:"," placeholder:"N" help:"Only these queues, as in 1,2; 0 is the admin queue."`
	runFlags     `embed:""`
}

// Help is what stands below the flags.
func (doorbellsCmd) Help() string { return doorbellsHelp }

const doorbellsHelp = `What the shared doorbells of hostmed's guests cost and spare. --control gives hostmed's own counters of each queue, --vm what KVM saw from outside of the guest; with both, exits for each I/O.

Examples

  Every second, all queues of all guests:
    nvmetrace doorbells --control /run/hostmed.sock

  Ten seconds of one guest, with the exits of its QEMU:
    nvmetrace doorbells --control /run/hostmed.sock --socket /run/vm1.sock --vm $(pidof qemu-system-x86_64) --interval 10s --duration 10s

The columns, and the fields of --json, an object for each interval

  time, seconds            when it ended, and how long it was; total is true for the last object, which is the whole time
  controllers              [{socket,doorbells,shared,…,queues}] with the sums of their queues
  state     state          polling, armed (asleep, with asleep_ns), draining, parked, failed, absent
  commands  commands       fetched: each is a tail stored in the shared page, or a doorbell
  SQ, CQ    sq_mmio, cq_mmio   doorbell messages: MMIO writes of the guest that reached hostmed; those of a CQ, and its interrupts, are
                           with the first of the SQs that feed it
  MMIO/IO   mmio_per_io    both, for each command
  armed     armed          times that the queue went to sleep; lost: arm_lost, that a new tail was found instead (R2, R3)
  spurious  spurious       messages that found nothing new
  IRQ/IO    interrupts_per_io  interrupts for each command
  exits     exits          {pid,exits,mmio,ioeventfd,per_io,mmio_per_io,reasons} with --vm: ioeventfd are MMIO writes that KVM
                           signalled itself, mmio those that it passed on; reasons by the processor's numbers
  lost      {ring,map,recursion} of the tracepoints
  notes     what is missing, and why`

// Validate is called by kong.
func (c *doorbellsCmd) Validate() error {
	switch {
	case c.Control == "" && c.VM == 0:
		return errors.New("missing flags: --control=PATH (hostmed's counters) or --vm=PID (KVM's), or both")
	case c.Interval == 0:
		return errors.New("--interval 0s: a table needs some time, as in 1s")
	}
	return c.runFlags.Validate()
}

// bellsJSON is a queue, or the sum of some.
type bellsJSON struct {
	Commands   uint64   `json:"commands"`
	SQMMIO     uint64   `json:"sq_mmio"`
	CQMMIO     uint64   `json:"cq_mmio"`
	MMIOPerIO  *float64 `json:"mmio_per_io,omitempty"`
	Armed      uint64   `json:"armed"`
	ArmLost    uint64   `json:"arm_lost"`
	Spurious   uint64   `json:"spurious"`
	Interrupts uint64   `json:"interrupts"`
	IRQPerIO   *float64 `json:"interrupts_per_io,omitempty"`
}

func (b bells) json() bellsJSON {
	return bellsJSON{Commands: b.Commands, SQMMIO: b.Kicks, CQMMIO: b.CQKicks, MMIOPerIO: b.perIO(b.mmio()), Armed: b.Armed,
		ArmLost: b.ArmLost, Spurious: b.Spurious, Interrupts: b.Interrupts, IRQPerIO: b.perIO(b.Interrupts)}
}

type queueJSON struct {
	QID      uint16 `json:"qid"`
	State    string `json:"state"`
	AsleepNS int64  `json:"asleep_ns,omitempty"`
	bellsJSON
	shown string
	bells bells
}

type controllerJSON struct {
	Socket    string `json:"socket"`
	Doorbells string `json:"doorbells"`
	Shared    bool   `json:"shared"`
	bellsJSON
	Queues []queueJSON `json:"queues"`
	bells  bells
}

type exitsJSON struct {
	PID       uint32            `json:"pid"`
	Exits     uint64            `json:"exits"`
	MMIO      uint64            `json:"mmio"`
	IOEventFD uint64            `json:"ioeventfd"`
	PerIO     *float64          `json:"per_io,omitempty"`
	MMIOPerIO *float64          `json:"mmio_per_io,omitempty"`
	Reasons   map[uint32]uint64 `json:"reasons,omitempty"`
}

type doorbellsJSON struct {
	Time        time.Time        `json:"time"`
	Seconds     float64          `json:"seconds"`
	Total       bool             `json:"total,omitempty"`
	Controllers []controllerJSON `json:"controllers"`
	Exits       []exitsJSON      `json:"exits,omitempty"`
	Lost        lostJSON         `json:"lost"`
	Notes       []string         `json:"notes,omitempty"`
}

// Run shows a table for each interval.
func (c *doorbellsCmd) Run(ctx context.Context, out *cli.Output) error {
	s := &sampler{}
	var notes []string
	var err error
	if c.Control != "" {
		if s.control, err = openControl(ctx, c.Control); err != nil {
			return err
		}
	}
	if c.VM != 0 {
		s.src, _, err = openTrace(ctx, trace.Options{KVM: true, VM: c.VM}, false)
		switch {
		case err != nil && s.control == nil:
			return err
		case err != nil:
			notes, s.src = []string{"exits are not shown: " + cli.OneLine(err)}, nil
		}
	}
	defer s.close()
	enc := json.NewEncoder(out.Stdout)
	var sum doorbellsJSON
	show := func(j doorbellsJSON) error {
		j.Notes = append(j.Notes, notes...)
		if c.JSON {
			return enc.Encode(j)
		}
		_, err := fmt.Fprintln(out.Stdout, doorbellsTable(j))
		return err
	}
	line := text.NewLine(out.Stderr, 2*time.Second)
	if c.Interval > 2*time.Second {
		line.Set("counting")
	}
	total, err := s.watch(ctx, c.Interval, c.Duration, func(st step) error {
		line.Clear()
		j := c.figures(st)
		sum.add(j)
		return show(j)
	})
	if err != nil {
		return err
	}
	all := c.figures(total)
	all.Total, all.Controllers = true, append([]controllerJSON{}, sum.Controllers...)
	all.perIO()
	return show(all)
}

// add puts an interval on top of those before it: a guest that has gone by the end has its part in the totals. States are the last ones.
func (sum *doorbellsJSON) add(j doorbellsJSON) {
	for _, c := range j.Controllers {
		i := slices.IndexFunc(sum.Controllers, func(x controllerJSON) bool { return x.Socket == c.Socket })
		if i < 0 {
			c.Queues = slices.Clone(c.Queues)
			sum.Controllers = append(sum.Controllers, c)
			continue
		}
		have := &sum.Controllers[i]
		have.Doorbells, have.Shared = c.Doorbells, c.Shared
		have.bells.add(c.bells)
		have.bellsJSON = have.bells.json()
		for _, q := range c.Queues {
			k := slices.IndexFunc(have.Queues, func(x queueJSON) bool { return x.QID == q.QID })
			if k < 0 {
				have.Queues = append(have.Queues, q)
				continue
			}
			was := have.Queues[k].bells
			was.add(q.bells)
			q.bells, q.bellsJSON = was, was.json()
			have.Queues[k] = q
		}
	}
}

// perIO fills in what exits are for each command of all controllers.
func (j *doorbellsJSON) perIO() {
	var all bells
	for _, c := range j.Controllers {
		all.add(c.bells)
	}
	for i := range j.Exits {
		e := &j.Exits[i]
		e.PerIO, e.MMIOPerIO = all.perIO(e.Exits), all.perIO(e.MMIO+e.IOEventFD)
	}
}

// figures makes the object of an interval.
func (c *doorbellsCmd) figures(st step) doorbellsJSON {
	j := doorbellsJSON{Time: st.now.at, Seconds: st.seconds(), Controllers: []controllerJSON{}}
	if m := st.now.mediator; m != nil {
		wanted := *m
		if len(c.Socket) > 0 {
			wanted.Controllers = slices.DeleteFunc(slices.Clone(m.Controllers), func(x inspect.Controller) bool { return !slices.Contains(c.Socket, x.Socket) })
		}
		st.now.mediator = &wanted
		for i := range wanted.Controllers {
			j.Controllers = append(j.Controllers, c.controller(st.before.known, &wanted, &wanted.Controllers[i]))
		}
	}
	j.Notes = st.now.notes()
	if k := st.kernel(&filterFlags{}); k != nil {
		j.Lost = lostJSON(st.now.kernel.Losses)
		for _, e := range k.KVM {
			if c.VM != 0 && e.PID != c.VM {
				continue
			}
			j.Exits = append(j.Exits, exitsJSON{PID: e.PID, Exits: e.Exits, MMIO: e.MMIO, IOEventFD: e.FastMMIO, Reasons: e.Reasons})
			if e.Exits == 0 && e.MMIO+e.FastMMIO > 0 {
				j.Notes = append(j.Notes, "this kernel's KVM does not tell of exits (kvm_exit), only of those for MMIO")
			}
		}
		if len(j.Exits) == 0 {
			j.Exits = append(j.Exits, exitsJSON{PID: c.VM}) // it slept
		}
	}
	j.perIO()
	return j
}

func (c *doorbellsCmd) controller(before, now *inspect.Snapshot, ctrl *inspect.Controller) controllerJSON {
	x := controllerJSON{Socket: ctrl.Socket, Doorbells: ctrl.Mode, Shared: ctrl.Shared, Queues: []queueJSON{}}
	for _, q := range between(before, ctrl) {
		if len(c.Queue) > 0 && !slices.Contains(c.Queue, q.queue.QID) {
			continue
		}
		j := queueJSON{QID: q.queue.QID, State: q.queue.State, bellsJSON: q.json(), shown: state(q.queue, now.Taken), bells: q.bells}
		if q.queue.State == "armed" && q.queue.ArmedAt > 0 {
			j.AsleepNS = max(now.Taken-q.queue.ArmedAt, 0)
		}
		x.bells.add(q.bells)
		x.Queues = append(x.Queues, j)
	}
	x.bellsJSON = x.bells.json()
	return x
}

// doorbellsTable is an interval for people.
func doorbellsTable(j doorbellsJSON) string {
	head := fmt.Sprintf("%.1f s", j.Seconds)
	if j.Total {
		head = "totals, " + head
	}
	t := text.Table{Head: []string{head, "state", "commands", "SQ", "CQ", "MMIO/IO", "armed", "lost", "spurious", "IRQ/IO"}, Left: map[int]bool{1: true}}
	add := func(name, state string, b bellsJSON) {
		n := func(v uint64) string { return text.Count(float64(v)) }
		t.Add(name, state, n(b.Commands), n(b.SQMMIO), n(b.CQMMIO), ratio(b.MMIOPerIO), n(b.Armed), n(b.ArmLost), n(b.Spurious), ratio(b.IRQPerIO))
	}
	for _, c := range j.Controllers {
		mode := c.Doorbells
		if mode == "shadow" && !c.Shared {
			mode = "shadow, not in use"
		}
		add(printable(c.Socket), mode, c.bellsJSON)
		for _, q := range c.Queues {
			add("  "+queueName(q.QID), q.shown, q.bellsJSON)
		}
	}
	var b strings.Builder
	if len(j.Controllers) > 0 {
		b.WriteString(t.String())
	} else {
		b.WriteString("  " + head + "\n")
	}
	for _, e := range j.Exits {
		fmt.Fprintf(&b, "  process %d: %s exits; MMIO: %s ioeventfd, %s passed on", e.PID, text.Count(float64(e.Exits)), text.Count(float64(e.IOEventFD)), text.Count(float64(e.MMIO)))
		if e.PerIO != nil {
			fmt.Fprintf(&b, "; for each I/O %s exits, %s MMIO", ratio(e.PerIO), ratio(e.MMIOPerIO))
		}
		b.WriteString("\n")
	}
	if l := lossText(trace.Losses(j.Lost)); l != "" {
		b.WriteString("  " + l + "\n")
	}
	for _, n := range j.Notes {
		b.WriteString("  " + n + "\n")
	}
	return b.String()
}
