package sysfspci

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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
	config[pciCommand] = 1
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
	if got := get(t, root, "config")[pciCommand:][:2]; got[0] != 7 || got[1] != 4 {
		t.Errorf("command register % x, want memory, bus master and no INTx beside what was there", got)
	}
	if got := string(get(t, root, "enable")); got[0] != '1' {
		t.Errorf("enable is %q", got)
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
	if got := get(t, root, "config")[pciCommand]; got != 3 {
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

func TestFrame(t *testing.T) {
	if got, err := frame(1<<63 | 1<<55 | 0x1234); got != 0x1234000 || err != nil {
		t.Errorf("%#x, %v", got, err)
	}
	if _, err := frame(0x1234); err == nil {
		t.Error("a page that is not there has an address")
	}
	if _, err := frame(1 << 63); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
		t.Errorf("without the right: %v", err)
	}
}

func TestMemoryInOnePieceHasALimit(t *testing.T) {
	d := &Device{}
	for _, n := range []uint64{0, hugePage + 1} {
		if _, err := d.AllocDMA(n); err == nil {
			t.Errorf("%d bytes", n)
		}
	}
}
