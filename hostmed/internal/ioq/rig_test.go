package ioq

import (
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/hostmed/internal/ctrl"
	"github.com/shadowbell/shadowbell/hostmed/internal/gmem"
	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/spin"
)

// Guest memory of a rig: one memfd, mapped at IOVA base.
const (
	base      = 0x1_0000_0000
	guestSize = 8 << 20
	shadowOff = 0x1000
	eiOff     = 0x2000
	dataOff   = 0x100000
)

// rig is a controller's data path and, on the other side, a driver made of nothing but rings and doorbells.
type rig struct {
	t       testing.TB
	workers []*Worker
	mem     *gmem.Memory
	ctl     *Controller
	guest   *shm.Region
	errs    chan QueueError
	admin   atomic.Uint32
	next    uint64 // free guest memory
	scatter bool
	later   chan uint32 // OnPin was called
}

type rigConfig struct {
	workers int
	mode    ctrl.DoorbellMode
	backend backend.Backend
	shadow  bool
	noSpin  bool
	dstrd   uint8
	heap    bool // guest memory on the heap: the race detector sees it
	deaf    bool // nobody listens; otherwise somebody does in every second rig, which must make no difference
	scatter bool // each page of guest memory is a mapping of its own, in no order: a vIOMMU
}

var rigs atomic.Uint32

func newRig(t testing.TB, c rigConfig) *rig {
	t.Helper()
	r := &rig{t: t, mem: gmem.New(), errs: make(chan QueueError, 64), next: 0x10000}
	if c.workers == 0 {
		c.workers = 1
	}
	for i := range c.workers {
		w, err := StartWorker(WorkerConfig{ID: i, CPU: -1, NoSpin: c.noSpin, Logger: hclog.NewNullLogger()})
		if err != nil {
			t.Fatal(err)
		}
		r.workers = append(r.workers, w)
	}
	old := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(max(old, c.workers+2))
	if c.backend == nil {
		b, err := backend.Open("mem:size=16MiB")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		c.backend = b
	}
	var err error
	if c.heap {
		r.guest = shm.NewHeap(guestSize)
		err = r.mem.MapRegion(base, r.guest, true)
	} else {
		if r.guest, err = shm.NewMemfd("guest", guestSize); err != nil {
			t.Fatal(err)
		}
		r.scatter = c.scatter
		r.dmaMap(0, guestSize)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.ctl, err = NewController(Config{
		Workers: r.workers, Home: r.workers[0], Memory: r.mem, Mode: c.mode, DSTRD: c.dstrd, MaxQueues: 8, Vectors: 9, MDTSBytes: 1 << 20,
		Namespaces: []ctrl.Namespace{{NSID: 1, Backend: c.backend, Info: c.backend.Info()}},
		PageSize:   func() uint32 { return 4096 },
		OnAdmin:    func() { r.admin.Add(1) },
		OnError: func(e QueueError) {
			select {
			case r.errs <- e:
			default:
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, test := t.(*testing.T); test && !c.deaf && rigs.Add(1)%2 == 0 {
		listenTo(t, r.workers)
	}
	if c.shadow {
		if err := r.ctl.SetDoorbellPages(r.view(shadowOff, 4096), r.view(eiOff, 4096)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := r.ctl.Close(); err != nil {
			t.Error(err)
		}
		for _, w := range r.workers {
			w.Stop()
		}
		if err := r.mem.Close(); err != nil {
			t.Error(err)
		}
		r.guest.Close()
		runtime.GOMAXPROCS(old)
	})
	return r
}

// view returns [base+off, +n) of guest memory as the driver sees it.
func (r *rig) view(off, n uint64) *shm.Region {
	r.t.Helper()
	if !r.scatter {
		v, err := r.guest.View(off, n)
		if err != nil {
			r.t.Fatal(err)
		}
		return v
	}
	v, err := r.mem.Table().View(base+off, n)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { v.Close() })
	return v
}

// filePage is where the page at off of a scattered guest lies in its file.
func filePage(off uint64) uint64 {
	return off / shm.PageSize * 1031 % (guestSize / shm.PageSize) * shm.PageSize // 1031 is prime: each page once
}

// dmaMap maps [base+off, +n) as the client does.
func (r *rig) dmaMap(off, n uint64) {
	r.t.Helper()
	step := n
	if r.scatter {
		step = shm.PageSize
	}
	for at := off; at < off+n; at += step {
		file := at
		if r.scatter {
			file = at / shm.PageSize * 1031 % (guestSize / shm.PageSize) * shm.PageSize // 1031 is prime: each page once
		}
		fd, err := unix.Dup(r.guest.FD())
		if err == nil {
			err = r.mem.Map(base+at, step, file, fd, true)
		}
		if err != nil {
			r.t.Fatal(err)
		}
	}
}

// pair is a queue pair as its driver sees it.
type pair struct {
	r          *rig
	qid        uint16
	sq         *ring.SQProducer
	cq         *ring.CQConsumer
	tail, head *dbbuf.Publisher
	rings      atomic.Uint64
	nextCID    uint16
	irq        int // eventfd, or -1

	cqOff, sqOff uint64 // where the rings are
}

// alloc takes n bytes of guest memory and returns its offset, the driver's view and the device's.
func (r *rig) alloc(n uint64) (off uint64, driver, device *shm.Region) {
	r.t.Helper()
	off = r.next
	r.next += (n + 4095) &^ 4095
	device, err := r.mem.Table().View(base+off, n)
	if err != nil {
		r.t.Fatal(err)
	}
	return off, r.view(off, n), device
}

// pair makes a queue pair of size entries whose SQ feeds the CQ of the same id.
func (r *rig) pair(qid uint16, size uint32, ien bool) *pair {
	r.t.Helper()
	return r.makePair(qid, size, size, ien)
}

// pairOf makes a queue pair of different sizes.
func (r *rig) pairOf(qid uint16, sqSize, cqSize uint32) *pair {
	r.t.Helper()
	return r.makePair(qid, sqSize, cqSize, false)
}

func (r *rig) makePair(qid uint16, sqSize, cqSize uint32, ien bool) *pair {
	r.t.Helper()
	p := &pair{r: r, qid: qid, irq: -1}
	var cqMem, sqMem, cqDev, sqDev *shm.Region
	p.cqOff, cqMem, cqDev = r.alloc(uint64(cqSize) * 16)
	p.sqOff, sqMem, sqDev = r.alloc(uint64(sqSize) * 64)
	var err error
	if ien {
		if p.irq, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
			r.t.Fatal(err)
		}
		r.t.Cleanup(func() { unix.Close(p.irq) })
		fd, _ := unix.Dup(p.irq)
		r.ctl.SetVectors(int(qid), []int{fd}, 1)
	}
	if err := r.ctl.CreateCQ(ctrl.CQParams{QID: qid, Size: cqSize, IOVA: base + p.cqOff, Mem: cqDev, Vector: qid, IEN: ien}); err != nil {
		r.t.Fatal(err)
	}
	if err := r.ctl.CreateSQ(ctrl.SQParams{QID: qid, CQID: qid, Size: sqSize, IOVA: base + p.sqOff, Mem: sqDev}); err != nil {
		r.t.Fatal(err)
	}
	if p.sq, err = ring.NewSQProducer(sqMem, sqSize); err != nil {
		r.t.Fatal(err)
	}
	if p.cq, err = ring.NewCQConsumer(cqMem, cqSize); err != nil {
		r.t.Fatal(err)
	}
	p.tail, p.head = r.publisher(qid, false, &p.rings), r.publisher(qid, true, &p.rings)
	return p
}

// publisher makes the driver's end of a doorbell, in whatever mode the rig is.
func (r *rig) publisher(qid uint16, cq bool, rings *atomic.Uint64) *dbbuf.Publisher {
	dstrd := r.ctl.cfg.DSTRD
	off := uint64(nvme.SQTailDoorbell(qid, dstrd)) - nvme.DoorbellBase
	if cq {
		off = uint64(nvme.CQHeadDoorbell(qid, dstrd)) - nvme.DoorbellBase
	}
	ringBell := func(v uint32) error {
		rings.Add(1)
		w := r.workers[0]
		w.Post(func() { r.ctl.Doorbell(w, off, v) })
		return nil
	}
	word := func(page *shm.Region) *atomic.Uint32 {
		x, err := page.Word32(off)
		if err != nil {
			r.t.Fatal(err)
		}
		return x
	}
	switch {
	case r.ctl.shadow != nil:
		return dbbuf.NewShadow(word(r.view(shadowOff, 4096)), word(r.view(eiOff, 4096)), ringBell)
	case r.ctl.mode == ctrl.Mmap:
		return dbbuf.NewMapped(word(r.ctl.bells))
	}
	return dbbuf.NewMMIO(ringBell)
}

// push puts a command in the SQ, unseen.
func (p *pair) push(c nvme.Command) uint16 {
	c.CID = p.nextCID
	p.nextCID++
	p.sq.Push(&c)
	return c.CID
}

func (p *pair) publish() {
	p.r.t.Helper()
	if err := p.tail.Publish(p.sq.Tail()); err != nil {
		p.r.t.Fatal(err)
	}
}

// patience is how long a test waits for what must happen. It is no measure of speed: a lost wake-up lasts for ever.
const patience = 10 * time.Second

// pauseAfter passes time between two looks for something that is awaited since begin, and reports whether to look again. It polls for as
// long as a driver would; a test that went on so would keep the worker that it waits for off the core when the machine is busy.
func pauseAfter(begin time.Time) bool {
	switch waited := time.Since(begin); {
	case waited > patience:
		return false
	case waited < spin.Max:
		runtime.Gosched()
	default:
		time.Sleep(20 * time.Microsecond)
	}
	return true
}

// reap waits for n completions and publishes the head.
func (p *pair) reap(n int) []ring.Entry {
	p.r.t.Helper()
	var out []ring.Entry
	for begin := time.Now(); len(out) < n; {
		e, ok := p.cq.Next()
		if !ok {
			if !pauseAfter(begin) {
				p.r.t.Fatalf("queue %d: %d of %d completions after %v", p.qid, len(out), n, patience)
			}
			continue
		}
		if err := p.sq.Released(e.SQHead()); err != nil {
			p.r.t.Fatal(err)
		}
		out = append(out, e)
	}
	if err := p.head.Publish(p.cq.Head()); err != nil {
		p.r.t.Fatal(err)
	}
	return out
}

// reapSome takes the completions that are there and returns how many.
func (p *pair) reapSome() int {
	n := 0
	for p.cq.Ready() {
		p.reap(1)
		n++
	}
	return n
}

// run runs one command, and do returns no more than its status.
func (p *pair) run(c nvme.Command) ring.Entry {
	p.r.t.Helper()
	p.push(c)
	p.publish()
	return p.reap(1)[0]
}

func (p *pair) do(c nvme.Command) nvme.Status {
	p.r.t.Helper()
	return p.run(c).Status()
}

func rw(op uint8, lba uint64, blocks uint32, iova uint64) nvme.Command {
	var c nvme.Command
	z, _ := nvme.ToZeroBased16(blocks)
	c.SetRW(op, 1, lba, z)
	c.PRP1 = iova
	return c
}

// state returns the group of CQ qid as its worker sees it.
func (r *rig) state(qid uint16) (s State) {
	g := r.ctl.cqs[qid].Load()
	if g == nil {
		return Absent
	}
	g.w.Call(func() { s = g.state })
	return s
}

func (r *rig) eventually(what string, f func() bool) {
	r.t.Helper()
	for begin := time.Now(); !f(); {
		if !pauseAfter(begin) {
			r.t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

func (r *rig) noError() {
	r.t.Helper()
	select {
	case e := <-r.errs:
		r.t.Fatalf("queue %d: %v: %v", e.QID, e.Kind, e.Err)
	default:
	}
}
