package admin

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/driver/dma"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// pages are the shared doorbell page and the page of event indices, one page each whatever the number of queues (R29).
type pages struct {
	mem dma.Block // the configuring goroutine's

	// in is what is in use. Pairs look at it while a reset changes it; such a pair is made anew.
	in atomic.Pointer[views]
}

type views struct{ shadow, ei *shm.Region }

func (p *pages) give(pool *dma.Pool) {
	if p.mem.Len != 0 {
		pool.Give(p.mem)
	}
	p.mem = dma.Block{}
	p.in.Store(nil)
}

// DoorbellsOffered says that the controller has Doorbell Buffer Config.
func (a *Admin) DoorbellsOffered() bool { return a.Identity().OACS&nvme.OACSDoorbellBuf != 0 }

// ShareDoorbells gives the controller the doorbell pages, with Doorbell Buffer Config or, with vendor2014, its forerunner. It is part of
// every enable, and the pages, which stay the same ones, are zeroed first (R28). Only after success are they in use (R26): after an error queues are
// as they would be without.
func (a *Admin) ShareDoorbells(ctx context.Context, vendor2014 bool) error {
	if a.shadowQueues() == 0 {
		return fmt.Errorf("doorbell stride %d: not even queue 1 has its slots in a page", nvme.DoorbellStride(a.cap.DSTRD()))
	}
	mem := a.page.mem
	a.page.in.Store(nil)
	if mem.Len == 0 {
		var err error
		if mem, err = a.cfg.Pool.Take(2 * pageSize); err != nil {
			return err
		}
		a.page.mem = mem
	}
	clear(a.cfg.Pool.Bytes(mem))
	region, err := a.cfg.Pool.Region(mem)
	if err != nil {
		return err
	}
	shadow, err := region.View(0, pageSize)
	if err != nil {
		return err
	}
	ei, err := region.View(pageSize, pageSize)
	if err != nil {
		return err
	}
	opcode := uint8(nvme.AdminDoorbellBufferConfig)
	if vendor2014 {
		opcode = nvme.AdminDoorbellMemory2014
	}
	var cmd nvme.Command
	cmd.SetDoorbellBuffers(opcode, a.cfg.Pool.IOVA(mem.Off), a.cfg.Pool.IOVA(mem.Off+pageSize))
	status, _, err := a.Exec(ctx, cmd, nil)
	if err != nil {
		return err // it may have been executed: the pages stay the device's until it is disabled
	}
	if !status.OK() {
		a.page.give(a.cfg.Pool)
		return a.cfg.Refused(cmd, status)
	}
	a.page.in.Store(&views{shadow: shadow, ei: ei})
	return nil
}

// Shared says that the doorbell pages are in use.
func (a *Admin) Shared() bool { return a.page.in.Load() != nil }

// Mapped says that the doorbells are mapped and polled by the device.
func (a *Admin) Mapped() bool {
	return a.dev.Doorbell(nvme.SQTailDoorbell(0, a.cap.DSTRD())).Mapped != nil
}

// MaxQID returns the highest queue id whose doorbells can be reached.
func (a *Admin) MaxQID() uint16 {
	stride := uint64(nvme.DoorbellStride(a.cap.DSTRD()))
	n := (a.dev.RegisterSpace() - nvme.DoorbellBase) / (2 * stride)
	if a.Shared() {
		n = min(n, uint64(a.shadowQueues())+1)
	}
	return uint16(min(max(n, 1)-1, 65534))
}

// shadowQueues returns how many I/O queues have their slots in one page.
func (a *Admin) shadowQueues() uint32 {
	n := pageSize / (2 * nvme.DoorbellStride(a.cap.DSTRD()))
	return max(n, 1) - 1
}

// Publishers returns the doorbells of queue qid, 1 or above, both at 0. In the shared pages the slots are zeroed first, since a
// queue that had the id before may have left something (R22). That must be before the queue is created.
func (a *Admin) Publishers(qid uint16) (tail, head *dbbuf.Publisher, err error) {
	in := a.page.in.Load()
	if in == nil {
		tail, head = a.registerPublishers(qid)
		return tail, head, nil
	}
	sqWord, cqWord, err := dbbuf.Slots(in.shadow, qid, a.cap.DSTRD())
	if err != nil {
		return nil, nil, err
	}
	sqIdx, cqIdx, err := dbbuf.Slots(in.ei, qid, a.cap.DSTRD())
	if err != nil {
		return nil, nil, err
	}
	sqWord.Store(0)
	cqWord.Store(0)
	sqIdx.Store(0)
	cqIdx.Store(0)
	tail = dbbuf.NewShadow(sqWord, sqIdx, a.dev.Doorbell(nvme.SQTailDoorbell(qid, a.cap.DSTRD())).Ring)
	head = dbbuf.NewShadow(cqWord, cqIdx, a.dev.Doorbell(nvme.CQHeadDoorbell(qid, a.cap.DSTRD())).Ring)
	return tail, head, nil
}

// registerPublishers returns doorbells that are registers, mapped or not.
func (a *Admin) registerPublishers(qid uint16) (tail, head *dbbuf.Publisher) {
	make1 := func(off uint32) *dbbuf.Publisher {
		d := a.dev.Doorbell(off)
		if d.Mapped != nil {
			return dbbuf.NewMapped(d.Mapped)
		}
		return dbbuf.NewMMIO(d.Ring)
	}
	return make1(nvme.SQTailDoorbell(qid, a.cap.DSTRD())), make1(nvme.CQHeadDoorbell(qid, a.cap.DSTRD()))
}
