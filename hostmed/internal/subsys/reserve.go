package subsys

import (
	"slices"
	"sync"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Reservations: which host may do what to a namespace that several controllers have. NVMe Base 2.0c 7 and 8.19.
//
// The registry below is changed under its own lock by commands that any worker runs; what the data path has to know of it goes into
// the Gate. Whatever has to be waited for (a save, commands of a host that was preempted) is left to the caller, who has another
// goroutine for it.

// registry is who has registered with a namespace, and the reservation.
type registry struct {
	mu sync.Mutex // guards the rest; below Subsystem.mu, above Namespace.mu

	generation uint32
	list       []registrant // in the order in which they came
	typ        nvme.ReservationType
	holder     Host // of the types that have one
	persist    bool // PTPL

	saved bool // there is something in the store
}

type registrant struct {
	host Host
	key  uint64
}

// Reservable says that n takes reservations: several controllers may have it.
func (n *Namespace) Reservable() bool { return n.Shared && n.sub != nil }

// Persists says that a reservation can outlive hostmed (RESCAP.PTPLS).
func (n *Namespace) Persists() bool {
	return n.sub != nil && n.sub.cfg.Store != nil && !n.sub.cfg.Forgets
}

// notice is what another host is to be told.
type notice struct {
	host Host
	kind uint8 // of nvme.ReservationNotice
}

func (r *registry) find(h Host) *registrant {
	for i := range r.list {
		if r.list[i].host == h {
			return &r.list[i]
		}
	}
	return nil
}

func (r *registry) holds(h Host) bool {
	return r.typ != 0 && (r.typ.All() && r.find(h) != nil || !r.typ.All() && r.holder == h)
}

// tell returns a notice for each registrant but by.
func (r *registry) tell(by Host, kind uint8) (ns []notice) {
	for _, x := range r.list {
		if x.host != by {
			ns = append(ns, notice{x.host, kind})
		}
	}
	return ns
}

// remove unregisters those that which chooses.
func (r *registry) remove(which func(registrant) bool) (gone []Host) {
	r.list = slices.DeleteFunc(r.list, func(x registrant) bool {
		if which(x) {
			gone = append(gone, x.host)
			return true
		}
		return false
	})
	return gone
}

// leave unregisters h by its own wish, or because it is nobody any more. With the holder goes the reservation.
func (r *registry) leave(h Host) (ns []notice) {
	held := r.holds(h)
	r.remove(func(x registrant) bool { return x.host == h })
	if held && (!r.typ.All() || len(r.list) == 0) {
		if r.typ.Registrants() {
			ns = r.tell(h, nvme.NoticeReservationReleased)
		}
		r.typ, r.holder = 0, Host{}
	}
	return ns
}

// register is Reservation Register.
func (r *registry) register(q *ReservationRequest) (ns []notice, st nvme.Status) {
	c := &q.Command
	me := r.find(q.Host)
	known := me != nil && (c.IgnoreExistingKey() || me.key == q.Keys.Current)
	switch c.ReservationAction() {
	case nvme.ReservationRegister:
		switch {
		case q.Keys.Other == 0:
			return nil, nvme.StatusInvalidField
		case me != nil && me.key != q.Keys.Other:
			return nil, nvme.StatusReservationConflict
		case me == nil && len(r.list) == maxRegistrants:
			return nil, nvme.StatusInsufficientCapacity
		case me == nil:
			r.list = append(r.list, registrant{q.Host, q.Keys.Other})
			r.generation++
		}
	case nvme.ReservationUnregister:
		if !known {
			return nil, nvme.StatusReservationConflict
		}
		ns = r.leave(q.Host)
		r.generation++
	case nvme.ReservationReplace:
		switch {
		case q.Keys.Other == 0:
			return nil, nvme.StatusInvalidField
		case known:
			me.key = q.Keys.Other
		case me != nil || !c.IgnoreExistingKey():
			return nil, nvme.StatusReservationConflict
		case len(r.list) == maxRegistrants:
			return nil, nvme.StatusInsufficientCapacity
		default: // with IEKEY it does not matter whether the host was registered: NVMe Base 2.0c 8.19.3
			r.list = append(r.list, registrant{q.Host, q.Keys.Other})
		}
		r.generation++
	default:
		return nil, nvme.StatusInvalidField
	}
	switch c.PersistThroughPowerLoss() {
	case nvme.CPTPLClear:
		r.persist = false
	case nvme.CPTPLSet:
		r.persist = true
	}
	return ns, nvme.StatusSuccess
}

// maxRegistrants bounds what hosts without an identifier, which are new ones after each reset, can add up to.
const maxRegistrants = 256

// acquire is Reservation Acquire.
func (r *registry) acquire(q *ReservationRequest) (ns []notice, st nvme.Status) {
	c, typ := &q.Command, q.Command.ReservationType()
	if c.IgnoreExistingKey() || !typ.Valid() {
		return nil, nvme.StatusInvalidField
	}
	me := r.find(q.Host)
	if me == nil || me.key != q.Keys.Current {
		return nil, nvme.StatusReservationConflict
	}
	switch c.ReservationAction() {
	case nvme.ReservationAcquire:
		switch {
		case r.typ == 0:
			r.typ, r.holder = typ, q.Host
		case !r.holds(q.Host) || r.typ != typ:
			return nil, nvme.StatusReservationConflict
		}
		return nil, nvme.StatusSuccess
	case nvme.ReservationPreempt, nvme.ReservationPreemptAbort:
		return r.preempt(q, typ)
	}
	return nil, nvme.StatusInvalidField
}

// preempt is the action of that name, NVMe Base 2.0c 8.19.6: it unregisters all that have the key PRKEY, and takes the reservation if
// its holder is one of them. 0 stands for all holders of a reservation that all registrants hold.
func (r *registry) preempt(q *ReservationRequest, typ nvme.ReservationType) (ns []notice, st nvme.Status) {
	prkey, old := q.Keys.Other, r.typ
	takes := old != 0 && old.All() && prkey == 0
	if old != 0 && !old.All() {
		holder := r.find(r.holder)
		takes = holder != nil && holder.key == prkey
	}
	if prkey == 0 && !takes {
		return nil, nvme.StatusInvalidField
	}
	var held []Host
	for _, x := range r.list {
		if r.holds(x.host) && x.host != q.Host {
			held = append(held, x.host)
		}
	}
	gone := r.remove(func(x registrant) bool {
		if takes && x.host == q.Host {
			return false // the holder to be
		}
		return prkey == 0 || x.key == prkey
	})
	if !takes && len(gone) == 0 {
		return nil, nvme.StatusReservationConflict
	}
	for _, h := range gone {
		if h != q.Host {
			ns = append(ns, notice{h, nvme.NoticeRegistrationPreempted})
		}
	}
	r.generation++
	switch {
	case takes:
		for _, h := range held {
			ns = append(ns, notice{h, nvme.NoticeReservationPreempted})
		}
		if old != typ && old.Registrants() {
			ns = append(ns, r.tell(q.Host, nvme.NoticeReservationReleased)...)
		}
		r.typ, r.holder = typ, q.Host
	case old.All() && len(r.list) == 0:
		r.typ, r.holder = 0, Host{} // it has preempted itself, the last
	}
	return ns, nvme.StatusSuccess
}

// release is Reservation Release.
func (r *registry) release(q *ReservationRequest) (ns []notice, st nvme.Status) {
	c := &q.Command
	if c.IgnoreExistingKey() {
		return nil, nvme.StatusInvalidField
	}
	me := r.find(q.Host)
	if me == nil || me.key != q.Keys.Current {
		return nil, nvme.StatusReservationConflict
	}
	switch c.ReservationAction() {
	case nvme.ReservationRelease:
		switch {
		case !r.holds(q.Host): // nothing to do
		case c.ReservationType() != r.typ:
			return nil, nvme.StatusInvalidField
		default:
			if r.typ.Registrants() {
				ns = r.tell(q.Host, nvme.NoticeReservationReleased)
			}
			r.typ, r.holder = 0, Host{}
		}
	case nvme.ReservationClear:
		ns = r.tell(q.Host, nvme.NoticeReservationPreempted)
		r.list, r.typ, r.holder = nil, 0, Host{}
		r.generation++
	default:
		return nil, nvme.StatusInvalidField
	}
	return ns, nvme.StatusSuccess
}

// ReservationRequest is a Reservation Register, Acquire or Release.
type ReservationRequest struct {
	Command nvme.Command
	Keys    nvme.ReservationKeys
	Host    Host
}

// Reserve does what q asks for. What it changes holds for every command that begins from now on. later, unless it is nil, has to be
// called on a goroutine that may wait, and the command completed with what it returns: a reservation is to outlive power, or commands are to
// end that a host was preempted out of.
func (n *Namespace) Reserve(q *ReservationRequest) (st nvme.Status, later func() nvme.Status) {
	cptpl := nvme.CPTPLKeep
	if q.Command.Opcode == nvme.IOReservationRegister {
		cptpl = int(q.Command.PersistThroughPowerLoss())
	}
	if cptpl == 1 || cptpl == nvme.CPTPLSet && !n.Persists() {
		return nvme.StatusInvalidField.WithDNR(), nil
	}
	r := &n.reservations
	r.mu.Lock()
	var ns []notice
	switch q.Command.Opcode {
	case nvme.IOReservationRegister:
		ns, st = r.register(q)
	case nvme.IOReservationAcquire:
		ns, st = r.acquire(q)
	case nvme.IOReservationRelease:
		ns, st = r.release(q)
	default:
		st = nvme.StatusInvalidOpcode
	}
	if !st.OK() {
		r.mu.Unlock()
		return st.WithDNR(), nil
	}
	n.enforce()
	save := n.Persists() && (r.persist || r.saved)
	r.mu.Unlock()
	n.sub.notify(n, ns)
	abort := q.Command.Opcode == nvme.IOReservationAcquire && q.Command.ReservationAction() == nvme.ReservationPreemptAbort
	if !save && !abort {
		return st, nil
	}
	return st, func() nvme.Status {
		if abort {
			n.drain() // nothing that a backend has begun can be taken back, but it ends
		}
		if save {
			if err := n.saveReservations(); err != nil {
				n.sub.cfg.Logger.Error("a reservation is not kept over the next restart", "nqn", n.sub.cfg.NQN, "nsid", n.NSID, "error", err)
				return nvme.StatusInternalError
			}
		}
		return st
	}
}

// Conflicts says that a reservation keeps h from commands that write n.
func (n *Namespace) Conflicts(h Host) bool {
	g := n.Gate()
	return g != nil && g.Reserved != nil && !g.Reserved.allows(Writes, h)
}

// enforce puts the reservation in the gate. It is called with the registry's lock held.
func (n *Namespace) enforce() {
	r := &n.reservations
	var in *Reservation
	if r.typ != 0 {
		in = &Reservation{Type: r.typ, Holder: r.holder}
		for _, x := range r.list {
			in.Registrants = append(in.Registrants, x.host)
		}
	}
	n.EditGate(func(g *Gate) { g.Reserved = in })
}

// notify tells the controllers of hosts.
func (s *Subsystem) notify(n *Namespace, ns []notice) {
	if len(ns) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range ns {
		for id, c := range s.controllers {
			if c.member != nil && n.attached[id] && c.Host() == x.host {
				c.member.Notice(n.NSID, x.kind)
			}
		}
	}
}

// Report is what Reservation Report says.
func (n *Namespace) Report() *nvme.ReservationStatus {
	s, r := n.sub, &n.reservations
	s.mu.Lock()
	defer s.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	st := &nvme.ReservationStatus{Generation: r.generation, Type: r.typ, Persist: r.persist}
	for _, x := range r.list {
		e := nvme.RegisteredController{CNTLID: 0xffff, Holds: r.holds(x.host), HostID: x.host.ID, Key: x.key}
		var ids []uint16
		for id, c := range s.controllers {
			if n.attached[id] && c.Host() == x.host {
				ids = append(ids, id)
			}
		}
		slices.Sort(ids)
		for _, id := range ids {
			e.CNTLID = id
			st.Controllers = append(st.Controllers, e)
		}
		if len(ids) == 0 {
			st.Controllers = append(st.Controllers, e)
		}
	}
	return st
}

// Persist returns PTPL.
func (n *Namespace) Persist() bool {
	n.reservations.mu.Lock()
	defer n.reservations.mu.Unlock()
	return n.reservations.persist
}

// SetPersist sets PTPL, and returns when that is kept. It waits.
func (n *Namespace) SetPersist(on bool) error {
	n.reservations.mu.Lock()
	n.reservations.persist = on
	n.reservations.mu.Unlock()
	return n.saveReservations()
}

// forgetHost unregisters a host that will not come again.
func (s *Subsystem) forgetHost(h Host) {
	for _, n := range s.Allocated() {
		r := &n.reservations
		r.mu.Lock()
		var ns []notice
		if r.find(h) != nil {
			ns = r.leave(h)
			r.generation++
			n.enforce()
		}
		r.mu.Unlock()
		s.notify(n, ns)
	}
}

// SetHost gives c's host an identifier of 8 or 16 bytes. It cannot change until the controller is reset.
func (c *Controller) SetHost(id []byte) nvme.Status {
	old := c.Host()
	now := Host{Extended: len(id) == 16}
	copy(now.ID[:], id)
	switch {
	case old.Anon == 0 && old == now:
		return nvme.StatusSuccess
	case old.Anon == 0:
		return nvme.StatusSequenceError
	case now.ID == [16]byte{}:
		return nvme.StatusSuccess // as it is
	}
	c.host.Store(&now)
	c.sub.forgetHost(old)
	return nvme.StatusSuccess
}

// ResetHost says that the controller was reset: who is behind it is not known any more. What a host with an identifier has
// registered stays.
func (c *Controller) ResetHost() {
	old := c.Host()
	c.host.Store(anonymous())
	if old.Anon != 0 {
		c.sub.forgetHost(old)
	}
}
