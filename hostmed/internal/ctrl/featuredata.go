package ctrl

import (
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Features whose value is a data structure.

// featureData is what was set since the last reset.
type featureData struct {
	since           time.Time // the reset
	timestamp       uint64    // milliseconds, when it was set
	timestampSet    time.Time
	timestampOrigin uint8
	behavior        nvme.HostBehavior
	apst            *apstTable // nil: as saved
}

func (c *Controller) newFeatureData() featureData {
	return featureData{since: c.now(), timestampSet: c.now()}
}

func (c *Controller) timestamp(f *featureData) nvme.Timestamp {
	now := f.timestamp + uint64(c.now().Sub(f.timestampSet).Milliseconds())
	return nvme.MakeTimestamp(now, f.timestampOrigin<<nvme.TimestampOriginShift)
}

func (c *Controller) getFeatureData(cmd *nvme.Command) result {
	f := c.feat.data
	if cmd.FeatureSelect() != nvme.FeatureCurrent {
		f = c.newFeatureData()
	}
	switch cmd.FID() {
	case nvme.FeatureTimestamp:
		t := c.timestamp(&f)
		return c.toHost(cmd, t[:])
	case nvme.FeatureHostBehavior:
		return c.toHost(cmd, f.behavior.Bytes()[:])
	case nvme.FeatureAPST:
		return c.getAPST(cmd, f.apst)
	}
	return fail(nvme.StatusInvalidField, dword(10, 0), "no such feature")
}

func (c *Controller) setFeatureData(cmd *nvme.Command) result {
	f := &c.feat.data
	switch cmd.FID() {
	case nvme.FeatureTimestamp:
		t := new(nvme.Timestamp)
		if r := c.fromHost(cmd, t[:]); !r.status.OK() {
			return r
		}
		c.logTimestamp(c.timestamp(f), c.now().Sub(f.since))
		f.timestamp, f.timestampSet, f.timestampOrigin = t.Milliseconds(), c.now(), nvme.TimestampOriginHost
		return result{}
	case nvme.FeatureHostBehavior:
		var b nvme.HostBehavior
		if r := c.fromHost(cmd, b.Bytes()[:]); !r.status.OK() {
			return r
		}
		if b.ACRE > 1 || b.ETDAS > 1 || b.LBAFEE > 1 {
			return fail(nvme.StatusInvalidField, dword(6, 0), "reserved value in Host Behavior Support")
		}
		f.behavior = nvme.HostBehavior{ACRE: b.ACRE, ETDAS: b.ETDAS, LBAFEE: b.LBAFEE}
		return result{}
	case nvme.FeatureAPST:
		return c.setAPST(cmd)
	}
	return fail(nvme.StatusInvalidField, dword(10, 0), "no such feature")
}

// getAPST returns the table and, in DW0, whether it is in use. The default is an empty one that is not.
func (c *Controller) getAPST(cmd *nvme.Command, table *apstTable) result {
	k := featureKey{fid: nvme.FeatureAPST}
	var on uint32
	switch cmd.FeatureSelect() {
	case nvme.FeatureCurrent:
		on = c.featureOf(k)
	case nvme.FeatureSaved:
		on = c.featureSaved(k)
	}
	if table == nil {
		table = new(apstTable)
		if cmd.FeatureSelect() != nvme.FeatureDefault {
			c.cfg.Persistent.read(func(v *persisted) { copy(table[:], v.APST) })
		}
	}
	r := c.toHost(cmd, table.bytes())
	r.dw0 = on
	return r
}

func (c *Controller) setAPST(cmd *nvme.Command) result {
	b := make([]byte, apstBytes)
	if r := c.fromHost(cmd, b); !r.status.OK() {
		return r
	}
	table, ok := checkAPST(b)
	if !ok {
		return fail(nvme.StatusInvalidField, inPRP1, "a transition to a state that does not exist or is operational")
	}
	k := featureKey{fid: nvme.FeatureAPST}
	on := cmd.CDW11 & apstOn
	c.feat.data.apst, c.feat.now[k] = &table, on
	if cmd.FeatureSave() {
		c.cfg.Persistent.saveFeatures(map[featureKey]uint32{k: on})
		c.cfg.Persistent.update(func(v *persisted) { v.APST = table[:] })
	}
	return result{}
}
