package hostmed

import (
	"errors"
	"fmt"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
)

// subsystem is an NVM subsystem with its sockets.
type subsystem struct {
	*subsys.Subsystem
	m     *Mediator
	cfg   SubsystemConfig // complete; as it was opened, or last reloaded
	ports []*port
	pool  *subsys.Pool // nil: none

	slow map[uint32]slowNamespace // by NSID: not open yet, and not in cfg; see slow.go
}

// open opens the media of c and listens on its sockets.
func (m *Mediator) open(c SubsystemConfig) error {
	s := &subsystem{m: m, cfg: c, slow: map[uint32]slowNamespace{}, Subsystem: subsys.New(subsys.Config{
		NQN: c.NQN, Serial: c.Serial, Model: c.Model, Workers: ioq.Pool(m.workers), Store: m.state, Forgets: m.cfg.State == "", Logger: m.log,
	})}
	m.subsystems = append(m.subsystems, s)
	for _, n := range c.Namespaces {
		if err := s.openNamespace(n); err != nil {
			return err
		}
	}
	for _, cc := range c.Controllers {
		p, err := s.listen(cc)
		if err != nil {
			return err
		}
		s.ports = append(s.ports, p)
	}
	if c.Pool.Dir != "" {
		var err error
		if s.pool, err = subsys.OpenPool(c.Pool.Dir, c.Pool.Capacity); err != nil {
			return err
		}
		if err := s.UsePool(s.pool); err != nil {
			return err
		}
	}
	for _, p := range s.ports {
		m.accept(p)
	}
	return nil
}

// openNamespace opens the medium of n and makes the namespace, which nobody is told of. A medium that takes its time is not waited for, and is no error.
func (s *subsystem) openNamespace(n NamespaceConfig) error {
	spec, err := backend.ParseSpec(n.Spec)
	if err != nil {
		return err
	}
	spec.UnsafeNoIOMMU = s.m.cfg.UnsafeNoIOMMU
	o := backend.Begin(s.Formatted(n.NSID, spec), s.m.cfg.open)
	b, err := o.Within(s.m.cfg.openPatience)
	if errors.Is(err, backend.ErrSlow) {
		s.later(n, spec, o)
		s.m.log.Error("a namespace is left out until its medium is open", "nqn", s.NQN(), "nsid", n.NSID, "error", err)
		return nil
	}
	if err == nil {
		s.addNamespace(n, spec, b)
	}
	return err
}

// addNamespace makes the namespace of an open medium.
func (s *subsystem) addNamespace(n NamespaceConfig, spec backend.Spec, b backend.Backend) {
	if spec.Faults != "" {
		s.m.log.Warn("this namespace fails on purpose: nothing to keep data on", "nsid", n.NSID, "spec", spec.String())
	}
	if w, ok := backend.Plain(b).(backend.Warner); ok {
		for _, text := range w.Warnings() {
			s.m.log.Warn("namespace "+spec.String(), "warning", text)
		}
	}
	made := s.AddNamespace(subsys.NamespaceConfig{
		NSID: n.NSID, Backend: b, Shared: n.Shared, Controllers: n.Controllers, UUID: n.uuid, Spec: spec,
	})
	made.Limiter().Set(n.Limits, ioq.Now()) // nobody has been told of it
	s.watch(made)
}

// closePorts ends the sessions, after which nobody uses the namespaces.
func (s *subsystem) closePorts() error {
	var errs []error
	for _, p := range s.ports {
		errs = append(errs, p.close())
	}
	s.Close()
	return errors.Join(errs...)
}

// flush makes every namespace durable; closeMedia gives them back. The workers have nothing of them any more.
func (s *subsystem) flush() error {
	var errs []error
	for _, n := range s.Allocated() {
		errs = append(errs, flushMedium(n.Medium()))
	}
	return errors.Join(errs...)
}

func (s *subsystem) closeMedia() error {
	var errs []error
	for _, n := range s.Allocated() {
		errs = append(errs, closeMedium(n.Medium()))
	}
	if s.pool != nil {
		errs = append(errs, s.pool.Close())
	}
	return errors.Join(errs...)
}

func flushMedium(m *subsys.Medium) error {
	if !m.Info.VolatileCache || m.Info.ReadOnly {
		return nil
	}
	if err := ioq.Flush(m.Backend); err != nil {
		return fmt.Errorf("flush of %s: %w", m.Info.Name, err)
	}
	return nil
}

func closeMedium(m *subsys.Medium) error {
	if err := m.Backend.Close(); err != nil {
		return fmt.Errorf("closing %s: %w", m.Info.Name, err)
	}
	return nil
}

// namespaces is what c has attached, as a controller and its data path take it.
func namespaces(c *subsys.Controller) []ctrl.Namespace {
	var list []ctrl.Namespace
	for _, n := range c.Namespaces() {
		list = append(list, *ctrl.View(n))
	}
	return list
}
