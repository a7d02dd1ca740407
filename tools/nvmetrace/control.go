package main

import (
	"context"
	"fmt"
	"time"

	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/inspect/attach"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

// controlFlags name hostmed's control socket.
type controlFlags struct {
	Control string `placeholder:"PATH" help:"Control socket of hostmed (hostmed serve --control PATH)."`
}

const controlWithin = 10 * time.Second

// control asks a running hostmed.
type control struct{ client *attach.Client }

// openControl returns a client that has been answered once.
func openControl(ctx context.Context, path string) (*control, error) {
	c := &control{attach.New(path)}
	if _, err := c.inspect(ctx); err != nil {
		c.close()
		return nil, cli.UsageError{Err: err}
	}
	return c, nil
}

func (c *control) close() { c.client.Close() }

// inspect returns the state of hostmed's queues.
func (c *control) inspect(ctx context.Context) (*inspect.Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, controlWithin)
	defer cancel()
	s, err := c.client.Inspect(ctx, "")
	if err != nil {
		return nil, err
	}
	return &s, nil
}

// bells are what one queue of a controller of hostmed's has counted. Completions, CQKicks and Interrupts are of its CQ.
type bells struct {
	Commands, Completions uint64
	Kicks, CQKicks        uint64 // doorbell messages: MMIO writes of the guest
	Armed, ArmLost        uint64
	Spurious, Interrupts  uint64
}

// mmio is the guest's MMIO writes.
func (b bells) mmio() uint64 { return b.Kicks + b.CQKicks }

// perIO is n for each command, nil if there were none.
func (b bells) perIO(n uint64) *float64 {
	if b.Commands == 0 {
		return nil
	}
	v := float64(n) / float64(b.Commands)
	return &v
}

func (b *bells) add(o bells) {
	b.Commands, b.Completions = b.Commands+o.Commands, b.Completions+o.Completions
	b.Kicks, b.CQKicks = b.Kicks+o.Kicks, b.CQKicks+o.CQKicks
	b.Armed, b.ArmLost = b.Armed+o.Armed, b.ArmLost+o.ArmLost
	b.Spurious, b.Interrupts = b.Spurious+o.Spurious, b.Interrupts+o.Interrupts
}

func bellsOf(q *inspect.Queue) bells {
	return bells{
		Commands: q.Commands, Completions: q.Completions, Kicks: q.Kicks, CQKicks: q.CQKicks,
		Armed: q.Armed, ArmLost: q.ArmLost, Spurious: q.Spurious, Interrupts: q.Interrupts,
	}
}

// since is what came after before. Counters of a queue begin anew with it: one that has fewer than before is another queue, and all it has is new.
func (b bells) since(before bells) bells {
	if b.Commands < before.Commands || b.Kicks < before.Kicks || b.CQKicks < before.CQKicks || b.Completions < before.Completions ||
		b.Armed < before.Armed || b.ArmLost < before.ArmLost || b.Spurious < before.Spurious || b.Interrupts < before.Interrupts {
		return b
	}
	return bells{
		Commands: b.Commands - before.Commands, Completions: b.Completions - before.Completions, Kicks: b.Kicks - before.Kicks, CQKicks: b.CQKicks - before.CQKicks,
		Armed: b.Armed - before.Armed, ArmLost: b.ArmLost - before.ArmLost,
		Spurious: b.Spurious - before.Spurious, Interrupts: b.Interrupts - before.Interrupts,
	}
}

// state says what a queue's worker does about it: "polling", "asleep 4.2 s" and the others by their names.
func state(q *inspect.Queue, taken int64) string {
	if q.State == "armed" && q.ArmedAt > 0 && taken >= q.ArmedAt {
		return fmt.Sprintf("asleep %s", ns(taken-q.ArmedAt))
	}
	return printable(q.State)
}

// queueBells is what a queue counted between two snapshots.
type queueBells struct {
	queue *inspect.Queue
	bells
}

// between is what the queues of controller c, of the later snapshot, counted since before. Where before could not see the controller whole, what a queue had
// until then is not known, and nothing is said of it. What a CQ counted is with the first of the SQs that feed it, so that sums have it once.
func between(before *inspect.Snapshot, c *inspect.Controller) (out []queueBells) {
	old, whole := map[uint16]bells{}, true
	if before != nil {
		for i := range before.Controllers {
			b := &before.Controllers[i]
			if b.Socket != c.Socket {
				continue
			}
			whole = !b.Silent && len(b.Busy) == 0
			for j := range b.Queues {
				old[b.Queues[j].QID] = bellsOf(&b.Queues[j])
			}
		}
	}
	seen := map[uint16]bool{} // CQs
	for i := range c.Queues {
		q := &c.Queues[i]
		x := queueBells{queue: q}
		if was, ok := old[q.QID]; ok || whole {
			x.bells = bellsOf(q).since(was)
		}
		if seen[q.CQID] {
			x.Completions, x.CQKicks, x.Interrupts = 0, 0, 0
		}
		seen[q.CQID] = true
		out = append(out, x)
	}
	return out
}

// missing says what a snapshot could not see.
func missing(s *inspect.Snapshot) (notes []string) {
	for i := range s.Controllers {
		switch c := &s.Controllers[i]; {
		case c.Silent:
			notes = append(notes, fmt.Sprintf("%s did not answer in time: its queues are missing", printable(c.Socket)))
		case len(c.Busy) > 0:
			notes = append(notes, fmt.Sprintf("%s: workers %v did not answer in time: their queues are missing", printable(c.Socket), c.Busy))
		}
	}
	return notes
}

// mediatorNodes are the controllers of hostmed, of what came between two snapshots.
func mediatorNodes(before, now *inspect.Snapshot, seconds float64) []*node {
	nodes := map[int]*node{}
	for i := range now.Controllers {
		c := &now.Controllers[i]
		n := &node{Source: "hostmed", Name: printable(c.Socket), order: i, Depth: new(int64)}
		nodes[i] = n
		var sum bells
		for _, x := range between(before, c) {
			q := x.queue
			depth := int64(q.Inflight)
			if q.QID != 0 { // event requests always are
				*n.Depth += depth
			}
			state := printable(q.State)
			switch {
			case q.QID == 0:
				state = "" // the admin queue has no worker
			case state == "armed":
				state = "asleep"
			}
			n.Parts = append(n.Parts, &node{Source: "hostmed", Name: queueName(q.QID), QID: &q.QID, order: int(q.QID), State: state,
				Commands: x.Commands, Depth: &depth, MMIO: x.perIO(x.mmio())})
			sum.add(x.bells)
		}
		n.Commands, n.MMIO = sum.Commands, sum.perIO(sum.mmio())
	}
	return finish(nodes, seconds)
}
