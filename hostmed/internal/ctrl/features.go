package ctrl

import (
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Get and Set Features. NVMe Base 2.0c 5.15 and 5.27, NVM Command Set 1.0c 4.1.3.
//
// No feature can be saved: Set Features with SV fails, and the saved value that Get Features returns is the default. A
// reset puts every feature back.

// features are the values that can be set.
type features struct {
	arbitration    uint32
	power          nvme.PowerManagement
	tempOver       uint16 // kelvin
	tempUnder      uint16
	errorRecovery  map[uint32]nvme.ErrorRecovery // by NSID; absent: 0
	queues         nvme.QueueCounts              // granted
	coalescing     nvme.Coalescing
	uncoalesced    map[uint16]bool // vectors with coalescing disabled
	writeAtomicity uint32
	events         nvme.EventConfig
	quiet          bool

	timestamp       uint64 // milliseconds, when it was set
	timestampSet    time.Time
	timestampOrigin uint8
}

func (c *Controller) defaultFeatures() features {
	most, _ := nvme.ToZeroBased16(uint32(c.cfg.MaxIOQueues))
	return features{
		arbitration:  7, // AB: no limit
		tempOver:     warningTemperature,
		queues:       nvme.MakeQueueCounts(most, most),
		timestampSet: c.now(),
	}
}

// resetFeatures puts the defaults back, in the data path too.
func (c *Controller) resetFeatures() {
	if c.feat.quiet {
		c.dp.SetQuiet(false)
	}
	if c.feat.coalescing != 0 {
		c.dp.SetCoalescing(0, 0)
	}
	for v := range c.feat.uncoalesced {
		c.dp.SetVectorConfig(v, false)
	}
	c.feat = c.defaultFeatures()
}

// quietSupported says that doorbells are words in memory, where FeatureQuiet's bit can be.
func (c *Controller) quietSupported() bool { return c.cfg.Mode != Trap }

func (c *Controller) writeCache() bool {
	for i := range c.cfg.Namespaces {
		if c.cfg.Namespaces[i].Info.VolatileCache {
			return true
		}
	}
	return false
}

// featureCaps returns the FeatureCap bits of a feature; ok is false if there is no such feature.
func (c *Controller) featureCaps(fid nvme.FeatureID) (caps uint32, ok bool) {
	switch fid {
	case nvme.FeatureArbitration, nvme.FeaturePowerManagement, nvme.FeatureTemperature, nvme.FeatureQueues, nvme.FeatureCoalescing,
		nvme.FeatureVectorConfig, nvme.FeatureWriteAtomicity, nvme.FeatureAsyncEvents, nvme.FeatureTimestamp:
		return nvme.FeatureCapChangeable, true
	case nvme.FeatureErrorRecovery:
		return nvme.FeatureCapChangeable | nvme.FeatureCapNamespace, true
	case nvme.FeatureWriteCache:
		return 0, c.writeCache() // it is always on
	case nvme.FeatureQuiet:
		return nvme.FeatureCapChangeable, c.quietSupported()
	}
	return 0, false
}

func (c *Controller) getFeatures(cmd *nvme.Command) result {
	fid := cmd.FID()
	caps, ok := c.featureCaps(fid)
	if !ok {
		return fail(nvme.StatusInvalidField, dword(10, 0), "no such feature")
	}
	if caps&nvme.FeatureCapNamespace != 0 && c.namespace(cmd.NSID) == nil {
		return fail(nvme.StatusInvalidNamespace, inNSID, "no such namespace")
	}
	var f features
	switch cmd.FeatureSelect() {
	case nvme.FeatureCurrent:
		f = c.feat
	case nvme.FeatureDefault, nvme.FeatureSaved:
		f = c.defaultFeatures()
	case nvme.FeatureSupported:
		return result{dw0: caps}
	default:
		return fail(nvme.StatusInvalidField, dword(10, 8), "reserved value of SEL")
	}
	return c.featureValue(&f, cmd)
}

// featureValue answers Get Features from f, the current or the default values.
func (c *Controller) featureValue(f *features, cmd *nvme.Command) result {
	switch cmd.FID() {
	case nvme.FeatureArbitration:
		return result{dw0: f.arbitration}
	case nvme.FeaturePowerManagement:
		return result{dw0: uint32(f.power)}
	case nvme.FeatureTemperature:
		t := nvme.TemperatureThreshold(cmd.CDW11)
		switch {
		case t.Sensor() != nvme.TempSensorComposite:
			return fail(nvme.StatusInvalidField, dword(11, 16), "no such temperature sensor")
		case t.Type() == nvme.TempOver:
			return result{dw0: uint32(f.tempOver)}
		case t.Type() == nvme.TempUnder:
			return result{dw0: uint32(f.tempUnder)}
		}
		return fail(nvme.StatusInvalidField, dword(11, 20), "reserved value of THSEL")
	case nvme.FeatureErrorRecovery:
		return result{dw0: uint32(f.errorRecovery[cmd.NSID])}
	case nvme.FeatureWriteCache:
		return result{dw0: nvme.WriteCacheEnabled}
	case nvme.FeatureQueues:
		return result{dw0: uint32(f.queues)}
	case nvme.FeatureCoalescing:
		return result{dw0: uint32(f.coalescing)}
	case nvme.FeatureVectorConfig:
		v := nvme.VectorConfig(cmd.CDW11).Vector()
		if v >= c.cfg.Vectors {
			return fail(nvme.StatusInvalidField, dword(11, 0), "no such interrupt vector")
		}
		return result{dw0: uint32(nvme.MakeVectorConfig(v, f.uncoalesced[v]))}
	case nvme.FeatureWriteAtomicity:
		return result{dw0: f.writeAtomicity}
	case nvme.FeatureAsyncEvents:
		return result{dw0: uint32(f.events)}
	case nvme.FeatureTimestamp:
		now := f.timestamp + uint64(c.now().Sub(f.timestampSet).Milliseconds())
		t := nvme.MakeTimestamp(now, f.timestampOrigin<<nvme.TimestampOriginShift)
		return c.toHost(cmd, t[:])
	case nvme.FeatureQuiet:
		if f.quiet {
			return result{dw0: nvme.FeatureQuietOn}
		}
		return result{}
	}
	return fail(nvme.StatusInvalidField, dword(10, 0), "no such feature")
}

func (c *Controller) setFeatures(cmd *nvme.Command) result {
	caps, ok := c.featureCaps(cmd.FID())
	switch {
	case !ok:
		return fail(nvme.StatusInvalidField, dword(10, 0), "no such feature")
	case cmd.FeatureSave():
		return fail(nvme.StatusFeatureNotSaveable, dword(10, 31), "no feature can be saved")
	}
	if cmd.NSID != nvme.NSIDAll {
		perNamespace := caps&nvme.FeatureCapNamespace != 0
		switch exists := c.namespace(cmd.NSID) != nil; {
		case perNamespace && !exists, cmd.NSID != 0 && !exists:
			return fail(nvme.StatusInvalidNamespace, inNSID, "no such namespace")
		case !perNamespace && exists:
			return fail(nvme.StatusFeatureNotPerNamespace, inNSID, "the feature belongs to the controller")
		}
	}
	return c.setFeature(cmd)
}

func (c *Controller) setFeature(cmd *nvme.Command) result {
	f, v := &c.feat, cmd.CDW11
	switch cmd.FID() {
	case nvme.FeatureArbitration:
		f.arbitration = v &^ 0xf8
	case nvme.FeaturePowerManagement:
		p := nvme.PowerManagement(v)
		if p.PS() != 0 {
			return fail(nvme.StatusInvalidField, dword(11, 0), "there is only power state 0")
		}
		f.power = p & 0xff
	case nvme.FeatureTemperature:
		return c.setTemperature(nvme.TemperatureThreshold(v))
	case nvme.FeatureErrorRecovery:
		return c.setErrorRecovery(cmd.NSID, nvme.ErrorRecovery(v))
	case nvme.FeatureWriteCache:
		if v&nvme.WriteCacheEnabled == 0 {
			return fail(nvme.StatusFeatureNotChangeable, dword(11, 0), "the write cache cannot be turned off")
		}
	case nvme.FeatureQueues:
		return c.setQueues(nvme.QueueCounts(v))
	case nvme.FeatureCoalescing:
		f.coalescing = nvme.Coalescing(v & 0xffff)
		c.dp.SetCoalescing(uint8(f.coalescing.Threshold()), f.coalescing.Time100us())
	case nvme.FeatureVectorConfig:
		return c.setVectorConfig(nvme.VectorConfig(v))
	case nvme.FeatureWriteAtomicity:
		f.writeAtomicity = v & nvme.WriteAtomicityDisableNormal
	case nvme.FeatureAsyncEvents:
		f.events = nvme.EventConfig(v) & supportedEvents
		c.checkHealth()
	case nvme.FeatureTimestamp:
		return c.setTimestamp(cmd)
	case nvme.FeatureQuiet:
		f.quiet = v&nvme.FeatureQuietOn != 0
		c.dp.SetQuiet(f.quiet)
	}
	return result{}
}

func (c *Controller) setTemperature(t nvme.TemperatureThreshold) result {
	if s := t.Sensor(); s != nvme.TempSensorComposite && s != nvme.TempSensorAll {
		return fail(nvme.StatusInvalidField, dword(11, 16), "no such temperature sensor")
	}
	switch t.Type() {
	case nvme.TempOver:
		c.feat.tempOver = t.Kelvin()
	case nvme.TempUnder:
		c.feat.tempUnder = t.Kelvin()
	default:
		return fail(nvme.StatusInvalidField, dword(11, 20), "reserved value of THSEL")
	}
	c.checkHealth()
	return result{}
}

func (c *Controller) setErrorRecovery(nsid uint32, e nvme.ErrorRecovery) result {
	if e.DULBE() {
		return fail(nvme.StatusInvalidField, dword(11, 16), "no namespace has NSFEAT.DAE")
	}
	if c.feat.errorRecovery == nil {
		c.feat.errorRecovery = map[uint32]nvme.ErrorRecovery{}
	}
	for i := range c.cfg.Namespaces {
		if id := c.cfg.Namespaces[i].NSID; nsid == id || nsid == nvme.NSIDAll {
			c.feat.errorRecovery[id] = e & 0xffff
		}
	}
	return result{}
}

// setQueues grants what was asked for, up to what there is.
func (c *Controller) setQueues(ask nvme.QueueCounts) result {
	if c.queues.any() {
		return fail(nvme.StatusSequenceError, dword(10, 0), "there are I/O queues")
	}
	if !ask.Valid() {
		return fail(nvme.StatusInvalidField, dword(11, 0), "65536 queues")
	}
	most, _ := nvme.ToZeroBased16(uint32(c.cfg.MaxIOQueues))
	c.feat.queues = nvme.MakeQueueCounts(min(ask.SQs(), most), min(ask.CQs(), most))
	return result{dw0: uint32(c.feat.queues)}
}

func (c *Controller) setVectorConfig(v nvme.VectorConfig) result {
	if v.Vector() >= c.cfg.Vectors {
		return fail(nvme.StatusInvalidField, dword(11, 0), "no such interrupt vector")
	}
	if c.feat.uncoalesced == nil {
		c.feat.uncoalesced = map[uint16]bool{}
	}
	if v.CoalescingDisabled() {
		c.feat.uncoalesced[v.Vector()] = true
	} else {
		delete(c.feat.uncoalesced, v.Vector())
	}
	c.dp.SetVectorConfig(v.Vector(), v.CoalescingDisabled())
	return result{}
}

func (c *Controller) setTimestamp(cmd *nvme.Command) result {
	t := new(nvme.Timestamp)
	if r := c.fromHost(cmd, t[:]); !r.status.OK() {
		return r
	}
	c.feat.timestamp = t.Milliseconds()
	c.feat.timestampSet = c.now()
	c.feat.timestampOrigin = nvme.TimestampOriginHost
	return result{}
}
