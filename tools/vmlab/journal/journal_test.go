package journal

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/internal/process"
	"github.com/shadowbell/shadowbell/tools/testrig"
	"github.com/shadowbell/shadowbell/tools/vmlab/journal/volatile"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if build.path != "" {
			os.RemoveAll(filepath.Dir(build.path))
		}
		os.Exit(code)
	}))
}

// pairDisk is a namespace through a queue pair of its own.
type pairDisk struct {
	p *guestdrv.QueuePair
	b *guestdrv.Buffer
}

func newPairDisk(t *testing.T, c *guestdrv.Controller) *pairDisk {
	t.Helper()
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Depth: 4})
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.Alloc(RecordSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.Free()
		p.Close()
	})
	return &pairDisk{p, b}
}

func (d *pairDisk) do(io guestdrv.IO) error {
	io.NSID, io.IOVA = 1, d.b.IOVA()
	if _, err := d.p.Submit([]guestdrv.IO{io}); err != nil {
		return err
	}
	if err := d.p.Publish(); err != nil {
		return err
	}
	if err := d.p.Wait(context.Background()); err != nil {
		return err
	}
	var r [1]guestdrv.Result
	if _, err := d.p.Reap(r[:]); err != nil {
		return err
	}
	if !r[0].Status.OK() {
		return fmt.Errorf("%v", r[0].Status)
	}
	return nil
}

func (d *pairDisk) write(p []byte, off int64, fua bool) error {
	copy(d.b.Bytes(), p)
	return d.do(guestdrv.IO{Op: nvme.IOWrite, LBA: uint64(off / 512), Blocks: uint32(len(p) / 512), FUA: fua})
}

func (d *pairDisk) WriteAt(p []byte, off int64) (int, error) { return len(p), d.write(p, off, false) }
func (d *pairDisk) WriteDurable(p []byte, off int64) error   { return d.write(p, off, true) }
func (d *pairDisk) Flush() error                             { return d.do(guestdrv.IO{Op: nvme.IOFlush}) }

var build struct {
	sync.Once
	path string
	err  error
}

// hostmedBinary builds hostmed, once.
func hostmedBinary(t *testing.T) string {
	t.Helper()
	build.Do(func() {
		dir, err := os.MkdirTemp("", "journal-")
		if err == nil {
			build.path, err = process.Binary(context.Background(), "hostmed", "", dir)
		}
		build.err = err
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return build.path
}

// onVolatileDisk serves a disk that loses power and opens it.
func onVolatileDisk(t *testing.T, d *volatile.Disk) *guestdrv.Controller {
	t.Helper()
	f := volatile.MountFor(t, d)
	// In a process of its own: one that serves the file system that its own io_uring waits for can wait for ever.
	socket := filepath.Join(t.TempDir(), "s")
	h, err := process.StartHostmed(t.Context(), hostmedBinary(t), nil, "--socket", socket, "--namespace", "file:"+f.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Stop(); err != nil {
			t.Error(err)
		}
	})
	c, err := guestdrv.Open(t.Context(), "vfio-user:"+socket, guestdrv.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// outages has writers work on d and cuts the power again and again. It returns what each cut has lost, and how much was acknowledged in the end.
func outages(t *testing.T, d *volatile.Disk, methods []Method, cuts int) (lost []string, acknowledged int) {
	t.Helper()
	c := onVolatileDisk(t, d)
	l := Layout{Run: rand.Uint64(), Methods: methods, Records: 400, Base: 1 << 20}
	var disks []Disk
	for range methods {
		disks = append(disks, newPairDisk(t, c))
	}
	acks := &testrig.Buffer{}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, l, disks, acks) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	r := rand.New(rand.NewPCG(1, 2))
	for i := range cuts {
		time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
		a, err := ReadAcks(strings.NewReader(acks.String())) // what is acknowledged before the cut counts
		if err != nil {
			t.Fatal(err)
		}
		image := d.Cut(r, []float64{0, 0.5, 0.95}[i%3])
		report, err := Check(bytes.NewReader(image), l, a)
		if err != nil {
			t.Fatal(err)
		}
		lost = append(lost, report.Lost...)
		acknowledged = report.Records
	}
	return lost, acknowledged
}

const diskSize = 32 << 20

// TestAcknowledgedIsOnTheMedium: whatever was acknowledged after a Flush or a write with FUA is on a disk that loses power at that moment.
func TestAcknowledgedIsOnTheMedium(t *testing.T) {
	d := volatile.New(diskSize)
	lost, n := outages(t, d, []Method{Flush, Durable, Batch, Durable, Flush}, 24)
	for _, l := range lost {
		t.Error(l)
	}
	s := d.Stats()
	t.Logf("%d records acknowledged, %+v", n, s)
	if n < 50 || s.Syncs == 0 || s.Durable == 0 || s.Writes == 0 {
		t.Errorf("%d records acknowledged, %+v: too little to say anything", n, s)
	}
}

// TestFUAAloneIsDurable: no flush of another writer helps.
func TestFUAAloneIsDurable(t *testing.T) {
	d := volatile.New(diskSize)
	lost, n := outages(t, d, []Method{Durable, Durable}, 12)
	for _, l := range lost {
		t.Error(l)
	}
	if s := d.Stats(); n < 20 || s.Durable < n {
		t.Errorf("%d records acknowledged, %+v", n, s)
	}
}

// TestTheCheckFindsLosses: on a disk that lies about syncs, and with writers that ask for none, it must complain. Otherwise the
// tests above say nothing.
func TestTheCheckFindsLosses(t *testing.T) {
	for name, c := range map[string]struct {
		methods []Method
		lying   bool
	}{
		"flush, lying disk": {[]Method{Flush}, true},
		"FUA, lying disk":   {[]Method{Durable}, true},
		"batch, lying disk": {[]Method{Batch}, true},
		"no flush":          {[]Method{Through}, false},
	} {
		t.Run(name, func(t *testing.T) {
			d := volatile.New(diskSize)
			d.Lying = c.lying
			lost, n := outages(t, d, c.methods, 12)
			if len(lost) == 0 {
				t.Errorf("nothing was lost of %d records", n)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	l := Layout{Run: 7, Methods: []Method{Flush, Durable}, Records: 40, Base: 4096}
	good := make([]byte, l.Base+l.Size())
	for w := range l.Methods {
		for n := range 10 {
			copy(good[l.record(w, n):], recordContent(&l, w, n))
		}
		copy(good[l.head(w):], headContent(&l, w, 9))
	}
	acks := func(text string) Acks {
		a, err := ReadAcks(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for name, c := range map[string]struct {
		acks  string
		spoil func(p []byte)
		lost  int
	}{
		"all there":            {"r 0 0\nh 0 0\nr 0 9\nr 1 4\nh 1 4\nh 0 9\n", nil, 0},
		"cut line":             {"r 0 9\nr 0 3", nil, 0},
		"nothing acknowledged": {"", nil, 0},
		"one more":             {"r 0 10\n", nil, 1},
		"a whole writer":       {"r 0 9\n", func(p []byte) { clear(p[l.record(0, 0):l.record(0, 10)]) }, 10},
		"torn":                 {"r 1 9\n", func(p []byte) { clear(p[l.record(1, 9)+512:][:512]) }, 1},
		"not acknowledged":     {"r 1 8\n", func(p []byte) { clear(p[l.record(1, 9)+512:][:512]) }, 0},
		"old head":             {"r 1 9\nh 1 9\n", func(p []byte) { copy(p[l.head(1):], headContent(&l, 1, 8)) }, 1},
		"newer head":           {"r 1 9\nh 1 8\n", nil, 0},
		"torn head":            {"r 1 9\nh 1 8\n", func(p []byte) { p[l.head(1)+511]++ }, 1},
		"wild write":           {"r 0 9\n", func(p []byte) { p[l.record(0, 39)]++ }, 1},
		"another's record":     {"r 0 9\n", func(p []byte) { copy(p[l.record(0, 5):][:RecordSize], p[l.record(1, 5):]) }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			p := bytes.Clone(good)
			if c.spoil != nil {
				c.spoil(p)
			}
			r, err := Check(bytes.NewReader(p), l, acks(c.acks))
			if err != nil || r.Missing != c.lost {
				t.Errorf("%d lost, want %d: %v %v", r.Missing, c.lost, r.Lost, err)
			}
		})
	}
	for _, bad := range []string{"r 0\n", "x 0 1\n", "r 0 2\nr 0 1\n", "\n"} {
		if a, err := ReadAcks(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was read as %v", bad, a)
		}
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	acks := &testrig.Buffer{}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := RunFiles(ctx, dir, 3, 2, acks); err != nil {
		t.Fatal(err)
	}
	a, err := ReadAcks(strings.NewReader(acks.String()))
	if err != nil {
		t.Fatal(err)
	}
	r, err := CheckFiles(dir, 3, a)
	if err != nil || r.Missing != 0 || r.Records < 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	for i, spoil := range []func(string) error{
		func(p string) error { return writeFile(p, []byte("something else")) },
		func(p string) error { return writeFile(p, nil) },
	} {
		if err := spoil(filepath.Join(dir, fileName(i, 0))); err != nil {
			t.Fatal(err)
		}
	}
	if r, err = CheckFiles(dir, 3, a); err != nil || r.Missing != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err = CheckFiles(t.TempDir(), 3, a); err != nil || r.Missing != r.Records {
		t.Errorf("%+v, %v", r, err)
	}
}
