package subsys

import (
	"crypto/sha256"
	"sync"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/qos"
)

// Medium is what a namespace shows at a time. It does not change: a format or a resize makes another.
type Medium struct {
	Backend backend.Backend
	Info    backend.Info
}

// Formats returns how often n was formatted.
func (n *Namespace) Formats() uint64 { return n.formats.Load() }

// Namespace is one namespace of a subsystem, attached to any number of its controllers.
type Namespace struct {
	NSID   uint32
	Shared bool // NMIC: may be attached to more than one controller

	sub    *Subsystem   // nil: it stands alone
	uuid   [16]byte     // in place of the backend's; zeroes: that one
	spec   backend.Spec // what the operator said of it
	pool   *Pool        // that it was created in; nil: the operator has made it
	medium atomic.Pointer[Medium]
	gate   atomic.Pointer[Gate]

	// alone is held by whoever has the namespace for itself (Exclusive), and taken before use and mu.
	alone sync.Mutex
	// use is held for reading by whoever uses the backend past the workers, and for writing while the backend changes.
	use sync.RWMutex

	formatting atomic.Bool
	formats    atomic.Uint64 // how often it was formatted

	limiter qos.Limiter

	badChanges   atomic.Int64 // of marks that are not saved yet
	reservations registry

	mu    sync.Mutex // guards the rest
	parts Gate       // what gate is made of
	holds int

	protection Protection

	attached map[uint16]bool // by CNTLID; guarded by Subsystem.mu
}

// Alone returns a namespace that is in no subsystem: its gate is open for ever.
func Alone(nsid uint32, b backend.Backend, info backend.Info) *Namespace {
	n := &Namespace{NSID: nsid}
	n.medium.Store(&Medium{Backend: b, Info: info})
	return n
}

// show makes the medium what b says that it is.
func (n *Namespace) show(b backend.Backend) {
	info := b.Info()
	if n.uuid != ([16]byte{}) {
		info.UUID = n.uuid
		info.NGUID = sha256Half(n.uuid)
		info.NGUID[8] = info.NGUID[8]&^0x03 | 0x02 // locally administered, as the backends' are
	}
	n.medium.Store(&Medium{Backend: b, Info: info})
}

func sha256Half(uuid [16]byte) (out [16]byte) {
	sum := sha256.Sum256(uuid[:])
	copy(out[:], sum[:])
	return out
}

// Medium returns the namespace as it is now.
func (n *Namespace) Medium() *Medium { return n.medium.Load() }

// Limiter has the namespace's limits, for all controllers together.
func (n *Namespace) Limiter() *qos.Limiter { return &n.limiter }

// Gate returns what stands before the namespace's commands; nil: nothing.
func (n *Namespace) Gate() *Gate { return n.gate.Load() }

// Use calls f with the backend, which does not change meanwhile.
func (n *Namespace) Use(f func(*Medium) error) error {
	n.use.RLock()
	defer n.use.RUnlock()
	return f(n.Medium())
}

// EditGate changes the gate. The slices and pointers that f finds are not to be written to, only replaced. Whoever needs the
// change to hold for commands that are under way too calls Workers.Drain afterwards.
func (n *Namespace) EditGate(f func(*Gate)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(&n.parts)
	n.publish()
}

// publish is called with mu held.
func (n *Namespace) publish() {
	g := n.parts
	g.Hold = n.holds > 0
	if g.open() {
		n.gate.Store(nil)
		return
	}
	n.gate.Store(&g)
}

// SetBad replaces the blocks that Write Uncorrectable has marked by what f makes of them.
func (n *Namespace) SetBad(f func(old []Range) []Range) {
	n.EditGate(func(g *Gate) { g.Bad = f(g.Bad) })
	n.saveBad()
}

// Exclusive waits until no command of the namespace is in flight, on any worker, of any controller, and calls f; commands that
// come meanwhile wait. One caller at a time has the namespace. It may take as long as the slowest command: never call it
// on a session's goroutine or a worker's thread (Subsystem.Go gives another).
func (n *Namespace) Exclusive(f func()) {
	n.alone.Lock()
	defer n.alone.Unlock()
	n.hold(1)
	defer n.release()
	n.drain()
	f()
}

// BeginExclusive is Exclusive for callers that cannot wait, and for what does not end with a function: begin is called, on another
// goroutine, when the namespace is held, which it is until done is called. A namespace that stands alone is held at once.
func (n *Namespace) BeginExclusive(begin func(done func())) {
	if n.sub == nil {
		begin(func() {})
		return
	}
	n.sub.Go(func() {
		n.Exclusive(func() {
			over := make(chan struct{})
			begin(sync.OnceFunc(func() { close(over) }))
			<-over
		})
	})
}

func (n *Namespace) hold(by int) {
	n.mu.Lock()
	n.holds += by
	n.publish()
	n.mu.Unlock()
}

func (n *Namespace) release() {
	n.hold(-1)
	if n.sub != nil {
		n.sub.cfg.Workers.Release(n)
	}
}

// drain returns when every command that passed an older gate is complete.
func (n *Namespace) drain() {
	if n.sub != nil {
		n.sub.cfg.Workers.Drain(n)
	}
}
