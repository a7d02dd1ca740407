package ctrl

import (
	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Format NVM. NVMe Base 2.0c 5.14. It runs in the background; package subsys keeps other commands away from the namespace meanwhile.

// canFormat says that there is the command.
func (c *Controller) canFormat() bool { return c.cfg.Self != nil }

func (c *Controller) formatNVM(cmd *nvme.Command) result {
	index, ses := cmd.FormatIndex(), cmd.FormatErase()
	switch {
	case ses > nvme.EraseUserData:
		return fail(nvme.StatusInvalidField, dword(10, 9), "cryptographic erase is not there: FNA says so")
	case cmd.FormatProtection() != 0:
		return fail(nvme.StatusInvalidFormat, dword(10, 5), "protection information is not there")
	case cmd.NSID == 0:
		return fail(nvme.StatusInvalidNamespace, inNSID, "no such namespace")
	}
	// FNA says that a format is of one namespace: NSIDAll is each that is attached here.
	type order struct {
		n   *subsys.Namespace
		lba uint32
	}
	var orders []order
	host := c.cfg.Self.Host()
	for i := range c.cfg.Namespaces {
		n := &c.cfg.Namespaces[i]
		if cmd.NSID != n.NSID && cmd.NSID != nvme.NSIDAll {
			continue
		}
		list := formats(&n.Info)
		if int(index) >= len(list) {
			return fail(nvme.StatusInvalidFormat, dword(10, 0), "no such LBA format")
		}
		lba := uint32(1) << list[index]
		if st := n.Of.CanFormat(lba, host); !st.OK() {
			if st.Code() == nvme.StatusFormatInProgress {
				return result{status: st, loc: inNSID, cause: "a format of the namespace is going on"}
			}
			return fail(st, inNSID, "the namespace cannot be formatted so")
		}
		orders = append(orders, order{n.Of, lba})
	}
	if len(orders) == 0 && cmd.NSID != nvme.NSIDAll {
		return fail(nvme.StatusInvalidNamespace, inNSID, "no such namespace")
	}
	s := c.cfg.Self.Subsystem()
	return c.inBackground(cmd, func() result {
		for _, o := range orders {
			if st := s.Format(o.n, o.lba); !st.OK() {
				return result{status: st, loc: inNSID, cause: "format"}
			}
		}
		return result{}
	})
}
