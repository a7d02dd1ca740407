package subsys

import (
	"crypto/sha256"
	"fmt"
	"maps"
)

// Protection is the state of a namespace's write protection. NVMe Base 2.0c 8.12.
type Protection uint8

// The states, as feature 84h has them.
const (
	Unprotected Protection = iota
	Protected
	ProtectedUntilPowerCycle // of the subsystem: until none of its controllers has a client
	ProtectedForEver
)

// protections is what is saved, by Namespace.protectionKey.
type protections map[string]Protection

func (s *Subsystem) protectionsKey() string {
	sum := sha256.Sum256([]byte(s.cfg.NQN))
	return fmt.Sprintf("protection-%x", sum[:8])
}

// protectionKey names the namespace and its medium: another medium under the same id is not protected by it.
func (n *Namespace) protectionKey() string {
	return fmt.Sprintf("%d/%x", n.NSID, n.Medium().Info.UUID)
}

// loadProtections reads what was saved.
func (s *Subsystem) loadProtections() {
	s.protected = protections{}
	if s.cfg.Store == nil {
		return
	}
	if _, err := s.cfg.Store.Load(s.protectionsKey(), &s.protected); err != nil {
		s.cfg.Logger.Error("no namespace is write protected: what was saved cannot be read", "error", err)
		s.protected = protections{}
	}
}

// restoreProtection puts n in the state that it was saved in.
func (n *Namespace) restoreProtection() {
	n.sub.mu.Lock()
	p := n.sub.protected[n.protectionKey()]
	n.sub.mu.Unlock()
	n.protect(p)
}

func (n *Namespace) protect(p Protection) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.protection = p
	n.parts.Protected = p != Unprotected
	n.publish()
}

// Protection returns the state of n.
func (n *Namespace) Protection() Protection {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.protection
}

// Changeable reports whether the state can be left.
func (p Protection) Changeable() bool { return p == Unprotected || p == Protected }

// SetProtection puts n in a state, which it must be possible to leave the present one for, and returns when no command that passed before
// is under way. Both states that outlast power are saved before it returns; an error is of that, and p holds all the same.
// It waits, as the methods of Subsystem do.
func (n *Namespace) SetProtection(p Protection) error {
	if !n.Protection().Changeable() {
		return fmt.Errorf("namespace %d is write protected for good, or until power is off", n.NSID)
	}
	n.protect(p)
	err := n.saveProtection(p)
	n.drain()
	return err
}

func (n *Namespace) saveProtection(p Protection) error {
	s := n.sub
	if s == nil || s.cfg.Store == nil {
		return nil
	}
	s.saving.Lock()
	defer s.saving.Unlock()
	s.mu.Lock()
	next := maps.Clone(s.protected)
	delete(next, n.protectionKey())
	if p == Protected || p == ProtectedForEver {
		next[n.protectionKey()] = p
	}
	same := maps.Equal(next, s.protected)
	s.protected = next
	s.mu.Unlock()
	if same {
		return nil
	}
	return s.cfg.Store.Save(s.protectionsKey(), next)
}

// powered says that a controller has a client. It is called with mu held.
func (s *Subsystem) powered() bool {
	for _, c := range s.controllers {
		if c.member != nil {
			return true
		}
	}
	return false
}

// powerOn ends what holds until a power cycle: protections, and reservations that do not persist. It is called with mu held, when the first client comes.
func (s *Subsystem) powerOn() {
	for _, n := range s.namespaces {
		n.powerLoss()
		if n.Protection() == ProtectedUntilPowerCycle {
			n.protect(Unprotected)
		}
	}
}
