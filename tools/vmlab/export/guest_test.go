package export

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// guestServe starts guestdrv serve in the guest, for the controller that was unbound from its kernel driver, and waits for its socket.
const guestServe = `modprobe -a vfio_iommu_type1 vfio-pci nbd && guestdrv bind %[1]s || exit 1
(guestdrv serve pci:%[1]s --nbd unix:/tmp/nbd.sock --nbd-any-block-size >/tmp/nbd.log 2>&1 </dev/null; echo $? >/tmp/nbd.exit) &
i=0
until [ -S /tmp/nbd.sock ]; do
	i=$((i+1))
	if [ $i -gt 300 ] || [ -e /tmp/nbd.exit ]; then cat /tmp/nbd.log >&2; exit 1; fi
	sleep 0.1
done`

// connect makes block devices of the exports; the shell has an nbd-client of its own, which knows no unix sockets.
const connect = `/usr/sbin/nbd-client -unix /tmp/nbd.sock -N 1 -C 2 -b 512 /dev/nbd0 >&2 &&
/usr/sbin/nbd-client -unix /tmp/nbd.sock -N 2 -b 4096 /dev/nbd1 >&2
i=0
until [ "$(blockdev --getsize64 /dev/nbd0)" = 67108864 ] && [ "$(blockdev --getsize64 /dev/nbd1)" = 33554432 ]; do
	i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.1
done
blockdev --getbsz /dev/nbd1`

// limit is for a load on an emulated machine that others are at work on.
const limit = 3 * time.Minute

// TestNBDKernelClient: Linux's own client in a stock guest, with a file system on it, over a device that guestdrv drives through VFIO.
func TestNBDKernelClient(t *testing.T) {
	lab := vmlab.Open(t)
	disk := vmlab.Controller(t, hostmed.Shadow, "mem:size=64MiB", "mem:size=32MiB,lba=4096")
	vm := lab.Boot(t, vmlab.Config{VIOMMU: true, Programs: []string{"guestdrv"}, Devices: []vmlab.Device{disk}})
	vm.Run(t, fmt.Sprintf(guestServe, vm.Disk(t, 0).PCI))
	if got := vm.Run(t, connect); got != "4096" {
		t.Errorf("blocks of %s bytes, want 4096", got)
	}
	for what, want := range map[string]string{
		"cat /sys/block/nbd0/queue/write_cache": "write back",
		"cat /sys/block/nbd0/queue/fua":         "1",
		"cat /sys/block/nbd0/ro":                "0",
	} {
		if got := vm.Run(t, what); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}

	const fio = "fio --ioengine=libaio --direct=1 --rw=randrw --iodepth=32 --verify=crc32c --verify_fatal=1 "
	vm.RunWithin(t, limit, "mkfs.ext4 -q /dev/nbd0 && mkdir -p /tmp/mnt && mount /dev/nbd0 /tmp/mnt && "+
		fio+"--bsrange=4k-128k --fsync=64 --size=12M --name=a --filename=/tmp/mnt/a --name=b --filename=/tmp/mnt/b")
	vm.RunWithin(t, limit, fio+"--bsrange=4k-64k --size=12M --name=raw --filename=/dev/nbd1")
	// What the file system does not need any more becomes holes.
	holes := func(export string) int {
		return strings.Count(vm.Run(t, "nbdinfo --map 'nbd+unix:///"+export+"?socket=/tmp/nbd.sock'"), "hole,zero")
	}
	before := vm.Run(t, "rm /tmp/mnt/a; sync; nbdinfo --map --totals 'nbd+unix:///1?socket=/tmp/nbd.sock'")
	after := vm.Run(t, "fstrim /tmp/mnt && sync && nbdinfo --map --totals 'nbd+unix:///1?socket=/tmp/nbd.sock'")
	if before == after {
		t.Errorf("fstrim freed nothing: %s", after)
	}
	vm.Run(t, "umount /tmp/mnt && e2fsck -fn /dev/nbd0 && blkdiscard /dev/nbd1")
	if n := holes("2"); n != 1 {
		t.Errorf("a disk that was discarded has %d holes, want 1", n)
	}
	vm.Run(t, "/usr/sbin/nbd-client -d /dev/nbd0 >&2 && "+connectAgain+" && e2fsck -fn /dev/nbd0")
	vm.CheckDmesg(t)

	// The server ends under the kernel's feet: what it took is finished, the rest fails, and it ends in order.
	r := vm.Try(t, `fio --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=32 --size=32M --time_based --runtime=30 --name=x --filename=/dev/nbd0 >/tmp/fio.log 2>&1 & fio=$!
sleep 2
kill -TERM $(pidof guestdrv)
i=0
until [ -e /tmp/nbd.exit ]; do i=$((i+1)); [ $i -lt 150 ] || exit 9; sleep 0.1; done
wait $fio && exit 8
cat /tmp/nbd.exit; [ ! -e /tmp/nbd.sock ]`)
	if r.Exit != 0 || strings.TrimSpace(r.Stdout) != "0" {
		t.Errorf("the end under load: exit %d, the server's %q %s\n%s", r.Exit, r.Stdout, r.Stderr, vm.Run(t, "cat /tmp/nbd.log; tail -5 /tmp/fio.log"))
	}
	vm.Run(t, "/usr/sbin/nbd-client -d /dev/nbd0 >&2; /usr/sbin/nbd-client -d /dev/nbd1 >&2; true")
	vm.CheckDmesg(t, `I/O error, dev nbd`, `blk_update_request`, `Buffer I/O error on dev`)
}

const connectAgain = "/usr/sbin/nbd-client -unix /tmp/nbd.sock -N 1 -C 4 -b 4096 /dev/nbd0 >&2"
