package ctrl

import (
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// adminCounts is what the admin queue has done since it was enabled, for snapshots.
type adminCounts struct {
	fetched, posted, interrupts uint64
	fetchedAt, postedAt         int64 // CLOCK_MONOTONIC; 0: never
}

func (n *adminCounts) fetch() {
	n.fetched++
	n.fetchedAt = inspect.Now()
}

func (n *adminCounts) post(entries int) {
	n.posted += uint64(entries)
	n.postedAt = inspect.Now()
}

// history is what a snapshot says of the controller's life.
type history struct {
	enables      uint64 // CC.EN went from 0 to 1
	configs      uint64 // doorbell pages were configured
	configEnable uint64 // enables at the last of them
}

// Snapshot fills in what the controller knows of itself, and returns queue 0; false if there is none. What of it lies in memory has an IOVA only.
func (c *Controller) Snapshot(s *inspect.Controller) (q inspect.Queue, ok bool) {
	s.Mode, s.DSTRD = c.cfg.Mode.String(), c.cfg.DSTRD
	csts := c.regs.csts // as status has it
	if c.settling {
		csts = csts.WithRDY(!c.regs.cc.EN())
	}
	s.CC, s.CSTS = uint32(c.regs.cc), uint32(csts)
	if c.pages.shadow != nil {
		s.Shared, s.Shadow, s.EventIndex = true, c.pages.shadowIOVA, c.pages.eiIOVA
	}
	s.Enables, s.Configs, s.ConfigEnable = c.history.enables, c.history.configs, c.history.configEnable
	a := &c.admin
	if a.sq == nil {
		return q, false
	}
	q = inspect.Queue{
		Size: a.sq.Size(), CQSize: a.cq.Size(), Worker: -1, State: c.adminState(),
		SQ: inspect.Bell{Private: a.sq.Head()}, CQ: inspect.Bell{Private: a.cq.Head()}, CQTail: a.cq.Tail(),
		Inflight: uint32(len(c.events.requests) + c.async.running), Staged: uint32(len(a.waiting)), Room: a.cq.Free(),
		Commands: a.counts.fetched, Completions: a.counts.posted, LastFetch: a.counts.fetchedAt, LastPost: a.counts.postedAt, LastLook: inspect.Now(),
		Interrupts: a.counts.interrupts,
		SQMemory:   inspect.Memory{IOVA: c.regs.asq, Size: uint64(a.sq.Size()) * ring.SQESize},
		CQMemory:   inspect.Memory{IOVA: c.regs.acq, Size: uint64(a.cq.Size()) * ring.CQESize},
	}
	q.Blocked = !a.stopped && !a.room() && a.tail.value != a.sq.Head()
	c.guardedMail(func() {
		for _, x := range [...]struct {
			b *inspect.Bell
			d *adminDoorbell
		}{{&q.SQ, &a.tail}, {&q.CQ, &a.head}} {
			if x.d.slot != nil {
				x.b.Page, x.b.Event, x.b.Asked = x.d.slot.Load(), x.d.ei.Load(), x.d.asked
			}
		}
	})
	return q, true
}

// Probe looks at queue 0 as its doorbell would (R27). It reports how many commands it found, and whether there is more to do, as AdminKick does.
func (c *Controller) Probe() (k inspect.Kick, more bool) {
	k.State = "absent"
	if !c.ready {
		return k, false
	}
	k.State, k.Woken = c.adminState(), true
	before := c.admin.counts.fetched
	more = c.AdminKick()
	k.Found = uint32(c.admin.counts.fetched - before)
	return k, more
}

// adminState says of queue 0 what ioq's states say of others. Between commands it waits for its doorbell.
func (c *Controller) adminState() string {
	switch a := &c.admin; {
	case a.stopped:
		return "failed"
	case a.parked:
		return "parked"
	case c.held:
		return "draining"
	}
	return "armed"
}
