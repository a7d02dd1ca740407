package doctor

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/dbbuf"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// guest is a guest of a live mediator, behind a real vfio-user socket, whose driver does each thing by itself, and so can do it wrong.
type guest struct {
	*testing.T
	m          mediator
	socket     string
	c          *vfiouser.Client
	mem, pages *shm.Region // two files: the pages can be unmapped alone
	next       uint64      // what of mem is used
	shadow, ei *shm.Region // as configured; nil: registers
	admin      *pair
	irq        int

	look    *Looker
	samples []Sample
}

// mediator is hostmed in this process, or another's control socket.
type mediator interface {
	InspectMemory(ctx context.Context, which string) (inspect.Snapshot, []*os.File, error)
	Kick(ctx context.Context, which string, qid uint16) (inspect.Kick, error)
}

// pair is the driver's half of a queue pair.
type pair struct {
	g          *guest
	qid        uint16
	size       uint32
	cqSize     uint32
	sqMem      *shm.Region
	sqAt, cqAt uint64 // IOVA
	sq         *ring.SQProducer
	cq         *ring.CQConsumer
	tail, head *dbbuf.Publisher
	word, ei   [2]*atomic.Uint32 // tail and head; nil: registers
	cid        uint16
}

const (
	ramSize   = 4 << 20
	ramAt     = 1 << 20 // IOVA
	pagesAt   = 1 << 30
	patience  = 20 * time.Second
	guestSize = 16 // entries of a queue
)

func newGuest(t *testing.T, c hostmed.ControllerConfig) *guest {
	t.Helper()
	c.Socket = filepath.Join(t.TempDir(), "s")
	if c.Namespaces == nil {
		c.Namespaces = []string{"mem:size=16MiB"}
	}
	m, err := hostmed.New(hostmed.Config{CPUs: []int{-1}, Controllers: []hostmed.ControllerConfig{c}, Logger: testrig.Log(t)})
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, m.Run)
	return connect(t, m, c.Socket)
}

// connect makes a guest of a controller of m.
func connect(t *testing.T, m mediator, socket string) *guest {
	t.Helper()
	g := &guest{T: t, m: m, socket: socket, look: NewLooker(), irq: -1}
	var err error
	t.Cleanup(func() { g.must(g.look.Close()) })
	g.c, err = vfiouser.Dial(t.Context(), g.socket)
	g.must(err)
	t.Cleanup(func() { g.c.Close() })
	g.mem = g.memory(ramSize, ramAt)
	g.pages = g.memory(2*shm.PageSize, pagesAt)
	return g
}

// memory is a file that the device is told of.
func (g *guest) memory(size, iova uint64) *shm.Region {
	g.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	g.must(err)
	g.Cleanup(func() { unix.Close(fd) })
	g.must(unix.Ftruncate(fd, int64(size)))
	r, err := shm.Map(fd, 0, size, true)
	g.must(err)
	g.Cleanup(func() { r.Close() })
	g.must(g.c.DMAMap(g.Context(), iova, size, 0, fd, vfiouser.DMARead|vfiouser.DMAWrite))
	return r
}

func (g *guest) must(err error) {
	g.Helper()
	if err != nil {
		g.Fatal(err)
	}
}

func (g *guest) eventually(what string, done func() bool) {
	g.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			g.Fatalf("waited %v for %s", patience, what)
		}
	}
}

func (g *guest) read32(off uint64) uint32 {
	g.Helper()
	var b [4]byte
	g.must(g.c.RegionRead(g.Context(), vfiouser.RegionBAR0, off, b[:]))
	return binary.LittleEndian.Uint32(b[:])
}

func (g *guest) write32(off uint64, v uint32) {
	g.Helper()
	g.must(g.c.RegionWrite(g.Context(), vfiouser.RegionBAR0, off, binary.LittleEndian.AppendUint32(nil, v)))
}

func (g *guest) ring(off, v uint32) error {
	return g.c.RegionWritePosted(g.Context(), vfiouser.RegionBAR0, uint64(off), binary.LittleEndian.AppendUint32(nil, v))
}

// alloc returns a page of mem.
func (g *guest) alloc() (*shm.Region, uint64) {
	g.Helper()
	at := g.next
	g.next += shm.PageSize
	v, err := g.mem.View(at, shm.PageSize)
	g.must(err)
	g.must(v.Zero(0, shm.PageSize))
	return v, ramAt + at
}

// enable resets the controller and enables it, with the pages or without.
func (g *guest) enable(shadow bool) {
	g.Helper()
	g.write32(nvme.RegCC, 0)
	g.eventually("CSTS.RDY=0", func() bool { return !nvme.CSTS(g.read32(nvme.RegCSTS)).RDY() })
	g.must(g.c.RegionWrite(g.Context(), vfiouser.RegionConfig, 4, []byte{6, 4})) // memory, bus master, no INTx
	g.shadow, g.ei, g.next = nil, nil, 0
	g.admin = g.half(0, guestSize, guestSize)
	z := nvme.ZeroBased16(guestSize - 1)
	g.write32(nvme.RegAQA, uint32(nvme.AQA(0).WithASQS(z).WithACQS(z)))
	g.write32(nvme.RegASQ, uint32(g.admin.sqAt))
	g.write32(nvme.RegACQ, uint32(g.admin.cqAt))
	g.write32(nvme.RegCC, uint32(nvme.CC(0).WithEN(true).WithIOSQES(6).WithIOCQES(4)))
	g.eventually("CSTS.RDY=1", func() bool { return nvme.CSTS(g.read32(nvme.RegCSTS)).RDY() })
	if shadow {
		g.must(g.pages.Zero(0, g.pages.Len()))
		g.share(pagesAt, pagesAt+shm.PageSize)
	}
}

// share configures pages that are in g.pages.
func (g *guest) share(shadow, ei uint64) {
	g.Helper()
	var cmd nvme.Command
	cmd.SetDoorbellBuffers(nvme.AdminDoorbellBufferConfig, shadow, ei)
	g.command(cmd)
	view := func(iova uint64) *shm.Region {
		in, base := g.pages, uint64(pagesAt)
		if iova < pagesAt {
			in, base = g.mem, ramAt
		}
		v, err := in.View(iova-base, shm.PageSize)
		g.must(err)
		return v
	}
	g.shadow, g.ei = view(shadow), view(ei)
}

func (g *guest) command(cmd nvme.Command) {
	g.Helper()
	g.admin.push(cmd)
	g.must(g.admin.tail.Publish(g.admin.sq.Tail()))
	g.admin.reap(1)
	g.must(g.admin.head.Publish(g.admin.cq.Head()))
}

// half makes the driver's half of a queue pair.
func (g *guest) half(qid uint16, size, cqSize uint32) *pair {
	g.Helper()
	p := &pair{g: g, qid: qid, size: size, cqSize: cqSize}
	var err error
	p.sqMem, p.sqAt = g.alloc()
	p.sq, err = ring.NewSQProducer(p.sqMem, size)
	g.must(err)
	mem, at := g.alloc()
	p.cqAt = at
	p.cq, err = ring.NewCQConsumer(mem, cqSize)
	g.must(err)
	tail := func(v uint32) error { return g.ring(nvme.SQTailDoorbell(qid, 0), v) }
	head := func(v uint32) error { return g.ring(nvme.CQHeadDoorbell(qid, 0), v) }
	p.tail, p.head = dbbuf.NewMMIO(tail), dbbuf.NewMMIO(head)
	if g.shadow != nil && qid != 0 {
		p.word[0], p.word[1], err = dbbuf.Slots(g.shadow, qid, 0)
		g.must(err)
		p.ei[0], p.ei[1], err = dbbuf.Slots(g.ei, qid, 0)
		g.must(err)
		for i := range 2 {
			p.word[i].Store(0)
			p.ei[i].Store(0)
		}
		p.tail, p.head = dbbuf.NewShadow(p.word[0], p.ei[0], tail), dbbuf.NewShadow(p.word[1], p.ei[1], head)
	}
	return p
}

// pair creates a queue pair; with an interrupt if the guest has one.
func (g *guest) pair(qid uint16, size, cqSize uint32) *pair {
	g.Helper()
	p := g.half(qid, size, cqSize)
	g.create(p, cqSize)
	return p
}

func (g *guest) create(p *pair, cqSize uint32) {
	g.Helper()
	var cmd nvme.Command
	cmd.SetCreateCQ(p.qid, nvme.ZeroBased16(cqSize-1), p.cqAt, 0, g.irq >= 0)
	g.command(cmd)
	cmd = nvme.Command{}
	cmd.SetCreateSQ(p.qid, nvme.ZeroBased16(p.size-1), p.sqAt, p.qid, 0)
	g.command(cmd)
}

// interrupts gives vector 0 an eventfd.
func (g *guest) interrupts() {
	g.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	g.must(err)
	g.Cleanup(func() { unix.Close(fd) })
	g.must(g.c.SetIRQs(g.Context(), vfiouser.IRQMSIX, 0, vfiouser.IRQSetDataEventFD|vfiouser.IRQSetTrigger, []int{fd}))
	g.irq = fd
}

func (p *pair) push(cmd nvme.Command) {
	p.cid++
	cmd.CID = p.cid
	p.sq.Push(&cmd)
}

// flush pushes n commands.
func (p *pair) flush(n int) {
	for range n {
		p.push(nvme.Command{Opcode: nvme.IOFlush, NSID: 1})
	}
}

// reap takes n completions, and keeps the CQ head to itself.
func (p *pair) reap(n int) {
	p.g.Helper()
	for range n {
		var e ring.Entry
		p.g.eventually(fmt.Sprintf("a completion of queue %d", p.qid), func() (ok bool) { e, ok = p.cq.Next(); return ok })
		if !e.Status().OK() {
			p.g.Fatalf("queue %d, command %d: %v", p.qid, e.CID(), e.Status())
		}
		p.g.must(p.sq.Released(e.SQHead()))
	}
}

// do runs n commands as an honest driver does.
func (p *pair) do(n int) {
	p.g.Helper()
	p.flush(n)
	p.g.must(p.tail.Publish(p.sq.Tail()))
	p.reap(n)
	p.g.must(p.head.Publish(p.cq.Head()))
}

// sample looks once.
func (g *guest) sample() *Sample {
	g.Helper()
	s, files, err := g.m.InspectMemory(g.Context(), g.socket)
	g.must(err)
	g.samples = append(g.samples, g.look.Look(s, files))
	for _, f := range files {
		g.must(f.Close())
	}
	runtime.Gosched()
	return &g.samples[len(g.samples)-1]
}

// asleep waits until the device has armed the queue.
func (p *pair) asleep() {
	p.g.Helper()
	p.g.eventually(fmt.Sprintf("queue %d to sleep", p.qid), func() bool {
		for _, q := range p.g.sample().Controllers[0].Queues {
			if q.QID == p.qid {
				return q.State == "armed"
			}
		}
		return false
	})
}
