// Package hostmed is the mediator: a service that presents virtual NVMe controllers to
// vfio-user clients and mediates their commands to backends. This package is wiring: New
// checks a Config and opens what it names, Run serves until its context ends.
//
// The parts are below it: backend (where the bytes are), internal/ioq (workers and I/O queues), internal/ctrl
// (registers and admin commands), internal/subsys (namespaces and who has them), internal/gmem (guest memory), internal/pci.
// What is served is a list of NVM subsystems (subsystem.go). A socket and the controller behind it are a port (port.go), a client's
// connection to it is a session (session.go).
package hostmed

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/ioq"
	"github.com/shadowbell/shadowbell/hostmed/internal/state"
)

// DoorbellMode is how a controller takes its driver's doorbells.
type DoorbellMode = ctrl.DoorbellMode

// The doorbell modes.
const (
	// Shadow offers Doorbell Buffer Config (and the vendor command of 2014); until a driver has used
	// it each doorbell is a message.
	Shadow = ctrl.Shadow
	// Trap makes each doorbell a message, always.
	Trap = ctrl.Trap
	// Mmap maps the doorbell page of BAR0 into the client and polls it, less often when it is idle.
	Mmap = ctrl.Mmap
)

// Mediator is a running or startable service.
type Mediator struct {
	log     hclog.Logger
	workers []*ioq.Worker
	state   state.Store
	trim    *time.Timer

	mu         sync.Mutex // guards the rest; held while something is opened, reloaded or closed
	cfg        Config     // of New, or of the last Reload
	subsystems []*subsystem
	homes      int  // controllers that were given a home worker
	running    bool // ports accept clients
	closed     bool
	accepting  sync.WaitGroup

	registry registry // of ports, for those who only look
	tracing  tracing

	following sync.WaitGroup // events of media that are being dealt with

	closeOnce sync.Once
	closeErr  error
}

// New opens the backends, starts the workers and listens on the sockets. Its errors name the
// thing that is wrong and the remedy, each in one line.
func New(c Config) (_ *Mediator, err error) {
	list, err := c.subsystems()
	if err != nil {
		return nil, err
	}
	m := &Mediator{log: c.Logger, cfg: c}
	m.trim = time.AfterFunc(trimAfter, trim)
	if m.log == nil {
		m.log = hclog.NewNullLogger()
	}
	if c.open == nil {
		m.cfg.openPatience = openPatience
		m.cfg.open = func(s backend.Spec) (backend.Backend, error) { return backend.OpenSpec(s, m.log) }
	}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	if m.state = state.NewMemory(); c.State != "" {
		if m.state, err = state.Open(c.State); err != nil {
			return nil, err
		}
	}
	if err := m.startWorkers(c); err != nil {
		return nil, err
	}
	if err := m.openAll(list); err != nil {
		return nil, err
	}
	return m, nil
}

func (m *Mediator) openAll(list []SubsystemConfig) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range list {
		if err := m.open(s); err != nil {
			return err
		}
	}
	return nil
}

// trimAfter is how long the control side is quiet before the memory that it used is given back. Clients are set up with
// much garbage and deep stacks; afterwards, often for days, nothing is allocated that would make the collector run.
const trimAfter = 2 * time.Second

// trim collects some times, since each collection halves a stack that is too large.
func trim() {
	for range 3 {
		runtime.GC()
	}
	debug.FreeOSMemory()
}

// controlled puts the trim off.
func (m *Mediator) controlled() { m.trim.Reset(trimAfter) }

func (m *Mediator) startWorkers(c Config) error {
	cpus := c.CPUs
	if len(cpus) == 0 {
		for range max(runtime.NumCPU()/2, 1) {
			cpus = append(cpus, -1)
		}
	}
	// A worker that polls keeps its P. The control side needs some too, or it
	// would wait for a worker to be preempted.
	if need := len(cpus) + 2; runtime.GOMAXPROCS(0) < need {
		runtime.GOMAXPROCS(need)
	}
	for i, cpu := range cpus {
		w, err := ioq.StartWorker(ioq.WorkerConfig{ID: i, CPU: cpu, NoSpin: c.NoSpin, Poll: c.Poll, Logger: m.log.Named(fmt.Sprintf("worker-%d", i))})
		if err != nil {
			return err
		}
		m.workers = append(m.workers, w)
	}
	return nil
}

// nextHome deals the workers out to the controllers.
func (m *Mediator) nextHome() *ioq.Worker {
	w := m.workers[m.homes%len(m.workers)]
	m.homes++
	return w
}

// Run serves clients until ctx ends. Then it takes no new ones, finishes what is in flight, flushes what was
// written, removes the sockets and returns nil.
func (m *Mediator) Run(ctx context.Context) error {
	m.mu.Lock()
	m.running = true
	for _, s := range m.subsystems {
		for _, p := range s.ports {
			m.accept(p)
		}
	}
	m.mu.Unlock()
	<-ctx.Done()
	m.log.Info("shutting down", "reason", context.Cause(ctx))
	err := m.Close()
	m.accepting.Wait()
	return err
}

// accept has p serve clients, once Run has begun. It is called with mu held.
func (m *Mediator) accept(p *port) {
	if m.running && !m.closed && p.listener != nil {
		m.accepting.Go(p.accept)
	}
}

// Close ends everything, as the end of Run does.
func (m *Mediator) Close() error {
	m.closeOnce.Do(func() {
		defer m.following.Wait() // they find it closed
		m.mu.Lock()
		defer m.mu.Unlock()
		m.closed = true
		var errs []error
		m.trim.Stop()
		for _, s := range m.subsystems {
			errs = append(errs, s.closePorts(), s.flush())
		}
		errs = append(errs, m.tracing.close(m.workers))
		for _, w := range m.workers {
			w.Stop()
		}
		for _, s := range m.subsystems {
			errs = append(errs, s.closeMedia())
		}
		if m.state != nil {
			errs = append(errs, m.state.Close())
		}
		m.closeErr = errors.Join(errs...)
	})
	return m.closeErr
}
