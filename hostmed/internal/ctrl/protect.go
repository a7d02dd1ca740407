package ctrl

import (
	"errors"

	"github.com/shadowbell/shadowbell/hostmed/internal/subsys"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Namespace Write Protection, feature 84h. NVMe Base 2.0c 5.27.1.28 and 8.12. The state is the namespace's, for all controllers that it is
// attached to; package subsys keeps it, and the data path asks the namespace's gate.

const writeProtectState = 7 // of CDW11 and DW0

func (c *Controller) getWriteProtect(cmd *nvme.Command) result {
	if cmd.FeatureSelect() == nvme.FeatureDefault {
		return result{dw0: uint32(subsys.Unprotected)}
	}
	return result{dw0: uint32(c.namespace(cmd.NSID).Of.Protection())}
}

// setWriteProtect completes the command when no write is under way any more and what was written before is durable.
func (c *Controller) setWriteProtect(cmd *nvme.Command) result {
	p := subsys.Protection(cmd.CDW11 & writeProtectState)
	if p > subsys.ProtectedForEver {
		return fail(nvme.StatusInvalidField, dword(11, 0), "reserved write protection state")
	}
	var list []*subsys.Namespace
	for i := range c.cfg.Namespaces {
		n := &c.cfg.Namespaces[i]
		if cmd.NSID != n.NSID && cmd.NSID != nvme.NSIDAll {
			continue
		}
		if n.Of.Protection() != p && !n.Of.Protection().Changeable() {
			return fail(nvme.StatusFeatureNotChangeable, inNSID, "the namespace is write protected for good, or until power is off")
		}
		list = append(list, n.Of)
	}
	flush := c.dp.Flush
	return c.background(cmd, func() error {
		var errs []error
		for _, n := range list {
			if n.Protection() != p {
				errs = append(errs, n.SetProtection(p))
				c.cfg.Self.Subsystem().Announce(n)
			}
		}
		if p != subsys.Unprotected {
			errs = append(errs, flush())
		}
		return errors.Join(errs...)
	}, func(err error) result {
		if err != nil {
			return failErr(nvme.StatusInternalError, nowhere, "write protection", err)
		}
		return result{}
	})
}
