package load

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/internal/size"
)

const testBlock = 512

// disk is a namespace on the heap whose I/O a test can spoil.
type disk struct {
	mu    sync.Mutex
	data  []byte
	spoil func(io *guestdrv.IO, mem []byte) (done bool, status nvme.Status) // called with mu held
}

func (d *disk) do(io *guestdrv.IO, mem []byte) nvme.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.spoil != nil {
		if done, status := d.spoil(io, mem); done {
			return status
		}
	}
	d.move(io.Op, io.LBA, mem)
	return nvme.StatusSuccess
}

func (d *disk) move(op uint8, lba uint64, mem []byte) {
	at := d.data[lba*testBlock:][:len(mem)]
	if op == nvme.IOWrite {
		copy(at, mem)
	} else {
		copy(mem, at)
	}
}

// fakeQueue completes what was published in any order, and never more than depth at a time.
type fakeQueue struct {
	disk      *disk
	mem       []byte
	base      uint64
	depth     int
	submitted []guestdrv.IO // not published yet
	pending   []guestdrv.IO
	mmio      uint64
	ops       []guestdrv.OpStats
	fail      error // of Reap
	most      int   // commands that were under way at once
}

func (q *fakeQueue) Submit(ios []guestdrv.IO) (int, error) {
	n := min(len(ios), q.depth-len(q.pending)-len(q.submitted))
	q.submitted = append(q.submitted, ios[:n]...)
	return n, nil
}

func (q *fakeQueue) Publish() error {
	q.mmio++
	q.pending = append(q.pending, q.submitted...)
	q.submitted = q.submitted[:0]
	q.most = max(q.most, len(q.pending))
	return nil
}

func (q *fakeQueue) Reap(out []guestdrv.Result) (int, error) {
	if q.fail != nil {
		return 0, q.fail
	}
	n := min(len(out), rand.IntN(len(q.pending)+1))
	for i := range n {
		k := rand.IntN(len(q.pending))
		io := q.pending[k]
		q.pending[k] = q.pending[len(q.pending)-1]
		q.pending = q.pending[:len(q.pending)-1]
		mem := q.mem[io.IOVA-q.base:][:io.Blocks*testBlock]
		out[i] = guestdrv.Result{Tag: io.Tag, Status: q.disk.do(&io, mem), Latency: time.Duration(1000 + rand.IntN(1000))}
		op := guestdrv.OpRead
		if io.Op == nvme.IOWrite {
			op = guestdrv.OpWrite
		}
		q.count(op, out[i].Latency, out[i].Status.OK())
	}
	return n, nil
}

func (q *fakeQueue) Wait(context.Context) error {
	if len(q.pending) == 0 {
		return errors.New("waiting for nothing")
	}
	return nil
}

func (q *fakeQueue) Stats() guestdrv.QueueStats {
	return guestdrv.QueueStats{MMIOWrites: q.mmio}
}

func (q *fakeQueue) Ops() []guestdrv.OpStats { return slices.Clone(q.ops) }

// count does what a queue pair does.
func (q *fakeQueue) count(op guestdrv.Op, latency time.Duration, ok bool) {
	i := slices.IndexFunc(q.ops, func(o guestdrv.OpStats) bool { return o.Op == op })
	if i < 0 {
		i = len(q.ops)
		q.ops = append(q.ops, guestdrv.OpStats{Op: op})
	}
	q.ops[i].Latency.Record(latency, 1)
	if !ok {
		q.ops[i].Errors++
	}
}

// newTestLoad returns a load on d without a controller.
func newTestLoad(t testing.TB, c Config, d *disk) *Load {
	t.Helper()
	c = c.Defaults()
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	p, err := makePlan(c, geometry{blockSize: testBlock, size: uint64(len(d.data)), maxTransfer: 1 << 20, maxEntries: 4096})
	if err != nil {
		t.Fatal(err)
	}
	l := &Load{cfg: c}
	for i := range c.Jobs {
		q := &fakeQueue{disk: d, mem: make([]byte, p.slotSize*c.Depth), base: 1 << 40, depth: c.Depth}
		l.jobs = append(l.jobs, newJob(p, i, q, slotsIn(p, q.mem, q.base)))
	}
	return l
}

// slotsIn divides mem, which the queue knows by the addresses from base on.
func slotsIn(p *plan, mem []byte, base uint64) []slot {
	slots := make([]slot, p.cfg.Depth)
	for s := range slots {
		slots[s].mem, slots[s].iova = mem[s*p.slotSize:][:p.slotSize], base+uint64(s*p.slotSize)
	}
	return slots
}

func newDisk(bytes size.Bytes) *disk { return &disk{data: make([]byte, bytes)} }
