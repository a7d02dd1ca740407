package ring

import (
	"errors"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// R5: the phase word is stored last and loaded first, so a CQE with the new phase has its new body.
func TestRule05_PhaseWordLast(t *testing.T) {
	for _, kind := range []string{"heap", "memfd"} {
		t.Run(kind, func(t *testing.T) {
			for _, size := range []uint32{2, 3, 64, 4096} {
				n := uint64(5_000_000)
				if testing.Short() || kind == "heap" {
					n /= 10
				}
				if size < 64 {
					n /= 10 // each entry is a hand-over from core to core
				}
				noTornEntry(t, memory(t, kind, uint64(size)*CQESize), size, n)
			}
		})
	}
}

func noTornEntry(t *testing.T, mem *shm.Region, size uint32, n uint64) {
	long := 700 * time.Millisecond // where the race detector slows it down
	if testing.Short() {
		long /= 4
	}
	end := time.Now().Add(long)
	p, c := newCQ(t, mem, size)
	var head atomic.Uint32
	var stop atomic.Bool
	done := make(chan error, 1)
	go func() {
		rng := rand.New(rand.NewPCG(1, uint64(size)))
		es := make([]Entry, 0, size)
		for next := uint64(0); next < n && !stop.Load(); {
			if err := p.Consumed(head.Load()); err != nil {
				done <- err
				return
			}
			free := p.Free()
			if free == 0 {
				runtime.Gosched()
				continue
			}
			es = es[:0]
			for range 1 + rng.Uint32N(free) {
				es = append(es, entry(next))
				next++
			}
			p.Post(es)
		}
		done <- nil
	}()
	for i := uint64(0); i < n; {
		e, ok := c.Next()
		if !ok {
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				done <- nil
			default:
			}
			head.Store(c.Head())
			runtime.Gosched()
			continue
		}
		if e != entry(i) {
			t.Errorf("size %d: entry %d is %+v, want %+v", size, i, e, entry(i))
			stop.Store(true)
			break
		}
		if i++; i%7 == 0 {
			head.Store(c.Head())
		}
		if i%4096 == 0 && time.Now().After(end) {
			stop.Store(true)
			break
		}
	}
	head.Store(c.Head())
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// R4 and R6 between two threads: entries are complete below a tail that was loaded atomically.
func TestRule04_EntriesBeforeTheTail(t *testing.T) {
	for _, kind := range []string{"heap", "memfd"} {
		t.Run(kind, func(t *testing.T) {
			const size, n = 5, 30_000
			p, c := newSQ(t, memory(t, kind, size*SQESize), size)
			var tail, head atomic.Uint32
			done := make(chan error, 1)
			go func() {
				for next := uint64(0); next < n; {
					if err := p.Released(uint16(head.Load())); err != nil {
						done <- err
						return
					}
					if p.Free() == 0 {
						runtime.Gosched()
						continue
					}
					for range p.Free() {
						cmd := command(next)
						p.Push(&cmd)
						next++
					}
					tail.Store(p.Tail())
				}
				done <- nil
			}()
			var cmd nvme.Command
			for i := uint64(0); i < n; {
				k, err := c.Pending(tail.Load())
				if err != nil {
					t.Fatal(err)
				}
				if k == 0 {
					select {
					case err := <-done:
						if err != nil {
							t.Fatal(err)
						}
						done <- nil
					default:
					}
					runtime.Gosched()
				}
				for range k {
					if c.Fetch(&cmd); cmd != command(i) {
						t.Fatalf("command %d is %+v", i, cmd)
					}
					i++
				}
				head.Store(c.Head())
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// R36 here: the ring's own stores and loads, one of which is in assembly, fault into an error too.
func TestRule36_RingOverMemoryThatIsGone(t *testing.T) {
	const size = 4096
	fd, err := unix.MemfdCreate("ring-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, size*SQESize); err != nil {
		t.Fatal(err)
	}
	mem, err := shm.Map(fd, 0, size*SQESize, true)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	sp, sc := newSQ(t, mem, size)
	cp, cc := newCQ(t, mem, size)
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	var cmd nvme.Command
	for name, f := range map[string]func(){
		"Push":  func() { sp.Push(&cmd) },
		"Fetch": func() { sc.Fetch(&cmd) },
		"Post":  func() { cp.Post(make([]Entry, 300)) },
		"Next":  func() { cc.Next() },
		"Ready": func() { cc.Ready() },
	} {
		var fault *shm.FaultError
		if err := shm.Guard(f); !errors.As(err, &fault) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
