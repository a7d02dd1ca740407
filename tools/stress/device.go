package main

import (
	"fmt"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// poller is the device's half of a doorbell: dbbuf.Poller, or a mutation of it.
type poller interface {
	Load() uint32
	Behind(consumed uint32)
	BehindNow(consumed uint32)
	Arm(consumed uint32) bool
	Quiet() bool
}

const maxBatch = 16

type device struct {
	sh         *shared
	sq         *ring.SQConsumer
	cq         *ring.CQProducer
	tail, head poller
	sleeper    sleeper
	rng        random

	fetched uint64
	blocked bool // entries are waiting and the CQ has no room
	patient bool
	entries [maxBatch]ring.Entry

	batches, sleeps, spurious, interrupts, armed, armLost, full uint64
}

func newDevice(sh *shared, mutate string, seed uint64) (*device, error) {
	d := &device{sh: sh, rng: newRandom(seed, 2)}
	d.sleeper = sleeper{side: &sh.device, fd: sh.kick, stop: sh.stopped}
	sqMem, cqMem, err := sh.rings()
	if err != nil {
		return nil, err
	}
	if d.sq, err = ring.NewSQConsumer(sqMem, sh.sq); err != nil {
		return nil, err
	}
	if d.cq, err = ring.NewCQProducer(cqMem, sh.cq); err != nil {
		return nil, err
	}
	tail, head, tailEI, headEI, err := sh.slots()
	if err != nil {
		return nil, err
	}
	d.tail, d.head = newPoller(mutate, tail, tailEI, sh.sq), newPoller(mutate, head, headEI, sh.cq)
	return d, nil
}

// run polls, serves, arms and sleeps until the run is over.
func (d *device) run() error {
	defer d.end()
	budget, idle := uint32(0), uint32(0)
	for !d.sh.stopped() {
		n, err := d.sq.Pending(d.tail.Load())
		if err != nil {
			return err
		}
		d.blocked = false
		if n > 0 {
			room, err := d.room(n)
			if err != nil {
				return err
			}
			if room > 0 {
				if err := d.serve(min(n, room, 1+d.rng.below(maxBatch))); err != nil {
					return err
				}
				budget, idle = d.rng.looks(&d.patient), 0
				continue
			}
			d.blocked = true
		}
		if idle++; idle <= budget {
			continue
		}
		idle = 0
		if err := d.rest(); err != nil {
			return err
		}
	}
	return nil
}

// room returns how many entries the CQ takes, looking at its head only if there is room for fewer than n.
func (d *device) room(n uint32) (uint32, error) {
	if free := d.cq.Free(); free >= n {
		return free, nil
	}
	if err := d.cq.Consumed(d.head.Load() &^ dbbuf.QuietBit); err != nil {
		return 0, err
	}
	d.head.Behind(d.cq.Head())
	return d.cq.Free(), nil
}

func (d *device) serve(n uint32) error {
	var cmd nvme.Command
	for i := range n {
		d.sq.Fetch(&cmd)
		if want := commandNumber(d.fetched); cmd != want {
			return fmt.Errorf("command %d is %+v, want %+v", d.fetched, cmd, want)
		}
		d.entries[i] = ring.MakeEntry(mix(d.fetched), d.sq.Head(), qid, cmd.CID, nvme.StatusSuccess)
		d.fetched++
	}
	d.tail.Behind(d.sq.Head())
	d.rng.pause()
	d.cq.Post(d.entries[:n])
	d.batches++
	if d.head.Quiet() {
		return nil
	}
	d.interrupts++
	return signal(d.sh.irq)
}

// rest arms the doorbell that this side waits for, and sleeps if Arm says so.
func (d *device) rest() error {
	bell, at := d.tail, d.sq.Head()
	if d.blocked {
		bell, at = d.head, d.cq.Head() // R8
	}
	if !bell.Arm(at) {
		d.armLost++
		return nil
	}
	d.armed++
	d.sleeps++
	if d.blocked {
		d.full++
	}
	d.tell()
	if err := d.sleeper.sleep(); err != nil {
		return err
	}
	if bell.Load()&^dbbuf.QuietBit == at {
		d.spurious++
	}
	// It goes on by polling, mostly, and says so.
	if d.rng.below(4) != 0 {
		d.tail.BehindNow(d.sq.Head())
		d.head.BehindNow(d.cq.Head())
	}
	return nil
}

// tell writes this side's numbers to the control page.
func (d *device) tell() {
	s := &d.sh.device
	blocked := uint64(0)
	if d.blocked {
		blocked = 1
	}
	for i, v := range [sideWords]uint64{
		sideCommands: d.fetched, sideBatches: d.batches, sideSleeps: d.sleeps, sideSpurious: d.spurious, sideRings: d.interrupts,
		sideArmed: d.armed, sideArmLost: d.armLost, sideFull: d.full,
		sideSQ: uint64(d.sq.Head()), sideCQ: uint64(d.cq.Tail()), sideLeft: blocked,
	} {
		if i > sideEpoch {
			s[i].Store(v)
		}
	}
}

func (d *device) end() {
	d.tell()
	d.sh.device[sideState].Store(ended)
}
