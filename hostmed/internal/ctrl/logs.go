package ctrl

import "github.com/shadowbell/shadowbell/shared/nvme"

// Get Log Page, and what the log pages are made of. NVMe Base 2.0c 5.16.

// errorLogSize is how many errors are kept (ELPE + 1).
const errorLogSize = 64

const errorEntrySize = 64 // bytes

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
	}
	if work, take := c.deviceLog(cmd.LID()); work != nil {
		saved := *cmd
		return c.background(cmd, work, func(err error) result {
			take(err)
			return c.answerLog(&saved, n, off)
		})
	}
	return c.answerLog(cmd, n, off)
}

// answerLog answers a Get Log Page that was checked.
func (c *Controller) answerLog(cmd *nvme.Command, n, off uint64) result {
	c.takeIOErrors()
	page := c.logPage(cmd)
	if cmd.LID() == nvme.LogPersistentEvent {
		var r result
		var done bool
		if page, r, done = c.persistentEvents(cmd); done {
			return r
		}
	}
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
	nvme.LogTelemetryHost, nvme.LogTelemetryCtrl, nvme.LogPersistentEvent, nvme.LogFeatureEffects, nvme.LogMIEffects, nvme.LogReservation,
	nvme.LogSelfTest,
}

func (c *Controller) hasLog(lid nvme.LogPage) bool {
	for _, l := range logPages {
		if l == lid {
			return (lid != nvme.LogReservation || c.reserves()) && (lid != nvme.LogSelfTest || c.passes(nvme.AdminDeviceSelfTest))
		}
	}
	return false
}

func (c *Controller) logPage(cmd *nvme.Command) []byte {
	switch cmd.LID() {
	case nvme.LogSupported:
		var l nvme.SupportedLogPages
		for _, id := range logPages {
			if c.hasLog(id) {
				l.Page[id] = nvme.LogSupports
			}
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
		return c.commandEffects(cmd.LogCSI()).Bytes()[:]
	case nvme.LogTelemetryHost, nvme.LogTelemetryCtrl:
		return c.telemetryPage(cmd)
	case nvme.LogFeatureEffects:
		return c.featureEffects()
	case nvme.LogSelfTest:
		return c.health.selfTest
	case nvme.LogReservation:
		return c.reservationPage()
	case nvme.LogMIEffects: // there are none
		return make([]byte, 4096)
	}
	return nil
}

func (c *Controller) changedNamespaces() *nvme.ChangedNamespaceList {
	l := new(nvme.ChangedNamespaceList)
	if copy(l.ID[:], c.health.changed) < len(c.health.changed) {
		clear(l.ID[:])
		l.ID[0] = nvme.ChangedNamespacesOverflow
	}
	return l
}
