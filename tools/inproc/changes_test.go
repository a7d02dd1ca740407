package inproc_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/hostmed"
)

// TestControllersShareANamespace has three controllers with three kinds of doorbells on one medium: each reads what the others write.
func TestControllersShareANamespace(t *testing.T) {
	modes := []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap, hostmed.Mmap}
	spec := []string{"mem:size=32MiB"}
	cfg := hostmed.Config{CPUs: []int{-1, -1}}
	for _, mode := range modes {
		cfg.Controllers = append(cfg.Controllers, hostmed.ControllerConfig{Socket: mode.String(), Doorbells: mode, Namespaces: spec})
	}
	m := serve(t, cfg)
	var all []*guestdrv.Namespace
	for _, mode := range modes {
		all = append(all, namespace(t, open(t, m, mode.String(), small()), 1))
	}
	var wg sync.WaitGroup
	for i, ns := range all {
		reader := all[(i+1)%len(all)]
		wg.Go(func() {
			got := make([]byte, 32<<10)
			for k := range 20 {
				want, off := randomBytes(uint64(i<<8|k), len(got)), int64(i<<20+k*len(got))
				if _, err := ns.WriteAt(want, off); err != nil {
					t.Error(err)
				}
				if _, err := reader.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
					t.Errorf("controller %d, round %d: the next one reads other data: %v", i, k, err)
				}
			}
		})
	}
	wg.Wait()
}

// TestNamespacesChange takes a namespace away, adds one, and makes one longer, under load on another.
func TestNamespacesChange(t *testing.T) {
	for _, mode := range []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap} {
		t.Run(mode.String(), func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			ns := func(nsid uint32, spec string) hostmed.NamespaceConfig {
				return hostmed.NamespaceConfig{NSID: nsid, Spec: spec}
			}
			base, goes, grows, comes := ns(1, "mem:size=64MiB"), ns(2, "mem:size=1MiB"), ns(3, "file:"+file), ns(4, "mem:size=2MiB,lba=4096")
			config := func(list ...hostmed.NamespaceConfig) hostmed.Config {
				return hostmed.Config{NoSockets: true, Subsystems: []hostmed.SubsystemConfig{{
					Controllers: []hostmed.ControllerConfig{{Socket: name, Doorbells: mode}}, Namespaces: list,
				}}}
			}
			m := serve(t, config(base, goes, grows))
			changes := make(chan guestdrv.Change, 16)
			o := small()
			o.OnChange = func(c guestdrv.Change) { changes <- c }
			c := open(t, m, name, o)
			l := startLoad(t, c, 3)
			next := func(kind guestdrv.ChangeKind, nsid uint32) *guestdrv.Namespace {
				t.Helper()
				select {
				case got := <-changes:
					if got.Kind != kind || got.NSID != nsid {
						t.Fatalf("namespace %d %v, want %d %v", got.NSID, got.Kind, nsid, kind)
					}
					return got.Namespace
				case <-time.After(patience):
					t.Fatalf("namespace %d: nobody told of %v", nsid, kind)
				}
				return nil
			}
			reload := func(list ...hostmed.NamespaceConfig) {
				t.Helper()
				if err := m.Reload(config(list...)); err != nil {
					t.Fatal(err)
				}
			}
			old := namespace(t, c, 2)
			reload(base, grows)
			next(guestdrv.Vanished, 2)
			if _, err := old.ReadAt(make([]byte, 4096), 0); !errors.Is(err, guestdrv.ErrNoNamespace) {
				t.Errorf("read of what is no more: %v", err)
			}
			reload(base, grows, comes)
			fresh := next(guestdrv.Appeared, 4)
			if _, err := fresh.WriteAt(randomBytes(1, 8192), 4096); err != nil || fresh.BlockSize() != 4096 || fresh.Size() != 2<<20 {
				t.Errorf("what is new has %d bytes in blocks of %d: %v", fresh.Size(), fresh.BlockSize(), err)
			}
			if err := os.Truncate(file, 3<<20); err != nil {
				t.Fatal(err)
			}
			reload(base, grows, comes)
			long := next(guestdrv.Resized, 3)
			if _, err := long.WriteAt(randomBytes(2, 4096), 2<<20); err != nil || long.Size() != 3<<20 {
				t.Errorf("what has grown has %d bytes: %v", long.Size(), err)
			}
			l.stop()
			for _, n := range l.noted() {
				t.Errorf("beside it, %s: %v", n.what, n.err)
			}
		})
	}
}

// TestResetsUnderLoad loses commands by chance, each of which costs a reset: whatever happens to whom, what is read is what was written.
func TestResetsUnderLoad(t *testing.T) {
	resets, rate := uint64(6), "1/400"
	if testing.Short() {
		resets, rate = 3, "1/100"
	}
	for _, mode := range []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap, hostmed.Mmap} {
		for _, on := range []guestdrv.ResetMode{guestdrv.ResetFail, guestdrv.ResetReplay} {
			t.Run(mode.String()+", "+on.String(), func(t *testing.T) {
				t.Parallel()
				m := serve(t, one(hostmed.ControllerConfig{Doorbells: mode, Namespaces: []string{"fault:drop@rate=" + rate + ",over=mem:size=64MiB"}}))
				o := faultOptions()
				o.Timeout, o.OnReset = 1500*time.Millisecond, on
				c := open(t, m, name, o)
				l := startLoad(t, c, 4)
				l.until("resets", func() bool { return c.Stats().Resets >= resets || c.Err() != nil })
				l.stop()
				if err := c.Err(); err != nil {
					t.Errorf("the controller has failed: %v", err)
				}
				for _, n := range l.noted() {
					// A command that is late because this machine is slow may be aborted in time.
					if !errors.Is(n.err, guestdrv.ErrReset) && !errors.Is(n.err, guestdrv.ErrTimeout) {
						t.Errorf("%s: %v", n.what, n.err)
					}
					if n.took > bound(o) {
						t.Errorf("%s took %v", n.what, n.took)
					}
				}
			})
		}
	}
}
