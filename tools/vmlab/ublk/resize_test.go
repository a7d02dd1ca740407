package ublk

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// TestBlockDeviceFollowsItsNamespace: on a kernel whose ublk can (Linux 6.16), the block device has the size that the namespace has, while it is in
// use, and also when the namespace has grown while nobody served it.
func TestBlockDeviceFollowsItsNamespace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	c := hostmed.Config{Controllers: []hostmed.ControllerConfig{{Namespaces: []string{"file:" + file}}}}
	grow := func(mib int64) {
		t.Helper()
		if err := os.Truncate(file, mib<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	grow(32)
	m := vmlab.Serve(t, &c)
	g := bootKernel(t, vmlab.Backports, bySysfs, vmlab.VFIOUser(c.Controllers[0].Socket))
	resize := func(mib int64) {
		t.Helper()
		grow(mib)
		if err := m.Reload(c); err != nil {
			t.Fatal(err)
		}
	}
	disk := g.serve(t, 0, "")
	is := func(mib int64) {
		t.Helper()
		g.Run(t, fmt.Sprintf("until [ $(blockdev --getsize64 %s) = %d ]; do sleep 0.05; done", disk, mib<<20))
	}
	is(32)
	g.Run(t, fmt.Sprintf("mkfs.ext4 -q -b 4096 %s && mount %s /mnt && cp /usr/bin/busybox /mnt", disk, disk))
	resize(64)
	is(64)
	// What is new can be used, and the file system has not noticed.
	g.Run(t, fmt.Sprintf(`dd if=/dev/urandom of=/tmp/data bs=1M count=1 && dd if=/tmp/data of=%s bs=1M seek=63 oflag=direct && dd if=%s bs=1M skip=63 iflag=direct | cmp - /tmp/data
		umount /mnt && e2fsck -fn %s && mount %s /mnt && cmp /mnt/busybox /usr/bin/busybox && umount /mnt`, disk, disk, disk, disk))

	// Its server is killed under load, the namespace grows meanwhile, and the next server takes over the requests and the size.
	g.Run(t, fmt.Sprintf(`(fio --name=v --filename=%s --rw=randwrite --bs=4k --size=4M --offset=32M --iodepth=32 --ioengine=libaio --direct=1 --rate_iops=300 \
		--verify=crc32c --verify_fatal=1 > /tmp/fio 2>&1; echo "fio ended: $?" >> /tmp/fio) < /dev/null > /dev/null 2>&1 &
		until [ $(awk '{ print $5 }' /sys/block/%s/stat) -gt 400 ]; do sleep 0.05; done`, disk, filepath.Base(disk)))
	g.Run(t, "kill -9 $(pidof guestdrv); while pidof guestdrv > /dev/null; do sleep 0.05; done")
	resize(96)
	if again := g.serve(t, 0, ""); again != disk {
		t.Fatalf("came back as %s, not %s", again, disk)
	}
	is(96)
	if r := g.long(t, 2*time.Minute, `until grep "fio ended" /tmp/fio; do sleep 0.1; done; cat /tmp/fio`); !strings.Contains(r.Stdout, "fio ended: 0") {
		t.Errorf("fio:\n%s", r.Stdout)
	}
	resize(48)
	is(48)
	g.end(t, "TERM")
	g.CheckDmesg(t)
}
