package subsys

import (
	"crypto/sha256"
	"fmt"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// formats is what is saved of namespaces that the operator has made and a guest has formatted: by key, which block size the operator
// said, and which it is. When the operator says another, that one holds.
type formats map[string]format

type format struct{ From, To uint32 }

func (s *Subsystem) formatsKey() string {
	sum := sha256.Sum256([]byte(s.cfg.NQN))
	return fmt.Sprintf("formats-%x", sum[:8])
}

func formatKey(nsid uint32, spec backend.Spec) string { return fmt.Sprintf("%d/%s", nsid, spec.Path) }

func (s *Subsystem) loadFormats() {
	s.formats = formats{}
	if s.cfg.Store == nil {
		return
	}
	if _, err := s.cfg.Store.Load(s.formatsKey(), &s.formats); err != nil {
		s.cfg.Logger.Error("namespaces have the block size of their specs: what guests have formatted cannot be read", "error", err)
		s.formats = formats{}
	}
}

// Formatted is spec with the block size that a guest has formatted the namespace with, if it has.
func (s *Subsystem) Formatted(nsid uint32, spec backend.Spec) backend.Spec {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f, ok := s.formats[formatKey(nsid, spec)]; ok && f.From == spec.LBA && spec.Kind.Keeps() {
		spec.LBA = f.To
	}
	return spec
}

// keepFormat saves that n has blocks of lba bytes now.
func (n *Namespace) keepFormat(lba uint32) error {
	s := n.sub
	if n.pool != nil {
		return n.pool.edit(n.NSID, func(m *made) { m.LBA = lba })
	}
	if !n.spec.Kind.Keeps() {
		return nil // what it holds ends with hostmed
	}
	if s.cfg.Forgets && lba != n.spec.LBA {
		s.cfg.Logger.Warn("a guest has formatted a namespace with another block size, which the next start does not know: put lba= in its spec, or use a state directory",
			"nqn", s.cfg.NQN, "nsid", n.NSID, "lba", lba)
	}
	if s.cfg.Store == nil {
		return nil
	}
	s.saving.Lock()
	defer s.saving.Unlock()
	s.mu.Lock()
	next := formats{}
	for k, v := range s.formats {
		next[k] = v
	}
	next[formatKey(n.NSID, n.spec)] = format{From: n.spec.LBA, To: lba}
	if lba == n.spec.LBA {
		delete(next, formatKey(n.NSID, n.spec))
	}
	s.formats = next
	s.mu.Unlock()
	return s.cfg.Store.Save(s.formatsKey(), next)
}

// Formatting reports whether a format of n is going on.
func (n *Namespace) Formatting() bool { return n.formatting.Load() }

// CanFormat says why n cannot be formatted with blocks of lba bytes by a command from h, or success.
func (n *Namespace) CanFormat(lba uint32, h Host) nvme.Status {
	info := n.Medium().Info
	if n.Formatting() {
		return nvme.StatusFormatInProgress
	}
	if g := n.Gate(); g != nil {
		if v, st := g.Check(Writes, h); v == Refuse {
			return st
		}
	}
	switch _, ok := n.Medium().Backend.(backend.Alterable); {
	case info.ReadOnly:
		return nvme.StatusNamespaceWriteProtected
	case !ok || info.Size()%uint64(lba) != 0:
		return nvme.StatusInvalidFormat
	}
	return nvme.StatusSuccess
}

// Format erases n and gives it blocks of lba bytes. Commands that are under way complete first, those that come meanwhile fail with
// Format In Progress. It returns when every controller that has n shows it.
func (s *Subsystem) Format(n *Namespace, lba uint32) nvme.Status {
	if !n.formatting.CompareAndSwap(false, true) {
		return nvme.StatusFormatInProgress
	}
	n.alone.Lock()
	defer n.alone.Unlock()
	if s.Namespace(n.NSID) != n {
		n.formatting.Store(false)
		return nvme.StatusInvalidNamespace // it was deleted meanwhile
	}
	n.EditGate(func(g *Gate) { g.Fail = nvme.StatusFormatInProgress })
	n.drain()
	err := s.change(n, func(b backend.Backend) error { return b.(backend.Alterable).Format(lba) })
	if err == nil {
		n.formats.Add(1)
		err = n.keepFormat(lba)
	}
	// From here on commands wait: they must not meet the old table of a controller.
	n.hold(1)
	n.EditGate(func(g *Gate) { g.Fail, g.Bad = nvme.StatusSuccess, nil })
	n.saveBad()
	n.formatting.Store(false)
	s.Announce(n)
	n.release()
	if err != nil {
		s.cfg.Logger.Error("format", "nqn", s.cfg.NQN, "nsid", n.NSID, "error", err)
		return nvme.StatusInternalError
	}
	s.cfg.Logger.Info("namespace formatted", "nqn", s.cfg.NQN, "nsid", n.NSID, "lba", lba)
	return nvme.StatusSuccess
}
