package ctrl

import (
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Health: the SMART log and its events. NVMe Base 2.0c 5.16.1.3.

// compositeTemperature is what a controller made of software reports, in kelvin.
const compositeTemperature = 313

// mediaErrorsWarning is how many media errors of a power cycle put the reliability in doubt.
const mediaErrorsWarning = 16

// health is what the SMART and the Changed Namespace List log are made of.
type health struct {
	reported    uint8    // SMARTWarning bits that hold and were seen by checkHealth
	mediaErrors uint64   // of this power cycle, as of the last sample
	changed     []uint32 // namespaces, rising

	device   deviceHealth // of the host's devices under the namespaces
	asking   bool         // they are being asked
	askAgain bool         // when they have answered
	silent   bool         // not all of them have answered the last time
	stop     func() bool  // ends the waiting for the next time; nil: nobody waits
	selfTest []byte       // log 06h, as the device said last
}

// temperature is the device's, if there is one.
func (h *health) temperature() uint16 {
	if t := h.device.log.Temperature(); t != 0 {
		return t
	}
	return compositeTemperature
}

func (c *Controller) criticalWarning() (w uint8) {
	over, under := c.featureOf(featureKey{nvme.FeatureTemperature, nvme.TempOver}), c.featureOf(featureKey{nvme.FeatureTemperature, nvme.TempUnder})
	w = c.health.device.log.CriticalWarning
	if t := uint32(c.health.temperature()); t >= over || t <= under {
		w |= nvme.SMARTWarningTemperature
	}
	if c.health.mediaErrors >= mediaErrorsWarning {
		w |= nvme.SMARTWarningReliability
	}
	return w
}

// smartEvents is which event tells of which warning.
var smartEvents = [...]struct{ warning, info uint8 }{
	{nvme.SMARTWarningTemperature, nvme.EventSMARTTemperature},
	{nvme.SMARTWarningReliability, nvme.EventSMARTReliability},
	{nvme.SMARTWarningSpare, nvme.EventSMARTSpare},
	{nvme.SMARTWarningReadOnly, nvme.EventSMARTReliability},
	{nvme.SMARTWarningBackup, nvme.EventSMARTReliability},
}

// healthPeriod is how often the host's devices are asked for their health while the guest wants to hear of it. Temperatures rise without an event, as long as
// they are within the device's own thresholds, and the events of a device that the kernel drives are the kernel's.
const healthPeriod = 30 * time.Second

// AskHealth asks the host's devices for their health, as one of them has a warning, and tells the guest what it wants to hear of. It
// waits for nothing.
func (c *Controller) AskHealth() {
	h := &c.health
	ds := c.hostDevices()
	switch {
	case len(ds) == 0:
		return
	case h.asking:
		h.askAgain = true
		return
	}
	h.asking = true
	c.async.work.Go(func() {
		var now deviceHealth
		err := now.read(ds)
		c.Post(func() {
			h.asking = false
			c.takeHealth(&now, err)
			c.interrupt()
			if h.askAgain {
				h.askAgain = false
				c.AskHealth()
			}
		})
	})
}

// followHealth asks the devices now, and from time to time from now on, as long as the guest wants to hear of warnings.
func (c *Controller) followHealth() {
	h := &c.health
	if h.stop != nil {
		h.stop()
		h.stop = nil
	}
	if !c.ready || c.eventConfig().SMART() == 0 {
		return
	}
	c.AskHealth()
	h.stop = c.after(c.cfg.HealthPeriod, c.followHealth)
}

// checkHealth raises an event for each warning that has come up and that the host wants to hear of.
func (c *Controller) checkHealth() {
	w := c.criticalWarning() & c.eventConfig().SMART()
	risen := w &^ c.health.reported
	c.health.reported = w
	for _, e := range smartEvents {
		if risen&e.warning != 0 {
			c.raise(nvme.MakeAsyncEvent(nvme.EventSMART, e.info, nvme.LogSMART))
		}
	}
}

func (c *Controller) smart() *nvme.SMARTLog {
	c.sample()
	count := func(v uint64) nvme.Uint128 { return nvme.Uint128{Lo: v} }
	l := &nvme.SMARTLog{AvailableSpare: 100, SpareThreshold: 10}
	if d := &c.health.device; d.known {
		*l = d.log
	}
	l.CriticalWarning = c.criticalWarning()
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
	l.SetTemperature(c.health.temperature())
	return l
}
