package ctrl

import "github.com/shadowbell/shadowbell/shared/nvme"

// What commands and features do beside what they were sent for: logs 05h and 12h. NVMe Base 2.0c 5.16.1.6 and 5.16.1.18.
// A host goes by it when somebody else's program sends a command past its driver.

// Scopes of a feature in log 12h, bits 25:20.
const (
	featureSupported       = 1 << 0
	featureScopeNamespace  = 1 << 20
	featureScopeController = 1 << 21
)

// Commands that must have the controller or a namespace for themselves. CSE of log 05h.
const (
	aloneInNamespace  = 1 << nvme.EffectExclusiveShift
	aloneInController = 2 << nvme.EffectExclusiveShift
)

// adminEffects is what a supported admin command may change.
var adminEffects = map[uint8]uint32{
	nvme.AdminNamespaceManagement: nvme.EffectNamespaceCap | nvme.EffectNamespaceList,
	nvme.AdminNamespaceAttachment: nvme.EffectNamespaceList,
	nvme.AdminFormatNVM:           nvme.EffectBlockContent | nvme.EffectNamespaceCap | aloneInNamespace,
	nvme.AdminSanitize:            nvme.EffectBlockContent | aloneInController,
}

// adminScopes is whom a supported admin command concerns, where that is not the controller.
var adminScopes = map[uint8]uint32{
	nvme.AdminGetLogPage:          nvme.EffectScopeController | nvme.EffectScopeSubsystem,
	nvme.AdminIdentify:            nvme.EffectScopeController | nvme.EffectScopeNamespace | nvme.EffectScopeSubsystem,
	nvme.AdminSetFeatures:         nvme.EffectScopeController | nvme.EffectScopeNamespace,
	nvme.AdminGetFeatures:         nvme.EffectScopeController | nvme.EffectScopeNamespace,
	nvme.AdminNamespaceManagement: nvme.EffectScopeSubsystem,
	nvme.AdminNamespaceAttachment: nvme.EffectScopeSubsystem,
	nvme.AdminFormatNVM:           nvme.EffectScopeNamespace,
	nvme.AdminGetLBAStatus:        nvme.EffectScopeNamespace,
}

func adminScope(op uint8) uint32 {
	if s, ok := adminScopes[op]; ok {
		return s
	}
	return nvme.EffectScopeController
}

// ioEffects is what an I/O command may change. Linux warns of I/O commands that do anything but change blocks ("unusual effects"), and so
// does it of one that says its scope, which is the namespace anyway.
var ioEffects = map[uint8]uint32{
	nvme.IOWrite:              nvme.EffectBlockContent,
	nvme.IOWriteUncorrectable: nvme.EffectBlockContent,
	nvme.IOWriteZeroes:        nvme.EffectBlockContent,
	nvme.IODSM:                nvme.EffectBlockContent,
	nvme.IOCopy:               nvme.EffectBlockContent,
}

// ioOpcodes are those that the data path knows.
func (c *Controller) ioOpcodes() []uint8 {
	ops := []uint8{
		nvme.IOFlush, nvme.IORead, nvme.IOCompare, nvme.IOVerify, nvme.IOWrite, nvme.IOWriteUncorrectable,
		nvme.IOWriteZeroes, nvme.IODSM, nvme.IOCopy,
	}
	if c.reserves() {
		ops = append(ops, nvme.IOReservationRegister, nvme.IOReservationReport, nvme.IOReservationAcquire, nvme.IOReservationRelease)
	}
	return ops
}

// commandEffects is log 05h of one command set. nvme-cli asks for the zoned one too, whatever Identify says of it, and shows nothing at
// all if that fails.
func (c *Controller) commandEffects(csi nvme.CSI) *nvme.CommandEffects {
	l := new(nvme.CommandEffects)
	for _, op := range c.adminOpcodes() {
		l.Admin[op] = nvme.EffectSupported | adminEffects[op] | adminScope(op)
	}
	if csi != nvme.CSINVM {
		return l
	}
	for _, op := range c.ioOpcodes() {
		l.IO[op] = nvme.EffectSupported | ioEffects[op]
	}
	return l
}

// featureEffects is log 12h: a word for each feature. NVMe Base 2.0c 5.16.1.18.
func (c *Controller) featureEffects() []byte {
	p := make([]byte, 0, 256*4)
	for fid := range 256 {
		var w uint32
		if caps, ok := c.featureCaps(nvme.FeatureID(fid)); ok {
			w = featureSupported | featureScopeController
			if caps&nvme.FeatureCapNamespace != 0 {
				w = featureSupported | featureScopeNamespace
			}
		}
		p = append(p, byte(w), byte(w>>8), byte(w>>16), byte(w>>24))
	}
	return p
}
