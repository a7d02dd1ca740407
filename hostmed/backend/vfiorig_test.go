package backend

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/hostmed/internal/hostnvme"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// oneFunction is a machine with one function, which is a controller model on the heap.
type oneFunction struct{ fn hostnvme.Function }

func (oneFunction) Lookup(address string) (string, error) { return address, nil }

func (m oneFunction) Open(string, hostnvme.Hooks) (hostnvme.Function, error) { return m.fn, nil }

// vfioRig is a backend vfio: over such a machine.
type vfioRig struct {
	*vfio
	model  *nvmetest.Device
	guests *nvmetest.Guests
}

// vfioRigs counts them: each has an address of its own.
var vfioRigs atomic.Uint32

// vfioOver opens s over a controller that is made of cfg. One without interrupts is as by sysfs without an IOMMU: it finds each page elsewhere.
func vfioOver(t testing.TB, s Spec, cfg nvmetest.Config) (*vfioRig, error) {
	t.Helper()
	return vfioTelling(t, s, cfg, hclog.NewNullLogger())
}

// vfioTelling is vfioOver with a log.
func vfioTelling(t testing.TB, s Spec, cfg nvmetest.Config, log hclog.Logger) (*vfioRig, error) {
	t.Helper()
	model := nvmetest.New(cfg)
	t.Cleanup(model.Close)
	guests := model.ForGuests()
	s.Kind, s.Path = KindVFIO, fmt.Sprintf("%s.%d", t.Name(), vfioRigs.Add(1))
	fn := hostnvme.Function(guests)
	if cfg.Vectors < 0 {
		fn = guests.Scattered(1)
	}
	dev, err := hostnvme.OpenOn(context.Background(), oneFunction{fn}, s.Path, hostnvme.Options{Timeout: time.Minute, Logger: log.Named("vfio")})
	if err != nil {
		t.Fatal(err)
	}
	b, err := newVFIO(s, dev, log)
	if err != nil {
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
		return nil, err
	}
	return &vfioRig{b, model, guests}, nil
}

// again opens another namespace of the device.
func (r *vfioRig) again(s Spec) (*vfioRig, error) {
	s.Kind, s.Path = KindVFIO, r.spec.Path
	dev, err := hostnvme.OpenOn(context.Background(), oneFunction{r.guests}, s.Path, hostnvme.Options{})
	if err != nil {
		return nil, err
	}
	b, err := newVFIO(s, dev, hclog.NewNullLogger())
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return &vfioRig{b, r.model, r.guests}, nil
}

// vfioOf is vfioOver for a namespace with size bytes in blocks of lba, and what lies before and behind s of as much again.
func vfioOf(t testing.TB, s Spec, size uint64, lba uint32) (*vfioRig, error) {
	return vfioWith(t, s, size, lba, 0)
}

// vfioWith is vfioOf over a controller with so many interrupt vectors; 0: some, -1: none.
func vfioWith(t testing.TB, s Spec, size uint64, lba uint32, vectors int) (*vfioRig, error) {
	ns := nvmetest.Namespace{Blocks: size / uint64(lba), LBADS: uint8(bits.TrailingZeros32(lba))}
	if s.Size != 0 {
		ns.Blocks = (s.Offset + s.Size + size) / uint64(lba)
	}
	return vfioOver(t, s, nvmetest.Config{Namespaces: []nvmetest.Namespace{ns}, SGLS: nvme.SGLSByteAligned, Vectors: vectors})
}

// pinned tells the device of all the memory of guests that there is.
type pinned struct {
	*vfioRig
	memory *memories
}

// memories are what guestMemory has given.
type memories struct {
	mu  sync.Mutex
	all [][]byte
}

// withMemory makes guestMemory, until the end of t, give memory that the device of r reaches.
func withMemory(t testing.TB, r *vfioRig) pinned {
	m := new(memories)
	heapMemory = func(n int) []byte {
		b := r.guests.Memory((n + shm.PageSize - 1) &^ (shm.PageSize - 1))
		m.mu.Lock()
		defer m.mu.Unlock()
		m.all = append(m.all, b)
		return b[:n:n]
	}
	t.Cleanup(func() {
		heapMemory = nil
		if n, _ := r.dev.Pairs().Counts(); n.Bounced > 0 {
			t.Errorf("the data of %d commands was copied", n.Bounced)
		}
	})
	return pinned{r, m}
}

func (p pinned) NewQueue() (Queue, error) {
	q, err := p.vfioRig.NewQueue()
	return &pinnedQueue{Queue: q, p: p}, err
}

type pinnedQueue struct {
	Queue
	p    pinned
	told int
}

func (q *pinnedQueue) Polled() bool { return q.Queue.(Poller).Polled() }

func (q *pinnedQueue) Submit(reqs, done []*Request) int {
	m := q.p.memory
	m.mu.Lock()
	for ; q.told < len(m.all); q.told++ {
		q.AddMemory(m.all[q.told])
	}
	m.mu.Unlock()
	q.p.AwaitMemory()
	return q.Queue.Submit(reqs, done)
}

// ownDevices are those that this process drives.
var ownDevices = []flavour{
	{"vfio", func(t testing.TB, size uint64, lba uint32) Backend {
		r, err := vfioOf(t, Spec{}, size, lba)
		return opened(t)(r, err)
	}},
	{"vfio pinned", func(t testing.TB, size uint64, lba uint32) Backend {
		r, err := vfioOf(t, Spec{}, size, lba)
		opened(t)(r, err)
		return withMemory(t, r)
	}},
	{"vfio scattered", func(t testing.TB, size uint64, lba uint32) Backend {
		r, err := vfioWith(t, Spec{}, size, lba, -1)
		opened(t)(r, err)
		return withMemory(t, r)
	}},
	{"vfio slice", func(t testing.TB, size uint64, lba uint32) Backend {
		r, err := vfioOf(t, Spec{Offset: 192 << 10, Size: size, Queues: 2, Poll: true}, size, lba)
		return opened(t)(r, err)
	}},
	{"faulty vfio", func(t testing.TB, size uint64, lba uint32) Backend {
		r, err := vfioOf(t, Spec{}, size, lba)
		opened(t)(r, err)
		rules, err := parseFaults("delay=1us")
		if err != nil {
			t.Fatal(err)
		}
		return withFaults(r, r.spec, rules)
	}},
}
