package backend

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// fakeUevents is a source of messages.
type fakeUevents struct {
	messages chan []byte // nil: some were lost
	closed   chan struct{}
}

func (s *fakeUevents) receive(p []byte) (int, error) {
	select {
	case m := <-s.messages:
		if m == nil {
			return 0, errLost
		}
		return copy(p, m), nil
	case <-s.closed:
		return 0, os.ErrClosed
	}
}

func (s *fakeUevents) Close() error {
	close(s.closed)
	return nil
}

func fakeHub() (*ueventHub, chan *fakeUevents) {
	opened := make(chan *fakeUevents, 10)
	return &ueventHub{open: func() (ueventSource, error) {
		s := &fakeUevents{make(chan []byte, 100), make(chan struct{})}
		opened <- s
		return s, nil
	}}, opened
}

func message(action, subsystem, name string) []byte {
	return []byte(action + "@/devices/x\x00ACTION=" + action + "\x00DEVPATH=/devices/x\x00SUBSYSTEM=" + subsystem + "\x00DEVNAME=" + name + "\x00RESIZE=1\x00SEQNUM=7\x00")
}

func received[T any](t *testing.T, c chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatal("nothing comes")
		panic("")
	}
}

func TestUevents(t *testing.T) {
	h, opened := fakeHub()
	a, b := make(chan uevent, 100), make(chan uevent, 100)
	endA, err := h.listen(func(e uevent) { a <- e })
	if err != nil {
		t.Fatal(err)
	}
	endB, err := h.listen(func(e uevent) { b <- e })
	if err != nil {
		t.Fatal(err)
	}
	s := received(t, opened)
	// Nothing of these is an event.
	for _, m := range [][]byte{{}, {0}, []byte("libudev\x00"), []byte("add@/x\x00"), []byte("add@/x\x00ACTION"), []byte("add@/x\x00ACTION=add\x00=\x00\x00"), make([]byte, 64<<10)} {
		s.messages <- m
	}
	s.messages <- message("change", "block", "nvme0n1")
	s.messages <- nil
	for _, c := range []chan uevent{a, b} {
		if e := received(t, c); e != (uevent{"change", "block", "nvme0n1"}) {
			t.Errorf("%+v", e)
		}
		if e := received(t, c); e != (uevent{}) {
			t.Errorf("lost: %+v", e)
		}
	}
	endA()
	s.messages <- message("remove", "nvme-generic", "/dev/ng0n1")
	if e := received(t, b); e != (uevent{"remove", "nvme-generic", "ng0n1"}) {
		t.Errorf("%+v", e)
	}
	if len(a) != 0 {
		t.Error("an event for one who does not listen any more")
	}
	endB()
	endB()
	select {
	case <-s.closed:
	default:
		t.Error("the source is open, and nobody listens")
	}
	// And again, with another.
	end, err := h.listen(func(e uevent) { a <- e })
	if err != nil {
		t.Fatal(err)
	}
	received(t, opened).messages <- message("add", "block", "x")
	received(t, a)
	end()

	h.open = func() (ueventSource, error) { return nil, unix.EPERM }
	if _, err := h.listen(func(uevent) {}); !errors.Is(err, unix.EPERM) {
		t.Error(err)
	}
}

// TestUeventsSocket opens the kernel's and closes it while it is waited for.
func TestUeventsSocket(t *testing.T) {
	h := &ueventHub{open: openUevents}
	end, err := h.listen(func(uevent) {})
	if err != nil {
		t.Fatal(err)
	}
	end()
}

// TestDiskWatch: what happens to the disk that is watched is told, once where it is the end.
func TestDiskWatch(t *testing.T) {
	h, opened := fakeHub()
	d := newFakeChar()
	b := openFake(t, d, sliceSpec())
	b.name, b.events = "nvme0n1", h
	events := make(chan Event, 100)
	b.listen()
	b.Watch(func(e Event) { events <- e })
	defer func() { b.deaf() }()
	s := received(t, opened)
	for _, m := range [][]byte{
		message("change", "block", "nvme0n2"), message("remove", "block", "nvme0n1p1"), message("add", "block", "nvme0n1"),
		message("change", "nvme", "nvme0"), message("remove", "nvme-generic", "ng0n11"),
	} {
		s.messages <- m
	}
	s.messages <- message("change", "block", "nvme0n1")
	if e := received(t, events); e != EventChanged {
		t.Errorf("event %d, want a change", e)
	}
	q, _ := fakeCharQueue(t, b, d, 8)
	mem := guestMemory(t, 4096)
	mustRun(t, q, read(0, mem[:512]))
	// One that does not answer is no other; one with other blocks is.
	for _, x := range []struct {
		change func()
		want   nvme.Status
	}{
		{func() { d.adminErr = unix.ENODEV }, nvme.StatusSuccess},
		{func() { d.adminErr = nil; d.ns.LBAF[0].LBADS = 12 }, nvme.StatusNamespaceNotReady.WithDNR()},
	} {
		x.change()
		s.messages <- message("change", "block", "nvme0n1")
		received(t, events)
		d.seen = nil
		r := read(0, mem[:512])
		run(t, q, r)
		if r.Status != x.want || len(d.seen) != 0 && !x.want.OK() {
			t.Errorf("after a change: %v, want %v", r.Status, x.want)
		}
	}
	s.messages <- message("remove", "nvme-generic", "ng0n1")
	if e := received(t, events); e != EventGone {
		t.Errorf("event %d, want the end", e)
	}
	s.messages <- message("remove", "block", "nvme0n1")
	s.messages <- nil
	b.deaf()
	if len(events) != 0 {
		t.Error("something after the end")
	}

	// What came before anybody watched is not lost.
	early := openFake(t, newFakeChar(), sliceSpec())
	for _, e := range []Event{EventChanged, EventChanged, EventGone} {
		early.happened(e)
	}
	early.Watch(func(e Event) { events <- e })
	if a, b := received(t, events), received(t, events); a != EventChanged || b != EventGone || len(events) != 0 {
		t.Errorf("events %d and %d from before", a, b)
	}

	// Lost: the disk is looked for.
	f := newFakeDisks(t)
	for name, want := range map[string]Event{"nvme0n1": EventChanged, "nvme9n1": EventGone} {
		w := diskWatch{h: &f.diskHost, name: name, f: func(e Event) { events <- e }}
		w.event(uevent{})
		if e := received(t, events); e != want {
			t.Errorf("%s: event %d, want %d", name, e, want)
		}
	}
}
