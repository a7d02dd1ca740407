package subsys

import (
	"crypto/sha256"
	"fmt"
)

// Which blocks Write Uncorrectable has marked is part of what a medium holds, so it is kept with what a file holds. It is saved on another goroutine, soon:
// a worker that marks blocks waits for no disk, and after a crash the last marks may be missing.

// savedBad is what is saved for a namespace.
type savedBad struct {
	LBAShift uint8   `json:"lbaShift"`
	Ranges   []Range `json:"ranges"`
}

func (n *Namespace) badKey() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%d\n%s\n%x", n.sub.cfg.NQN, n.NSID, n.spec.Path, n.uuid))
	return fmt.Sprintf("unreadable-%x", sum[:8])
}

// keepsBad reports whether n's content outlives hostmed, and there is a store for what belongs to it.
func (n *Namespace) keepsBad() bool {
	return n.sub != nil && n.sub.cfg.Store != nil && (n.spec.Kind.Keeps() || n.pool != nil)
}

// restoreBad marks what was saved. What does not fit the medium as it is now is no longer about it.
func (n *Namespace) restoreBad() {
	if !n.keepsBad() {
		return
	}
	var s savedBad
	if _, err := n.sub.cfg.Store.Load(n.badKey(), &s); err != nil {
		n.sub.cfg.Logger.Error("blocks that a guest has marked unreadable can be read again: which they are cannot be read",
			"nqn", n.sub.cfg.NQN, "nsid", n.NSID, "error", err)
		return
	}
	info := n.Medium().Info
	if len(s.Ranges) == 0 || len(s.Ranges) > MaxBad+1 || s.LBAShift != info.LBAShift {
		return
	}
	for i, r := range s.Ranges {
		if r.First > r.Last || r.Last >= info.Blocks || i > 0 && r.First <= s.Ranges[i-1].Last {
			return
		}
	}
	n.EditGate(func(g *Gate) { g.Bad = s.Ranges })
}

// saveBad saves the marks as they are, soon.
func (n *Namespace) saveBad() {
	if !n.keepsBad() || n.badChanges.Add(1) > 1 {
		return // whoever saves looks again
	}
	n.sub.Go(func() {
		for {
			seen := n.badChanges.Load()
			s := savedBad{LBAShift: n.Medium().Info.LBAShift}
			if g := n.Gate(); g != nil {
				s.Ranges = g.Bad
			}
			if err := n.sub.cfg.Store.Save(n.badKey(), s); err != nil {
				n.sub.cfg.Logger.Error("which blocks a guest has marked unreadable is not saved", "nqn", n.sub.cfg.NQN, "nsid", n.NSID, "error", err)
			}
			if n.badChanges.Add(-seen) == 0 {
				return
			}
		}
	})
}
