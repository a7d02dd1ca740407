package hostmed

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

func smart(t *testing.T, c *guestdrv.Controller) *nvme.SMARTLog {
	t.Helper()
	var cmd nvme.Command
	if err := cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, 0, 512, false); err != nil {
		t.Fatal(err)
	}
	l := new(nvme.SMARTLog)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := c.Admin(ctx, &cmd, l.Bytes()[:]); err != nil {
		t.Fatal(err)
	}
	return l
}

// What a client has done is counted for the next, and, with a state directory, after a restart.
func TestCountersOutlive(t *testing.T) {
	for name, dir := range map[string]string{"reconnect": "", "restart": filepath.Join(t.TempDir(), "state")} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			cfg := Config{State: dir, Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"mem:size=16MiB"}}}, Logger: testrig.Log(t)}
			stop := start(t, cfg)
			for i := uint64(1); i <= 3; i++ {
				c := open(t, socket, guestdrv.Options{})
				ns, err := c.Namespace(1)
				if err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 4096)
				if _, err := ns.WriteAt(buf, 0); err != nil {
					t.Fatal(err)
				}
				if _, err := ns.ReadAt(buf, 0); err != nil {
					t.Fatal(err)
				}
				if l := smart(t, c); l.HostReads.Lo != i || l.HostWrites.Lo != i || l.DataUnitsRead.Lo != 1 || l.PowerCycles.Lo != i || l.UnsafeShutdowns.Lo != 0 {
					t.Errorf("client %d: %+v", i, l)
				}
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
				if dir != "" {
					if err := stop(); err != nil {
						t.Fatal(err)
					}
					stop = start(t, cfg)
				}
			}
		})
	}
}

func TestStateDirectoryInUse(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{State: dir, Controllers: []ControllerConfig{{Socket: filepath.Join(t.TempDir(), "s"), Namespaces: []string{"null:size=1GiB"}}}}
	start(t, cfg)
	cfg.Controllers = []ControllerConfig{{Socket: filepath.Join(t.TempDir(), "s"), Namespaces: []string{"null:size=1GiB"}}}
	if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("a second mediator with the same directory: %v", err)
	}
	if _, err := os.Lstat(cfg.Controllers[0].Socket); err == nil {
		t.Error("its socket was left")
	}
}

// A namespace that a guest has write protected stays so over restarts, and the data path knows.
func TestWriteProtectionOutlives(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	cfg := Config{State: t.TempDir(), Logger: testrig.Log(t),
		Controllers: []ControllerConfig{{Socket: socket, Namespaces: []string{"file:" + filepath.Join(t.TempDir(), "disk") + ",size=16MiB"}}}}
	buf := make([]byte, 4096)
	for _, step := range []struct{ was, set uint32 }{{0, 1}, {1, 1}, {1, 0}, {0, 2}, {0, 0}} { // 2 is until power is off
		stop := start(t, cfg)
		c := open(t, socket, guestdrv.Options{})
		ns, err := c.Namespace(1)
		if err != nil {
			t.Fatal(err)
		}
		check := func(state uint32) {
			t.Helper()
			if _, err := ns.WriteAt(buf, 0); (err == nil) != (state == 0) || state != 0 && nvme.StatusOf(err).Code() != nvme.StatusNamespaceWriteProtected {
				t.Errorf("in state %d a write gives %v", state, err)
			}
			if _, err := ns.ReadAt(buf, 0); err != nil {
				t.Errorf("in state %d a read gives %v", state, err)
			}
			if err := ns.Flush(t.Context()); err != nil {
				t.Errorf("in state %d a flush gives %v", state, err)
			}
			var cmd nvme.Command
			cmd.SetGetFeatures(nvme.FeatureWriteProtect, 1, nvme.FeatureCurrent)
			if got, err := c.Admin(t.Context(), &cmd, nil); err != nil || got != state {
				t.Errorf("state %d, %v, want %d", got, err, state)
			}
		}
		check(step.was)
		var cmd nvme.Command
		cmd.SetSetFeatures(nvme.FeatureWriteProtect, 1, step.set)
		if _, err := c.Admin(t.Context(), &cmd, nil); err != nil {
			t.Fatal(err)
		}
		check(step.set)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
}
