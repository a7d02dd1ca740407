package faulty

import (
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// queues are the submission queues that the driver has made, as far as its registers and admin commands tell.
type queues struct {
	aqa nvme.AQA
	asq uint64
	sqs map[uint16]*sq
}

type sq struct {
	iova uint64
	size uint32 // entries
	tail uint32 // as last rung
}

const sqeSize = 64

// register takes a write to a register.
func (q *queues) register(off uint32, v uint64) {
	switch off {
	case nvme.RegAQA:
		q.aqa = nvme.AQA(v)
	case nvme.RegASQ:
		q.asq = v
	case nvme.RegCC:
		q.sqs = map[uint16]*sq{}
		if nvme.CC(v).EN() {
			q.sqs[0] = &sq{iova: q.asq, size: q.aqa.ASQS().Count()}
		}
	}
}

// admin takes a command of the admin queue.
func (q *queues) admin(cmd *nvme.Command) {
	switch cmd.Opcode {
	case nvme.AdminCreateSQ:
		q.sqs[cmd.QID()] = &sq{iova: cmd.PRP1, size: cmd.QSize().Count()}
	case nvme.AdminDeleteSQ:
		delete(q.sqs, cmd.QID())
	}
}

// Doorbell is the device's, but for a mapped one, which is rung instead so that it is seen.
func (d *Device) Doorbell(off uint32) device.Doorbell {
	bell := d.dev.Doorbell(off)
	qid, cq := uint16(0), true
	if v, err := d.dev.Read64(nvme.RegCAP); err == nil {
		if id, isCQ, ok := nvme.ParseDoorbell(off, nvme.CAP(v).DSTRD()); ok {
			qid, cq = id, isCQ
		}
	}
	return device.Doorbell{Ring: func(v uint32) error {
		if err := d.dead(); err != nil {
			return err
		}
		if d.unplugged() {
			return nil
		}
		if !cq {
			d.commands(qid, v)
		}
		if h := d.hook().Ring; h != nil && !h(off, v) {
			return nil
		}
		return d.meanwhile(bell.Ring(v))
	}}
}

// commands shows the hook what has been put in queue qid up to tail. One goroutine at a time rings a queue's doorbell.
func (d *Device) commands(qid uint16, tail uint32) {
	d.mu.Lock()
	q, h := d.queues.sqs[qid], d.hooks.Command
	d.mu.Unlock()
	if q == nil || tail >= q.size {
		return
	}
	for ; q.tail != tail; q.tail = (q.tail + 1) % q.size {
		mem := d.find(q.iova+uint64(q.tail)*sqeSize, sqeSize)
		if mem == nil {
			continue
		}
		var cmd nvme.Command
		if mem.Read(0, cmd.Bytes()[:]) != nil {
			continue
		}
		if qid == 0 {
			d.mu.Lock()
			d.queues.admin(&cmd)
			d.mu.Unlock()
		}
		if h == nil {
			continue
		}
		was := cmd
		if h(qid, &cmd); cmd != was {
			_ = mem.Write(0, cmd.Bytes()[:]) // what could be read can be written
		}
	}
}

// find returns the n bytes at iova, which lie in one page, or nil.
func (d *Device) find(iova, n uint64) *shm.Region {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range d.memory {
		run := r.Contiguous
		if run == 0 {
			run = r.Len()
		}
		for off := uint64(0); off < r.Len(); off += run {
			if begin := r.IOVAOf(off); iova >= begin && iova-begin < run {
				view, err := r.View(off+iova-begin, n)
				if err != nil {
					return nil
				}
				return view
			}
		}
	}
	return nil
}
