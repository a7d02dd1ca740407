package suite

import (
	"encoding/binary"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Get and Set Features. NVMe Base 2.0c 5.15, 5.27, NVM Command Set 1.0c 4.1.3.

var needSelect = oncs(nvme.ONCSSaveSelect, "Save and Select")

var featureCases = []Case{
	{
		ID: "feature.reserved", Ref: "NVMe Base 2.0c 5.15, 5.27",
		Text: "a reserved feature identifier is Invalid Field in Command",
		run: func(c *ctl) {
			for _, fid := range []nvme.FeatureID{0x00, 0x1F, 0x77} {
				c.refused(getFeatureCmd(fid, 0, nvme.FeatureCurrent, 0), nvme.StatusInvalidField)
				c.refused(setFeatureCmd(fid, 0, 0), nvme.StatusInvalidField)
			}
		},
	},
	{
		ID: "feature.mandatory", Ref: "NVMe Base 2.0c 3.1.2.1.3",
		Text: "the features that every I/O controller has can be read",
		run: func(c *ctl) {
			for _, fid := range mandatoryFeatures {
				c.getFeature(fid, c.featureNSID(fid), nvme.FeatureCurrent, 0)
			}
		},
	},
	{
		ID: "feature.select.reserved", Ref: "NVMe Base 2.0c 5.15.1", needs: needSelect,
		Text: "a reserved value of SEL is Invalid Field in Command",
		run: func(c *ctl) {
			for sel := nvme.FeatureSelect(4); sel < 8; sel++ {
				c.refused(getFeatureCmd(nvme.FeatureArbitration, 0, sel, 0), nvme.StatusInvalidField)
			}
		},
	},
	{
		ID: "feature.select.supported", Ref: "NVMe Base 2.0c 5.15.1", needs: needSelect,
		Text: "SEL=011b answers with the capabilities, whose other bits are 0",
		run: func(c *ctl) {
			for _, fid := range mandatoryFeatures {
				caps := c.getFeature(fid, c.featureNSID(fid), nvme.FeatureSupported, 0)
				c.check(caps&^7 == 0, "%v: DW0=%#x", fid, caps)
			}
		},
	},
	{
		ID: "feature.select.default", Ref: "NVMe Base 2.0c 5.15.1", needs: needSelect,
		Text: "after a reset each feature that cannot be saved has its default value",
		run: func(c *ctl) {
			c.setFeature(nvme.FeatureTemperature, 0, uint32(nvme.MakeTemperatureThreshold(411, nvme.TempSensorComposite, nvme.TempOver)))
			c.setFeature(nvme.FeatureAsyncEvents, 0, nvme.SMARTWarningReliability)
			c.disable()
			c.enable(setup{})
			for _, fid := range []nvme.FeatureID{nvme.FeatureArbitration, nvme.FeatureCoalescing, nvme.FeatureAsyncEvents, nvme.FeatureTemperature} {
				if c.getFeature(fid, 0, nvme.FeatureSupported, 0)&nvme.FeatureCapSaveable != 0 {
					continue
				}
				now, was := c.getFeature(fid, 0, nvme.FeatureCurrent, 0), c.getFeature(fid, 0, nvme.FeatureDefault, 0)
				c.check(now == was, "%v is %#x, by default %#x", fid, now, was)
			}
		},
	},
	{
		ID: "feature.save.not-saveable", Ref: "NVMe Base 2.0c 5.27", needs: needSelect,
		Text: "SV for a feature that cannot be saved is Feature Identifier Not Saveable",
		run: func(c *ctl) {
			for _, fid := range []nvme.FeatureID{nvme.FeatureArbitration, nvme.FeatureTemperature, nvme.FeatureAsyncEvents, nvme.FeatureCoalescing} {
				if c.getFeature(fid, 0, nvme.FeatureSupported, 0)&nvme.FeatureCapSaveable != 0 {
					continue
				}
				cmd := setFeatureCmd(fid, 0, c.getFeature(fid, 0, nvme.FeatureCurrent, 0))
				cmd.CDW10 |= 1 << 31
				c.refused(cmd, nvme.StatusFeatureNotSaveable)
				return
			}
			c.skipf("every feature can be saved")
		},
	},
	{
		ID: "feature.save.survives", Ref: "NVMe Base 2.0c 5.27, 4.4", needs: needSelect,
		Text: "a saved value is there after a reset, as the current and the saved one",
		run: func(c *ctl) {
			for _, f := range roundTrips {
				if f.fid == nvme.FeatureQueues || c.getFeature(f.fid, c.featureNSID(f.fid), nvme.FeatureSupported, f.value)&nvme.FeatureCapSaveable == 0 {
					continue
				}
				c.saved(f)
				return
			}
			c.skipf("no feature can be saved")
		},
	},
	{
		ID: "feature.reset", Ref: "NVMe Base 2.0c 3.7.2, 5.27", needs: needSelect,
		Text: "a value that was not saved does not outlive a reset",
		run: func(c *ctl) {
			before := c.getFeature(nvme.FeatureAsyncEvents, 0, nvme.FeatureCurrent, 0)
			c.setFeature(nvme.FeatureAsyncEvents, 0, before^nvme.SMARTWarningSpare)
			c.disable()
			c.enable(setup{})
			got := c.getFeature(nvme.FeatureAsyncEvents, 0, nvme.FeatureCurrent, 0)
			c.check(got == before, "it is %#x, was %#x before it was set", got, before)
		},
	},
	{
		ID: "feature.not-per-namespace", Ref: "NVMe Base 2.0c 5.27", needs: needNS,
		Text: "a namespace id for a feature of the controller is Feature Not Namespace Specific",
		run: func(c *ctl) {
			cmd := setFeatureCmd(nvme.FeatureArbitration, c.facts.nsid, c.getFeature(nvme.FeatureArbitration, 0, nvme.FeatureCurrent, 0))
			c.refused(cmd, nvme.StatusFeatureNotPerNamespace)
		},
	},
	{
		ID: "feature.arbitration", Ref: "NVMe Base 2.0c 5.27.1.1",
		Text: "Arbitration keeps its burst", run: func(c *ctl) { c.roundTrip(nvme.FeatureArbitration) },
	},
	{
		ID: "feature.temperature", Ref: "NVMe Base 2.0c 5.27.1.3",
		Text: "Temperature Threshold keeps the threshold", run: func(c *ctl) { c.roundTrip(nvme.FeatureTemperature) },
	},
	{
		ID: "feature.error-recovery", Ref: "NVM Command Set 1.0c 4.1.3.2", needs: needNS,
		Text: "Error Recovery keeps TLER", run: func(c *ctl) { c.roundTrip(nvme.FeatureErrorRecovery) },
	},
	{
		ID: "feature.coalescing", Ref: "NVMe Base 2.0c 5.27.1.6",
		Text: "Interrupt Coalescing keeps threshold and time", run: func(c *ctl) { c.roundTrip(nvme.FeatureCoalescing) },
	},
	{
		ID: "feature.vector-config", Ref: "NVMe Base 2.0c 5.27.1.7",
		Text: "Interrupt Vector Configuration keeps CD of a vector", run: func(c *ctl) { c.roundTrip(nvme.FeatureVectorConfig) },
	},
	{
		ID: "feature.write-atomicity", Ref: "NVM Command Set 1.0c 4.1.3.3",
		Text: "Write Atomicity Normal keeps DN", run: func(c *ctl) { c.roundTrip(nvme.FeatureWriteAtomicity) },
	},
	{
		ID: "feature.async-events", Ref: "NVMe Base 2.0c 5.27.1.9",
		Text: "Asynchronous Event Configuration keeps its bits", run: func(c *ctl) { c.roundTrip(nvme.FeatureAsyncEvents) },
	},
	{
		ID: "feature.power.beyond", Ref: "NVMe Base 2.0c 5.27.1.2",
		Text:  "a power state beyond NPSS is Invalid Field in Command",
		needs: bitNeed("NPSS leaves no power state", func(f *facts) bool { return f.id.NPSS.Count() < 32 }),
		run: func(c *ctl) {
			c.refused(setFeatureCmd(nvme.FeaturePowerManagement, 0, c.facts.id.NPSS.Count()), nvme.StatusInvalidField, nvme.StatusFeatureNotChangeable)
		},
	},
	{
		ID: "feature.power.each", Ref: "NVMe Base 2.0c 5.27.1.2",
		Text: "each power state can be entered, and is then the current one",
		run: func(c *ctl) {
			if !c.changeable(nvme.FeaturePowerManagement, 0, 0) {
				c.refused(setFeatureCmd(nvme.FeaturePowerManagement, 0, 0), nvme.StatusFeatureNotChangeable)
				return
			}
			for ps := range c.facts.id.NPSS.Count() {
				c.setFeature(nvme.FeaturePowerManagement, 0, ps)
				got := nvme.PowerManagement(c.getFeature(nvme.FeaturePowerManagement, 0, nvme.FeatureCurrent, 0))
				c.check(uint32(got.PS()) == ps, "power state %d after %d was set", got.PS(), ps)
			}
			c.setFeature(nvme.FeaturePowerManagement, 0, 0)
		},
	},
	{
		ID: "feature.temperature.reserved", Ref: "NVMe Base 2.0c 5.27.1.3, 1.4",
		Text: "a reserved threshold type (THSEL) is Invalid Field in Command",
		run: func(c *ctl) {
			c.refused(setFeatureCmd(nvme.FeatureTemperature, 0, uint32(nvme.MakeTemperatureThreshold(400, 0, 2))), nvme.StatusInvalidField)
			c.refused(getFeatureCmd(nvme.FeatureTemperature, 0, nvme.FeatureCurrent, uint32(nvme.MakeTemperatureThreshold(0, 0, 2))), nvme.StatusInvalidField)
		},
	},
	{
		ID: "feature.queues", Ref: "NVMe Base 2.0c 5.27.1.5",
		Text: "Number of Queues grants at least one of each, and says the same again",
		run: func(c *ctl) {
			c.granted()
			got := nvme.QueueCounts(c.getFeature(nvme.FeatureQueues, 0, nvme.FeatureCurrent, 0))
			c.check(granted{got.SQs().Count(), got.CQs().Count()} == c.grant, "granted %+v, later %v SQs and %v CQs", c.grant, got.SQs(), got.CQs())
		},
	},
	{
		ID: "feature.queues.65535", Ref: "NVMe Base 2.0c 5.27.1.5",
		Text: "65535 for the number of either queue is Invalid Field in Command",
		run: func(c *ctl) {
			c.refused(setFeatureCmd(nvme.FeatureQueues, 0, 0x0000FFFF), nvme.StatusInvalidField)
			c.refused(setFeatureCmd(nvme.FeatureQueues, 0, 0xFFFF0000), nvme.StatusInvalidField)
		},
	},
	{
		ID: "feature.queues.late", Ref: "NVMe Base 2.0c 5.27.1.5",
		Text: "Number of Queues after an I/O queue was created is Command Sequence Error",
		run: func(c *ctl) {
			c.q()
			c.refused(setFeatureCmd(nvme.FeatureQueues, 0, 0x00010001), nvme.StatusSequenceError)
		},
	},
	{
		ID: "feature.vector-config.beyond", Ref: "NVMe Base 2.0c 5.27.1.7",
		Text: "Interrupt Vector Configuration of a vector that does not exist is Invalid Field in Command",
		run: func(c *ctl) {
			c.refused(setFeatureCmd(nvme.FeatureVectorConfig, 0, 0xFFFF), nvme.StatusInvalidField, nvme.StatusFeatureNotChangeable)
		},
	},
	{
		ID: "feature.error-recovery.nsid", Ref: "NVMe Base 2.0c 5.27, 3.2.1.5",
		Text:  "Error Recovery of a namespace id that is not valid is Invalid Namespace or Format",
		needs: bitNeed("NN leaves no namespace id", func(f *facts) bool { return f.id.NN < nvme.NSIDAll-1 }),
		run: func(c *ctl) {
			c.refused(setFeatureCmd(nvme.FeatureErrorRecovery, c.facts.id.NN+1, 0), nvme.StatusInvalidNamespace)
			c.refused(getFeatureCmd(nvme.FeatureErrorRecovery, c.facts.id.NN+1, nvme.FeatureCurrent, 0), nvme.StatusInvalidNamespace)
		},
	},
	{
		ID: "feature.error-recovery.inactive", Ref: "NVMe Base 2.0c 5.27, 3.2.1.5", needs: needHole,
		Text: "Error Recovery of an inactive namespace id is Invalid Field in Command",
		run: func(c *ctl) {
			c.refused(setFeatureCmd(nvme.FeatureErrorRecovery, c.facts.inactive(), 0), nvme.StatusInvalidField)
			c.refused(getFeatureCmd(nvme.FeatureErrorRecovery, c.facts.inactive(), nvme.FeatureCurrent, 0), nvme.StatusInvalidField)
		},
	},
	{
		ID: "feature.write-cache", Ref: "NVMe Base 2.0c 5.27.1.4", needs: needVWC,
		Text: "Volatile Write Cache keeps WCE, or is Feature Not Changeable",
		run: func(c *ctl) {
			before := c.getFeature(nvme.FeatureWriteCache, 0, nvme.FeatureCurrent, 0)
			cmd := setFeatureCmd(nvme.FeatureWriteCache, 0, before^1)
			cpl := c.adm.exec(cmd)
			c.adm.want(&cmd, cpl, nvme.StatusSuccess, nvme.StatusFeatureNotChangeable)
			want := before
			if cpl.Status().OK() {
				want ^= 1
			}
			got := c.getFeature(nvme.FeatureWriteCache, 0, nvme.FeatureCurrent, 0)
			c.check(got&1 == want&1, "WCE=%d, want %d", got&1, want&1)
			if cpl.Status().OK() {
				c.setFeature(nvme.FeatureWriteCache, 0, before)
			}
		},
	},
	{
		ID: "feature.write-cache.absent", Ref: "NVMe Base 2.0c 5.27.1.4", needs: needNoVWC,
		Text: "without a volatile write cache, the feature is Invalid Field in Command",
		run: func(c *ctl) {
			c.refused(setFeatureCmd(nvme.FeatureWriteCache, 0, 1), nvme.StatusInvalidField)
		},
	},
	{
		ID: "feature.timestamp", Ref: "NVMe Base 2.0c 5.27.1.11", needs: oncs(nvme.ONCSTimestamp, "Timestamp"),
		Text: "Timestamp goes on from what was set, and says that the host set it",
		run: func(c *ctl) {
			const at = 1_700_000_000_000
			t := nvme.MakeTimestamp(at, 0)
			d := c.data(8).set(t[:])
			c.ok(d.on(setFeatureCmd(nvme.FeatureTimestamp, 0, 0)))
			begin := time.Now()
			d.set(make([]byte, 8))
			c.ok(d.on(getFeatureCmd(nvme.FeatureTimestamp, 0, nvme.FeatureCurrent, 0)))
			got := nvme.Timestamp(d.get())
			late := got.Milliseconds() - at
			c.check(late <= uint64(time.Since(begin).Milliseconds())+2000, "it is %d ms, %d ms from what was set", got.Milliseconds(), int64(late))
			c.check(got.Attributes()>>nvme.TimestampOriginShift&7 == nvme.TimestampOriginHost, "attributes %#x, want origin 001b", got.Attributes())
		},
	},
	{
		ID: "feature.apst", Ref: "NVMe Base 2.0c 5.27.1.10", needs: bitNeed("APSTA is 0", func(f *facts) bool { return f.id.APSTA&1 != 0 }),
		Text: "Autonomous Power State Transition keeps APSTE",
		run: func(c *ctl) {
			table := make([]byte, 256)
			d := c.data(256).set(table)
			before := c.ok(d.on(getFeatureCmd(nvme.FeatureAPST, 0, nvme.FeatureCurrent, 0))).Result
			was := d.get()
			d.set(table)
			c.ok(d.on(setFeatureCmd(nvme.FeatureAPST, 0, 0)))
			got := c.ok(d.on(getFeatureCmd(nvme.FeatureAPST, 0, nvme.FeatureCurrent, 0))).Result
			c.check(got&1 == 0, "APSTE=%d after 0 was set", got&1)
			c.ok(d.set(was).on(setFeatureCmd(nvme.FeatureAPST, 0, before)))
		},
	},
	{
		ID: "feature.host-id", Ref: "NVMe Base 2.0c 5.27.1.25", needs: join(oncs(nvme.ONCSReservations, "Reservations"), needHostID),
		Text: "Host Identifier keeps its 128 bits",
		run: func(c *ctl) {
			id := pattern(7, 16)
			c.setHostID(id)
			d := c.data(16)
			c.ok(d.on(getFeatureCmd(nvme.FeatureHostID, 0, nvme.FeatureCurrent, 1)))
			c.check(string(d.get()) == string(id), "it is %x, set %x", d.get(), id)
		},
	},
	{
		ID: "feature.host-behavior", Ref: "NVMe Base 2.0c 5.27.1.18",
		Text: "Host Behavior Support keeps ACRE, where there is such a feature",
		run: func(c *ctl) {
			d := c.data(512)
			if cpl := c.adm.exec(d.on(getFeatureCmd(nvme.FeatureHostBehavior, 0, nvme.FeatureCurrent, 0))); !cpl.Status().OK() {
				c.skipf("there is no feature 16h")
			}
			p := make([]byte, 512)
			p[0] = 1
			c.ok(d.set(p).on(setFeatureCmd(nvme.FeatureHostBehavior, 0, 0)))
			d.set(make([]byte, 512))
			c.ok(d.on(getFeatureCmd(nvme.FeatureHostBehavior, 0, nvme.FeatureCurrent, 0)))
			c.check(d.get()[0] == 1, "ACRE=%d after 1 was set", d.get()[0])
		},
	},
}

// mandatoryFeatures are those of every I/O controller. NVMe Base 2.0c 3.1.2.1.3.
var mandatoryFeatures = []nvme.FeatureID{
	nvme.FeatureArbitration, nvme.FeaturePowerManagement, nvme.FeatureTemperature, nvme.FeatureErrorRecovery, nvme.FeatureQueues,
	nvme.FeatureCoalescing, nvme.FeatureVectorConfig, nvme.FeatureWriteAtomicity, nvme.FeatureAsyncEvents,
}

// roundTrip is a feature, a value to set and the bits of it that must come back.
type roundTrip struct {
	fid         nvme.FeatureID
	value, mask uint32
}

var roundTrips = []roundTrip{
	{nvme.FeatureArbitration, 3, 7},
	{nvme.FeatureTemperature, uint32(nvme.MakeTemperatureThreshold(400, 0, nvme.TempOver)), 0xFFFF},
	{nvme.FeatureErrorRecovery, 5, 0xFFFF},
	{nvme.FeatureCoalescing, 0x0203, 0xFFFF},
	{nvme.FeatureVectorConfig, 1 << 16, 0x1FFFF},
	{nvme.FeatureWriteAtomicity, 1, 1},
	{nvme.FeatureAsyncEvents, nvme.SMARTWarningTemperature | nvme.SMARTWarningReliability, 0xFF},
}

// roundTrip sets a feature and reads it, and sets it back. One that cannot be changed must say so.
func (c *ctl) roundTrip(fid nvme.FeatureID) {
	var f roundTrip
	for _, r := range roundTrips {
		if r.fid == fid {
			f = r
		}
	}
	nsid := c.featureNSID(fid)
	before := c.getFeature(fid, nsid, nvme.FeatureCurrent, f.value)
	if !c.changeable(fid, nsid, f.value) {
		c.refused(setFeatureCmd(fid, nsid, f.value), nvme.StatusFeatureNotChangeable)
		return
	}
	value := f.value
	if fid == nvme.FeatureVectorConfig && c.facts.vectors > 1 {
		value |= 1 // vector 0's interrupts are never coalesced
	}
	c.setFeature(fid, nsid, value)
	got := c.getFeature(fid, nsid, nvme.FeatureCurrent, value)
	c.check(got&f.mask == value&f.mask, "%v is %#x after %#x was set", fid, got, value)
	c.setFeature(fid, nsid, before|value&^f.mask)
}

// changeable says whether a feature can be changed, as far as the controller tells.
func (c *ctl) changeable(fid nvme.FeatureID, nsid, cdw11 uint32) bool {
	return c.facts.id.ONCS&nvme.ONCSSaveSelect == 0 || c.getFeature(fid, nsid, nvme.FeatureSupported, cdw11)&nvme.FeatureCapChangeable != 0
}

// saved sets and saves a feature, resets the controller, looks, and puts it back.
func (c *ctl) saved(f roundTrip) {
	nsid := c.featureNSID(f.fid)
	before := c.getFeature(f.fid, nsid, nvme.FeatureSaved, f.value)
	save := func(v uint32) {
		cmd := setFeatureCmd(f.fid, nsid, v)
		cmd.CDW10 |= 1 << 31
		c.ok(cmd)
	}
	save(f.value)
	c.disable()
	c.enable(setup{})
	current, saved := c.getFeature(f.fid, nsid, nvme.FeatureCurrent, f.value), c.getFeature(f.fid, nsid, nvme.FeatureSaved, f.value)
	save(before)
	c.check(current&f.mask == f.value&f.mask && saved&f.mask == f.value&f.mask, "%v is %#x, saved %#x, after %#x was saved", f.fid, current, saved, f.value)
}

// featureNSID is the namespace id that Get and Set Features of fid take.
func (c *ctl) featureNSID(fid nvme.FeatureID) uint32 {
	if fid == nvme.FeatureErrorRecovery {
		return c.facts.nsid
	}
	return 0
}

func getFeatureCmd(fid nvme.FeatureID, nsid uint32, sel nvme.FeatureSelect, cdw11 uint32) (cmd nvme.Command) {
	cmd.SetGetFeatures(fid, nsid, sel)
	cmd.CDW11 = cdw11
	return cmd
}

func setFeatureCmd(fid nvme.FeatureID, nsid, value uint32) (cmd nvme.Command) {
	cmd.SetSetFeatures(fid, nsid, value)
	return cmd
}

// getFeature returns DW0; it must succeed. cdw11 selects what of the feature is meant, for those that have several of it.
func (c *ctl) getFeature(fid nvme.FeatureID, nsid uint32, sel nvme.FeatureSelect, cdw11 uint32) uint32 {
	return c.ok(getFeatureCmd(fid, nsid, sel, cdw11)).Result
}

func (c *ctl) setFeature(fid nvme.FeatureID, nsid, value uint32) {
	c.ok(setFeatureCmd(fid, nsid, value))
}

// setHostID sets the extended host identifier.
func (c *ctl) setHostID(id []byte) {
	c.ok(c.data(uint64(len(id))).set(id).on(setFeatureCmd(nvme.FeatureHostID, 0, 1)))
}

var le = binary.LittleEndian
