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
	ports []*port
}

// open opens the media of c and listens on its sockets.
func (m *Mediator) open(c SubsystemConfig) error {
	s := &subsystem{m: m, Subsystem: subsys.New(subsys.Config{
		NQN: c.NQN, Serial: c.Serial, Model: c.Model, Workers: ioq.Pool(m.workers), Logger: m.log,
	})}
	m.subsystems = append(m.subsystems, s)
	for _, n := range c.Namespaces {
		b, err := backend.Open(n.Spec)
		if err != nil {
			return err
		}
		s.AddNamespace(n.NSID, b, n.Shared, n.Controllers)
	}
	for _, cc := range c.Controllers {
		p, err := s.listen(cc)
		if err != nil {
			return err
		}
		s.ports = append(s.ports, p)
	}
	return nil
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

func (s *subsystem) flush() error {
	var errs []error
	for _, n := range s.Allocated() {
		m := n.Medium()
		if m.Info.VolatileCache && !m.Info.ReadOnly {
			if err := ioq.Flush(m.Backend); err != nil {
				errs = append(errs, fmt.Errorf("flush of %s: %w", m.Info.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

func (s *subsystem) closeMedia() error {
	var errs []error
	for _, n := range s.Allocated() {
		m := n.Medium()
		if err := m.Backend.Close(); err != nil {
			errs = append(errs, fmt.Errorf("closing %s: %w", m.Info.Name, err))
		}
	}
	return errors.Join(errs...)
}

// namespaces is what c has attached, as a controller and its data path take it.
func namespaces(c *subsys.Controller) []ctrl.Namespace {
	var list []ctrl.Namespace
	for _, n := range c.Namespaces() {
		m := n.Medium()
		list = append(list, ctrl.Namespace{NSID: n.NSID, Backend: m.Backend, Info: m.Info, Of: n})
	}
	return list
}
