package suite

import (
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Asynchronous events. NVMe Base 2.0c 5.2.

var eventCases = []Case{
	{
		ID: "event.waits", Ref: "NVMe Base 2.0c 5.2",
		Text: "an Asynchronous Event Request does not complete while nothing happens, and other commands pass it",
		run: func(c *ctl) {
			cid := c.aer()
			c.alive()
			c.noEvent(cid)
		},
	},
	{
		ID: "event.limit", Ref: "NVMe Base 2.0c 5.2", setup: setup{asqs: 512, acqs: 512},
		Text: "one request more than AERL+1 is Asynchronous Event Request Limit Exceeded",
		run: func(c *ctl) {
			for range c.facts.id.AERL.Count() {
				c.aer()
			}
			c.alive()
			c.refused(nvme.Command{Opcode: nvme.AdminAsyncEventRequest}, nvme.StatusAERLimit)
			c.check(len(c.adm.out) == int(c.facts.id.AERL.Count()), "%d requests are outstanding, want AERL+1=%d", len(c.adm.out), c.facts.id.AERL.Count())
		},
	},
	{
		ID: "event.reset", Ref: "NVMe Base 2.0c 5.2, 3.7.2",
		Text: "a reset forgets outstanding requests: as many can be made again",
		run: func(c *ctl) {
			for range 3 {
				for range min(c.facts.id.AERL.Count(), 32) {
					c.aer()
				}
				c.alive()
				c.disable()
				c.enable(setup{})
			}
			c.noEvent(c.aer())
		},
	},
	{
		ID: "event.doorbell.value", Ref: "NVMe Base 2.0c 5.2.1, PCIe Transport 1.0c 3.1.2",
		Text: "an SQ tail outside its queue is reported: Error, Invalid Doorbell Write Value",
		run: func(c *ctl) {
			cid := c.aer()
			c.badTail()
			c.wantEvent(cid, nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError)
		},
	},
	{
		ID: "event.doorbell.head", Ref: "NVMe Base 2.0c 5.2.1, PCIe Transport 1.0c 3.1.2", needs: needTold,
		Text: "a CQ head outside its queue is reported: Error, Invalid Doorbell Write Value",
		run: func(c *ctl) {
			cid := c.aer()
			q := c.q()
			c.ringCQ(1, q.cq.size+1)
			c.wantEvent(cid, nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError)
		},
	},
	{
		ID: "event.doorbell.register", Ref: "NVMe Base 2.0c 5.2.1, PCIe Transport 1.0c 3.1.2", needs: needTold,
		Text: "the doorbell of a queue that does not exist is reported: Error, Write to Invalid Doorbell Register",
		run: func(c *ctl) {
			cid := c.aer()
			c.ringSQ(3, 1)
			c.wantEvent(cid, nvme.EventError, nvme.EventErrorDoorbellRegister, nvme.LogError)
		},
	},
	{
		ID: "event.kept", Ref: "NVMe Base 2.0c 5.2",
		Text: "an event that finds no request waits for one",
		run: func(c *ctl) {
			c.badTail()
			c.never("a completion came without a request", func() bool { return c.adm.cq.cons.Ready() })
			c.wantEvent(c.aer(), nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError)
		},
	},
	{
		ID: "event.masked", Ref: "NVMe Base 2.0c 5.2",
		Text: "after an event, others of its type are held back until its log page is read without Retain Asynchronous Event",
		run: func(c *ctl) {
			first, second := c.aer(), c.aer()
			c.warm(true)
			got := c.wantEvent(first, nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
			c.warm(false)
			c.warm(true)
			c.noEvent(second)
			c.log(got.Log(), 0, 512) // retains
			c.warm(false)
			c.warm(true)
			c.noEvent(second)
			c.warm(false)
			c.clearLog(got.Log())
			c.warm(true)
			c.wantEvent(second, nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
		},
	},
	{
		ID: "event.types-apart", Ref: "NVMe Base 2.0c 5.2",
		Text: "an event of one type does not hold back one of another type",
		run: func(c *ctl) {
			first, second := c.aer(), c.aer()
			c.warm(true)
			c.wantEvent(first, nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
			c.badTail()
			c.wantEvent(second, nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError)
		},
	},
	{
		ID: "event.temperature", Ref: "NVMe Base 2.0c 5.2.1, 5.27.1.3",
		Text: "a temperature at or above the threshold is reported: SMART, Temperature Threshold; the SMART log says so too",
		run: func(c *ctl) {
			cid := c.aer()
			c.warm(true)
			c.wantEvent(cid, nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
			c.check(c.smart().CriticalWarning&nvme.SMARTWarningTemperature != 0, "critical warning %#x, want bit 1 set", c.smart().CriticalWarning)
		},
	},
	{
		ID: "event.temperature.under", Ref: "NVMe Base 2.0c 5.27.1.3",
		Text: "a temperature at or below the lower threshold is reported too",
		run: func(c *ctl) {
			cid := c.aer()
			c.setFeature(nvme.FeatureAsyncEvents, 0, nvme.SMARTWarningTemperature)
			c.setFeature(nvme.FeatureTemperature, 0, uint32(nvme.MakeTemperatureThreshold(c.smart().Temperature()+1, nvme.TempSensorComposite, nvme.TempUnder)))
			c.wantEvent(cid, nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
		},
	},
	{
		ID: "event.temperature.off", Ref: "NVMe Base 2.0c 5.27.1.9",
		Text: "an event that Asynchronous Event Configuration does not enable is not reported",
		run: func(c *ctl) {
			cid := c.aer()
			c.setFeature(nvme.FeatureAsyncEvents, 0, 0)
			c.threshold(true)
			c.noEvent(cid)
		},
	},
	{
		ID: "event.aborted", Ref: "NVMe Base 2.0c 5.1, 5.2",
		Text: "an event goes to a request that is left when another was aborted",
		run: func(c *ctl) {
			first, second := c.aer(), c.aer()
			if cpl := c.ok(abort(0, first)); cpl.Result&1 != 0 {
				c.skipf("requests are not aborted")
			}
			cmd := c.adm.out[first]
			c.adm.want(&cmd, c.adm.wait(first), nvme.StatusAbortRequested)
			c.badTail()
			c.wantEvent(second, nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError)
		},
	},
}

// needTold is for doorbells whose writes a controller sees even if they concern no queue.
var needTold = bitNeed("doorbells are mapped and polled: the controller sees those of its queues only", func(f *facts) bool { return !f.mapped })

// aer submits an Asynchronous Event Request.
func (c *ctl) aer() uint16 { return c.adm.submit(nvme.Command{Opcode: nvme.AdminAsyncEventRequest}) }

// wantEvent waits for the event of a request and checks it.
func (c *ctl) wantEvent(cid uint16, typ nvme.EventType, info uint8, log nvme.LogPage) nvme.AsyncEvent {
	want := nvme.MakeAsyncEvent(typ, info, log)
	cmd := c.adm.out[cid]
	var cpl nvme.Completion
	if !c.until(soon, func() (ok bool) { cpl, ok = c.adm.completed(cid); return ok }) {
		c.failf("no event, want %v", want)
	}
	c.adm.want(&cmd, cpl, nvme.StatusSuccess)
	got := nvme.AsyncEvent(cpl.Result)
	c.check(got == want, "event %v (DW0=%#x), want %v", got, uint32(got), want)
	return got
}

// noEvent checks that a request stays outstanding.
func (c *ctl) noEvent(cid uint16) {
	c.adm.cq.reap()
	if cpl, done := c.adm.done[cid]; done {
		c.failf("event %v (DW0=%#x, status %s), want none", nvme.AsyncEvent(cpl.Result), cpl.Result, status(cpl.Status().Code()))
	}
	c.never("a request completed without an event", func() bool { c.adm.cq.reap(); _, done := c.adm.done[cid]; return done })
}

// badTail creates queue pair 1 and writes a tail that is not in it.
func (c *ctl) badTail() { c.ringSQ(1, c.q().size+7) }

// warm enables the temperature event, and makes the controller's temperature too high, or not.
func (c *ctl) warm(on bool) {
	c.setFeature(nvme.FeatureAsyncEvents, 0, nvme.SMARTWarningTemperature)
	c.threshold(on)
}

func (c *ctl) threshold(exceeded bool) {
	limit := uint16(500)
	if exceeded {
		limit = c.smart().Temperature() - 1
	}
	c.setFeature(nvme.FeatureTemperature, 0, uint32(nvme.MakeTemperatureThreshold(limit, nvme.TempSensorComposite, nvme.TempOver)))
}
