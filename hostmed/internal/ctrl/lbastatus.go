package ctrl

import (
	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Get LBA Status, NVM Command Set 1.0c 4.2.1. The blocks that may be unreadable are those that Write Uncorrectable has marked; a scan would find
// no others. Which blocks are allocated is asked of the medium, in the background.

func (c *Controller) getLBAStatus(cmd *nvme.Command) result {
	n := c.namespace(cmd.NSID)
	if n == nil {
		return c.notAttached(cmd.NSID)
	}
	first, blocks, size := cmd.SLBA(), uint64(cmd.LBAStatusRange()), cmd.LBAStatusBytes()
	switch {
	case size > uint64(c.cfg.MDTSBytes):
		return fail(nvme.StatusInvalidField, dword(12, 0), "MNDW is more than MDTS")
	case first >= n.Info.Blocks || blocks > n.Info.Blocks-first:
		return fail(nvme.StatusLBAOutOfRange, dword(10, 0), "the namespace has no such blocks")
	}
	if blocks == 0 {
		blocks = n.Info.Blocks - first
	}
	list := &lbaList{most: int(size-min(size, nvme.LBAStatusHeaderSize)) / nvme.LBAStatusSize}
	r := subsys.Range{First: first, Last: first + blocks - 1}
	switch cmd.LBAStatusAction() {
	case nvme.LBAStatusScan, nvme.LBAStatusTracked:
		if n.Of != nil {
			if gate := n.Of.Gate(); gate != nil {
				list.marked(gate.Bad, r)
			}
		}
		return c.toHost(cmd, list.bytes(size))
	case nvme.LBAStatusAllocated:
		if !n.Info.Maps {
			return fail(nvme.StatusInvalidField, dword(13, 24), "the medium cannot tell what is allocated")
		}
		saved, of, b, info := *cmd, n.Of, n.Backend, n.Info
		return c.background(cmd, func() error {
			if of == nil {
				return list.allocated(b, info, r)
			}
			return of.Use(func(m *subsys.Medium) error { return list.allocated(m.Backend, m.Info, r) })
		}, func(err error) result {
			if err != nil {
				return failErr(nvme.StatusInternalError, nowhere, "asking what is allocated", err)
			}
			return c.toHost(&saved, list.bytes(size))
		})
	}
	return fail(nvme.StatusInvalidField, dword(13, 24), "no such action type")
}

// lbaList is the list that the host reads: as many descriptors as it has room for.
type lbaList struct {
	most int
	more bool // there are others
	list []nvme.LBAStatus
}

// add adds blocks and returns whether there is room for more.
func (l *lbaList) add(r subsys.Range) bool {
	for {
		if len(l.list) == l.most {
			l.more = true
			return false
		}
		n := min(r.Last-r.First, 1<<32-2) + 1
		l.list = append(l.list, nvme.LBAStatus{SLBA: r.First, NLB: uint32(n)})
		if r.Last-r.First < n {
			return true
		}
		r.First += n
	}
}

// marked adds what of bad is in r.
func (l *lbaList) marked(bad []subsys.Range, r subsys.Range) {
	for _, x := range bad {
		if x.First > r.Last || x.Last < r.First {
			continue
		}
		if !l.add(subsys.Range{First: max(x.First, r.First), Last: min(x.Last, r.Last)}) {
			return
		}
	}
}

// allocated adds what of r is allocated in b. A medium that has changed its shape since is shown as far as it goes.
func (l *lbaList) allocated(b backend.Backend, info backend.Info, r subsys.Range) error {
	m, ok := b.(backend.Mapper)
	if !ok || !info.Maps || r.First >= info.Blocks {
		return nil
	}
	for at, left := r.First, min(r.Last, info.Blocks-1)-r.First+1; left > 0; {
		yes, run, err := backend.AllocatedBlocks(m, &info, at, left)
		if err != nil {
			return err
		}
		if yes && !l.add(subsys.Range{First: at, Last: at + run - 1}) {
			return nil
		}
		at += run
		left -= run
	}
	return nil
}

// bytes is the list in size bytes.
func (l *lbaList) bytes(size uint64) []byte {
	h := nvme.LBAStatusHeader{NLSD: uint32(len(l.list)), CMPC: nvme.LBAStatusComplete}
	if l.more {
		h.CMPC = nvme.LBAStatusIncomplete
	}
	data := make([]byte, size)
	rest := data[copy(data, h.Bytes()[:]):]
	for i := range l.list {
		rest = rest[copy(rest, l.list[i].Bytes()[:]):]
	}
	return data
}
