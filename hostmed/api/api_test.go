package api

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/inspect/attach"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// fake is a Mediator with one controller, "c", of one queue, in one file.
type fake struct {
	hang  chan struct{} // InspectMemory waits for it; nil: it does not
	name  string        // of the controller; empty: "c"
	asked atomic.Int32
}

func (f *fake) find(which string) error {
	switch which {
	case "", "c", "/dir/socket":
		return nil
	case "idle":
		return fmt.Errorf("idle: %w", inspect.ErrNoClient)
	}
	return fmt.Errorf("%s: %w", which, inspect.ErrNoController)
}

func (f *fake) List() []inspect.Listed {
	return []inspect.Listed{{Socket: "c", Trace: 1, Client: true}, {Socket: "idle", Trace: 2}}
}

func (f *fake) Inspect(_ context.Context, which string) (inspect.Snapshot, error) {
	s := inspect.Snapshot{Version: inspect.Version, Controllers: []inspect.Controller{{Socket: "c", Queues: []inspect.Queue{{QID: 1, SQMemory: inspect.Memory{Size: 64}}}}}}
	if f.name != "" {
		s.Controllers[0].Socket = f.name
	}
	return s, f.find(which)
}

func (f *fake) InspectMemory(ctx context.Context, which string) (inspect.Snapshot, []*os.File, error) {
	f.asked.Add(1)
	if f.hang != nil {
		select {
		case <-f.hang:
		case <-ctx.Done():
			return inspect.Snapshot{}, nil, ctx.Err()
		}
	}
	s, err := f.Inspect(ctx, which)
	if err != nil {
		return s, nil, err
	}
	file, err := os.Open("/proc/self/exe")
	return s, []*os.File{file}, err
}

func (f *fake) Counters(_ context.Context, which string) (inspect.Counters, error) {
	return inspect.Counters{Controllers: []inspect.ControllerCounters{{Socket: "c", Reads: 7}}}, f.find(which)
}

func (f *fake) Kick(_ context.Context, which string, qid uint16) (inspect.Kick, error) {
	switch {
	case f.find(which) != nil:
		return inspect.Kick{}, f.find(which)
	case qid == 2:
		return inspect.Kick{}, inspect.ErrNoQueue
	case qid == 3:
		return inspect.Kick{}, inspect.ErrBusy
	}
	return inspect.Kick{QID: qid, Woken: true, Found: 3}, nil
}

func (f *fake) Listen(uint32) (*hostmed.Trace, error) {
	if f.hang != nil {
		<-f.hang
	}
	return nil, errors.New("there are no workers")
}

func serve(t *testing.T, m Mediator) (*Server, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control")
	s, err := Listen(path, m, testrig.Log(t))
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, s.Serve)
	return s, path
}

func fds(t *testing.T) int {
	t.Helper()
	runtime.GC()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

func client(t *testing.T, path string) *attach.Client {
	c := attach.New(path)
	t.Cleanup(c.Close)
	return c
}

// What the client asks is what the mediator says, and errors are the same on both sides.
func TestClient(t *testing.T) {
	_, path := serve(t, &fake{})
	c, ctx := client(t, path), t.Context()
	if l, err := c.Controllers(ctx); err != nil || len(l) != 2 || l[1].Socket != "idle" {
		t.Errorf("%+v, %v", l, err)
	}
	for _, which := range []string{"", "c", "/dir/socket"} {
		if s, err := c.Inspect(ctx, which); err != nil || len(s.Controllers) != 1 {
			t.Errorf("%q: %+v, %v", which, s, err)
		}
	}
	if n, err := c.Counters(ctx, "c"); err != nil || n.Controllers[0].Reads != 7 {
		t.Errorf("%+v, %v", n, err)
	}
	for _, which := range []string{"c", "/dir/socket"} {
		if k, err := c.Kick(ctx, which, 1); err != nil || k != (inspect.Kick{QID: 1, Woken: true, Found: 3}) {
			t.Errorf("%+v, %v", k, err)
		}
	}
	fail := func(_ any, err error) error { return err }
	for want, err := range map[error][]error{
		inspect.ErrNoClient:     {fail(c.Inspect(ctx, "idle")), fail(c.Counters(ctx, "idle")), fail(c.Kick(ctx, "idle", 1))},
		inspect.ErrNoController: {fail(c.Inspect(ctx, "x y/z")), fail(c.Kick(ctx, "x y/z", 1))},
		inspect.ErrNoQueue:      {fail(c.Kick(ctx, "c", 2))},
		inspect.ErrBusy:         {fail(c.Kick(ctx, "c", 3))},
	} {
		for _, err := range err {
			if !errors.Is(err, want) {
				t.Errorf("%v in place of %v", err, want)
			}
		}
	}
	conn, err := c.Attach(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 { // errors do not end it
		s, files, err := conn.Inspect(ctx, "c")
		if err != nil || len(files) != 1 || len(s.Controllers) != 1 {
			t.Fatalf("%+v, %d files, %v", s, len(files), err)
		}
		files[0].Close()
		if _, _, err := conn.Inspect(ctx, "idle"); !errors.Is(err, inspect.ErrNoClient) {
			t.Error(err)
		}
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if _, _, err := conn.Inspect(ctx, "c"); err == nil {
		t.Error("asked on a closed connection")
	}
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{path + "x", plain} {
		if _, err := attach.New(wrong).Attach(ctx); err == nil || !strings.Contains(err.Error(), wrong+": ") || !strings.Contains(err.Error(), "start hostmed with --control") {
			t.Error(err)
		}
		if _, err := attach.New(wrong).Controllers(ctx); err == nil || !strings.Contains(err.Error(), "start hostmed with --control") {
			t.Error(err)
		}
	}
}

func get(t *testing.T, path, request string) (status int, header http.Header, body string) {
	t.Helper()
	c := dial(t, path)
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	head, body, _ := strings.Cut(string(raw), "\r\n\r\n")
	lines := strings.Split(head, "\r\n")
	if _, err := fmt.Sscanf(lines[0], "HTTP/1.1 %d", &status); err != nil {
		t.Fatalf("%q: %v", lines[0], err)
	}
	header = http.Header{}
	for _, l := range lines[1:] {
		k, v, _ := strings.Cut(l, ": ")
		header.Add(k, v)
	}
	return status, header, body
}

func dial(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

// What cannot be is answered with a status and a code.
func TestRefusals(t *testing.T) {
	_, path := serve(t, &fake{})
	for _, x := range []struct {
		request string
		status  int
		code    string
	}{
		{"GET / HTTP/1.1", 404, "no-path"},
		{"GET /v1/inspect/x HTTP/1.1", 404, "no-path"},
		{"POST /v1/inspect HTTP/1.1", 405, "method"},
		{"GET /v1/controllers/c/queues/1/kick HTTP/1.1", 405, "method"},
		{"POST /v1/controllers/c/queues/65536/kick HTTP/1.1", 400, "bad-queue"},
		{"POST /v1/controllers/c/queues/-1/kick HTTP/1.1", 400, "bad-queue"},
		{"POST /v1/controllers/c/queues/2/kick HTTP/1.1", 404, "no-queue"},
		{"POST /v1/controllers/c/queues/3/kick HTTP/1.1", 503, "busy"},
		{"POST /v1/controllers/idle/queues/1/kick HTTP/1.1", 409, "no-client"},
		{"GET /v1/stats?controller=nobody HTTP/1.1", 404, "no-controller"},
		{"GET /v1/attach HTTP/1.1", 426, "upgrade"},
		{"GET /v1/attach HTTP/1.1\r\nUpgrade: websocket", 426, "upgrade"},
	} {
		status, header, body := get(t, path, x.request+"\r\nHost: h\r\nConnection: close\r\n\r\n")
		var e struct{ Error attach.Error }
		if err := json.Unmarshal([]byte(body), &e); err != nil || status != x.status || e.Error.Code != x.code || e.Error.Message == "" || header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d %s", x.request, status, body)
		}
	}
	if status, _, _ := get(t, path, "GET /v1/inspect HTTP/1.1\r\nHost: h\r\nX: "+strings.Repeat("x", 2*maxHeader)+"\r\n\r\n"); status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a head of %d bytes: %d", 2*maxHeader, status)
	}
}

func TestWhoMayConnect(t *testing.T) {
	s, path := serve(t, &fake{})
	if st, err := os.Stat(path); err != nil || st.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	for uid, status := range map[uint32]int{0: 200, uint32(os.Geteuid()): 200, uint32(os.Geteuid()) + 1: 403} {
		other := filepath.Join(t.TempDir(), "other")
		x, err := Listen(other, s.m, testrig.Log(t))
		if err != nil {
			t.Fatal(err)
		}
		x.listener.peer = func(*net.UnixConn) (uint32, error) { return uid, nil }
		stop := testrig.Serve(t, x.Serve)
		if got, _, body := get(t, other, "GET /v1/controllers HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"); got != status {
			t.Errorf("user %d: %d %s", uid, got, body)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(other); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	}
	if _, err := Listen(path, s.m, nil); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("made twice: %v", err)
	}
}

// More clients than there is room for are turned away, and room comes back.
func TestConnectionsAreBounded(t *testing.T) {
	s, path := serve(t, &fake{})
	var conns []*attach.Conn
	c := client(t, path)
	for range MaxConns {
		conn, err := c.Attach(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	for range 3 * maxOpen { // each goes when it was told
		if _, err := c.Attach(t.Context()); err == nil || !strings.Contains(err.Error(), "connections are open") {
			t.Fatalf("one too many: %v", err)
		}
	}
	var silent []*net.UnixConn
	for range maxOpen - MaxConns { // these ask nothing
		silent = append(silent, dial(t, path))
	}
	eventually(t, "those who do not ask", func() bool { return len(s.listener.free) == maxOpen })
	if _, err := dial(t, path).Read(make([]byte, 1)); err == nil {
		t.Error("many too many")
	}
	for _, conn := range conns {
		conn.Close()
	}
	for _, c := range silent {
		c.Close()
	}
	eventually(t, "room", func() bool { return len(s.listener.free) == 0 })
	if _, err := c.Controllers(t.Context()); err != nil {
		t.Error(err)
	}
}

// raw is an upgraded connection without a client behind it.
func raw(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	c := dial(t, path)
	if _, err := io.WriteString(c, "GET /v1/attach HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: shadowbell-inspect\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	for got := ""; !strings.HasSuffix(got, "\r\n\r\n"); got += string(b[:]) {
		if _, err := c.Read(b[:]); err != nil {
			t.Fatalf("after %q: %v", got, err)
		}
	}
	return c
}

func frame(n, files uint32, body string) []byte {
	b := binary.LittleEndian.AppendUint32(nil, n)
	return append(binary.LittleEndian.AppendUint32(b, files), body...)
}

// What a hostile client sends ends its connection and nothing else, and leaves nothing open.
func TestHostileClients(t *testing.T) {
	s, path := serve(t, &fake{})
	ask := `{"id":1,"inspect":{}}`
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	before := fds(t)
	for name, send := range map[string]func(c *net.UnixConn){
		"too long":          func(c *net.UnixConn) { c.Write(frame(1<<31, 0, "")) },
		"claims files":      func(c *net.UnixConn) { c.Write(frame(2, 9, "{}")) },
		"no JSON":           func(c *net.UnixConn) { c.Write(frame(4, 0, "{{{{")) },
		"negative id":       func(c *net.UnixConn) { c.Write(frame(9, 0, `{"id":-1}`)) },
		"half a header":     func(c *net.UnixConn) { c.Write([]byte{1, 0, 0}); c.CloseWrite() },
		"half a body":       func(c *net.UnixConn) { c.Write(frame(100, 0, ask)); c.CloseWrite() },
		"gone at once":      func(c *net.UnixConn) { c.Close() },
		"gone after asking": func(c *net.UnixConn) { c.Write(frame(uint32(len(ask)), 0, ask)); c.Close() },
		"sends files": func(c *net.UnixConn) {
			c.WriteMsgUnix(frame(0, 0, ""), unix.UnixRights(int(null.Fd()), int(null.Fd())), nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := raw(t, path)
			send(c)
			if _, err := c.Read(make([]byte, 1)); err == nil && name != "gone after asking" {
				t.Error("it was answered")
			}
			c.Close()
		})
	}
	t.Run("unknown request", func(t *testing.T) {
		c := raw(t, path)
		c.Write(frame(8, 0, `{"id":5}`))
		b := make([]byte, 8)
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
		b = make([]byte, binary.LittleEndian.Uint32(b))
		if _, err := io.ReadFull(c, b); err != nil || !strings.Contains(string(b), `"code":"unknown"`) || !strings.Contains(string(b), `"id":5`) {
			t.Errorf("%s, %v", b, err)
		}
		c.Close()
	})
	t.Run("does not wait for 101", func(t *testing.T) {
		c := dial(t, path)
		io.WriteString(c, "GET /v1/attach HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: shadowbell-inspect\r\n\r\n"+string(frame(uint32(len(ask)), 0, ask)))
		if got, _ := io.ReadAll(c); len(got) > 0 && strings.Contains(string(got), "snapshot") {
			t.Errorf("%s", got)
		}
		c.Close()
	})
	eventually(t, "all of them to be gone", func() bool { return len(s.listener.free) == 0 })
	eventually(t, "descriptors to be closed", func() bool { return fds(t) <= before })
	if _, err := client(t, path).Controllers(t.Context()); err != nil {
		t.Error(err)
	}
}

// A client that reads no answer stops being asked for, and the others do not notice. When the server ends, so does its connection.
func TestClientThatReadsNothing(t *testing.T) {
	f := &fake{}
	s, path := serve(t, f)
	slow := raw(t, path)
	ask := `{"id":1,"inspect":{}}`
	_ = slow.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	for {
		if _, err := slow.Write(frame(uint32(len(ask)), 0, ask)); err != nil {
			break // the pipe is full both ways
		}
	}
	conn, err := client(t, path).Attach(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, files, err := conn.Inspect(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	files[0].Close()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// Ending waits for nothing that a client asked for, and gives back what it had.
func TestCloseWhileAsked(t *testing.T) {
	f := &fake{hang: make(chan struct{})}
	s, path := serve(t, f)
	before := fds(t)
	var asking sync.WaitGroup
	for range 4 {
		conn, err := client(t, path).Attach(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		asking.Go(func() {
			defer conn.Close()
			if _, _, err := conn.Inspect(t.Context(), ""); err == nil {
				t.Error("answered")
			}
		})
	}
	eventually(t, "requests", func() bool { return f.asked.Load() == 4 })
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	asking.Wait()
	eventually(t, "descriptors to be closed", func() bool { return fds(t) <= before })
}

// What is too long for one message is an error, and the connection goes on.
func TestAnswerThatIsTooLong(t *testing.T) {
	f := &fake{name: strings.Repeat("x", attach.MaxReply)}
	_, path := serve(t, f)
	conn, err := client(t, path).Attach(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 2 {
		if _, _, err := conn.Inspect(t.Context(), ""); code(err) != "too-long" || !strings.Contains(err.Error(), "one controller") {
			t.Error(err)
		}
	}
}

// A client that gives up waiting says so, and does not take the answer for that of its next question.
func TestClientGivesUp(t *testing.T) {
	f := &fake{hang: make(chan struct{})}
	_, path := serve(t, f)
	conn, err := client(t, path).Attach(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, _, err := conn.Inspect(ctx, ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	close(f.hang)
	if _, _, err := conn.Inspect(t.Context(), ""); err == nil {
		t.Error("the connection was used again")
	}
}
