// Package subsys is an NVM subsystem: its namespaces, its controllers, and which is attached to which.
// It outlives clients: a controller is configured, and has a Member while a client is connected to it.
//
// What it does not do: it knows no command, no queue and no socket. Package ctrl decodes admin commands and asks it; package ioq
// asks the Gate of a namespace before each command; package hostmed wires them together.
//
// A change of namespaces goes this way: a method here changes the tables under mu, tells the Member of each controller
// that sees the change, and waits until each has answered from its session's goroutine that its data path and its Identify show
// it. So those methods wait, and are called on a goroutine of their own (Go), never a session's or a worker's.
//
// Order of locks: Subsystem.manage, Namespace.alone, Namespace.use, Subsystem.saving, Subsystem.mu,
// registry.mu, Namespace.mu.
package subsys

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
	"github.com/shadowbell/shadowbell/hostmed/internal/state"
)

// MaxNSID is the highest namespace id there can be: data paths keep a table of that length.
const MaxNSID = 1024

// MaxCreated is the highest id that a created namespace gets.
const MaxCreated = 128

// Workers is the data path of all controllers. Its methods are called from any goroutine but a worker's, and wait.
type Workers interface {
	// Drain returns when every command of n that was begun before is complete, except those that n's gate holds back.
	Drain(n *Namespace)
	// Release begins again what n's gate held back.
	Release(n *Namespace)
	// Suspend closes what the workers have open of b, with nothing of it in flight; Resume opens that again.
	Suspend(b backend.Backend)
	Resume(b backend.Backend) error
	// Forget is Suspend for good.
	Forget(b backend.Backend)
}

// Member is a controller that has a client. Its methods are called from any goroutine and do not wait.
type Member interface {
	// Changed says that the namespaces of the controller are others now. done is called when the data path and Identify show it, or
	// when the client is gone.
	Changed(done func())
	// Reset is an NVM subsystem reset that another controller was asked for.
	Reset()
	// Notice says what has become of the host's registration or reservation: nvme.NoticeReservationReleased and so on.
	Notice(nsid uint32, kind uint8)
	// Warned says that a device under one of the controller's namespaces has a warning in its SMART log.
	Warned()
}

// Warned tells n's controllers that its device has a warning.
func (s *Subsystem) Warned(n *Namespace) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, c := range s.controllers {
		if c.member != nil && n.attached[id] {
			c.member.Warned()
		}
	}
}

// Config is one subsystem.
type Config struct {
	NQN, Serial, Model string
	Workers            Workers
	Store              state.Store // what has to outlive hostmed; nil: nothing does
	Forgets            bool        // Store ends with hostmed
	Logger             hclog.Logger
}

// Subsystem is one NVM subsystem.
type Subsystem struct {
	cfg  Config
	jobs sync.WaitGroup

	saving sync.Mutex // held while protections, formats and reservations are saved; above mu
	manage sync.Mutex // held while namespaces are created, deleted and attached one after the other
	pool   *Pool      // nil: none are created; guarded by manage

	total, unallocated atomic.Uint64 // bytes of the pool
	highest            atomic.Uint32 // key of namespaces; workers look at it

	mu          sync.Mutex // guards the rest, and Namespace.attached
	protected   protections
	formats     formats
	namespaces  map[uint32]*Namespace
	controllers map[uint16]*Controller
}

// New returns a subsystem without namespaces and controllers.
func New(c Config) *Subsystem {
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	s := &Subsystem{cfg: c, namespaces: map[uint32]*Namespace{}, controllers: map[uint16]*Controller{}}
	s.loadProtections()
	s.loadFormats()
	return s
}

// NQN, Serial and Model are what Identify Controller says.
func (s *Subsystem) NQN() string    { return s.cfg.NQN }
func (s *Subsystem) Serial() string { return s.cfg.Serial }
func (s *Subsystem) Model() string  { return s.cfg.Model }

// Go runs f on a goroutine that Close waits for.
func (s *Subsystem) Go(f func()) { s.jobs.Go(f) }

// Close waits for what Go has begun. The members are gone and the workers still there.
func (s *Subsystem) Close() { s.jobs.Wait() }

// Controller is one controller of a subsystem, whether it has a client or not.
type Controller struct {
	ID      uint16 // CNTLID
	Manages bool   // takes Namespace Management and Attachment; set before the first client comes

	sub     *Subsystem
	limiter qos.Limiter
	host    atomic.Pointer[Host]
	member  Member // nil: no client; guarded by Subsystem.mu
}

var lastAnon atomic.Uint64

// anonymous is a host that is no other.
func anonymous() *Host { return &Host{Anon: lastAnon.Add(1)} }

// AddController makes a controller. Its id must be free.
func (s *Subsystem) AddController(id uint16) *Controller {
	c := &Controller{ID: id, sub: s}
	c.host.Store(anonymous())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.controllers[id] = c
	return c
}

// RemoveController forgets c, which has no client. Namespaces that only it had are attached to nobody then.
func (s *Subsystem) RemoveController(c *Controller) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.controllers, c.ID)
	for _, n := range s.namespaces {
		delete(n.attached, c.ID)
	}
}

// Subsystem is what c belongs to.
func (c *Controller) Subsystem() *Subsystem { return c.sub }

// Limiter has the limits of c, for all its namespaces together.
func (c *Controller) Limiter() *qos.Limiter { return &c.limiter }

// Host is who is behind the controller at the moment.
func (c *Controller) Host() Host { return *c.host.Load() }

// Connect says that c has a client now; Disconnect that it has none any more.
func (c *Controller) Connect(m Member) {
	c.sub.mu.Lock()
	defer c.sub.mu.Unlock()
	if !c.sub.powered() {
		c.sub.powerOn()
	}
	c.member = m
}

func (c *Controller) Disconnect() {
	c.ResetHost()
	c.sub.mu.Lock()
	defer c.sub.mu.Unlock()
	c.member = nil
}

// Namespaces returns what is attached to c, by rising NSID.
func (c *Controller) Namespaces() []*Namespace {
	c.sub.mu.Lock()
	defer c.sub.mu.Unlock()
	var ns []*Namespace
	for _, n := range c.sub.namespaces {
		if n.attached[c.ID] {
			ns = append(ns, n)
		}
	}
	sortNamespaces(ns)
	return ns
}

func sortNamespaces(ns []*Namespace) {
	slices.SortFunc(ns, func(a, b *Namespace) int { return cmp.Compare(a.NSID, b.NSID) })
}

// ResetSubsystem resets every other controller of c's subsystem that has a client; c itself is its caller's.
func (c *Controller) ResetSubsystem() {
	c.sub.mu.Lock()
	defer c.sub.mu.Unlock()
	for _, x := range c.sub.controllers {
		if x != c && x.member != nil {
			x.member.Reset()
		}
	}
}

// Allocated returns every namespace, attached or not, by rising NSID.
func (s *Subsystem) Allocated() []*Namespace {
	s.mu.Lock()
	defer s.mu.Unlock()
	ns := slices.Collect(maps.Values(s.namespaces))
	sortNamespaces(ns)
	return ns
}

// HighestNSID is the highest id that a namespace may have. It is small unless a higher one is in use, since firmware asks for every one up to
// it.
func (s *Subsystem) HighestNSID(managed bool) uint32 {
	most := uint32(16)
	if managed {
		most = MaxCreated
	}
	return max(most, s.highest.Load())
}

// findHighest is called with mu held.
func (s *Subsystem) findHighest() {
	highest := uint32(0)
	for id := range s.namespaces {
		highest = max(highest, id)
	}
	s.highest.Store(highest)
}

// Namespace returns an allocated namespace, or nil.
func (s *Subsystem) Namespace(nsid uint32) *Namespace {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.namespaces[nsid]
}

// Controllers returns the ids of all controllers, rising.
func (s *Subsystem) Controllers() []uint16 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.controllers))
}

// HasController reports whether there is a controller id.
func (s *Subsystem) HasController(id uint16) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.controllers[id] != nil
}

// AttachedTo returns the ids of the controllers that n is attached to, rising.
func (s *Subsystem) AttachedTo(n *Namespace) []uint16 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(n.attached))
}

// NamespaceConfig is what a namespace is made of.
type NamespaceConfig struct {
	NSID        uint32 // 1 to MaxNSID, free
	Backend     backend.Backend
	Shared      bool
	Controllers []uint16     // ids of those that it is attached to
	UUID        [16]byte     // in place of the backend's; zeroes: that one
	Spec        backend.Spec // what the operator said that Backend is, for what is saved about it

	pool *Pool
}

// AddNamespace makes a namespace. It does not tell anybody: see Announce.
func (s *Subsystem) AddNamespace(c NamespaceConfig) *Namespace {
	n := &Namespace{NSID: c.NSID, Shared: c.Shared, sub: s, uuid: c.UUID, spec: c.Spec, pool: c.pool, attached: map[uint16]bool{}}
	n.show(c.Backend)
	n.restoreProtection()
	n.restoreBad()
	n.restoreReservations()
	for _, id := range c.Controllers {
		n.attached[id] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.namespaces[c.NSID] = n
	s.findHighest()
	return n
}

// SetAttached attaches n to the controllers ids and to no others, and returns when everybody concerned shows it and what was under way
// on those that lost it is complete.
func (s *Subsystem) SetAttached(n *Namespace, ids []uint16) {
	s.mu.Lock()
	var concerned []*Controller
	for id, c := range s.controllers {
		if is := slices.Contains(ids, id); is != n.attached[id] {
			concerned = append(concerned, c)
			if is {
				n.attached[id] = true
			} else {
				delete(n.attached, id)
			}
		}
	}
	s.mu.Unlock()
	s.announce(concerned)
	n.drain()
}

// RemoveNamespace takes n away from everybody, waits for what is under way, and closes the workers' ways into the backend, which
// the caller may close then.
func (s *Subsystem) RemoveNamespace(n *Namespace) {
	s.SetAttached(n, nil)
	s.mu.Lock()
	delete(s.namespaces, n.NSID)
	s.findHighest()
	s.mu.Unlock()
	n.alone.Lock()
	defer n.alone.Unlock()
	n.use.Lock()
	defer n.use.Unlock()
	s.cfg.Workers.Forget(n.Medium().Backend)
}

// Announce tells every controller that has n of a change of it, and waits until they show it.
func (s *Subsystem) Announce(n *Namespace) {
	s.mu.Lock()
	var concerned []*Controller
	for id, c := range s.controllers {
		if n.attached[id] {
			concerned = append(concerned, c)
		}
	}
	s.mu.Unlock()
	s.announce(concerned)
}

func (s *Subsystem) announce(concerned []*Controller) {
	var shown sync.WaitGroup
	for _, c := range concerned {
		s.mu.Lock()
		m := c.member
		s.mu.Unlock()
		if m != nil {
			shown.Add(1)
			m.Changed(sync.OnceFunc(shown.Done))
		}
	}
	shown.Wait()
}

// Alter gives f the backend of n with no queue of it open and nothing in flight, and shows the medium as it is afterwards. Commands that
// come meanwhile wait. Workers.Suspend and Resume are around f.
func (s *Subsystem) Alter(n *Namespace, f func(backend.Backend) error) (err error) {
	n.Exclusive(func() { err = s.alter(n, f) })
	return err
}

// alter is the core of Alter; the caller has the namespace for itself.
func (s *Subsystem) alter(n *Namespace, f func(backend.Backend) error) error {
	err := s.change(n, f)
	s.Announce(n)
	return err
}

// change gives f the backend of n with no queue of it open, and makes the medium what it is afterwards.
func (s *Subsystem) change(n *Namespace, f func(backend.Backend) error) error {
	n.use.Lock()
	defer n.use.Unlock()
	b := n.Medium().Backend
	s.cfg.Workers.Suspend(b)
	err := f(b)
	n.show(b)
	if e := s.cfg.Workers.Resume(b); err == nil {
		err = e
	}
	return err
}
