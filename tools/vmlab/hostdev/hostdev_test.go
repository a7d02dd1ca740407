package hostdev

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const program = "/usr/bin/hostnvme.test"

// host is the machine, with a controller that VFIO has.
type host struct {
	*vmlab.VM
	disk vmlab.Disk
}

// run is a command line that has the device under load until its end.
func (h *host) run(end string) string {
	return fmt.Sprintf("SHADOWBELL_HOST_DEVICE=%s SHADOWBELL_HOST_DEVICE_END=%s %s -test.run '^TestRealDevice$' -test.v", h.disk.PCI, end, program)
}

// underLoad starts that in the background, and returns when commands are under way.
func (h *host) underLoad(t *testing.T, end string) {
	t.Helper()
	h.Run(t, fmt.Sprintf("rm -f /tmp/out /tmp/code; { %s; echo $? > /tmp/code; } > /tmp/out 2>&1 & echo $! > /tmp/pid; "+
		"for n in $(seq 300); do grep -q '^under load' /tmp/out && exit 0; [ -e /tmp/code ] && break; sleep 0.1; done; cat /tmp/out; exit 1", h.run(end)))
}

// ended waits for the end of the process that underLoad has started, which ends well.
func (h *host) ended(t *testing.T) {
	t.Helper()
	r := h.Try(t, "for n in $(seq 400); do [ -e /tmp/code ] && break; sleep 0.1; done; [ -e /tmp/code ] || { kill -QUIT $(pidof hostnvme.test); sleep 2; }; cat /tmp/out; exit $(cat /tmp/code || echo 9)")
	t.Log(r.Stdout)
	if r.Exit != 0 {
		t.Fatalf("exit %d", r.Exit)
	}
}

func boot(t *testing.T) *host {
	t.Helper()
	lab := vmlab.Open(t)
	dir := t.TempDir()
	binary := filepath.Join(dir, "hostnvme.test")
	build := exec.Command("go", "test", "-c", "-tags", "hostdev", "-o", binary, "github.com/shadowbell/shadowbell/hostmed/internal/hostnvme")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	image := filepath.Join(dir, "disk")
	if err := os.WriteFile(image, make([]byte, 64<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	h := &host{VM: lab.Boot(t, vmlab.Config{
		VIOMMU: true, MemoryMiB: 768, Ports: 1, Programs: []string{"guestdrv"}, Files: map[string]string{program: binary}, Append: "intel_iommu=on iommu=pt",
	})}
	h.Run(t, "modprobe vfio_iommu_type1 && modprobe vfio-pci")
	var err error
	if h.disk, err = h.HotAdd(t.Context(), vmlab.QEMUNVMe(image, "host")); err != nil {
		t.Fatal(err)
	}
	h.Run(t, "guestdrv bind "+h.disk.PCI)
	return h
}

// TestLifeOfADevice resets a controller under load, kills who has it, and unplugs it.
func TestLifeOfADevice(t *testing.T) {
	h := boot(t)
	for range 2 {
		out := h.RunWithin(t, 2*time.Minute, h.run(""))
		if !strings.Contains(out, "Shadow:true") {
			t.Errorf("without shadow doorbells:\n%s", out)
		}
	}
	for range 3 {
		h.underLoad(t, "killed")
		h.Run(t, "kill -9 $(pidof hostnvme.test); while pidof hostnvme.test; do sleep 0.05; done")
	}
	t.Log(h.RunWithin(t, 2*time.Minute, h.run("")))

	// Unplugged in order: the kernel asks for it, and waits until it has it.
	h.underLoad(t, "gone")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	unplugged, err := h.StartUnplug(ctx, h.disk)
	if err != nil {
		t.Fatal(err)
	}
	h.ended(t)
	if err := unplugged(ctx); err != nil {
		t.Fatal(err)
	}
	h.CheckDmesg(t, "Ignoring bogus Namespace Identifiers", "aer", "pciehp", "vfio-pci")
}

// TestPulledOut takes a controller out of its slot without a word to anybody. All ends at once, though the kernel tries for a minute to reset what it gets
// back, and holds up whoever touches the slot meanwhile: so the machine ends here.
func TestPulledOut(t *testing.T) {
	h := boot(t)
	h.underLoad(t, "gone")
	if err := h.SlotPower(t.Context(), h.disk, false); err != nil {
		t.Fatal(err)
	}
	h.Run(t, "for n in $(seq 300); do grep '^all has ended' /tmp/out && exit 0; sleep 0.1; done; cat /tmp/out; exit 1")
	h.Kill()
}
