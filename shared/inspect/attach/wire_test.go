package attach

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/inspect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ends returns both ends of a connection.
func ends(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := make([]*net.UnixConn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

func openFDs(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestMessages(t *testing.T) {
	a, b := ends(t)
	if err := Send(a, Request{ID: 3, Inspect: &Inspect{Controller: "/s"}}, nil); err != nil {
		t.Fatal(err)
	}
	q, err := ReceiveRequest(b)
	if err != nil || q.ID != 3 || q.Inspect == nil || q.Inspect.Controller != "/s" {
		t.Fatalf("%+v, %v", q, err)
	}
	files := make([]*os.File, inspect.MaxFiles)
	for i := range files {
		if files[i], err = os.Open("/dev/null"); err != nil {
			t.Fatal(err)
		}
		defer files[i].Close()
	}
	// Longer than the socket's buffer.
	big := Reply{ID: 3, Snapshot: &inspect.Snapshot{Version: 1, Controllers: make([]inspect.Controller, 5000)}}
	sent := make(chan error, 1)
	go func() { sent <- Send(b, big, files) }()
	r, got, err := receiveReply(a)
	if err != nil || len(got) != len(files) || len(r.Snapshot.Controllers) != 5000 {
		t.Fatalf("%d files, %v", len(got), err)
	}
	for _, f := range got {
		if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Fatalf("a descriptor that is inherited: %v", err)
		}
	}
	closeAll(got)
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// What a server that is none sends is an error, and its descriptors are closed.
func TestRepliesThatCannotBe(t *testing.T) {
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	one, two := unix.UnixRights(int(null.Fd())), unix.UnixRights(int(null.Fd()), int(null.Fd()))
	header := func(n, files uint32, body string) []byte {
		b := binary.LittleEndian.AppendUint32(nil, n)
		return append(binary.LittleEndian.AppendUint32(b, files), body...)
	}
	for name, x := range map[string]struct {
		bytes, oob []byte
		want       error
	}{
		"nothing":         {nil, nil, io.ErrUnexpectedEOF},
		"part of it":      {[]byte{1, 2}, one, io.ErrUnexpectedEOF},
		"less than said":  {header(100, 1, "{}"), one, io.ErrUnexpectedEOF},
		"too long":        {header(MaxReply+1, 1, ""), one, ErrProtocol},
		"files missing":   {header(2, 2, "{}"), one, ErrProtocol},
		"files unsaid":    {header(2, 1, "{}"), two, ErrProtocol},
		"no JSON":         {header(2, 1, "]["), one, ErrProtocol},
		"files by 32 bit": {header(2, 1<<32-1, "{}"), one, ErrProtocol},
	} {
		a, b := ends(t)
		before := openFDs(t)
		if len(x.bytes) > 0 {
			if _, _, err := b.WriteMsgUnix(x.bytes, x.oob, nil); err != nil {
				t.Fatal(err)
			}
		}
		b.CloseWrite()
		if _, files, err := receiveReply(a); !errors.Is(err, x.want) || files != nil {
			t.Errorf("%s: %v", name, err)
		}
		if n := openFDs(t); n != before {
			t.Errorf("%s: %d descriptors, %d before", name, n, before)
		}
	}
}

// A snapshot that counts files which did not come is refused before anybody maps them.
func TestCheckFiles(t *testing.T) {
	s := inspect.Snapshot{Version: inspect.Version, Controllers: []inspect.Controller{{Queues: []inspect.Queue{{SQMemory: inspect.Memory{File: 0, Size: 64}}}}}}
	if err := checkFiles(&s, 1); err != nil {
		t.Error(err)
	}
	for _, m := range []inspect.Memory{{File: 1, Size: 4}, {File: -1, Size: 4}} {
		s.Controllers[0].Queues[0].CQ.EventSlot = m
		if err := checkFiles(&s, 1); !errors.Is(err, ErrProtocol) {
			t.Errorf("%+v: %v", m, err)
		}
	}
	if err := checkVersion(&inspect.Snapshot{Version: inspect.Version + 1}); err == nil {
		t.Error("another version")
	}
}

func TestErrors(t *testing.T) {
	for code, of := range codes {
		e := ErrorOf(of)
		doc, err := json.Marshal(e)
		if err != nil || e.Code != code {
			t.Fatal(e, err)
		}
		var back Error
		if err := json.Unmarshal(doc, &back); err != nil || !errors.Is(&back, of) || back.Error() != of.Error() {
			t.Errorf("%s: %v", code, &back)
		}
		for other, x := range codes {
			if other != code && errors.Is(&back, x) {
				t.Errorf("%s is %s", code, other)
			}
		}
	}
	if e := ErrorOf(io.EOF); e.Code != "failed" || errors.Is(e, nil) {
		t.Error(e)
	}
}

func FuzzReceiveRequest(f *testing.F) {
	f.Add(append(binary.LittleEndian.AppendUint64(nil, 21), `{"id":1,"inspect":{}}`...))
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{255, 255, 255, 255, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		a, b := ends(t)
		_ = b.SetWriteDeadline(time.Now().Add(time.Second))
		if len(in) > 0 {
			if _, err := b.Write(in); err != nil {
				return
			}
		}
		b.Close()
		for range len(in)/8 + 1 { // each request has a header
			if _, err := ReceiveRequest(a); err != nil {
				return
			}
		}
		if _, err := ReceiveRequest(a); err == nil {
			t.Error("more requests than headers")
		}
	})
}

func FuzzReceiveReply(f *testing.F) {
	f.Add(append(binary.LittleEndian.AppendUint64(nil, 8), `{"id":1}`...))
	f.Add([]byte{2, 0, 0, 0, 1, 0, 0, 0, '{', '}'})
	f.Fuzz(func(t *testing.T, in []byte) {
		a, b := ends(t)
		_ = b.SetWriteDeadline(time.Now().Add(time.Second))
		if len(in) > 0 {
			if _, err := b.Write(in); err != nil {
				return
			}
		}
		b.Close()
		if _, files, err := receiveReply(a); err == nil && len(files) > 0 {
			t.Error("files from nowhere")
		}
	})
}
