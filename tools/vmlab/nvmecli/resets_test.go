package nvmecli

import (
	"fmt"
	"testing"

	"github.com/shadowbell/shadowbell/shared/nvme"
)

// resets: reset, subsystem-reset, ns-rescan, each with data that must survive and a controller that must work afterwards.
func resets(t *testing.T, b *bench) {
	ctrl, dev := b.ctrl(), b.block(1)
	data := pattern("resets", 64<<10)
	b.put(t, "/tmp/data", data)
	b.Run(t, fmt.Sprintf("nvme write %s -s 8 -c 127 -z 65536 -d /tmp/data", dev))
	check := func(when string) {
		t.Helper()
		if got := b.Run(t, "cat /sys/class/nvme/"+b.disks[0].Name+"/state"); got != "live" {
			t.Errorf("%s: the controller is %s", when, got)
		}
		b.Run(t, fmt.Sprintf("nvme compare %s -s 8 -c 127 -z 65536 -d /tmp/data", dev))
		b.Run(t, fmt.Sprintf("dd if=%s bs=4k skip=1 count=16 iflag=direct 2>/dev/null | cmp - /tmp/data", dev))
	}
	errors := func() uint64 { return b.smart(t)["num_err_log_entries"] }

	before := errors()
	for range 3 {
		b.Run(t, "nvme reset "+ctrl)
		check("after a reset")
	}
	if n := errors() - before; n != 0 {
		t.Errorf("resets left %d entries in the error log", n)
	}

	// Linux does not notice a subsystem reset by itself, except by its link going down, which a virtual one does not: CSTS says it.
	b.Run(t, "nvme subsystem-reset "+ctrl)
	regs := b.object(t, "nvme show-regs "+ctrl)
	if csts, cc := nvme.CSTS(number(t, regs["csts"])), number(t, regs["cc"]); csts.RDY() || !csts.NSSRO() || csts.CFS() || cc&1 != 0 {
		t.Errorf("after a subsystem reset: %v, CC=%#x: want not ready, NSSRO, not enabled", csts, cc)
	}
	b.Run(t, "nvme reset "+ctrl)
	check("after a subsystem reset")

	b.Run(t, "nvme ns-rescan "+ctrl)
	check("after a rescan")
	b.says(t, "nvme list", b.sub.Serial)
}
