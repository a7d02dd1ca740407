package hostmed

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/nvme"
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

// TestACommandFromEndToEnd: what guestdrv and hostmed record of each command is in the order of its way.
func TestACommandFromEndToEnd(t *testing.T) {
	for _, mode := range []DoorbellMode{Shadow, Trap} {
		t.Run(mode.String(), func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			m := serve(t, Config{Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=16MiB"}, Doorbells: mode}}})
			w, err := events.New(events.Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			guest, err := events.Map(w.FD())
			if err != nil {
				t.Fatal(err)
			}
			defer guest.Close()
			c := open(t, socket, guestdrv.Options{Events: events.NewShared(w)})
			tr, err := m.Listen(0)
			if err != nil {
				t.Fatal(err)
			}
			readers := []*events.Reader{guest}
			for _, r := range tr.Rings {
				x, err := events.Map(r.FD)
				if err != nil {
					t.Fatal(err)
				}
				defer x.Close()
				readers = append(readers, x)
			}
			commands := traceLoad(t, c)
			if err := tr.Close(); err != nil {
				t.Fatal(err)
			}
			merge := events.NewMerge(readers...)
			ways := map[string][]events.Record{}
			out := make([]events.Record, 100)
			for {
				n, err := merge.Read(out, events.End)
				if err != nil || merge.Lost() > 0 {
					t.Fatalf("%d lost, %v", merge.Lost(), err)
				}
				if n == 0 {
					break
				}
				for _, x := range out[:n] {
					switch x.Kind {
					case events.Publish, events.Fetch, events.Submit, events.Complete, events.Post, events.Reap:
						k := fmt.Sprintf("%d/%#x", x.Key.QID(), x.CID)
						ways[k] = append(ways[k], x)
					}
				}
			}
			want := []events.Kind{events.Publish, events.Fetch, events.Submit, events.Complete, events.Post, events.Reap}
			seen := 0
			for k, way := range ways {
				for len(way) >= len(want) {
					for i, x := range way[:len(want)] {
						if x.Kind != want[i] || (x.Source == 0) != (x.Kind == events.Publish || x.Kind == events.Reap) || i > 0 && x.Time < way[i-1].Time {
							t.Fatalf("command %s: %+v, want %v after %+v", k, x, want[i], way[max(i-1, 0)])
						}
					}
					if p, f := way[0], way[1]; p.SLBA != f.SLBA || p.NSID != f.NSID || p.Blocks != f.Blocks || p.Opcode != f.Opcode || way[4].Status != way[5].Status {
						t.Errorf("command %s: %+v", k, way)
					}
					way = way[len(want):]
					seen++
				}
				if len(way) > 0 {
					t.Errorf("command %s: %+v", k, way)
				}
			}
			if seen != commands {
				t.Errorf("%d of %d commands", seen, commands)
			}
		})
	}
}

// traceLoad runs commands through a queue pair and the plain API, and returns how many.
func traceLoad(t *testing.T, c *guestdrv.Controller) (n int) {
	t.Helper()
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 32})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	buf, err := c.Alloc(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer buf.Free()
	var results [64]guestdrv.Result
	for round := range 100 {
		ios := make([]guestdrv.IO, 1+round%8)
		for i := range ios {
			ios[i] = guestdrv.IO{Op: nvme.IORead, NSID: 1, Blocks: uint32(1 + i%8), LBA: uint64(round*8 + i), IOVA: buf.IOVA()}
		}
		if k, err := p.Submit(ios); k != len(ios) || err != nil {
			t.Fatal(k, err)
		}
		if err := p.Publish(); err != nil {
			t.Fatal(err)
		}
		for got := 0; got < len(ios); {
			if err := p.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			k, err := p.Reap(results[:])
			if err != nil {
				t.Fatal(err)
			}
			got += k
		}
		n += len(ios)
	}
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(20) {
		if _, err := ns.WriteAt(random(t, 4096), i*4096); err != nil {
			t.Fatal(err)
		}
		n++
	}
	return n
}
