package ring

import (
	"fmt"
	"testing"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sizes are those at which rings wrap in odd ways: the smallest, no power of two, one, the largest.
var sizes = []uint32{2, 3, 4, 5, 64, 4096, 65536}

// onEach runs f on heap memory, which the race detector sees, and on mapped memory, at each size.
func onEach(t *testing.T, f func(t *testing.T, size uint32, mem func(bytes uint64) *shm.Region)) {
	for _, kind := range []string{"heap", "memfd"} {
		for _, size := range sizes {
			t.Run(fmt.Sprintf("%s/%d", kind, size), func(t *testing.T) {
				f(t, size, func(n uint64) *shm.Region { return memory(t, kind, n) })
			})
		}
	}
}

func memory(t testing.TB, kind string, size uint64) *shm.Region {
	t.Helper()
	if kind == "heap" {
		return shm.NewHeap(int(size))
	}
	r, err := shm.NewMemfd("ring-test", size)
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

func newSQ(t testing.TB, mem *shm.Region, size uint32) (*SQProducer, *SQConsumer) {
	t.Helper()
	p, err := NewSQProducer(mem, size)
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewSQConsumer(mem, size)
	if err != nil {
		t.Fatal(err)
	}
	return p, c
}

func newCQ(t testing.TB, mem *shm.Region, size uint32) (*CQProducer, *CQConsumer) {
	t.Helper()
	p, err := NewCQProducer(mem, size)
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewCQConsumer(mem, size)
	if err != nil {
		t.Fatal(err)
	}
	return p, c
}

// command and entry are recognisable in every word, so that a torn or misplaced copy shows.
func command(n uint64) nvme.Command {
	return nvme.Command{
		Opcode: uint8(n), CID: uint16(n >> 3), NSID: uint32(n * 3), MPTR: n * 5, PRP1: n * 7, PRP2: ^n,
		CDW10: uint32(n), CDW11: uint32(n >> 32), CDW15: uint32(n * 11),
	}
}

func entry(n uint64) Entry {
	return Entry{Lo: n * 0x9e3779b97f4a7c15, Hi: n & (phaseBit - 1)}
}
