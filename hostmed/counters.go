package hostmed

import (
	"context"
	"fmt"
	"slices"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/inspect"
)

// Counters returns what Stats and NamespaceStats do, of the controller that which names and of its namespaces, or, empty, of all that have a client and of
// all namespaces. Like Inspect it waits for nobody who does not answer.
func (m *Mediator) Counters(ctx context.Context, which string) (inspect.Counters, error) {
	list, err := m.clients(which)
	if err != nil {
		return inspect.Counters{}, err
	}
	c := inspect.Counters{Taken: inspect.Now(), Controllers: []inspect.ControllerCounters{}, Namespaces: []inspect.NamespaceCounters{}}
	for _, x := range fromEach(ctx, list, (*session).count, (*session).uncounted) {
		c.Controllers = append(c.Controllers, *x)
	}
	if which != "" && len(c.Controllers) == 0 { // it ended meanwhile
		return inspect.Counters{}, fmt.Errorf("the controller behind %s: %w", list[0].p.path, inspect.ErrNoClient)
	}
	var seen []*subsys.Subsystem
	for _, p := range m.registry.find(which) {
		s := p.self.Subsystem()
		if slices.Contains(seen, s) {
			continue
		}
		seen = append(seen, s)
		for _, n := range s.Allocated() {
			c.Namespaces = append(c.Namespaces, namespaceCounters(s.NQN(), n))
		}
	}
	return c, nil
}

func (s *session) uncounted() *inspect.ControllerCounters {
	return &inspect.ControllerCounters{Socket: s.p.path, NQN: s.p.self.Subsystem().NQN(), CNTLID: s.p.self.ID, Trace: s.p.trace, Silent: true}
}

// count runs on the session's goroutine.
func (s *session) count(c *inspect.ControllerCounters) {
	d, busy := s.data.StatsWithin(workerPatience)
	*c = *s.uncounted()
	c.Silent, c.Busy = false, busy
	c.Reads, c.Writes, c.Others, c.Errors, c.MediaErrors = d.Reads, d.Writes, d.Others, d.Errors, d.MediaErrors
	c.BytesRead, c.BytesWritten, c.Native, c.Emulated = d.BytesRead, d.BytesWritten, d.Native, d.Emulated
	c.Interrupts, c.SQDoorbells, c.CQDoorbells = d.Interrupts, d.SQDoorbells, d.CQDoorbells
	c.Throttled, c.ThrottledFor, c.Busied = d.Throttled, int64(d.ThrottledFor), int64(d.Busy)
	phase := func(p ioq.Phase) inspect.Phase { return inspect.Phase{Commands: p.Commands, Time: int64(p.Time)} }
	c.Costs = inspect.Costs{
		Translate: phase(d.Costs.Translate), Submit: phase(d.Costs.Submit), Complete: phase(d.Costs.Complete), Interrupt: phase(d.Costs.Interrupt),
	}
}

func namespaceCounters(nqn string, n *subsys.Namespace) inspect.NamespaceCounters {
	s := namespaceStats(n)
	_, counted := backend.Plain(n.Medium().Backend).(backend.Counted)
	return inspect.NamespaceCounters{
		NQN: nqn, NSID: n.NSID, Spec: n.Medium().Info.Name, Throttled: s.Throttled, ThrottledFor: int64(s.ThrottledFor),
		Counted: counted, Commands: s.Medium.Commands, Native: s.Medium.Native, Mapped: s.Medium.Mapped, Bounced: s.Medium.Bounced,
		Waited: s.Medium.Waited, Repeated: s.Medium.Repeated, Failed: s.Medium.Failed, Doorbells: s.Medium.Doorbells,
	}
}
