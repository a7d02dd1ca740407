package suite

import (
	"bytes"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// Reservations, by one host and between two. NVMe Base 2.0c 7.2 to 7.5, 8.19.

var (
	needReservations = join(needNS, oncs(nvme.ONCSReservations, "Reservations"), needHostID,
		bitNeed("RESCAP is 0: the namespace has no reservations", func(f *facts) bool { return f.ns.RESCAP != 0 }))
	needHostID = bitNeed("CTRATT.HostID128 is 0", func(f *facts) bool { return f.id.CTRATT&nvme.CTRATTHostID128 != 0 })
)

const (
	keyA = 0xA1A2A3A4A5A6A7A8
	keyB = 0xB1B2B3B4B5B6B7B8

	// Actions, in CDW10 bits 2:0.
	resRegister, resUnregister, resReplace = 0, 1, 2
	resAcquire, resPreempt                 = 0, 1
	resRelease, resClear                   = 0, 1
	resIgnoreKey                           = 1 << 3
)

var reservationCases = []Case{
	{
		ID: "reservation.register", Ref: "NVMe Base 2.0c 7.3", needs: needReservations, does: writes,
		Text: "a host that registers is in the report, with its key; one that unregisters is not",
		run: func(c *ctl) {
			c.hosts()
			c.register(resRegister, 0, keyA)
			r := c.report()
			c.check(r.registrants == 1 && r.keys[0] == keyA, "%d registrants, keys %#x", r.registrants, r.keys)
			c.register(resReplace, keyA, keyB)
			r = c.report()
			c.check(r.registrants == 1 && r.keys[0] == keyB, "after Replace: %d registrants, keys %#x", r.registrants, r.keys)
			c.register(resUnregister, keyB, 0)
			c.check(c.report().registrants == 0, "after Unregister: %d registrants", c.report().registrants)
		},
	},
	{
		ID: "reservation.register.wrong-key", Ref: "NVMe Base 2.0c 7.3", needs: needReservations, does: writes,
		Text: "to register again with another key, or to unregister with a wrong one, is Reservation Conflict",
		run: func(c *ctl) {
			c.hosts()
			c.register(resRegister, 0, keyA)
			c.q().refused(c.registerCmd(resRegister, 0, keyB), nvme.StatusReservationConflict)
			c.q().refused(c.registerCmd(resUnregister, keyB, 0), nvme.StatusReservationConflict)
			c.q().refused(c.registerCmd(resReplace, keyB, keyB), nvme.StatusReservationConflict)
			c.register(resRegister, 0, keyA) // the same key: nothing changes
			c.check(c.report().registrants == 1, "%d registrants", c.report().registrants)
			c.register(resReplace|resIgnoreKey, keyB, keyB)
		},
	},
	{
		ID: "reservation.generation", Ref: "NVMe Base 2.0c 7.5", needs: needReservations, does: writes,
		Text: "the generation in the report moves when a host registers, not when it acquires",
		run: func(c *ctl) {
			c.hosts()
			before := c.report().generation
			c.register(resRegister, 0, keyA)
			registered := c.report().generation
			c.check(registered == before+1, "generation %d, before the registration %d", registered, before)
			c.acquire(resAcquire, nvme.WriteExclusive, keyA, 0)
			c.check(c.report().generation == registered, "generation %d after Acquire, %d before", c.report().generation, registered)
		},
	},
	{
		ID: "reservation.acquire", Ref: "NVMe Base 2.0c 7.2, 7.4, 7.5", needs: needReservations, does: writes,
		Text: "each type that RESCAP offers can be acquired, is in the report, and can be released",
		run: func(c *ctl) {
			c.hosts()
			c.register(resRegister, 0, keyA)
			for t := nvme.WriteExclusive; t <= nvme.ExclusiveAccessAllRegistrants; t++ {
				if c.facts.ns.RESCAP>>t&1 == 0 {
					continue
				}
				c.acquire(resAcquire, t, keyA, 0)
				r := c.report()
				c.check(r.typ == t && r.holders == 1, "acquired %v, reported %v with %d holders", t, r.typ, r.holders)
				c.q().ok(c.releaseCmd(resRelease, t, keyA))
				c.check(c.report().typ == 0, "released, reported %v", c.report().typ)
			}
		},
	},
	{
		ID: "reservation.acquire.unregistered", Ref: "NVMe Base 2.0c 7.2", needs: needReservations, does: writes,
		Text: "a host that is not registered, or has another key, cannot acquire: Reservation Conflict",
		run: func(c *ctl) {
			c.hosts()
			c.q().refused(c.acquireCmd(resAcquire, nvme.WriteExclusive, keyA, 0), nvme.StatusReservationConflict)
			c.register(resRegister, 0, keyA)
			c.q().refused(c.acquireCmd(resAcquire, nvme.WriteExclusive, keyB, 0), nvme.StatusReservationConflict)
		},
	},
	{
		ID: "reservation.acquire.other-type", Ref: "NVMe Base 2.0c 7.2", needs: needReservations, does: writes,
		Text: "a holder that acquires another type gets Reservation Conflict; a reserved type is Invalid Field in Command",
		run: func(c *ctl) {
			c.hosts()
			c.register(resRegister, 0, keyA)
			c.acquire(resAcquire, nvme.WriteExclusive, keyA, 0)
			c.acquire(resAcquire, nvme.WriteExclusive, keyA, 0) // it has it
			c.q().refused(c.acquireCmd(resAcquire, nvme.ExclusiveAccess, keyA, 0), nvme.StatusReservationConflict)
			c.q().ok(c.releaseCmd(resRelease, nvme.WriteExclusive, keyA))
			c.q().refused(c.acquireCmd(resAcquire, 9, keyA, 0), nvme.StatusInvalidField)
		},
	},
	{
		ID: "reservation.release.wrong-type", Ref: "NVMe Base 2.0c 7.4", needs: needReservations, does: writes,
		Text: "to release another type than is held is Invalid Field in Command, and with a wrong key Reservation Conflict",
		run: func(c *ctl) {
			c.hosts()
			c.register(resRegister, 0, keyA)
			c.acquire(resAcquire, nvme.WriteExclusive, keyA, 0)
			c.q().refused(c.releaseCmd(resRelease, nvme.ExclusiveAccess, keyA), nvme.StatusInvalidField)
			c.q().refused(c.releaseCmd(resRelease, nvme.WriteExclusive, keyB), nvme.StatusReservationConflict)
			c.check(c.report().typ == nvme.WriteExclusive, "reported %v", c.report().typ)
		},
	},
	{
		ID: "reservation.clear", Ref: "NVMe Base 2.0c 7.4, 8.19", needs: needReservations, does: writes,
		Text: "Clear ends the reservation and all registrations",
		run: func(c *ctl) {
			c.hosts()
			c.register(resRegister, 0, keyA)
			c.acquire(resAcquire, nvme.ExclusiveAccess, keyA, 0)
			c.q().ok(c.releaseCmd(resClear, 0, keyA))
			r := c.report()
			c.check(r.typ == 0 && r.registrants == 0, "reported %v, %d registrants", r.typ, r.registrants)
		},
	},
	{
		ID: "reservation.reset", Ref: "NVMe Base 2.0c 8.19", needs: needReservations, does: writes,
		Text: "registrations and reservations outlive a controller reset",
		run: func(c *ctl) {
			c.hosts()
			c.register(resRegister, 0, keyA)
			c.acquire(resAcquire, nvme.WriteExclusive, keyA, 0)
			c.disable()
			c.enable(setup{})
			c.setHostID(hostID(1))
			r := c.report()
			c.check(r.typ == nvme.WriteExclusive && r.registrants == 1, "reported %v, %d registrants", r.typ, r.registrants)
			c.q().ok(c.releaseCmd(resClear, 0, keyA))
		},
	},
	{
		ID: "shared.data", Ref: "NVMe Base 2.0c 2.4.1", needs: needNS, does: writes, peer: true,
		Text: "what one controller writes to a shared namespace the other reads",
		run: func(c *ctl) {
			o := c.second()
			for i := range uint64(10) {
				p := pattern(i, c.facts.lba)
				c.store(testLBA+i, p)
				c.check(bytes.Equal(o.load(testLBA+i, 1), p), "block %d reads as something else by the second controller", testLBA+i)
			}
		},
	},
	{
		ID: "shared.identity", Ref: "NVMe Base 2.0c 5.17.2.1", needs: needNS, peer: true,
		Text: "two controllers of a subsystem have its NQN, ids of their own, and say that there may be several",
		run: func(c *ctl) {
			o := c.second()
			a, b := &c.facts.id, &o.facts.id
			c.check(a.SUBNQN == b.SUBNQN, "SUBNQN %q and %q", a.Subsystem(), b.Subsystem())
			c.check(a.CNTLID != b.CNTLID, "both have CNTLID %d", a.CNTLID)
			c.check(a.CMIC&2 != 0 && b.CMIC&2 != 0, "CMIC %#x and %#x, want bit 1 set", a.CMIC, b.CMIC)
			c.check(c.facts.ns.NMIC&nvme.NMICShared != 0, "NMIC %#x, want bit 0 set", c.facts.ns.NMIC)
		},
	},
	{
		ID: "shared.reset", Ref: "NVMe Base 2.0c 3.7.2", needs: needNS, peer: true,
		Text: "a reset of one controller does not disturb the other",
		run: func(c *ctl) {
			o := c.second()
			for range 5 {
				for range 20 {
					o.q().push(o.tick())
				}
				o.q().ring()
				c.disable()
				c.enable(setup{})
				o.settled(o.q())
			}
		},
	},
	{
		ID: "reservation.two.write-exclusive", Ref: "NVMe Base 2.0c 8.19", needs: needReservations, does: writes, peer: true,
		Text: "under Write Exclusive others may read, and get Reservation Conflict when they write",
		run: func(c *ctl) {
			o := c.held(nvme.WriteExclusive)
			c.store(testLBA, pattern(1, c.facts.lba))
			o.load(testLBA, 1)
			o.q().refused(o.write(testLBA, 1, o.data(c.facts.lba)), nvme.StatusReservationConflict)
			c.check(bytes.Equal(c.load(testLBA, 1), pattern(1, c.facts.lba)), "the block was written")
		},
	},
	{
		ID: "reservation.two.exclusive-access", Ref: "NVMe Base 2.0c 8.19", needs: needReservations, does: writes, peer: true,
		Text: "under Exclusive Access others get Reservation Conflict when they read or write",
		run: func(c *ctl) {
			o := c.held(nvme.ExclusiveAccess)
			o.q().refused(o.read(testLBA, 1, o.data(c.facts.lba)), nvme.StatusReservationConflict)
			o.q().refused(o.write(testLBA, 1, o.data(c.facts.lba)), nvme.StatusReservationConflict)
			c.load(testLBA, 1)
			c.q().ok(c.releaseCmd(resRelease, nvme.ExclusiveAccess, keyA))
			o.load(testLBA, 1)
		},
	},
	{
		ID: "reservation.two.registrants", Ref: "NVMe Base 2.0c 8.19", needs: needReservations, does: writes, peer: true,
		Text: "under Write Exclusive - Registrants Only, who has registered may write",
		run: func(c *ctl) {
			o := c.held(nvme.WriteExclusiveRegistrants)
			o.q().refused(o.write(testLBA, 1, o.data(c.facts.lba)), nvme.StatusReservationConflict)
			o.register(resRegister, 0, keyB)
			o.store(testLBA, pattern(2, c.facts.lba))
			c.check(c.report().registrants == 2, "%d registrants", c.report().registrants)
		},
	},
	{
		ID: "reservation.two.acquire", Ref: "NVMe Base 2.0c 7.2", needs: needReservations, does: writes, peer: true,
		Text: "what one host holds another cannot acquire, or release",
		run: func(c *ctl) {
			o := c.held(nvme.WriteExclusive)
			o.register(resRegister, 0, keyB)
			o.q().refused(o.acquireCmd(resAcquire, nvme.WriteExclusive, keyB, 0), nvme.StatusReservationConflict)
			o.q().ok(o.releaseCmd(resRelease, nvme.WriteExclusive, keyB)) // it holds none: nothing happens
			c.check(c.report().typ == nvme.WriteExclusive, "reported %v", c.report().typ)
		},
	},
	{
		ID: "reservation.two.preempt", Ref: "NVMe Base 2.0c 7.2, 8.19", needs: needReservations, does: writes, peer: true,
		Text: "Preempt takes the reservation and the registration of the one who had it",
		run: func(c *ctl) {
			o := c.held(nvme.ExclusiveAccess)
			o.register(resRegister, 0, keyB)
			o.acquire(resPreempt, nvme.ExclusiveAccess, keyB, keyA)
			r := o.report()
			c.check(r.typ == nvme.ExclusiveAccess && r.registrants == 1 && r.keys[0] == keyB, "reported %v, %d registrants, keys %#x", r.typ, r.registrants, r.keys)
			c.q().refused(c.read(testLBA, 1, c.data(c.facts.lba)), nvme.StatusReservationConflict)
			o.load(testLBA, 1)
			o.q().ok(o.releaseCmd(resClear, 0, keyB))
		},
	},
}

// hostID returns a host identifier.
func hostID(n byte) []byte { return bytes.Repeat([]byte{n}, 16) }

// hosts gives the controller a host identifier and ends all that is reserved.
func (c *ctl) hosts() {
	c.setHostID(hostID(1))
	if cpl := c.q().exec(c.registerCmd(resRegister, 0, keyA)); !cpl.Status().OK() { // it is registered with another key
		c.register(resReplace|resIgnoreKey, 0, keyA)
	}
	c.q().ok(c.releaseCmd(resClear, 0, keyA))
}

// second returns the peer, reset and enabled.
func (c *ctl) second() *ctl {
	c.peer.used = true
	o := &ctl{rig: c.peer, ctx: c.ctx, deadline: c.deadline}
	o.begin(setup{})
	if o.facts.ns.NGUID != c.facts.ns.NGUID || o.facts.ns.EUI64 != c.facts.ns.EUI64 {
		c.skipf("namespace %d of the second controller is another one", o.facts.nsid)
	}
	return o
}

// held makes c the holder of a reservation, and returns the other controller, with a host of its own.
func (c *ctl) held(t nvme.ReservationType) *ctl {
	o := c.second()
	c.hosts()
	o.setHostID(hostID(2))
	c.register(resRegister, 0, keyA)
	c.acquire(resAcquire, t, keyA, 0)
	return o
}

func (c *ctl) keys(cmd nvme.Command, keys ...uint64) nvme.Command {
	p := make([]byte, 8*len(keys))
	for i, k := range keys {
		le.PutUint64(p[8*i:], k)
	}
	cmd.NSID = c.facts.nsid
	return c.data(uint64(len(p))).set(p).on(cmd)
}

func (c *ctl) registerCmd(action uint32, current, new uint64) nvme.Command {
	return c.keys(nvme.Command{Opcode: nvme.IOReservationRegister, CDW10: action}, current, new)
}

func (c *ctl) acquireCmd(action uint32, t nvme.ReservationType, current, preempted uint64) nvme.Command {
	return c.keys(nvme.Command{Opcode: nvme.IOReservationAcquire, CDW10: action | uint32(t)<<8}, current, preempted)
}

func (c *ctl) releaseCmd(action uint32, t nvme.ReservationType, current uint64) nvme.Command {
	return c.keys(nvme.Command{Opcode: nvme.IOReservationRelease, CDW10: action | uint32(t)<<8}, current)
}

func (c *ctl) register(action uint32, current, new uint64) {
	c.q().ok(c.registerCmd(action, current, new))
}

func (c *ctl) acquire(action uint32, t nvme.ReservationType, current, preempted uint64) {
	c.q().ok(c.acquireCmd(action, t, current, preempted))
}

// resReport is a Reservation Report.
type resReport struct {
	generation           uint32
	typ                  nvme.ReservationType
	registrants, holders int
	keys                 []uint64
}

// report returns the Reservation Report in its extended form, which hosts with identifiers of 128 bits ask for.
func (c *ctl) report() (r resReport) {
	const n = 1024
	d := c.data(n)
	c.q().ok(d.on(nvme.Command{Opcode: nvme.IOReservationReport, NSID: c.facts.nsid, CDW10: n/4 - 1, CDW11: 1}))
	p := d.get()
	r = resReport{generation: le.Uint32(p), typ: nvme.ReservationType(p[4]), registrants: int(le.Uint16(p[5:]))}
	for i := range min(r.registrants, (n-64)/64) {
		e := p[64+64*i:]
		r.keys = append(r.keys, le.Uint64(e[8:]))
		r.holders += int(e[2] & 1)
	}
	return r
}
