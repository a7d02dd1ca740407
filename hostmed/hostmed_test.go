package hostmed

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

func TestMain(m *testing.M) {
	// Parallel tests are those that wait for commands which hang: that takes no cores.
	_ = flag.Set("test.parallel", "8")
	goleak.VerifyTestMain(m)
}

// start serves c until the test ends, and returns how to end it earlier.
func start(t testing.TB, c Config) (stop func() error) {
	t.Helper()
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return testrig.Serve(t, m.Run)
}

// one serves a single controller and returns its socket.
func one(t testing.TB, mode DoorbellMode, specs ...string) (socket string, stop func() error) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	return socket, start(t, Config{Controllers: []ControllerConfig{{Socket: socket, Namespaces: specs, Doorbells: mode}}, Logger: testrig.Log(t)})
}

func open(t testing.TB, socket string, o guestdrv.Options) *guestdrv.Controller {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := guestdrv.Open(ctx, "vfio-user:"+socket, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

const patience = 20 * time.Second

func random(t testing.TB, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	if _, err := rand.Read(p); err != nil {
		t.Fatal(err)
	}
	return p
}

var modes = []DoorbellMode{Shadow, Trap, Mmap}

func TestEndToEnd(t *testing.T) {
	for _, mode := range modes {
		for _, kind := range []string{"mem", "file", "mem by SGLs", "file by SGLs"} {
			t.Run(mode.String()+"/"+kind, func(t *testing.T) {
				spec := "mem:size=64MiB"
				if strings.HasPrefix(kind, "file") {
					spec = "file:" + filepath.Join(t.TempDir(), "disk") + ",size=64MiB"
				}
				socket, _ := one(t, mode, spec)
				c := open(t, socket, guestdrv.Options{Timeout: patience / 4, SGL: strings.HasSuffix(kind, "SGLs")})
				want := map[DoorbellMode]string{Shadow: "shadow", Trap: "mmio", Mmap: "mmap"}[mode]
				if c.Doorbells() != want {
					t.Errorf("doorbells %q, want %q", c.Doorbells(), want)
				}
				exercise(t, c)
			})
		}
	}
}

// exercise does everything a user of the plain API does.
func exercise(t *testing.T, c *guestdrv.Controller) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	data := random(t, 3<<20+512) // several commands, none of them whole
	if n, err := ns.WriteAt(data, 1<<20); n != len(data) || err != nil {
		t.Fatal(n, err)
	}
	if err := ns.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	if n, err := ns.ReadAt(got, 1<<20); n != len(got) || err != nil {
		t.Fatal(n, err)
	}
	if !bytes.Equal(got, data) {
		t.Fatal("read other data than was written")
	}
	if err := ns.Compare(ctx, data[:4096], 1<<20); err != nil {
		t.Error(err)
	}
	if err := ns.Compare(ctx, data[:4096], 2<<20); nvme.StatusOf(err).Code() != nvme.StatusCompareFailure {
		t.Errorf("compare of other data: %v", err)
	}
	if err := ns.WriteZeroes(ctx, 1<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := ns.Discard(ctx, 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.ReadAt(got[:1<<20], 1<<20); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:1<<20], make([]byte, 1<<20)) {
		t.Error("write zeroes left data")
	}
	b, err := c.Alloc(8192)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Free()
	if n, err := ns.ReadAt(b.Bytes(), 2<<20); n != 8192 || err != nil || !bytes.Equal(b.Bytes(), data[1<<20:1<<20+8192]) {
		t.Errorf("read into a Buffer: %d, %v", n, err)
	}
	if n, err := ns.ReadAt(got[:4096], ns.Size()-2048); n != 2048 || err != io.EOF {
		t.Errorf("read over the end: %d, %v", n, err)
	}
	if _, err := ns.ReadAt(got[:100], 0); !errors.Is(err, guestdrv.ErrUnaligned) || !strings.Contains(err.Error(), "512") {
		t.Errorf("unaligned read: %v", err)
	}

	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			mine := random(t, 16384)
			back := make([]byte, len(mine))
			for i := range 30 {
				off := int64(8<<20 + g<<20 + i*16384)
				if _, err := ns.WriteAt(mine, off); err != nil {
					t.Error(err)
				}
				if _, err := ns.ReadAt(back, off); err != nil || !bytes.Equal(mine, back) {
					t.Errorf("goroutine %d: wrong data, %v", g, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestVendorCommandOf2014(t *testing.T) {
	socket, _ := one(t, Shadow, "mem:size=16MiB")
	c := open(t, socket, guestdrv.Options{Vendor2014: true, Doorbells: guestdrv.DoorbellsShadow})
	if c.Doorbells() != "shadow" {
		t.Errorf("doorbells %q", c.Doorbells())
	}
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(300) {
		if _, err := ns.WriteAt(random(t, 4096), i*4096); err != nil {
			t.Fatal(err)
		}
	}
	if s := c.Stats(); s.MMIOWrites > s.Commands {
		t.Errorf("%d MMIO writes for %d commands", s.MMIOWrites, s.Commands)
	}
}

// TestManyQueues uses every queue pair, the deepest, several workers, and controllers that share a namespace.
func TestManyQueues(t *testing.T) {
	dir := t.TempDir()
	var cc []ControllerConfig
	for i := range 2 {
		cc = append(cc, ControllerConfig{Socket: filepath.Join(dir, fmt.Sprint(i)), Namespaces: []string{"mem:size=64MiB", "null:size=1TiB,lba=4096"}})
	}
	start(t, Config{Controllers: cc, CPUs: []int{0, 0}})
	var wg sync.WaitGroup
	for i := range 2 {
		c := open(t, cc[i].Socket, guestdrv.Options{Queues: 1, MaxQueuePairs: 64, DMASize: 256 << 20})
		for q := range 63 {
			depth := uint32(2 + q)
			if q == 0 {
				depth = guestdrv.MaxQueueDepth
			}
			p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: depth})
			if err != nil {
				t.Fatalf("queue pair %d: %v", q, err)
			}
			b, err := c.Alloc(4096)
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				defer b.Free()
				drive(t, p, b.IOVA(), 500)
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
}

// drive does n reads on a queue pair, as many at a time as it holds.
func drive(t *testing.T, p *guestdrv.QueuePair, iova uint64, n int) {
	ios := make([]guestdrv.IO, 64)
	out := make([]guestdrv.Result, 64)
	sent, done := 0, 0
	for done < n {
		batch := ios[:0]
		for len(batch) < cap(ios) && sent+len(batch) < n {
			batch = append(batch, guestdrv.IO{Op: nvme.IORead, NSID: 2, LBA: uint64(sent + len(batch)), Blocks: 1, IOVA: iova, Tag: uint64(sent + len(batch))})
		}
		k, err := p.Submit(batch)
		if err != nil {
			t.Error(err)
			return
		}
		sent += k
		if err := p.Publish(); err != nil {
			t.Error(err)
			return
		}
		if err := p.Wait(context.Background()); err != nil {
			t.Error(err)
			return
		}
		k, err = p.Reap(out)
		if err != nil {
			t.Error(err)
			return
		}
		for _, r := range out[:k] {
			if !r.Status.OK() {
				t.Errorf("tag %d: %v", r.Tag, r.Status)
			}
		}
		done += k
	}
}

func TestSecondClientIsRefusedAndTheNextServed(t *testing.T) {
	socket, _ := one(t, Shadow, "mem:size=1MiB")
	first := open(t, socket, guestdrv.Options{})
	if _, err := guestdrv.Open(context.Background(), "vfio-user:"+socket, guestdrv.Options{}); !errors.Is(err, unix.EBUSY) {
		t.Errorf("second client: %v, want EBUSY", err)
	}
	exerciseSmall(t, first)
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	for range 5 {
		next := open(t, socket, guestdrv.Options{})
		exerciseSmall(t, next)
		if err := next.Close(); err != nil {
			t.Error(err)
		}
	}
}

func exerciseSmall(t *testing.T, c *guestdrv.Controller) {
	t.Helper()
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	want, got := random(t, 8192), make([]byte, 8192)
	if _, err := ns.WriteAt(want, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.ReadAt(got, 4096); err != nil || !bytes.Equal(want, got) {
		t.Fatalf("wrong data, %v", err)
	}
}

// TestShutdownUnderLoad ends the service while a client writes: what was flushed is in the file, the socket is gone, and
// the client gets an error, not a hang.
func TestShutdownUnderLoad(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	socket, stop := one(t, Shadow, "file:"+file+",size=16MiB")
	c := open(t, socket, guestdrv.Options{})
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	want := random(t, 65536)
	if _, err := ns.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := ns.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	begun := make(chan struct{})
	go func() {
		p := random(t, 65536)
		for i := 0; ; i++ {
			if _, err := ns.WriteAt(p, 1<<20+int64(i%100)*65536); err != nil {
				failed <- err
				return
			}
			if i == 10 {
				close(begun)
			}
		}
	}()
	<-begun
	if err := stop(); err != nil {
		t.Error(err)
	}
	select {
	case err := <-failed:
		if !errors.Is(err, guestdrv.ErrGone) {
			t.Errorf("the client got %v", err)
		}
	case <-time.After(patience):
		t.Error("the client still waits")
	}
	got, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(got[:len(want)], want) {
		t.Errorf("flushed data is not in the file (%v)", err)
	}
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestBadConfig(t *testing.T) {
	dir := t.TempDir()
	notSocket := filepath.Join(dir, "file")
	if err := os.WriteFile(notSocket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	used, _ := one(t, Shadow, "null:size=1MiB")
	null := []string{"null:size=1MiB"}
	for name, x := range map[string]struct {
		c    Config
		want string
	}{
		"nothing":      {Config{}, "--socket"},
		"no namespace": {Config{Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "s")}}}, "--namespace"},
		"empty path":   {Config{Controllers: []ControllerConfig{{Namespaces: null}}}, "--socket"},
		"no directory": {Config{Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "no", "s"), Namespaces: null}}}, "does not exist"},
		"not a socket": {Config{Controllers: []ControllerConfig{{Socket: notSocket, Namespaces: null}}}, "not a socket"},
		"in use":       {Config{Controllers: []ControllerConfig{{Socket: used, Namespaces: null}}}, "in use"},
		"too long":     {Config{Controllers: []ControllerConfig{{Socket: "/" + strings.Repeat("x", 120), Namespaces: null}}}, "107"},
		"bad spec":     {Config{Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "s"), Namespaces: []string{"disk:x"}}}}, "disk"},
		"missing file": {Config{Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "s"), Namespaces: []string{"file:" + dir + "/none"}}}}, "none"},
		"no such CPU":  {Config{CPUs: []int{1023}, Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "s"), Namespaces: null}}}, "CPU 1023"},
	} {
		m, err := New(x.c)
		if err == nil {
			m.Close()
			t.Errorf("%s: no error", name)
			continue
		}
		if !strings.Contains(err.Error(), x.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %q, want one line with %q", name, err, x.want)
		}
	}
	if _, err := os.Lstat(used); err != nil {
		t.Errorf("the socket of the running service was removed: %v", err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	start(t, Config{Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=1MiB"}}}})
	exerciseSmall(t, open(t, socket, guestdrv.Options{}))
}

func TestRule07_MappedDoorbellsAreX86Only(t *testing.T) {
	for arch, ok := range map[string]bool{"amd64": true, "arm64": false, "riscv64": false} {
		if err := checkMode(Mmap, arch); (err == nil) != ok {
			t.Errorf("mmap on %s: %v", arch, err)
		} else if err != nil && !strings.Contains(err.Error(), arch) {
			t.Errorf("mmap on %s: %q does not name it", arch, err)
		}
		for _, mode := range []DoorbellMode{Shadow, Trap} {
			if err := checkMode(mode, arch); err != nil {
				t.Errorf("%v on %s: %v", mode, arch, err)
			}
		}
	}
}
