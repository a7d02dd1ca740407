package subsys

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Reservations that persist through power loss.

type savedRegistry struct {
	UUID        string               `json:"uuid"` // of the medium
	Persist     bool                 `json:"persist"`
	Generation  uint32               `json:"generation"`
	Type        nvme.ReservationType `json:"type"`
	Registrants []savedRegistrant    `json:"registrants"`
}

type savedRegistrant struct {
	Host  string `json:"host"` // 8 or 16 bytes in hexadecimal
	Key   uint64 `json:"key"`
	Holds bool   `json:"holds"`
}

func (n *Namespace) reservationsKey() string {
	sum := sha256.Sum256([]byte(n.sub.cfg.NQN))
	return fmt.Sprintf("reservations-%x-%d", sum[:8], n.NSID)
}

// saveReservations saves the registry as it is by then, if it persists, and otherwise that it does not.
func (n *Namespace) saveReservations() error {
	if !n.Persists() {
		return nil
	}
	n.sub.saving.Lock()
	defer n.sub.saving.Unlock()
	r := &n.reservations
	r.mu.Lock()
	v := savedRegistry{UUID: nvme.FormatUUID(n.Medium().Info.UUID), Persist: r.persist}
	if r.persist {
		v.Generation, v.Type = r.generation, r.typ
		for _, x := range r.list {
			if x.host.Anon != 0 {
				continue // power loss ends it
			}
			id := x.host.ID[:8]
			if x.host.Extended {
				id = x.host.ID[:]
			}
			v.Registrants = append(v.Registrants, savedRegistrant{Host: hex.EncodeToString(id), Key: x.key, Holds: r.holds(x.host)})
		}
	}
	r.saved = true
	r.mu.Unlock()
	return n.sub.cfg.Store.Save(n.reservationsKey(), &v)
}

// restoreReservations reads what was saved of n, which is not in use yet.
func (n *Namespace) restoreReservations() {
	if !n.Persists() || !n.Shared {
		return
	}
	var v savedRegistry
	found, err := n.sub.cfg.Store.Load(n.reservationsKey(), &v)
	if err != nil {
		n.sub.cfg.Logger.Error("a namespace begins without reservations: what was saved cannot be read", "nqn", n.sub.cfg.NQN, "nsid", n.NSID, "error", err)
		return
	}
	if !found || v.UUID != nvme.FormatUUID(n.Medium().Info.UUID) || !v.Persist {
		return
	}
	r := &n.reservations
	r.mu.Lock()
	defer r.mu.Unlock()
	r.saved, r.persist, r.generation = true, true, v.Generation
	for _, x := range v.Registrants {
		id, err := hex.DecodeString(x.Host)
		if err != nil || len(id) != 8 && len(id) != 16 || len(r.list) == maxRegistrants {
			continue
		}
		h := Host{Extended: len(id) == 16}
		copy(h.ID[:], id)
		r.list = append(r.list, registrant{h, x.Key})
		if x.Holds && v.Type.Valid() {
			r.typ, r.holder = v.Type, h
		}
	}
	n.enforce()
}

// powerLoss ends reservations that do not persist. It is called with Subsystem.mu held, when the first client comes after there was none.
func (n *Namespace) powerLoss() {
	r := &n.reservations
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.persist {
		r.list, r.typ, r.holder, r.generation = nil, 0, Host{}, 0
		n.enforce()
	}
}
