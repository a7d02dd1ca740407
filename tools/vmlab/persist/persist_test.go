// Package persist tests, with stock guests, what of a controller outlives them.
package persist

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/guestdrv"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/shared/nvme"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

const patience = 20 * time.Second

// counters is the SMART log as nvme-cli reads it.
func counters(t *testing.T, vm *vmlab.VM) (power, unsafe, errors uint64) {
	t.Helper()
	var l struct {
		PowerCycles     json.Number `json:"power_cycles"`
		UnsafeShutdowns json.Number `json:"unsafe_shutdowns"`
		Errors          json.Number `json:"num_err_log_entries"`
	}
	out := vm.Run(t, "nvme smart-log /dev/nvme0 -o json")
	if err := json.Unmarshal([]byte(out), &l); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	var v [3]int64
	for i, n := range []json.Number{l.PowerCycles, l.UnsafeShutdowns, l.Errors} {
		var err error
		if v[i], err = n.Int64(); err != nil {
			t.Fatal(err)
		}
	}
	return uint64(v[0]), uint64(v[1]), uint64(v[2])
}

// TestLivesOfAController: one guest ends in order, the next is killed. What was saved, counted and protected is as the spec wants it
// each time, and the guest's kernel sees the protection.
func TestLivesOfAController(t *testing.T) {
	lab := vmlab.Open(t)
	c := hostmed.Config{State: t.TempDir(), Controllers: []hostmed.ControllerConfig{{Namespaces: []string{"file:" + filepath.Join(t.TempDir(), "disk") + ",size=64MiB"}}}}
	vmlab.Serve(t, &c)
	device := vmlab.VFIOUser(c.Controllers[0].Socket)

	vm := lab.Boot(t, vmlab.Config{Devices: []vmlab.Device{device}})
	if power, unsafe, _ := counters(t, vm); power == 0 || unsafe != 0 {
		t.Errorf("the first guest: %d power cycles, %d unsafe shutdowns", power, unsafe)
	}
	first, _, _ := counters(t, vm)
	const readOnly = "for i in $(seq 100); do [ $(cat /sys/block/nvme0n1/ro) = %s ] && break; sleep 0.1; done; cat /sys/block/nvme0n1/ro"
	ro := func(vm *vmlab.VM, want string) {
		t.Helper()
		if got := strings.TrimSpace(vm.Run(t, strings.Replace(readOnly, "%s", want, 1))); got != want {
			t.Errorf("the kernel says read-only %s, want %s", got, want)
		}
	}
	const write = "dd if=/dev/zero of=/dev/nvme0n1 bs=4k count=1 oflag=direct 2>/dev/null"
	vm.Run(t, write)
	vm.Run(t, "nvme set-feature /dev/nvme0 -n 1 -f 0x84 -V 1")
	ro(vm, "1")
	if r := vm.Try(t, write); r.Exit == 0 {
		t.Error("a protected namespace was written")
	}
	vm.Run(t, "nvme set-feature /dev/nvme0 -n 1 -f 0x84 -V 0")
	ro(vm, "0")
	vm.Run(t, write)
	vm.Run(t, "nvme set-feature /dev/nvme0 -n 1 -f 0x84 -V 2") // until power is off
	ro(vm, "1")
	vm.Run(t, "nvme set-feature /dev/nvme0 -f 1 -V 3 --save")
	_, _, errors := counters(t, vm)
	vm.CheckDmesg(t)
	if err := vm.Poweroff(t.Context()); err != nil {
		t.Fatal(err)
	}

	vm = lab.Boot(t, vmlab.Config{Devices: []vmlab.Device{device}})
	power, unsafe, errorsNow := counters(t, vm)
	if power != first+1 || unsafe != 0 || errorsNow < errors {
		t.Errorf("after a guest that ended in order: %d power cycles after %d, %d unsafe shutdowns, %d errors after %d", power, first, unsafe, errorsNow, errors)
	}
	ro(vm, "0")
	vm.Run(t, write)
	if out := vm.Run(t, "nvme get-feature /dev/nvme0 -f 1"); !strings.Contains(out, "0x00000003") {
		t.Errorf("the saved arbitration is not in use: %s", out)
	}
	events := vm.Run(t, "nvme persistent-event-log /dev/nvme0 --action=1 --log_len=4096; nvme persistent-event-log /dev/nvme0 --action=2 --log_len=0 >/dev/null")
	for _, s := range []string{"Power On Reset Event Entry", "SMART/Health Log Snapshot Event", "Time Stamp Change Event Entry"} {
		if !strings.Contains(events, s) {
			t.Errorf("the persistent event log has no %q:\n%.3000s", s, events)
		}
	}
	vm.CheckDmesg(t)
	vm.Kill()

	var d *guestdrv.Controller
	for end := time.Now().Add(patience); d == nil; time.Sleep(50 * time.Millisecond) {
		var err error
		if d, err = guestdrv.Open(t.Context(), "vfio-user:"+c.Controllers[0].Socket, guestdrv.Options{}); err != nil && time.Now().After(end) {
			t.Fatal(err) // until QEMU's connection is gone the controller is its
		}
	}
	defer d.Close()
	var cmd nvme.Command
	if err := cmd.SetGetLogPage(nvme.LogSMART, nvme.NSIDAll, 0, 512, false); err != nil {
		t.Fatal(err)
	}
	l := new(nvme.SMARTLog)
	if _, err := d.Admin(t.Context(), &cmd, l.Bytes()[:]); err != nil {
		t.Fatal(err)
	}
	if l.UnsafeShutdowns.Lo != 1 || l.PowerCycles.Lo != power+1 || l.HostWrites.Lo < 3 {
		t.Errorf("after a guest that was killed: %+v", l)
	}
}
