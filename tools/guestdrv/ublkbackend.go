package main

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/guestdrv/export/ublk"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// ublkBackend makes queue pairs of the controller for one namespace.
type ublkBackend struct {
	ctrl *guestdrv.Controller
	nsid uint32

	mu    sync.Mutex
	spare []*ublkQueue // made by reserve, not taken yet
}

// reserve makes up to n queue pairs and returns how many the controller has, and why there are no more.
func (b *ublkBackend) reserve(n, depth int) (int, error) {
	for len(b.spare) < n {
		q, err := b.make(depth)
		if err != nil {
			return len(b.spare), err
		}
		b.spare = append(b.spare, q)
	}
	return n, nil
}

func (b *ublkBackend) make(depth int) (*ublkQueue, error) {
	o := guestdrv.QueuePairOptions{Depth: uint32(depth)}
	p, err := b.ctrl.NewQueuePair(o)
	if err != nil {
		// A device without an interrupt for it is polled.
		o.Poll = true
		polled, pollErr := b.ctrl.NewQueuePair(o)
		if pollErr != nil {
			return nil, err
		}
		p = polled
	}
	return &ublkQueue{QueuePair: p, nsid: b.nsid}, nil
}

// NewQueue takes a queue pair that was reserved, or makes one.
func (b *ublkBackend) NewQueue(depth int) (ublk.Queue, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.spare); n > 0 {
		q := b.spare[n-1]
		b.spare = b.spare[:n-1]
		return q, nil
	}
	return b.make(depth)
}

// Alloc returns DMA memory.
func (b *ublkBackend) Alloc(n int) (ublk.Buffer, error) {
	buf, err := b.ctrl.Alloc(n)
	if err != nil {
		return nil, err
	}
	return buf, nil
}

// Again tells whether the controller was reset and goes on.
func (b *ublkBackend) Again(err error) bool {
	return errors.Is(err, guestdrv.ErrReset) && b.ctrl.Err() == nil
}

// close gives back what nobody took.
func (b *ublkBackend) close() (err error) {
	for _, q := range b.spare {
		err = errors.Join(err, q.Close())
	}
	b.spare = nil
	return err
}

// ublkQueue is a queue pair as package ublk drives it.
type ublkQueue struct {
	*guestdrv.QueuePair
	nsid    uint32
	ios     [64]guestdrv.IO
	results [64]guestdrv.Result
}

// Submit takes as many commands as there is room for.
func (q *ublkQueue) Submit(cmds []ublk.Command) (int, error) {
	total := 0
	for total < len(cmds) {
		n := min(len(cmds)-total, len(q.ios))
		for i := range n {
			c := &cmds[total+i]
			q.ios[i] = guestdrv.IO{Op: c.Op, FUA: c.FUA, NSID: q.nsid, Blocks: c.Blocks, LBA: c.LBA, IOVA: c.IOVA, Tag: c.Tag}
		}
		took, err := q.QueuePair.Submit(q.ios[:n])
		total += took
		if err != nil || took < n {
			return total, err
		}
	}
	return total, nil
}

// Reap takes results.
func (q *ublkQueue) Reap(out []ublk.Result) (int, error) {
	n, err := q.QueuePair.Reap(q.results[:min(len(out), len(q.results))])
	for i := range n {
		out[i] = ublk.Result{Tag: q.results[i].Tag, Status: q.results[i].Status}
	}
	return n, err
}

// ublkParams are what the block device is like.
func ublkParams(ns export.Disk, id *nvme.IdentifyNamespace, maxIO int) ublk.Params {
	const unlimited = 1 << 31 // bytes, so that sectors fit in what the kernel has for them
	block := ns.BlockSize()
	caps := export.CapsOf(ns)
	p := ublk.Params{
		Size: ns.Size(), BlockSize: block, PhysicalBlock: block, ReadOnly: ns.ReadOnly(), VolatileCache: caps.Cache,
		Chunk: int(id.NOIOB) * block,
	}
	if id.NSFEAT&nvme.NSFEATOptPerf != 0 {
		p.PhysicalBlock = powerOfTwo(int(id.NPWG.Count())*block, block)
		p.OptimalIO = powerOfTwo(int(id.NOWS.Count())*block, block)
		p.DiscardUnit = powerOfTwo(int(id.NPDG.Count())*block, block)
	}
	if caps.Discard && !p.ReadOnly {
		p.MaxDiscard = unlimited
	}
	if caps.Zeroes && !p.ReadOnly {
		p.MaxZeroes = maxIO // what a controller that says nothing of it can be asked for: MDTS holds for it, too
	}
	return p
}

// powerOfTwo returns n if it is one that is a whole page at the most, or else least.
func powerOfTwo(n, least int) int {
	if n < least || n > 1<<20 || n&(n-1) != 0 {
		return least
	}
	return n
}

// ublkIdentity stands for a namespace: what does not change as long as it is the same one.
func ublkIdentity(c *nvme.IdentifyController, nsid uint32, id *nvme.IdentifyNamespace) uint64 {
	h := sha256.New()
	fmt.Fprintf(h, "shadowbell ublk 1\x00%s\x00%s\x00%s\x00%d\x00%x\x00%x", c.Serial(), c.Model(), c.Subsystem(), nsid, id.NGUID, id.EUI64)
	return binary.LittleEndian.Uint64(h.Sum(nil))
}
