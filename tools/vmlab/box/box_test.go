// Package box has the tests of guestdrv's sandbox that need a machine of their own: on an initramfs, whose root cannot be pivoted away,
// and with PCI functions and ublk devices.
package box

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/guestdrv/sandbox"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kept are rules of the tables that are looked at here which no run can use, each with the reason why it is there all the same.
var kept = map[string]string{
	"vfio/ioctl": "VFIO_DEVICE_RESET is for a controller that does not come back by CC.EN, which neither QEMU's nor hostmed's can be made to be",
}

// guest boots a machine with QEMU's own controller, which is taken from the kernel, and gives its address.
func guest(t *testing.T, c vmlab.Config, set string) (vm *vmlab.VM, function string) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(image, make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c.MemoryMiB, c.Programs = 768, []string{"guestdrv", "hostmed", "census"}
	c.Devices = []vmlab.Device{vmlab.QEMUNVMe(image, "qemu")}
	vm = vmlab.Open(t).Boot(t, c)
	function = vm.Disk(t, 0).PCI
	vm.Run(t, set+" && echo 48 > /proc/sys/vm/nr_hugepages && guestdrv bind "+function)
	return vm, function
}

// census runs guestdrv in the guest under census, and while beside it; it adds to used.
func census(t *testing.T, vm *vmlab.VM, used map[string]int, command, while string) {
	t.Helper()
	script := "census guestdrv " + command + " 2>/tmp/err"
	if while != "" {
		script = "census guestdrv " + command + " >/tmp/out 2>/tmp/err & p=$!; " + while + "; kill -TERM $p; wait $p; cat /tmp/out"
	}
	out := vm.RunWithin(t, 2*time.Minute, script)
	var r struct {
		Exit, Shut int
		Used       map[string]int
		Other      []string
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil || r.Exit != 0 || r.Shut != 1 || len(r.Other) > 0 {
		t.Errorf("guestdrv %s: %v: %s\n%s", command, err, out, vm.Try(t, "cat /tmp/err").Stdout)
	}
	for name, n := range r.Used {
		used[name] += n
	}
}

// allUsed demands that each rule of the tables was used, or is kept.
func allUsed(t *testing.T, used map[string]int, tables ...string) {
	t.Helper()
	for _, table := range sandbox.Tables() {
		for _, name := range tables {
			if table.Name != name {
				continue
			}
			for _, r := range table.Rules {
				id := name + "/" + r.Name
				t.Logf("%7d %s", used[id], id)
				if used[id] == 0 && kept[id] == "" {
					t.Errorf("%s: no run uses it (%s)", id, r.Why)
				}
			}
		}
	}
}

// here are the tests of the package that look at what this kernel and its root make different; under emulation the others would take minutes.
const here = "TestEverythingInForce|TestAttacksAreRefused|TestOtherLayersHoldAlone|TestWorkloadRuns|TestKeepUser|TestPIDNamespaceRefused|TestStopAndContinue|TestLimits|TestThreads"

// bogus is what the kernel says of QEMU's controller.
const bogus = "Ignoring bogus Namespace Identifiers"

// The package's own tests as root on an initramfs; then guestdrv by VFIO, and as a ublk server.
func TestSandboxOnInitramfs(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "sandbox.test")
	cmd := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", bin, "github.com/shadowbell/shadowbell/guestdrv/sandbox")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	vm, function := guest(t, vmlab.Config{CPUs: 2, VIOMMU: true, Append: "intel_iommu=on", Files: map[string]string{"/usr/bin/sandbox.test": bin}},
		"modprobe vfio_iommu_type1 && modprobe vfio-pci")

	r := vm.Try(t, "guestdrv identify vfio:"+function+" --sandbox-report")
	if r.Exit != 0 || !strings.Contains(r.Stderr, "mount ns: empty root (by chroot: an initramfs cannot be detached)") || strings.Contains(r.Stderr, "NOT in force") {
		t.Errorf("exit %d\n%s", r.Exit, r.Stderr)
	}
	t.Logf("\n%s", r.Stderr)
	out := vm.RunWithin(t, 4*time.Minute, "cd / && sandbox.test -test.v -test.run '"+here+"' >/tmp/log 2>&1; s=$?; cat /tmp/log; exit $s")
	t.Logf("\n%s", out)

	used := map[string]int{}
	census(t, vm, used, "bench vfio:"+function+" --runtime 300ms --jobs 1 --rw randrw --verify", "")
	allUsed(t, used, "vfio")
	vm.Run(t, "modprobe ublk_drv")
	census(t, vm, used, "serve vfio:"+function+" --ublk", "until [ -b /dev/ublkb0 ]; do sleep 0.1; done; dd if=/dev/ublkb0 of=/dev/null bs=64k count=16 2>/dev/null")
	allUsed(t, used, "ublk")
	vm.CheckDmesg(t, bogus)
}

// A PCI function without an IOMMU.
func TestSandboxWithSysfs(t *testing.T) {
	vm, function := guest(t, vmlab.Config{}, "true")
	used := map[string]int{}
	census(t, vm, used, "bench sysfs:"+function+" --poll --runtime 300ms --jobs 1 --rw randrw --verify", "")
	allUsed(t, used, "file writes")
	r := vm.Try(t, "guestdrv identify sysfs:"+function+" --sandbox-report")
	if r.Exit != 0 || strings.Contains(r.Stderr, "NOT in force") {
		t.Errorf("exit %d\n%s", r.Exit, r.Stderr)
	}
	vm.CheckDmesg(t, bogus)
}
