package backend

import "github.com/shadowbell/shadowbell/hostmed/internal/hostnvme"

// vfioQueue is a worker's way to a device that this process has.
type vfioQueue struct {
	*hostnvme.Queue
	b *vfio
}

func (b *vfio) NewQueue() (Queue, error) { return b.NewQueueFor(nil) }

// NewQueueFor opens a queue over the queue pair that owner has already, if it has one.
func (b *vfio) NewQueueFor(owner any) (Queue, error) {
	q, err := b.open(owner, b.spec.Poll || b.dev.Polled())
	if err != nil {
		return nil, err
	}
	v := vfioQueue{q, b}
	b.join(v, v.counts)
	return v, nil
}

func (b *vfio) open(owner any, poll bool) (*hostnvme.Queue, error) {
	return b.dev.Pairs().NewQueue(hostnvme.Attach{Slice: b.slice, Pool: b.pool, Polled: poll, Owner: owner})
}

func (q vfioQueue) Submit(reqs, done []*Request) int {
	q.Begin()
	for _, r := range reqs {
		x := q.Take()
		x.Op = hostnvme.Op(r.Op)
		x.FUA, x.Dealloc = r.FUA, r.Dealloc && !r.Keep
		x.Off, x.Len, x.Vec, x.Cmd, x.Owner = r.Off, r.Len, r.Vec, r.Cmd, r
		q.Put(x)
		r.RealQID, r.RealCID = x.RealQID, x.RealCID
	}
	q.Commit()
	return q.give(q.Collect(len(done)), done)
}

func (q vfioQueue) counts() Counts {
	c := q.Counts()
	return Counts{
		Commands: c.Commands, Native: c.Native, Mapped: c.Mapped, Bounced: c.Bounced, Waited: c.Full, Repeated: c.Reissued, Failed: c.Failed, Doorbells: c.Doorbells,
	}
}

// Close is Queue's.
func (q vfioQueue) Close() error {
	defer q.b.leave(q)
	return q.Queue.Close()
}

func (q vfioQueue) Reap(done []*Request) int { return q.give(q.Queue.Reap(len(done)), done) }

func (q vfioQueue) give(from []*hostnvme.Request, done []*Request) int {
	for i, x := range from {
		r := x.Owner.(*Request)
		r.Status, r.RealQID, r.RealCID = x.Status, x.RealQID, x.RealCID
		if r.Op == OpCommand {
			r.DW0 = x.DW0
		}
		done[i] = r
		q.Free(x)
	}
	return len(from)
}
