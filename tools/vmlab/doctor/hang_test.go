//go:build shadowbell_faults

package doctor

import (
	"testing"

	"github.com/shadowbell/shadowbell/ebpf/doctor"
	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestHangingGuest: the device begins to drop kicks (R10) under a stock guest, whose fio hangs; the doctor says so, and wakes it before the guest's kernel has
// waited long enough to complain.
func TestHangingGuest(t *testing.T) {
	lab := vmlab.Open(t)
	c := hostmed.Config{Controllers: []hostmed.ControllerConfig{{Namespaces: []string{"mem:size=64MiB"}}}}
	r := serve(t, &c)
	vm := lab.Boot(t, vmlab.Config{CPUs: 1, Devices: []vmlab.Device{vmlab.VFIOUser(c.Controllers[0].Socket)}})
	d := vm.Disk(t, 0).Namespace(1)
	read := "dd if=" + d + " of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null"
	vm.Run(t, read)
	if code, all := r.look(t); code != 0 {
		t.Fatalf("exit %d: %+v", code, all)
	}
	if err := hostmed.Break("drop-kick", true); err != nil {
		t.Fatal(err)
	}
	vm.Run(t, "rm -f /tmp/done; { "+read+"; touch /tmp/done; } > /dev/null 2>&1 &")
	code, all := r.look(t)
	var found *doctor.Finding
	for i := range all {
		if all[i].Verdict == doctor.Broken {
			found = &all[i]
		}
	}
	if code != 1 || found == nil || found.Rule != "R10" || found.Side != doctor.Device {
		t.Errorf("exit %d: %+v", code, all)
	} else {
		t.Log(found.Text)
	}
	if vm.Try(t, "[ -e /tmp/done ]").Exit == 0 {
		t.Error("the read has ended by itself")
	}
	if err := hostmed.Break("drop-kick", false); err != nil {
		t.Fatal(err)
	}
	if code, all := r.look(t, "--fix", "kick"); code != 0 {
		t.Errorf("after a kick: exit %d: %+v", code, all)
	}
	vm.Run(t, "for n in $(seq 50); do [ -e /tmp/done ] && exit 0; sleep 0.1; done; exit 1")
	vm.CheckDmesg(t)
}
