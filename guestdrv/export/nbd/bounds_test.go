package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv/export/internal/memdisk"
)

// gate holds operations of a disk up.
type gate struct {
	op      memdisk.Op
	open    chan struct{}
	waiting atomic.Int64
}

func (g *gate) before(ctx context.Context, op memdisk.Op, _, _ int64) error {
	if op != g.op {
		return nil
	}
	g.waiting.Add(1)
	defer g.waiting.Add(-1)
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// settles waits until n operations are held up, and no more come.
func (g *gate) settles(t *testing.T, n int64) {
	t.Helper()
	waitFor(t, func() bool { return g.waiting.Load() == n })
	time.Sleep(20 * time.Millisecond)
	if got := g.waiting.Load(); got != n {
		t.Errorf("%d operations at one time, want %d", got, n)
	}
}

func waitFor(t *testing.T, what func() bool) {
	t.Helper()
	for end := time.Now().Add(within); !what(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come to that")
		}
	}
}

func gated(t *testing.T, op memdisk.Op, change func(*Config)) (*Server, *memdisk.Disk, *gate) {
	s, d := one(t, 512, change)
	g := &gate{op: op, open: make(chan struct{})}
	d.Before = g.before
	return s, d, g
}

// TestRepliesOutOfOrder: what is done first is answered first.
func TestRepliesOutOfOrder(t *testing.T) {
	s, _, g := gated(t, memdisk.Read, nil)
	c := open(t, s, structured, "1")
	slow := c.request(cmdRead, 0, 0, 512, nil)
	quick := c.request(cmdWrite, 0, 0, 512, make([]byte, 512))
	if r := c.result(0); r.cookie != quick {
		t.Errorf("reply to %d, want %d", r.cookie, quick)
	}
	close(g.open)
	if r := c.result(512); r.cookie != slow || r.errno != 0 {
		t.Errorf("reply to %d, %v", r.cookie, r.errno)
	}
}

// TestLoneClient: requests of a client that waits for each reply take no worker, and one that begins to have several under way is seen to.
func TestLoneClient(t *testing.T) {
	s, d := one(t, 512, nil)
	var held atomic.Pointer[gate]
	var worker atomic.Bool // the last operation was one's
	d.Before = func(ctx context.Context, op memdisk.Op, off, n int64) error {
		worker.Store(byWorker())
		if g := held.Load(); g != nil {
			return g.before(ctx, op, off, n)
		}
		return nil
	}
	c := open(t, s, structured, "1")
	var g *gate
	// A reader that has to wait for a core finds the request there when it comes to look, and takes the client for one that does not wait.
	waitFor(t, func() bool {
		held.Store(nil)
		for range 3 * loneClient {
			c.do(cmdRead, 0, 0, 512, nil)
		}
		g = &gate{op: memdisk.Read, open: make(chan struct{})}
		held.Store(g)
		c.request(cmdRead, 0, 0, 512, nil)
		g.settles(t, 1)
		if !worker.Load() {
			return true
		}
		close(g.open)
		c.result(0)
		return false
	})
	for range 3 {
		c.request(cmdRead, 0, 0, 512, nil)
		g.settles(t, 1) // the first one, in the reader's own hands
	}
	next := &gate{op: memdisk.Read, open: make(chan struct{})}
	held.Store(next)
	close(g.open)
	next.settles(t, 3)
	close(next.open)
	for range 4 {
		if r := c.result(0); r.errno != 0 {
			t.Error(r.errno)
		}
	}
}

// byWorker tells whether it is a connection's worker that calls.
func byWorker() bool {
	var pcs [64]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs[:])])
	for {
		f, more := frames.Next()
		if strings.HasSuffix(f.Function, "(*conn).worker") {
			return true
		}
		if !more {
			return false
		}
	}
}

// TestRequestsAreBounded: a client that asks and asks has a number of requests under way, and takes no more than its share of memory.
func TestRequestsAreBounded(t *testing.T) {
	for _, r := range []struct {
		name   string
		all    int
		length uint64
		want   int64
	}{
		{"many small ones", 2 * slots, 512, slots},
		{"large ones", 16, maxPayload, connMemory / maxPayload},
		{"very large ones", 16, 3 * maxPayload, connMemory / maxPayload},
	} {
		t.Run(r.name, func(t *testing.T) {
			s, d, g := gated(t, memdisk.Read, nil)
			c := open(t, s, structured, "1")
			go func() {
				for i := range r.all {
					if err := c.trySend(uint32(magicRequest), uint16(0), uint16(cmdRead), uint64(i), uint64(0), uint32(r.length)); err != nil {
						t.Error(err)
						return
					}
				}
			}()
			g.settles(t, r.want)
			s.bufs.mu.Lock()
			taken := s.bufs.taken
			s.bufs.mu.Unlock()
			if taken > connMemory || d.Lent.Load() > r.want {
				t.Errorf("%d bytes in %d buffers", taken, d.Lent.Load())
			}
			close(g.open)
			for range r.all {
				if r := c.result(0); r.errno != 0 {
					t.Fatal(r.errno)
				}
			}
		})
	}
}

// TestMemoryOfTheDeviceIsBounded: beyond Config.DMAMemory it is the heap's.
func TestMemoryOfTheDeviceIsBounded(t *testing.T) {
	s, d, g := gated(t, memdisk.Read, func(c *Config) { c.DMAMemory = 64 << 10 })
	c := open(t, s, structured, "1")
	ask := func(n int, length uint64) {
		for range n {
			c.request(cmdRead, 0, 0, length, nil)
		}
	}
	ask(10, 32<<10)
	g.settles(t, 10)
	if n := d.Lent.Load(); n != 2 {
		t.Errorf("%d buffers of the device's memory, want 2", n)
	}
	close(g.open)
	for range 10 {
		c.result(0)
	}
	// The idle ones make room for other sizes.
	ask(1, 64<<10)
	if r := c.result(0); r.errno != 0 || d.Lent.Load() != 1 {
		t.Errorf("%v, %d buffers", r.errno, d.Lent.Load())
	}
}

// TestClientThatDoesNotRead holds up itself alone, and is got rid of.
func TestClientThatDoesNotRead(t *testing.T) {
	s, _ := one(t, 512, func(c *Config) { c.Grace = 300 * time.Millisecond })
	c := open(t, s, structured, "1")
	full := make(chan error, 1)
	go func() {
		for {
			if err := c.trySend(uint32(magicRequest), uint16(0), uint16(cmdRead), uint64(1), uint64(0), uint32(maxPayload)); err != nil {
				full <- err
				return
			}
		}
	}()
	other := open(t, s, structured, "1")
	for range 100 {
		if r := other.do(cmdRead, 0, 0, maxPayload, nil); r.errno != 0 {
			t.Fatal(r.errno)
		}
	}
	other.close()
	s.Close()
	<-full
}

// TestClientThatDiesInTheMiddle leaves nothing behind, whatever it was in the middle of.
func TestClientThatDiesInTheMiddle(t *testing.T) {
	s, d, g := gated(t, memdisk.Read, nil)
	for _, die := range []func(c *client){
		func(c *client) { c.send(uint32(magicRequest)) },
		func(c *client) {
			c.send(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(1), uint64(0), uint32(1<<20), make([]byte, 1000))
		},
		func(c *client) { c.request(cmdWrite, 0, 0, 1<<20, make([]byte, 1<<20)) },
		func(c *client) { c.send("and now for something completely different") },
		func(c *client) { c.request(cmdDisc, 0, 0, 0, nil) },
		func(c *client) {
			c.send(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(1), uint64(0), uint32(1<<31), make([]byte, 1000))
		},
		func(c *client) {
			c.send(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(1), uint64(0), uint32(3<<20), make([]byte, 3<<19))
		},
	} {
		c := open(t, s, structured, "1")
		die(c)
		c.close()
	}
	c := open(t, s, structured, "1")
	for range 10 {
		c.request(cmdRead, 0, 0, 4096, nil)
	}
	g.settles(t, 10)
	c.f.Close()
	close(g.open)
	c.close()
	s.Close()
	if n := d.Lent.Load(); n != 0 {
		t.Errorf("%d buffers left", n)
	}
}

func TestTooManyClients(t *testing.T) {
	s, _ := one(t, 512, func(c *Config) { c.Connections = 2 })
	a, b := open(t, s, simple, "1"), open(t, s, extended, "1")
	c := dial(t, s)
	c.expectEnd()
	c.close()
	a.close()
	b.do(cmdRead, 0, 0, 512, nil)
	open(t, s, simple, "1").do(cmdRead, 0, 0, 512, nil)
}

// TestShutdown: what is under way is finished, what comes later is refused, and a client that stays is let go.
func TestShutdown(t *testing.T) {
	t.Parallel()
	s, d, g := gated(t, memdisk.Write, nil)
	s.quiet = within / 6 // for machines that are slow
	c := open(t, s, structured, "1")
	before := c.request(cmdWrite, 0, 0, 512, bytes.Repeat([]byte{5}, 512))
	g.settles(t, 1)
	ended := make(chan struct{})
	go func() {
		s.Close()
		close(ended)
	}()
	waitFor(t, s.closing.Load)
	if r := c.do(cmdRead, 0, 0, 512, nil); r.errno != unix.ESHUTDOWN {
		t.Errorf("a request that comes too late: %v", r.errno)
	}
	if r := c.do(cmdWrite, 0, 0, 512, make([]byte, 512)); r.errno != unix.ESHUTDOWN {
		t.Errorf("a write that comes too late: %v", r.errno)
	}
	close(g.open)
	if r := c.result(0); r.cookie != before || r.errno != 0 {
		t.Errorf("what was under way: %v", r.errno)
	}
	s.mu.Lock()
	for x := range s.conns { // it was quiet for so long
		_ = x.f.SetReadDeadline(time.Now())
	}
	s.mu.Unlock()
	c.expectEnd()
	<-ended
	if d.Bytes()[511] != 5 {
		t.Error("the write was acknowledged and is not there")
	}
	c = dial(t, s)
	c.expectEnd()
}

// TestShutdownIsBounded: a disk that does not answer does not hold the end up.
func TestShutdownIsBounded(t *testing.T) {
	s, _, g := gated(t, memdisk.Read, func(c *Config) { c.Grace = 100 * time.Millisecond })
	c := open(t, s, structured, "1")
	c.request(cmdRead, 0, 0, 512, nil)
	g.settles(t, 1)
	s.Close() // the gate stays shut; only the context ends
	c.close()
}

func TestExportsComeAndGo(t *testing.T) {
	s, d := one(t, 512, nil)
	old := open(t, s, structured, "1")
	d.Resize(256)
	if r := old.do(cmdRead, 0, 256*512, 512, nil); r.errno != unix.EINVAL {
		t.Errorf("beyond the new end: %v", r.errno)
	}
	d.Resize(16384)
	fresh := dial(t, s)
	fresh.greet(3)
	fresh.option(optInfo, uint32(1), "1", uint16(0))
	if _, data := fresh.reply(optInfo); binary.BigEndian.Uint64(data[2:]) != 16384*512 {
		t.Errorf("%x", data)
	}
	if r := old.do(cmdRead, 0, 16383*512, 512, nil); r.errno != unix.EINVAL {
		t.Errorf("a client that knows a smaller disk reads beyond it: %v", r.errno)
	}
	s.Set(Export{Name: "2", Disk: memdisk.New(8, 512)})
	open(t, s, simple, "2").do(cmdRead, 0, 0, 512, nil)
	s.Set(Export{Name: "1", Description: "the same disk", Disk: d})
	if r := old.do(cmdRead, 0, 0, 512, nil); r.errno != 0 {
		t.Error(r.errno)
	}
	s.Remove("1")
	for _, cmd := range []uint16{cmdRead, cmdFlush, cmdWriteZeroes} {
		if r := old.do(cmd, 0, 0, 512, nil); r.errno != unix.ESHUTDOWN {
			t.Errorf("command %d on an export that is gone: %v", cmd, r.errno)
		}
	}
	if s.find("1") != nil || s.find("").Name != "2" {
		t.Error("the exports are not what they have to be")
	}
	old = open(t, s, structured, "2")
	s.Set(Export{Name: "2", Disk: memdisk.New(8, 512)})
	if r := old.do(cmdRead, 0, 0, 512, nil); r.errno != unix.ESHUTDOWN {
		t.Errorf("the disk is another one now, and the client is not told: %v", r.errno)
	}
	s.Remove("2")
	if s.find("") != nil {
		t.Error("there is a default, of nothing")
	}
}

// TestNothingIsAllocatedForARequest measures the whole process; the client here allocates nothing either.
func TestNothingIsAllocatedForARequest(t *testing.T) {
	s, _ := one(t, 512, nil)
	c := open(t, s, structured, "1")
	request := func(cmd uint16, data []byte) []byte {
		b := binary.BigEndian.AppendUint32(nil, magicRequest)
		b = binary.BigEndian.AppendUint32(b, uint32(cmd))
		b = append(b, make([]byte, 16)...) // cookie and offset
		return append(binary.BigEndian.AppendUint32(b, 4096), data...)
	}
	read, write := request(cmdRead, nil), request(cmdWrite, make([]byte, 4096))
	reply := make([]byte, 20+8+4096)
	once := func(request, reply []byte) {
		if _, err := c.f.Write(request); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c.f, reply); err != nil {
			t.Fatal(err)
		}
	}
	n := testing.AllocsPerRun(2000, func() {
		once(read, reply)
		once(write, reply[:20])
	})
	if n >= 1 {
		t.Errorf("%v allocations for a read and a write", n)
	}
}

func TestListener(t *testing.T) {
	path := t.TempDir() + "/s"
	s, _ := one(t, 512, nil)
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 || l.FD() < 0 {
		t.Errorf("%v, %v", st, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		if err := s.Serve(ctx, l); err != nil {
			t.Error(err)
		}
	})
	for _, attempt := range []string{path, t.TempDir(), t.TempDir() + "/none/s", "", string(make([]byte, 200))} {
		if other, err := Listen(attempt); err == nil {
			t.Errorf("%q was taken", attempt)
			other.Close()
		}
	}
	RemoveStale(path)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	hello := make([]byte, 18)
	if n, err := unix.Read(fd, hello); n != 18 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	unix.Close(fd)
	cancel()
	all.Wait()

	// What is left over is replaced, or removed.
	l, err = Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := l.accept(); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	RemoveStale(path)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("it is still there")
	}
	if l, err = Listen(path); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := l.Remove(); err != nil {
		t.Error(err)
	}
	if err := l.Remove(); err != nil {
		t.Error(err)
	}
}
