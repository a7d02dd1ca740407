package main

import (
	"fmt"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
)

// publisher is the driver's half of a doorbell: dbbuf.Publisher, or a mutation of it.
type publisher interface {
	Publish(value uint32) error
	SetQuiet(on bool)
}

type driver struct {
	sh         *shared
	sq         *ring.SQProducer
	cq         *ring.CQConsumer
	tail, head publisher
	sleeper    sleeper
	rng        random

	pushed, reaped uint64
	outstanding    uint32
	unpublished    uint32 // CQ entries reaped since the head was published
	patient        bool

	batches, sleeps, spurious, rings uint64
}

func newDriver(sh *shared, mutate string, seed uint64) (*driver, error) {
	d := &driver{sh: sh, rng: newRandom(seed, 1)}
	d.sleeper = sleeper{side: &sh.driver, fd: sh.irq, stop: sh.stopped}
	sqMem, cqMem, err := sh.rings()
	if err != nil {
		return nil, err
	}
	if d.sq, err = ring.NewSQProducer(sqMem, sh.sq); err != nil {
		return nil, err
	}
	if d.cq, err = ring.NewCQConsumer(cqMem, sh.cq); err != nil {
		return nil, err
	}
	tail, head, tailEI, headEI, err := sh.slots()
	if err != nil {
		return nil, err
	}
	bell := func(uint32) error {
		d.rings++
		return signal(sh.kick)
	}
	d.tail, d.head = newPublisher(mutate, tail, tailEI, bell), newPublisher(mutate, head, headEI, bell)
	return d, nil
}

// run submits and reaps until the run is over.
func (d *driver) run() error {
	defer d.end()
	for !d.sh.stopped() {
		if err := d.submit(); err != nil {
			return err
		}
		// Mostly one batch at a time, which makes the device arm after each.
		left := uint32(0)
		if d.rng.below(4) == 0 {
			left = d.rng.below(d.outstanding + 1)
		}
		if err := d.wait(left); err != nil {
			return err
		}
	}
	return nil
}

func (d *driver) submit() error {
	free := d.sq.Free()
	if free == 0 {
		return nil
	}
	n := uint32(1)
	switch d.rng.below(8) {
	case 0:
		n += d.rng.below(free)
	case 1, 2:
		n += d.rng.below(min(free, 8))
	}
	for range n {
		cmd := commandNumber(d.pushed)
		d.sq.Push(&cmd)
		d.pushed++
	}
	d.outstanding += n
	d.batches++
	d.rng.pause()
	return d.tail.Publish(d.sq.Tail())
}

func commandNumber(n uint64) nvme.Command {
	m := mix(n)
	return nvme.Command{
		Opcode: nvme.IORead, CID: uint16(n), NSID: uint32(m), MPTR: ^m, PRP1: n, PRP2: m,
		CDW10: uint32(m >> 32), CDW15: uint32(n),
	}
}

// wait reaps until no more than left commands are outstanding. Like guestdrv it polls for a while,
// quietly or not, then asks for the interrupt, looks once more, and sleeps.
func (d *driver) wait(left uint32) error {
	for d.outstanding > left && !d.sh.stopped() {
		if err := d.reap(); err != nil {
			return err
		}
		if d.outstanding <= left {
			break
		}
		if d.rng.below(4) != 0 {
			d.head.SetQuiet(true)
		}
		found := false
		for range d.rng.looks(&d.patient) {
			if found = d.cq.Ready(); found {
				break
			}
		}
		if !found {
			if err := d.sleep(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *driver) sleep() error {
	if err := d.publishHead(); err != nil {
		return err
	}
	d.head.SetQuiet(false)
	if d.cq.Ready() {
		return nil
	}
	d.sleeps++
	d.tell()
	if err := d.sleeper.sleep(); err != nil {
		return err
	}
	if !d.cq.Ready() {
		d.spurious++
	}
	return nil
}

// reap takes what has been completed and publishes the CQ head, sometimes late.
func (d *driver) reap() error {
	for {
		e, ok := d.cq.Next()
		if !ok {
			break
		}
		want := ring.MakeEntry(mix(d.reaped), uint32(e.SQHead()), qid, uint16(d.reaped), nvme.StatusSuccess)
		if e != want {
			return fmt.Errorf("completion %d is %+v, want %+v", d.reaped, e, want)
		}
		if err := d.sq.Released(e.SQHead()); err != nil {
			return fmt.Errorf("completion %d: %w", d.reaped, err)
		}
		d.reaped++
		d.outstanding--
		d.unpublished++
	}
	if d.rng.below(4) != 0 {
		return nil
	}
	return d.publishHead()
}

func (d *driver) publishHead() error {
	if d.unpublished == 0 {
		return nil
	}
	d.unpublished = 0
	return d.head.Publish(d.cq.Head())
}

// tell writes this side's numbers to the control page.
func (d *driver) tell() {
	s := &d.sh.driver
	for i, v := range [sideWords]uint64{
		sideCommands: d.reaped, sideBatches: d.batches, sideSleeps: d.sleeps, sideSpurious: d.spurious, sideRings: d.rings,
		sideSQ: uint64(d.sq.Tail()), sideCQ: uint64(d.cq.Head()), sideLeft: uint64(d.outstanding),
	} {
		if i > sideEpoch {
			s[i].Store(v)
		}
	}
}

func (d *driver) end() {
	d.tell()
	d.sh.driver[sideState].Store(ended)
}
