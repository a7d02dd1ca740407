package dbbuf_test

import (
	"fmt"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func BenchmarkPublish(b *testing.B) {
	p := newPair(b, "memfd", 256)
	p.poll.BehindNow(0)
	pub := dbbuf.NewShadow(p.word, p.ei, func(uint32) error { return nil })
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		_ = pub.Publish(uint32(i) % 256)
	}
}

func BenchmarkArm(b *testing.B) {
	p := newPair(b, "memfd", 256)
	for i := 0; i < b.N; i++ {
		p.poll.Arm(0)
	}
}

func BenchmarkBehind(b *testing.B) {
	p := newPair(b, "memfd", 256)
	for i := 0; i < b.N; i++ {
		p.poll.Behind(uint32(i) % 256)
	}
}

// bareRings is one queue pair over one memfd and nothing else: no commands are carried out.
type bareRings struct {
	sq         *ring.SQProducer
	cq         *ring.CQConsumer
	tail, head *dbbuf.Publisher

	sqDev            *ring.SQConsumer
	cqDev            *ring.CQProducer
	tailDev, headDev *dbbuf.Poller
}

func newBareRings(b *testing.B, size uint32) *bareRings {
	b.Helper()
	must := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	mem, err := shm.NewMemfd("bare-rings", 2*shm.PageSize+uint64(size)*(ring.SQESize+ring.CQESize))
	must(err)
	b.Cleanup(func() { mem.Close() })
	view := func(off, n uint64) *shm.Region {
		v, err := mem.View(off, n)
		must(err)
		return v
	}
	shadow, events := view(0, shm.PageSize), view(shm.PageSize, shm.PageSize)
	sqMem := view(2*shm.PageSize, uint64(size)*ring.SQESize)
	cqMem := view(2*shm.PageSize+uint64(size)*ring.SQESize, uint64(size)*ring.CQESize)
	r := &bareRings{}
	sqWord, cqWord, err := dbbuf.Slots(shadow, 1, 0)
	must(err)
	sqEI, cqEI, err := dbbuf.Slots(events, 1, 0)
	must(err)
	bell := func(uint32) error { return nil } // counted by the Publisher; nobody sleeps
	r.tail, r.head = dbbuf.NewShadow(sqWord, sqEI, bell), dbbuf.NewShadow(cqWord, cqEI, bell)
	r.tailDev, r.headDev = dbbuf.NewPoller(sqWord, sqEI, size), dbbuf.NewPoller(cqWord, cqEI, size)
	r.sq, err = ring.NewSQProducer(sqMem, size)
	must(err)
	r.sqDev, err = ring.NewSQConsumer(sqMem, size)
	must(err)
	r.cqDev, err = ring.NewCQProducer(cqMem, size)
	must(err)
	r.cq, err = ring.NewCQConsumer(cqMem, size)
	must(err)
	return r
}

// device serves n commands, at most 16 at a time.
func (r *bareRings) device(n int) error {
	const batch = 16
	var cmd nvme.Command
	var es [batch]ring.Entry
	r.tailDev.BehindNow(0)
	r.headDev.BehindNow(0)
	for idle := 0; n > 0; {
		k, err := r.sqDev.Pending(r.tailDev.Load())
		if err != nil {
			return err
		}
		if k == 0 {
			if idle++; idle > 1<<16 { // fewer cores than sides
				runtime.Gosched()
			}
			continue
		}
		idle = 0
		if r.cqDev.Free() < k {
			if err := r.cqDev.Consumed(r.headDev.Load()); err != nil {
				return err
			}
			r.headDev.Behind(r.cqDev.Head())
		}
		k = min(k, r.cqDev.Free(), batch)
		for i := range k {
			r.sqDev.Fetch(&cmd)
			es[i] = ring.MakeEntry(0, r.sqDev.Head(), 1, cmd.CID, 0)
		}
		r.tailDev.Behind(r.sqDev.Head())
		r.cqDev.Post(es[:k])
		n -= int(k)
	}
	return nil
}

// driver keeps depth commands outstanding until n are complete.
func (r *bareRings) driver(n int, depth uint32, size uint32) error {
	var cmd nvme.Command
	outstanding, unpublished, left := uint32(0), uint32(0), n
	for idle := 0; left > 0 || outstanding > 0; {
		k := uint32(min(int(depth-outstanding), left))
		for range k {
			r.sq.Push(&cmd)
		}
		if k > 0 {
			outstanding += k
			left -= int(k)
			if unpublished >= size/4 || unpublished+outstanding >= size-1 {
				unpublished = 0
				if err := r.head.Publish(r.cq.Head()); err != nil {
					return err
				}
			}
			if err := r.tail.Publish(r.sq.Tail()); err != nil {
				return err
			}
		}
		got := false
		for {
			e, ok := r.cq.Next()
			if !ok {
				break
			}
			got = true
			outstanding--
			unpublished++
			if err := r.sq.Released(e.SQHead()); err != nil {
				return err
			}
		}
		if got {
			idle = 0
		} else if idle++; idle > 1<<16 {
			runtime.Gosched()
		}
	}
	return nil
}

// BenchmarkBareRings is the ceiling of the data path: two pinned threads, rings and doorbells. ns/op is ns for
// each command; rings/op are doorbell writes for each.
func BenchmarkBareRings(b *testing.B) {
	for _, qd := range []uint32{1, 32, 128} {
		b.Run(fmt.Sprintf("qd=%d", qd), func(b *testing.B) {
			const size = 256
			r := newBareRings(b, size)
			var cpus unix.CPUSet
			if err := unix.SchedGetaffinity(0, &cpus); err != nil {
				b.Fatal(err)
			}
			pin := func(nth int) {
				runtime.LockOSThread() // the thread ends with its goroutine
				if cpus.Count() < 2 {
					return
				}
				for cpu := 0; ; cpu++ {
					if !cpus.IsSet(cpu) {
						continue
					}
					if nth--; nth < 0 {
						var one unix.CPUSet
						one.Set(cpu)
						_ = unix.SchedSetaffinity(0, &one)
						return
					}
				}
			}
			ended := make(chan error, 2)
			b.ReportAllocs()
			b.ResetTimer()
			go func() { pin(1); ended <- r.device(b.N) }()
			go func() { pin(0); ended <- r.driver(b.N, qd, size) }()
			for range 2 {
				if err := <-ended; err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(r.tail.Rings+r.head.Rings)/float64(b.N), "rings/op")
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds()/1e6, "Mcmd/s")
		})
	}
}
