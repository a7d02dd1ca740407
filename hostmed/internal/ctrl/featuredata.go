package ctrl

import (
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Features whose value is a data structure.

// featureData is what was set since the last reset.
type featureData struct {
	timestamp       uint64 // milliseconds, when it was set
	timestampSet    time.Time
	timestampOrigin uint8
	behavior        nvme.HostBehavior
}

func (c *Controller) newFeatureData() featureData {
	return featureData{timestampSet: c.now()}
}

func (c *Controller) getFeatureData(cmd *nvme.Command) result {
	f := c.feat.data
	if cmd.FeatureSelect() != nvme.FeatureCurrent { // none of them can be saved
		f = c.newFeatureData()
	}
	switch cmd.FID() {
	case nvme.FeatureTimestamp:
		now := f.timestamp + uint64(c.now().Sub(f.timestampSet).Milliseconds())
		t := nvme.MakeTimestamp(now, f.timestampOrigin<<nvme.TimestampOriginShift)
		return c.toHost(cmd, t[:])
	case nvme.FeatureHostBehavior:
		return c.toHost(cmd, f.behavior.Bytes()[:])
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
	}
	return fail(nvme.StatusInvalidField, dword(10, 0), "no such feature")
}
