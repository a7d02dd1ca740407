package ctrl

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/internal/state"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

const (
	// saveAfter is how old a change gets before it is saved.
	saveAfter = 3 * time.Second
	// samplePeriod is how often the counters of I/O are looked at when nobody asks for them.
	samplePeriod = time.Minute
)

// Persistent is what of a controller the spec wants kept over resets and power cycles: the counters of the SMART log,
// the error log, saved features. It outlives the Controllers that use it, one after the other, and with a store that
// does, hostmed.
//
// Power is on while a client is there. A client that goes without having shut the controller down is an unsafe
// shutdown, and so is the end of hostmed, which the next start finds by a mark.
//
// Changes are saved a little later by a goroutine of its own, never while the session waits, and at Close.
type Persistent struct {
	key   string
	store state.Store // nil: nothing outlives hostmed
	log   hclog.Logger

	saving sync.Mutex // held while a save is going on; above mu

	mu     sync.Mutex // guards the rest
	v      persisted
	dirty  bool
	timer  *time.Timer // when it is dirty
	failed bool        // the last save, and the log says so
	closed bool
}

// persisted is what is saved. Counts are since the controller was made.
type persisted struct {
	AtRisk          bool                  `json:"atRisk"` // enabled, and not shut down since
	PowerCycles     uint64                `json:"powerCycles"`
	PowerOn         time.Duration         `json:"powerOnNanoseconds"`
	UnsafeShutdowns uint64                `json:"unsafeShutdowns"`
	IO              IOStats               `json:"io"`
	ErrorCount      uint64                `json:"errorCount"`
	Errors          []nvme.ErrorLogEntry  `json:"errors,omitempty"` // the newest, at most errorLogSize, oldest first
	Features        map[featureKey]uint32 `json:"features,omitempty"`
	APST            []uint64              `json:"apst,omitempty"` // the table of feature 0Ch

	Telemetry           string `json:"telemetry,omitempty"` // controller-initiated, that no host has read
	TelemetryReason     string `json:"telemetryReason,omitempty"`
	TelemetryGeneration uint8  `json:"telemetryGeneration"`
	HostGeneration      uint8  `json:"telemetryHostGeneration"`

	Events          []loggedEvent `json:"events,omitempty"` // oldest first
	EventGeneration uint16        `json:"eventGeneration"`
}

// OpenPersistent returns what was saved under key, or what a new controller has. What cannot be read is logged, with the
// remedy, and a new one takes its place. store may be nil.
func OpenPersistent(store state.Store, key string, log hclog.Logger) (*Persistent, error) {
	p := &Persistent{key: key, store: store, log: log}
	if store == nil {
		return p, nil
	}
	_, err := store.Load(key, &p.v)
	if c := (*state.CorruptError)(nil); errors.As(err, &c) {
		log.Error("a controller begins anew: its state cannot be read", "error", err)
		p.v = persisted{}
	} else if err != nil {
		return nil, fmt.Errorf("state of controller %s: %w", key, err)
	}
	if n := len(p.v.Errors); n > errorLogSize {
		p.v.Errors = p.v.Errors[n-errorLogSize:]
	}
	if p.v.AtRisk {
		log.Warn("hostmed ended while a client was using this controller: counted as an unsafe shutdown", "key", key)
		p.update(func(v *persisted) { v.AtRisk, v.UnsafeShutdowns = false, v.UnsafeShutdowns+1 })
	}
	return p, nil
}

// Close saves what has changed.
func (p *Persistent) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	return p.save()
}

// update changes what is kept.
func (p *Persistent) update(change func(*persisted)) { p.updateIn(saveAfter, change) }

// updateIn has the change saved in d at the latest.
func (p *Persistent) updateIn(d time.Duration, change func(*persisted)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.v)
	if p.store == nil || p.closed {
		return
	}
	switch {
	case !p.dirty:
		p.dirty = true
		p.timer = time.AfterFunc(d, p.saveLater)
	case d < saveAfter:
		p.timer.Reset(d)
	}
}

func (p *Persistent) saveLater() {
	err := p.save()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil && !p.failed {
		p.log.Error("counters and features are not saved", "error", err)
	}
	p.failed = err != nil
}

func (p *Persistent) save() error {
	p.saving.Lock()
	defer p.saving.Unlock()
	p.mu.Lock()
	if !p.dirty {
		p.mu.Unlock()
		return nil
	}
	p.dirty = false
	p.timer.Stop()
	b, err := json.Marshal(&p.v)
	p.mu.Unlock()
	if err != nil {
		return err
	}
	return p.store.Save(p.key, json.RawMessage(b))
}

// read calls fn with what is kept, which it does not change.
func (p *Persistent) read(fn func(*persisted)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fn(&p.v)
}

// addError puts an error in the log and gives it its number.
func (p *Persistent) addError(e nvme.ErrorLogEntry, status nvme.Status) {
	e.SetStatus(status)
	p.update(func(v *persisted) {
		v.ErrorCount++
		e.Count = v.ErrorCount
		if len(v.Errors) == errorLogSize {
			v.Errors = append(v.Errors[:0], v.Errors[1:]...)
		}
		v.Errors = append(v.Errors, e)
	})
}

// errorPage is the error log as the host reads it, the newest error first.
func (p *Persistent) errorPage() []byte {
	page := make([]byte, 0, errorLogSize*errorEntrySize)
	p.read(func(v *persisted) {
		for i := len(v.Errors) - 1; i >= 0; i-- {
			page = append(page, v.Errors[i].Bytes()[:]...)
		}
	})
	return page[:cap(page)]
}

// savedFeature returns what Set Features with SV has stored.
func (p *Persistent) savedFeature(k featureKey) (v uint32, ok bool) {
	p.read(func(x *persisted) { v, ok = x.Features[k] })
	return v, ok
}

// saveFeatures stores values.
func (p *Persistent) saveFeatures(values map[featureKey]uint32) {
	p.update(func(v *persisted) {
		if v.Features == nil {
			v.Features = map[featureKey]uint32{}
		}
		maps.Copy(v.Features, values)
	})
}

// power is the account of one client: what was counted before it came.
type power struct {
	base     IOStats
	since    time.Time // up to when the time is counted
	snapshot time.Time // when the SMART log was last kept as an event
}

func (c *Controller) powerOn() {
	p := c.cfg.Persistent
	p.update(func(v *persisted) {
		v.PowerCycles++
		c.power = power{base: v.IO, since: c.now(), snapshot: c.now()}
	})
	c.logReset()
	if p.store != nil {
		c.sampleLater()
	}
}

func (c *Controller) sampleLater() {
	c.after(samplePeriod, func() {
		c.sample()
		if c.now().Sub(c.power.snapshot) >= snapshotPeriod {
			c.logSMART()
		}
		c.sampleLater()
	})
}

// sample adds what was done since the last time, and saves if it was anything.
func (c *Controller) sample() {
	c.takeIOErrors()
	c.takeIOErrors()
	stats := c.cfg.Stats()
	total := c.power.base.plus(stats)
	now := c.now()
	on := now.Sub(c.power.since)
	c.power.since = now
	c.cfg.Persistent.update(func(v *persisted) { v.IO, v.PowerOn = total, v.PowerOn+on })
	if c.health.mediaErrors != stats.MediaErrors {
		c.health.mediaErrors = stats.MediaErrors
		c.guarded(func() bool {
			c.checkHealth()
			c.interrupt()
			return false
		})
	}
}

// powerOff is the end of the client.
func (c *Controller) powerOff() {
	c.sample()
	c.cfg.Persistent.updateIn(0, func(v *persisted) {
		if v.AtRisk {
			v.AtRisk, v.UnsafeShutdowns = false, v.UnsafeShutdowns+1
		}
	})
}

// setAtRisk says whether a loss of power would be an unsafe shutdown: from enable to the end of a shutdown.
func (c *Controller) setAtRisk(on bool) {
	var was bool
	p := c.cfg.Persistent
	if p.read(func(v *persisted) { was = v.AtRisk }); was != on {
		p.updateIn(0, func(v *persisted) { v.AtRisk = on })
	}
}

func (s IOStats) plus(o IOStats) IOStats {
	return IOStats{
		ReadBytes: s.ReadBytes + o.ReadBytes, WriteBytes: s.WriteBytes + o.WriteBytes,
		ReadCommands: s.ReadCommands + o.ReadCommands, WriteCommands: s.WriteCommands + o.WriteCommands,
		MediaErrors: s.MediaErrors + o.MediaErrors, Busy: s.Busy + o.Busy,
	}
}
