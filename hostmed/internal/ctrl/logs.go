package ctrl

import (
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Get Log Page, and what the log pages are made of. NVMe Base 2.0c 5.16.

// errorLogSize is how many errors are kept (ELPE + 1).
const errorLogSize = 64

const errorEntrySize = 64 // bytes

// compositeTemperature is what a controller made of software reports, in kelvin.
const compositeTemperature = 313

// Scopes of a feature in log 12h, bits 25:20.
const (
	featureSupported       = 1 << 0
	featureScopeNamespace  = 1 << 20
	featureScopeController = 1 << 21
)

// health is what the SMART and the Changed Namespace List log are made of.
type health struct {
	reported uint8    // SMARTWarning bits that hold and were seen by checkHealth
	changed  []uint32 // rising
}

func (c *Controller) criticalWarning() uint8 {
	over, under := c.featureOf(featureKey{nvme.FeatureTemperature, nvme.TempOver}), c.featureOf(featureKey{nvme.FeatureTemperature, nvme.TempUnder})
	if compositeTemperature >= over || compositeTemperature <= under {
		return nvme.SMARTWarningTemperature
	}
	return 0
}

// checkHealth raises an event for a warning that has come up and that the host wants to hear of.
func (c *Controller) checkHealth() {
	w := c.criticalWarning() & c.eventConfig().SMART()
	if w&^c.health.reported != 0 {
		c.raise(nvme.MakeAsyncEvent(nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART))
	}
	c.health.reported = w
}

func (c *Controller) getLogPage(cmd *nvme.Command) result {
	n, off := cmd.LogBytes(), cmd.LogOffset()
	switch {
	case !c.hasLog(cmd.LID()):
		return fail(nvme.StatusInvalidLogPage, dword(10, 0), "no such log page")
	case n > uint64(c.cfg.MDTSBytes):
		return fail(nvme.StatusInvalidField, dword(10, 16), "NUMD is more than MDTS")
	case cmd.LogOffsetIndex():
		return fail(nvme.StatusInvalidField, dword(14, 23), "offsets are not indices")
	case off%4 != 0:
		return fail(nvme.StatusInvalidField, dword(12, 0), "offset is not a multiple of 4")
	case cmd.LID() == nvme.LogSMART && cmd.NSID != 0 && cmd.NSID != nvme.NSIDAll:
		return fail(nvme.StatusInvalidField, inNSID, "SMART is of the controller")
	case cmd.LID() == nvme.LogCommandEffects && cmd.LogCSI() != nvme.CSINVM:
		return fail(nvme.StatusInvalidField, dword(14, 24), "only the NVM command set is there")
	}
	c.takeIOErrors()
	page := c.logPage(cmd.LID())
	if off > uint64(len(page)) {
		return fail(nvme.StatusInvalidField, dword(12, 0), "offset is behind the log page")
	}
	// What was asked for beyond the page is zeroes.
	data := make([]byte, n)
	copy(data, page[off:])
	if r := c.toHost(cmd, data); !r.status.OK() {
		return r
	}
	if !cmd.LogRetainEvent() {
		c.clearEvents(cmd.LID())
	}
	return result{}
}

// logPages are those that hasLog knows; LogSupported says so.
var logPages = [...]nvme.LogPage{
	nvme.LogSupported, nvme.LogError, nvme.LogSMART, nvme.LogFirmwareSlot, nvme.LogChangedNamespaces, nvme.LogCommandEffects,
	nvme.LogFeatureEffects, nvme.LogMIEffects,
}

func (c *Controller) hasLog(lid nvme.LogPage) bool {
	for _, l := range logPages {
		if l == lid {
			return true
		}
	}
	return false
}

func (c *Controller) logPage(lid nvme.LogPage) []byte {
	switch lid {
	case nvme.LogSupported:
		var l nvme.SupportedLogPages
		for _, id := range logPages {
			l.Page[id] = nvme.LogSupports
		}
		return l.Bytes()[:]
	case nvme.LogError:
		return c.cfg.Persistent.errorPage()
	case nvme.LogSMART:
		return c.smart().Bytes()[:]
	case nvme.LogFirmwareSlot:
		l := nvme.FirmwareSlotLog{AFI: 1}
		nvme.SetASCII(l.Slot[0][:], c.cfg.Firmware)
		return l.Bytes()[:]
	case nvme.LogChangedNamespaces:
		return c.changedNamespaces().Bytes()[:]
	case nvme.LogCommandEffects:
		return c.commandEffects().Bytes()[:]
	case nvme.LogFeatureEffects:
		return c.featureEffects()
	case nvme.LogMIEffects: // there are none
		return make([]byte, 4096)
	}
	return nil
}

func (c *Controller) smart() *nvme.SMARTLog {
	c.sample()
	count := func(v uint64) nvme.Uint128 { return nvme.Uint128{Lo: v} }
	l := &nvme.SMARTLog{CriticalWarning: c.criticalWarning(), AvailableSpare: 100, SpareThreshold: 10}
	c.cfg.Persistent.read(func(v *persisted) {
		l.DataUnitsRead = nvme.DataUnits(v.IO.ReadBytes)
		l.DataUnitsWritten = nvme.DataUnits(v.IO.WriteBytes)
		l.HostReads = count(v.IO.ReadCommands)
		l.HostWrites = count(v.IO.WriteCommands)
		l.BusyMinutes = count(uint64(v.IO.Busy / time.Minute))
		l.PowerCycles = count(v.PowerCycles)
		l.PowerOnHours = count(uint64(v.PowerOn / time.Hour))
		l.UnsafeShutdowns = count(v.UnsafeShutdowns)
		l.MediaErrors = count(v.IO.MediaErrors)
		l.ErrorLogEntries = count(v.ErrorCount)
	})
	l.SetTemperature(compositeTemperature)
	return l
}

func (c *Controller) changedNamespaces() *nvme.ChangedNamespaceList {
	l := new(nvme.ChangedNamespaceList)
	if copy(l.ID[:], c.health.changed) < len(c.health.changed) {
		clear(l.ID[:])
		l.ID[0] = nvme.ChangedNamespacesOverflow
	}
	return l
}

func (c *Controller) commandEffects() *nvme.CommandEffects {
	l := new(nvme.CommandEffects)
	for _, op := range c.adminOpcodes() {
		l.Admin[op] = nvme.EffectSupported
	}
	for _, op := range []uint8{nvme.IOFlush, nvme.IORead, nvme.IOCompare} {
		l.IO[op] = nvme.EffectSupported
	}
	for _, op := range []uint8{nvme.IOWrite, nvme.IOWriteZeroes, nvme.IODSM} {
		l.IO[op] = nvme.EffectSupported | nvme.EffectBlockContent
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
