package vmlab

import (
	"crypto/sha256"
	"fmt"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/hostmed"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const verify = "fio --name=v --filename=%s --rw=randwrite --bs=4k --size=4M --iodepth=16 --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1"

// TestStockDriver: the stock driver takes our disks on each machine, reads back what it wrote, and has nothing to complain of.
func TestStockDriver(t *testing.T) {
	lab := Open(t)
	for _, machine := range []Machine{Q35, Microvm} {
		t.Run(string(machine), func(t *testing.T) {
			file := t.TempDir() + "/disk"
			vm := lab.Boot(t, Config{Machine: machine, Devices: []Device{
				Controller(t, hostmed.Shadow, "mem:size=64MiB"),
				Controller(t, hostmed.Shadow, "file:"+file+",size=64MiB"),
			}})
			t.Logf("up after %.1f s under %s", vm.BootTime().Seconds(), vm.Accel())
			list := vm.Run(t, "nvme list")
			for i := range 2 {
				disk := vm.Disk(t, i).Namespace(1)
				if !strings.Contains(list, disk) {
					t.Errorf("no %s in\n%s", disk, list)
				}
				vm.Run(t, fmt.Sprintf(verify, disk))
			}
			// What the guest reads is what is in the file.
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got := vm.Run(t, "sha256sum "+vm.Disk(t, 1).Namespace(1)); !strings.HasPrefix(got, fmt.Sprintf("%x", sha256.Sum256(want))) {
				t.Errorf("the guest reads %s, which is not what is in the file", got)
			}
			vm.CheckDmesg(t)
			if err := vm.Poweroff(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestHotAdd: disks are plugged into one running guest, a subtest each.
func TestHotAdd(t *testing.T) {
	vm := Open(t).Boot(t, Config{Ports: 2})
	for _, mode := range []hostmed.DoorbellMode{hostmed.Trap, hostmed.Mmap} {
		device := Controller(t, mode, "mem:size=64MiB", "mem:size=32MiB")
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			disk := vm.Plug(t, device)
			vm.Run(t, fmt.Sprintf(verify, disk.Namespace(2)))
			vm.CheckDmesg(t)
		})
	}
}
