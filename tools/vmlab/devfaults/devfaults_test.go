package devfaults

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Each disk is sound where the guest's kernel looks for partitions, and fails from here to there.
const (
	badLBA   = "@lba=2048-4095"
	diskSize = "16MiB"
)

// limit is how long a command may take that waits for --timeout 300ms, a reset or several, and an emulated processor.
const limit = 25 * time.Second

// row is a fault of a medium, and what guestdrv says of it.
type row struct {
	rules   string
	command string   // of guestdrv; %s is the device
	says    []string // on stderr, with exit code 1
	silent  []string // not there
}

const (
	read  = "read %s --timeout 300ms --offset 1MiB --length 64KiB --file /dev/null"
	write = "write %s --timeout 300ms --offset 1MiB --file /tmp/data"
	bench = "bench %s --timeout 300ms --rw randread --bs 4k --qd 16 --jobs 2 --span 2MiB --runtime 60s"
)

var rows = []row{
	{rules: "drop@read" + badLBA, command: read, says: []string{"READ nsid=1 slba=0x800", "timed out", "was reset"}},
	{rules: "drop@write" + badLBA, command: write, says: []string{"WRITE nsid=1 slba=0x800", "timed out", "was reset"}},
	{rules: "hold@read" + badLBA, command: read, says: []string{"READ nsid=1 slba=0x800", "timed out", "was aborted"}, silent: []string{"was reset"}},
	{rules: "delay=5s@read" + badLBA, command: read, says: []string{"READ nsid=1 slba=0x800", "timed out", "was reset"}},
	{rules: "status=unrecovered-read-error+dnr@read" + badLBA, command: read, says: []string{"READ nsid=1 slba=0x800", "Unrecovered Read Error (2/81h", "DNR"}, silent: []string{"timed out"}},
	{rules: "torn@write" + badLBA, command: write, says: []string{"WRITE nsid=1", "Write Fault (2/80h"}, silent: []string{"timed out"}},
	{rules: "drop@read" + badLBA + "@after=200@first=1", command: bench, says: []string{"timed out"}},
}

// ways are how guestdrv reaches a function of the guest.
var ways = []struct {
	name   string
	viommu bool
	set    string
	gone   string // what guestdrv says of a function that was unplugged
}{
	{"sysfs", false, "true", "registers read as"},
	{"vfio", true, "modprobe vfio_iommu_type1 && modprobe vfio-pci", "the kernel wants it back"},
}

// TestGuestdrvMeetsFaults: whatever the device does, a command of guestdrv ends in time, with exit code 1 and an error that names what
// happened, and another one then has a sound controller.
func TestGuestdrvMeetsFaults(t *testing.T) {
	lab := vmlab.Open(t)
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			var devices []vmlab.Device
			for _, r := range rows {
				devices = append(devices, vmlab.Controller(t, hostmed.Shadow, "fault:"+r.rules+",over=mem:size="+diskSize))
			}
			vm := lab.Boot(t, vmlab.Config{VIOMMU: w.viommu, Ports: 1, MemoryMiB: 768, Programs: []string{"guestdrv"}, Devices: devices})
			vm.Run(t, w.set+" && echo 64 > /proc/sys/vm/nr_hugepages && head -c 65536 /dev/urandom > /tmp/data")
			for i, r := range rows {
				t.Run(r.rules, func(t *testing.T) { r.run(t, vm, vm.Disk(t, i), w.name) })
			}
			t.Run("unplugged", func(t *testing.T) { unplug(t, vm, w.name, w.gone) })
			vm.CheckDmesg(t, "Relaying device request", "Ignoring bogus Namespace Identifiers")
		})
	}
}

func (r *row) run(t *testing.T, vm *vmlab.VM, d vmlab.Disk, way string) {
	vm.Run(t, "guestdrv bind "+d.PCI)
	device := way + ":" + d.PCI
	begin := time.Now()
	result := vm.Try(t, "guestdrv "+fmt.Sprintf(r.command, device))
	t.Logf("%s: after %.1f s, exit %d: %s", way, time.Since(begin).Seconds(), result.Exit, strings.TrimSpace(result.Stderr))
	if d := time.Since(begin); d > limit {
		t.Errorf("it took %v", d)
	}
	if result.Exit != 1 {
		t.Errorf("exit code %d\n%s", result.Exit, result.Stdout)
	}
	for _, s := range r.says {
		if !strings.Contains(result.Stderr, s) {
			t.Errorf("%q is not in %s", s, result.Stderr)
		}
	}
	for _, s := range r.silent {
		if strings.Contains(result.Stderr, s) {
			t.Errorf("%q is in %s", s, result.Stderr)
		}
	}
	// Where it is sound, it works: nothing is left of the fault.
	vm.Run(t, fmt.Sprintf("guestdrv write %[1]s -q --file /tmp/data && guestdrv read %[1]s -q --length 64KiB --file /tmp/back && cmp /tmp/data /tmp/back", device))
}

// unplug takes QEMU's own controller away under load.
func unplug(t *testing.T, vm *vmlab.VM, way, says string) {
	image := t.TempDir() + "/disk"
	if err := os.WriteFile(image, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := vm.HotAdd(t.Context(), vmlab.QEMUNVMe(image, "goes"))
	if err != nil {
		t.Fatal(err)
	}
	vm.Run(t, "guestdrv bind "+disk.PCI)
	type ended struct {
		vmlab.Result
		err error
	}
	done := make(chan ended, 1)
	go func() {
		r, err := vm.Exec(t.Context(), "guestdrv bench "+way+":"+disk.PCI+" --timeout 2s --rw randread --bs 4k --qd 16 --jobs 2 --span 8MiB --runtime 90s")
		done <- ended{r, err}
	}()
	time.Sleep(3 * time.Second) // the load is on; if not, what is found is the same, and less of it
	if _, err := vm.QMP(t.Context(), "device_del", map[string]any{"id": disk.Port + "-dev"}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if _, err := vm.Event(ctx, "DEVICE_DELETED"); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Logf("%.1f s after it was gone, exit %d: %s", time.Since(begin).Seconds(), r.Exit, strings.TrimSpace(r.Stderr))
	if r.Exit != 1 || !strings.Contains(r.Stderr, "the device is gone") || !strings.Contains(r.Stderr, says) {
		t.Errorf("exit %d: %s", r.Exit, r.Stderr)
	}
	if d := time.Since(begin); d > limit {
		t.Errorf("it took %v", d)
	}
}
