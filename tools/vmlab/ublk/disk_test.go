package ublk

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/shadowbell/shadowbell/hostmed"
	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// tree makes what is copied to each disk and compared: large files, many small ones, directories and links.
const tree = `mkdir -p /tmp/tree/programs /tmp/tree/small/deep
cp /usr/bin/busybox /usr/bin/fio /usr/bin/guestdrv /tmp/tree/programs && cp -r /etc /tmp/tree && ln -s programs /tmp/tree/link
for i in $(seq 150); do echo file $i > /tmp/tree/small/$i; ln -s ../$i /tmp/tree/small/deep/$i; done`

// TestBlockDevice is what programs make of /dev/ublkbN, on hostmed's disks and on QEMU's own.
func TestBlockDevice(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 96<<20); err != nil {
		t.Fatal(err)
	}
	g := boot(t, bySysfs,
		vmlab.Controller(t, hostmed.Shadow, "mem:size=96MiB"),
		vmlab.Controller(t, hostmed.Shadow, "mem:size=96MiB,lba=4096"),
		vmlab.QEMUNVMe(image, "qemu"),
		vmlab.VFIOUser(vmlab.Hostmed(t, hostmed.Config{Controllers: []hostmed.ControllerConfig{{Namespaces: []string{"mem:size=96MiB"}, Queues: 1}}})[0]),
		vmlab.Controller(t, hostmed.Shadow, faulty))
	t.Run("reset leaves a pause and no error", g.resetUnderLoad)
	g.Run(t, tree)
	for i, c := range []struct {
		name  string
		block int
		zero  bool // what was discarded reads as zeroes; QEMU does nothing with it
	}{{"512 bytes", 512, true}, {"4096 bytes", 4096, true}, {"QEMU", 512, false}, {"one queue", 512, true}} {
		t.Run(c.name, func(t *testing.T) {
			disk := g.serve(t, i, "--depth 32")
			defer g.end(t, "TERM")
			if got, want := g.Run(t, fmt.Sprintf("blockdev --getss %s; blockdev --getsize64 %s", disk, disk)), fmt.Sprintf("%d\n%d", c.block, 96<<20); got != want {
				t.Errorf("block size and size are %q, want %q", got, want)
			}
			r := g.long(t, 2*time.Minute, fmt.Sprintf("fio --name=v --filename=%s --rw=randrw --bsrange=4k-256k --size=16M --numjobs=2 --offset_increment=32M --iodepth=32 --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --group_reporting", disk))
			if r.Exit != 0 {
				t.Fatalf("fio: exit %d\n%s%s", r.Exit, r.Stdout, r.Stderr)
			}
			g.Run(t, fmt.Sprintf("mkfs.ext4 -q %s && mount %s /mnt && cp -r /tmp/tree /mnt/ && sync && umount /mnt && e2fsck -fn %s && mount %s /mnt && diff -r /tmp/tree /mnt/tree && umount /mnt", disk, disk, disk, disk))
			// mkfs has zeroed blocks by Write Zeroes, where there is one.
			g.Run(t, fmt.Sprintf("q=/sys/block/%s/queue; [ $(cat $q/write_zeroes_max_bytes) -gt 0 ] && [ $(cat $q/discard_max_bytes) -gt 0 ]", filepath.Base(disk)))
			g.Run(t, fmt.Sprintf("dd if=/dev/urandom of=%s bs=1M count=8 oflag=direct && blkdiscard -o 4194304 -l 4194304 %s && { ! %v || dd if=%s bs=1M skip=4 count=4 iflag=direct | cmp -n 4194304 - /dev/zero; } && ! dd if=%s bs=1M count=4 iflag=direct | cmp -s -n 4194304 - /dev/zero",
				disk, disk, c.zero, disk, disk))
		})
	}
	t.Run("partitions", func(t *testing.T) {
		disk := g.serve(t, 0, "")
		g.Run(t, `printf 'o\nn\np\n1\n\n\nw\n' | fdisk `+disk+` > /dev/null 2>&1; true`)
		g.end(t, "TERM")
		disk = g.serve(t, 0, "")
		g.Run(t, "test -b "+disk+"p1")
		g.end(t, "TERM")
	})
	t.Run("SIGTERM while mounted", func(t *testing.T) {
		// What was written is on the disk; the file system is lost to those who use it, and guestdrv ends all the same.
		disk := g.serve(t, 0, "")
		g.Run(t, fmt.Sprintf("mkfs.ext4 -q %s && mount %s /mnt && dd if=/dev/urandom of=/mnt/file bs=1M count=4 && md5sum < /mnt/file > /tmp/sum", disk, disk))
		g.end(t, "TERM")
		if r := g.Try(t, "echo more > /mnt/more && sync -f /mnt/more"); r.Exit == 0 {
			t.Error("a file system whose disk is gone takes writes")
		}
		g.Run(t, "umount /mnt")
		disk = g.serve(t, 0, "")
		g.Run(t, fmt.Sprintf("e2fsck -fy %s; mount %s /mnt && md5sum < /mnt/file | cmp - /tmp/sum && umount /mnt", disk, disk))
		g.end(t, "TERM")
	})
	g.CheckDmesg(t, `EXT4-fs|I/O error|JBD2|ublkb`, `bogus Namespace Identifiers`)
}
