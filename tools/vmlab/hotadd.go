package vmlab

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"time"
)

// Disk is a controller as the guest's nvme driver knows it.
type Disk struct {
	Name string // of the controller, such as nvme1
	PCI  string // its address, such as 0000:02:00.0
	Port string // of one that was plugged in: QEMU's name of the root port, and with -dev behind it of the device
}

// Namespace is the block device of namespace nsid, such as /dev/nvme1n1.
func (d Disk) Namespace(nsid int) string { return fmt.Sprintf("/dev/%sn%d", d.Name, nsid) }

// HotAdd plugs a device into the next free root port (Config.Ports), and waits until the guest's nvme driver has it and has
// scanned its namespaces.
//
// It cannot be unplugged again: QEMU 11.1 aborts when a vfio-user device with MSI-X goes. Forget makes the guest let go of it.
func (vm *VM) HotAdd(ctx context.Context, d Device) (Disk, error) {
	vm.mu.Lock()
	n := vm.plugged
	if n >= vm.config.Ports {
		vm.mu.Unlock()
		return Disk{}, fmt.Errorf("all %d root ports are in use: raise Config.Ports, or boot another machine", n)
	}
	vm.plugged++
	vm.mu.Unlock()

	disk := Disk{Port: fmt.Sprintf("port%d", n)}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	props := maps.Clone(d.Props)
	props["id"], props["bus"] = disk.Port+"-dev", disk.Port
	if d.file != "" {
		drive := disk.Port + "-drive"
		node := map[string]any{"driver": "raw", "node-name": drive, "file": map[string]any{"driver": "file", "filename": d.file}}
		if _, err := vm.QMP(ctx, "blockdev-add", node); err != nil {
			return Disk{}, err
		}
		props["drive"] = drive
	}
	if _, err := vm.QMP(ctx, "device_add", props); err != nil {
		return Disk{}, err
	}
	if err := vm.taken(ctx, &disk, fmt.Sprintf("/sys/bus/pci/devices/0000:00:%02x.0", firstPortSlot+n)); err != nil {
		return Disk{}, fmt.Errorf("waiting for the guest to take what is in %s: %w", disk.Port, err)
	}
	return disk, nil
}

// DiskAt waits until the guest's nvme driver has Config.Devices[i], and returns it. The driver probes side by side: nvme0 need not be the first.
func (vm *VM) DiskAt(ctx context.Context, i int) (Disk, error) {
	var disk Disk
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := vm.taken(ctx, &disk, fmt.Sprintf("/sys/bus/pci/devices/0000:00:%02x.0/..", firstDeviceSlot+i), fmt.Sprintf("0000:00:%02x.0", firstDeviceSlot+i)); err != nil {
		return Disk{}, fmt.Errorf("waiting for the guest to take device %d: %w", i, err)
	}
	return disk, nil
}

// taken waits for a live controller on the bus in the directory bus, at the address pci if that is known, and for the device files
// of its namespaces.
func (vm *VM) taken(ctx context.Context, disk *Disk, bus string, pci ...string) error {
	at := "0000:*"
	if len(pci) > 0 {
		at = pci[0]
	}
	r, err := vm.Exec(ctx, fmt.Sprintf(`cd %s
until set -- %s/nvme/nvme*; [ -e "$1/state" ] && [ "$(cat $1/state)" = live ]; do sleep 0.05; done
for ns in $1/nvme*n*; do [ ! -e "$ns" ] || until [ -e /dev/$(echo ${ns##*/} | sed 's/c[0-9]*n/n/') ]; do sleep 0.02; done; done
echo $1`, bus, at))
	if err != nil {
		return err
	}
	address, name, ok := strings.Cut(strings.TrimSpace(r.Stdout), "/nvme/")
	if !ok {
		return fmt.Errorf("it is %q", r.Stdout)
	}
	disk.PCI, disk.Name = address, name
	return nil
}

// Forget makes the guest shut the controller down and remove it from its bus, after which the device's server may end.
func (vm *VM) Forget(ctx context.Context, d Disk) error {
	r, err := vm.Exec(ctx, fmt.Sprintf("echo 1 > /sys/bus/pci/devices/%s/remove", d.PCI))
	if err == nil && r.Exit != 0 {
		err = fmt.Errorf("removing %s: %s", d.PCI, r.Stderr)
	}
	return err
}
