// Package ublk has guestdrv give disks to stock Linux guests as block devices: fio, mkfs and mount use them, guestdrv is killed under load and
// comes back, and a microVM lives on one as its only disk.
package ublk

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shadowbell/shadowbell/tools/vmlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// guest is a machine with PCI functions that are guestdrv's.
type guest struct {
	*vmlab.VM
	devices []string // as guestdrv names them
}

// The ways to a PCI function.
const (
	bySysfs = "sysfs:" // no IOMMU, no interrupts
	byVFIO  = "vfio:"
)

// boot boots a stock guest whose kernel driver has let go of all disks.
func boot(t *testing.T, way string, devices ...vmlab.Device) *guest {
	t.Helper()
	return bootKernel(t, vmlab.Stable, way, devices...)
}

func bootKernel(t *testing.T, kernel vmlab.Kernel, way string, devices ...vmlab.Device) *guest {
	t.Helper()
	g := &guest{VM: vmlab.Open(t).Boot(t, vmlab.Config{Kernel: kernel, Programs: []string{"guestdrv"}, MemoryMiB: 768, VIOMMU: way == byVFIO, Devices: devices})}
	g.Run(t, "modprobe ublk_drv")
	if way == byVFIO {
		g.Run(t, "modprobe -a vfio_iommu_type1 vfio-pci")
	} else {
		// DMA memory of a function without an IOMMU is huge pages.
		g.Run(t, "echo 64 > /proc/sys/vm/nr_hugepages")
	}
	for i := range devices {
		pci := g.Disk(t, i).PCI
		g.devices = append(g.devices, way+pci)
		g.Run(t, "echo "+pci+" > /sys/bus/pci/drivers/nvme/unbind")
		if way == byVFIO {
			g.Run(t, fmt.Sprintf("echo vfio-pci > /sys/bus/pci/devices/%s/driver_override && echo %s > /sys/bus/pci/drivers_probe", pci, pci))
		}
	}
	return g
}

// serve starts guestdrv on function i and returns when the block device is there, and its name. What guestdrv says is in /tmp/serve.N.
func (g *guest) serve(t *testing.T, i int, flags string) string {
	t.Helper()
	g.Run(t, fmt.Sprintf("rm -f /tmp/serve.%d; guestdrv serve %s --ublk -v %s > /tmp/serve.%d 2>&1 < /dev/null &", i, g.devices[i], flags, i))
	return g.ready(t, i)
}

// ready waits for the block device's name.
func (g *guest) ready(t *testing.T, i int) string {
	t.Helper()
	r := g.Try(t, fmt.Sprintf("for n in $(seq 250); do grep -m1 ^/dev/ublkb /tmp/serve.%d && exit; [ $n -gt 20 ] && ! pidof guestdrv > /dev/null && break; sleep 0.1; done; cat /tmp/serve.%d; exit 1", i, i))
	if r.Exit != 0 {
		t.Fatalf("no block device:\n%s", r.Stdout)
	}
	return strings.TrimSpace(r.Stdout)
}

// end ends guestdrv by a signal to its first process, and waits until all of it has ended.
func (g *guest) end(t *testing.T, signal string) {
	t.Helper()
	g.Run(t, "kill -"+signal+" $(pidof guestdrv); for n in $(seq 250); do pidof guestdrv > /dev/null || exit 0; sleep 0.1; done; cat /tmp/serve.* >&2; exit 1")
	if left := g.Run(t, "ls /dev | grep ^ublkb; true"); left != "" {
		t.Errorf("still there after SIG%s: %s", signal, left)
	}
}

// long runs a command that takes more than a minute.
func (g *guest) long(t *testing.T, limit time.Duration, command string) vmlab.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	r, err := g.Exec(ctx, command)
	if err != nil {
		t.Fatal(err)
	}
	return r
}
