package hostmed

import (
	"slices"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
)

// Media that change by themselves: a disk of the host's that has grown, or was pulled out. What a medium tells is done as a reload would do it: the
// namespace is shown with its new size, or goes, and guests that asked for the event hear of it. One that went comes back with the next reload, if it can be
// opened again.

// watch has n follow its medium.
func (s *subsystem) watch(n *subsys.Namespace) {
	if w, ok := backend.Plain(n.Medium().Backend).(backend.Watched); ok {
		w.Watch(s.follow(n))
	}
}

// follow returns what an event of n's medium is told to. It waits for nothing; events that come while one of their kind waits are one.
func (s *subsystem) follow(n *subsys.Namespace) func(backend.Event) {
	var waits [3]atomic.Bool
	return func(e backend.Event) {
		do := map[backend.Event]func(*subsys.Namespace) error{backend.EventChanged: s.changed, backend.EventGone: s.gone, backend.EventHealth: s.warned}[e]
		if do == nil || waits[e].Swap(true) {
			return
		}
		s.m.following.Go(func() {
			s.m.mu.Lock()
			defer s.m.mu.Unlock()
			waits[e].Store(false)
			if s.m.closed || !slices.Contains(s.m.subsystems, s) || s.Namespace(n.NSID) != n {
				return
			}
			s.Managing(func() {
				if err := do(n); err != nil {
					s.m.log.Error("a medium has changed", "nqn", s.NQN(), "nsid", n.NSID, "medium", n.Medium().Info.Name, "error", err)
				}
			})
		})
	}
}

// changed takes up what n's medium is now.
func (s *subsystem) changed(n *subsys.Namespace) error {
	spec := ""
	if c := s.cfg.namespace(n.NSID); c != nil {
		spec = c.Spec
	}
	return s.resize(n, spec)
}

// warned has n's controllers ask its device for its health.
func (s *subsystem) warned(n *subsys.Namespace) error {
	s.Warned(n)
	return nil
}

// gone takes n away from everybody: its medium does not come back.
func (s *subsystem) gone(n *subsys.Namespace) error {
	s.m.log.Warn("namespace removed: its medium is gone", "nqn", s.NQN(), "nsid", n.NSID, "medium", n.Medium().Info.Name)
	s.RemoveNamespace(n)
	s.cfg.Namespaces = slices.DeleteFunc(slices.Clone(s.cfg.Namespaces), func(c NamespaceConfig) bool { return c.NSID == n.NSID })
	return closeMedium(n.Medium())
}
