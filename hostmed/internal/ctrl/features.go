package ctrl

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Get and Set Features. NVMe Base 2.0c 4.4, 5.15 and 5.27, NVM Command Set 1.0c 4.1.3.
//
// The value of a feature is 32 bits, or several of those: one for each namespace, vector or threshold, told apart by featureKey.sub.
// The current value is what was set since the last reset, else what was saved, else the default.
// Features whose value is a data structure are in featuredata.go.

// featureKey is one 32-bit value of a feature.
type featureKey struct {
	fid nvme.FeatureID
	sub uint32 // NSID, vector, type of a temperature threshold; 0 for features of one value
}

// MarshalText is the name of the value in saved state: "04/1", the feature in hexadecimal.
func (k featureKey) MarshalText() ([]byte, error) {
	return fmt.Appendf(nil, "%02x/%d", uint8(k.fid), k.sub), nil
}

func (k *featureKey) UnmarshalText(b []byte) error {
	fid, sub, ok := strings.Cut(string(b), "/")
	f, err1 := strconv.ParseUint(fid, 16, 8)
	s, err2 := strconv.ParseUint(sub, 10, 32)
	if !ok || err1 != nil || err2 != nil {
		return fmt.Errorf("%q is not a feature", b)
	}
	*k = featureKey{nvme.FeatureID(f), uint32(s)}
	return nil
}

// features is what was set since the last reset.
type features struct {
	now   map[featureKey]uint32
	data  featureData
	quiet bool // FeatureQuiet, for those who look often
	power powerAccount
}

func (c *Controller) feature(fid nvme.FeatureID) uint32 { return c.featureOf(featureKey{fid: fid}) }

// featureOf returns the current value.
func (c *Controller) featureOf(k featureKey) uint32 {
	if v, ok := c.feat.now[k]; ok {
		return v
	}
	return c.featureSaved(k)
}

func (c *Controller) featureSaved(k featureKey) uint32 {
	if v, ok := c.cfg.Persistent.savedFeature(k); ok {
		return v
	}
	return c.featureDefault(k)
}

func (c *Controller) featureDefault(k featureKey) uint32 {
	switch k.fid {
	case nvme.FeatureArbitration:
		return 7 // AB: no limit
	case nvme.FeatureTemperature:
		if k.sub == nvme.TempOver {
			return warningTemperature
		}
	case nvme.FeatureWriteCache:
		return nvme.WriteCacheEnabled
	case nvme.FeatureQueues:
		most, _ := nvme.ToZeroBased16(uint32(c.cfg.MaxIOQueues))
		return uint32(nvme.MakeQueueCounts(most, most))
	case nvme.FeatureVectorConfig:
		return k.sub
	}
	return 0
}

// queueCounts is how many I/O queues the host may make.
func (c *Controller) queueCounts() nvme.QueueCounts {
	return nvme.QueueCounts(c.feature(nvme.FeatureQueues))
}

func (c *Controller) eventConfig() nvme.EventConfig {
	return nvme.EventConfig(c.feature(nvme.FeatureAsyncEvents))
}

// resetFeatures forgets what was set, in the data path too.
func (c *Controller) resetFeatures() {
	if c.feat.quiet {
		c.dp.SetQuiet(false)
	}
	if c.feature(nvme.FeatureCoalescing) != 0 {
		c.dp.SetCoalescing(0, 0)
	}
	if c.feature(nvme.FeatureWriteCache)&nvme.WriteCacheEnabled == 0 {
		c.dp.SetWriteCache(true)
	}
	for v := range c.cfg.Vectors {
		if c.uncoalesced(v) {
			c.dp.SetVectorConfig(v, false)
		}
	}
	for i := range c.cfg.Namespaces {
		if n := &c.cfg.Namespaces[i]; c.dulbe(n) {
			c.dp.SetDULBE(n.NSID, false)
		}
	}
	c.feat = c.newFeatures()
}

func (c *Controller) newFeatures() features {
	return features{now: map[featureKey]uint32{}, data: c.newFeatureData()}
}

// applyFeatures tells the data path of features that were saved, when the controller is enabled.
func (c *Controller) applyFeatures() {
	c.enterPowerState(nvme.PowerManagement(c.feature(nvme.FeaturePowerManagement)).PS())
	if v := nvme.Coalescing(c.feature(nvme.FeatureCoalescing)); v != 0 {
		c.dp.SetCoalescing(uint8(v.Threshold()), v.Time100us())
	}
	if c.feature(nvme.FeatureWriteCache)&nvme.WriteCacheEnabled == 0 {
		c.dp.SetWriteCache(false)
	}
	c.applyArbitration(c.feature(nvme.FeatureArbitration))
	for v := range c.cfg.Vectors {
		if c.uncoalesced(v) {
			c.dp.SetVectorConfig(v, true)
		}
	}
	c.applyDULBE()
}

// dulbe says whether reads of what is not allocated in n fail.
func (c *Controller) dulbe(n *Namespace) bool {
	return n.Info.Maps && nvme.ErrorRecovery(c.featureOf(featureKey{nvme.FeatureErrorRecovery, n.NSID})).DULBE()
}

func (c *Controller) applyDULBE() {
	for i := range c.cfg.Namespaces {
		n := &c.cfg.Namespaces[i]
		c.dp.SetDULBE(n.NSID, c.dulbe(n))
	}
}

func (c *Controller) uncoalesced(vector uint16) bool {
	return nvme.VectorConfig(c.featureOf(featureKey{nvme.FeatureVectorConfig, uint32(vector)})).CoalescingDisabled()
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
	case nvme.FeatureArbitration, nvme.FeaturePowerManagement, nvme.FeatureTemperature, nvme.FeatureCoalescing,
		nvme.FeatureVectorConfig, nvme.FeatureWriteAtomicity, nvme.FeatureAsyncEvents, nvme.FeatureAPST:
		return nvme.FeatureCapChangeable | nvme.FeatureCapSaveable, true
	case nvme.FeatureErrorRecovery:
		return nvme.FeatureCapChangeable | nvme.FeatureCapSaveable | nvme.FeatureCapNamespace, true
	case nvme.FeatureQueues, nvme.FeatureTimestamp, nvme.FeatureKeepAlive, nvme.FeatureHostBehavior, nvme.FeatureCommandSetProfile:
		return nvme.FeatureCapChangeable, true
	case nvme.FeatureWriteCache:
		return nvme.FeatureCapChangeable | nvme.FeatureCapSaveable, c.writeCache()
	case nvme.FeatureWriteProtect:
		return nvme.FeatureCapChangeable | nvme.FeatureCapNamespace, c.cfg.Self != nil
	case nvme.FeatureHostID:
		return nvme.FeatureCapChangeable, c.cfg.Self != nil
	case nvme.FeatureReservationNotice, nvme.FeatureReservationPersist:
		return nvme.FeatureCapChangeable | nvme.FeatureCapNamespace, c.reserves()
	case nvme.FeatureQuiet:
		return nvme.FeatureCapChangeable, c.quietSupported()
	}
	return 0, false
}

func (c *Controller) getFeatures(cmd *nvme.Command) result {
	caps, ok := c.featureCaps(cmd.FID())
	if !ok {
		return fail(nvme.StatusInvalidField, dword(10, 0), "no such feature")
	}
	if caps&nvme.FeatureCapNamespace != 0 && c.namespace(cmd.NSID) == nil {
		return c.notAttached(cmd.NSID)
	}
	var value func(featureKey) uint32
	switch cmd.FeatureSelect() {
	case nvme.FeatureCurrent:
		value = c.featureOf
	case nvme.FeatureDefault:
		value = c.featureDefault
	case nvme.FeatureSaved:
		value = c.featureSaved
	case nvme.FeatureSupported:
		return result{dw0: caps}
	default:
		return fail(nvme.StatusInvalidField, dword(10, 8), "reserved value of SEL")
	}
	k := featureKey{fid: cmd.FID()}
	switch k.fid {
	case nvme.FeatureTimestamp, nvme.FeatureHostBehavior, nvme.FeatureAPST:
		return c.getFeatureData(cmd)
	case nvme.FeaturePowerManagement:
		if cmd.FeatureSelect() == nvme.FeatureCurrent {
			return result{dw0: c.powerState()}
		}
	case nvme.FeatureTemperature:
		t := nvme.TemperatureThreshold(cmd.CDW11)
		if r := checkThreshold(t, t.Sensor() == nvme.TempSensorComposite); !r.status.OK() {
			return r
		}
		k.sub = uint32(t.Type())
	case nvme.FeatureWriteProtect:
		return c.getWriteProtect(cmd)
	case nvme.FeatureHostID:
		return c.getHostID(cmd)
	case nvme.FeatureReservationPersist:
		return c.getPersist(cmd)
	case nvme.FeatureErrorRecovery, nvme.FeatureReservationNotice:
		k.sub = cmd.NSID
	case nvme.FeatureVectorConfig:
		if k.sub = uint32(nvme.VectorConfig(cmd.CDW11).Vector()); k.sub >= uint32(c.cfg.Vectors) {
			return fail(nvme.StatusInvalidField, dword(11, 0), "no such interrupt vector")
		}
	}
	return result{dw0: value(k)}
}

func checkThreshold(t nvme.TemperatureThreshold, sensor bool) result {
	switch {
	case !sensor:
		return fail(nvme.StatusInvalidField, dword(11, 16), "no such temperature sensor")
	case t.Type() != nvme.TempOver && t.Type() != nvme.TempUnder:
		return fail(nvme.StatusInvalidField, dword(11, 20), "reserved value of THSEL")
	}
	return result{}
}

func (c *Controller) setFeatures(cmd *nvme.Command) result {
	caps, ok := c.featureCaps(cmd.FID())
	switch {
	case !ok:
		return fail(nvme.StatusInvalidField, dword(10, 0), "no such feature")
	case cmd.FeatureSave() && caps&nvme.FeatureCapSaveable == 0:
		return fail(nvme.StatusFeatureNotSaveable, dword(10, 31), "the feature cannot be saved")
	}
	if cmd.NSID != nvme.NSIDAll {
		perNamespace := caps&nvme.FeatureCapNamespace != 0
		switch exists := c.namespace(cmd.NSID) != nil; {
		case perNamespace && !exists, cmd.NSID != 0 && !exists:
			return c.notAttached(cmd.NSID)
		case !perNamespace && exists:
			return fail(nvme.StatusFeatureNotPerNamespace, inNSID, "the feature belongs to the controller")
		}
	}
	switch cmd.FID() {
	case nvme.FeatureTimestamp, nvme.FeatureHostBehavior, nvme.FeatureAPST:
		return c.setFeatureData(cmd)
	case nvme.FeatureWriteProtect:
		return c.setWriteProtect(cmd)
	case nvme.FeatureHostID:
		return c.setHostID(cmd)
	case nvme.FeatureReservationPersist:
		return c.setPersist(cmd)
	}
	values := map[featureKey]uint32{}
	r := c.checkFeature(cmd, values)
	if !r.status.OK() {
		return r
	}
	for k, v := range values {
		c.feat.now[k] = v
		c.applyFeature(k.fid, v)
	}
	if cmd.FeatureSave() {
		c.cfg.Persistent.saveFeatures(values)
	}
	if v, ok := values[featureKey{fid: nvme.FeatureWriteCache}]; ok && v&nvme.WriteCacheEnabled == 0 {
		return c.emptyCache(cmd)
	}
	return r
}

// emptyCache completes the command that turned the write cache off when what was in it is durable.
func (c *Controller) emptyCache(cmd *nvme.Command) result {
	return c.background(cmd, c.dp.Flush, func(err error) result {
		if err != nil {
			return failErr(nvme.StatusInternalError, nowhere, "flush of the write cache", err)
		}
		return result{}
	})
}

// checkFeature checks what Set Features asks for, and puts what is to be set in values.
func (c *Controller) checkFeature(cmd *nvme.Command, values map[featureKey]uint32) result {
	k, v := featureKey{fid: cmd.FID()}, cmd.CDW11
	switch k.fid {
	case nvme.FeatureArbitration:
		v &^= 0xf8
	case nvme.FeaturePowerManagement:
		if int(nvme.PowerManagement(v).PS()) >= len(powerStates) {
			return fail(nvme.StatusInvalidField, dword(11, 0), "no such power state")
		}
		v &= 0xff
	case nvme.FeatureTemperature:
		t := nvme.TemperatureThreshold(v)
		if r := checkThreshold(t, t.Sensor() == nvme.TempSensorComposite || t.Sensor() == nvme.TempSensorAll); !r.status.OK() {
			return r
		}
		k.sub, v = uint32(t.Type()), uint32(t.Kelvin())
	case nvme.FeatureErrorRecovery:
		for i := range c.cfg.Namespaces {
			n := &c.cfg.Namespaces[i]
			if cmd.NSID != n.NSID && cmd.NSID != nvme.NSIDAll {
				continue
			}
			if nvme.ErrorRecovery(v).DULBE() && !n.Info.Maps {
				return fail(nvme.StatusInvalidField, dword(11, 16), "the namespace has no NSFEAT.DAE")
			}
			values[featureKey{k.fid, n.NSID}] = v & (1<<17 - 1)
		}
		return result{}
	case nvme.FeatureReservationNotice:
		for i := range c.cfg.Namespaces {
			if n := &c.cfg.Namespaces[i]; n.reservable() && (cmd.NSID == n.NSID || cmd.NSID == nvme.NSIDAll) {
				values[featureKey{k.fid, n.NSID}] = v & 0xe
			}
		}
		return result{}
	case nvme.FeatureWriteCache:
		v &= nvme.WriteCacheEnabled
	case nvme.FeatureQueues:
		return c.checkQueues(nvme.QueueCounts(v), values)
	case nvme.FeatureCoalescing:
		v &= 0xffff
	case nvme.FeatureVectorConfig:
		if k.sub = uint32(nvme.VectorConfig(v).Vector()); k.sub >= uint32(c.cfg.Vectors) {
			return fail(nvme.StatusInvalidField, dword(11, 0), "no such interrupt vector")
		}
		v &= 1<<17 - 1
	case nvme.FeatureWriteAtomicity:
		v &= nvme.WriteAtomicityDisableNormal
	case nvme.FeatureAsyncEvents:
		v &= uint32(supportedEvents)
	case nvme.FeatureKeepAlive:
		v = keepAliveTimeout(v)
	case nvme.FeatureCommandSetProfile:
		if v &= 0x1ff; v != 0 {
			return fail(nvme.StatusCommandSetRejected, dword(11, 0), "Identify lists one combination of command sets")
		}
	case nvme.FeatureQuiet:
		v &= nvme.FeatureQuietOn
	}
	values[k] = v
	return result{}
}

// checkQueues grants what was asked for, up to what there is.
func (c *Controller) checkQueues(ask nvme.QueueCounts, values map[featureKey]uint32) result {
	if c.queues.any() {
		return fail(nvme.StatusSequenceError, dword(10, 0), "there are I/O queues")
	}
	if !ask.Valid() {
		return fail(nvme.StatusInvalidField, dword(11, 0), "65536 queues")
	}
	most, _ := nvme.ToZeroBased16(uint32(c.cfg.MaxIOQueues))
	granted := uint32(nvme.MakeQueueCounts(min(ask.SQs(), most), min(ask.CQs(), most)))
	values[featureKey{fid: nvme.FeatureQueues}] = granted
	return result{dw0: granted}
}

// applyArbitration tells the data path of weights, where CC chose that they count.
func (c *Controller) applyArbitration(v uint32) {
	if c.regs.cc.AMS() == nvme.AMSWeighted {
		c.dp.SetArbitration(true, nvme.Arbitration(v))
	}
}

// applyFeature does what a value that was just set asks for.
func (c *Controller) applyFeature(fid nvme.FeatureID, v uint32) {
	switch fid {
	case nvme.FeatureTemperature:
		c.checkHealth()
	case nvme.FeatureAsyncEvents:
		c.checkHealth()
		c.followHealth()
	case nvme.FeaturePowerManagement:
		c.enterPowerState(nvme.PowerManagement(v).PS())
	case nvme.FeatureKeepAlive:
		c.startKeepAlive()
	case nvme.FeatureCoalescing:
		x := nvme.Coalescing(v)
		c.dp.SetCoalescing(uint8(x.Threshold()), x.Time100us())
	case nvme.FeatureArbitration:
		c.applyArbitration(v)
	case nvme.FeatureVectorConfig:
		x := nvme.VectorConfig(v)
		c.dp.SetVectorConfig(x.Vector(), x.CoalescingDisabled())
	case nvme.FeatureWriteCache:
		c.dp.SetWriteCache(v&nvme.WriteCacheEnabled != 0)
	case nvme.FeatureErrorRecovery:
		c.applyDULBE()
	case nvme.FeatureQuiet:
		c.feat.quiet = v&nvme.FeatureQuietOn != 0
		c.dp.SetQuiet(c.feat.quiet)
	}
}
