package hostmed

import (
	"fmt"
	"strconv"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
)

// Stats is what a controller has done for the client that it has now. Bytes are of commands that succeeded.
type Stats struct {
	Reads, Writes, Others   uint64 // I/O commands that succeeded
	Errors                  uint64 // and that did not
	BytesRead, BytesWritten uint64
	// Of Compare, Verify, Dataset Management, Copy, Write Uncorrectable and vendor specific commands, those that the medium did itself, and those that hostmed
	// did with other commands.
	Native, Emulated uint64
	Interrupts       uint64
	// Doorbells of I/O queues that came as messages, each of which is an exit of a virtual machine: SQ tails and CQ heads.
	SQDoorbells, CQDoorbells uint64
	// Commands that limits held back, and the sum of how long.
	Throttled    uint64
	ThrottledFor time.Duration
	// Costs is what samples of the commands cost the worker's thread.
	Costs Costs
}

// Costs is the time of the data path by phase: translating a command, the backend's Submit, completing it, interrupting.
type Costs = ioq.Costs

// Phase is one of Costs.
type Phase = ioq.Phase

// Commands is the number of I/O commands.
func (s Stats) Commands() uint64 { return s.Reads + s.Writes + s.Others + s.Errors }

// Sub returns what has been done since before.
func (s Stats) Sub(before Stats) Stats {
	return Stats{
		Reads: s.Reads - before.Reads, Writes: s.Writes - before.Writes, Others: s.Others - before.Others, Errors: s.Errors - before.Errors,
		Native: s.Native - before.Native, Emulated: s.Emulated - before.Emulated,
		BytesRead: s.BytesRead - before.BytesRead, BytesWritten: s.BytesWritten - before.BytesWritten, Interrupts: s.Interrupts - before.Interrupts,
		SQDoorbells: s.SQDoorbells - before.SQDoorbells, CQDoorbells: s.CQDoorbells - before.CQDoorbells,
		Throttled: s.Throttled - before.Throttled, ThrottledFor: s.ThrottledFor - before.ThrottledFor,
		Costs: s.Costs.Sub(before.Costs),
	}
}

// Stats returns the counters of the controller behind socket. The error says that there is none, or that it has no client.
func (m *Mediator) Stats(socket string) (Stats, error) {
	m.mu.Lock()
	p := m.port(socket)
	m.mu.Unlock()
	if p == nil {
		return Stats{}, fmt.Errorf("no controller has the socket %s", socket)
	}
	d, err := p.stats()
	return statsOf(d), err
}

// stats returns the counters of the client's queues.
func (p *port) stats() (ioq.Stats, error) {
	p.mu.Lock()
	s := p.session
	p.mu.Unlock()
	if s == nil {
		return ioq.Stats{}, fmt.Errorf("socket %s has no client", p.path)
	}
	got := make(chan ioq.Stats, 1) // Post does nothing once the session is over, and then done is closed
	s.ctl.Post(func() { got <- s.data.Stats() })
	select {
	case d := <-got:
		return d, nil
	case <-s.done:
		return ioq.Stats{}, fmt.Errorf("socket %s has no client", p.path)
	}
}

func statsOf(d ioq.Stats) Stats {
	return Stats{
		Reads: d.Reads, Writes: d.Writes, Others: d.Others, Errors: d.Errors, BytesRead: d.BytesRead, BytesWritten: d.BytesWritten, Native: d.Native, Emulated: d.Emulated,
		Throttled: d.Throttled, ThrottledFor: d.ThrottledFor,
		Interrupts: d.Interrupts, SQDoorbells: d.SQDoorbells, CQDoorbells: d.CQDoorbells, Costs: d.Costs,
	}
}

// fields are s as a line of the log has it.
func fields(s ioq.Stats) []any {
	list := []any{"reads", s.Reads, "writes", s.Writes, "errors", s.Errors, "mmio_per_io", strconv.FormatFloat(s.MMIO(), 'g', 2, 64)}
	if s.Native+s.Emulated > 0 {
		list = append(list, "native", s.Native, "emulated", s.Emulated)
	}
	if s.Throttled > 0 {
		list = append(list, "throttled", s.Throttled, "throttled_for", s.ThrottledFor)
	}
	if s.Costs.Translate.Commands > 0 {
		list = append(list, "ns_per_io", s.Costs.String())
	}
	return list
}

// LogStats writes to the log what Stats and NamespaceStats say, of each controller that has a client and of each namespace.
func (m *Mediator) LogStats() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.subsystems {
		for _, p := range s.ports {
			if d, err := p.stats(); err == nil {
				p.log.Info("counters", fields(d)...)
			}
		}
		for _, n := range s.Allocated() {
			c := namespaceStats(n)
			m.log.Info("counters", "subsystem", s.NQN(), "nsid", n.NSID, "spec", n.Medium().Info.Name, "commands", c.Medium.Commands, "native", c.Medium.Native, "mapped", c.Medium.Mapped, "copied", c.Medium.Bounced,
				"waited", c.Medium.Waited, "repeated", c.Medium.Repeated, "failed", c.Medium.Failed, "doorbells", c.Medium.Doorbells, "throttled", c.Throttled, "throttled_for", c.ThrottledFor)
		}
	}
}

// port is called with mu held.
func (m *Mediator) port(socket string) *port {
	for _, s := range m.subsystems {
		for _, p := range s.ports {
			if p.path == socket {
				return p
			}
		}
	}
	return nil
}
