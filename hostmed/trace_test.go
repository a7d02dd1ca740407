package hostmed

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/events"
)

// ringsHeld counts the rings of events that this process has mapped, and their descriptors.
func ringsHeld(t *testing.T) (maps, fds int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	list, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range list {
		if to, err := os.Readlink(fd); err == nil && strings.Contains(to, "shadowbell-events") {
			fds++
		}
	}
	return strings.Count(string(b), "memfd:shadowbell-events"), fds
}

func TestListen(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	m := serve(t, Config{Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=16MiB", "null:size=1MiB"}}}})
	c := open(t, socket, guestdrv.Options{})
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	write := func(n int) {
		t.Helper()
		for range n {
			if _, err := ns.WriteAt(make([]byte, 4096), 8192); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(5)
	if maps, fds := ringsHeld(t); maps != 0 || fds != 0 {
		t.Fatalf("%d rings are mapped and %d descriptors open before anybody listens", maps, fds)
	}
	first, err := m.Listen(4096)
	if err != nil {
		t.Fatal(err)
	}
	var readers []*events.Reader
	for i, r := range first.Rings {
		x, err := events.Map(r.FD)
		if err != nil {
			t.Fatal(err)
		}
		defer x.Close()
		if info := x.Info(); info.Number != uint32(i) || info.Thread == 0 || info.Process != uint32(os.Getpid()) || info.Records != 4096 || r.Size != 4096+4096*32 {
			t.Errorf("%+v, %d bytes", info, r.Size)
		}
		readers = append(readers, x)
	}
	if len(readers) != len(m.workers) {
		t.Fatalf("%d rings of %d workers", len(readers), len(m.workers))
	}
	merge := events.NewMerge(readers...)
	posted := func() (n int) {
		t.Helper()
		out := make([]events.Record, 4096)
		k, err := merge.Read(out, events.End)
		if err != nil || merge.Lost() > 0 {
			t.Fatalf("%d lost, %v", merge.Lost(), err)
		}
		for _, x := range out[:k] {
			if x.Kind == events.Submit && (x.Medium != 1 || x.Offset != 8192 || x.Bytes != 4096) {
				t.Errorf("%+v", x)
			}
			if x.Kind == events.Post && x.Key.Controller() == 1 && x.Key.QID() > 0 {
				n++
			}
		}
		return n
	}
	settled := func(want int) { // the last record of a command may be seen after its CQE
		t.Helper()
		for n := 0; n != want; n += posted() {
			if n > want {
				t.Fatalf("%d commands, want %d", n, want)
			}
		}
	}
	write(7)
	settled(7)
	if media := first.Media(); len(media) != 1 || media[0].Kind != "mem" || media[0].Name != "mem:size=16MiB" {
		t.Errorf("%+v", media)
	}
	second, err := m.Listen(0)
	if err != nil {
		t.Fatal(err)
	}
	if second.Rings[0] != first.Rings[0] {
		t.Errorf("%+v and %+v", second.Rings, first.Rings)
	}
	for range 2 {
		if err := first.Close(); err != nil {
			t.Error(err)
		}
	}
	write(3)
	settled(3)
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	write(4)
	if n := posted(); n != 0 {
		t.Errorf("%d commands were recorded with no listener left", n)
	}
	if maps, fds := ringsHeld(t); maps != len(readers) || fds != 0 {
		t.Errorf("%d rings are mapped, of which %d are this test's, and %d descriptors open", maps, len(readers), fds)
	}
	last, err := m.Listen(0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.Close(), m.Close(), last.Close()); err != nil {
		t.Error(err)
	}
	if maps, fds := ringsHeld(t); maps != len(readers) || fds != 0 {
		t.Errorf("after the end %d rings are mapped and %d descriptors open", maps, fds)
	}
	if _, err := m.Listen(0); !errors.Is(err, errShutdown) {
		t.Errorf("listening after the end: %v", err)
	}
}
