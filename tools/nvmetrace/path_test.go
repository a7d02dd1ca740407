package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"image/png"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/ebpf/path"
	"github.com/shadowbell/shadowbell/ebpf/trace"
	"github.com/shadowbell/shadowbell/hostmed/backend"
	"github.com/shadowbell/shadowbell/shared/events"
)

// The numbers of operations in records are package backend's.
func TestPathOperations(t *testing.T) {
	for want, have := range map[backend.Op]int{
		backend.OpRead: path.OpRead, backend.OpWrite: path.OpWrite, backend.OpFlush: path.OpFlush, backend.OpWriteZeroes: path.OpWriteZeroes,
		backend.OpDiscard: path.OpDiscard, backend.OpCommand: path.OpCommand,
	} {
		if int(want) != have {
			t.Errorf("%v is %d, and %d in package path", want, want, have)
		}
	}
}

// fakeTaps are rings that a test writes.
type fakeTaps struct {
	t      *testing.T
	w      []*events.Writer
	list   []events.Medium
	closed bool
}

func newFakeTaps(t *testing.T, rings int, records uint32) *fakeTaps {
	f := &fakeTaps{t: t}
	for i := range rings {
		w, err := events.New(events.Config{Name: fmt.Sprintf("hostmed worker %d", i), Number: uint32(i), Thread: 1000 + uint32(i), Records: records})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Close() })
		f.w = append(f.w, w)
	}
	return f
}

func (f *fakeTaps) rings() (list []*events.Reader) {
	for _, w := range f.w {
		r, err := events.Map(w.FD())
		if err != nil {
			f.t.Error(err)
			continue
		}
		f.t.Cleanup(func() { r.Close() })
		list = append(list, r)
	}
	return list
}

func (f *fakeTaps) media(context.Context) ([]events.Medium, error) { return f.list, nil }
func (f *fakeTaps) close()                                         { f.closed = true }

// reading is a source that says when it is read, which is when the rings are too.
type reading struct {
	*fake
	begun chan struct{}
}

func (r *reading) Read(ctx context.Context, each func(trace.Event)) error {
	close(r.begun)
	return r.fake.Read(ctx, each)
}

func (f *fakeTaps) use() {
	before := openTaps
	openTaps = func(context.Context, string) (taps, error) { return f, nil }
	f.t.Cleanup(func() { openTaps = before })
}

// traffic is n reads by the first worker, one after the other until now, their real commands, and their guest's records if it has a ring.
func (f *fakeTaps) traffic(k *fake, guest *events.Writer, n int) {
	key := events.NewKey(5, 1)
	theirs := events.NewKey(1, 1)
	const apart = int64(200 * time.Microsecond)
	began := events.Now() - apart*int64(n)
	for i := range n {
		cid, at, slba := uint16(i), began+apart*int64(i), uint64(i%1000)
		w := f.w[0]
		if guest != nil {
			guest.Publish(at, theirs, cid, read, 1, slba, 1, false)
			guest.Flush()
		}
		w.Fetch(at+10_000, key, cid, read, 1, slba, 1)
		w.Submit(at+12_000, key, cid, read, path.OpRead, 1, 1<<20+slba*512, 512)
		w.Flush()
		s, e := command(1, cid, read, 2048+slba, 1, time.Duration(at+15_000), 80*time.Microsecond)
		s.TID, e.TID = 1000, 1000
		k.add(s, e)
		w.Complete(at+100_000, key, cid, read, 0, 0, 0)
		w.Post(at+101_000, key, cid, 1, 0)
		w.Flush()
		if guest != nil {
			guest.Reap(at+110_000, theirs, cid, read, 0)
			guest.Flush()
		}
	}
}

// runPath runs path with k for a second, in which do does something.
func runPath(t *testing.T, k *fake, do func(), args ...string) string {
	t.Helper()
	r := &reading{k, make(chan struct{})}
	k.useAs(t, r)
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-r.begun
		do()
	}()
	code, stdout, stderr := run(t, append([]string{"path", "--control", "/nowhere", "--duration", "1s"}, args...)...)
	<-done
	if code != 0 {
		t.Fatalf("exit %d: %s%s", code, stdout, stderr)
	}
	return stdout
}

func TestPath(t *testing.T) {
	f, k := newFakeTaps(t, 2, 0), newFake()
	f.list = []events.Medium{{ID: 1, Name: "block:/dev/nvme0n1p1", Kind: "block", Disk: "nvme0n1", Base: 1 << 20, Shift: 9}}
	f.use()
	f.traffic(newFake(), nil, 10) // before anybody asks
	file := filepath.Join(t.TempDir(), "guest")
	picture := filepath.Join(t.TempDir(), "path.png")
	const n = 500
	out := runPath(t, k, func() {
		guest, err := events.Create(file, events.Config{})
		if err != nil {
			t.Error(err)
			return
		}
		defer guest.Close()
		time.Sleep(20 * time.Millisecond)
		f.traffic(k, guest, n)
	}, "--json", "--guest", file, "--plot", picture)
	var x pathJSON
	if err := json.Unmarshal([]byte(out), &x); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := x.Counts
	if c.Commands != n || c.Matched != n || c.Guestless != 0 || c.Real != n || c.UnderWay != 0 || c.LostRecords+c.LostEvents+c.Late+c.Before != 0 {
		t.Errorf("%+v", c)
	}
	if len(x.Groups) != 1 {
		t.Fatalf("%+v", x.Groups)
	}
	g := x.Groups[0]
	if g.Name != f.list[0].Name || g.Kind != "block" || !g.Guest || g.Commands != n || g.Mean != 110_000 || len(g.Spans) != int(path.Spans) {
		t.Errorf("%+v", g)
	}
	for i, want := range []int64{10_000, 2_000, 3_000, 80_000, 6_000, 9_000} {
		if s := g.Spans[i]; s.Mean != want || s.Share < float64(want)/110_000-1e-6 || s.Share > float64(want)/110_000+1e-6 {
			t.Errorf("%+v, want %d", s, want)
		}
	}
	b, err := os.ReadFile(picture)
	if err != nil {
		t.Fatal(err)
	}
	if img, err := png.Decode(bytes.NewReader(b)); err != nil || img.Bounds().Dx() < 500 {
		t.Errorf("%v", err)
	}
	if !f.closed || !k.closed || !k.opened.Events {
		t.Error("not closed, or without events")
	}
}

// TestPathText: an interval, the totals, and what is lost in all cases.
func TestPathText(t *testing.T) {
	f, k := newFakeTaps(t, 1, 0), newFake()
	f.list = []events.Medium{{ID: 1, Name: "nvme:/dev/ng0n1", Kind: "nvme", Disk: "nvme0n1", Base: 1 << 20, Shift: 9}}
	f.use()
	k.lost = trace.Losses{Ring: 3}
	out := runPath(t, k, func() { f.traffic(k, nil, 100) }, "--interval", "100ms")
	for _, want := range []string{
		"totals, ", "nvme:/dev/ng0n1: 100 commands, from hostmed's fetch to its post", "real queue", "80.0 us", "hhqq",
		"commands  100: 100 matched, 0 not matched, 100 without the guest's part", "lost      0 records, 3 events of the kernel",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	if strings.Contains(out, "guest queue") {
		t.Errorf("a span that is not known:\n%s", out)
	}
}

// TestPathLoses: a ring that is overrun costs commands, which are counted and in no figure.
func TestPathLoses(t *testing.T) {
	f, k := newFakeTaps(t, 1, events.MinRecords), newFake()
	f.list = []events.Medium{{ID: 1, Name: "mem:size=1GiB", Kind: "mem"}}
	f.use()
	const n = 20_000
	out := runPath(t, k, func() { f.traffic(k, nil, n) }, "--json")
	var x pathJSON
	if err := json.Unmarshal([]byte(out), &x); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := x.Counts
	if c.Commands+c.LostRecords/4 < n-2*c.Suspect-c.Before-uint64(c.UnderWay) || c.Commands > n || c.Commands+c.LostRecords < n {
		t.Errorf("%+v", c)
	}
	for _, g := range x.Groups {
		if g.Mean != 91_000 {
			t.Errorf("%+v", g)
		}
	}
}

// TestPathWithoutTheKernel: what cannot be seen is said.
func TestPathWithoutTheKernel(t *testing.T) {
	newFakeTaps(t, 1, 0).use()
	before := openTrace
	openTrace = func(context.Context, trace.Options, bool) (source, []string, error) {
		return nil, nil, os.ErrPermission
	}
	t.Cleanup(func() { openTrace = before })
	code, stdout, stderr := run(t, "path", "--control", "x", "--duration", "10ms", "--json")
	var x pathJSON
	if err := json.Unmarshal([]byte(stdout), &x); err != nil || code != 0 {
		t.Fatalf("exit %d, %v: %s%s", code, err, stdout, stderr)
	}
	if len(x.Notes) != 1 || !strings.Contains(x.Notes[0], "not shown") {
		t.Errorf("%s", stdout)
	}
}

func TestPathUsage(t *testing.T) {
	newFakeTaps(t, 1, 0).use()
	newFake().use(t)
	for _, args := range [][]string{
		nil, {"--control", "x", "--plot", "x.txt"}, {"--control", "x", "--plot", "/nowhere/x.svg"}, {"--control", "x", "--interval", "1ms"},
	} {
		if code, _, stderr := run(t, append([]string{"path", "--duration", "10ms"}, args...)...); code != 2 || !strings.Contains(stderr, "nvmetrace: ") {
			t.Errorf("%v: exit %d: %s", args, code, stderr)
		}
	}
}
