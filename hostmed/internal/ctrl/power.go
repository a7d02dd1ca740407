package ctrl

import (
	"encoding/binary"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Power states and the Keep Alive timer. NVMe Base 2.0c 3.9, 8.15, 5.27.1.2, 5.27.1.9 and 5.27.1.12.
//
// Nothing here draws power, but drivers and tools look for states to save it, and a laptop's policy for them must find some that
// do no harm: entering and leaving them costs nothing, and I/O leaves an idle state by itself.

// powerStates are the descriptors of Identify Controller, the most powerful first.
var powerStates = [...]nvme.PowerState{
	{MP: 2500},
	{MP: 900, RRT: 1, RRL: 1, RWT: 1, RWL: 1},
	{MP: 50, Flags: nvme.PowerStateNOPS, ENLAT: 1000, EXLAT: 1000, RRT: 2, RRL: 2, RWT: 2, RWL: 2},
}

func operational(ps uint8) bool { return powerStates[ps].Flags&nvme.PowerStateNOPS == 0 }

// powerState is Power Management as it is now: I/O since a non-operational state was asked for has led
// back to the last operational one.
func (c *Controller) powerState() uint32 {
	p := &c.feat.power
	v := nvme.PowerManagement(c.feature(nvme.FeaturePowerManagement))
	if operational(v.PS()) || c.commands() == p.idleAt {
		return uint32(v)
	}
	return uint32(v)&^0x1f | uint32(p.operational)
}

func (c *Controller) commands() uint64 {
	s := c.cfg.Stats()
	return s.ReadCommands + s.WriteCommands
}

// powerAccount is what powerState remembers.
type powerAccount struct {
	operational uint8  // the last operational state
	idleAt      uint64 // commands done when a non-operational one was entered
}

func (c *Controller) enterPowerState(ps uint8) {
	if operational(ps) {
		c.feat.power.operational = ps
	} else {
		c.feat.power.idleAt = c.commands()
	}
}

// apstTable is the data of feature 0Ch: for each power state, after how long to go to which. NVMe Base 2.0c figure 332.
type apstTable [32]uint64

func (t *apstTable) bytes() []byte {
	b := make([]byte, 0, 8*len(t))
	for _, e := range t {
		b = binary.LittleEndian.AppendUint64(b, e)
	}
	return b
}

// checkAPST takes the table of Set Features. A transition leads to a non-operational state.
func checkAPST(b []byte) (t apstTable, ok bool) {
	for i := range t {
		e := binary.LittleEndian.Uint64(b[8*i:])
		state, after := uint8(e>>3)&0x1f, uint32(e>>8)&0xffffff
		if after == 0 || i >= len(powerStates) {
			continue
		}
		if int(state) >= len(powerStates) || operational(state) {
			return t, false
		}
		t[i] = e & 0xfffffff8
	}
	return t, true
}

const (
	apstBytes = 8 * 32
	apstOn    = 1 << 0 // APSTE, in CDW11

	keepAliveUnit = 10 // KAS: the timer counts in 100 ms of this many
)

// keepAlive is the timer of feature 0Fh.
type keepAlive struct {
	stop func() bool // nil: it does not run
	turn int         // so that a time-out on its way when the timer is set again says nothing
}

// keepAliveTimeout rounds KATO up to the unit that Identify says.
func keepAliveTimeout(kato uint32) uint32 {
	const unit = keepAliveUnit * 100
	return uint32(min((uint64(kato)+unit-1)/unit*unit, 1<<32-unit))
}

// startKeepAlive starts the timer anew: at Keep Alive, and when it is set. A time of 0 turns it off, as it is after a reset.
func (c *Controller) startKeepAlive() {
	c.stopKeepAlive()
	kato := c.feature(nvme.FeatureKeepAlive)
	if kato == 0 || !c.ready {
		return
	}
	turn := c.keepAlive.turn
	c.keepAlive.stop = c.after(time.Duration(kato)*time.Millisecond, func() {
		if turn == c.keepAlive.turn && c.ready {
			c.cfg.Persistent.addError(nvme.ErrorLogEntry{SQID: 0xffff, CID: 0xffff, Location: uint16(nowhere)}, nvme.StatusKeepAliveExpired)
			c.dp.Stop(stopPatience) // what is not kept alive does no I/O
			c.fatal("keep alive timer expired", errKeepAlive)
		}
	})
}

func (c *Controller) stopKeepAlive() {
	c.keepAlive.turn++
	if c.keepAlive.stop != nil {
		c.keepAlive.stop()
		c.keepAlive.stop = nil
	}
}
