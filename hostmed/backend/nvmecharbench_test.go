package backend

import (
	"testing"

	"github.com/shadowbell/shadowbell/shared/uring"
)

// idleRing is a ring whose kernel has always done everything.
type idleRing struct {
	fakeWideRing
	sqe  uring.SQE
	room []byte
	data []uint64
}

func (r *idleRing) GetSQE() *uring.SQE {
	r.prepared++
	r.sqe = uring.SQE{}
	clear(r.room)
	return &r.sqe
}

func (r *idleRing) Command(*uring.SQE) []byte { return r.room }

func (r *idleRing) Submit() (int, error) {
	n := r.prepared
	r.prepared = 0
	for range n {
		r.data = append(r.data, uint64(len(r.data)))
	}
	return n, nil
}

func (r *idleRing) ReapWide(out []uring.WideCQE) int {
	n := min(len(out), len(r.data))
	for i := range n {
		out[i] = uring.WideCQE{CQE: uring.CQE{UserData: uint64(n - 1 - i)}}
	}
	r.data = r.data[:len(r.data)-n]
	return n
}

// BenchmarkNVMeChar is what a read of 4 KiB costs here, beside the kernel: in batches of 32.
func BenchmarkNVMeChar(b *testing.B) {
	d := newFakeChar()
	c, err := tryFake(d, sliceSpec())
	if err != nil {
		b.Fatal(err)
	}
	defer c.id.release()
	r := &idleRing{room: room()}
	r.evfd = -1
	q, err := c.newQueue(r)
	if err != nil {
		b.Fatal(err)
	}
	defer q.Close()
	r.buffers = map[int][]byte{}
	mem := guestMemory(b, 1<<20)
	q.AddMemory(mem)
	const batch = 32
	var reqs, done []*Request
	for i := range batch {
		reqs, done = append(reqs, read(uint64(i)<<12, mem[i<<12:][:4096])), append(done, nil)
	}
	for b.Loop() {
		for n := q.Submit(reqs, done); n < batch; {
			n += q.Reap(done[n:])
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/batch, "ns/command")
}
