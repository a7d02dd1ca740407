package pcidrv

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestOneCPU has a driver in a guest of one CPU, which shares its doorbells with a mediator that goes to sleep at every chance: no wake-up is
// lost, though that CPU is emulated (see vmlab's minMaxCPUs). Where QEMU may leave the barriers out, 1.5 million reads lost three in 8 s.
func TestOneCPU(t *testing.T) {
	lab := vmlab.Open(t)
	c := hostmed.Config{Poll: 10 * time.Microsecond, Controllers: []hostmed.ControllerConfig{{Namespaces: []string{"mem:size=64MiB"}, Doorbells: hostmed.Shadow}}}
	vm := lab.Boot(t, vmlab.Config{CPUs: 1, Programs: []string{"guestdrv"}, Devices: []vmlab.Device{vmlab.VFIOUser(vmlab.Hostmed(t, c)[0])}})
	dev := vm.Disk(t, 0).PCI
	vm.Run(t, "echo 40 > /proc/sys/vm/nr_hugepages && guestdrv bind "+dev)
	r := vm.Try(t, "guestdrv bench pci:"+dev+" --json --rw randread --qd 1 --jobs 1 --runtime 10s --timeout 1s")
	var out struct {
		IOPS    float64
		Errors  uint64
		Trouble *struct{ Timeouts uint64 }
	}
	if err := json.Unmarshal([]byte(r.Stdout[max(0, strings.Index(r.Stdout, "{")):]), &out); err != nil {
		t.Fatalf("%v: exit %d: %s%s", err, r.Exit, r.Stdout, r.Stderr)
	}
	if out.IOPS == 0 || out.Errors != 0 || out.Trouble != nil {
		t.Errorf("exit %d: %s%s", r.Exit, r.Stdout, r.Stderr)
	}
}
