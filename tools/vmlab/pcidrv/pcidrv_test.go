package pcidrv

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/device/pcifn"
	"github.com/shadowbell/shadowbell/tools/internal/text"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// size of each disk in MiB: all of it is written and read.
const sizeMiB = 256

// way is how the guest's guestdrv reaches a function.
type way struct {
	name   string
	viommu bool
	set    string // what the guest needs before
	driver string // what bind makes of it
}

var ways = []way{
	{"vfio", true, "modprobe vfio_iommu_type1 && modprobe vfio-pci", "vfio-pci"},
	{"sysfs", false, "true", ""},
}

// figures are what `guestdrv bench --json` prints, as far as it is looked at.
type figures struct {
	IOPS      float64 `json:"iops"`
	MiB       float64 `json:"bw_mib"`
	MMIO      float64 `json:"mmio_per_io"`
	Wakeups   float64 `json:"wakeups_per_io"`
	Errors    uint64  `json:"errors"`
	Wrong     uint64  `json:"verify_errors"`
	Doorbells string  `json:"doorbells"`
	Jobs      int     `json:"jobs"`
}

// TestGuestdrvDrivesPCIFunctions: by each way each controller is taken from the kernel, identified, written and read from end to end by
// several queues, and given back.
func TestGuestdrvDrivesPCIFunctions(t *testing.T) {
	lab := vmlab.Open(t)
	table := text.Table{Head: []string{"way", "controller", "doorbells", "MMIO per I/O", "wake-ups per I/O", "IOPS", "MiB/s"}, Left: map[int]bool{1: true, 2: true}}
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			dir := t.TempDir()
			images := []string{filepath.Join(dir, "hostmed"), filepath.Join(dir, "qemu")}
			for _, name := range images {
				if err := os.WriteFile(name, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(name, sizeMiB<<20); err != nil {
					t.Fatal(err)
				}
			}
			vm := lab.Boot(t, vmlab.Config{VIOMMU: w.viommu, MemoryMiB: 768, Programs: []string{"guestdrv", "conformance"}, Devices: []vmlab.Device{
				vmlab.Controller(t, hostmed.Shadow, "file:"+images[0]), vmlab.QEMUNVMe(images[1], "qemu"),
			}})
			vm.Run(t, w.set)
			vm.Run(t, "echo 48 > /proc/sys/vm/nr_hugepages")
			refusals(t, vm, w)
			for i, name := range []string{"hostmed", "QEMU"} {
				f := drive(t, vm, w, vm.Disk(t, i), images[i])
				table.Add(w.name, name, f.Doorbells, text.Ratio(f.MMIO), text.Ratio(f.Wakeups), text.Count(f.IOPS), text.Count(f.MiB))
			}
			vm.CheckDmesg(t, "Ignoring bogus Namespace Identifiers") // of QEMU's device, which has none
			if err := vm.Poweroff(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	t.Logf("randrw of 128 KiB, 2 jobs at queue depth 64:\n%s", table.String())
}

// conform runs what a reset of the function, and interrupts by VFIO, have to be like.
func conform(t *testing.T, vm *vmlab.VM, dev, image string) {
	t.Helper()
	for _, filter := range []string{"interrupt.*", "state.function-reset"} {
		r := vm.Try(t, "conformance run "+dev+" --json --nsid 1 --filter '"+filter+"'")
		var out struct {
			Passed, Failed, Skipped int
			Cases                   []struct{ ID, Result, Seen string }
		}
		if err := json.Unmarshal([]byte(r.Stdout), &out); err != nil {
			t.Fatalf("%v: exit %d\n%s\n%s", err, r.Exit, r.Stdout, r.Stderr)
		}
		t.Logf("%s, %s: %d passed, %d failed, %d skipped", filepath.Base(image), filter, out.Passed, out.Failed, out.Skipped)
		for _, c := range out.Cases {
			// AQA, ASQ and ACQ survive a reset of QEMU's function; see tools/conformance.
			if c.Result == "fail" && (c.ID != "state.function-reset" || filepath.Base(image) != "qemu") {
				t.Errorf("%s: %s", c.ID, c.Seen)
			}
		}
		if out.Passed+out.Failed == 0 {
			t.Errorf("%s, %s: nothing was asked", image, filter)
		}
	}
}

// list is what `guestdrv list --json` says of one function.
func list(t *testing.T, vm *vmlab.VM, address string) (f struct {
	pcifn.Function
	Open, Why string
}) {
	t.Helper()
	all := []struct {
		pcifn.Function
		Open, Why string
	}{}
	if err := json.Unmarshal([]byte(vm.Run(t, "guestdrv list --json")), &all); err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.Address == address {
			return f
		}
	}
	t.Fatalf("guestdrv list does not show %s: %+v", address, all)
	return f
}

// refusals: what the kernel has is not opened, what is in use not taken, and the message says why and what to do.
func refusals(t *testing.T, vm *vmlab.VM, w way) {
	t.Helper()
	d := vm.Disk(t, 0)
	refused := func(command string, says ...string) {
		t.Helper()
		r := vm.Try(t, command)
		for _, s := range says {
			if r.Exit != 2 || !strings.Contains(r.Stderr, s) {
				t.Errorf("%s: exit %d, %q; want 2 and %q", command, r.Exit, r.Stderr, s)
			}
		}
	}
	for _, scheme := range []string{"pci:", "sysfs:", "vfio:"} {
		refused("guestdrv identify "+scheme+d.PCI, "driver nvme has it", "bind")
	}
	if !w.viommu {
		refused("guestdrv bind "+d.PCI+" --driver vfio-pci", "vfio-pci", "modprobe")
	}
	vm.Run(t, "mkfs.ext4 -q "+d.Namespace(1)+" 64M && mkdir -p /mnt/disk && mount "+d.Namespace(1)+" /mnt/disk && touch /mnt/disk/here")
	block := filepath.Base(d.Namespace(1))
	refused("guestdrv bind "+d.PCI, block+" is mounted at /mnt/disk")
	if f := list(t, vm, d.PCI); f.Open != "" || len(f.Disks) != 1 || len(f.Disks[0].Uses) != 1 || f.Disks[0].Bytes != sizeMiB<<20 {
		t.Errorf("a mounted disk in the list: %+v", f)
	}
	vm.Run(t, "ls /mnt/disk/here && umount /mnt/disk")
	vm.Run(t, "mkswap "+d.Namespace(1)+" && swapon "+d.Namespace(1))
	refused("guestdrv bind "+d.PCI, block+" is swap")
	vm.Run(t, "swapoff "+d.Namespace(1)+" && modprobe loop && losetup /dev/loop0 "+d.Namespace(1))
	refused("guestdrv bind "+d.PCI, block+" is held by loop0")
	// A partition that another mount namespace has mounted: only the claim of the disk sees it.
	vm.Run(t, "losetup -d /dev/loop0 && mkfs.ext4 -q "+d.Namespace(1)+" 64M")
	vm.Run(t, "unshare -m sh -c 'mount "+d.Namespace(1)+" /mnt/disk; touch /tmp/mounted; while [ ! -e /tmp/done ]; do sleep 0.05; done' & until [ -e /tmp/mounted ]; do sleep 0.05; done")
	refused("guestdrv bind "+d.PCI, block+" is held by something")
	vm.Run(t, "touch /tmp/done; until guestdrv bind "+d.PCI+"; do sleep 0.1; done; guestdrv unbind "+d.PCI)
}

// drive takes the function, uses all of it, and gives it back.
func drive(t *testing.T, vm *vmlab.VM, w way, d vmlab.Disk, image string) figures {
	t.Helper()
	vm.Run(t, "guestdrv bind "+d.PCI)
	bound := list(t, vm, d.PCI)
	if bound.Driver != w.driver || !strings.HasPrefix(bound.Open, w.name+":") || len(bound.Disks) != 0 {
		t.Errorf("after bind: %+v", bound)
	}
	if w.viommu {
		// Physical addresses would be others: not opened by sysfs, whatever the driver.
		vm.Run(t, "guestdrv unbind "+d.PCI+" && guestdrv bind "+d.PCI+" --driver none")
		if r := vm.Try(t, "guestdrv identify sysfs:"+d.PCI); r.Exit != 2 || !strings.Contains(r.Stderr, "IOMMU is between it and memory") {
			t.Errorf("sysfs behind an IOMMU: exit %d, %s", r.Exit, r.Stderr)
		}
		vm.Run(t, "guestdrv bind "+d.PCI)
	}
	dev := "pci:" + d.PCI
	if out := vm.Run(t, "guestdrv identify "+dev); !strings.Contains(out, fmt.Sprintf(" %d MiB ", sizeMiB)) {
		t.Errorf("identify:\n%s", out)
	}

	started := time.Now()
	out := vm.RunWithin(t, 3*time.Minute, fmt.Sprintf("guestdrv bench %s --json --verify --span %dMiB --rw randrw --bs 128k --qd 64 --jobs 2 --runtime 2s", dev, sizeMiB))
	t.Logf("%s: bench took %.1f s", image, time.Since(started).Seconds())
	var f figures
	if err := json.Unmarshal([]byte(out), &f); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if f.Errors != 0 || f.Wrong != 0 || f.Jobs != 2 || f.IOPS == 0 {
		t.Errorf("bench: %s", out)
	}
	// Behind it everything has been written: no hole is left.
	var st syscall.Stat_t
	if err := syscall.Stat(image, &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 < sizeMiB<<20 {
		t.Errorf("%d bytes of the image were written, want all %d MiB", st.Blocks*512, sizeMiB)
	}

	if w.viommu {
		conform(t, vm, dev, image)
	}

	// What guestdrv wrote last is what the kernel finds, at both ends.
	vm.Run(t, fmt.Sprintf("dd if=/dev/urandom of=/tmp/data bs=64k count=1; for at in 0 %d; do guestdrv write %s --file /tmp/data --offset $at; done", sizeMiB<<20-64<<10, dev))
	vm.Run(t, "guestdrv unbind "+d.PCI)
	back := list(t, vm, d.PCI)
	if back.Driver != "nvme" || len(back.Disks) != 1 || back.Disks[0].Bytes != sizeMiB<<20 {
		t.Fatalf("after unbind: %+v", back)
	}
	vm.Run(t, fmt.Sprintf("for at in 0 %d; do dd if=/dev/%s bs=64k skip=$at count=1 2>/dev/null | cmp - /tmp/data || exit 1; done", sizeMiB*16-1, back.Disks[0].Name))
	return f
}
