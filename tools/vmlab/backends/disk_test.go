package backends

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

// diskConfig is a disk to plug in. The zero value has 256 MiB in blocks of 512 bytes, and no partitions.
type diskConfig struct {
	sizeMiB    int
	partitions []int          // MiB each, from 1 MiB on, one behind the other
	props      map[string]any // of QEMU's device: max_ioqpairs, logical_block_size, mdts, ...
}

// disk is an NVMe controller of QEMU's with one namespace, as the host has it.
type disk struct {
	vmlab.Disk
	h     *host
	image string // its bytes, on this machine
	bytes int
	gone  bool // out of the machine
	away  bool // out of its slot
}

// disk plugs a disk in and waits until the kernel's driver has it and all its partitions. At the end of t it goes, whoever has it by then.
func (h *host) disk(t *testing.T, c diskConfig) *disk {
	t.Helper()
	if c.sizeMiB == 0 {
		c.sizeMiB = 256
	}
	d := &disk{h: h, bytes: c.sizeMiB << 20}
	name := h.name("disk")
	d.image = filepath.Join(h.dir, name)
	if err := os.WriteFile(d.image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.image, int64(d.bytes)); err != nil {
		t.Fatal(err)
	}
	if len(c.partitions) > 0 {
		partition(t, d.image, c.partitions)
	}
	device := vmlab.QEMUNVMe(d.image, name)
	for k, v := range c.props {
		device = device.With(k, v)
	}
	var err error
	if d.Disk, err = h.HotAdd(t.Context(), device); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.out(t)
		os.Remove(d.image)
	})
	for i := range c.partitions {
		h.until(t, "the kernel has not got the partition", "[ -b "+d.part(i+1)+" ]")
	}
	return d
}

// out takes the disk out of the machine at the end of a test, whatever that has done to it.
func (d *disk) out(t *testing.T) {
	if d.gone || d.h.Ended() {
		return
	}
	ctx := context.Background()
	if d.away {
		if _, err := d.h.Exec(ctx, d.forgetting()); err != nil {
			t.Error(err)
		}
		if err := d.h.SlotPower(ctx, d.Disk, true); err != nil {
			t.Error(err)
		}
	}
	if err := d.h.Unplug(ctx, d.Disk); err != nil {
		t.Error(err)
	}
}

// twins are arguments for two controllers of one subsystem that share namespaces 1 and 2, of 32 MiB each. They are in the machine from its start: QEMU plugs
// no namespace in later.
func twins(t *testing.T, dir string) (args []string) {
	t.Helper()
	add := func(device string) { args = append(args, "-device", device) }
	add("nvme-subsys,id=twins")
	for i := range 2 {
		add(fmt.Sprintf("nvme,id=twin%d,subsys=twins,serial=twin,max_ioqpairs=4,addr=%#x", i, 2+i))
	}
	for nsid := 1; nsid <= 2; nsid++ {
		image := filepath.Join(dir, fmt.Sprintf("twins%d", nsid))
		if err := os.WriteFile(image, make([]byte, 32<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-drive", fmt.Sprintf("file=%s,if=none,id=twins%d,format=raw,cache=unsafe", image, nsid))
		add(fmt.Sprintf("nvme-ns,bus=twin0,drive=twins%d,nsid=%[1]d,shared=on", nsid))
	}
	return args
}

// twins returns them.
func (h *host) twins(t *testing.T) (a, b *disk) {
	t.Helper()
	return &disk{h: h, Disk: h.Disk(t, 0)}, &disk{h: h, Disk: h.Disk(t, 1)}
}

// partition writes a GPT.
func partition(t *testing.T, image string, partitions []int) {
	t.Helper()
	layout, at := "label: gpt\nfirst-lba: 2048\n", 2048
	for _, size := range partitions {
		layout += fmt.Sprintf("start=%d, size=%d\n", at, size<<20/512)
		at += size << 20 / 512
	}
	cmd := vmlab.Open(t).Program("usr/sbin/sfdisk", "-q", "--no-reread", "--no-tell-kernel", "--lock=no", image)
	cmd.Stdin = strings.NewReader(layout)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
}

// mount makes an ext4 on a block device of the host and mounts it, until the end of t.
func (h *host) mount(t *testing.T, dev string) (dir string) {
	t.Helper()
	dir = "/mnt/" + h.name("fs")
	h.Run(t, fmt.Sprintf("mkfs.ext4 -q %s && mkdir -p %s && mount %s %s", dev, dir, dev, dir))
	// A ring gives its files back a moment after its process has ended.
	h.atEnd(t, fmt.Sprintf("for n in $(seq 100); do umount %[1]s && exit 0; sleep 0.1; done 2>/dev/null; umount %[1]s", dir))
	return dir
}

// block is the kernel's block device of the namespace, char its character device, part that of a partition, from 1.
func (d *disk) block() string     { return d.Namespace(1) }
func (d *disk) char() string      { return strings.Replace(d.Namespace(1), "/dev/nvme", "/dev/ng", 1) }
func (d *disk) part(i int) string { return fmt.Sprintf("%sp%d", d.Namespace(1), i) }

// place is where partition i is, in bytes.
func (d *disk) place(t *testing.T, i int) (offset, length int) {
	t.Helper()
	out := d.h.Run(t, "cd /sys/class/block/"+filepath.Base(d.part(i))+" && cat start size")
	if _, err := fmt.Sscan(out, &offset, &length); err != nil {
		t.Fatal(err)
	}
	return offset * 512, length * 512
}

// partAt is where partition i begins, in bytes.
func (d *disk) partAt(t *testing.T, i int) int {
	t.Helper()
	offset, _ := d.place(t, i)
	return offset
}

// sumPart is a checksum of partition i as it is behind the device.
func (d *disk) sumPart(t *testing.T, i int) string {
	t.Helper()
	offset, length := d.place(t, i)
	return digest(d.read(t, offset, length))
}

// read returns a range of the medium as it is behind the device.
func (d *disk) read(t *testing.T, offset, length int) []byte {
	t.Helper()
	f, err := os.Open(d.image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, length)
	if _, err := f.ReadAt(b, int64(offset)); err != nil {
		t.Fatal(err)
	}
	return b
}

// written says whether a range of the medium has anything but zeroes.
func (d *disk) written(t *testing.T, offset, length int) bool {
	t.Helper()
	return len(bytes.Trim(d.read(t, offset, length), "\x00")) > 0
}

// vfio gives the disk's function to vfio-pci. At the end of t the kernel's driver has it again.
func (h *host) vfio(t *testing.T, d *disk) {
	t.Helper()
	h.Run(t, "modprobe -a vfio_iommu_type1 vfio-pci")
	d.vfio(t)
	t.Cleanup(func() {
		if !d.gone && !d.away && !h.Ended() {
			d.kernel(t)
		}
	})
}

// vfio is host.vfio for a disk that the kernel's driver had in the meantime.
func (d *disk) vfio(t *testing.T) {
	t.Helper()
	d.h.Run(t, "guestdrv bind "+d.PCI+" --driver vfio-pci")
}

// kernel gives the function back to the kernel's driver, and waits until that has the namespace: its name may be another than before.
func (d *disk) kernel(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := d.h.Exec(ctx, "[ -e /sys/bus/pci/drivers/nvme/"+d.PCI+" ] || guestdrv unbind "+d.PCI)
	if err != nil || r.Exit != 0 {
		t.Fatalf("giving %s back: %v: %s", d.PCI, err, r.Stderr)
	}
	now, err := d.h.Retake(ctx, d.Disk)
	if err != nil {
		t.Fatal(err)
	}
	d.Disk = now
}

// unplug takes the disk out as an operator does, and returns when it is out. Whoever has it must let go.
func (d *disk) unplug(t *testing.T) {
	t.Helper()
	if err := d.h.Unplug(t.Context(), d.Disk); err != nil {
		t.Fatal(err)
	}
	d.gone = true
}

// digest is a checksum of bytes that are here.
func digest(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// fill puts random bytes on the whole medium, past the device, but for what a partition table needs at its ends.
func fill(t *testing.T, d *disk) {
	t.Helper()
	b := make([]byte, d.bytes-2<<20)
	var seed [32]byte
	copy(seed[:], d.image)
	rand.NewChaCha8(seed).Read(b)
	f, err := os.OpenFile(d.image, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 1<<20); err != nil {
		t.Fatal(err)
	}
}

func keys(m map[string]bool) []string { return slices.Sorted(maps.Keys(m)) }

// vanish takes the disk out of its slot without a word to anybody: it answers nothing any more. Until forget the kernel thinks that it is there.
func (d *disk) vanish(t *testing.T) {
	t.Helper()
	if err := d.h.SlotPower(t.Context(), d.Disk, false); err != nil {
		t.Fatal(err)
	}
	d.away = true
}

// pullOut takes the disk out of its slot without having asked anybody; the slot tells the kernel that it is empty.
func (d *disk) pullOut(t *testing.T) {
	t.Helper()
	if err := d.h.PullOut(t.Context(), d.Disk); err != nil {
		t.Fatal(err)
	}
	d.gone = true
}

// forget tells the kernel that a disk that has vanished is away, as a machine does whose slots say so. Where vfio-pci has it, it ends when
// the process that has it lets go.
func (d *disk) forget(t *testing.T) {
	t.Helper()
	d.h.Run(t, d.forgetting())
}

func (d *disk) forgetting() string {
	return fmt.Sprintf("[ ! -e /sys/bus/pci/devices/%[1]s ] || echo 1 > /sys/bus/pci/devices/%[1]s/remove", d.PCI)
}
