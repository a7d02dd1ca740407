package hostmed

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/testrig"
)

func formatCmd(nsid uint32, index, erase uint8) (cmd nvme.Command) {
	cmd.SetFormat(nsid, index, erase)
	return cmd
}

// TestFormat: the data is gone, the blocks have another size, both controllers show it, and so does the next hostmed.
func TestFormat(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{State: filepath.Join(dir, "state"), Logger: testrig.Log(t), Subsystems: []SubsystemConfig{{
		NQN:         "nqn.2026-11.test:a",
		Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "a")}, {Socket: filepath.Join(dir, "b")}},
		Namespaces:  []NamespaceConfig{{NSID: 1, Spec: "file:" + filepath.Join(dir, "disk") + ",size=4MiB"}, {NSID: 2, Spec: "mem:size=1MiB"}},
	}}}
	stop := start(t, cfg)
	a, b := open(t, filepath.Join(dir, "a"), guestdrv.Options{}), (*guestdrv.Controller)(nil)
	b, log := watched(t, filepath.Join(dir, "b"))
	if id := identifyController(t, a); id.OACS&nvme.OACSFormat == 0 || id.FNA != 0 {
		t.Errorf("OACS %#x FNA %#x", id.OACS, id.FNA)
	}
	ns, err := a.Namespace(1)
	if err != nil {
		t.Fatal(err)
	}
	data := random(t, 65536)
	if _, err := ns.WriteAt(data, 1<<20); err != nil {
		t.Fatal(err)
	}
	admin(t, a, formatCmd(1, 1, nvme.EraseUserData), nil)
	for name, c := range map[string]*guestdrv.Controller{"a": a, "b": b} {
		id := identifyNamespace(t, c, 1)
		if size, _ := id.BlockSize(); size != 4096 || id.NSZE != 1024 || id.FPI != nvme.FPISupported {
			t.Errorf("controller %s shows %d blocks of %d bytes, FPI %#x", name, id.NSZE, size, id.FPI)
		}
	}
	eventually(t, "the other guest hears of it", func() bool { return strings.Contains(log(), "Namespace Attribute Changed") })
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	check := func() {
		t.Helper()
		a = open(t, filepath.Join(dir, "a"), guestdrv.Options{})
		ns, err := a.Namespace(1)
		if err != nil {
			t.Fatal(err)
		}
		if ns.BlockSize() != 4096 {
			t.Errorf("blocks of %d bytes", ns.BlockSize())
		}
		got := make([]byte, 65536)
		if _, err := ns.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, make([]byte, len(got))) {
			t.Errorf("data is left after the format, %v", err)
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}
	check()
	if raw, err := os.ReadFile(filepath.Join(dir, "disk")); err != nil || !bytes.Equal(raw, make([]byte, 4<<20)) {
		t.Errorf("the file is not empty, %v", err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	cfg.Logger = testrig.Log(t)
	stop = start(t, cfg)
	check()

	// Back to what the spec says, both at once.
	a = open(t, filepath.Join(dir, "a"), guestdrv.Options{})
	admin(t, a, formatCmd(nvme.NSIDAll, 0, nvme.EraseNone), nil)
	for _, nsid := range []uint32{1, 2} {
		id := identifyNamespace(t, a, nsid)
		if size, _ := id.BlockSize(); size != 512 {
			t.Errorf("namespace %d has blocks of %d bytes", nsid, size)
		}
	}
	a.Close()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	// What the operator says now comes before what a guest did.
	cfg.Subsystems[0].Namespaces[0].Spec = "file:" + filepath.Join(dir, "disk") + ",lba=4096"
	cfg.Logger = testrig.Log(t)
	start(t, cfg)
	check()
}

func TestFormatErrors(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	serve(t, Config{Subsystems: []SubsystemConfig{{
		Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "a")}},
		Namespaces: []NamespaceConfig{
			{NSID: 1, Spec: "mem:size=512000"}, {NSID: 2, Spec: "file:" + disk + ",readonly"}, {NSID: 3, Spec: "mem:size=1MiB,lba=65536"},
		},
	}}})
	a := open(t, filepath.Join(dir, "a"), guestdrv.Options{})
	protection, high := formatCmd(1, 0, 0), formatCmd(1, 16, 0)
	protection.CDW10 |= 1 << 5
	for name, x := range map[string]struct {
		cmd  nvme.Command
		want nvme.Status
	}{
		"no such format":      {formatCmd(1, 2, 0), nvme.StatusInvalidFormat},
		"the last format":     {formatCmd(1, 15, 0), nvme.StatusInvalidFormat},
		"upper bits":          {high, nvme.StatusInvalidFormat},
		"size is no multiple": {formatCmd(1, 1, 0), nvme.StatusSuccess},
		"crypto erase":        {formatCmd(1, 0, nvme.EraseCrypto), nvme.StatusInvalidField},
		"reserved erase":      {formatCmd(1, 0, 7), nvme.StatusInvalidField},
		"protection":          {protection, nvme.StatusInvalidFormat},
		"read-only":           {formatCmd(2, 0, 0), nvme.StatusNamespaceWriteProtected},
		"one is read-only":    {formatCmd(nvme.NSIDAll, 0, 0), nvme.StatusNamespaceWriteProtected},
		"none":                {formatCmd(0, 0, 0), nvme.StatusInvalidNamespace},
		"not attached":        {formatCmd(9, 0, 0), nvme.StatusInvalidNamespace},
	} {
		if _, err := tryAdmin(a, x.cmd, nil); nvme.StatusOf(err).Code() != x.want {
			t.Errorf("%s: %v, want %v", name, err, x.want)
		}
	}
	id := identifyNamespace(t, a, 3)
	if size, _ := id.BlockSize(); size != 65536 || id.NLBAF.Count() != 3 {
		t.Errorf("blocks of %d bytes, %d formats", size, id.NLBAF.Count())
	}
	admin(t, a, formatCmd(3, 2, 0), nil)
	admin(t, a, formatCmd(3, 0, 0), nil)
	if id := identifyNamespace(t, a, 3); id.NLBAF.Count() != 2 || id.NSZE != 2048 {
		t.Errorf("%d formats, %d blocks", id.NLBAF.Count(), id.NSZE)
	}
}

// TestFormatUnderLoad formats again and again while both controllers write and read: each command succeeds or says why not, nothing hangs, and
// after the last format nothing is left that was not written after it.
func TestFormatUnderLoad(t *testing.T) {
	dir := t.TempDir()
	serve(t, Config{Subsystems: []SubsystemConfig{{
		Controllers: []ControllerConfig{{Socket: filepath.Join(dir, "a")}, {Socket: filepath.Join(dir, "b")}},
		Namespaces:  []NamespaceConfig{{NSID: 1, Spec: "file:" + filepath.Join(dir, "disk") + ",size=4MiB"}},
	}}, CPUs: []int{0, 0}})
	var load sync.WaitGroup
	stop := make(chan struct{})
	var good, bad atomic.Int64
	var clients []*guestdrv.Controller
	for _, name := range []string{"a", "b"} {
		c := open(t, filepath.Join(dir, name), guestdrv.Options{})
		clients = append(clients, c)
		for g := range 2 {
			load.Go(func() {
				p := random(t, 4096)
				for i := int64(0); ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					ns, err := c.Namespace(1) // another one after each change of the block size
					if err == nil {
						_, err = ns.WriteAt(p, (i*2+int64(g))%128*4096) // the first MiB, whatever the block size
					}
					switch st := nvme.StatusOf(err).Code(); {
					case err == nil:
						good.Add(1)
					case errors.Is(err, guestdrv.ErrNoNamespace) || st == nvme.StatusFormatInProgress || st == nvme.StatusLBAOutOfRange || st == nvme.StatusDataTransferError:
						bad.Add(1) // the driver does not know of larger blocks yet
					default:
						t.Errorf("write: %v", err)
						return
					}
				}
			})
		}
	}
	for i := range 20 {
		admin(t, clients[i%2], formatCmd(1, uint8(1-i%2), 0), nil)
		now, of := good.Load(), bad.Load()
		eventually(t, "writes go on", func() bool { return good.Load() > now+10 || i%2 == 0 && bad.Load() > of+10 })
	}
	close(stop)
	load.Wait()
	if good.Load() == 0 {
		t.Error("nothing was written")
	}
	admin(t, clients[0], formatCmd(1, 0, 0), nil)
	if raw, err := os.ReadFile(filepath.Join(dir, "disk")); err != nil || !bytes.Equal(raw, make([]byte, 4<<20)) {
		t.Errorf("something is left after the last format, %v", err)
	}
}

// A namespace that a guest has created keeps the block size that a guest has given it.
func TestFormatOfCreatedNamespace(t *testing.T) {
	dir := t.TempDir()
	cfg := managed(dir)
	cfg.Logger = testrig.Log(t)
	stop := start(t, cfg)
	a := open(t, filepath.Join(dir, "a"), guestdrv.Options{})
	nsid := create(t, a, nvme.IdentifyNamespace{NSZE: 1024, NCAP: 1024})
	attachTo(t, a, nsid, 1)
	admin(t, a, formatCmd(nsid, 1, nvme.EraseNone), nil)
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	cfg.Logger = testrig.Log(t)
	start(t, cfg)
	a = open(t, filepath.Join(dir, "a"), guestdrv.Options{})
	id := identifyNamespace(t, a, nsid)
	if size, _ := id.BlockSize(); size != 4096 || id.NSZE != 128 {
		t.Errorf("after the restart %d blocks of %d bytes", id.NSZE, size)
	}
}
