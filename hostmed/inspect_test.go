package hostmed

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/ring"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/shared/vfiouser"
)

// inspected is a controller with a guest.
type inspected struct {
	*bareGuest
	m      *Mediator
	socket string
}

func inspectable(t *testing.T, mode DoorbellMode) *inspected {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	m := serve(t, Config{CPUs: []int{-1}, Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=16MiB"}, Doorbells: mode, Queues: bareQueues}}})
	g := newBareGuest(t, socket)
	g.enable(0, mode == Shadow)
	return &inspected{g, m, socket}
}

func (g *inspected) look() inspect.Controller {
	g.Helper()
	s, err := g.m.Inspect(g.Context(), g.socket)
	g.must(err)
	if s.Version != inspect.Version || len(s.Controllers) != 1 {
		g.Fatalf("%+v", s)
	}
	return s.Controllers[0]
}

func queueOf(c inspect.Controller, qid uint16) (q inspect.Queue) {
	if i := slices.IndexFunc(c.Queues, func(q inspect.Queue) bool { return q.QID == qid }); i >= 0 {
		return c.Queues[i]
	}
	return q
}

// until returns queue qid when it is as ok wants it.
func (g *inspected) until(what string, qid uint16, ok func(inspect.Queue) bool) (q inspect.Queue) {
	g.Helper()
	g.eventually(what, func() bool { q = queueOf(g.look(), qid); return ok(q) })
	return q
}

func armed(q inspect.Queue) bool { return q.State == "armed" }

// A guest has run ten commands, and the snapshot says so, in each doorbell mode.
func TestInspect(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			before := inspect.Now()
			g := inspectable(t, mode)
			const n = 10
			for range n {
				g.submit(0, 1, false)
				g.wait(&g.life.io[0], 1)
			}
			q := g.until("sleep", 1, func(q inspect.Queue) bool { return armed(q) && q.SQ.Private == n && q.ArmIndex == n })
			c := g.look()
			if c.Mode != mode.String() || c.Socket != g.socket || c.CNTLID != 1 || c.Trace == 0 || nvme.CSTS(c.CSTS) != 1 || !nvme.CC(c.CC).EN() || c.Enables != 1 ||
				c.Silent || len(c.Busy) != 0 || len(c.Errors) != 0 || len(c.Queues) != 1+bareQueues {
				t.Errorf("%+v", c)
			}
			if q.QID != 1 || q.CQID != 1 || q.Size != bareEntries || q.CQSize != bareEntries || q.CQTail != n || q.Commands != n || q.Completions != n ||
				q.Inflight+q.Staged+q.Held != 0 || q.Blocked || q.Full || q.Unseen || q.Fresh || q.Vector != -1 || q.Interrupts != 0 {
				t.Errorf("%+v", q)
			}
			if q.ArmSaw != n || q.Armed == 0 || q.ArmedAt < before || q.LastFetch < before || q.LastPost < before || q.LastLook < q.ArmedAt || q.LastLook > inspect.Now() {
				t.Errorf("times and arming: %+v", q)
			}
			if q.SQMemory != (inspect.Memory{IOVA: guestIOVA + queuesAt}) || q.CQMemory != (inspect.Memory{IOVA: guestIOVA + queuesAt + shm.PageSize}) {
				t.Errorf("%+v, %+v", q.SQMemory, q.CQMemory)
			}
			messages := uint64(2 * n) // it rings with each completion too
			if mode == Mmap {
				messages = 0
			}
			if q.Kicks != messages || q.Spurious > q.Kicks || q.KicksAsleep > q.Kicks+q.CQKicks {
				t.Errorf("%d kicks of %d, %d spurious, %d asleep", q.Kicks, messages, q.Spurious, q.KicksAsleep)
			}
			if rung := uint32(n); mode != Mmap && q.SQ.Rung != rung || q.CQ.Rung != q.SQ.Rung || q.SQ.Born != 0 || q.CQ.Born != 0 || q.Unraised != n || q.ResumedAt != 0 {
				t.Errorf("%+v", q)
			}
			if shared := mode == Shadow; c.Shared != shared || c.Configs != uint64(btoi(shared)) || c.ConfigEnable != c.Configs {
				t.Errorf("%+v", c)
			}
			switch mode {
			case Shadow:
				if q.SQ.Asked != n || q.SQ.Page != n || q.SQ.Event != n || q.CQ.Page != n || q.SQ.Register != 0 || c.Shadow != guestIOVA+shadowAt || c.EventIndex != guestIOVA+eventAt {
					t.Errorf("%+v, %+v, %+v", q.SQ, q.CQ, c)
				}
			default:
				if q.SQ.Register != n || q.CQ.Register != n || q.SQ.Page != 0 || q.SQ.Event != 0 || c.Shadow != 0 {
					t.Errorf("%+v, %+v", q.SQ, q.CQ)
				}
			}
			a := queueOf(c, 0)
			commands := uint64(2 * bareQueues) // creates, and the pages
			if mode == Shadow {
				commands++
			}
			if a.State != "armed" || a.Worker != -1 || a.Size != bareEntries || a.Commands != commands || a.Completions != commands || uint64(a.SQ.Private) != commands || uint64(a.SQ.Register) != commands ||
				a.Interrupts == 0 || a.LastFetch < before || a.Vector != 0 || a.VectorFD {
				t.Errorf("%+v", a)
			}
			if mode == Shadow && (uint64(a.SQ.Page) != commands || uint64(a.SQ.Event) != commands) {
				t.Errorf("%+v", a.SQ) // R16
			}
			idle := queueOf(c, 4)
			if !armed(idle) || idle.Commands != 0 || idle.LastFetch != 0 || idle.LastPost != 0 {
				t.Errorf("%+v", idle)
			}
		})
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// What is handed over can be read, where the snapshot says, and neither written nor changed in size.
func TestInspectMemory(t *testing.T) {
	g := inspectable(t, Shadow)
	g.submit(0, 3, false)
	g.wait(&g.life.io[0], 3)
	g.until("sleep", 1, func(q inspect.Queue) bool { return armed(q) && q.SQ.Private == 3 })
	fds := fdCount(t)
	s, files, err := g.m.InspectMemory(g.Context(), strconv.Itoa(int(g.look().Trace)))
	g.must(err)
	if len(files) != 1 {
		t.Fatalf("%d files", len(files))
	}
	q := queueOf(s.Controllers[0], 1)
	fd := int(files[0].Fd())
	at := func(m inspect.Memory) *shm.Region {
		r, err := shm.Map(fd, int64(m.Offset), m.Size, false)
		g.must(err)
		t.Cleanup(func() { r.Close() })
		return r
	}
	if q.SQMemory.Size != bareEntries*ring.SQESize || q.CQMemory.Size != bareEntries*ring.CQESize || q.SQ.Slot.Size != 4 || q.CQ.EventSlot.Size != 4 {
		t.Fatalf("%+v", q)
	}
	var sqe nvme.Command
	g.must(at(q.SQMemory).Read(2*ring.SQESize, sqe.Bytes()[:]))
	if sqe.Opcode != nvme.IORead || sqe.CID != 2 || sqe.NSID != 1 {
		t.Errorf("%+v", sqe)
	}
	slot, err := at(q.SQ.Slot).Word32(0)
	g.must(err)
	event, err := at(q.SQ.EventSlot).Word32(0)
	g.must(err)
	if slot.Load() != 3 || event.Load() != 3 {
		t.Errorf("tail %d, event index %d", slot.Load(), event.Load())
	}
	g.submit(0, 1, false)
	if slot.Load() != 4 { // it is the guest's page, not a copy
		t.Errorf("tail %d", slot.Load())
	}
	if _, err := unix.Mmap(fd, 0, shm.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EACCES) {
		t.Errorf("mapped for writing: %v", err)
	}
	mem, err := unix.Mmap(fd, 0, shm.PageSize, unix.PROT_READ, unix.MAP_SHARED)
	g.must(err)
	if err := unix.Mprotect(mem, unix.PROT_READ|unix.PROT_WRITE); !errors.Is(err, unix.EACCES) {
		t.Errorf("made writable: %v", err)
	}
	g.must(unix.Munmap(mem))
	if _, err := unix.Pwrite(fd, []byte{1}, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("written: %v", err)
	}
	if err := unix.Ftruncate(fd, 0); err == nil {
		t.Error("truncated")
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); !errors.Is(err, unix.EPERM) {
		t.Errorf("sealed: %v", err)
	}
	g.must(files[0].Close())
	if n := fdCount(t); n != fds {
		t.Errorf("%d descriptors, %d before", n, fds)
	}
}

// R1, as an operator meets it: the tail is in the page, the queue sleeps, and nobody rings. A kick mends it.
func TestKick(t *testing.T) {
	g := inspectable(t, Shadow)
	q := &g.life.io[0]
	g.until("sleep", 1, armed)
	q.sq.Push(&nvme.Command{Opcode: nvme.IOFlush, NSID: 1, CID: 7})
	tail, err := g.life.shadow.Word32(2 * 4)
	g.must(err)
	tail.Store(1)
	time.Sleep(20 * time.Millisecond) // nobody looks
	if s := queueOf(g.look(), 1); s.SQ.Page != 1 || s.SQ.Event != 0 || s.SQ.Private != 0 || s.ArmIndex != 0 || s.ArmSaw != 0 || !armed(s) || s.Kicks != 0 {
		t.Errorf("%+v", s)
	}
	if k, err := g.m.Kick(g.Context(), g.socket, 1); err != nil || k != (inspect.Kick{QID: 1, State: "armed", Woken: true, Found: 1}) {
		t.Errorf("%+v, %v", k, err)
	}
	g.wait(q, 1)
	g.until("sleep", 1, armed)
	if k, err := g.m.Kick(g.Context(), g.socket, 1); err != nil || !k.Woken || k.Found != 0 {
		t.Errorf("%+v, %v", k, err)
	}
	if s := queueOf(g.look(), 1); s.Commands != 1 {
		t.Errorf("%+v", s)
	}
	// Queue 0: the slot is stored, the register is not.
	admin := &g.life.admin
	var id nvme.Command
	id.Opcode, id.CID = nvme.AdminKeepAlive, 9
	admin.sq.Push(&id)
	slot, err := g.life.shadow.Word32(0)
	g.must(err)
	slot.Store(admin.sq.Tail())
	if k, err := g.m.Kick(g.Context(), g.socket, 0); err != nil || k != (inspect.Kick{State: "armed", Woken: true, Found: 1}) {
		t.Errorf("%+v, %v", k, err)
	}
	for _, x := range []struct {
		which string
		qid   uint16
		want  error
	}{{g.socket, 60, inspect.ErrNoQueue}, {g.socket, 65535, inspect.ErrNoQueue}, {g.socket + "x", 1, inspect.ErrNoController}, {"", 1, inspect.ErrNoController}} {
		if _, err := g.m.Kick(g.Context(), x.which, x.qid); !errors.Is(err, x.want) {
			t.Errorf("%q %d: %v", x.which, x.qid, err)
		}
	}
}

// The states that a queue gets into by what the client does.
func TestInspectStates(t *testing.T) {
	g := inspectable(t, Shadow)
	g.config(4, 2) // no bus master
	if s := queueOf(g.look(), 1); s.State != "draining" {
		t.Errorf("held: %+v", s)
	}
	if a := queueOf(g.look(), 0); a.State != "draining" {
		t.Errorf("held: %+v", a)
	}
	held := inspect.Now()
	g.config(4, 6)
	if s := g.until("a queue that goes on", 1, armed); s.ResumedAt < held {
		t.Errorf("%+v", s)
	}

	g.must(g.c.DMAUnmap(g.Context(), guestIOVA, guestRAM))
	c := g.look()
	if s := queueOf(c, 1); s.State != "parked" || s.SQMemory.Size != 0 || c.Shared || queueOf(c, 0).State != "parked" {
		t.Errorf("unmapped: %+v, %+v", s, c)
	}
	g.must(g.c.DMAMap(g.Context(), guestIOVA, guestRAM, 0, g.mem.FD(), vfiouser.DMARead|vfiouser.DMAWrite))
	g.until("a queue that goes on", 1, armed)
	if c := g.look(); !c.Shared || c.Configs != 1 {
		t.Errorf("mapped again: %+v", c)
	}

	before := inspect.Now()
	tail, err := g.life.shadow.Word32(2 * 2 * 4)
	g.must(err)
	tail.Store(4711)
	g.doorbell(nvme.SQTailDoorbell(2, 0), 0)
	g.until("a queue that fails", 2, func(q inspect.Queue) bool { return q.State == "failed" })
	g.eventually("an error", func() bool { return len(g.look().Errors) > 0 })
	if e := g.look().Errors[0]; e.QID != 2 || e.Kind != "bad-sq-tail" || e.At < before || e.Text == "" {
		t.Errorf("%+v", e)
	}
	for range 2 * inspect.MaxErrors {
		g.doorbell(nvme.SQTailDoorbell(60, 0), 0) // no such register
	}
	g.eventually("errors", func() bool { return len(g.look().Errors) == inspect.MaxErrors })

	g.write32(nvme.RegCC, 0)
	c = g.look()
	if c.Shared || len(c.Queues) != 0 || c.CSTS != 0 {
		t.Errorf("disabled: %+v", c)
	}
	g.enable(halfLife, false)
	if c := g.look(); c.Enables != 2 || c.Configs != 1 || c.ConfigEnable != 1 || c.Shared { // R28, as the doctor sees it
		t.Errorf("enabled again: %+v", c)
	}
	g.must(g.c.Close())
	g.eventually("no client", func() bool { _, err := g.m.Inspect(g.Context(), g.socket); return errors.Is(err, inspect.ErrNoClient) })
	if s, err := g.m.Inspect(g.Context(), ""); err != nil || len(s.Controllers) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	if l := g.m.List(); len(l) != 1 || l[0].Socket != g.socket || l[0].Client || l[0].Mode != "shadow" {
		t.Errorf("%+v", l)
	}
}

// A CQ whose driver gives nothing back blocks its SQ, and is armed at the head (R8).
func TestInspectBlocked(t *testing.T) {
	g := inspectable(t, Shadow)
	q := &g.life.io[0]
	head, err := g.life.shadow.Word32(3 * 4)
	g.must(err)
	g.fillCQ()
	s := g.until("a blocked queue", 1, func(q inspect.Queue) bool { return q.Blocked && armed(q) })
	if s.Room != 0 || s.CQ.Event != s.CQ.Private || s.CQ.Private != 0 || s.CQTail != bareEntries-1 || s.SQ.Private != bareEntries-1 || s.SQ.Page != 1 {
		t.Errorf("%+v", s)
	}
	head.Store(q.cq.Head())
	g.doorbell(nvme.CQHeadDoorbell(1, 0), 0)
	g.wait(q, 2)
}

// fillCQ makes the CQ of queue 1 full, and has two commands more.
func (g *inspected) fillCQ() {
	q := &g.life.io[0]
	fill := func(n int) {
		for range n {
			q.sq.Push(&nvme.Command{Opcode: nvme.IOFlush, NSID: 1})
		}
		tail, err := g.life.shadow.Word32(2 * 4)
		g.must(err)
		tail.Store(q.sq.Tail())
		g.doorbell(nvme.SQTailDoorbell(1, 0), 0)
	}
	fill(bareEntries - 1)
	for range bareEntries - 1 {
		g.eventually("a completion", func() bool {
			e, ok := q.cq.Next()
			if ok {
				g.must(q.sq.Released(e.SQHead()))
			}
			return ok
		})
	}
	fill(2)
}

// A worker that hangs is named, keeps nobody, and leaves nothing behind.
func TestInspectStuckWorker(t *testing.T) {
	g := inspectable(t, Shadow)
	stuck, let := make(chan struct{}), make(chan struct{})
	g.m.workers[0].Post(func() { close(stuck); <-let })
	<-stuck
	fds := fdCount(t)
	for range 3 {
		s, files, err := g.m.InspectMemory(g.Context(), "")
		g.must(err)
		if c := s.Controllers[0]; !slices.Equal(c.Busy, []int{0}) || len(c.Queues) != 1 || c.Queues[0].QID != 0 || !c.Shared {
			t.Errorf("%+v", c)
		}
		for _, f := range files {
			f.Close()
		}
		n, err := g.m.Counters(g.Context(), g.socket)
		g.must(err)
		if c := n.Controllers[0]; !slices.Equal(c.Busy, []int{0}) || c.Silent {
			t.Errorf("%+v", c)
		}
	}
	for range 2 {
		if _, err := g.m.Kick(g.Context(), g.socket, 1); !errors.Is(err, inspect.ErrBusy) {
			t.Errorf("%v", err)
		}
	}
	if n := fdCount(t); n != fds {
		t.Errorf("%d descriptors, %d before", n, fds)
	}
	close(let)
	g.eventually("a whole snapshot", func() bool { c := g.look(); return len(c.Busy) == 0 && len(c.Queues) == 1+bareQueues })
}

// A session that hangs is named too.
func TestInspectSilentSession(t *testing.T) {
	g := inspectable(t, Trap)
	s := g.m.registry.find(g.socket)[0].client()
	stuck, let := make(chan struct{}), make(chan struct{})
	s.do(call{run: func() { close(stuck); <-let }})
	<-stuck
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	for range 3 {
		x, err := g.m.Inspect(ctx, "")
		g.must(err)
		if c := x.Controllers[0]; !c.Silent || c.Socket != g.socket || len(c.Queues) != 0 {
			t.Errorf("%+v", c)
		}
	}
	if _, err := g.m.Kick(ctx, g.socket, 0); !errors.Is(err, inspect.ErrBusy) {
		t.Errorf("%v", err)
	}
	close(let)
	if c := g.look(); c.Silent || len(c.Queues) != 1+bareQueues {
		t.Errorf("%+v", c)
	}
}

func TestCounters(t *testing.T) {
	g := inspectable(t, Trap)
	g.submit(0, 5, true)
	g.wait(&g.life.io[0], 5)
	c, err := g.m.Counters(g.Context(), g.socket)
	g.must(err)
	if len(c.Controllers) != 1 || c.Controllers[0].Writes != 5 || c.Controllers[0].BytesWritten != 5*bareBytes || c.Controllers[0].SQDoorbells == 0 {
		t.Errorf("%+v", c.Controllers)
	}
	if len(c.Namespaces) != 1 || c.Namespaces[0].NSID != 1 || c.Namespaces[0].Counted {
		t.Errorf("%+v", c.Namespaces)
	}
	if _, err := g.m.Counters(g.Context(), "99"); !errors.Is(err, inspect.ErrNoController) {
		t.Error(err)
	}
}

// A client in this process has memory that is in no file.
func TestInspectAttached(t *testing.T) {
	for _, mode := range modes {
		m, f := attachHere(t, mode)
		mem := shm.NewHeap(1 << 16)
		if err := f.Map(1<<32, mem, true); err != nil {
			t.Fatal(err)
		}
		for _, x := range []struct {
			off uint64
			v   uint64
		}{{nvme.RegASQ, 1 << 32}, {nvme.RegACQ, 1<<32 + 4096}} {
			if err := f.Write64(uint32(x.off), x.v); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(f.Write32(nvme.RegAQA, 15<<16|15), f.Write32(nvme.RegCC, 0x460001)); err != nil {
			t.Fatal(err)
		}
		s, files, err := m.InspectMemory(t.Context(), "here")
		if err != nil || len(files) != 0 || len(s.Controllers) != 1 {
			t.Fatalf("%+v, %v, %v", s, files, err)
		}
		if q := queueOf(s.Controllers[0], 0); q.Size != 16 || q.SQMemory != (inspect.Memory{IOVA: 1 << 32}) {
			t.Errorf("%+v", q)
		}
	}
}

// Clients come, work and go, while others look: nobody is disturbed, nothing is left open.
func TestInspectWhileClientsComeAndGo(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	m := serve(t, Config{CPUs: []int{-1, -1}, Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=1MiB"}}}})
	before := fdCount(t)
	end := make(chan struct{})
	var watchers sync.WaitGroup
	watch := func(look func() error) {
		watchers.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				if err := look(); err != nil && !errors.Is(err, inspect.ErrNoClient) && !errors.Is(err, inspect.ErrNoQueue) {
					t.Error(err)
					return
				}
			}
		})
	}
	watch(func() error {
		_, files, err := m.InspectMemory(t.Context(), "")
		for _, f := range files {
			f.Close()
		}
		return err
	})
	watch(func() error { _, err := m.Inspect(t.Context(), socket); return err })
	watch(func() error { _, err := m.Counters(t.Context(), socket); return err })
	for qid := range uint16(3) {
		watch(func() error { _, err := m.Kick(t.Context(), "1", qid); return err })
	}
	data := make([]byte, 4096)
	for range 10 {
		c := open(t, socket, guestdrv.Options{})
		ns, err := c.Namespace(1)
		if err != nil {
			t.Fatal(err)
		}
		for i := range int64(20) {
			if _, err := ns.WriteAt(data, i*4096); err != nil {
				t.Fatal(err)
			}
		}
		c.Close() // which resets it
	}
	close(end)
	watchers.Wait()
	for end := time.Now().Add(patience); fdCount(t) > before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d descriptors, %d before", fdCount(t), before)
		}
	}
}
