package hostmed

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

// serve runs a mediator until the test ends.
func serve(t testing.TB, c Config) *Mediator {
	t.Helper()
	if c.Logger == nil {
		c.Logger = testrig.Log(t)
	}
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	testrig.Serve(t, m.Run)
	return m
}

func admin(t testing.TB, c *guestdrv.Controller, cmd nvme.Command, data []byte) uint32 {
	t.Helper()
	dw0, err := tryAdmin(c, cmd, data)
	if err != nil {
		t.Fatal(err)
	}
	return dw0
}

func tryAdmin(c *guestdrv.Controller, cmd nvme.Command, data []byte) (uint32, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return c.Admin(ctx, &cmd, data)
}

func identify(t testing.TB, c *guestdrv.Controller, cns nvme.CNS, nsid uint32) []byte {
	t.Helper()
	var cmd nvme.Command
	cmd.SetIdentify(cns, nsid, nvme.CSINVM)
	data := make([]byte, nvme.IdentifySize)
	admin(t, c, cmd, data)
	return data
}

func identifyNamespace(t testing.TB, c *guestdrv.Controller, nsid uint32) (id nvme.IdentifyNamespace) {
	t.Helper()
	copy(id.Bytes()[:], identify(t, c, nvme.CNSNamespace, nsid))
	return id
}

func nsids(t testing.TB, c *guestdrv.Controller, cns nvme.CNS) []uint32 {
	t.Helper()
	var l nvme.NamespaceList
	copy(l.Bytes()[:], identify(t, c, cns, 0))
	return slices.Clone(l.ID[:l.Len()])
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// watched is a client whose driver logs the events that come.
func watched(t testing.TB, socket string) (*guestdrv.Controller, func() string) {
	var b testrig.Buffer
	c := open(t, socket, guestdrv.Options{Logger: hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: &b})})
	eventually(t, "the driver asks for events", func() bool {
		var cmd nvme.Command
		cmd.SetGetFeatures(nvme.FeatureAsyncEvents, 0, nvme.FeatureCurrent)
		return nvme.EventConfig(admin(t, c, cmd, nil))&nvme.EventConfigNamespace != 0
	})
	return c, b.String
}

func TestReload(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	sock := func(name string) string { return filepath.Join(dir, name) }
	conf := func(namespaces []NamespaceConfig, sockets ...string) Config {
		s := SubsystemConfig{NQN: "nqn.2026-11.test:a", Namespaces: namespaces}
		for _, x := range sockets {
			s.Controllers = append(s.Controllers, ControllerConfig{Socket: sock(x)})
		}
		return Config{Subsystems: []SubsystemConfig{s}}
	}
	file := NamespaceConfig{NSID: 1, Spec: "file:" + disk, Shared: true}
	mem := NamespaceConfig{NSID: 5, Spec: "mem:size=2MiB,lba=4096", Shared: true, Controllers: []uint16{1}}
	m := serve(t, conf([]NamespaceConfig{file}, "a"))
	reload := func(c Config) {
		t.Helper()
		if err := m.Reload(c); err != nil {
			t.Fatal(err)
		}
	}
	a, log := watched(t, sock("a"))
	ns, err := a.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	reload(conf([]NamespaceConfig{file}, "a"))
	if strings.Contains(log(), "Namespace Attribute Changed") {
		t.Error("an event, and nothing has changed")
	}

	reload(conf([]NamespaceConfig{file, mem}, "a"))
	if got := nsids(t, a, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{1, 5}) {
		t.Errorf("active %v", got)
	}
	if id := identifyNamespace(t, a, 5); id.NSZE != 512 || id.NMIC != nvme.NMICShared {
		t.Errorf("the new namespace has %d blocks, NMIC %d", id.NSZE, id.NMIC)
	}
	eventually(t, "the guest hears of it", func() bool { return strings.Contains(log(), "Namespace Attribute Changed") })

	if err := os.Truncate(disk, 3<<20); err != nil {
		t.Fatal(err)
	}
	reload(conf([]NamespaceConfig{file, mem}, "a"))
	if id := identifyNamespace(t, a, 1); id.NSZE != 3<<20/512 {
		t.Errorf("the file has grown, the namespace has %d blocks", id.NSZE)
	}
	if _, err := ns.WriteAt(random(t, 4096), 0); err != nil {
		t.Error(err)
	}

	mem.Controllers = []uint16{1, 2}
	reload(conf([]NamespaceConfig{file, mem}, "a", "b"))
	b := open(t, sock("b"), guestdrv.Options{})
	if got := nsids(t, b, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{1, 5}) {
		t.Errorf("active of the second controller %v", got)
	}
	if x, y := a.Identify(), b.Identify(); x.Subsystem() != y.Subsystem() || x.CNTLID == y.CNTLID {
		t.Errorf("%s %d, %s %d", x.Subsystem(), x.CNTLID, y.Subsystem(), y.CNTLID)
	}

	mem.Controllers = []uint16{2}
	reload(conf([]NamespaceConfig{file, mem}, "a", "b"))
	if x, y := nsids(t, a, nvme.CNSActiveNamespaces), nsids(t, b, nvme.CNSActiveNamespaces); !slices.Equal(x, []uint32{1}) || !slices.Equal(y, []uint32{1, 5}) {
		t.Errorf("detached from the first: %v, %v", x, y)
	}

	reload(conf([]NamespaceConfig{mem}, "a", "b"))
	// By the controller, or by the driver, if that has read the event by now.
	if _, err := ns.WriteAt(random(t, 4096), 0); nvme.StatusOf(err).Code() != nvme.StatusInvalidField && !errors.Is(err, guestdrv.ErrNoNamespace) {
		t.Errorf("write to a namespace that is gone: %v", err)
	}
	// The file is free again.
	file.NSID = 7
	reload(conf([]NamespaceConfig{mem, file}, "a", "b"))
	if got := nsids(t, a, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{7}) {
		t.Errorf("active %v", got)
	}

	// Another subsystem comes, the second controller goes.
	mem.Controllers = nil
	c := conf([]NamespaceConfig{file}, "a")
	c.Subsystems = append(c.Subsystems, SubsystemConfig{Controllers: []ControllerConfig{{Socket: sock("b")}}, Namespaces: []NamespaceConfig{mem}})
	reload(c)
	if _, err := b.Namespace(5); err == nil {
		eventually(t, "the client of the controller that went is cut off", func() bool { return b.Err() != nil })
	}
	b = open(t, sock("b"), guestdrv.Options{})
	if x := b.Identify(); x.Subsystem() != nqnOf(sock("b")) {
		t.Errorf("subsystem %s", x.Subsystem())
	}
	reload(conf([]NamespaceConfig{file}, "a"))
	if _, err := os.Lstat(sock("b")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
	if id := identifyNamespace(t, a, 7); id.NSZE != 3<<20/512 {
		t.Errorf("the first subsystem's namespace has %d blocks", id.NSZE)
	}
}

// TestReloadRefuses: what cannot change live is named, and everything stays as it was.
func TestReloadRefuses(t *testing.T) {
	dir := t.TempDir()
	base := func() Config {
		return Config{Subsystems: []SubsystemConfig{{
			NQN:         "nqn.2026-11.test:a",
			Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "a")}},
			Namespaces:  []NamespaceConfig{{NSID: 1, Spec: "mem:size=1MiB"}},
		}}}
	}
	m := serve(t, base())
	c := open(t, filepath.Join(dir, "a"), guestdrv.Options{})
	for name, x := range map[string]struct {
		change func(*Config)
		says   string
	}{
		"cpus":      {func(c *Config) { c.CPUs = []int{0} }, "cpus"},
		"poll":      {func(c *Config) { c.Poll = time.Millisecond }, "poll"},
		"state":     {func(c *Config) { c.State = dir }, "state"},
		"control":   {func(c *Config) { c.Control = filepath.Join(dir, "control") }, "control"},
		"no IOMMU":  {func(c *Config) { c.UnsafeNoIOMMU = true }, "unsafe_no_iommu"},
		"serial":    {func(c *Config) { c.Subsystems[0].Serial = "other" }, "serial"},
		"doorbells": {func(c *Config) { c.Subsystems[0].Controllers[0].Doorbells = Trap }, "doorbells"},
		"queues":    {func(c *Config) { c.Subsystems[0].Controllers[0].Queues = 2 }, "queues"},
		"id":        {func(c *Config) { c.Subsystems[0].Controllers[0].ID = 2 }, "id"},
		"spec":      {func(c *Config) { c.Subsystems[0].Namespaces[0].Spec = "mem:size=2MiB" }, "spec"},
		"shared":    {func(c *Config) { c.Subsystems[0].Namespaces[0].Shared = true }, "shared"},
		"uuid":      {func(c *Config) { c.Subsystems[0].Namespaces[0].UUID = "6f1c3c1e-7c0b-4c59-9d3b-8d0f2a1f9a01" }, "uuid"},
		"nonsense":  {func(c *Config) { c.Subsystems[0].Namespaces[0].Spec = "men:" }, "men:"},
		"nothing":   {func(c *Config) { c.Subsystems = nil }, "no controller"},
		"id's owner": {func(c *Config) {
			c.Subsystems[0].Controllers = []ControllerConfig{{Socket: filepath.Join(dir, "b"), ID: 1}, {Socket: filepath.Join(dir, "a"), ID: 2}}
		}, "id"},
	} {
		cfg := base()
		cfg.Subsystems[0].Namespaces = append(cfg.Subsystems[0].Namespaces, NamespaceConfig{NSID: 2, Spec: "mem:size=1MiB"})
		x.change(&cfg)
		if err := m.Reload(cfg); err == nil || !strings.Contains(err.Error(), x.says) {
			t.Errorf("%s: %v", name, err)
		}
		if got := nsids(t, c, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{1}) {
			t.Fatalf("%s: refused, and the namespaces are %v", name, got)
		}
	}
	// What cannot be opened is an error, and the rest is done.
	cfg := base()
	cfg.Subsystems[0].Namespaces = append(cfg.Subsystems[0].Namespaces,
		NamespaceConfig{NSID: 2, Spec: "file:" + dir + "/none"}, NamespaceConfig{NSID: 3, Spec: "mem:size=1MiB"})
	cfg.Subsystems = append(cfg.Subsystems, SubsystemConfig{
		NQN: "nqn.2026-11.test:b", Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "none", "s")}}, Namespaces: []NamespaceConfig{{Spec: "mem:size=1MiB"}},
	})
	if err := m.Reload(cfg); err == nil || !strings.Contains(err.Error(), "/none") {
		t.Errorf("a file that is not there: %v", err)
	}
	if got := nsids(t, c, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{1, 3}) {
		t.Errorf("active %v", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "none"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.Subsystems = cfg.Subsystems[:1]
	if err := m.Reload(cfg); err != nil {
		t.Error(err)
	}
	if got := nsids(t, c, nvme.CNSActiveNamespaces); !slices.Equal(got, []uint32{1, 2, 3}) {
		t.Errorf("active %v", got)
	}
}

// TestReloadUnderLoad: other namespaces of the same controller come and go while one is written and read.
func TestReloadUnderLoad(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	conf := func(more ...NamespaceConfig) Config {
		return Config{Subsystems: []SubsystemConfig{{
			NQN: "nqn.2026-11.test:a", Controllers: []ControllerConfig{{Socket: socket}},
			Namespaces: append([]NamespaceConfig{{NSID: 1, Spec: "mem:size=16MiB"}}, more...),
		}}}
	}
	m := serve(t, conf())
	c := open(t, socket, guestdrv.Options{})
	ns, err := c.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	stop, failed := make(chan struct{}), make(chan error, 1)
	go func() {
		want, got := random(t, 65536), make([]byte, 65536)
		for i := int64(0); ; i++ {
			select {
			case <-stop:
				failed <- nil
				return
			default:
			}
			if _, err := ns.WriteAt(want, i%200*65536); err != nil {
				failed <- err
				return
			}
			if _, err := ns.ReadAt(got, i%200*65536); err != nil || !bytes.Equal(got, want) {
				failed <- errors.Join(err, errors.New("wrong data"))
				return
			}
		}
	}()
	for i := range 20 {
		if err := m.Reload(conf(NamespaceConfig{NSID: uint32(2 + i), Spec: "mem:size=1MiB"})); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if err := <-failed; err != nil {
		t.Error(err)
	}
}
