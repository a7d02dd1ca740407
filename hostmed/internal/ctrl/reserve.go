package ctrl

import (
	"slices"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// What of reservations is the controller's: the Host Identifier, the features and the log of notifications. The commands are I/O commands,
// which package ioq runs. NVMe Base 2.0c 5.27.1.25 to 5.27.1.27 and 5.16.1.23.

// maxNotices is how many log pages wait to be read; with more of them the oldest go.
const maxNotices = 255

// notices are the log pages of log 80h.
type notices struct {
	list  []nvme.ReservationNotice // oldest first
	count uint64                   // of all since the reset
}

// reserves says that there are reservations: a namespace may be attached to another controller too.
func (c *Controller) reserves() bool {
	return slices.ContainsFunc(c.cfg.Namespaces, func(n Namespace) bool { return n.reservable() })
}

func (n *Namespace) reservable() bool { return n.Of != nil && n.Of.Reservable() }

// reservations is RESCAP.
func (n *Namespace) reservations() uint8 {
	if !n.reservable() {
		return 0
	}
	caps := uint8(nvme.RESCAPTypes | nvme.RESCAPIEKEY)
	if n.Of.Persists() {
		caps |= nvme.RESCAPPersist
	}
	return caps
}

// conflicts says that a reservation keeps this controller's host from commands that write n, or manage it.
func (c *Controller) conflicts(nsid uint32) bool {
	n := c.cfg.Self.Subsystem().Namespace(nsid)
	return n != nil && n.Conflicts(c.cfg.Self.Host())
}

// ReservationNotice puts a notification in the log, and raises an event, unless the host has masked it.
func (c *Controller) ReservationNotice(nsid uint32, kind uint8) {
	if c.featureOf(featureKey{nvme.FeatureReservationNotice, nsid})>>kind&1 != 0 || !c.ready {
		return
	}
	l := &c.notices
	l.count++
	if len(l.list) == maxNotices {
		l.list = slices.Delete(l.list, 0, 1)
	}
	l.list = append(l.list, nvme.ReservationNotice{Count: l.count, Type: kind, NSID: nsid})
	c.guarded(func() bool {
		c.raiseReservation()
		c.interrupt()
		return false
	})
}

func (c *Controller) raiseReservation() {
	c.raise(nvme.MakeAsyncEvent(nvme.EventIO, nvme.EventReservation, nvme.LogReservation))
}

// reservationPage is the oldest log page, or an empty one.
func (c *Controller) reservationPage() []byte {
	var p nvme.ReservationNotice
	if l := c.notices.list; len(l) > 0 {
		p = l[0]
		p.Available = uint8(len(l) - 1)
	}
	return p.Bytes()[:]
}

// reservationRead is called when the oldest page was read: it makes room for the next, which is another event.
func (c *Controller) reservationRead() {
	if l := &c.notices; len(l.list) > 0 {
		l.list = slices.Delete(l.list, 0, 1)
	}
}

func (c *Controller) getHostID(cmd *nvme.Command) result {
	extended := cmd.CDW11&nvme.HostIDExtended != 0
	id := make([]byte, 8)
	if extended {
		id = make([]byte, 16)
	}
	if cmd.FeatureSelect() == nvme.FeatureCurrent {
		h := c.cfg.Self.Host()
		if h.Anon == 0 && h.Extended != extended {
			return fail(nvme.StatusHostIDInconsistent, dword(11, 0), "the identifier has the other length")
		}
		copy(id, h.ID[:])
	}
	return c.toHost(cmd, id)
}

func (c *Controller) setHostID(cmd *nvme.Command) result {
	id := make([]byte, 8)
	if cmd.CDW11&nvme.HostIDExtended != 0 {
		id = make([]byte, 16)
	}
	if r := c.fromHost(cmd, id); !r.status.OK() {
		return r
	}
	if st := c.cfg.Self.SetHost(id); !st.OK() {
		return fail(st, inPRP1, "the controller has another Host Identifier")
	}
	return result{}
}

func (c *Controller) getPersist(cmd *nvme.Command) result {
	if cmd.FeatureSelect() == nvme.FeatureCurrent && c.namespace(cmd.NSID).Of.Persist() {
		return result{dw0: 1}
	}
	return result{}
}

func (c *Controller) setPersist(cmd *nvme.Command) result {
	on := cmd.CDW11&1 != 0
	var list []func(bool) error
	for i := range c.cfg.Namespaces {
		n := &c.cfg.Namespaces[i]
		if cmd.NSID != n.NSID && cmd.NSID != nvme.NSIDAll || !n.reservable() {
			continue
		}
		if on && !n.Of.Persists() {
			return fail(nvme.StatusInvalidField, dword(11, 0), "nothing outlives hostmed: RESCAP says so")
		}
		list = append(list, n.Of.SetPersist)
	}
	if len(list) == 0 {
		return fail(nvme.StatusInvalidField, inNSID, "the namespace takes no reservations")
	}
	return c.background(cmd, func() error {
		for _, set := range list {
			if err := set(on); err != nil {
				return err
			}
		}
		return nil
	}, func(err error) result {
		if err != nil {
			return failErr(nvme.StatusInternalError, nowhere, "saving the reservation", err)
		}
		return result{}
	})
}
