// Package memtest has the tests of guest memory, interrupts and PCI that need a real guest: queues behind a vIOMMU, memory that comes while
// I/O goes on, firmware that uses the controller before and while it locks its memory, and interrupts by the pin.
package memtest

import (
	"fmt"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var modes = []hostmed.DoorbellMode{hostmed.Shadow, hostmed.Trap, hostmed.Mmap}

// disks are one controller in each doorbell mode.
func disks(t *testing.T) (devices []vmlab.Device) {
	for _, m := range modes {
		devices = append(devices, vmlab.Controller(t, m, "mem:size=64MiB"))
	}
	return devices
}

// verify writes and reads back on all of a guest's disks at once, with a job on each of its CPUs.
func verify(t *testing.T, vm *vmlab.VM, size string) {
	t.Helper()
	jobs := "fio --ioengine=libaio --direct=1 --rw=randrw --bsrange=4k-64k --iodepth=32 --verify=crc32c --verify_fatal=1 --size=" + size
	for i := range modes {
		for job := range 2 {
			jobs += fmt.Sprintf(" --name=d%dj%d --filename=%s --offset=%dm", i, job, vm.Disk(t, i).Namespace(1), job*32)
		}
	}
	vm.Run(t, jobs)
}

// TestVIOMMU: behind an IOMMU each page of a queue is a mapping of its own, and each I/O maps and unmaps.
func TestVIOMMU(t *testing.T) {
	vm := vmlab.Open(t).Boot(t, vmlab.Config{VIOMMU: true, Append: "iommu.strict=1", Devices: disks(t)})
	for i := range modes {
		d := vm.Disk(t, i)
		if got := vm.Run(t, "cat /sys/class/nvme/"+d.Name+"/queue_count"); got != "3" {
			t.Errorf("%v: %s queues, want the admin queue and one for each CPU", modes[i], got)
		}
		if got := vm.Run(t, "cat /sys/class/nvme/"+d.Name+"/sqsize"); got != "1023" {
			t.Errorf("%v: sqsize %s", modes[i], got)
		}
		if got := vm.Run(t, "cat /sys/bus/pci/devices/"+d.PCI+"/iommu_group/type"); got != "DMA" {
			t.Errorf("%v: IOMMU domain of type %s, want DMA: translated, and unmapped for each I/O", modes[i], got)
		}
	}
	verify(t, vm, "2M")
	function(t, vm)
	verify(t, vm, "512k")
	vm.CheckDmesg(t)
	if err := vm.Poweroff(t.Context()); err != nil {
		t.Error(err)
	}
}

// function resets a PCI function, takes bus mastering and power from it, and gives it back to the driver.
func function(t *testing.T, vm *vmlab.VM) {
	t.Helper()
	vm.Run(t, "modprobe vfio-pci")
	d := vm.Disk(t, 0)
	at := "/sys/bus/pci/devices/" + d.PCI
	if got := vm.Run(t, "cat "+at+"/reset_method"); !strings.HasPrefix(got, "flr") {
		t.Errorf("reset method %q", got)
	}
	// An FLR under I/O: the driver quiesces, and goes on.
	vm.Run(t, "fio --name=r --filename="+d.Namespace(1)+" --ioengine=libaio --direct=1 --rw=randread --bs=4k --iodepth=8 --time_based --runtime=1 & sleep 0.3; echo 1 > "+at+"/reset; wait $!")
	// No driver: no bus mastering. vfio-pci lets a function that nobody uses sleep.
	vm.Run(t, "echo "+d.PCI+" > /sys/bus/pci/drivers/nvme/unbind")
	if got := vm.Run(t, "cat "+at+"/config | od -An -tx1 -j4 -N1"); strings.TrimSpace(got) != "02" {
		t.Errorf("command register %s without a driver", got)
	}
	vm.Run(t, "echo vfio-pci > "+at+"/driver_override; echo "+d.PCI+" > /sys/bus/pci/drivers_probe")
	if got := vm.Run(t, "for i in $(seq 100); do [ $(cat "+at+"/power_state) != D3hot ] || break; sleep 0.05; done; cat "+at+"/power_state"); got != "D3hot" {
		t.Errorf("power state %s", got)
	}
	vm.Run(t, "echo "+d.PCI+" > /sys/bus/pci/drivers/vfio-pci/unbind; echo > "+at+"/driver_override; echo "+d.PCI+" > /sys/bus/pci/drivers_probe")
}

// TestINTx: a guest without MSI-X, several queues of several controllers on a line each.
func TestINTx(t *testing.T) {
	vm := vmlab.Open(t).Boot(t, vmlab.Config{Append: "pci=nomsi", Devices: disks(t)})
	verify(t, vm, "2M")
	interrupts := vm.Run(t, "grep nvme /proc/interrupts")
	if strings.Contains(interrupts, "MSI") || strings.Count(interrupts, "fasteoi") == 0 {
		t.Errorf("the guest does not use INTx:\n%s", interrupts)
	}
	vm.CheckDmesg(t)
	if err := vm.Poweroff(t.Context()); err != nil {
		t.Error(err)
	}
}
