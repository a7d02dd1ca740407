package nvmecli

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/shared/nvme"
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

// registrant is one entry of a reservation report.
type registrant struct {
	CNTLID uint16
	RCSTS  uint8
	RKEY   uint64
	HOSTID any
}

type report struct {
	Gen         uint32
	RType       uint8
	RegCtl      uint16
	PTPLS       uint8
	Registrants []registrant `json:"regctls"`
	Extended    []registrant `json:"regctlext"`
}

// reservations: resv-register, resv-acquire, resv-release, resv-report, resv-notif-log, by two controllers that are two hosts.
func reservations(t *testing.T, b *bench) {
	a, z := "/dev/"+b.disks[0].Name, "/dev/"+b.disks[1].Name
	hosts := [][]byte{[]byte("the host called A"[:16]), []byte("the host called Z"[1:17])}
	for i, dev := range []string{a, z} {
		b.put(t, "/tmp/host", hosts[i])
		b.Run(t, "nvme set-feature "+dev+" -f 0x81 -V 1 -l 16 -d /tmp/host")
	}
	resv := func(dev, command string) {
		t.Helper()
		b.says(t, fmt.Sprintf("nvme resv-%s -n 1 2>&1", strings.Replace(command, " ", " "+dev+" ", 1)), "success")
	}
	refused := func(dev, command string) {
		t.Helper()
		b.fails(t, nvme.StatusReservationConflict, fmt.Sprintf("nvme resv-%s -n 1", strings.Replace(command, " ", " "+dev+" ", 1)))
	}
	b.put(t, "/tmp/data", pattern("reservations", 4096))
	read, write := func(dev string) string { return "nvme read " + dev + " -n 1 -s 0 -c 7 -z 4096 -d /tmp/got" }, func(dev string) string {
		return "nvme write " + dev + " -n 1 -s 0 -c 7 -z 4096 -d /tmp/data"
	}
	is := func(when string, gen uint32, rtype uint8, want ...registrant) {
		t.Helper()
		for _, dev := range []string{a, z} {
			var r report
			b.json(t, &r, "nvme resv-report "+dev+" -n 1 --eds")
			for i := range r.Extended {
				r.Extended[i].HOSTID = nil
			}
			if r.Gen != gen || r.RType != rtype || int(r.RegCtl) != len(want) || !slices.Equal(r.Extended, want) {
				t.Errorf("%s: %s reports generation %d, type %d, %d registrants %+v; want %d, %d, %+v", when, dev, r.Gen, r.RType, r.RegCtl, r.Extended, gen, rtype, want)
			}
		}
	}
	const keyA, keyZ = 0x11, 0x22
	is("at first", 0, 0)
	refused(a, fmt.Sprintf("acquire --crkey=%#x --rtype=1 --racqa=0", keyA))
	resv(a, fmt.Sprintf("register --nrkey=%#x --rrega=0", keyA))
	resv(z, fmt.Sprintf("register --nrkey=%#x --rrega=0", keyZ))
	is("registered", 2, 0, registrant{CNTLID: 1, RKEY: keyA}, registrant{CNTLID: 2, RKEY: keyZ})
	refused(z, fmt.Sprintf("register --crkey=%#x --nrkey=5 --rrega=2", keyA)) // another's key

	resv(a, fmt.Sprintf("acquire --crkey=%#x --rtype=1 --racqa=0", keyA))
	is("write exclusive", 2, 1, registrant{CNTLID: 1, RCSTS: 1, RKEY: keyA}, registrant{CNTLID: 2, RKEY: keyZ})
	b.Run(t, write(a))
	b.Run(t, read(z)+" && cmp /tmp/got /tmp/data")
	b.fails(t, nvme.StatusReservationConflict, write(z))
	b.fails(t, nvme.StatusReservationConflict, "nvme write-zeroes "+z+" -n 1 -s 0 -c 7")
	b.fails(t, nvme.StatusReservationConflict, "nvme dsm "+z+" -n 1 --ad --slbs=0 --blocks=8")
	refused(z, fmt.Sprintf("acquire --crkey=%#x --rtype=1 --racqa=0", keyZ))
	refused(z, fmt.Sprintf("release --crkey=%#x --rtype=1 --rrela=0", keyA))

	resv(z, fmt.Sprintf("acquire --crkey=%#x --prkey=%#x --rtype=2 --racqa=1", keyZ, keyA)) // preempt
	is("preempted", 3, 2, registrant{CNTLID: 2, RCSTS: 1, RKEY: keyZ})
	b.fails(t, nvme.StatusReservationConflict, read(a))
	b.fails(t, nvme.StatusReservationConflict, write(a))
	b.Run(t, read(z)+" && cmp /tmp/got /tmp/data")
	for i, want := range []string{"(Registration Preempted)", "(Reservation Preempted)", "(Empty"} {
		b.says(t, "nvme resv-notif-log "+a, want, fmt.Sprintf("Log Page Count\t\t\t\t: %d\n", []int{1, 2, 0}[i]))
	}
	b.says(t, "nvme resv-notif-log "+z, "(Empty")

	resv(z, fmt.Sprintf("release --crkey=%#x --rtype=2 --rrela=0", keyZ))
	is("released", 3, 0, registrant{CNTLID: 2, RKEY: keyZ})
	b.Run(t, write(a))
	resv(z, fmt.Sprintf("register --crkey=%#x --rrega=1", keyZ)) // unregister
	is("unregistered", 4, 0)
	b.says(t, "nvme id-ns -H "+b.block(1), "Write Exclusive Supported", "Exclusive Access Supported", "Write Exclusive - Registrants Only Supported")

	// The host identifier is the first 16 bytes of what was set, and is there to stay.
	b.Run(t, "nvme get-feature "+a+" -f 0x81 --cdw11=1 -l 16 --raw-binary > /tmp/host")
	if got := b.get(t, "/tmp/host"); string(got) != string(hosts[0]) {
		t.Errorf("get-feature 81h: %q, want %q", got, hosts[0])
	}
}
