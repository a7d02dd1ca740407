package main

import (
	"encoding/binary"
	"errors"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/guestdrv/export"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// servedDisk is a namespace as the servers see it: an export.Disk with all that package export knows of, queue pairs among it. Two of the same namespace
// are equal.
type servedDisk struct {
	*guestdrv.Namespace
	ctrl *guestdrv.Controller
}

// NewQueue makes a queue pair of the controller.
func (d servedDisk) NewQueue(depth int) (export.Queue, error) {
	o := guestdrv.QueuePairOptions{Depth: uint32(depth)}
	p, err := d.ctrl.NewQueuePair(o)
	if err != nil {
		// A device without an interrupt for it is polled.
		o.Poll = true
		polled, pollErr := d.ctrl.NewQueuePair(o)
		if pollErr != nil {
			return nil, err
		}
		p = polled
	}
	return &servedQueue{QueuePair: p, disk: d}, nil
}

// Again tells whether the controller was reset and goes on.
func (d servedDisk) Again(err error) bool {
	return errors.Is(err, guestdrv.ErrReset) && d.ctrl.Err() == nil
}

// servedQueue is a queue pair for one namespace.
type servedQueue struct {
	*guestdrv.QueuePair
	disk    servedDisk
	ios     [64]guestdrv.IO
	results [64]guestdrv.Result
}

var errForeign = errors.New("the data of a command is not in memory of the disk")

// Submit takes as many commands as there is room for.
func (q *servedQueue) Submit(cmds []export.Command) (int, error) {
	total := 0
	for total < len(cmds) {
		n := min(len(cmds)-total, len(q.ios))
		for i := range n {
			c := &cmds[total+i]
			io := guestdrv.IO{Op: c.Op, FUA: c.FUA, NSID: q.disk.NSID(), Blocks: c.Blocks, LBA: c.LBA, Tag: c.Tag}
			if c.Data != nil {
				var ok bool
				if io.IOVA, ok = q.disk.ctrl.IOVA(c.Data); !ok {
					return total, errForeign
				}
			}
			if c.Op == nvme.IODSM { // one range
				binary.LittleEndian.PutUint32(c.Data, 0)
				binary.LittleEndian.PutUint32(c.Data[4:], c.Blocks)
				binary.LittleEndian.PutUint64(c.Data[8:], c.LBA)
				io.Blocks, io.LBA = 1, 0
			}
			q.ios[i] = io
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
func (q *servedQueue) Reap(out []export.Result) (int, error) {
	n, err := q.QueuePair.Reap(q.results[:min(len(out), len(q.results))])
	for i := range n {
		out[i] = export.Result{Tag: q.results[i].Tag, Status: q.results[i].Status}
	}
	return n, err
}
