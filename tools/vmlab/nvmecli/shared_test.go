package nvmecli

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// multipath: two controllers of a subsystem are two paths to their namespace for a stock kernel, which uses both, and does without one.
func multipath(t *testing.T, b *bench) {
	dev := b.block(1)
	if other := b.disks[1].Namespace(1); other != dev {
		t.Fatalf("the namespace is %s by one controller and %s by the other", dev, other)
	}
	type path struct{ Name, Transport, Address, State string }
	var hosts []struct {
		Subsystems []struct {
			NQN   string
			Paths []path
		}
	}
	b.json(t, &hosts, "nvme list-subsys")
	if len(hosts) != 1 || len(hosts[0].Subsystems) != 1 || hosts[0].Subsystems[0].NQN != b.sub.NQN || len(hosts[0].Subsystems[0].Paths) != 2 {
		t.Errorf("list-subsys: %+v, want %s with two paths", hosts, b.sub.NQN)
	}
	for i, d := range b.disks {
		b.says(t, "nvme id-ctrl -H /dev/"+d.Name, fmt.Sprintf("cntlid    : 0x%x\n", i+1), "Multi Controller", "Multi Port", b.sub.NQN)
	}
	b.says(t, "nvme id-ns -H "+dev, "Namespace Multipath Capable")

	b.Run(t, "echo round-robin > /sys/class/nvme-subsystem/nvme-subsys0/iopolicy")
	b.fio(t, fmt.Sprintf(load, dev, "io_uring"), 1024)
	for i, cc := range b.sub.Controllers {
		if s, err := b.daemon.Stats(cc.Socket); err != nil || s.Writes < 256 || s.Reads < 256 || s.Errors > 0 {
			t.Errorf("path %d: %+v, %v: want half of 1024 reads and writes", i, s, err)
		}
	}

	// One path is reset, and then the other goes away, under load.
	b.Run(t, fmt.Sprintf("(while [ ! -e /tmp/enough ]; do fio --name=v --filename=%s --rw=randrw --bs=4k --size=4M --iodepth=8 --ioengine=libaio --direct=1"+
		" --verify=crc32c --verify_fatal=1 || touch /tmp/failed; done; touch /tmp/over) >/tmp/fio 2>&1 &", dev))
	b.Run(t, "sleep 1; nvme reset /dev/"+b.disks[0].Name)
	b.Run(t, "sleep 0.5; echo "+b.disks[1].PCI+" > /sys/bus/pci/drivers/nvme/unbind")
	b.RunWithin(t, 2*time.Minute, "touch /tmp/enough; until [ -e /tmp/over ]; do sleep 0.1; done; [ ! -e /tmp/failed ] || { cat /tmp/fio; exit 1; }; rm /tmp/enough /tmp/over")
	if out := b.Run(t, "nvme list-subsys"); strings.Contains(out, b.disks[1].Name+" ") || !strings.Contains(out, b.disks[0].Name+" pcie") {
		t.Errorf("after one path went away:\n%s", out)
	}
	b.fio(t, fmt.Sprintf(load, dev, "io_uring"), 1024)
}
