package memtest

import (
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestMemoryHotPlug: memory comes while I/O goes on, is put to use, and I/O goes to it.
func TestMemoryHotPlug(t *testing.T) {
	devices := disks(t)
	vm := vmlab.Open(t).Boot(t, vmlab.Config{Devices: devices, Args: []string{"-m", "512,slots=2,maxmem=2G"}})
	done := make(chan vmlab.Result, 1)
	go func() {
		r, err := vm.Exec(t.Context(), "fio --name=w --filename="+vm.Disk(t, 0).Namespace(1)+" --ioengine=libaio --direct=1 --rw=randrw --bs=4k --iodepth=16 --verify=crc32c --verify_fatal=1 --size=8M --loops=100 --runtime=5 --time_based")
		if err != nil {
			r.Stderr = err.Error()
			r.Exit = -1
		}
		done <- r
	}()
	before := memTotal(t, vm)
	for i, id := range []string{"more0", "more1"} {
		time.Sleep(time.Second)
		ctx := t.Context()
		if _, err := vm.QMP(ctx, "object-add", map[string]any{"qom-type": "memory-backend-memfd", "id": id, "size": 256 << 20, "share": true}); err != nil {
			t.Fatal(err)
		}
		if _, err := vm.QMP(ctx, "device_add", map[string]any{"driver": "pc-dimm", "id": "dimm-" + id, "memdev": id}); err != nil {
			t.Fatal(err)
		}
		vm.Run(t, "for i in $(seq 100); do for m in /sys/devices/system/memory/memory*; do [ $(cat $m/state) = online ] || echo online_movable > $m/state; done; sleep 0.05; [ $(awk '/MemTotal/{print $2}' /proc/meminfo) -lt $(("+before+" + "+[]string{"200000", "450000"}[i]+")) ] || exit 0; done; exit 1")
	}
	if r := <-done; r.Exit != 0 {
		t.Fatalf("fio: %s%s", r.Stdout, r.Stderr)
	}
	verify(t, vm, "2M") // its buffers are in the new memory, which is taken first
	vm.CheckDmesg(t)
}

func memTotal(t *testing.T, vm *vmlab.VM) string {
	t.Helper()
	return strings.TrimSpace(vm.Run(t, "awk '/MemTotal/{print $2}' /proc/meminfo"))
}
