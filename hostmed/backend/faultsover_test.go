package backend

import (
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// sleepFor waits for the eventfd of q as a worker does, and returns what Reap has then.
func sleepFor(t *testing.T, q Queue) []*Request {
	t.Helper()
	done := make([]*Request, 16)
	for begin := time.Now(); time.Since(begin) < 10*time.Second; {
		p := []unix.PollFd{{Fd: int32(q.EventFD()), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, 10_000); err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
		var eight [8]byte
		unix.Read(q.EventFD(), eight[:])
		if n := q.Reap(done); n > 0 {
			return done[:n]
		}
	}
	t.Fatal("nothing comes")
	return nil
}

func TestFaultReorder(t *testing.T) {
	for _, medium := range []string{"mem:size=1MiB", "file:" + diskDir(t) + "/disk,size=1MiB"} {
		b := opened(t)(Open("fault:reorder=3@write,over=" + medium))
		q := newQueue(t, b)
		q.(*faultQueue).wait = time.Hour // however slow the machine is
		mem, back := pattern(guestMemory(t, 4096), 3), guestMemory(t, 4096)
		var reqs, got []*Request
		done := make([]*Request, 16)
		for i := range uint64(3) {
			reqs = append(reqs, write(i*512, mem[i*512:(i+1)*512]))
			if n := q.Submit(reqs[i:], done); n != 0 {
				t.Fatalf("%s: %d at once", medium, n)
			}
			for inner := q.(*faultQueue).Queue; inner.Inflight() > 0; { // in this order
				if n := q.Reap(done); n > 0 && i < 2 {
					t.Fatalf("%s: %d ended before there were three", medium, n)
				} else {
					got = append(got, done[:n]...)
				}
			}
		}
		if len(got) == 0 {
			got = append(got, sleepFor(t, q)...)
		}
		slices.Reverse(reqs)
		if !slices.Equal(got, reqs) || q.Inflight() != 0 {
			t.Errorf("%s: %d in the wrong order, %d in flight", medium, len(got), q.Inflight())
		}
		mustRun(t, q, read(0, back[:1536]))
		expect(t, back[:1536], mem[:1536], "written out of order")

		// What is alone does not wait for ever, and what is given up not even so long.
		q.(*faultQueue).wait = turnWait
		alone := write(0, mem[:512])
		q.Submit([]*Request{alone}, done)
		if late := sleepFor(t, q); len(late) != 1 || late[0] != alone || !alone.Status.OK() {
			t.Errorf("%s: alone: %v", medium, alone.Status)
		}
	}
	_, q := faultyOver(t, "reorder=8")
	two := []*Request{{Op: OpFlush}, {Op: OpFlush, Owner: 1}}
	q.wait = time.Hour
	done := make([]*Request, 4)
	q.Submit(two, done)
	if n := q.GiveUp(true, func(*Request) bool { return true }); n != 0 {
		t.Errorf("%d aborted of what comes by itself", n)
	}
	if n := q.GiveUp(false, func(r *Request) bool { return r.Owner == 1 }); n != 1 || q.Reap(done) != 1 || done[0] != two[1] || two[1].Status != nvme.StatusAbortSQDeleted || q.Inflight() != 1 {
		t.Errorf("%d given up, %v, %d in flight", n, two[1].Status, q.Inflight())
	}
}

// TestFaultOpcode chooses among what commands ask of the medium, by their opcode and by the blocks that they name.
func TestFaultOpcode(t *testing.T) {
	_, q := faultyOver(t, "status=write-fault@opcode=0x05")
	mem := guestMemory(t, 512)
	for op, want := range map[uint8]nvme.Status{nvme.IORead: 0, nvme.IOCompare: nvme.StatusWriteFault} {
		r := read(0, mem)
		r.Cmd = &nvme.Command{Opcode: op}
		if run(t, q, r); r.Status != want {
			t.Errorf("opcode %#x: %v", op, r.Status)
		}
	}
	mustRun(t, q, read(0, mem)) // hostmed's own
	list := guestMemory(t, 64)
	native := func(op uint8, first, n uint64, vec []byte) *Request {
		r := &Request{Op: OpCommand, Cmd: &nvme.Command{Opcode: op}, Off: first * 512, Len: n * 512}
		if vec != nil {
			r.Vec = []Seg{seg(vec)}
		}
		return r
	}
	dsm := func(first uint64, n uint32) *Request {
		clear(list)
		binary.LittleEndian.PutUint64(list[8:], 5000) // of no blocks
		binary.LittleEndian.PutUint32(list[20:], n)
		binary.LittleEndian.PutUint64(list[24:], first)
		return native(nvme.IODSM, 0, 0, list[:32])
	}
	cp := func(to, from uint64, n uint16) *Request {
		clear(list)
		binary.LittleEndian.PutUint64(list[8:], from)
		binary.LittleEndian.PutUint16(list[16:], n-1)
		return native(nvme.IOCopy, to, uint64(n), list[:32])
	}
	for name, x := range map[string]struct {
		r    func() *Request
		want bool
	}{
		"verify":           {func() *Request { return native(nvme.IOVerify, 98, 3, nil) }, true},
		"verify before":    {func() *Request { return native(nvme.IOVerify, 98, 2, nil) }, false},
		"dsm":              {func() *Request { return dsm(90, 11) }, true},
		"dsm before":       {func() *Request { return dsm(90, 10) }, false},
		"copy from":        {func() *Request { return cp(0, 199, 1) }, true},
		"copy from behind": {func() *Request { return cp(0, 200, 1) }, false},
		"copy to":          {func() *Request { return cp(99, 0, 2) }, true},
		"vendor":           {func() *Request { return native(0x81, 100, 1, list) }, false},
	} {
		f, err := parseFaults("drop@lba=100-199")
		if err != nil {
			t.Fatal(err)
		}
		if got := f.find(x.r(), 9) != nil; got != x.want {
			t.Errorf("%s: met the fault: %v", name, got)
		}
	}
}

// TestFaultTornOfOneBlock has nothing done of a write that has no half.
func TestFaultTornOfOneBlock(t *testing.T) {
	_, q := faultyOver(t, "torn")
	mem, back := pattern(guestMemory(t, 512), 3), guestMemory(t, 512)
	r := write(0, mem)
	if run(t, q, r); r.Status != nvme.StatusWriteFault || r.Len != 512 || q.Inflight() != 0 {
		t.Errorf("%v, %d bytes", r.Status, r.Len)
	}
	mustRun(t, q, read(0, back))
	expect(t, back, make([]byte, 512), "not written")
}

// special is a medium whose queues are all that one can be.
type special struct {
	Alterable
	owner any
}

func (s *special) NewQueueFor(owner any) (Queue, error) {
	s.owner = owner
	q, err := s.Alterable.NewQueue()
	return &specialQueue{Queue: q}, err
}

type specialQueue struct {
	Queue
	asked int
}

func (q *specialQueue) Polled() bool { return true }

func (q *specialQueue) GiveUp(bool, func(*Request) bool) int {
	q.asked++
	return 3
}

// TestFaultsOverSpecialMedia wants a medium to be with faults what it is without.
func TestFaultsOverSpecialMedia(t *testing.T) {
	rules, err := parseFaults("hold@flush")
	if err != nil {
		t.Fatal(err)
	}
	m := &special{Alterable: opened(t)(Open("mem:size=1MiB")).(Alterable)}
	f := &faulty{Alterable: m, rules: rules}
	for _, b := range []Backend{f, mappedFaulty{f, m.Alterable.(Mapper)}} {
		q, err := NewQueue(b, t)
		if err != nil {
			t.Fatal(err)
		}
		if m.owner != t {
			t.Error("the medium does not know whose queue it is")
		}
		if p, ok := q.(Poller); !ok || !p.Polled() {
			t.Error("nobody would poll")
		}
		q.Submit([]*Request{{Op: OpFlush}}, make([]*Request, 1))
		all := func(*Request) bool { return true }
		if n := q.(Keeper).GiveUp(true, all); n != 4 || q.(*faultQueue).Queue.(*specialQueue).asked != 1 {
			t.Errorf("%d given up", n)
		}
		if q.Reap(make([]*Request, 1)) != 1 || q.Close() != nil {
			t.Error("what was given up does not come")
		}
	}
	_, q := faultyOver(t, "drop")
	if q.Polled() {
		t.Error("memory is to be polled")
	}
}
