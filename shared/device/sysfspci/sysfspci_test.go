package sysfspci

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shadowbell/shadowbell/shared/device"
	"github.com/shadowbell/shadowbell/shared/device/internal/pci"
	"github.com/shadowbell/shadowbell/shared/nvme"
)

const bdf = "0000:00:04.0"

// fake makes a PCI function of ordinary files, and returns the directory that it is in.
func fake(t *testing.T, edit func(dir string)) (root string) {
	t.Helper()
	root = t.TempDir()
	dir := filepath.Join(root, bdf)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	config := make([]byte, 256)
	config[pci.RegCommand] = 1
	for name, content := range map[string]string{"class": "0x010802\n", "config": string(config), "enable": "0\n", "resource0": string(make([]byte, 16<<10))} {
		put(t, dir, name, content)
	}
	if edit != nil {
		edit(dir)
	}
	return root
}

func put(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// group puts the function into an IOMMU group.
func group(t *testing.T, dir, kind string) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(dir, "iommu_group"), 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, dir, "iommu_group/type", kind+"\n")
}

func get(t *testing.T, root, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, bdf, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRegistersAreTheFile(t *testing.T) {
	root := fake(t, nil)
	d, err := open(root, bdf)
	if err != nil {
		t.Fatal(err)
	}
	if got := get(t, root, "config")[pci.RegCommand:][:2]; got[0] != 7 || got[1] != 4 {
		t.Errorf("command register % x, want memory, bus master and no INTx beside what was there", got)
	}
	if got := string(get(t, root, "enable")); got[0] != '0' {
		t.Errorf("enable is %q, want the count given back", got)
	}
	if err := errors.Join(d.Write32(nvme.RegCC, 0x460001), d.Write64(nvme.RegASQ, 0x1_2345_6000), d.Doorbell(nvme.DoorbellBase).Ring(7)); err != nil {
		t.Fatal(err)
	}
	if v, err := d.Read32(nvme.RegCC); v != 0x460001 || err != nil {
		t.Errorf("CC=%#x, %v", v, err)
	}
	if v, err := d.Read64(nvme.RegASQ); v != 0x1_2345_6000 || err != nil {
		t.Errorf("ASQ=%#x, %v", v, err)
	}
	if b := get(t, root, "resource0"); b[nvme.DoorbellBase] != 7 {
		t.Errorf("the doorbell is % x", b[nvme.DoorbellBase:][:4])
	}
	if d.RegisterSpace() != 16<<10 || d.MaxInterrupts() != 0 || d.Doorbell(nvme.DoorbellBase).Mapped != nil {
		t.Errorf("BAR0 of %d bytes, %d interrupts", d.RegisterSpace(), d.MaxInterrupts())
	}
	if _, err := d.Read32(16 << 10); err == nil {
		t.Error("a register behind the end of BAR0")
	}
	if err := d.Doorbell(1 << 20).Ring(1); err == nil {
		t.Error("a doorbell behind the end of BAR0")
	}
	if err := d.Reset(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("reset of a function without: %v", err)
	}
	if _, err := d.Interrupts(1); err == nil {
		t.Error("an interrupt from nowhere")
	}
	if _, err := open(root, bdf); !errors.Is(err, unix.EBUSY) {
		t.Errorf("opened twice: %v", err)
	}
	if err := errors.Join(d.Close(), d.Close(), d.Unmap(), d.Unmap()); err != nil {
		t.Error(err)
	}
	if got := get(t, root, "config")[pci.RegCommand]; got != 3 {
		t.Errorf("command register %#x after Close, want bus mastering off", got)
	}
	if d.Err() == nil {
		t.Error("closed, and Err says nothing")
	}
}

func TestWhatCannotBeOpenedSaysWhy(t *testing.T) {
	for name, tc := range map[string]struct {
		bdf  string
		edit func(dir string)
		is   error
		says string
	}{
		"no address":  {bdf: "../../etc", says: "want one such as"},
		"nothing":     {bdf: "0000:00:05.0", is: fs.ErrNotExist, says: "no such PCI function"},
		"not NVMe":    {edit: func(dir string) { put(t, dir, "class", "0x020000\n") }, says: "not an NVMe controller: PCI class 020000"},
		"driver":      {edit: func(dir string) { _ = os.Symlink("/sys/bus/pci/drivers/nvme", filepath.Join(dir, "driver")) }, is: unix.EBUSY, says: "echo " + bdf + " > /sys/bus/pci/drivers/nvme/unbind"},
		"IOMMU":       {edit: func(dir string) { group(t, dir, "DMA-FQ") }, is: errors.ErrUnsupported, says: "an IOMMU is between it and memory (its group is of type DMA-FQ)"},
		"small BAR0":  {edit: func(dir string) { put(t, dir, "resource0", "x") }, says: "BAR0 of 0x1 bytes"},
		"without BAR": {edit: func(dir string) { _ = os.Remove(filepath.Join(dir, "resource0")) }, is: fs.ErrNotExist, says: "BAR0"},
	} {
		t.Run(name, func(t *testing.T) {
			at := bdf
			if tc.bdf != "" {
				at = tc.bdf
			}
			_, err := open(fake(t, tc.edit), at)
			if err == nil || !strings.Contains(err.Error(), tc.says) || tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("got %v, want %q", err, tc.says)
			}
		})
	}
}

func TestResetLeavesBusMasteringOn(t *testing.T) {
	root := fake(t, func(dir string) {
		put(t, dir, "reset", "")
		group(t, dir, "identity")
	})
	d, err := open(root, "00:04.0")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Unmap()
	defer d.Close()
	// What a reset may do to the command register.
	if _, err := d.config.WriteAt([]byte{0, 0}, pci.RegCommand); err != nil {
		t.Fatal(err)
	}
	if err := d.Reset(); err != nil {
		t.Fatal(err)
	}
	if got := string(get(t, root, "reset")); got != "1" {
		t.Errorf("reset is %q", got)
	}
	if got := get(t, root, "config")[pci.RegCommand]; got != pci.CommandMemory|pci.CommandBusMaster {
		t.Errorf("command register %#x", got)
	}
	if f := d.Files(); f.VFIODevice != -1 || len(f.Write) != 2 {
		t.Errorf("files %+v", f)
	}
}

// TestSeveredFunctionStaysSo: a reset that is under way does not give the right to reach memory back.
func TestSeveredFunctionStaysSo(t *testing.T) {
	root := fake(t, func(dir string) { put(t, dir, "reset", "") })
	d, err := open(root, bdf)
	if err != nil {
		t.Fatal(err)
	}
	master := func() bool { return get(t, root, "config")[pci.RegCommand]&pci.CommandBusMaster != 0 }
	if !master() {
		t.Error("the function reaches no memory")
	}
	d.Sever()
	if master() || d.Err() == nil {
		t.Errorf("severed: it may reach memory: %v; %v", master(), d.Err())
	}
	if err := d.Reset(); err != nil || master() {
		t.Errorf("a reset has given it the right back: %v, %v", master(), err)
	}
	if err := errors.Join(d.Close(), d.Unmap()); err != nil {
		t.Error(err)
	}
}

func TestAllOnesMeanThatItIsGone(t *testing.T) {
	root := fake(t, nil)
	d, err := open(root, bdf)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Unmap()
	if err := errors.Join(d.Write32(nvme.RegVS, 0x10400), d.Write32(nvme.RegCSTS, ^uint32(0))); err != nil {
		t.Fatal(err)
	}
	if v, err := d.Read32(nvme.RegCSTS); err != nil || v != ^uint32(0) {
		t.Fatalf("a register of all ones, with a version: %#x, %v", v, err)
	}
	if err := errors.Join(d.Write32(nvme.RegVS, ^uint32(0)), d.Write64(nvme.RegCAP, ^uint64(0))); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Read32(nvme.RegCSTS); !errors.Is(err, device.ErrGone) || !strings.Contains(err.Error(), "all ones") {
		t.Fatalf("got %v", err)
	}
	if _, err := d.Read64(nvme.RegCAP); !errors.Is(err, device.ErrGone) {
		t.Fatalf("got %v", err)
	}
	select {
	case <-d.Done():
	default:
		t.Error("gone, and nobody is told")
	}
	if err := d.Close(); err != nil {
		t.Errorf("closing what is gone: %v", err)
	}
}

// TestControllerOfAKilledProcessIsStopped: it still has queues in memory that is the next one's.
func TestControllerOfAKilledProcessIsStopped(t *testing.T) {
	running := func(status byte) func(dir string) {
		return func(dir string) {
			bar := make([]byte, 16<<10)
			bar[nvme.RegCC], bar[nvme.RegCC+2], bar[nvme.RegCSTS] = 1, 0x46, status
			put(t, dir, "resource0", string(bar))
		}
	}
	root := fake(t, running(0))
	d, err := open(root, bdf)
	if err != nil {
		t.Fatal(err)
	}
	if b := get(t, root, "resource0"); b[nvme.RegCC] != 0 || b[nvme.RegCC+2] != 0x46 {
		t.Errorf("CC is % x after Open", b[nvme.RegCC:nvme.RegCC+4])
	}
	if err := errors.Join(d.Close(), d.Unmap()); err != nil {
		t.Error(err)
	}
	root = fake(t, running(1))
	if _, err := open(root, bdf); err == nil || !strings.Contains(err.Error(), "left running") {
		t.Errorf("one that does not stop: %v", err)
	}
	if b := get(t, root, "config"); b[pci.RegCommand]&pci.CommandBusMaster != 0 {
		t.Error("one that does not stop may reach memory")
	}
}
