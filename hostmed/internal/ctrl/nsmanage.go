package ctrl

import (
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Namespace Management and Namespace Attachment, and what Identify says of namespaces and controllers beyond this one's.
// NVMe Base 2.0c 5.22, 5.23 and 8.11. Package subsys does the work, on a goroutine of its own: it has to wait
// for other controllers' sessions.

// manages says that the host may create, delete, attach and detach namespaces.
func (c *Controller) manages() bool { return c.cfg.Self != nil && c.cfg.Self.Manages }

// inBackground runs work for cmd and completes it with its result.
func (c *Controller) inBackground(cmd *nvme.Command, work func() result) result {
	var r result
	return c.background(cmd, func() error { r = work(); return nil }, func(error) result { return r })
}

func (c *Controller) namespaceManagement(cmd *nvme.Command) result {
	s := c.cfg.Self.Subsystem()
	switch cmd.NamespaceSelect() {
	case nvme.NamespaceCreate:
		return c.createNamespace(cmd)
	case nvme.NamespaceDelete:
		nsid := cmd.NSID
		if c.conflicts(nsid) {
			return fail(nvme.StatusReservationConflict, inNSID, "another host has a reservation")
		}
		return c.inBackground(cmd, func() result {
			if st := s.Delete(nsid); !st.OK() {
				return fail(st, inNSID, "delete")
			}
			return result{}
		})
	}
	return fail(nvme.StatusInvalidField, dword(10, 0), "reserved value of SEL")
}

// createNamespace checks what the host asks for and has it made.
func (c *Controller) createNamespace(cmd *nvme.Command) result {
	if nvme.CSI(cmd.CDW11>>24) != nvme.CSINVM {
		return fail(nvme.StatusCommandSetNotSupported, dword(11, 24), "only the NVM command set is there")
	}
	var ask nvme.IdentifyNamespace
	if r := c.fromHost(cmd, ask.Bytes()[:]); !r.status.OK() {
		return r
	}
	format := int(ask.FLBAS & 0xf)
	switch {
	case ask.NSZE == 0 || ask.NCAP > ask.NSZE:
		return fail(nvme.StatusInvalidField, inPRP1, "NSZE is 0, or less than NCAP")
	case ask.NCAP < ask.NSZE:
		return fail(nvme.StatusThinProvisioningNotSupported, inPRP1, "NCAP is less than NSZE")
	case format >= len(blockSizes):
		return fail(nvme.StatusInvalidFormat, inPRP1, "FLBAS names no format")
	case ask.DPS != 0 || ask.NMIC&^nvme.NMICShared != 0 || ask.NVMSETID != 0 || ask.ENDGID != 0:
		return fail(nvme.StatusInvalidField, inPRP1, "protection information, NVM sets and endurance groups are not there")
	}
	s, blocks, lba, shared := c.cfg.Self.Subsystem(), ask.NSZE, uint32(1)<<blockSizes[format], ask.NMIC&nvme.NMICShared != 0
	return c.inBackground(cmd, func() result {
		nsid, st := s.Create(blocks, lba, shared)
		if !st.OK() {
			return fail(st, nowhere, "create")
		}
		return result{dw0: nsid}
	})
}

func (c *Controller) namespaceAttachment(cmd *nvme.Command) result {
	sel := cmd.NamespaceSelect()
	if sel != nvme.NamespaceAttach && sel != nvme.NamespaceDetach {
		return fail(nvme.StatusInvalidField, dword(10, 0), "reserved value of SEL")
	}
	s := c.cfg.Self.Subsystem()
	if s.Namespace(cmd.NSID) == nil {
		return fail(nvme.StatusInvalidNamespace, inNSID, "no such namespace is allocated")
	}
	if c.conflicts(cmd.NSID) {
		return fail(nvme.StatusReservationConflict, inNSID, "another host has a reservation")
	}
	var list nvme.ControllerList
	if r := c.fromHost(cmd, list.Bytes()[:]); !r.status.OK() {
		return r
	}
	if list.Count == 0 || int(list.Count) > len(list.ID) {
		return fail(nvme.StatusControllerListInvalid, inPRP1, "the list has no ids, or more than there is room for")
	}
	ids := list.ID[:list.Count]
	for i, id := range ids {
		if !s.HasController(id) || i > 0 && ids[i-1] >= id {
			return fail(nvme.StatusControllerListInvalid, inPRP1, "an id in the list is out of order, or no controller's")
		}
	}
	nsid := cmd.NSID
	return c.inBackground(cmd, func() result {
		if st := s.Attach(nsid, ids, sel == nvme.NamespaceAttach); !st.OK() {
			return fail(st, inNSID, "attach or detach")
		}
		return result{}
	})
}

// identifyAllocated answers CNS 11h and 1Bh: a namespace that need not be attached to this controller.
func (c *Controller) identifyAllocated(cmd *nvme.Command, data func(*Namespace) *[nvme.IdentifySize]byte) result {
	if cmd.NSID == 0 || cmd.NSID > c.highestNSID() {
		return fail(nvme.StatusInvalidNamespace, inNSID, "no such namespace")
	}
	n := c.cfg.Self.Subsystem().Namespace(cmd.NSID)
	if n == nil {
		return c.toHost(cmd, make([]byte, nvme.IdentifySize))
	}
	return c.toHost(cmd, data(View(n))[:])
}

// identifyAllocatedList answers CNS 10h and 1Ah.
func (c *Controller) identifyAllocatedList(cmd *nvme.Command) result {
	if cmd.NSID >= nvme.NSIDAll-1 {
		return fail(nvme.StatusInvalidNamespace, inNSID, "no namespace id is larger")
	}
	var list nvme.NamespaceList
	n := 0
	for _, x := range c.cfg.Self.Subsystem().Allocated() {
		if x.NSID > cmd.NSID && n < len(list.ID) {
			list.ID[n] = x.NSID
			n++
		}
	}
	return c.toHost(cmd, list.Bytes()[:])
}

// identifyControllers answers CNS 12h, the controllers that have a namespace, and 13h, all.
func (c *Controller) identifyControllers(cmd *nvme.Command) result {
	s := c.cfg.Self.Subsystem()
	ids := s.Controllers()
	if cmd.CNS() == nvme.CNSNamespaceControllers {
		n := s.Namespace(cmd.NSID)
		if n == nil {
			return fail(nvme.StatusInvalidNamespace, inNSID, "no such namespace is allocated")
		}
		ids = s.AttachedTo(n)
	}
	var list nvme.ControllerList
	for _, id := range ids {
		if id >= cmd.IdentifyCNTID() && int(list.Count) < len(list.ID) {
			list.ID[list.Count] = id
			list.Count++
		}
	}
	return c.toHost(cmd, list.Bytes()[:])
}

// identifyGranularity answers CNS 16h: whole pages waste nothing.
func (c *Controller) identifyGranularity(cmd *nvme.Command) result {
	g := &nvme.NamespaceGranularity{}
	g.Descriptor[0].Size, g.Descriptor[0].Capacity = minPageSize, minPageSize
	return c.toHost(cmd, g.Bytes()[:])
}

// identifyManaged answers what is there only where namespaces are managed.
func (c *Controller) identifyManaged(cmd *nvme.Command) result {
	if !c.manages() {
		return fail(nvme.StatusInvalidField, dword(10, 0), "CNS not supported")
	}
	switch cmd.CNS() {
	case nvme.CNSAllocatedNamespaces, nvme.CNSCSIAllocated:
		return c.identifyAllocatedList(cmd)
	case nvme.CNSAllocatedNamespace:
		return c.identifyAllocated(cmd, func(n *Namespace) *[nvme.IdentifySize]byte { return c.namespaceData(n).Bytes() })
	case nvme.CNSCSIAllocatedNamespace:
		return c.identifyAllocated(cmd, func(*Namespace) *[nvme.IdentifySize]byte { return new([nvme.IdentifySize]byte) })
	case nvme.CNSNamespaceControllers, nvme.CNSControllers:
		return c.identifyControllers(cmd)
	case nvme.CNSNamespaceGranularity:
		return c.identifyGranularity(cmd)
	}
	return fail(nvme.StatusInvalidField, dword(10, 0), "CNS not supported")
}

// commonNamespaceData is what Identify Namespace of NSIDAll says where namespaces are managed: what all have in common.
func commonNamespaceData() *nvme.IdentifyNamespace {
	id := &nvme.IdentifyNamespace{NMIC: nvme.NMICShared}
	setFormats(id, blockSizes[:], blockSizes[0])
	return id
}
