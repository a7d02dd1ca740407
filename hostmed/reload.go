package hostmed

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
)

// Reload makes the service what c says, while it runs: subsystems, controllers and namespaces come and go, namespaces are attached and
// detached, and those whose medium has another size now are shown with it. Guests that asked for the event hear of
// it. A subsystem is known by its NQN, a controller by its socket, a namespace by its id.
//
// What cannot change live is refused, with its name; then nothing has changed. Any other error is of something that could not
// be opened or closed; the rest has been done. What a guest has created or attached itself stays as the guest left it, unless c
// says something else than the last time.
func (m *Mediator) Reload(c Config) error {
	list, err := c.subsystems()
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return errShutdown
	}
	if err := m.refuse(c, list); err != nil {
		return err
	}
	if c.LogLevel != "" {
		m.log.SetLevel(hclog.LevelFromString(c.LogLevel))
	}
	m.cfg.LogLevel = c.LogLevel

	// What goes goes first: its sockets and files may be wanted again.
	var errs []error
	m.subsystems = slices.DeleteFunc(m.subsystems, func(s *subsystem) bool {
		if findSubsystem(list, s.NQN()) != nil {
			return false
		}
		m.log.Info("subsystem removed", "nqn", s.NQN())
		errs = append(errs, s.end())
		return true
	})
	for _, s := range m.subsystems {
		errs = append(errs, s.shrink(findSubsystem(list, s.NQN())))
	}
	for _, s := range m.subsystems {
		errs = append(errs, s.grow(findSubsystem(list, s.NQN())))
	}
	for _, sc := range list {
		if !slices.ContainsFunc(m.subsystems, func(s *subsystem) bool { return s.NQN() == sc.NQN }) {
			m.log.Info("subsystem added", "nqn", sc.NQN)
			errs = append(errs, m.openOrUndo(sc))
		}
	}
	return errors.Join(errs...)
}

// openOrUndo is open that leaves nothing behind when it fails.
func (m *Mediator) openOrUndo(c SubsystemConfig) error {
	err := m.open(c)
	if err == nil {
		return nil
	}
	last := len(m.subsystems) - 1
	s := m.subsystems[last]
	m.subsystems = m.subsystems[:last]
	return errors.Join(err, s.end())
}

// end takes a whole subsystem away.
func (s *subsystem) end() error {
	err := errors.Join(s.closePorts(), s.removeNamespaces(func(*subsys.Namespace) bool { return true }))
	if s.pool != nil {
		err = errors.Join(err, s.pool.Close())
	}
	return err
}

func findSubsystem(list []SubsystemConfig, nqn string) *SubsystemConfig {
	for i := range list {
		if list[i].NQN == nqn {
			return &list[i]
		}
	}
	return nil
}

func (c *SubsystemConfig) controller(socket string) *ControllerConfig {
	for i := range c.Controllers {
		if c.Controllers[i].Socket == socket {
			return &c.Controllers[i]
		}
	}
	return nil
}

func (c *SubsystemConfig) namespace(nsid uint32) *NamespaceConfig {
	for i := range c.Namespaces {
		if c.Namespaces[i].NSID == nsid {
			return &c.Namespaces[i]
		}
	}
	return nil
}

// refuse names everything that c wants otherwise and that stays as it is until the next start.
func (m *Mediator) refuse(c Config, list []SubsystemConfig) error {
	var errs []error
	no := func(format string, a ...any) {
		errs = append(errs, fmt.Errorf(format+" cannot change while hostmed runs: restart it, or put the old value back", a...))
	}
	if !slices.Equal(c.CPUs, m.cfg.CPUs) {
		no("cpus")
	}
	if c.Poll != m.cfg.Poll {
		no("poll")
	}
	if c.State != m.cfg.State {
		no("state")
	}
	if c.Control != m.cfg.Control {
		no("control")
	}
	if c.UnsafeNoIOMMU != m.cfg.UnsafeNoIOMMU {
		no("unsafe_no_iommu")
	}
	for _, s := range m.subsystems {
		sc := findSubsystem(list, s.NQN())
		if sc == nil {
			continue
		}
		if sc.Pool != s.cfg.Pool {
			no("pool of subsystem %s", s.NQN())
		}
		if sc.Serial != s.cfg.Serial || sc.Model != s.cfg.Model {
			no("serial and model of subsystem %s", s.NQN())
		}
		for _, old := range s.cfg.Controllers {
			// Namespaces is the one field that cannot be compared, and is empty here.
			if now := sc.controller(old.Socket); now != nil && !sameController(*now, old) {
				no("id, doorbells, dstrd, queues, depth, mdts and management of controller %s", old.Socket)
			}
			for _, other := range sc.Controllers {
				if other.ID == old.ID && other.Socket != old.Socket && sc.controller(old.Socket) != nil {
					no("id %d, which is that of controller %s,", old.ID, old.Socket)
				}
			}
		}
		for _, old := range s.cfg.Namespaces {
			now := sc.namespace(old.NSID)
			if now == nil {
				continue
			}
			if now.Spec != old.Spec || now.uuid != old.uuid {
				no("spec and uuid of namespace %d of subsystem %s", old.NSID, s.NQN())
			}
			if now.Shared != old.Shared {
				no("whether namespace %d of subsystem %s is shared (shared = true, or several controllers)", old.NSID, s.NQN())
			}
		}
		for _, n := range sc.Namespaces {
			if s.cfg.namespace(n.NSID) == nil && s.Namespace(n.NSID) != nil {
				errs = append(errs, fmt.Errorf("nsid %d of subsystem %s is that of a namespace which a guest has created: choose another", n.NSID, s.NQN()))
			}
		}
	}
	return errors.Join(errs...)
}

func sameController(a, b ControllerConfig) bool {
	return a.ID == b.ID && a.Doorbells == b.Doorbells && a.DSTRD == b.DSTRD && a.Queues == b.Queues && a.Depth == b.Depth && a.MDTS == b.MDTS && a.Management == b.Management
}

// shrink takes away what c has no more.
func (s *subsystem) shrink(c *SubsystemConfig) error {
	var errs []error
	s.ports = slices.DeleteFunc(s.ports, func(p *port) bool {
		if c.controller(p.path) != nil {
			return false
		}
		p.log.Info("controller removed")
		errs = append(errs, p.close())
		s.RemoveController(p.self)
		return true
	})
	s.Managing(func() {
		errs = append(errs, s.removeNamespaces(func(n *subsys.Namespace) bool {
			return s.cfg.namespace(n.NSID) != nil && c.namespace(n.NSID) == nil
		}))
	})
	maps.DeleteFunc(s.slow, func(nsid uint32, x slowNamespace) bool {
		now := c.namespace(nsid)
		return now == nil || now.Spec != x.config.Spec || now.uuid != x.config.uuid || now.Shared != x.config.Shared
	})
	s.cfg.Controllers = slices.DeleteFunc(slices.Clone(s.cfg.Controllers), func(x ControllerConfig) bool { return c.controller(x.Socket) == nil })
	s.cfg.Namespaces = slices.DeleteFunc(slices.Clone(s.cfg.Namespaces), func(x NamespaceConfig) bool { return c.namespace(x.NSID) == nil })
	return errors.Join(errs...)
}

// removeNamespaces takes the namespaces that which chooses away from everybody, and closes their media.
func (s *subsystem) removeNamespaces(which func(*subsys.Namespace) bool) error {
	var errs []error
	for _, n := range s.Allocated() {
		if which(n) {
			s.RemoveNamespace(n)
			s.m.log.Info("namespace removed", "nqn", s.NQN(), "nsid", n.NSID, "medium", n.Medium().Info.Name)
			errs = append(errs, flushMedium(n.Medium()), closeMedium(n.Medium()))
		}
	}
	return errors.Join(errs...)
}

// grow adds what c has and s has not, and brings what both have up to date.
func (s *subsystem) grow(c *SubsystemConfig) error {
	var errs []error
	for _, cc := range c.Controllers {
		if old := s.cfg.controller(cc.Socket); old != nil {
			if old.Limits != cc.Limits {
				old.Limits = cc.Limits
				for _, p := range s.ports {
					if p.path == cc.Socket {
						s.setLimits(p.self.Limiter(), cc.Limits)
						p.log.Info("limits changed", "limits", cc.Limits)
					}
				}
			}
			continue
		}
		p, err := s.listen(cc)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		s.ports = append(s.ports, p)
		s.m.accept(p)
		s.cfg.Controllers = append(s.cfg.Controllers, cc)
	}
	s.Managing(func() {
		for _, nc := range c.Namespaces {
			errs = append(errs, s.growNamespace(nc))
		}
	})
	return errors.Join(errs...)
}

func (s *subsystem) growNamespace(c NamespaceConfig) error {
	old := s.cfg.namespace(c.NSID)
	if x, ok := s.slow[c.NSID]; ok {
		x.config = c
		s.slow[c.NSID] = x
		return fmt.Errorf("namespace %d of subsystem %s: %w: %s", c.NSID, s.NQN(), backend.ErrSlow, c.Spec)
	}
	if old == nil {
		if err := s.openNamespace(c); err != nil {
			return err
		}
		if s.Namespace(c.NSID) == nil {
			return nil
		}
		s.m.log.Info("namespace added", "nqn", s.NQN(), "nsid", c.NSID, "spec", c.Spec)
		s.Announce(s.Namespace(c.NSID))
		s.cfg.Namespaces = append(s.cfg.Namespaces, c)
		return nil
	}
	n := s.Namespace(c.NSID)
	if !slices.Equal(old.Controllers, c.Controllers) {
		s.SetAttached(n, c.Controllers)
		s.m.log.Info("namespace attached", "nqn", s.NQN(), "nsid", n.NSID, "controllers", c.Controllers)
		old.Controllers = c.Controllers
	}
	if old.Limits != c.Limits {
		old.Limits = c.Limits
		s.setLimits(n.Limiter(), c.Limits)
		s.m.log.Info("limits changed", "nqn", s.NQN(), "nsid", n.NSID, "limits", c.Limits)
	}
	return s.resize(n, c.Spec)
}

// resize takes up the size that n's medium has now.
func (s *subsystem) resize(n *subsys.Namespace, spec string) error {
	was := n.Medium().Info
	if a, ok := n.Medium().Backend.(backend.Alterable); !ok || !a.Resized() {
		return nil
	}
	if err := s.Alter(n, func(b backend.Backend) error { return b.(backend.Alterable).Resize() }); err != nil {
		return err
	}
	now := n.Medium().Info
	s.m.log.Info("namespace resized", "nqn", s.NQN(), "nsid", n.NSID, "from", backend.FormatSize(was.Size()), "to", backend.FormatSize(now.Size()))
	if parsed, err := backend.ParseSpec(spec); err == nil && parsed.Size != 0 && parsed.Size != now.Size() {
		s.m.log.Warn("the next start will refuse this namespace: correct size= in its spec, or leave it out", "spec", spec, "size", backend.FormatSize(now.Size()))
	}
	return nil
}
