package doctor

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/shm"
)

// TestLooker: memory is found where the snapshot says, and again when the worker that owns the queue does not answer; what is gone is not there.
func TestLooker(t *testing.T) {
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "guest")
	defer file.Close()
	if err := file.Truncate(3 * shm.PageSize); err != nil {
		t.Fatal(err)
	}
	store := func(at int64, p ...byte) {
		if _, err := file.WriteAt(p, at); err != nil {
			t.Fatal(err)
		}
	}
	const shadow, ei, ring, size = 0, shm.PageSize, 2 * shm.PageSize, 16
	at := func(off uint64, n uint64) inspect.Memory { return inspect.Memory{Offset: off, Size: n} }
	q := inspect.Queue{
		QID: 1, CQID: 1, Size: size, Worker: 2, SQMemory: at(ring, size*64),
		SQ: inspect.Bell{Private: 3, Slot: at(shadow+8, 4), EventSlot: at(ei+8, 4)}, CQ: inspect.Bell{Slot: at(shadow+12, 4), EventSlot: at(ei+12, 4)},
	}
	snapshot := func(busy []int, queues ...inspect.Queue) inspect.Snapshot {
		return inspect.Snapshot{Version: inspect.Version, Controllers: []inspect.Controller{{Socket: "s", Busy: busy, Queues: queues}}}
	}
	look := NewLooker()
	defer look.Close()
	only := func(s Sample) View {
		t.Helper()
		if len(s.Views) != 1 {
			t.Fatalf("%+v", s.Views)
		}
		return s.Views[0]
	}
	store(shadow+8, 5)
	store(ei+8, 4)
	store(shadow+12, 2, 0, 0, 0x80)
	v := only(look.Look(snapshot(nil, q), []*os.File{file}))
	if !v.Doorbells || v.Tail != 5 || v.TailEvent != 4 || v.Head != 1<<31|2 || v.HeadEvent != 0 || !v.Ring || v.Next || v.Worker != 2 {
		t.Errorf("%+v", v)
	}
	store(ring+3*64+63, 1)
	store(shadow+8, 9)
	w := only(look.Look(snapshot([]int{2}), nil))
	if w.Tail != 9 || !w.Next || w.Hash == v.Hash {
		t.Errorf("of a worker that does not answer: %+v", w)
	}
	if err := file.Truncate(0); err != nil { // R36
		t.Fatal(err)
	}
	if w := only(look.Look(snapshot([]int{2}), nil)); w.Doorbells || w.Ring {
		t.Errorf("of memory that is gone: %+v", w)
	}
	if v := only(look.Look(snapshot(nil, q), []*os.File{file})); v.Doorbells || v.Ring {
		t.Errorf("of a file that is too short: %+v", v)
	}
	q.SQ.Slot.File, q.SQMemory.File = 7, -1
	if v := only(look.Look(snapshot(nil, q), []*os.File{file})); v.Doorbells || v.Ring {
		t.Errorf("of a file that did not come: %+v", v)
	}
	if s := look.Look(snapshot(nil), nil); len(s.Views) != 0 {
		t.Errorf("of a queue that is gone: %+v", s.Views)
	}
}
