package hostmed

import (
	"slices"
	"time"

	"github.com/shadowbell/shadowbell/hostmed/backend"
)

// Media that take their time to open, as a device does that has died and that the kernel tries to reset. Nobody waits for them: not the other namespaces, not the sockets.
// The service runs without such a namespace, which comes, as by a reload, when its medium is open.

// openPatience is how long a medium is waited for: many times what one takes that is well.
const openPatience = 5 * time.Second

// slowNamespace is one whose medium is being opened.
type slowNamespace struct {
	config  NamespaceConfig
	opening *backend.Opening
}

// later has n come when its medium is open, unless the service has ended by then, or is to be another. It is called with Mediator.mu held.
func (s *subsystem) later(n NamespaceConfig, spec backend.Spec, o *backend.Opening) {
	s.slow[n.NSID] = slowNamespace{n, o}
	s.cfg.Namespaces = slices.DeleteFunc(slices.Clone(s.cfg.Namespaces), func(c NamespaceConfig) bool { return c.NSID == n.NSID })
	go func() {
		b, err := o.Result()
		s.m.mu.Lock()
		defer s.m.mu.Unlock()
		x, ok := s.slow[n.NSID]
		if wanted := ok && x.opening == o && !s.m.closed && slices.Contains(s.m.subsystems, s); !wanted {
			if err == nil {
				err = b.Close()
			}
			if err != nil {
				s.m.log.Warn("a medium that nobody wants any more", "nqn", s.NQN(), "nsid", n.NSID, "error", err)
			}
			return
		}
		delete(s.slow, n.NSID)
		if err != nil {
			s.m.log.Error("a namespace could not be opened: reload when its medium works", "nqn", s.NQN(), "nsid", n.NSID, "error", err)
			return
		}
		s.Managing(func() {
			s.addNamespace(x.config, spec, b)
			s.m.log.Info("namespace added", "nqn", s.NQN(), "nsid", n.NSID, "spec", x.config.Spec)
			s.Announce(s.Namespace(n.NSID))
			s.cfg.Namespaces = append(s.cfg.Namespaces, x.config)
		})
	}()
}
