package pcidrv

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/internal/text"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// span of each disk in MiB that is written and read.
const spanMiB = 16

// newer is a guest whose kernel has VFIO's other ways, and hostmed's controller and QEMU's.
func newer(t *testing.T, lab *vmlab.Lab, viommu bool) *vmlab.VM {
	t.Helper()
	image := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	return lab.Boot(t, vmlab.Config{Kernel: vmlab.Ubuntu, VIOMMU: viommu, Programs: []string{"guestdrv"}, Devices: []vmlab.Device{
		vmlab.Controller(t, hostmed.Shadow, "mem:size=64MiB"), vmlab.QEMUNVMe(image, "qemu"),
	}})
}

// told is what this kernel says of drives when all is well, besides that QEMU's has no identifiers.
var told = []string{"bogus Namespace Identifiers", `vfio-pci [0-9a-f:.]+: (resetting|reset done|Removing from iommu group|.*vfio-noiommu)`}

// controllers are newer's, by the order of its devices.
var controllers = []string{"hostmed", "QEMU"}

// TestOtherWaysOfVFIO: by iommufd and the function's own device, by the group, and without an IOMMU, on a kernel that has them all.
func TestOtherWaysOfVFIO(t *testing.T) {
	lab := vmlab.Open(t)
	table := text.Table{Head: []string{"way", "controller", "doorbells", "MMIO per I/O", "wake-ups per I/O", "IOPS"}, Left: map[int]bool{1: true, 2: true}}
	run := func(t *testing.T, vm *vmlab.VM, way, controller, device string) {
		t.Helper()
		f := verified(t, vm, device)
		table.Add(way, controller, f.Doorbells, text.Ratio(f.MMIO), text.Ratio(f.Wakeups), text.Count(f.IOPS))
	}
	t.Run("vIOMMU", func(t *testing.T) {
		vm := newer(t, lab, true)
		vm.Run(t, "modprobe -a vfio_iommu_type1 vfio-pci")
		for i, name := range controllers {
			d := vm.Disk(t, i)
			vm.Run(t, "guestdrv bind "+d.PCI)
			device := "pci:" + d.PCI
			// Each way goes with the files of the other out of sight. The device comes first where both are there.
			group := "/dev/vfio/" + list(t, vm, d.PCI).Group
			vm.Run(t, "mv "+group+" /dev/hidden")
			run(t, vm, "iommufd", name, device)
			vm.Run(t, "mv /dev/hidden "+group)
			if i == 0 {
				vm.Run(t, "mv /dev/vfio/devices /dev/hidden")
				run(t, vm, "group", name, device)
				vm.Run(t, "mv /dev/hidden /dev/vfio/devices")
				alone(t, vm, device)
			}
			vm.Run(t, "guestdrv unbind "+d.PCI)
		}
		vm.CheckDmesg(t, told...)
	})
	t.Run("no IOMMU", func(t *testing.T) {
		vm := newer(t, lab, false)
		vm.Run(t, "modprobe vfio-pci && echo 40 > /proc/sys/vm/nr_hugepages")
		for i, name := range controllers {
			d := vm.Disk(t, i)
			if i == 0 {
				refused(t, vm, "guestdrv bind "+d.PCI+" --driver vfio-pci", "no IOMMU group", "enable_unsafe_noiommu_mode")
				vm.Run(t, "echo Y > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
			}
			vm.Run(t, "guestdrv bind "+d.PCI+" --driver vfio-pci")
			if f := list(t, vm, d.PCI); f.Open != "vfio:"+d.PCI+",noiommu" {
				t.Errorf("it would be opened as %q, %s", f.Open, f.Why)
			}
			refused(t, vm, "guestdrv identify vfio:"+d.PCI, "no IOMMU keeps it from all memory", ",noiommu")
			run(t, vm, "noiommu", name, "vfio:"+d.PCI+",noiommu")
			if i == 0 {
				alone(t, vm, "pci:"+d.PCI)
			}
			vm.Run(t, "guestdrv unbind "+d.PCI)
		}
		vm.CheckDmesg(t, told...)
	})
	t.Logf("randwrite of 4 KiB at queue depth 32, Linux 7.0:\n%s", table.String())
}

// refused runs a command that must end with 2 and say why.
func refused(t *testing.T, vm *vmlab.VM, command string, says ...string) {
	t.Helper()
	r := vm.Try(t, command)
	for _, s := range says {
		if r.Exit != 2 || !strings.Contains(r.Stderr, s) {
			t.Errorf("%s: exit %d, %q; want 2 and %q", command, r.Exit, r.Stderr, s)
		}
	}
}

// verified has guestdrv identify a device, and write blocks at random that it reads back.
func verified(t *testing.T, vm *vmlab.VM, device string) (f figures) {
	t.Helper()
	if out := vm.Run(t, "guestdrv identify "+device); !strings.Contains(out, "64.0 MiB") {
		t.Errorf("identify %s:\n%s", device, out)
	}
	out := vm.Run(t, fmt.Sprintf("guestdrv bench %s --json --verify --span %dMiB --rw randwrite --bs 4k --qd 32 --jobs 1 --runtime 1s", device, spanMiB))
	if err := json.Unmarshal([]byte(out), &f); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if f.Errors != 0 || f.Wrong != 0 || f.IOPS == 0 || f.Doorbells != "shadow" {
		t.Errorf("bench %s: %s", device, out)
	}
	return f
}

// alone: while a process drives the function, another does not get it, and the kernel does not get it back.
func alone(t *testing.T, vm *vmlab.VM, device string) {
	t.Helper()
	vm.Run(t, "(guestdrv serve "+device+" --nbd unix:/tmp/nbd > /tmp/serve 2>&1; touch /tmp/ended) < /dev/null > /dev/null 2>&1 &"+
		" until grep -q ^nbd /tmp/serve; do [ ! -e /tmp/ended ] || { cat /tmp/serve >&2; exit 1; }; sleep 0.05; done")
	refused(t, vm, "guestdrv identify "+device, "another process")
	refused(t, vm, "guestdrv unbind "+strings.TrimPrefix(device, "pci:"), "a process drives it")
	vm.Run(t, "kill $(pidof guestdrv); until [ -e /tmp/ended ]; do sleep 0.05; done; rm /tmp/ended")
}
