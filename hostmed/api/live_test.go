package api

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/inspect/attach"
	"github.com/shadowbell/shadowbell/shared/shm"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// live serves a mediator with a guest, and its control socket.
func live(t *testing.T) (socket, control string, ns *guestdrv.Namespace) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	m, err := hostmed.New(hostmed.Config{
		Controllers: []hostmed.ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=16MiB"}}}, CPUs: []int{-1, -1}, Logger: testrig.Log(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, m.Run)
	_, control = serve(t, m)
	c, err := guestdrv.Open(t.Context(), "vfio-user:"+socket, guestdrv.Options{Queues: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if ns, err = c.Namespace(1); err != nil {
		t.Fatal(err)
	}
	return socket, control, ns
}

func work(t *testing.T, ns *guestdrv.Namespace, n int) {
	t.Helper()
	buf := make([]byte, 4096)
	for range n {
		if _, err := ns.WriteAt(buf, 0); err != nil {
			t.Fatal(err)
		}
	}
}

// A tool that watches a guest: snapshots with memory, counters and events, all by what the control socket says.
func TestLive(t *testing.T) {
	socket, control, ns := live(t)
	c, ctx := client(t, control), t.Context()
	conn, err := c.Attach(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	work(t, ns, 20)
	s, files, err := conn.Inspect(ctx, socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	q := s.Controllers[0].Queues[1]
	if q.Commands < 20 || q.SQMemory.Size == 0 || q.SQ.Slot.Size == 0 {
		t.Fatalf("%+v", q)
	}
	slot, err := shm.Map(int(files[q.SQ.Slot.File].Fd()), int64(q.SQ.Slot.Offset), q.SQ.Slot.Size, false)
	if err != nil {
		t.Fatal(err)
	}
	defer slot.Close()
	tail, err := slot.Word32(0)
	if err != nil {
		t.Fatal(err)
	}
	before := tail.Load()
	work(t, ns, 3)
	if n := (tail.Load() + q.Size - before) % q.Size; n != 3 {
		t.Errorf("the tail moved by %d", n)
	}
	n, err := c.Counters(ctx, "")
	if err != nil || len(n.Controllers) != 1 || n.Controllers[0].Writes < 23 {
		t.Errorf("%+v, %v", n, err)
	}
	if k, err := c.Kick(ctx, socket, 1); err != nil || k.Found != 0 || !k.Woken && !k.Awake {
		t.Errorf("%+v, %v", k, err)
	}

	if _, err := conn.Media(ctx); code(err) != "not-listening" {
		t.Error(err)
	}
	if _, _, err := conn.Listen(ctx, attach.MaxRecords+1); code(err) != "bad-records" {
		t.Error(err)
	}
	rings, _, err := conn.Listen(ctx, 4096)
	if err != nil || len(rings) != 2 { // of each worker
		t.Fatalf("%d rings, %v", len(rings), err)
	}
	if _, _, err := conn.Listen(ctx, 0); code(err) != "listening" {
		t.Error(err)
	}
	var readers []*events.Reader
	for _, f := range rings {
		r, err := events.Map(int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		readers = append(readers, r)
		if _, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) {
			t.Errorf("a ring can be written: %v", err)
		}
		f.Close()
	}
	work(t, ns, 5)
	posted, buf := 0, make([]events.Record, 1024)
	eventually(t, "five commands' records", func() bool {
		for _, r := range readers {
			n, err := r.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range buf[:n] {
				if x.Kind == events.Post && x.Key == events.NewKey(s.Controllers[0].Trace, 1) {
					posted++
				}
			}
		}
		return posted >= 5
	})
	if media, err := conn.Media(ctx); err != nil || len(media) != 1 || media[0].Kind != "mem" {
		t.Errorf("%+v, %v", media, err)
	}
	// The end of the connection is the end of the listening.
	conn.Close()
	quiet := func() bool {
		for _, r := range readers {
			for n := 1; n > 0; n, _ = r.Read(buf) {
			}
		}
		work(t, ns, 1)
		time.Sleep(2 * time.Millisecond)
		for _, r := range readers {
			if n, _ := r.Read(buf); n > 0 {
				return false
			}
		}
		return true
	}
	eventually(t, "silence", quiet)
}

func code(err error) string {
	var e *attach.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// Workers that do not begin to record are not waited for, however often somebody asks.
func TestListenThatHangs(t *testing.T) {
	f := &fake{hang: make(chan struct{})}
	s, path := serve(t, f)
	var conns []*attach.Conn
	for range maxAsking + 1 {
		conn, err := client(t, path).Attach(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	done := make(chan error, len(conns))
	for _, conn := range conns {
		go func() {
			_, _, err := conn.Listen(t.Context(), 0)
			done <- err
		}()
	}
	for range conns {
		if err := <-done; !errors.Is(err, inspect.ErrBusy) {
			t.Error(err)
		}
	}
	close(f.hang)
	eventually(t, "room", func() bool { return len(s.asking) == 0 })
	if _, _, err := conns[0].Listen(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "no workers") {
		t.Error(err)
	}
}
