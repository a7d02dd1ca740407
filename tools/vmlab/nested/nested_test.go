// Package nested has a guest that is a host: hostmed runs in it over QEMU's NVMe devices, and so does QEMU with a stock kernel, whose disks hostmed
// serves. It is the whole way of a machine: the guest's kernel, QEMU's vfio-user client, hostmed, and a device.
package nested

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Each guest's disk is a slice of a device's. A piece of it has bytes in it from before, and the one behind that the guest writes.
const (
	diskBytes  = 64 << 20
	sliceAt    = 8 << 20
	sliceBytes = 16 << 20
	piece      = 1 << 20
)

// initScript is the first process of the guest's guest.
const initScript = `#!/bin/busybox sh
b() { busybox "$@"; }
b mount -t proc p /proc
b mount -t sysfs s /sys
b mount -t devtmpfs d /dev
b mount -t tmpfs t /tmp
echo "nested: up after $(b cut -d' ' -f1 /proc/uptime)"
for d in nvme0n1 nvme0n2; do
	while [ ! -b /dev/$d ]; do b sleep 0.1; done
	ns="nested: namespace $(b cat /sys/block/$d/nsid)" # the driver numbers them as they come
	set -- $(b dd if=/dev/$d bs=64k count=16 iflag=direct 2>/dev/null | b sha256sum)
	echo "$ns read $1"
	b dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
	set -- $(b sha256sum /tmp/data)
	b dd if=/tmp/data of=/dev/$d bs=64k seek=16 oflag=direct conv=fsync 2>/dev/null && echo "$ns wrote $1"
	b dd if=/dev/$d bs=64k skip=16 count=16 iflag=direct 2>/dev/null | b cmp - /tmp/data && echo "$ns same"
done
b reboot -f
`

// TestStockGuest: a stock guest of the guest's has two disks of one controller, by nvme: and by vfio:. It reads what was on them before, and the host's kernel
// reads what it wrote; beside its slices nothing has changed.
func TestStockGuest(t *testing.T) {
	lab := vmlab.Open(t)
	dir := t.TempDir()
	tools := filepath.Join(dir, "tools")
	if err := lab.NestedImage(t.Context(), tools, initScript); err != nil {
		t.Fatal(err)
	}
	devices := []vmlab.Device{vmlab.QEMUNVMe(tools, "tools")}
	var images, wrote []string
	for i, name := range []string{"nvme", "vfio"} {
		image, sum := disk(t, dir, name, uint64(i))
		images, wrote = append(images, image), append(wrote, sum)
		devices = append(devices, vmlab.QEMUNVMe(image, name))
	}
	vm := lab.Boot(t, vmlab.Config{
		VIOMMU: true, Nested: true, MemoryMiB: 768, Programs: []string{"hostmed", "guestdrv", "nvmetrace"}, Append: "intel_iommu=on iommu=pt", Devices: devices,
	})
	t.Logf("the host is up after %.1f s", vm.BootTime().Seconds())
	if r := vm.Try(t, "modprobe kvm-amd || modprobe kvm-intel; [ -c /dev/kvm ]"); r.Exit != 0 {
		t.Fatalf("the guest has no KVM: %s (nested virtualization is off on this machine: SHADOWBELL_VMLAB_ACCEL=tcg does without)", r.Stderr)
	}
	vm.Run(t, "mkdir -p /mnt/tools && mount -o ro "+vm.Disk(t, 0).Namespace(1)+" /mnt/tools && modprobe -a vfio_iommu_type1 vfio-pci")
	kernels, ours := vm.Disk(t, 1), vm.Disk(t, 2)
	vm.Run(t, "guestdrv bind "+ours.PCI+" --driver vfio-pci")
	char := strings.Replace(kernels.Namespace(1), "/dev/nvme", "/dev/ng", 1)
	slice := fmt.Sprintf(",offset=%d,size=%d", sliceAt, sliceBytes)
	vm.Run(t, fmt.Sprintf("{ hostmed serve --control /tmp/control --socket /tmp/s --namespace nvme:%s%s --namespace vfio:%s%s >/tmp/log 2>&1; echo ended >>/tmp/log; } & "+
		"for n in $(seq 200); do [ -S /tmp/s ] && exit 0; sleep 0.1; done; cat /tmp/log >&2; exit 1", char, slice, ours.PCI, slice))

	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	r, err := vm.Exec(ctx, lab.NestedCommand("/mnt/tools", `-device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/s"}}'`)+` >/tmp/console & qemu=$!
nvmetrace doorbells --control /tmp/control --vm $qemu --json >/tmp/bells 2>&1 & bells=$!
wait $qemu; code=$?
kill -INT $bells; wait $bells
cat /tmp/console; exit $code`)
	if err != nil || r.Exit != 0 {
		t.Fatalf("exit %d, %v:\n%s\n%s\n%s", r.Exit, err, r.Stdout, r.Stderr, vm.Try(t, "tail -20 /tmp/log; dmesg | tail").Stdout)
	}
	t.Logf("its guest took %.1f s:\n%s", time.Since(begin).Seconds(), r.Stdout)
	if bad := regexp.MustCompile(`(?i)I/O error|timeout|call trace|panic|not ready`).FindString(r.Stdout); bad != "" {
		t.Errorf("the guest's console says %q", bad)
	}
	said := func(i int, what string) string {
		m := regexp.MustCompile(fmt.Sprintf(`nested: namespace %d %s ?(\S*)`, i+1, what)).FindStringSubmatch(r.Stdout)
		if m == nil {
			t.Fatalf("disk %d: the guest has not said %q", i, what)
		}
		return m[1]
	}
	doorbells(t, vm.Run(t, "cat /tmp/bells"))
	vm.Run(t, "kill -TERM $(pidof hostmed); for n in $(seq 200); do grep -q ^ended /tmp/log && exit 0; sleep 0.1; done; exit 1")
	if log := vm.Run(t, "cat /tmp/log"); !strings.Contains(log, " copied=0 ") {
		t.Errorf("vfio: copied data:\n%s", log)
	}
	vm.Run(t, "guestdrv unbind "+ours.PCI)
	if ours, err = vm.Retake(t.Context(), ours); err != nil {
		t.Fatal(err)
	}
	for i, d := range []vmlab.Disk{kernels, ours} {
		if got := said(i, "read"); got != wrote[i] {
			t.Errorf("disk %d: the guest has read %s, and on the medium was %s", i, got, wrote[i])
		}
		said(i, "same")
		got := vm.Run(t, fmt.Sprintf("dd if=%s bs=64k skip=%d count=16 iflag=direct 2>/dev/null | sha256sum", d.Namespace(1), (sliceAt+piece)>>16))
		if want := said(i, "wrote"); !strings.HasPrefix(got, want) {
			t.Errorf("disk %d: the host has read %s, and the guest wrote %s", i, got, want)
		}
		b, err := os.ReadFile(images[i])
		if err != nil {
			t.Fatal(err)
		}
		if len(bytes.Trim(b[:sliceAt], "\x00"))+len(bytes.Trim(b[sliceAt+2*piece:], "\x00")) != 0 {
			t.Errorf("disk %d: bytes have changed that the guest did not write", i)
		}
	}
}

// doorbells looks at what nvmetrace saw of the guest from outside: each of its doorbells that was a message to hostmed was an MMIO write, which KVM has passed
// on to QEMU.
func doorbells(t *testing.T, printed string) {
	t.Helper()
	var messages, commands uint64
	var exits struct{ Exits, MMIO uint64 }
	for d := json.NewDecoder(strings.NewReader(printed)); d.More(); {
		var x struct {
			Total       bool
			Controllers []struct {
				Queues []struct {
					QID, Commands uint64
					SQ            uint64 `json:"sq_mmio"`
					CQ            uint64 `json:"cq_mmio"`
				}
			}
			Exits []struct{ Exits, MMIO uint64 }
		}
		if err := d.Decode(&x); err != nil {
			t.Fatalf("%v:\n%s", err, printed)
		}
		for _, e := range x.Exits {
			if x.Total {
				exits = e
			}
		}
		for _, c := range x.Controllers {
			for _, q := range c.Queues {
				if q.QID > 0 && !x.Total { // by when QEMU has gone
					messages, commands = messages+q.SQ+q.CQ, commands+q.Commands
				}
			}
		}
	}
	t.Logf("I/O queues: %d commands, %d doorbell messages; %d exits, %d of them MMIO writes", commands, messages, exits.Exits, exits.MMIO)
	if commands == 0 || messages == 0 || exits.MMIO < messages || exits.Exits <= exits.MMIO {
		t.Errorf("nvmetrace doorbells:\n%s", printed)
	}
}

// disk makes the medium of a device, with a piece of random bytes where the guest's slice begins, and returns their checksum.
func disk(t *testing.T, dir, name string, seed uint64) (image, sum string) {
	t.Helper()
	b := make([]byte, diskBytes)
	data := b[sliceAt:][:piece]
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	image = filepath.Join(dir, name)
	if err := os.WriteFile(image, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return image, fmt.Sprintf("%x", sha256.Sum256(data))
}
