package hostmed

import (
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// TestGrouped: a SPEC is one medium, so controllers that name it share a namespace, and are in one subsystem.
func TestGrouped(t *testing.T) {
	const x, y, z = "mem:size=1MiB", "mem:size=2MiB", "mem:size=3MiB"
	ns := func(nsid uint32, spec string, ids ...uint16) NamespaceConfig {
		return NamespaceConfig{NSID: nsid, Spec: spec, Controllers: ids}
	}
	for _, c := range []struct {
		name  string
		lists [][]string
		want  [][]NamespaceConfig // by subsystem
		socks [][]string
	}{
		{"alone", [][]string{{x, y}}, [][]NamespaceConfig{{ns(1, x, 1), ns(2, y, 1)}}, [][]string{{"0"}}},
		{"strangers", [][]string{{x}, {y}}, [][]NamespaceConfig{{ns(1, x, 1)}, {ns(1, y, 1)}}, [][]string{{"0"}, {"1"}}},
		{"the same", [][]string{{x, y}, {x, y}}, [][]NamespaceConfig{{ns(1, x, 1, 2), ns(2, y, 1, 2)}}, [][]string{{"0", "1"}}},
		{"one shared", [][]string{{x}, {y}, {x, z}}, [][]NamespaceConfig{{ns(1, x, 1, 2), ns(2, z, 2)}, {ns(1, y, 1)}}, [][]string{{"0", "2"}, {"1"}}},
		{"joined by a third", [][]string{{x}, {z, y}, {x, y}}, nil, nil},
		{"joined, in order", [][]string{{x}, {z, y}, {x, y, "mem:size=4MiB"}}, nil, nil},
		{"under two ids", [][]string{{x, y}, {y, x}}, nil, nil},
		{"the same twice", [][]string{{x, x}}, [][]NamespaceConfig{{ns(1, x, 1), ns(2, x, 1)}}, [][]string{{"0"}}},
	} {
		var cc []ControllerConfig
		for i, l := range c.lists {
			cc = append(cc, ControllerConfig{Socket: string(rune('0' + i)), Namespaces: l})
		}
		got, err := grouped(cc)
		if c.want == nil {
			if err == nil || !strings.Contains(err.Error(), "different ids") {
				t.Errorf("%s: %+v, %v", c.name, got, err)
			}
			continue
		}
		if err != nil || len(got) != len(c.want) {
			t.Errorf("%s: %+v, %v", c.name, got, err)
			continue
		}
		for i, s := range got {
			var socks []string
			for _, x := range s.Controllers {
				socks = append(socks, x.Socket)
			}
			if !reflect.DeepEqual(s.Namespaces, c.want[i]) || !reflect.DeepEqual(socks, c.socks[i]) {
				t.Errorf("%s: subsystem %d has %+v on %v, want %+v on %v", c.name, i, s.Namespaces, socks, c.want[i], c.socks[i])
			}
		}
	}
}

// TestSharedNamespace: two sockets with one disk are two controllers of one subsystem, and see each other's data.
func TestSharedNamespace(t *testing.T) {
	dir := t.TempDir()
	var cc []ControllerConfig
	for _, name := range []string{"a", "b"} {
		cc = append(cc, ControllerConfig{Socket: filepath.Join(dir, name), Namespaces: []string{"file:" + filepath.Join(dir, "disk") + ",size=4MiB"}})
	}
	start(t, Config{Controllers: cc, Logger: testrig.Log(t)})
	a, b := open(t, cc[0].Socket, guestdrv.Options{}), open(t, cc[1].Socket, guestdrv.Options{})
	ida, idb := a.Identify(), b.Identify()
	if ida.Subsystem() != idb.Subsystem() || ida.Serial() != idb.Serial() || ida.CNTLID == idb.CNTLID || ida.CMIC&2 == 0 {
		t.Errorf("%s %s %d, %s %s %d, CMIC %#x", ida.Subsystem(), ida.Serial(), ida.CNTLID, idb.Subsystem(), idb.Serial(), idb.CNTLID, ida.CMIC)
	}
	na, err := a.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	nb, err := b.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	want, got := random(t, 65536), make([]byte, 65536)
	if _, err := na.WriteAt(want, 8192); err != nil {
		t.Fatal(err)
	}
	if _, err := nb.ReadAt(got, 8192); err != nil || string(got) != string(want) {
		t.Errorf("the other controller reads something else, %v", err)
	}
}

// TestStateOutlivesHostmed: with a directory for it, a controller's counters go on where they ended.
func TestStateOutlivesHostmed(t *testing.T) {
	dir := t.TempDir()
	c := Config{State: filepath.Join(dir, "state"), Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "s"), Namespaces: []string{"mem:size=1MiB"}}}}
	for cycle := uint64(1); cycle <= 3; cycle++ {
		c.Logger = testrig.Log(t)
		stop := start(t, c)
		client := open(t, c.Controllers[0].Socket, guestdrv.Options{})
		var cmd nvme.Command
		if err := cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, 0, 512, false); err != nil {
			t.Fatal(err)
		}
		var log nvme.SMARTLog
		admin(t, client, cmd, log.Bytes()[:])
		if log.PowerCycles.Lo != cycle || log.UnsafeShutdowns.Lo != 0 {
			t.Errorf("%d power cycles, %d unsafe shutdowns, want %d and 0", log.PowerCycles.Lo, log.UnsafeShutdowns.Lo, cycle)
		}
		if err := client.Close(); err != nil {
			t.Error(err)
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
}
