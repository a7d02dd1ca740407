package guestdrv

import (
	"fmt"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/driver/dma"
	"github.com/shadowbell/shadowbell/shared/driver/queue"
	"github.com/shadowbell/shadowbell/shared/driver/tally"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/prp"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// loopback is a QueuePair whose device is the test itself, on heap memory.
type loopback struct {
	pair *QueuePair
	sq   *ring.SQConsumer
	cq   *ring.CQProducer
	tail *dbbuf.Poller
	head *dbbuf.Poller
	es   []ring.Entry
}

// newLoopback tells e, if that is not nil, of its commands.
func newLoopback(tb testing.TB, size uint32, e *events.Shared) *loopback {
	tb.Helper()
	must := func(err error) {
		if err != nil {
			tb.Fatal(err)
		}
	}
	region := shm.NewHeap(16 << 20)
	pool, err := dma.NewPool(device.NewDMARegion(region, 1<<32, nil), "")
	must(err)
	c := &Controller{pool: pool, maxTransfer: maxTransfer}
	ns := &Namespace{c: c, nsid: 1, shift: 9}
	ns.blocks.Store(1 << 30)
	c.spaces.Store(&spaces{byID: map[uint32]*Namespace{1: ns}})
	sqMem, cqMem, page := shm.NewHeap(int(size)*64), shm.NewHeap(int(size)*16), shm.NewHeap(8192)
	ei, err := page.View(4096, 4096)
	must(err)
	tailWord, headWord, err := dbbuf.Slots(page, 1, 0)
	must(err)
	tailEI, headEI, err := dbbuf.Slots(ei, 1, 0)
	must(err)
	never := func(uint32) error { return fmt.Errorf("rang") }
	l := &loopback{
		tail: dbbuf.NewPoller(tailWord, tailEI, size), head: dbbuf.NewPoller(headWord, headEI, size),
		es: make([]ring.Entry, 0, size),
	}
	q, err := queue.New(queue.Config{
		QID: 1, Size: size, SQ: sqMem, CQ: cqMem, Tail: dbbuf.NewShadow(tailWord, tailEI, never), Head: dbbuf.NewShadow(headWord, headEI, never),
		EventFD: -1, Timeout: time.Minute, Events: e, Key: events.NewKey(1, 1),
	})
	must(err)
	io := &ioQueue{c: c, q: q, qid: 1, vector: noVector, lists: make([]prp.ListPage, size-1), listSize: listSize(maxTransfer)}
	l.pair = &QueuePair{io: io, q: q, tally: tally.New(false)}
	l.sq, err = ring.NewSQConsumer(sqMem, size)
	must(err)
	l.cq, err = ring.NewCQProducer(cqMem, size)
	must(err)
	l.tail.BehindNow(0)
	l.head.BehindNow(0)
	return l
}

// serve completes everything that was published.
func (l *loopback) serve(tb testing.TB) int {
	n, err := l.sq.Pending(l.tail.Load())
	if err != nil {
		tb.Fatal(err)
	}
	if err := l.cq.Consumed(l.head.Load()); err != nil {
		tb.Fatal(err)
	}
	l.es = l.es[:0]
	var cmd nvme.Command
	for range n {
		l.sq.Fetch(&cmd)
		l.es = append(l.es, ring.MakeEntry(0, l.sq.Head(), 1, cmd.CID, nvme.StatusSuccess))
	}
	l.cq.Post(l.es)
	l.tail.Behind(l.sq.Head())
	l.head.Behind(l.cq.Head())
	return int(n)
}

func reads(n int, bytes uint32) []IO {
	ios := make([]IO, n)
	for i := range ios {
		ios[i] = IO{Op: nvme.IORead, NSID: 1, Blocks: bytes / 512, LBA: uint64(i), IOVA: 1<<32 + uint64(i)*4096, Tag: uint64(i)}
	}
	return ios
}

// recorder is a ring of events, if there is to be one.
func recorder(tb testing.TB, on bool) *events.Shared {
	tb.Helper()
	if !on {
		return nil
	}
	w, err := events.New(events.Config{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { w.Close() })
	return events.NewShared(w)
}

// BenchmarkPair measures what Submit, Publish and Reap cost the driver for each I/O ("driver-ns/io"); the device's part
// of the loop is not counted there.
func BenchmarkPair(b *testing.B) {
	for _, tc := range []struct {
		qd       int
		bytes    uint32
		recorded bool
	}{{1, 4096, false}, {4, 4096, false}, {32, 4096, false}, {128, 4096, false}, {32, 128 << 10, false}, {1, 4096, true}, {32, 4096, true}} {
		name := fmt.Sprintf("qd%d/%dk", tc.qd, tc.bytes>>10)
		if tc.recorded {
			name += "/recorded"
		}
		b.Run(name, func(b *testing.B) {
			l := newLoopback(b, 256, recorder(b, tc.recorded))
			ios, out := reads(tc.qd, tc.bytes), make([]Result, tc.qd)
			var spent time.Duration
			total := 0
			for b.Loop() {
				t0 := time.Now()
				if n, err := l.pair.Submit(ios); n != len(ios) || err != nil {
					b.Fatal(n, err)
				}
				if err := l.pair.Publish(); err != nil {
					b.Fatal(err)
				}
				t1 := time.Now()
				l.serve(b)
				t2 := time.Now()
				n, err := l.pair.Reap(out)
				if n != len(ios) || err != nil {
					b.Fatal(n, err)
				}
				spent += t1.Sub(t0) + time.Since(t2)
				total += n
			}
			b.ReportMetric(float64(spent.Nanoseconds())/float64(total), "driver-ns/io")
		})
	}
}

func TestPairDoesNotAllocate(t *testing.T) {
	for i, bytes := range []uint32{512, 4096, 8192, 64 << 10, 1 << 20} {
		l := newLoopback(t, 64, recorder(t, i%2 == 1))
		ios, out := reads(32, bytes), make([]Result, 32)
		round := func() {
			if n, err := l.pair.Submit(ios); n != len(ios) || err != nil {
				t.Fatal(n, err)
			}
			if err := l.pair.Publish(); err != nil {
				t.Fatal(err)
			}
			l.serve(t)
			if n, err := l.pair.Reap(out); n != len(ios) || err != nil {
				t.Fatal(n, err)
			}
		}
		for range 4 {
			round() // PRP lists are taken once
		}
		if n := testing.AllocsPerRun(50, round); n != 0 {
			t.Errorf("%d bytes: %v allocations", bytes, n)
		}
	}
}
