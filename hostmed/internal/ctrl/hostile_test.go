package ctrl

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/shared/shm"
)

func TestRule30_AdminTail(t *testing.T) {
	for _, tail := range []uint32{adminDepth, 0xffff, 0xffffffff, 1 << 31} {
		h := newEnabled(t, testConfig())
		h.push(aer())
		h.ring()
		h.dp.tail.Store(tail)
		h.c.AdminKick()
		h.expectDoorbellEvent(t)
		h.dp.tail.Store(5) // a good value does not bring it back
		h.c.AdminKick()
		if h.c.admin.sq.Head() != 1 {
			t.Error("a stopped queue was fetched from")
		}
		h.disable()
		h.enable()
		if e := h.errorEntries(1)[0]; e.SQID != 0 || e.CID != 0xffff {
			t.Errorf("error log %+v", e)
		}
	}
}

// A tail that goes back would have the ring run again.
func TestRule30_AdminOverrun(t *testing.T) {
	h := newHost(t, testConfig())
	h.smallCQ()
	for range 10 {
		h.push(nvme.Command{Opcode: 0xff})
	}
	h.ring()
	fetched := h.c.admin.sq.Head()
	h.dp.tail.Store(fetched + 1)
	h.c.AdminKick()
	if !h.c.admin.stopped {
		t.Error("the tail went back and the queue runs on")
	}
}

func TestRule30_AdminHead(t *testing.T) {
	for _, head := range []uint32{1, adminDepth, 0xffffffff} {
		h := newEnabled(t, testConfig())
		h.push(aer())
		h.ring()
		h.dp.head.Store(head)
		h.c.AdminKick()
		h.expectDoorbellEvent(t)
	}
}

func (h *host) expectDoorbellEvent(t *testing.T) {
	t.Helper()
	e, ok := h.cq.Next()
	if want := nvme.MakeAsyncEvent(nvme.EventError, nvme.EventErrorDoorbellValue, nvme.LogError); !ok || nvme.AsyncEvent(e.Result()) != want {
		t.Errorf("event %v %v, want %v", ok, nvme.AsyncEvent(e.Result()), want)
	}
	if !h.c.admin.stopped {
		t.Error("the queue is not stopped")
	}
}

// Doorbells and events of a controller that is not enabled do nothing.
func TestRule30_DoorbellWhileDisabled(t *testing.T) {
	h := newHost(t, testConfig())
	h.dp.tail.Store(0xffffffff)
	h.dp.head.Store(5)
	if h.c.AdminKick() {
		t.Error("there is more to do")
	}
	h.c.QueueError(0, BadDoorbellRegister)
	h.enable()
	h.identify(nvme.CNSController, 0)
}

// A driver that keeps a doorbell moving does not keep the session.
func TestRule30_KickIsBounded(t *testing.T) {
	h := newEnabled(t, testConfig())
	h.configure()
	flip := uint32(0)
	h.c.mem = movingMemory{h.mem, func() {
		flip = (flip + 1) % adminDepth
		h.mem.word(page1IOVA).Store(flip)
		h.mem.word(page1IOVA + 4).Store(h.c.admin.cq.Tail())
	}}
	for range adminDepth {
		cmd := identifyCmd(nvme.CNSController, 0)
		h.sq.Push(&cmd)
	}
	flip = h.c.admin.tail.value
	h.c.mem.(movingMemory).move()
	if !h.c.AdminKick() {
		t.Error("a kick without end ended by itself")
	}
}

// movingMemory calls move with each write.
type movingMemory struct {
	ram
	move func()
}

func (m movingMemory) WriteIOVA(iova uint64, p []byte) bool {
	m.move()
	return m.ram.WriteIOVA(iova, p)
}

// The count of event requests moves only when one is taken or given back.
func TestRule33_EventRequestsAreCounted(t *testing.T) {
	h := newEnabled(t, testConfig())
	count := func(want int) {
		t.Helper()
		if got := len(h.c.events.requests); got != want {
			t.Fatalf("%d requests outstanding, want %d", got, want)
		}
	}
	var cids []uint16
	for range aerLimit {
		cids = append(cids, h.push(aer()))
	}
	h.ring()
	for range 10 {
		h.fails(aer(), nvme.StatusAERLimit)
		count(aerLimit)
	}
	fused := aer()
	fused.Flags = 1
	h.fails(fused, nvme.StatusInvalidField)
	count(aerLimit)
	for i, cid := range cids[:2] {
		var abort nvme.Command
		abort.SetAbort(0, cid)
		h.push(abort)
		h.push(abort) // the second finds nothing
		h.ring()
		if es := h.reap(); len(es) != 3 || es[2].Result() != 1 {
			t.Fatalf("%+v", es)
		}
		count(aerLimit - 1 - i)
	}
	h.c.QueueError(1, BadDoorbellValue)
	h.reap()
	count(aerLimit - 3)
	h.disable()
	count(0)
}

// A guest that shrinks its memory file under the admin queue loses its controller, and nothing else.
func TestRule36_AdminMemoryShrinks(t *testing.T) {
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, ramSize); err != nil {
		t.Fatal(err)
	}
	r, err := shm.Map(fd, 0, ramSize, true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	h := newHost(t, testConfig())
	h.mem = ram{r: r}
	h.c.mem = h.mem
	h.enable()
	h.identify(nvme.CNSController, 0)
	h.push(nvme.Command{})
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	h.ring()
	if st := h.csts(); !st.CFS() || h.c.Enabled() {
		t.Errorf("%v", st)
	}
	if err := unix.Ftruncate(fd, ramSize); err != nil {
		t.Fatal(err)
	}
	h.disable()
	h.enable()
	h.identify(nvme.CNSController, 0)
}
