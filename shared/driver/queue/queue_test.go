package queue

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is longer than anything takes that works, on a busy machine.
const patience = time.Minute

var sizes = []uint32{2, 3, 64, 4096}

// pairOfHalves is a queue and the device's half of it, on heap memory that the race detector sees.
type pairOfHalves struct {
	*Queue
	sq         *ring.SQConsumer
	cq         *ring.CQProducer
	tail, head *dbbuf.Poller
	page       *shm.Region // doorbells, then event indices
	sqMem      *shm.Region
	cqMem      *shm.Region
	fd         int
}

const qid = 3

func newPair(tb testing.TB, size uint32, change func(*Config)) *pairOfHalves {
	tb.Helper()
	p := &pairOfHalves{sqMem: shm.NewHeap(int(size) * 64), cqMem: shm.NewHeap(int(size) * 16), page: shm.NewHeap(8192), fd: -1}
	must := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
	}
	ei, err := p.page.View(4096, 4096)
	must(err)
	tailWord, headWord, err := dbbuf.Slots(p.page, qid, 0)
	must(err)
	tailEI, headEI, err := dbbuf.Slots(ei, qid, 0)
	must(err)
	bell := func(uint32) error { return nil }
	cfg := Config{
		QID: qid, Size: size, SQ: p.sqMem, CQ: p.cqMem, EventFD: -1,
		Tail: dbbuf.NewShadow(tailWord, tailEI, bell), Head: dbbuf.NewShadow(headWord, headEI, bell),
	}
	if change != nil {
		change(&cfg)
	}
	p.fd = cfg.EventFD
	p.Queue, err = New(cfg)
	must(err)
	p.sq, err = ring.NewSQConsumer(p.sqMem, size)
	must(err)
	p.cq, err = ring.NewCQProducer(p.cqMem, size)
	must(err)
	p.tail, p.head = dbbuf.NewPoller(tailWord, tailEI, size), dbbuf.NewPoller(headWord, headEI, size)
	return p
}

// eventFD gives a Config an interrupt.
func eventFD(tb testing.TB, cfg *Config) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		tb.Fatal(err)
	}
	cfg.EventFD = fd
	tb.Cleanup(func() { unix.Close(fd) })
}

// fetch is the device taking all commands that it can see.
func (p *pairOfHalves) fetch(tb testing.TB) (cmds []nvme.Command) {
	n, err := p.sq.Pending(p.tail.Load())
	if err != nil {
		tb.Error(err)
	}
	for range n {
		var c nvme.Command
		p.sq.Fetch(&c)
		cmds = append(cmds, c)
	}
	return cmds
}

// answer is the device completing a command. Its result says which.
func (p *pairOfHalves) answer(tb testing.TB, c *nvme.Command) {
	if err := p.cq.Consumed(p.head.Load() &^ dbbuf.QuietBit); err != nil {
		tb.Error(err)
	}
	if p.cq.Free() == 0 {
		tb.Error("the driver left no room in the CQ for a command it has sent")
		return
	}
	p.cq.Post([]ring.Entry{ring.MakeEntry(uint64(c.CDW10), p.sq.Head(), qid, c.CID, nvme.Status(c.CDW11))})
}

func (p *pairOfHalves) submit(tb testing.TB, tag uint64) uint16 {
	slot, ok := p.Take(tag)
	if !ok {
		tb.Fatal("no slot")
	}
	p.Push(slot, &nvme.Command{Opcode: nvme.IORead, CDW10: uint32(tag), CDW11: uint32(tag) & 0x7FFF})
	return slot
}

func checkResult(tb testing.TB, c *Completion) {
	if c.Result != uint32(c.Tag) || c.Status != nvme.Status(c.Tag&0x7FFF) {
		tb.Errorf("tag %d came back with result %d, status %v", c.Tag, c.Result, c.Status)
	}
}

// TestModel runs random driver and device steps, with completions out of order, against a map of what is outstanding.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		size := rapid.SampledFrom([]uint32{2, 3, 5, 64}).Draw(rt, "size")
		p := newPair(t, size, nil)
		live := map[uint64]bool{}
		var device []nvme.Command
		out := make([]Completion, 7)
		tag := uint64(0)
		for range rapid.IntRange(1, 300).Draw(rt, "steps") {
			switch rapid.IntRange(0, 3).Draw(rt, "step") {
			case 0:
				for range rapid.IntRange(0, p.Free()).Draw(rt, "batch") {
					p.submit(t, tag)
					live[tag] = true
					tag++
				}
				if err := p.Publish(); err != nil {
					rt.Fatal(err)
				}
			case 1:
				device = append(device, p.fetch(t)...)
			case 2:
				for range rapid.IntRange(0, len(device)).Draw(rt, "answers") {
					i := rapid.IntRange(0, len(device)-1).Draw(rt, "which")
					p.answer(t, &device[i])
					device = append(device[:i], device[i+1:]...)
				}
			case 3:
				n, err := p.Reap(out[:rapid.IntRange(0, len(out)).Draw(rt, "room")])
				if err != nil {
					rt.Fatal(err)
				}
				for i := range out[:n] {
					checkResult(t, &out[i])
					if !live[out[i].Tag] {
						rt.Fatalf("tag %d twice", out[i].Tag)
					}
					delete(live, out[i].Tag)
				}
			}
			if p.Outstanding() != len(live) || p.Free()+p.Outstanding() != int(size-1) {
				rt.Fatalf("%d outstanding, %d free; %d are live", p.Outstanding(), p.Free(), len(live))
			}
		}
	})
}

// TestLaps goes around the rings and through all generations of command identifiers, at every size that has its own way to wrap.
func TestLaps(t *testing.T) {
	for _, size := range sizes {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			p := newPair(t, size, nil)
			out := make([]Completion, 64)
			rng := rand.New(rand.NewPCG(1, uint64(size)))
			tag := uint64(0)
			for range 70000/int(size) + 40 {
				for p.Free() > 0 {
					p.submit(t, tag)
					tag++
				}
				if _, ok := p.Take(0); ok {
					t.Fatal("more commands than the rings hold (R9)")
				}
				if err := p.Publish(); err != nil {
					t.Fatal(err)
				}
				cmds := p.fetch(t)
				rng.Shuffle(len(cmds), func(i, j int) { cmds[i], cmds[j] = cmds[j], cmds[i] })
				for i := range cmds {
					if cmds[i].CID == 0xFFFF {
						t.Fatal("command identifier FFFFh, which is reserved")
					}
					p.answer(t, &cmds[i])
				}
				for p.Outstanding() > 0 {
					n, err := p.Reap(out)
					if err != nil || n == 0 {
						t.Fatalf("%d, %v", n, err)
					}
					for i := range out[:n] {
						checkResult(t, &out[i])
					}
				}
			}
		})
	}
}

// TestBadCompletions posts what no conforming device posts. Each must fail the queue, and nothing else.
func TestBadCompletions(t *testing.T) {
	for _, size := range sizes {
		for name, bad := range map[string]func(p *pairOfHalves, c *nvme.Command) ring.Entry{
			"slot not outstanding": func(p *pairOfHalves, c *nvme.Command) ring.Entry { return ring.MakeEntry(0, 1, qid, c.CID^1, 0) },
			"old generation": func(p *pairOfHalves, c *nvme.Command) ring.Entry {
				return ring.MakeEntry(0, 1, qid, c.CID-p.genUnit, 0)
			},
			"FFFFh":    func(p *pairOfHalves, c *nvme.Command) ring.Entry { return ring.MakeEntry(0, 1, qid, 0xFFFF, 0) },
			"wrong SQ": func(p *pairOfHalves, c *nvme.Command) ring.Entry { return ring.MakeEntry(0, 1, qid+1, c.CID, 0) },
			"SQ head past the tail": func(p *pairOfHalves, c *nvme.Command) ring.Entry {
				return ring.MakeEntry(0, 2%p.Size(), qid, c.CID, 0)
			},
			"SQ head outside": func(p *pairOfHalves, c *nvme.Command) ring.Entry { return ring.MakeEntry(0, p.Size(), qid, c.CID, 0) },
		} {
			t.Run(fmt.Sprintf("%s/%d", name, size), func(t *testing.T) {
				if size == 2 && name == "SQ head past the tail" {
					t.Log("a ring of 2 has no such head")
					return
				}
				p := newPair(t, size, nil)
				p.submit(t, 1)
				if err := p.Publish(); err != nil {
					t.Fatal(err)
				}
				cmds := p.fetch(t)
				p.cq.Post([]ring.Entry{bad(p, &cmds[0])})
				n, err := p.Reap(make([]Completion, 4))
				if n != 0 || !errors.Is(err, ErrProtocol) {
					t.Fatalf("%d, %v", n, err)
				}
				if p.Err() != err || p.Publish() != err || p.Wait(context.Background()) != err {
					t.Error("the first error is not the one that stays")
				}
				var tags []uint64
				p.Drop(func(tag uint64) { tags = append(tags, tag) })
				if len(tags) != 1 || tags[0] != 1 || p.Outstanding() != 0 {
					t.Errorf("dropped %v", tags)
				}
			})
		}
	}
}

func TestCompletedTwice(t *testing.T) {
	p := newPair(t, 64, nil)
	p.submit(t, 1)
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	cmds := p.fetch(t)
	p.answer(t, &cmds[0])
	p.answer(t, &cmds[0])
	n, err := p.Reap(make([]Completion, 4))
	if n != 1 || !errors.Is(err, ErrProtocol) {
		t.Fatalf("%d, %v", n, err)
	}
}

// TestPhaseGames writes entries of the wrong phase, ahead of the turn, and over what was read. Only an entry at the head with this
// lap's phase is a completion.
func TestPhaseGames(t *testing.T) {
	p := newPair(t, 3, nil)
	hi := func(i uint64) uint64 { return 16*i + 8 }
	word := func(off uint64) interface {
		Load() uint64
		Store(uint64)
	} {
		w, err := p.cqMem.Word64(off)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	out := make([]Completion, 4)
	for lap := range uint64(20) {
		p.submit(t, lap)
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		cmds := p.fetch(t)
		head := uint64(p.Queue.cq.Head())
		good := ring.MakeEntry(uint64(cmds[0].CDW10), p.sq.Head(), qid, cmds[0].CID, nvme.Status(cmds[0].CDW11))
		phase := word(hi(head)).Load() & (1 << 48)
		// The right entry with the old phase, and any phase in the next place.
		word(hi(head)).Store(good.Hi | phase)
		word(hi((head + 1) % 3)).Store(good.Hi | phase&^(lap<<48))
		if n, err := p.Reap(out); n != 0 || err != nil {
			t.Fatalf("lap %d: %d, %v", lap, n, err)
		}
		// What lies in the next place is put back, or it would be a completion after the head has moved.
		next := uint64(0)
		if head+1 == 3 && phase == 0 || head+1 != 3 && phase != 0 {
			next = 1 << 48
		}
		word(hi((head + 1) % 3)).Store(next)
		p.cq.Post([]ring.Entry{good})
		if n, err := p.Reap(out); n != 1 || err != nil {
			t.Fatalf("lap %d: %d, %v", lap, n, err)
		}
		checkResult(t, &out[0])
		if err := p.cq.Consumed(p.head.Load()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNewRefusesSizes(t *testing.T) {
	for _, size := range []uint32{0, 1, MaxSize + 1, 65536} {
		_, err := New(Config{Size: size, SQ: shm.NewHeap(1 << 22), CQ: shm.NewHeap(1 << 20)})
		if err == nil {
			t.Errorf("size %d", size)
		}
	}
	if _, err := New(Config{Size: 64, SQ: shm.NewHeap(63 * 64), CQ: shm.NewHeap(4096)}); err == nil {
		t.Error("an SQ that is too short")
	}
}

func TestTimeouts(t *testing.T) {
	const limit = 20 * time.Millisecond
	t.Run("reap", func(t *testing.T) {
		p := newPair(t, 64, func(c *Config) { c.Timeout = limit })
		p.submit(t, 1)
		begin := time.Now()
		for {
			if n, err := p.Reap(make([]Completion, 1)); err != nil {
				if n != 0 || !errors.Is(err, ErrTimeout) || time.Since(begin) < limit {
					t.Fatalf("%d, %v", n, err)
				}
				return
			}
			if time.Since(begin) > patience {
				t.Fatal("no timeout")
			}
		}
	})
	for name, change := range map[string]func(*Config){
		"poll":  func(c *Config) {},
		"sleep": func(c *Config) { eventFD(t, c) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 64, func(c *Config) { c.Timeout = limit; change(c) })
			p.submit(t, 1)
			if err := p.Publish(); err != nil {
				t.Fatal(err)
			}
			if err := p.Wait(context.Background()); !errors.Is(err, ErrTimeout) {
				t.Fatal(err)
			}
			if !errors.Is(p.Err(), ErrTimeout) {
				t.Fatal("the queue goes on after a timeout")
			}
		})
	}
}

func TestWaitEnds(t *testing.T) {
	for _, poll := range []bool{false, true} {
		p := newPair(t, 64, func(c *Config) {
			if !poll {
				eventFD(t, c)
			}
		})
		if err := p.Wait(context.Background()); err == nil {
			t.Fatal("waited for nothing")
		}
		p.submit(t, 1)
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
		if err := p.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		cancel()
		because := errors.New("because")
		go func() {
			time.Sleep(5 * time.Millisecond)
			_ = p.Fail(because)
			_ = p.Fail(errors.New("too late"))
		}()
		if err := p.Wait(context.Background()); err != because {
			t.Fatal(err)
		}
	}
}

func TestNothingIsAllocated(t *testing.T) {
	p := newPair(t, 64, func(c *Config) { eventFD(t, c); c.Timeout = time.Minute })
	out := make([]Completion, 64)
	es := make([]ring.Entry, 0, 64)
	ctx := context.Background()
	round := func() {
		p.Stamp()
		for i := range 16 {
			slot, _ := p.Take(uint64(i))
			cmd := nvme.Command{Opcode: nvme.IORead}
			p.Push(slot, &cmd)
		}
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		n, err := p.sq.Pending(p.tail.Load())
		if err != nil {
			t.Fatal(err)
		}
		var cmd nvme.Command
		es = es[:0]
		for range n {
			p.sq.Fetch(&cmd)
			es = append(es, ring.MakeEntry(0, p.sq.Head(), qid, cmd.CID, 0))
		}
		if err := p.cq.Consumed(p.head.Load() &^ dbbuf.QuietBit); err != nil {
			t.Fatal(err)
		}
		p.cq.Post(es)
		if err := p.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		if n, err := p.Reap(out); n != 16 || err != nil {
			t.Fatal(n, err)
		}
	}
	if n := testing.AllocsPerRun(100, round); n != 0 {
		t.Errorf("%v allocations", n)
	}
	p.submit(t, 1)
	if n := testing.AllocsPerRun(3, func() { _ = p.sleep() }); n != 0 {
		t.Errorf("%v allocations in a sleep", n)
	}
}
