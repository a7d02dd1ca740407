package admin

import (
	"context"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// maxNamespaces bounds how many namespaces are believed in.
const maxNamespaces = 4096

// Identify reads Identify Controller and keeps it.
func (a *Admin) Identify(ctx context.Context) error {
	id := new(nvme.IdentifyController)
	var cmd nvme.Command
	cmd.SetIdentify(nvme.CNSController, 0, 0)
	if _, err := a.exec(ctx, cmd, id.Bytes()[:]); err != nil {
		return err
	}
	if lo, hi := id.SQES&0xF, id.SQES>>4; lo > 6 || hi < 6 {
		return fmt.Errorf("the controller's SQEs have 2^%d to 2^%d bytes, this driver's have 64", lo, hi)
	}
	if lo, hi := id.CQES&0xF, id.CQES>>4; lo > 4 || hi < 4 {
		return fmt.Errorf("the controller's CQEs have 2^%d to 2^%d bytes, this driver's have 16", lo, hi)
	}
	a.id.Store(id)
	return nil
}

// ActiveNamespaces returns the ids of the active namespaces, rising.
func (a *Admin) ActiveNamespaces(ctx context.Context) ([]uint32, error) {
	var ids []uint32
	for last := uint32(0); ; {
		var list nvme.NamespaceList
		var cmd nvme.Command
		cmd.SetIdentify(nvme.CNSActiveNamespaces, last, 0)
		if _, err := a.exec(ctx, cmd, list.Bytes()[:]); err != nil {
			return nil, err
		}
		n := list.Len()
		for _, id := range list.ID[:n] {
			if id <= last || id >= nvme.NSIDAll-1 {
				return nil, fmt.Errorf("active namespace list: id %#x follows %#x", id, last)
			}
			if len(ids) == maxNamespaces {
				a.log.Warn("more active namespaces than this driver handles", "handled", maxNamespaces)
				return ids, nil
			}
			ids = append(ids, id)
			last = id
		}
		if n < len(list.ID) {
			return ids, nil
		}
	}
}

// IdentifyNamespace reads Identify Namespace of the NVM command set.
func (a *Admin) IdentifyNamespace(ctx context.Context, nsid uint32) (*nvme.IdentifyNamespace, error) {
	id := new(nvme.IdentifyNamespace)
	var cmd nvme.Command
	cmd.SetIdentify(nvme.CNSNamespace, nsid, 0)
	if _, err := a.exec(ctx, cmd, id.Bytes()[:]); err != nil {
		return nil, err
	}
	return id, nil
}

// QuietOffered says that the controller honours the quiet bit (nvme.FeatureQuiet).
func (a *Admin) QuietOffered() bool {
	s, ok := a.Identity().Shadowbell()
	return ok && s.Version == nvme.ShadowbellVersion && s.Caps&nvme.ShadowbellQuiet != 0
}

// EnableQuiet turns nvme.FeatureQuiet on.
func (a *Admin) EnableQuiet(ctx context.Context) error {
	var cmd nvme.Command
	cmd.SetSetFeatures(nvme.FeatureQuiet, 0, nvme.FeatureQuietOn)
	_, err := a.exec(ctx, cmd, nil)
	return err
}
