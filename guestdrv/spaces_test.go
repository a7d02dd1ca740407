package guestdrv_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/driver/nvmetest"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

// diary is what OnChange was told.
type diary struct {
	mu   sync.Mutex
	said []string
}

func (d *diary) onChange(c guestdrv.Change) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.said = append(d.said, fmt.Sprintf("%d %v %d", c.NSID, c.Kind, c.Namespace.Size()))
}

func (d *diary) take(t *testing.T, want ...string) {
	t.Helper()
	eventually(t, fmt.Sprint("OnChange is told ", want), func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return len(d.said) >= len(want)
	})
	d.mu.Lock()
	defer d.mu.Unlock()
	if !slices.Equal(d.said, want) {
		t.Fatalf("OnChange was told %v, want %v", d.said, want)
	}
	d.said = nil
}

var namespaceEvent = nvme.MakeAsyncEvent(nvme.EventNotice, nvme.EventNoticeNamespace, nvme.LogChangedNamespaces)

// TestNamespacesChange changes them in every way, and lets the driver know by an event, by a reset, and by Rescan.
func TestNamespacesChange(t *testing.T) {
	hints := map[string]func(t *testing.T, c opened){
		"event": func(t *testing.T, c opened) {
			eventually(t, "a request for events", func() bool { return c.dev.Event(namespaceEvent) })
		},
		"reset": func(_ *testing.T, c opened) { c.ForceReset(errors.New("the test wants it")) },
		"rescan": func(t *testing.T, c opened) {
			if err := c.Rescan(ctx); err != nil {
				t.Fatal(err)
			}
		},
	}
	for hint, tell := range hints {
		for _, v := range variants {
			t.Run(hint+"/"+v.name, func(t *testing.T) {
				var d diary
				cfg := v.cfg
				cfg.Namespaces = []nvmetest.Namespace{{Blocks: 1024, LBADS: 9, GUID: 1}, {Blocks: 1024, LBADS: 9, GUID: 2}, {Blocks: 64, LBADS: 9, Absent: true}}
				o := testOptions()
				o.OnChange = d.onChange
				c := v.open(t, cfg, o)
				one, two := namespace(t, c, 1), namespace(t, c, 2)
				change := func(all ...nvmetest.Namespace) {
					t.Helper()
					c.dev.SetNamespaces(all...)
					tell(t, c)
				}
				read := func(ns *guestdrv.Namespace, off int64) error {
					_, err := ns.ReadAt(make([]byte, 4096), off)
					return err
				}

				change(nvmetest.Namespace{Blocks: 4096, LBADS: 9, GUID: 1}, nvmetest.Namespace{Blocks: 1024, LBADS: 9, GUID: 2}, nvmetest.Namespace{Blocks: 64, LBADS: 9})
				d.take(t, "1 resized 2097152", "3 appeared 32768")
				if one.Size() != 4096*512 || one.Identify().NSZE != 4096 {
					t.Errorf("size %d", one.Size())
				}
				if err := errors.Join(read(one, 1<<20), read(two, 0), read(namespace(t, c, 3), 0)); err != nil {
					t.Error(err)
				}

				change(nvmetest.Namespace{Blocks: 4096, LBADS: 9, GUID: 1}, nvmetest.Namespace{Absent: true, LBADS: 9}, nvmetest.Namespace{Blocks: 64, LBADS: 12})
				three := func() *guestdrv.Namespace { ns, _ := c.Namespace(3); return ns }
				d.mustHave(t, "2 vanished 524288", "3 vanished 32768", "3 appeared 262144")
				mustMention(t, read(two, 0), guestdrv.ErrNoNamespace, "namespace 2", "no more")
				mustMention(t, two.Flush(ctx), guestdrv.ErrNoNamespace)
				if _, err := c.Namespace(2); !errors.Is(err, guestdrv.ErrNoNamespace) {
					t.Errorf("got %v", err)
				}
				if three().BlockSize() != 4096 || len(c.Namespaces()) != 2 {
					t.Errorf("blocks of %d bytes, %d namespaces", three().BlockSize(), len(c.Namespaces()))
				}
				if err := read(three(), 4096*63); err != nil {
					t.Error(err)
				}

				// Metadata makes one unusable, a new identity another one.
				old := three()
				change(nvmetest.Namespace{Blocks: 4096, LBADS: 9, GUID: 7}, nvmetest.Namespace{Absent: true, LBADS: 9}, nvmetest.Namespace{Blocks: 64, LBADS: 12, MS: 8})
				d.mustHave(t, "1 vanished 2097152", "3 vanished 262144", "1 appeared 2097152")
				mustMention(t, read(old, 0), guestdrv.ErrNoNamespace, "8 bytes of metadata")
				mustMention(t, read(one, 0), guestdrv.ErrNoNamespace, "another has taken its place")
				_, err := c.Namespace(3)
				mustMention(t, err, guestdrv.ErrNoNamespace, "8 bytes of metadata")
				if err := read(namespace(t, c, 1), 0); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// mustHave is take for changes in any order, but that a Vanished comes before the Appeared of its NSID.
func (d *diary) mustHave(t *testing.T, want ...string) {
	t.Helper()
	eventually(t, fmt.Sprint("OnChange is told ", want), func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return len(d.said) >= len(want)
	})
	d.mu.Lock()
	got := slices.Clone(d.said)
	d.mu.Unlock()
	order := slices.Clone(got)
	slices.Sort(order)
	sorted := slices.Clone(want)
	slices.Sort(sorted)
	if !slices.Equal(order, sorted) {
		t.Fatalf("OnChange was told %v, want %v", got, want)
	}
	if slices.IndexFunc(got, func(s string) bool { return s[2:9] == "appeare" }) != len(got)-1 {
		t.Errorf("appeared before vanished: %v", got)
	}
	d.mu.Lock()
	d.said = nil
	d.mu.Unlock()
}

// TestPairFollowsBlockSize uses a pair across a change of the block size: commands after it are for the new one.
func TestPairFollowsBlockSize(t *testing.T) {
	cfg := nvmetest.Config{Namespaces: []nvmetest.Namespace{{Blocks: 1024, LBADS: 9}}}
	c := openInProc(t, cfg, testOptions())
	p, err := c.NewQueuePair(guestdrv.QueuePairOptions{Poll: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	buf, err := c.Alloc(8192)
	if err != nil {
		t.Fatal(err)
	}
	defer buf.Free()
	submit := func(blocks uint32) error {
		_, err := p.Submit([]guestdrv.IO{{Op: nvme.IORead, NSID: 1, Blocks: blocks, IOVA: buf.IOVA()}})
		if err != nil {
			return err
		}
		var r [1]guestdrv.Result
		if err := errors.Join(p.Publish(), p.Wait(ctx)); err != nil {
			return err
		}
		if _, err := p.Reap(r[:]); err != nil {
			return err
		}
		return r[0].Status.Err()
	}
	if err := submit(2048); err != nil && nvme.StatusOf(err).Code() != nvme.StatusLBAOutOfRange {
		t.Fatal(err) // 1 MiB in blocks of 512 bytes fits in a command
	}
	c.dev.SetNamespaces(nvmetest.Namespace{Blocks: 1024, LBADS: 12})
	if err := c.Rescan(ctx); err != nil {
		t.Fatal(err)
	}
	mustMention(t, submit(2048), nil, "2048 blocks of 4096 bytes")
	if err := submit(2); err != nil {
		t.Error(err)
	}
	c.dev.SetNamespaces(nvmetest.Namespace{Absent: true})
	if err := c.Rescan(ctx); err != nil {
		t.Fatal(err)
	}
	mustMention(t, submit(1), guestdrv.ErrNoNamespace)
}

// TestSlowOnChange keeps OnChange busy while namespaces come and go: nothing waits for it, nor piles up.
func TestSlowOnChange(t *testing.T) {
	cfg := nvmetest.Config{Namespaces: []nvmetest.Namespace{{Blocks: 64, LBADS: 9}, {Absent: true, LBADS: 9}}}
	o := testOptions()
	var calls atomic.Int64
	var c opened
	ready, slow := make(chan struct{}), make(chan struct{})
	o.OnChange = func(ch guestdrv.Change) {
		<-ready
		calls.Add(1)
		<-slow
		// It may use the controller.
		if _, err := namespace(t, c, 1).ReadAt(make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
	}
	c = openInProc(t, cfg, o)
	close(ready)
	for i := range 101 {
		c.dev.SetNamespaces(nvmetest.Namespace{Blocks: 64, LBADS: 9}, nvmetest.Namespace{Blocks: 64, LBADS: 9, Absent: i%2 == 1})
		if err := c.Rescan(ctx); err != nil {
			t.Fatal(err)
		}
	}
	close(slow)
	eventually(t, "OnChange catches up", func() bool { return calls.Load() >= 3 })
	time.Sleep(10 * time.Millisecond)
	if n := calls.Load(); n > 5 {
		t.Errorf("%d calls", n)
	}
}
