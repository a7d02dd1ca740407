package dbbuf_test

import (
	"errors"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// page returns a zeroed page of the kind "heap", which the race detector sees, or "memfd".
func page(t testing.TB, kind string) *shm.Region {
	t.Helper()
	if kind == "heap" {
		return shm.NewHeap(shm.PageSize)
	}
	r, err := shm.NewMemfd("dbbuf-test", shm.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// pair is both halves of one doorbell, with a doorbell register that counts.
type pair struct {
	word, ei *atomic.Uint32
	pub      *dbbuf.Publisher
	poll     *dbbuf.Poller
	rung     []uint32 // values of the MMIO writes
}

func newPair(t testing.TB, kind string, size uint32) *pair {
	t.Helper()
	p := &pair{}
	word, _, err1 := dbbuf.Slots(page(t, kind), 1, 0)
	ei, _, err2 := dbbuf.Slots(page(t, kind), 1, 0)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	p.word, p.ei = word, ei
	p.pub = dbbuf.NewShadow(word, ei, func(v uint32) error {
		p.rung = append(p.rung, v)
		return nil
	})
	p.poll = dbbuf.NewPoller(word, ei, size)
	return p
}

// publish publishes v and reports whether that rang.
func (p *pair) publish(t testing.TB, v uint32) bool {
	t.Helper()
	n := len(p.rung)
	if err := p.pub.Publish(v); err != nil {
		t.Fatal(err)
	}
	if len(p.rung) > n && p.rung[n] != v {
		t.Fatalf("rang %d for the value %d", p.rung[n], v)
	}
	return len(p.rung) > n
}

// readOnly returns r's memory mapped once more, for reading only: whoever writes it faults.
func readOnly(t testing.TB, r *shm.Region) *shm.Region {
	t.Helper()
	ro, err := shm.Map(r.FD(), 0, r.Len(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ro.Close() })
	return ro
}

func eventFD(t testing.TB) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}
