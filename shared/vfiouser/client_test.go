package vfiouser

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var bg = context.Background()

// connect returns a negotiated client of dev.
func connect(t testing.TB, dev testDevice, cfg ClientConfig) *Client {
	t.Helper()
	fd, _ := startServer(t, dev)
	c := newTestClient(t, fd, cfg)
	if v, err := c.Negotiate(bg); err != nil || v.Caps.MaxMsgFDs != MaxFDs {
		t.Fatal(v, err)
	}
	return c
}

func TestClientAllCalls(t *testing.T) {
	checkFDs(t)
	files := memFDs(t, 40)
	dev := newFakeDevice()
	dev.mapDoorbells(files[0])
	c := connect(t, dev, ClientConfig{})

	if cred := c.PeerCred(); cred.Pid != int32(os.Getpid()) {
		t.Errorf("peer %+v", cred)
	}
	if info, err := c.DeviceInfo(bg); err != nil || info != dev.info {
		t.Error(info, err)
	}
	r, err := c.RegionInfo(bg, 0)
	if err != nil || r.Size != 0x4000 || r.Flags != 7 || !slices.Equal(r.Areas, []MmapArea{{0x1000, 0x1000}}) {
		t.Fatalf("%+v %v", r, err)
	}
	sameFiles(t, []int{r.FD}, files[:1])
	closeFD(t, r.FD)
	if r, err = c.RegionInfo(bg, 7); err != nil || r.FD != -1 || r.Size != 4096 || r.Areas != nil {
		t.Fatalf("%+v %v", r, err)
	}
	if r, err = c.RegionInfo(bg, 9); !errors.Is(err, unix.EINVAL) || r.FD != -1 {
		t.Fatalf("%+v %v", r, err)
	}
	if q, err := c.IRQInfo(bg, IRQMSIX); err != nil || q.Count != 33 {
		t.Error(q, err)
	}
	check := func(err error, want ...string) {
		t.Helper()
		if log := dev.calls(); err != nil || !slices.Equal(log, want) {
			t.Fatalf("%v; device got %q", err, log)
		}
	}
	const trigger = IRQSetDataEventFD | IRQSetTrigger
	check(c.SetIRQs(bg, IRQMSIX, 0, trigger, files[:33]), // as many messages as the limit asks for
		"irq 2 flags 0x24 [0,+16) fds 16 bools ", "irq 2 flags 0x24 [16,+16) fds 16 bools ", "irq 2 flags 0x24 [32,+1) fds 1 bools ")
	for i := range uint32(33) {
		dev.mu.Lock()
		got := dev.vectors[[2]uint32{IRQMSIX, i}]
		dev.mu.Unlock()
		sameFiles(t, []int{got}, files[i:i+1])
	}
	check(c.UnassignIRQs(bg, IRQMSIX, 3, 4), "irq 2 flags 0x24 [3,+4) fds 0 bools ")
	check(c.DisableIRQs(bg, IRQMSIX), "irq 2 disable")
	check(c.SetIRQs(bg, IRQMSIX, 0, IRQSetDataNone|IRQSetTrigger, nil), "irq 2 disable")
	check(c.DMAMap(bg, 0x10000, 0x2000, 0x1000, files[1], DMARead|DMAWrite), "map 0x10000+0x2000 @0x1000 flags 3 fd")
	check(c.DMAMap(bg, 0x20000, 0x2000, 0, -1, DMARead), "map 0x20000+0x2000 @0x0 flags 1 none")
	check(c.DMAUnmap(bg, 0x10000, 0x2000), "unmap 0x10000+0x2000 flags 0")
	check(c.DMAUnmapAll(bg), "unmap 0x0+0x0 flags 2")
	check(c.Reset(bg), "reset")
	check(c.RegionWrite(bg, 0, 0x14, []byte{1, 2, 3, 4}), "write 0 0x14 01020304")
	if err := c.RegionWritePosted(bg, 0, 0x1000, []byte{9, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	check(c.RegionRead(bg, 0, 0x1000, got), "write 0 0x1000 09000000") // posted comes first
	if !bytes.Equal(got, []byte{9, 0, 0, 0}) {
		t.Errorf("read %x", got)
	}
	long := pattern(0x4000)
	if err := c.RegionWrite(bg, 0, 0, long); err != nil {
		t.Fatal(err)
	}
	if err := c.RegionWritePosted(bg, 0, 1, long[1:]); err != nil {
		t.Fatal(err)
	}
	back := make([]byte, len(long))
	if err := c.RegionRead(bg, 0, 0, back); err != nil || !bytes.Equal(back, long) {
		t.Fatal("long read", err)
	}
	if err := c.RegionRead(bg, 0, 0, make([]byte, MaxDataXfer+1)); !errors.Is(err, unix.EMSGSIZE) {
		t.Error(err)
	}
	// A descriptor that is none is refused by the kernel, and the connection goes on.
	if err := c.DMAMap(bg, 0, 4096, 0, 1<<20, DMARead); !errors.Is(err, unix.EBADF) {
		t.Error(err)
	}
	if err := c.Reset(bg); err != nil || c.Err() != nil {
		t.Error(err, c.Err())
	}
}

func TestClientConcurrent(t *testing.T) {
	checkFDs(t)
	dev := newFakeDevice()
	c := connect(t, dev, ClientConfig{})
	var wg sync.WaitGroup
	for g := range 100 { // more than there are slots
		wg.Go(func() {
			off := uint64(g) * 16
			p := make([]byte, 8)
			for i := range 20 {
				le.PutUint64(p, uint64(g)<<32|uint64(i))
				if err := c.RegionWritePosted(bg, 0, off, p); err != nil {
					t.Error(err)
				}
				got := make([]byte, 8)
				if err := c.RegionRead(bg, 0, off, got); err != nil || !bytes.Equal(got, p) {
					t.Errorf("%d/%d: %x, %v", g, i, got, err)
				}
			}
		})
	}
	wg.Wait()
	if len(c.free) != slotCount {
		t.Errorf("%d slots free of %d", len(c.free), slotCount)
	}
}

func TestClientErrorReply(t *testing.T) {
	checkFDs(t)
	dev := newFakeDevice()
	c := connect(t, dev, ClientConfig{})
	dev.setFail(unix.ENOSPC)
	err := c.DMAMap(bg, 0, 4096, 0, -1, 3)
	if !errors.Is(err, unix.ENOSPC) || !strings.HasPrefix(err.Error(), "DMA_MAP: ") {
		t.Fatal(err)
	}
	dev.setFail(nil)
	if err := c.Reset(bg); err != nil {
		t.Fatal(err)
	}
}

func TestClientDeadlines(t *testing.T) {
	checkFDs(t)
	dev := newFakeDevice()
	c := connect(t, dev, ClientConfig{Timeout: patience})
	c.timeout = 20 * time.Millisecond // now that the version is negotiated
	stuck := make(chan struct{})
	answer := sync.OnceFunc(func() { close(stuck) })
	t.Cleanup(answer)
	dev.mu.Lock()
	dev.stuck, dev.mem[0][4] = stuck, 42
	dev.mu.Unlock()
	p := make([]byte, 4)
	if err := c.RegionRead(bg, 0, 0, p); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("configured time: %v", err)
	}
	ctx, cancel := context.WithTimeout(bg, 10*time.Millisecond)
	defer cancel()
	if err := c.RegionRead(ctx, 0, 0, p); !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("context's deadline: %v", err)
	}
	<-ctx.Done()
	if err := c.RegionRead(ctx, 0, 0, p); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("context expired before: %v", err)
	}
	ctx, cancel = context.WithTimeout(bg, patience) // so that the configured time does not come first
	time.AfterFunc(5*time.Millisecond, cancel)
	if err := c.RegionRead(ctx, 0, 0, p); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	// The late replies are dropped, and the connection goes on.
	ctx, cancel = context.WithTimeout(bg, patience)
	defer cancel()
	answer()
	if err := c.RegionRead(ctx, 0, 4, p); err != nil || p[0] != 42 {
		t.Fatal(err, p)
	}
	if len(c.free) != slotCount {
		t.Errorf("%d slots free of %d", len(c.free), slotCount)
	}
}

// A server that reads nothing: the socket fills up.
func TestClientServerDoesNotRead(t *testing.T) {
	checkFDs(t)
	a, b := socketPair(t)
	defer closeFD(t, b)
	c := newTestClient(t, a, ClientConfig{Timeout: 20 * time.Millisecond})
	p := make([]byte, 4)
	var err error
	for err == nil {
		err = c.RegionWritePosted(bg, 0, 0x1000, p)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) || c.Err() != nil {
		t.Fatalf("posted: %v; connection %v", err, c.Err())
	}
	if err := c.Reset(bg); !errors.Is(err, os.ErrDeadlineExceeded) || c.Err() != nil {
		t.Fatalf("call: %v; connection %v", err, c.Err())
	}
	ctx, cancel := context.WithTimeout(bg, patience)
	time.AfterFunc(5*time.Millisecond, cancel)
	if err := c.Reset(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	if len(c.free) != slotCount {
		t.Errorf("%d slots free of %d", len(c.free), slotCount)
	}
	// Some of what is in the way goes: the next one is sent again.
	buf := make([]byte, 1<<20)
	for n := 1; n > 0; {
		n, _ = unix.Read(b, buf)
	}
	if err := c.RegionWritePosted(bg, 0, 0x1000, p); err != nil {
		t.Fatal(err)
	}
	// In the middle of a message there is no way on.
	if err := c.RegionWritePosted(bg, 0, 0, make([]byte, MaxDataXfer)); !errors.Is(err, os.ErrDeadlineExceeded) || c.Err() == nil {
		t.Fatalf("half a message: %v; connection %v", err, c.Err())
	}
	<-c.Done()
}

// A server that reads and never answers: every slot is lost, and the next call ends in
// time all the same.
func TestClientOutOfSlots(t *testing.T) {
	checkFDs(t)
	a, b := socketPair(t)
	defer closeFD(t, b)
	c := newTestClient(t, a, ClientConfig{Timeout: 10 * time.Millisecond})
	var wg sync.WaitGroup
	for range slotCount + 1 {
		wg.Go(func() {
			if err := c.Reset(bg); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := c.Reset(bg); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	if err := c.RegionWritePosted(bg, 0, 0x1000, make([]byte, 4)); err != nil {
		t.Errorf("posted: %v", err)
	}
}

// Commands from the server are refused, and do not disturb.
func TestClientServerCommands(t *testing.T) {
	checkFDs(t)
	a, b := socketPair(t)
	c := newTestClient(t, a, ClientConfig{})
	rc := newRawClient(t, b)
	push(t, b, message(7, CmdDMARead, 0, make([]byte, 16)), memFDs(t, 1)...)
	if m := rc.reply(CmdDMARead, unix.ENOTSUP); m.ID != 7 || m.Flags != FlagReply|FlagError {
		t.Fatal(m.Header)
	}
	push(t, b, message(8, CmdDMAWrite, FlagNoReply, make([]byte, 16)))
	push(t, b, message(9, CmdDMARead, 0, make([]byte, 16)))
	if m := rc.reply(CmdDMARead, unix.ENOTSUP); m.ID != 9 {
		t.Fatal(m.Header)
	}
	if c.Err() != nil {
		t.Fatal(c.Err())
	}
}

func TestClientVersionMismatch(t *testing.T) {
	for name, payload := range map[string][]byte{
		"major": {1, 0, 0, 0}, "minor": {0, 0, 1, 0}, "empty": {}, "garbage": {0, 0, 0, 0, '{'},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := socketPair(t)
			defer closeFD(t, b)
			c := newTestClient(t, a, ClientConfig{})
			result := make(chan error)
			go func() { _, err := c.Negotiate(bg); result <- err }()
			rc := &rawClient{t: t, fd: b, r: NewReceiver(b, 0)}
			m := rc.next(CmdVersion)
			push(t, b, message(m.ID, CmdVersion, FlagReply, payload))
			if err := <-result; !errors.Is(err, ErrProtocol) || c.Err() == nil {
				t.Fatal(err, c.Err())
			}
		})
	}
}

func TestDial(t *testing.T) {
	checkFDs(t)
	path := filepath.Join(t.TempDir(), "s")
	if _, err := Dial(bg, path); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dev := newFakeDevice()
	ended := make(chan error, 2)
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				ended <- nil
				return
			}
			f, err := conn.File()
			conn.Close()
			if err != nil {
				ended <- err
				return
			}
			fd, err := unix.Dup(int(f.Fd()))
			f.Close()
			if err != nil {
				ended <- err
				return
			}
			ended <- serve(fd, dev)
		}
	}()
	c, err := Dial(bg, path)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Reset(bg); err != nil || !slices.Equal(dev.calls(), []string{"reset"}) {
		t.Fatal(err)
	}
	c.Close()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	l.Close()
	<-ended
}
