package doctor

import (
	"errors"
	"hash/crc64"
	"os"
	"slices"

	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// Looker reads doorbell pages and rings by itself, in the files that hostmed hands over for reading. It remembers where they were, so that it can look
// also at the queues of a worker that does not answer any more. It belongs to one goroutine; Close ends it.
type Looker struct {
	queues map[queueName]*place
}

type queueName struct {
	socket string
	qid    uint16
}

// place is a queue's memory. Each may be nil: it was not handed over.
type place struct {
	worker                           int
	size, next                       uint32
	tail, tailEvent, head, headEvent *shm.Region
	sq                               *shm.Region
}

// NewLooker returns a Looker that has seen nothing.
func NewLooker() *Looker { return &Looker{queues: map[queueName]*place{}} }

// Close unmaps everything.
func (l *Looker) Close() error {
	var errs []error
	for _, p := range l.queues {
		errs = append(errs, p.close())
	}
	l.queues = map[queueName]*place{}
	return errors.Join(errs...)
}

func (p *place) close() error {
	var errs []error
	for _, r := range []*shm.Region{p.tail, p.tailEvent, p.head, p.headEvent, p.sq} {
		if r != nil {
			errs = append(errs, r.Close())
		}
	}
	return errors.Join(errs...)
}

// Look returns the Sample of s, whose memory is in files, which stay the caller's.
func (l *Looker) Look(s inspect.Snapshot, files []*os.File) Sample {
	out := Sample{Snapshot: s}
	for i := range s.Controllers {
		c := &s.Controllers[i]
		known := map[uint16]bool{}
		for j := range c.Queues {
			q := &c.Queues[j]
			if q.QID == 0 {
				continue
			}
			name := queueName{c.Socket, q.QID}
			if old := l.queues[name]; old != nil {
				_ = old.close() // munmap of what was mapped cannot fail
			}
			l.queues[name] = placeOf(q, files)
			known[q.QID] = true
		}
		for name, p := range l.queues {
			if name.socket != c.Socket {
				continue
			}
			if !known[name.qid] && !slices.Contains(c.Busy, p.worker) {
				_ = p.close()
				delete(l.queues, name)
				continue
			}
			out.Views = append(out.Views, view(name, p))
		}
	}
	return out
}

func placeOf(q *inspect.Queue, files []*os.File) *place {
	at := func(m inspect.Memory) *shm.Region {
		if m.Size == 0 || m.File < 0 || m.File >= len(files) || m.Offset > 1<<62 {
			return nil
		}
		r, err := shm.Map(int(files[m.File].Fd()), int64(m.Offset), m.Size, false)
		if err != nil {
			return nil // the client has taken the file away, or made it shorter
		}
		return r
	}
	return &place{
		worker: q.Worker, size: q.Size, next: q.SQ.Private,
		tail: at(q.SQ.Slot), tailEvent: at(q.SQ.EventSlot), head: at(q.CQ.Slot), headEvent: at(q.CQ.EventSlot), sq: at(q.SQMemory),
	}
}

// view reads what p holds. Memory that has gone meanwhile reads as not there (R36).
func view(name queueName, p *place) View {
	v := View{Socket: name.socket, QID: name.qid, Worker: p.worker, At: inspect.Now()}
	doorbells := v
	if shm.Guard(func() {
		ok := true
		for _, x := range []struct {
			r *shm.Region
			v *uint32
		}{{p.tail, &doorbells.Tail}, {p.tailEvent, &doorbells.TailEvent}, {p.head, &doorbells.Head}, {p.headEvent, &doorbells.HeadEvent}} {
			if x.r == nil {
				ok = false
				continue
			}
			word, err := x.r.Word32(0)
			if err != nil {
				ok = false
				continue
			}
			*x.v = word.Load()
		}
		doorbells.Doorbells = ok
	}) == nil && doorbells.Doorbells {
		v = doorbells
	}
	sq := v
	if p.sq != nil && shm.Guard(func() { sq.Ring = entries(&sq, p) }) == nil && sq.Ring {
		v = sq
	}
	return v
}

var table = crc64.MakeTable(crc64.ECMA)

// entries reads the SQ. What it is while entries change says nothing; twice the same of what stands still does.
func entries(v *View, p *place) bool {
	all, err := p.sq.Bytes(0, uint64(p.size)*ring.SQESize)
	if err != nil || p.next >= p.size {
		return false
	}
	v.Hash = crc64.Checksum(all, table)
	v.Next = slices.ContainsFunc(all[p.next*ring.SQESize:(p.next+1)*ring.SQESize], func(b byte) bool { return b != 0 })
	return true
}
