package vmlab

import (
	"context"
	"encoding/json"
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

	blocks map[int]string // by NSID, of when the driver had taken it
}

// Namespace is the block device of namespace nsid, such as /dev/nvme1n1. The driver numbers them as they come, not by NSID.
func (d Disk) Namespace(nsid int) string {
	if b := d.blocks[nsid]; b != "" {
		return b
	}
	return fmt.Sprintf("/dev/%sn%d", d.Name, nsid)
}

// NamespaceOf waits until the guest has a block device of namespace nsid, which need not have been there when d was taken.
func (vm *VM) NamespaceOf(ctx context.Context, d Disk, nsid int) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	r, err := vm.Exec(ctx, fmt.Sprintf(blocksScript+"until blocks /sys/class/nvme/%s | grep '^%d '; do sleep 0.05; done", d.Name, nsid))
	if err != nil {
		return "", fmt.Errorf("waiting for namespace %d of %s: %w", nsid, d.Name, err)
	}
	_, block, _ := strings.Cut(strings.TrimSpace(r.Stdout), " ")
	return block, nil
}

// blocksScript prints NSID and device of the namespaces of a controller whose devices are there. A path to a namespace, nvme0c1n2, has its device as
// nvme0n2. It starts no program, which takes a guest that is emulated longer than all else.
const blocksScript = `blocks() {
	for ns in $1/nvme*n*; do
		dev=${ns##*/}
		[ "${dev%%c*}" = "$dev" ] || dev=${dev%%c*}n${dev##*n}
		[ -e $ns/nsid ] && [ -e /dev/$dev ] && read id <$ns/nsid && echo $id /dev/$dev
	done
}
`

// HotAdd plugs a device into the next free root port (Config.Ports), and waits until the guest's nvme driver has it and has
// scanned its namespaces.
//
// A vfio-user device cannot be unplugged again: QEMU 11.1 aborts when one with MSI-X goes. Forget makes the guest let go of it. QEMU's own can: Unplug.
func (vm *VM) HotAdd(ctx context.Context, d Device) (Disk, error) {
	vm.mu.Lock()
	n := 0
	for vm.ports[n] {
		n++
	}
	if n >= vm.config.Ports {
		vm.mu.Unlock()
		return Disk{}, fmt.Errorf("all %d root ports are in use: raise Config.Ports, or boot another machine", n)
	}
	vm.ports[n] = true
	vm.mu.Unlock()

	disk := Disk{Port: fmt.Sprintf("port%d", n)}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	props := maps.Clone(d.Props)
	props["id"], props["bus"] = disk.Port+"-dev", disk.Port
	if d.file != "" {
		drive := disk.Port + "-drive"
		node := map[string]any{"driver": "raw", "node-name": drive, "discard": "unmap", "file": map[string]any{"driver": "file", "filename": d.file, "discard": "unmap"}}
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

// Unplug takes a device of QEMU's own that was plugged in out of the machine, with its file, and returns when it is out and its port is free. The guest's
// driver is asked by hot-plug to let go; one that holds on, as vfio-pci does for as long as a process has the device, keeps it until then.
func (vm *VM) Unplug(ctx context.Context, d Disk) error {
	ctx, cancel := limited(ctx, time.Minute)
	defer cancel()
	unplugged, err := vm.StartUnplug(ctx, d)
	if err != nil {
		return err
	}
	return unplugged(ctx)
}

// StartUnplug is the first half of Unplug: it asks. What it returns is the other half, which waits.
func (vm *VM) StartUnplug(ctx context.Context, d Disk) (unplugged func(context.Context) error, err error) {
	from := vm.qmp.eventsSoFar()
	if _, err := vm.QMP(ctx, "device_del", map[string]any{"id": d.Port + "-dev"}); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		ctx, cancel := limited(ctx, time.Minute)
		defer cancel()
		for is := ""; is != d.Port+"-dev"; {
			e, next, err := vm.qmp.event(ctx, "DEVICE_DELETED", from)
			if err != nil {
				return vm.explain(fmt.Errorf("unplugging %s: %w", d.PCI, err))
			}
			var deleted struct{ Device string }
			if err := json.Unmarshal(e.Data, &deleted); err != nil {
				return err
			}
			from, is = next, deleted.Device
		}
		if _, err := vm.QMP(ctx, "blockdev-del", map[string]any{"node-name": d.Port + "-drive"}); err != nil {
			return err
		}
		var n int
		if _, err := fmt.Sscanf(d.Port, "port%d", &n); err != nil {
			return err
		}
		vm.mu.Lock()
		defer vm.mu.Unlock()
		vm.ports[n] = false
		return nil
	}, nil
}

// The bits of Slot Control, in octal bytes (PCI Express Base 5.0, 7.5.3.10): power controller and indicator, and which events interrupt. A slot without power
// whose presence detection interrupts tells the kernel when it is empty; the one that tells of nothing is silent.
const (
	slotOn     = `\300\003`
	slotSilent = `\300\007`
	slotTells  = `\371\027`
)

// SlotPower switches the power of a slot off and on. Off is a surprise removal: the device answers nothing any more, writes nowhere, and nobody has been
// asked or told. Before the power is on again, and the device is as after a reset, the guest should have let go of it: Forget.
func (vm *VM) SlotPower(ctx context.Context, d Disk, on bool) error {
	if on {
		return vm.slotControl(ctx, d, slotOn)
	}
	return vm.slotControl(ctx, d, slotSilent)
}

// PullOut takes a device out of the machine as a hand does: it answers nothing any more, nobody has been asked, and then the slot tells the kernel that it is
// empty. Its port is free afterwards.
func (vm *VM) PullOut(ctx context.Context, d Disk) error {
	// What is in a slot without power QEMU takes out at once, and sets Presence Detect Changed.
	if err := vm.slotControl(ctx, d, slotTells); err != nil {
		return err
	}
	return vm.Unplug(ctx, d)
}

// slotControl writes the Slot Control register of a port, each byte by itself: written at once, QEMU would take the device out.
func (vm *VM) slotControl(ctx context.Context, d Disk, control string) error {
	var n int
	if _, err := fmt.Sscanf(d.Port, "port%d", &n); err != nil {
		return fmt.Errorf("%s is in no root port: %w", d.PCI, err)
	}
	// It is at 18h of the capability 10h of the root port.
	r, err := vm.Exec(ctx, fmt.Sprintf(`cd /sys/bus/pci/devices/0000:00:%02x.0 || exit 1
at=$((0x$(xxd -s 0x34 -l 1 -p config)))
for n in $(seq 48); do
	[ $(xxd -s $at -l 1 -p config) = 10 ] && break
	at=$((0x$(xxd -s $((at + 1)) -l 1 -p config)))
done
printf '%s' | dd of=config bs=1 seek=$((at + 0x18)) conv=notrunc 2>/dev/null`, firstPortSlot+n, control))
	if err == nil && r.Exit != 0 {
		err = fmt.Errorf("the power of the slot of %s: %s", d.PCI, r.Stderr)
	}
	return err
}

// Retake waits until the guest's nvme driver has a disk once more that it had before, and returns it: its name may be another now.
func (vm *VM) Retake(ctx context.Context, d Disk) (Disk, error) {
	ctx, cancel := limited(ctx, 30*time.Second)
	defer cancel()
	if err := vm.taken(ctx, &d, "/sys/bus/pci/devices/"+d.PCI+"/..", d.PCI); err != nil {
		return Disk{}, fmt.Errorf("waiting for the guest to take %s: %w", d.PCI, err)
	}
	return d, nil
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
	r, err := vm.Exec(ctx, fmt.Sprintf(blocksScript+`cd %s
until set -- %s/nvme/nvme*; [ -e "$1/state" ] && read state <$1/state && [ "$state" = live ]; do sleep 0.05; done
ctrl=$1
want=$(nvme list-ns /dev/${ctrl##*/} | grep -c :0x)
until have=$(blocks $ctrl); set -- $have; [ $# -ge $((2 * want)) ]; do sleep 0.02; done
echo $ctrl
echo "$have"`, bus, at))
	if err != nil {
		return err
	}
	first, rest, _ := strings.Cut(strings.TrimSpace(r.Stdout), "\n")
	address, name, ok := strings.Cut(first, "/nvme/")
	if !ok {
		return fmt.Errorf("it is %q", r.Stdout)
	}
	disk.PCI, disk.Name, disk.blocks = address, name, map[int]string{}
	for line := range strings.Lines(rest) {
		var nsid int
		var dev string
		if _, err := fmt.Sscan(line, &nsid, &dev); err != nil {
			return fmt.Errorf("%q is no namespace: %w", line, err)
		}
		disk.blocks[nsid] = dev
	}
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
