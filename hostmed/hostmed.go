// Package hostmed is the mediator: a service that presents virtual NVMe controllers to
// vfio-user clients and mediates their commands to backends. This package is wiring: New
// checks a Config and opens what it names, Run serves until its context ends.
//
// The parts are below it: backend (where the bytes are), internal/ioq (workers and I/O queues), internal/ctrl
// (registers and admin commands), internal/gmem (guest memory), internal/pci.
// A client's connection is a session (session.go); a socket and what it presents is a
// port (port.go).
package hostmed

import (
	"context"
	"crypto/sha256"
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

// Limits of each controller, which every Identify and CAP says too.
const (
	maxQueues = 64
	maxDepth  = 4096
	mdtsBytes = 1 << 20
)

// Config is what a Mediator serves.
type Config struct {
	Controllers []ControllerConfig
	CPUs        []int // one worker is pinned to each; empty: half of the cores' number of workers, not pinned
	NoSpin      bool  // workers never poll an empty queue: for measurements
	Logger      hclog.Logger
}

// ControllerConfig is one virtual controller behind one socket. Controllers may name the same
// namespaces: a SPEC is opened once.
type ControllerConfig struct {
	Socket     string   // path of the unix socket
	Namespaces []string // SPECs, see backend.Open; NSID 1 is the first
	Doorbells  DoorbellMode
}

// Mediator is a running or startable service.
type Mediator struct {
	log      hclog.Logger
	workers  []*ioq.Worker
	backends map[string]backend.Backend
	ports    []*port
	trim     *time.Timer

	closeOnce sync.Once
	closeErr  error
}

// New opens the backends, starts the workers and listens on the sockets. Its errors name the
// thing that is wrong and the remedy, each in one line.
func New(c Config) (_ *Mediator, err error) {
	if len(c.Controllers) == 0 {
		return nil, errors.New("no controller: name at least one socket (--socket PATH)")
	}
	m := &Mediator{log: c.Logger, backends: map[string]backend.Backend{}}
	m.trim = time.AfterFunc(trimAfter, trim)
	if m.log == nil {
		m.log = hclog.NewNullLogger()
	}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	for _, cc := range c.Controllers {
		if len(cc.Namespaces) == 0 {
			return nil, fmt.Errorf("controller %s has no namespace: name at least one (--namespace SPEC)", cc.Socket)
		}
		for _, spec := range cc.Namespaces {
			if m.backends[spec] != nil {
				continue
			}
			b, err := backend.Open(spec)
			if err != nil {
				return nil, err
			}
			m.backends[spec] = b
		}
	}
	if err := m.startWorkers(c); err != nil {
		return nil, err
	}
	for i, cc := range c.Controllers {
		if err := checkMode(cc.Doorbells, runtime.GOARCH); err != nil {
			return nil, fmt.Errorf("controller %s: %w", cc.Socket, err)
		}
		p, err := m.newPort(i, cc)
		if err != nil {
			return nil, err
		}
		m.ports = append(m.ports, p)
	}
	return m, nil
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

// checkMode refuses mapped doorbells where a guest's uncached stores and this process's cached loads need
// not agree (R7).
func checkMode(mode DoorbellMode, arch string) error {
	if mode == Mmap && arch != "amd64" {
		return fmt.Errorf("doorbells=mmap needs x86-64, this is %s: a guest maps the page as device memory and hostmed as normal memory; use shadow or trap", arch)
	}
	return nil
}

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
		w, err := ioq.StartWorker(ioq.WorkerConfig{ID: i, CPU: cpu, NoSpin: c.NoSpin, Logger: m.log.Named(fmt.Sprintf("worker-%d", i))})
		if err != nil {
			return err
		}
		m.workers = append(m.workers, w)
	}
	return nil
}

// Run serves clients until ctx ends. Then it takes no new ones, finishes what is in flight, flushes what was
// written, removes the sockets and returns nil.
func (m *Mediator) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, p := range m.ports {
		wg.Go(p.accept)
	}
	<-ctx.Done()
	m.log.Info("shutting down", "reason", context.Cause(ctx))
	err := m.Close()
	wg.Wait()
	return err
}

// Close ends everything, as the end of Run does.
func (m *Mediator) Close() error {
	m.closeOnce.Do(func() {
		var errs []error
		m.trim.Stop()
		for _, p := range m.ports {
			errs = append(errs, p.close())
		}
		for spec, b := range m.backends {
			if info := b.Info(); info.VolatileCache && !info.ReadOnly {
				if err := ioq.Flush(b); err != nil {
					errs = append(errs, fmt.Errorf("flush of %s: %w", spec, err))
				}
			}
		}
		for _, w := range m.workers {
			w.Stop()
		}
		for spec, b := range m.backends {
			if err := b.Close(); err != nil {
				errs = append(errs, fmt.Errorf("closing %s: %w", spec, err))
			}
		}
		m.closeErr = errors.Join(errs...)
	})
	return m.closeErr
}

// identity is what makes controller i of this socket distinct: stable over restarts, since a guest's
// configuration may name it.
func identity(socket string) (serial, nqn string) {
	sum := sha256.Sum256([]byte(socket))
	return fmt.Sprintf("SB%016X", sum[:8]), fmt.Sprintf("nqn.2026-11.io.shadowbell:%x", sum[:16])
}
