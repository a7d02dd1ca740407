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
			c.aer()
			c.alive()
			c.noEvent()
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
			c.aer()
			c.noEvent()
		},
	},
	{
		ID: "event.doorbell.value", Ref: "NVMe Base 2.0c 5.2.1, PCIe Transport 1.0c 3.1.2",
		Text: "an SQ tail outside its queue is reported: Error, Invalid Doorbell Write Value",
		run: func(c *ctl) {
			c.aer()
			c.badTail()
			c.wantEvent(nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError)
		},
	},
	{
		ID: "event.doorbell.head", Ref: "NVMe Base 2.0c 5.2.1, PCIe Transport 1.0c 3.1.2", needs: needTold,
		Text: "a CQ head outside its queue is reported: Error, Invalid Doorbell Write Value",
		run: func(c *ctl) {
			c.aer()
			q := c.q()
			c.ringCQ(1, q.cq.size+1)
			c.wantEvent(nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError)
		},
	},
	{
		ID: "event.doorbell.register", Ref: "NVMe Base 2.0c 5.2.1, PCIe Transport 1.0c 3.1.2", needs: needTold,
		Text: "the doorbell of a queue that does not exist is reported: Error, Write to Invalid Doorbell Register",
		run: func(c *ctl) {
			c.aer()
			c.ringSQ(3, 1)
			c.wantEvent(nvme.EventError, nvme.EventErrorDoorbellRegister, nvme.LogError)
		},
	},
	{
		ID: "event.kept", Ref: "NVMe Base 2.0c 5.2",
		Text: "an event that finds no request waits for one",
		run: func(c *ctl) {
			c.warm(true)
			c.never("a completion came without a request", func() bool { return c.adm.cq.cons.Ready() })
			c.aer()
			c.wantEvent(nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
		},
	},
	{
		ID: "event.masked", Ref: "NVMe Base 2.0c 5.2",
		Text: "after an event, others of its type are held back until its log page is read without Retain Asynchronous Event",
		run: func(c *ctl) {
			c.aer()
			c.aer()
			c.warm(true)
			got := c.wantEvent(nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
			c.warm(false)
			c.warm(true)
			c.noEvent()
			c.log(got.Log(), 0, 512) // retains
			c.warm(false)
			c.warm(true)
			c.noEvent()
			c.warm(false)
			c.clearLog(got.Log())
			c.warm(true)
			c.wantEvent(nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
		},
	},
	{
		ID: "event.types-apart", Ref: "NVMe Base 2.0c 5.2",
		Text: "an event of one type does not hold back one of another type",
		run: func(c *ctl) {
			c.aer()
			c.aer()
			c.warm(true)
			c.wantEvent(nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
			c.badTail()
			c.wantEvent(nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError)
		},
	},
	{
		ID: "event.temperature", Ref: "NVMe Base 2.0c 5.2.1, 5.27.1.3",
		Text: "a temperature at or above the threshold is reported: SMART, Temperature Threshold; the SMART log says so too",
		run: func(c *ctl) {
			c.aer()
			c.warm(true)
			c.wantEvent(nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
			c.check(c.smart().CriticalWarning&nvme.SMARTWarningTemperature != 0, "critical warning %#x, want bit 1 set", c.smart().CriticalWarning)
		},
	},
	{
		ID: "event.temperature.under", Ref: "NVMe Base 2.0c 5.27.1.3",
		Text: "a temperature at or below the lower threshold is reported too",
		run: func(c *ctl) {
			c.aer()
			c.setFeature(nvme.FeatureAsyncEvents, 0, nvme.SMARTWarningTemperature)
			c.setFeature(nvme.FeatureTemperature, 0, uint32(nvme.MakeTemperatureThreshold(c.smart().Temperature()+1, nvme.TempSensorComposite, nvme.TempUnder)))
			c.wantEvent(nvme.EventSMART, nvme.EventSMARTTemperature, nvme.LogSMART)
		},
	},
	{
		ID: "event.temperature.off", Ref: "NVMe Base 2.0c 5.27.1.9",
		Text: "an event that Asynchronous Event Configuration does not enable is not reported",
		run: func(c *ctl) {
			c.aer()
			c.setFeature(nvme.FeatureAsyncEvents, 0, 0)
			c.threshold(true)
			c.noEvent()
		},
	},
	{
		ID: "event.aborted", Ref: "NVMe Base 2.0c 5.1, 5.2",
		Text: "an event goes to a request that is left when another was aborted",
		run: func(c *ctl) {
			first := c.aer()
			c.aer()
			if cpl := c.ok(abort(0, first)); cpl.Result&1 != 0 {
				c.skipf("requests are not aborted")
			}
			cmd := c.adm.out[first]
			c.adm.want(&cmd, c.adm.wait(first), nvme.StatusAbortRequested)
			c.badTail()
			c.wantEvent(nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError)
		},
	},
}

// needTold is for doorbells whose writes a controller sees even if they concern no queue.
var needTold = bitNeed("doorbells are mapped and polled: the controller sees those of its queues only", func(f *facts) bool { return !f.mapped })

// aer submits an Asynchronous Event Request, and returns when the controller has it: what is submitted after it has completed.
func (c *ctl) aer() uint16 {
	cid := c.adm.submit(nvme.Command{Opcode: nvme.AdminAsyncEventRequest})
	cmd, _ := c.identifyCmd(nvme.CNSController, 0)
	c.adm.wait(c.adm.submit(cmd))
	return cid
}

// wantEvent waits for an event by any of the requests and checks it.
func (c *ctl) wantEvent(typ nvme.EventType, info uint8, log nvme.LogPage) nvme.AsyncEvent {
	want := nvme.MakeAsyncEvent(typ, info, log)
	if !c.until(soon, c.anyEvent) {
		c.failf("no event, want %v", want)
	}
	got, st := c.event()
	c.check(got == want && st == nvme.StatusSuccess, "event %v (DW0=%#x), status %s, want %v", got, uint32(got), status(st), want)
	return got
}

// noEvent checks that all requests stay outstanding.
func (c *ctl) noEvent() {
	if c.until(quietFor, c.anyEvent) {
		got, st := c.event()
		c.failf("event %v (DW0=%#x), status %s, want none", got, uint32(got), status(st))
	}
}

// anyEvent reports whether a request has completed. Nothing else on the admin queue is ever left to be waited for.
func (c *ctl) anyEvent() bool {
	c.adm.cq.reap()
	return len(c.adm.done) > 0
}

// event takes a request that has completed.
func (c *ctl) event() (nvme.AsyncEvent, nvme.Status) {
	for cid, cpl := range c.adm.done {
		delete(c.adm.done, cid)
		return nvme.AsyncEvent(cpl.Result), cpl.Status().Code()
	}
	return 0, 0
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
