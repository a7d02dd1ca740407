package subsys

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/state"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Pool is where namespaces are made that guests ask for: a directory with a sparse file for each, and, in a store in that directory, what
// they are. So all that a guest has made is in one place, and outlives hostmed.
type Pool struct {
	dir      string
	capacity uint64
	store    state.Store

	mu   sync.Mutex // guards the rest; nothing is locked under it
	made []made
}

// made is a namespace that a guest has created.
type made struct {
	NSID     uint32   `json:"nsid"`
	UUID     string   `json:"uuid"`
	Bytes    uint64   `json:"bytes"`
	LBA      uint32   `json:"lba"`
	Shared   bool     `json:"shared"`
	Attached []uint16 `json:"attached"` // ids of controllers, rising
}

const poolKey = "namespaces"

// OpenPool opens the pool in dir, which it makes if only that is missing. All namespaces of it have at most capacity bytes.
func OpenPool(dir string, capacity uint64) (*Pool, error) {
	store, err := state.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("pool %s: %w", dir, err)
	}
	return &Pool{dir: dir, capacity: capacity, store: store}, nil
}

// Close gives the directory back. The namespaces are closed already.
func (p *Pool) Close() error { return p.store.Close() }

func (p *Pool) path(m *made) string { return filepath.Join(p.dir, "ns-"+m.UUID+".img") }

func (p *Pool) unallocated() uint64 {
	left := p.capacity
	for _, m := range p.list() {
		left -= min(left, m.Bytes)
	}
	return left
}

func (p *Pool) list() []made {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.made)
}

// find returns what nsid is; p may be nil.
func (p *Pool) find(nsid uint32) (m made, ok bool) {
	if p == nil {
		return m, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	i := p.index(nsid)
	if i < 0 {
		return m, false
	}
	return p.made[i], true
}

func (p *Pool) index(nsid uint32) int {
	return slices.IndexFunc(p.made, func(m made) bool { return m.NSID == nsid })
}

// add, edit and drop change what there is, and save it. After an error of add nothing has changed.
func (p *Pool) add(m made) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.made = append(p.made, m)
	err := p.store.Save(poolKey, p.made)
	if err != nil {
	}
	return err
}

func (p *Pool) edit(nsid uint32, f func(*made)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := p.index(nsid)
	if i < 0 {
		return nil
	}
	f(&p.made[i])
	return p.store.Save(poolKey, p.made)
}

func (p *Pool) drop(nsid uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.made = slices.DeleteFunc(p.made, func(m made) bool { return m.NSID == nsid })
	return p.store.Save(poolKey, p.made)
}

// open opens the medium of m, size 0: as it is.
func (p *Pool) open(m *made, size uint64) (backend.Backend, error) {
	return backend.OpenSpec(backend.Spec{Kind: backend.KindFile, Path: p.path(m), Size: size, LBA: m.LBA}, nil)
}

// UsePool makes the namespaces that guests have created in p, and takes commands that create more. A namespace whose file
// cannot be opened is logged and left alone: its id stays taken. The ids of the others must be free.
func (s *Subsystem) UsePool(p *Pool) error {
	s.manage.Lock()
	defer s.manage.Unlock()
	_, err := p.store.Load(poolKey, &p.made)
	if c := (*state.CorruptError)(nil); errors.As(err, &c) {
		s.cfg.Logger.Error("the pool begins empty, its files are left alone", "error", err)
		p.made = nil
	} else if err != nil {
		return fmt.Errorf("pool %s: %w", p.dir, err)
	}
	s.pool = p
	s.count()
	for _, m := range p.list() {
		if s.Namespace(m.NSID) != nil {
			return fmt.Errorf("pool %s: namespace %d was created by a guest, and the configuration has another one of that id: choose another nsid there", p.dir, m.NSID)
		}
		uuid, ok := nvme.ParseUUID(m.UUID)
		if !ok || m.NSID == 0 || m.NSID > MaxNSID {
			return fmt.Errorf("pool %s: %s.json names no namespace (nsid %d, uuid %q): correct it, or move it away", p.dir, poolKey, m.NSID, m.UUID)
		}
		b, err := p.open(&m, 0)
		if err != nil {
			s.cfg.Logger.Error("a namespace that a guest has created cannot be opened", "nsid", m.NSID, "error", err)
			continue
		}
		s.AddNamespace(NamespaceConfig{NSID: m.NSID, Backend: b, Shared: m.Shared, Controllers: s.existing(m.Attached), UUID: uuid, pool: p})
	}
	return nil
}

// existing leaves ids of controllers out that are not there any more.
func (s *Subsystem) existing(ids []uint16) []uint16 {
	all := s.Controllers()
	return slices.DeleteFunc(slices.Clone(ids), func(id uint16) bool { return !slices.Contains(all, id) })
}

// Capacity is TNVMCAP and UNVMCAP in bytes; zeroes without a pool. It does not wait.
func (s *Subsystem) Capacity() (total, unallocated uint64) {
	return s.total.Load(), s.unallocated.Load()
}

func (s *Subsystem) count() {
	s.total.Store(s.pool.capacity)
	s.unallocated.Store(s.pool.unallocated())
}

// Create makes a namespace of so many blocks that is attached to nobody. A status other than success says why there is none.
func (s *Subsystem) Create(blocks uint64, lba uint32, shared bool) (nsid uint32, st nvme.Status) {
	s.manage.Lock()
	defer s.manage.Unlock()
	p := s.pool
	if p == nil || blocks > p.unallocated()/uint64(lba) {
		return 0, nvme.StatusNamespaceInsufficientCapacity
	}
	taken := func(nsid uint32) bool {
		_, made := p.find(nsid)
		return made || s.Namespace(nsid) != nil
	}
	for nsid = 1; taken(nsid); nsid++ {
		if nsid == MaxCreated {
			return 0, nvme.StatusNamespaceIDUnavailable
		}
	}
	uuid := randomUUID()
	m := made{NSID: nsid, UUID: nvme.FormatUUID(uuid), Bytes: blocks * uint64(lba), LBA: lba, Shared: shared}
	b, err := p.open(&m, m.Bytes)
	if err == nil {
		if err = p.add(m); err == nil {
			s.count()
			s.AddNamespace(NamespaceConfig{NSID: nsid, Backend: b, Shared: shared, UUID: uuid, pool: p})
			s.cfg.Logger.Info("namespace created", "nqn", s.cfg.NQN, "nsid", nsid, "size", backend.FormatSize(m.Bytes), "file", p.path(&m))
			return nsid, nvme.StatusSuccess
		}
		err = errors.Join(err, b.Close(), os.Remove(p.path(&m)))
	}
	s.cfg.Logger.Error("a namespace cannot be created", "nqn", s.cfg.NQN, "error", err)
	return 0, nvme.StatusInternalError
}

func randomUUID() (u [16]byte) {
	_, _ = rand.Read(u[:]) // never fails
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// Delete takes a namespace that was created away from everybody, with its data. NSIDAll deletes all of them.
func (s *Subsystem) Delete(nsid uint32) nvme.Status {
	s.manage.Lock()
	defer s.manage.Unlock()
	if nsid == nvme.NSIDAll {
		if s.pool == nil {
			return nvme.StatusSuccess
		}
		for _, m := range s.pool.list() {
			if st := s.delete(m.NSID); st != nvme.StatusSuccess {
				return st
			}
		}
		return nvme.StatusSuccess
	}
	if _, made := s.pool.find(nsid); !made {
		if s.Namespace(nsid) != nil {
			return nvme.StatusOperationDenied // the operator's
		}
		return nvme.StatusInvalidNamespace
	}
	return s.delete(nsid)
}

func (s *Subsystem) delete(nsid uint32) nvme.Status {
	p := s.pool
	m, _ := p.find(nsid)
	if n := s.Namespace(nsid); n != nil {
		s.RemoveNamespace(n)
		if err := n.Medium().Backend.Close(); err != nil {
			s.cfg.Logger.Error("closing a namespace that is deleted", "nsid", nsid, "error", err)
		}
	}
	dropped := p.drop(nsid)
	s.count()
	err := os.Remove(p.path(&m))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err = errors.Join(err, dropped); err != nil {
		s.cfg.Logger.Error("deleting a namespace", "nqn", s.cfg.NQN, "nsid", nsid, "error", err)
		return nvme.StatusInternalError
	}
	s.cfg.Logger.Info("namespace deleted", "nqn", s.cfg.NQN, "nsid", nsid, "file", p.path(&m))
	return nvme.StatusSuccess
}

// Attach attaches a namespace to controllers, or detaches it from them: to all of ids, or, if the status is not success, to none.
// ids are those of controllers that exist. NVMe Base 2.0c 5.22.
func (s *Subsystem) Attach(nsid uint32, ids []uint16, attach bool) nvme.Status {
	s.manage.Lock()
	defer s.manage.Unlock()
	n := s.Namespace(nsid)
	if n == nil {
		return nvme.StatusInvalidNamespace
	}
	now := s.AttachedTo(n)
	for _, id := range ids {
		switch is := slices.Contains(now, id); {
		case attach && is:
			return nvme.StatusNamespaceAlreadyAttached
		case !attach && !is:
			return nvme.StatusNamespaceNotAttached
		}
	}
	if attach && !n.Shared && len(now)+len(ids) > 1 {
		return nvme.StatusNamespacePrivate
	}
	if attach {
		now = slices.Sorted(slices.Values(append(now, ids...)))
	} else {
		now = slices.DeleteFunc(now, func(id uint16) bool { return slices.Contains(ids, id) })
	}
	s.SetAttached(n, now)
	if s.pool != nil {
		if err := s.pool.edit(nsid, func(m *made) { m.Attached = now }); err != nil {
			s.cfg.Logger.Error("an attachment is not kept over the next restart", "nqn", s.cfg.NQN, "nsid", nsid, "error", err)
		}
	}
	return nvme.StatusSuccess
}

// Managing calls f while no guest creates, deletes, attaches or detaches. f must not wait for the end of a session.
func (s *Subsystem) Managing(f func()) {
	s.manage.Lock()
	defer s.manage.Unlock()
	f()
}
